"""Finds where places of a conversation are in its prompt: up to there it is the same whatever follows.

A place behind some of a message's content is marked in it, and looked for in what the template makes of that. One behind a tool
is where the prompt goes on otherwise if the tool's schema has one thing more. The messages up to there are rendered again, all of
them only where that shows otherwise what comes before. What the template shows otherwise once it is marked, or not at all, is
found nowhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.live.asked import Breakpoint, Conversation
from orchestrator.live.text.prompts import shared_chars
from orchestrator.live.text.templates import ChatTemplate, TemplateFailed

_MARK = "PLACE_LOOKED_FOR_{}_"
#: Characters that may stand between what a tool's schema ends with and one thing more: a comma, a quotation mark, indentation.
_BETWEEN_CHARS_MAX = 32


def places(
    template: ChatTemplate, text: str, conversation: Conversation, variables: Mapping[str, Any], sought: Sequence[Breakpoint]
) -> list[int]:
    """Return how many characters of a prompt come before some places in its conversation; 0 for a place that is not found.

    Args:
        template: has rendered the prompt.
        text: the prompt.
        conversation: what it was made of.
        variables: what the template was told.
        sought: the places.
    """
    if not sought:
        return []
    enough = 1 + max(one.place if one.chars is not None else 0 for one in sought)
    beginning = replace(conversation, messages=conversation.messages[:enough])
    found = _places(template, text, beginning, variables, sought)
    if all(found) or enough == len(conversation.messages):
        return found
    return _places(template, text, conversation, variables, sought)


def _places(
    template: ChatTemplate, text: str, conversation: Conversation, variables: Mapping[str, Any], sought: Sequence[Breakpoint]
) -> list[int]:
    in_messages = _in_messages(template, text, conversation, variables, [one for one in sought if one.chars is not None])
    return [
        in_messages.get(one, 0) if one.chars is not None else _behind_tool(template, text, conversation, variables, one.place)
        for one in sought
    ]


def _in_messages(
    template: ChatTemplate, text: str, conversation: Conversation, variables: Mapping[str, Any], sought: Sequence[Breakpoint]
) -> dict[Breakpoint, int]:
    if not sought:
        return {}
    messages = list(conversation.messages)
    marks = {_MARK.format(number): one for number, one in enumerate(sought)}
    # The last first, so that those before it in one message are where they were.
    for mark, one in reversed(marks.items()):
        content = str(messages[one.place].get("content", ""))
        # White space goes behind it: a template that leaves that out does so with the mark too.
        end = len(content[: one.chars].rstrip())
        messages[one.place] = {**messages[one.place], "content": content[:end] + mark + content[end:]}
    try:
        marked = template.render(messages, conversation.tools, variables, add_generation_prompt=False)
    except TemplateFailed:  # It looks into what it is to show, or wants more of the conversation.
        return {}
    plain, taken, found = "", 0, dict[Breakpoint, int]()
    for place, mark in sorted((place, mark) for mark in marks if (place := marked.rfind(mark)) >= 0):
        plain += marked[taken:place]
        found[marks[mark]], taken = len(plain), place + len(mark)
    same = shared_chars(plain, text)
    return {one: place for one, place in found.items() if place <= same}


def _behind_tool(template: ChatTemplate, text: str, conversation: Conversation, variables: Mapping[str, Any], place: int) -> int:
    tools, mark = list(conversation.tools or ()), _MARK.format(place)
    function = tools[place]["function"]
    tools[place] = {**tools[place], "function": {**function, "parameters": {**function["parameters"], mark: True}}}
    try:
        marked = template.render(conversation.messages, tools, variables, add_generation_prompt=False)
    except TemplateFailed:
        return 0
    same = shared_chars(marked, text)
    return same if same <= marked.rfind(mark) <= same + _BETWEEN_CHARS_MAX else 0
