"""What items of a conversation become messages of, as chat templates read them."""

from typing import Any

import pytest

from orchestrator.live.http.responses.items import messages_of
from orchestrator.live.http.responses.thoughts import carried
from orchestrator.live.refusals import Invalid


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def call(number: int, **more: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": f'{{"n": {number}}}', **more}


def output(number: int, text: Any = "done") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": f"c{number}", "output": text}


def thought(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}], **more}


def shown(number: int, name: str = "f") -> dict[str, Any]:
    return {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": {"n": number}}}


def answered(content: str = "", calls: list[dict[str, Any]] | None = None, thoughts: str | None = None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = calls
    if thoughts is not None:
        message |= {"reasoning_content": thoughts, "thinking": thoughts}
    return message


def result(number: int, text: str = "done") -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"c{number}"}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([user("a"), said("b"), user("c")], [user("a"), answered("b"), user("c")]),
        # What one answer was made of is one message.
        ([thought("t"), said("b"), call(1), call(2)], [answered("b", [shown(1), shown(2)], "t")]),
        ([call(1), call(2), output(1), output(2)], [answered("", [shown(1), shown(2)]), result(1), result(2)]),
        # And the next answer another.
        ([call(1), output(1), thought("t"), call(2)], [answered("", [shown(1)]), result(1), answered("", [shown(2)], "t")]),
        ([said("a"), said("b")], [answered("a"), answered("b")]),
        ([call(1), said("b")], [answered("", [shown(1)]), answered("b")]),
        ([thought("t"), thought("u"), said("b")], [answered("b", None, "t\nu")]),
        ([said("b"), thought("t"), said("c")], [answered("b"), answered("c", None, "t")]),
        # Names in namespaces, parts of outputs, the roles of those who instruct.
        ([call(1, namespace="n")], [answered("", [shown(1, "n__f")])]),
        ([output(1, [{"type": "input_text", "text": "x"}, {"type": "input_text", "text": "y"}])], [result(1, "xy")]),
        ([{"role": "developer", "content": [{"type": "input_text", "text": "d"}]}], [{"role": "system", "content": "d"}]),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}], [answered("no")]),
    ],
)
def test_items_are_messages(items: list[dict[str, Any]], messages: list[dict[str, Any]]) -> None:
    assert messages_of(None, items, [f"input[{place}]" for place in range(len(items))]) == messages


def test_instructions_come_first() -> None:
    assert messages_of("Be brief.", [user("a")], ["input[0]"]) == [{"role": "system", "content": "Be brief."}, user("a")]


@pytest.mark.parametrize(
    ("item", "thoughts"),
    [
        (thought("told"), "told"),
        (thought("told", encrypted_content=carried("carried")), "carried"),
        ({"type": "reasoning", "summary": [], "content": None, "encrypted_content": carried("wörtlich")}, "wörtlich"),
        (
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}, {"type": "summary_text", "text": "t"}]},
            "s\nt",
        ),
        # Another server's, which only that one can read.
        (thought("told", encrypted_content="gAAAAABo"), "told"),
        ({"type": "reasoning", "summary": [], "encrypted_content": "gAAAAABo"}, None),
    ],
)
def test_thoughts_are_what_the_item_brings_of_them(item: dict[str, Any], thoughts: str | None) -> None:
    assert messages_of(None, [item, said("b")], ["", ""]) == [answered("b", None, thoughts)]


@pytest.mark.parametrize(
    ("item", "field"),
    [
        ({}, "input[1].type"),
        ({"type": "web_search_call", "id": "ws_1"}, "input[1]"),
        ({"role": ["user"], "content": "x"}, "input[1].role"),
        ({"role": "user", "content": 5}, "input[1].content"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[1].content[0].text"),
        ({"role": "user", "content": ["x"]}, "input[1].content[0]"),
        ({"type": "function_call", "call_id": "c", "arguments": "{}"}, "input[1].name"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "input[1].call_id"),
        ({"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}, "input[1].arguments"),
        ({"type": "custom_tool_call", "call_id": "c", "name": "f"}, "input[1].input"),
        ({"type": "function_call_output", "output": "x"}, "input[1].call_id"),
        (output(1, [{"type": "input_image", "image_url": "x"}]), "input[1].output[0]"),
    ],
)
def test_what_is_wrong_with_an_item_is_said_with_its_place(item: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as caught:
        messages_of(None, [user("a"), item], ["input[0]", "input[1]"])
    assert caught.value.field == field
