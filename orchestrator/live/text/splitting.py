"""Splits messages with several tool calls, for templates that show one call after another: those of gpt-oss."""

from collections.abc import Mapping, Sequence
from typing import Any, cast


def one_by_one(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return messages with one call each, its result next, and one text before it.

    The templates show only a message's first call, name a result by the call before it, and refuse content beside thoughts and
    a call.
    """
    shown: list[Mapping[str, Any]] = []
    place = 0
    while place < len(messages):
        message = messages[place]
        place += 1
        calls = cast("Sequence[Mapping[str, Any]]", message.get("tool_calls") or ())
        if calls and message["content"] and message.get("thinking"):
            message = {**message, "content": "", "thinking": f"{message['thinking']}\n\n{message['content']}"}
        if len(calls) <= 1:
            shown.append(message)
            continue
        start = place
        while place < len(messages) and messages[place]["role"] == "tool":
            place += 1
        shown += _split(message, calls, messages[start:place])
    return shown


def _split(
    message: Mapping[str, Any], calls: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return a message with several calls as one for each, the results of each after it."""
    split: list[Mapping[str, Any]] = []
    for call in calls:
        split.append(
            {**message, "tool_calls": [call]} if not split else {"role": "assistant", "content": "", "tool_calls": [call]}
        )
        split += [one for one in results if one.get("tool_call_id") == call["id"]]
    known = [call["id"] for call in calls]
    return split + [one for one in results if one.get("tool_call_id") not in known]
