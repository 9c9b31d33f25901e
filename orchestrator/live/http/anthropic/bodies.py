"""Bodies of requests in Anthropic's words, as JSON is read into them; `requests.py` checks them and says what they ask for.

Unknown fields are ignored, never refused. Those that are known and not served are in `unserved.py`.
"""

from typing import Any

import msgspec


class Block(msgspec.Struct):
    """A part of a message's content, of the system prompt or of a tool's result; which fields count is said by its type."""

    type: str
    text: str | None = None
    # thinking, redacted_thinking
    thinking: str | None = None
    signature: str | None = None
    # tool_use
    id: str | None = None
    name: str | None = None
    input: Any = None
    # tool_result, search_result; servers' own tools have objects there
    tool_use_id: str | None = None
    content: "str | list[Block] | dict[str, Any] | None" = None
    is_error: bool | None = None
    # tool_reference
    tool_name: str | None = None
    # document, search_result
    source: Any = None
    title: str | None = None
    context: str | None = None
    citations: Any = None
    cache_control: Any = None


class Message(msgspec.Struct):
    """One message of a conversation."""

    role: str
    content: str | list[Block]


class Tool(msgspec.Struct):
    """What the model may call."""

    name: str | None = None
    #: None or "custom": the client's own; all others are Anthropic's.
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: Any = None


class ToolChoice(msgspec.Struct):
    """What the model is to do with its tools."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    """Whether to think before answering, and how thoughts are told."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class Format(msgspec.Struct):
    """What an answer must be."""

    type: str
    schema: dict[str, Any] | None = None


class OutputConfig(msgspec.Struct):
    """How to answer."""

    effort: str | None = None
    format: Format | None = None


class Metadata(msgspec.Struct):
    """Who asks."""

    user_id: str | None = None


class MessagesRequest(msgspec.Struct, kw_only=True):
    """Body of /v1/messages and, without `max_tokens`, of /v1/messages/count_tokens."""

    model: str
    messages: list[Message]
    max_tokens: int | None = None
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    #: As it was called before `output_config`.
    output_format: Format | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None
    service_tier: str | None = None
    speed: str | None = None
    cache_control: Any = None
    # Not served unless they ask for nothing.
    container: Any = None
    mcp_servers: Any = None
    context_management: Any = None
