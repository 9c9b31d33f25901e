"""Which endpoints speak Anthropic's words, and what reads and writes them."""

from collections.abc import Mapping

from orchestrator.live.http.anthropic.answers import count_body, error_body, error_event, write_message
from orchestrator.live.http.anthropic.requests import parse_count, parse_messages
from orchestrator.live.http.dialects import Dialect

_REQUEST_HEADER = b"request-id"

MESSAGES = Dialect(parse_messages, write_message, error_body, error_event, request_header=_REQUEST_HEADER)
COUNT = Dialect(parse_count, write_message, error_body, error_event, count=count_body, request_header=_REQUEST_HEADER)

_PATH = "/v1/messages"
#: By path.
ENDPOINTS: Mapping[str, Dialect] = {_PATH: MESSAGES, f"{_PATH}/count_tokens": COUNT}


def speaks(path: str, headers: Mapping[bytes, bytes]) -> bool:
    """Return whether a request, wherever it goes, is made in Anthropic's words."""
    return path.startswith(_PATH) or b"anthropic-version" in headers
