"""Makes of a conversation's items the messages that chat templates read: what one answer was made of is one message again.

    message, reasoning, calls of functions and custom tools, their outputs
        ->  messages of system, user, assistant (thoughts, text, calls) and tool

A refusal names the item by its place in the request.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from orchestrator.live.http.responses.offered import shown_name
from orchestrator.live.http.responses.thoughts import thoughts_of
from orchestrator.live.refusals import Invalid, require
from orchestrator.live.text.conversations import shown_call, shown_message

_ROLES = ("user", "assistant", "system", "developer")
#: Calls, and where each has its arguments.
_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


@dataclass(slots=True)
class _Answer:
    """What the model said before somebody else did."""

    thoughts: list[str] = field(default_factory=lambda: [])
    texts: list[str] = field(default_factory=lambda: [])
    calls: list[dict[str, Any]] = field(default_factory=lambda: [])

    @property
    def shown(self) -> dict[str, Any]:
        thoughts = "\n".join(self.thoughts) if self.thoughts else None
        return shown_message("assistant", "".join(self.texts), tool_calls=self.calls, thoughts=thoughts)


def messages_of(instructions: str | None, items: Sequence[Mapping[str, Any]], where: Sequence[str]) -> list[dict[str, Any]]:
    """Return the messages that items stand for, after the instructions.

    Args:
        instructions: for this turn alone.
        items: the whole conversation.
        where: each item's place in the request, or in what it goes on from.

    Raises:
        Invalid: an item is none, or asks for what cannot be read here.
    """
    messages = [shown_message("system", instructions)] if instructions else []
    answer: _Answer | None = None
    for item, place in zip(items, where, strict=True):
        if _is_answers(item):
            if answer is not None and _begins_anew(item, answer):
                messages.append(answer.shown)
                answer = None
            answer = answer or _Answer()
            _add(answer, item, place)
            continue
        if answer is not None:
            messages.append(answer.shown)
            answer = None
        messages.append(_others(item, place))
    return [*messages, answer.shown] if answer is not None else messages


def kind_of(item: Mapping[str, Any]) -> str:
    """Return an item's type; messages may leave it out."""
    return str(item.get("type") or ("message" if "role" in item else ""))


def _is_answers(item: Mapping[str, Any]) -> bool:
    kind = kind_of(item)
    return kind in ("reasoning", *_CALLS) or (kind == "message" and item.get("role") == "assistant")


def _begins_anew(item: Mapping[str, Any], answer: _Answer) -> bool:
    """Whether an item cannot belong to the same answer: thoughts come first, then text, then calls."""
    match kind_of(item):
        case "reasoning":
            return bool(answer.texts or answer.calls)
        case "message":
            return bool(answer.texts or answer.calls)
        case _:
            return False


def _add(answer: _Answer, item: Mapping[str, Any], place: str) -> None:
    match kind_of(item):
        case "reasoning":
            if thoughts := thoughts_of(dict(item)):
                answer.thoughts.append(thoughts)
        case "message":
            answer.texts.append(_text(item.get("content"), f"{place}.content"))
        case kind:
            name, call_id, written = item.get("name"), item.get("call_id"), item.get(_CALLS[kind])
            require(isinstance(name, str) and bool(name), f"{place}.name", "must be the tool's name")
            require(isinstance(call_id, str), f"{place}.call_id", "must be a string")
            require(isinstance(written, str), f"{place}.{_CALLS[kind]}", "must be text")
            arguments = {"input": written} if kind == "custom_tool_call" else cast(str, written)
            shown = shown_name(item.get("namespace"), str(name))
            answer.calls.append(shown_call(shown, arguments, cast(str, call_id), "function"))


def _others(item: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the message of what the model did not say."""
    match kind_of(item):
        case "message":
            role = item.get("role")
            require(role in _ROLES, f"{place}.role", f"must be one of {', '.join(_ROLES)}, is {role!r}")
            return shown_message(str(role), _text(item.get("content"), f"{place}.content"))
        case "function_call_output" | "custom_tool_call_output":
            call_id = item.get("call_id")
            require(isinstance(call_id, str), f"{place}.call_id", "must be the id of a call")
            return shown_message("tool", _text(item.get("output"), f"{place}.output"), tool_call_id=cast(str, call_id))
        case "":
            raise Invalid(f"{place}.type: must say what the item is", "invalid_value", f"{place}.type")
        case kind:
            raise Invalid(f"{place}: items of type {kind!r} are not supported", "unsupported_item", place)


def _text(content: Any, where: str) -> str:
    """Return the text of content given as text or in parts. Raises `Invalid` for parts that are no text."""
    if isinstance(content, str):
        return content
    require(isinstance(content, list), where, "must be text or a list of parts")
    return "".join(_part_text(part, f"{where}[{number}]") for number, part in enumerate(cast("list[Any]", content)))


def _part_text(part: Any, where: str) -> str:
    require(isinstance(part, dict), where, "must be an object")
    fields = cast("dict[str, Any]", part)
    kind = fields.get("type")
    if kind == "refusal":
        return str(fields.get("refusal") or "")
    require(kind in _TEXT_PARTS, where, f"content of type {kind!r} is not supported, only text is")
    text = fields.get("text")
    require(isinstance(text, str), f"{where}.text", "must be text")
    return cast(str, text)
