"""Tool calls are found however the text is cut; what is none stays text, letter for letter."""

import json
import random
from typing import Any

import pytest

from orchestrator.live.text.tools import ToolCall, ToolParser, Tools, ToolStyle, make_parser, style_of
from workers.engines.vocabulary import CHAT_TEMPLATE

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "a</b> \\u00e9"}}\n</tool_call>'
ARGUMENTS = '{"x": "a</b> \\u00e9"}'
TOOLS: dict[str, dict[str, Any]] = {"f": {}, "g": {}}


def parse(style: ToolStyle, text: str, seed: int, tools: Tools = TOOLS) -> tuple[str, list[tuple[str, str]]]:
    source = random.Random(seed)
    parser: ToolParser | None = make_parser(style, tools)
    assert parser is not None
    parts: list[str | ToolCall] = []
    while text:
        count = source.randint(1, 7)
        parts += parser.add(text[:count])
        text = text[count:]
    parts += parser.finish()
    calls = [(part.name, part.arguments) for part in parts if isinstance(part, ToolCall)]
    return "".join(part for part in parts if isinstance(part, str)), calls


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("just < text <tool", "just < text <tool", []),
        (CALL, "", [("f", ARGUMENTS)]),
        (f"Let me see.\n\n{CALL}\n{CALL}\n", "Let me see.", [("f", ARGUMENTS)] * 2),
        (f"{CALL} and on", " and on", [("f", ARGUMENTS)]),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", '{"x": 1}')]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": " null "}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "parameters": null}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}', "", [("f", "{}")]),
        ("<tool_call>no json</tool_call> after", "<tool_call>no json</tool_call> after", []),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', []),
        ('<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
    ],
)
def test_hermes(text: str, content: str, calls: list[tuple[str, str]], seed: int) -> None:
    assert parse(ToolStyle.HERMES, text, seed) == (content, calls)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain {text}", "plain {text}", []),
        ('{"name": "f", "parameters": {"x": 1}}', "", [("f", '{"x": 1}')]),
        (
            '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"y": 2}}',
            "",
            [("f", "{}"), ("g", '{"y": 2}')],
        ),
        ('{"name": "f", "parameters": null}', "", [("f", "{}")]),
        ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ('{"name": "f", "param', '{"name": "f", "param', []),
        ("<|python_tag|>print(1)", "print(1)", []),
        ('{"name": "f", "parameters": {}} trailing', '{"name": "f", "parameters": {}} trailing', []),
    ],
)
def test_llama(text: str, content: str, calls: list[tuple[str, str]], seed: int) -> None:
    assert parse(ToolStyle.LLAMA, text, seed) == (content, calls)


def xml(name: str, **parameters: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "near": {"type": ["array", "null"]},
        "flag": {"type": "boolean"},
        "any": {},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    },
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (xml("w", city="Paris"), "", [("w", '{"city": "Paris"}')]),
        (f"Well.\n{xml('w', city='5', days='5')}", "Well.", [("w", '{"city": "5", "days": 5}')]),
        (xml("w", near="[1, 2]", flag="true"), "", [("w", '{"near": [1, 2], "flag": true}')]),
        (xml("w", near="null", flag="False"), "", [("w", '{"near": null, "flag": false}')]),
        (xml("w", days="five", any="7", either="7"), "", [("w", '{"days": "five", "any": "7", "either": 7}')]),
        (xml("w", city="two\nlines <b>"), "", [("w", '{"city": "two\\nlines <b>"}')]),
        (xml("w") + xml("unheard", x="1"), "", [("w", "{}"), ("unheard", '{"x": "1"}')]),
        (
            "<tool_call>\n<function=w>\nno tags</function></tool_call>",
            "<tool_call>\n<function=w>\nno tags</function></tool_call>",
            [],
        ),
        ('<tool_call>{"name": "w"}</tool_call>', '<tool_call>{"name": "w"}</tool_call>', []),
        (xml("w", days="[" * 5000), "", [("w", json.dumps({"days": "[" * 5000}))]),
    ],
)
def test_qwen3_coder(text: str, content: str, calls: list[tuple[str, str]], seed: int) -> None:
    assert parse(ToolStyle.QWEN3_CODER, text, seed, {"w": SCHEMA}) == (content, calls)


@pytest.mark.parametrize("style", [ToolStyle.HERMES, ToolStyle.LLAMA])
def test_arguments_nested_beyond_reading_are_content(style: ToolStyle) -> None:
    call = '{"name": "f", "parameters": {"x": ' + "[" * 5000 + "]" * 5000 + "}}"
    text = f"<tool_call>{call}</tool_call>" if style is ToolStyle.HERMES else call
    assert parse(style, text, 0) == (text, [])


def test_content_before_a_call_streams_on() -> None:
    parser = make_parser(ToolStyle.HERMES, TOOLS)
    assert parser is not None
    assert parser.add("some text") == ["some text"]
    assert parser.add(" <tool") == []
    assert parser.add("box>") == [" <toolbox>"]
    assert parser.add("<tool_call>{") == []


def test_the_style_is_what_the_template_teaches() -> None:
    assert style_of("auto", CHAT_TEMPLATE) is ToolStyle.HERMES
    assert style_of("auto", "<tool_call>\\n<function=name>") is ToolStyle.QWEN3_CODER
    assert style_of("auto", "{{ '<|python_tag|>' }}") is ToolStyle.LLAMA
    assert style_of("auto", "{{ messages }}") is ToolStyle.NONE
    assert style_of("llama", CHAT_TEMPLATE) is ToolStyle.LLAMA
    assert make_parser(ToolStyle.NONE, TOOLS) is None
