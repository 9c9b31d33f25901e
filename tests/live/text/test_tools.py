"""Tool calls are found however the text is cut; what is none stays text, letter for letter."""

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.live.text.functions import Tools, typed
from orchestrator.live.text.reasoning import Reasoning, ThinkParser
from orchestrator.live.text.styles import ToolStyle, make_parser, style_of
from orchestrator.live.text.tools import ToolCall, ToolParser, calls_in
from tests.builders import some
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
    calls = [(part.name, part.arguments) for part in calls_in(parts)]
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
        ("<tool_call><function=f><parameter=x>1</parameter></function></tool_call>", "", [("f", '{"x": "1"}')]),
        ("<tool_call>no json</tool_call> after", "<tool_call>no json</tool_call> after", []),
        (" \n <tool_call>no json</tool_call>\n<tool_call>", " \n <tool_call>no json</tool_call>\n<tool_call>", []),
        (f"{CALL}\n <tool_call>no json</tool_call> ", "\n <tool_call>no json</tool_call> ", [("f", ARGUMENTS)]),
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
        ('{"name": "f", "parameters": {}} trailing', " trailing", [("f", "{}")]),
        ('Sure:\n{"name": "f", "parameters": {"x": 1}}\n{"name": "g"}', "Sure:", [("f", '{"x": 1}'), ("g", "{}")]),
        ('[{"name": "f", "parameters": {}}, {"name": "unheard"}]', '{"name": "unheard"}]', [("f", "{}")]),
        ('{"name": "unheard", "parameters": {"x": 1}}', '{"name": "unheard", "parameters": {"x": 1}}', []),
        ('so {"name": "f", "parameters": {}}', 'so {"name": "f", "parameters": {}}', []),
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
        ('<tool_call>{"name": "w"}</tool_call>', "", [("w", "{}")]),
        (xml("w", days="[" * 5000), "", [("w", json.dumps({"days": "[" * 5000}))]),
    ],
)
def test_qwen3_coder(text: str, content: str, calls: list[tuple[str, str]], seed: int) -> None:
    assert parse(ToolStyle.QWEN3_CODER, text, seed, {"w": SCHEMA}) == (content, calls)


@pytest.mark.parametrize("style", [ToolStyle.HERMES, ToolStyle.LLAMA])
def test_arguments_may_be_nested_as_deep_as_anybody_likes(style: ToolStyle) -> None:
    arguments = '{"x": ' + "[" * 5000 + "]" * 5000 + "}"
    call = f'{{"name": "f", "parameters": {arguments}}}'
    text = f"<tool_call>{call}</tool_call>" if style is ToolStyle.HERMES else call
    assert parse(style, text, 0) == ("", [("f", arguments)])


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
    assert style_of("auto", "{{ '[TOOL_CALLS]' }}") is ToolStyle.MISTRAL
    assert style_of("auto", "{{ '<\uff5ctool\u2581calls\u2581begin\uff5c>' }}") is ToolStyle.DEEPSEEK
    assert style_of("auto", "{{ '<|tool_calls_section_begin|>' }}") is ToolStyle.KIMI_K2
    assert style_of("auto", "{{ '<|channel|>analysis<|message|>' }}") is ToolStyle.HARMONY
    assert style_of("auto", "{{ 'calls like [func_name1(name=value)]' }}") is ToolStyle.PYTHONIC
    assert style_of("auto", "{{ messages }}") is ToolStyle.NONE
    assert [style_of(name, "") for name in ("llama3_json", "qwen3_xml", "openai")] == [
        ToolStyle.LLAMA, ToolStyle.QWEN3_CODER, ToolStyle.HARMONY,
    ]  # fmt: skip
    assert style_of("llama", CHAT_TEMPLATE) is ToolStyle.LLAMA
    assert make_parser(ToolStyle.NONE, TOOLS) is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain [TOOL", "plain [TOOL", []),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g"}]', "", [("f", '{"x": 1}'), ("g", "{}")]),
        ('Well.\n[TOOL_CALLS]f[ARGS]{"x": [1]}[TOOL_CALLS]g[ARGS]{}', "Well.", [("f", '{"x": [1]}'), ("g", "{}")]),
        ('[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"x": 1}', "", [("f", '{"x": 1}')]),
        ('[TOOL_CALLS]f{"x": 1}', "", [("f", '{"x": 1}')]),
        ('Well. [TOOL_CALLS]f[ARGS]{"x": 1', "Well.", [("f", '{"x": 1}')]),
        ("[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
        (f"[TOOL_CALLS]f[ARGS]{'[' * 200_000}", f"[TOOL_CALLS]f[ARGS]{'[' * 200_000}", []),
    ],
)
def test_mistral(text: str, content: str, calls: list[tuple[str, str]], seed: int) -> None:
    assert parse(ToolStyle.MISTRAL, text, seed) == (content, calls)


def test_ids_are_what_the_next_turns_template_takes() -> None:
    parser = make_parser(ToolStyle.MISTRAL, TOOLS)
    assert parser is not None
    calls = [*parser.add("[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{}"), *parser.finish()]
    ids = [call.id for call in calls if isinstance(call, ToolCall)]
    assert len(set(ids)) == 2
    assert all(len(one) == 9 and one.isalnum() for one in some(ids))


INNER = "<parameter=city>\nParis\n</parameter>\n"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        # Without the outer tag, as these models write now and then.
        (f"Well.\n<function=w>\n{INNER}</function>\n</tool_call>", "Well.", [("w", '{"city": "Paris"}')]),
        (f"<function=w>\n{INNER}</function> done", " done", [("w", '{"city": "Paris"}')]),
        # Two in one.
        (
            f"<tool_call><function=w>{INNER}</function>\n<function=v></function></tool_call>",
            "",
            [("w", '{"city": "Paris"}'), ("v", "{}")],
        ),
        # Tags inside a value.
        (
            xml("w", city="a </tool_call> b </parameter> c </function> d"),
            "",
            [("w", '{"city": "a </tool_call> b </parameter> c </function> d"}')],
        ),
        # A closing tag left out, and a last one cut off.
        (
            "<tool_call><function=w>\n<parameter=city>\nParis\n<parameter=days>\n5\n</parameter></function></tool_call>",
            "",
            [("w", '{"city": "Paris", "days": 5}')],
        ),
        (f"<tool_call><function=w>\n{INNER}", "", [("w", '{"city": "Paris"}')]),
        ("<tool_call><function=w>\n<parameter=city>\nPar", "", [("w", '{"city": "Par"}')]),
        ("<tool_call><function=w>\n<param", "<tool_call><function=w>\n<param", []),
        (f"<tool_call><function=w>\n{INNER}</tool_call>", "", [("w", '{"city": "Paris"}')]),
        (
            "<tool_call><function={{ name }}></function></tool_call>",
            "<tool_call><function={{ name }}></function></tool_call>",
            [],
        ),
        ("<tool_call><func</tool_call> on", "<tool_call><func</tool_call> on", []),
        # White space of a value is its own, but for one line end on either side.
        (xml("w", city="\n  two\n\n"), "", [("w", '{"city": "\\n  two\\n\\n"}')]),
    ],
)
def test_qwen3_coder_where_models_leave_the_straight_way(
    text: str, content: str, calls: list[tuple[str, str]], seed: int
) -> None:
    assert parse(ToolStyle.QWEN3_CODER, text, seed, {"w": SCHEMA}) == (content, calls)


@pytest.mark.parametrize(
    ("value", "schema", "meant"),
    [
        ("null", {"type": "string"}, "null"),
        ("None", {"type": ["string", "null"]}, None),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("12", {"anyOf": [{"type": "null"}, {"type": "string"}]}, "12"),
        ("null", {"type": "integer"}, None),
        ("null", {"type": "null"}, None),
        ("null", None, "null"),
        ("12", None, "12"),
        ("12", {"enum": ["12"]}, "12"),
        ("12", {"type": "integer"}, 12),
        ("12.5", {"type": "integer"}, "12.5"),
        ("9" * 30, {"type": "integer"}, int("9" * 30)),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("12.0", {"type": "number"}, 12),
        ("12.5", {"type": "number"}, 12.5),
        ("nan", {"type": "number"}, "nan"),
        ("1e999", {"type": "number"}, "1e999"),
        ("TRUE", {"type": "boolean"}, True),
        ("yes", {"type": "boolean"}, False),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
        ("{'a': None}", {"type": "object"}, {"a": None}),
        ("{1, 2}", {"type": "array"}, "{1, 2}"),
        ("[NaN]", {"type": "array"}, "[NaN]"),
        ('["\\ud800"]', {"type": "array"}, '["\\ud800"]'),
        ("'\\d'", {"type": "object"}, "\\d"),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
        ("x", {"type": 5}, "x"),
        ("x", "nonsense", "x"),
    ],
)
def test_what_a_parameter_means_to_its_schema(value: str, schema: object, meant: object) -> None:
    found = typed(value, schema)
    assert (found, type(found)) == (meant, type(meant))


@pytest.mark.parametrize("arguments", ['"{\\"a\\": \\"\\ud800\\"}"', "[1]", "5", '"five"'])
def test_arguments_that_are_no_object_are_content(arguments: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert parse(ToolStyle.HERMES, text, 0) == (text, [])


@pytest.mark.parametrize("arguments", ['{"id": 123456789012345678901234567890, "f": 1e400}', '{"a": "\\ud83d\\ude00 \\u00e9"}'])
def test_arguments_come_out_as_they_were_written(arguments: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert parse(ToolStyle.HERMES, text, 0) == ("", [("f", arguments)])


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=x>", "</parameter>", "<|python_tag|>", "<think>",
    "</think>", "[TOOL_CALLS]", "[ARGS]", "f", "[", "]", '{"name": "f"', ', "arguments": {"x": 1}}', "}", "{", ";", "\n", " ",
    "text", "<", ">", "é",
]  # fmt: skip


@given(
    st.sampled_from([ToolStyle.HERMES, ToolStyle.QWEN3_CODER, ToolStyle.LLAMA, ToolStyle.MISTRAL]),
    st.sampled_from([None, True, False]),
    st.lists(st.sampled_from(FRAGMENTS), max_size=16).map("".join),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_it_does_not_matter_how_a_text_is_cut(style: ToolStyle, opened: bool | None, text: str, source: random.Random) -> None:
    def found(pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
        calls = make_parser(style, TOOLS)
        assert calls is not None
        parser = calls if opened is None else ThinkParser(opened, calls)
        parts = [*(part for piece in pieces for part in parser.add(piece)), *parser.finish()]
        return (
            "".join(part.text for part in parts if isinstance(part, Reasoning)),
            "".join(part for part in parts if isinstance(part, str)),
            [(call.name, call.arguments) for call in calls_in(parts)],
        )

    cuts = sorted(source.randint(0, len(text)) for _ in range(source.randint(0, len(text))))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert found(pieces) == found([text]) == found(list(text))
