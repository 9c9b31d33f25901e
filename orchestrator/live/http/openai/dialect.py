"""Which endpoints speak OpenAI's words, and what reads and writes them."""

from collections.abc import Mapping

from orchestrator.live.http.dialects import Dialect
from orchestrator.live.http.openai.answers import error_body, error_event, write_chat, write_completion
from orchestrator.live.http.openai.requests import parse_chat, parse_completion

CHAT = Dialect(parse_chat, write_chat, error_body, error_event)
COMPLETIONS = Dialect(parse_completion, write_completion, error_body, error_event)

#: By path.
ENDPOINTS: Mapping[str, Dialect] = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETIONS}
