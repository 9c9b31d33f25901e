"""How conversations look to chat templates, whatever API they came by: text content, parsed arguments, only what is there.

What changes from turn to turn and means nothing is left out, so that prompts of one conversation begin alike: billing lines of
system messages, and markers of what to cache. Dialects' parsers put together what is here; none has rules of its own for it.

    message   {"role", "content": text, "tool_calls"?, "tool_call_id"?, "name"?, "reasoning_content"? and "thinking"?}
    tool      {"type": "function", "function": {"name", "description"?, "parameters"?: JSON schema}}
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from orchestrator.live.text.templates import decoded_arguments

#: Claude Code's first system line differs from request to request; kept, it would end every shared prefix there.
_BILLING_HEADER = "x-anthropic-billing-header"
#: Moves on with the conversation.
_CACHE_MARKER = "cache_control"


def shown_message(
    role: str,
    content: str,
    name: str | None = None,
    tool_calls: Sequence[Mapping[str, Any]] | None = None,
    tool_call_id: str | None = None,
    thoughts: str | None = None,
) -> dict[str, Any]:
    """Return a message as templates read it."""
    role = "system" if role == "developer" else role
    if role == "system":
        content = without_billing(content)
    shown: dict[str, Any] = {"role": role, "content": content}
    if tool_calls:
        shown["tool_calls"] = tool_calls
    if tool_call_id is not None:
        shown["tool_call_id"] = tool_call_id
    if name is not None:
        shown["name"] = name
    if thoughts is not None:
        # Under both names that templates read.
        shown["reasoning_content"] = shown["thinking"] = thoughts
    return shown


def without_billing(text: str) -> str:
    """Return a text of a system message without its billing lines."""
    if _BILLING_HEADER not in text:
        return text
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(_BILLING_HEADER))


def shown_call(name: str, arguments: str | Mapping[str, Any] | None, call_id: str | None, kind: str) -> dict[str, Any]:
    """Return a call of an earlier turn as templates read it; arguments may be JSON text, or whatever a model wrote instead."""
    decoded: Any = arguments or {}
    if isinstance(decoded, str):
        decoded = decoded_arguments(decoded)
    return {"id": call_id, "type": kind, "function": {"name": name, "arguments": decoded}}


def shown_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return tools as templates read them; None for none."""
    if not tools:
        return None
    return [{key: value for key, value in tool.items() if key != _CACHE_MARKER} for tool in tools]


def tool_parameters(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Mapping[str, Any]]:
    """Return the functions among some tools by name, each with the schema of its parameters."""
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools or ():
        function = tool.get("function")
        if isinstance(function, Mapping) and "name" in function:
            function = cast("Mapping[str, Any]", function)
            parameters = function.get("parameters")
            found[str(function["name"])] = cast("Mapping[str, Any]", parameters) if isinstance(parameters, Mapping) else {}
    return found
