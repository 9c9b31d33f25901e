"""How conversations look to chat templates, whatever API they came by: text content, parsed arguments, only what is there.

What changes from turn to turn and means nothing is left out, so that prompts of one conversation begin alike: billing lines of
system messages, and markers of what to cache. Dialects' parsers put together what is here; none has rules of its own for it.

    message   {"role", "content": text, "tool_calls"?, "tool_call_id"?, "name"?, "reasoning_content"? and "thinking"?}
    tool      {"type": "function", "function": {"name", "description"?, "parameters"?: JSON schema}}
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from orchestrator.live.asked import Conversation
from orchestrator.live.text.templates import Arguments, decoded_arguments

#: Claude Code's first system line differs from request to request; kept, it would end every shared prefix there.
_BILLING_HEADER = "x-anthropic-billing-header"
_REMINDER = "<system-reminder>\n{}\n</system-reminder>"
#: Between messages of the system's that become one.
_BETWEEN = "\n\n"
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


def without_late_systems(conversation: Conversation) -> Conversation:
    """Return a conversation that opens with one message of the system's at most; later ones stand in messages of the user's.

    For templates that would refuse them, or leave them out. What the system says later is told from what users say by tags that
    models know from harnesses.
    """
    messages: list[dict[str, Any]] = []
    #: Of each former message: which one it is now, and where its content begins there.
    now: list[tuple[int, int]] = []
    opens, late_before = True, False
    for message in conversation.messages:
        opens = opens and message["role"] == "system"
        if opens and messages:
            start = len(messages[0]["content"]) + len(_BETWEEN)
            now.append((0, start))
            messages[0]["content"] += _BETWEEN + message["content"]
            continue
        late, start = not opens and message["role"] == "system", 0
        shown = {**message, "role": "user", "content": _REMINDER.format(message["content"])} if late else dict(message)
        if messages and (late or late_before) and messages[-1]["role"] == shown["role"] == "user":
            start = len(messages[-1]["content"]) + 1
            shown["content"] = f"{messages.pop()['content']}\n{shown['content']}"
        now.append((len(messages), start + (_REMINDER.index("{") if late else 0)))
        messages.append(shown)
        late_before = late
    breakpoints = [
        replace(one, place=now[one.place][0], chars=now[one.place][1] + one.chars) if one.chars is not None else one
        for one in conversation.breakpoints
    ]
    return replace(conversation, messages=messages, breakpoints=breakpoints)


def shown_call(name: str, arguments: str | Mapping[str, Any] | None, call_id: str | None, kind: str) -> dict[str, Any]:
    """Return a call of an earlier turn as templates read it; arguments may be JSON text, or whatever a model wrote instead."""
    decoded = decoded_arguments(arguments) if isinstance(arguments, str) and arguments else Arguments(arguments or {})
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
