"""Tool calls are found however the text is cut; what is none stays text, letter for letter."""

import random

import pytest

from orchestrator.live.text.tools import ToolCall, ToolParser, ToolStyle, make_parser, style_of
from workers.engines.vocabulary import CHAT_TEMPLATE

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "a</b> \\u00e9"}}\n</tool_call>'
ARGUMENTS = '{"x": "a</b> \\u00e9"}'
NAMES = ("f", "g")


def parse(style: ToolStyle, text: str, seed: int) -> tuple[str, list[tuple[str, str]]]:
    source = random.Random(seed)
    parser: ToolParser | None = make_parser(style, NAMES)
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
        ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ('{"name": "f", "param', '{"name": "f", "param', []),
        ("<|python_tag|>print(1)", "print(1)", []),
        ('{"name": "f", "parameters": {}} trailing', '{"name": "f", "parameters": {}} trailing', []),
    ],
)
def test_llama(text: str, content: str, calls: list[tuple[str, str]], seed: int) -> None:
    assert parse(ToolStyle.LLAMA, text, seed) == (content, calls)


def test_content_before_a_call_streams_on() -> None:
    parser = make_parser(ToolStyle.HERMES, NAMES)
    assert parser is not None
    assert parser.add("some text") == ["some text"]
    assert parser.add(" <tool") == []
    assert parser.add("box>") == [" <toolbox>"]
    assert parser.add("<tool_call>{") == []


def test_the_style_is_what_the_template_teaches() -> None:
    assert style_of("auto", CHAT_TEMPLATE) is ToolStyle.HERMES
    assert style_of("auto", "{{ '<|python_tag|>' }}") is ToolStyle.LLAMA
    assert style_of("auto", "{{ messages }}") is ToolStyle.NONE
    assert style_of("llama", CHAT_TEMPLATE) is ToolStyle.LLAMA
    assert make_parser(ToolStyle.NONE, NAMES) is None
