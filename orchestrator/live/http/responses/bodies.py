"""Bodies of requests for responses, as JSON is read into them; `requests.py` checks them and says what they ask for.

Items stay as they were written: they are kept, and shown again to whoever asks for them; `items.py` reads them.
"""

from typing import Any

import msgspec

from orchestrator.live.http.openai.bodies import GenerationRequest


class Reasoning(msgspec.Struct):
    """How much to think, and how thoughts are told."""

    effort: str | None = None
    summary: str | None = None
    #: What `summary` was called.
    generate_summary: str | None = None

    @property
    def told_as_summary(self) -> bool:
        """Thoughts are told as a summary, which clients show where they would hide the thoughts themselves."""
        return (self.summary or self.generate_summary or "none") != "none"


class Text(msgspec.Struct):
    """What the text of an answer must be."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class CacheOptions(msgspec.Struct):
    """How to keep the prompt's cached blocks."""

    #: At least so long: 30m, 12h.
    ttl: str | None = None


class ResponsesRequest(GenerationRequest, kw_only=True):
    """Body of /v1/responses."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = None
    truncation: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt_cache_options: CacheOptions | None = None
    # Known and not served.
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None

    @property
    def stores(self) -> bool:
        """The response is kept; not only said."""
        return self.store is not False

    @property
    def cache_markers(self) -> list[Any]:
        """What is said of caching the prompt, in whatever form."""
        options = self.prompt_cache_options
        kept = {"type": "ephemeral", "ttl": options.ttl} if options is not None and options.ttl is not None else None
        return [self.cache_control, self.nvext.cache_control if self.nvext is not None else None, kept]
