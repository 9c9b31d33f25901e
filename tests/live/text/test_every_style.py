"""One corpus for all styles of tool calls: however a text is cut, and wherever it breaks off, the same comes out as JSON."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.config import REASONING_PARSERS, TOOL_PARSERS
from orchestrator.live.text.channels import ChannelParser
from orchestrator.live.text.generation import AnswerParser
from orchestrator.live.text.reasoning import Reasoning, ReasoningStyle, ThinkParser
from orchestrator.live.text.styles import ToolStyle, call_id, make_parser
from orchestrator.live.text.tools import MoreArguments, ToolCall, calls_in
from tests.builders import some

Call = tuple[str, dict[str, Any]]

TOOLS: dict[str, dict[str, Any]] = {
    "write": {"type": "object", "properties": {"path": {"type": "string"}, "text": {"type": "string"}}},
    "plan": {"properties": {"steps": {"type": "array"}, "depth": {"type": "integer"}, "how": {"type": ["object", "null"]}}},
    "now": {},
}
#: What is said before calls, the calls, and what is said after them.
CORPUS: dict[str, tuple[str, list[Call], str]] = {
    "no call": ('A list: [1, 2], an object: {"a": 1}, <b>tags</b> and f(x=1).', [], ""),
    "one call": ("", [("write", {"path": "a.py", "text": "two\nlines"})], ""),
    "several, none of them alike": (
        "Let me see.",
        [("now", {}), ("plan", {"steps": ["é", {"a": [None, True, -1.5e3]}], "depth": 3, "how": None}), ("now", {})],
        "",
    ),
    "what looks like ends": ("日本", [("write", {"path": '"}', "text": '}]), "x": \'\\ \t</b> 😀 {"name": 1}'})], ""),
}


def tagged(name: str, arguments: dict[str, Any]) -> str:
    values = {key: one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for key, one in arguments.items()}
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def as_json(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def deepseek(words: str) -> str:
    return f"<｜tool▁{words}｜>"


def joined(before: str, calls: str, after: str) -> str:
    return f"{before}\n{calls}{after}" if calls else before


def in_deepseek(calls: Sequence[Call], form: str) -> str:
    begin, end, sep = deepseek("call▁begin"), deepseek("call▁end"), deepseek("sep")
    written = "\n".join(begin + form.format(name=name, sep=sep, arguments=as_json(arguments)) + end for name, arguments in calls)
    return f"{deepseek('calls▁begin')}{written}{deepseek('calls▁end')}" if calls else ""


def in_channels(before: str, calls: Sequence[Call], after: str) -> str:
    text = f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>{before}<|end|>"
    for name, arguments in calls:
        text += f"<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        text += f"{as_json(arguments)}<|call|>"
    return text + (f"<|start|>assistant<|channel|>final<|message|>{after}<|return|>" if after else "")


#: How each style writes an answer: what is said before, calls, what is said after.
WRITERS: dict[str, tuple[ToolStyle, Callable[[str, Sequence[Call], str], str]]] = {
    "hermes": (
        ToolStyle.HERMES,
        lambda before, calls, after: joined(
            before,
            "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {as_json(one)}}}\n</tool_call>' for name, one in calls),
            after,
        ),
    ),
    "qwen3_coder": (
        ToolStyle.QWEN3_CODER,
        lambda before, calls, after: joined(before, "\n".join(tagged(*call) for call in calls), after),
    ),
    "llama": (
        ToolStyle.LLAMA,
        lambda before, calls, after: joined(
            before, "; ".join(f'{{"name": "{name}", "parameters": {as_json(one)}}}' for name, one in calls), after
        ),
    ),
    "llama with its tag": (
        ToolStyle.LLAMA,
        lambda before, calls, after: joined(
            before, "".join(f'<|python_tag|>{{"name": "{name}", "parameters": {as_json(one)}}}' for name, one in calls), after
        ),
    ),
    "pythonic": (
        ToolStyle.PYTHONIC,
        lambda before, calls, after: joined(
            before,
            "[" + ", ".join(f"{name}({', '.join(f'{key}={one!r}' for key, one in given.items())})" for name, given in calls) + "]"
            if calls else "",
            after,
        ),
    ),
    "mistral, listed": (
        ToolStyle.MISTRAL,
        lambda before, calls, after: joined(
            before,
            "[TOOL_CALLS] [" + ", ".join(f'{{"name": "{name}", "arguments": {as_json(one)}}}' for name, one in calls) + "]"
            if calls else "",
            after,
        ),
    ),
    "mistral, named": (
        ToolStyle.MISTRAL,
        lambda before, calls, after: joined(
            before, "".join(f"[TOOL_CALLS]{name}[ARGS]{as_json(one)}" for name, one in calls), after
        ),
    ),
    "deepseek v3": (
        ToolStyle.DEEPSEEK,
        lambda before, calls, after: joined(
            before, in_deepseek(calls, "function{sep}{name}\n```json\n{arguments}\n```"), after
        ),
    ),
    "deepseek v3.1": (
        ToolStyle.DEEPSEEK,
        lambda before, calls, after: joined(before, in_deepseek(calls, "{name}{sep}{arguments}"), after),
    ),
    "kimi": (
        ToolStyle.KIMI_K2,
        lambda before, calls, after: joined(
            before,
            "<|tool_calls_section_begin|>"
            + "".join(
                f"<|tool_call_begin|>functions.{name}:{place}<|tool_call_argument_begin|>{as_json(one)}<|tool_call_end|>"
                for place, (name, one) in enumerate(calls)
            )
            + "<|tool_calls_section_end|>" if calls else "",
            after,
        ),
    ),
    "harmony": (ToolStyle.HARMONY, in_channels),
}  # fmt: skip


def parser_of(style: ToolStyle, parallel: bool = True) -> AnswerParser:
    if style is ToolStyle.HARMONY:
        return ChannelParser(TOOLS, call_id, parallel=parallel)
    parser = make_parser(style, TOOLS, parallel)
    assert parser is not None
    return parser


def read(style: ToolStyle, pieces: Sequence[str], cut: bool = False) -> tuple[str, str, list[tuple[str, str]]]:
    """Return thoughts, content and calls, after seeing that names are told before their arguments."""
    parser = parser_of(style)
    parts = [*(part for piece in pieces for part in parser.add(piece)), *parser.finish(cut)]
    assert not parts or not isinstance(
        next((part for part in parts if not isinstance(part, str | Reasoning)), None), MoreArguments
    )
    assert "" not in parts
    thoughts = "".join(part.text for part in parts if isinstance(part, Reasoning))
    content = "".join(part for part in parts if isinstance(part, str))
    return thoughts, content, [(call.name, call.arguments) for call in calls_in(parts)]


CASES = [(style, case) for style in WRITERS for case in CORPUS]


@pytest.mark.parametrize(("written", "case"), CASES, ids=[f"{style}-{case}" for style, case in CASES])
def test_what_is_written_is_read_however_it_is_cut(written: str, case: str) -> None:
    (style, write), (before, calls, after) = WRITERS[written], CORPUS[case]
    text = write(before, calls, after)
    whole = read(style, [text])
    _, content, found = whole
    assert content == before + after
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert read(style, list(text)) == whole
    for place in range(len(text)):
        assert read(style, [text[:place], text[place:]]) == whole


@pytest.mark.parametrize(("written", "case"), CASES, ids=[f"{style}-{case}" for style, case in CASES])
def test_what_breaks_off_is_json_if_the_model_ended_it_and_as_it_came_if_it_was_cut(written: str, case: str) -> None:
    (style, write), (before, calls, after) = WRITERS[written], CORPUS[case]
    text = write(before, calls, after)
    _, _, whole = read(style, [text])
    for place in range(len(text)):
        _, _, ended = read(style, [text[:place]])
        assert [type(json.loads(arguments)) for _, arguments in ended] == [dict] * len(ended)
        _, _, cut = read(style, [text[:place]], cut=True)
        assert cut[:-1] == whole[: len(cut[:-1])]
        assert [name for name, _ in cut] == [name for name, _ in whole[: len(cut)]]


@pytest.mark.parametrize("written", WRITERS)
def test_arguments_come_out_while_they_are_written(written: str) -> None:
    style, write = WRITERS[written]
    text = write("", [("write", {"path": "x", "text": "long " * 20})], "")
    parser = parser_of(style)
    pieces = [part for char in text for part in parser.add(char)]
    more = [part for part in pieces if isinstance(part, MoreArguments)]
    assert len([part for part in pieces if isinstance(part, ToolCall)]) == 1
    assert len(more) > (1 if style is ToolStyle.PYTHONIC else 50)


@pytest.mark.parametrize("written", WRITERS)
def test_of_calls_that_may_not_be_several_the_first_comes_out(written: str) -> None:
    style, write = WRITERS[written]
    before, calls, _ = CORPUS["several, none of them alike"]
    parser = parser_of(style, parallel=False)
    parts = [*parser.add(write(before, calls, "")), *parser.finish()]
    assert [(call.name, call.arguments) for call in calls_in(parts)] == [("now", "{}")]
    assert before in "".join(part for part in parts if isinstance(part, str))


FRAGMENTS = [
    *some([mark for style in ToolStyle for mark in style.marks]), "<function=write>", "<function=", "</function>",
    "<parameter=text>", "</parameter>", "<think>", "</think>", '{"name": "write", ', '"arguments": {"text": "', '"parameters": {',
    "analysis", "final", "commentary to=functions.write", "functions.write:0", "write(", "[write(text=", "now()", "write",
    "```json\n", "```", '"', "'", "\\", "[", "]", "{", "}", ")", ",", ":", "=", ";", "\n", " ", "text", "12", "<", ">", "é",
]  # fmt: skip
STYLES = [style for style in ToolStyle if style is not ToolStyle.NONE]


@given(
    st.sampled_from(STYLES),
    st.booleans(),
    st.booleans(),
    st.tuples(st.sampled_from(["", "<think>"]), st.lists(st.sampled_from(FRAGMENTS), max_size=18).map("".join)).map("".join),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_no_text_is_too_odd(style: ToolStyle, thinks: bool, cut: bool, text: str, source: Any) -> None:
    def found(pieces: Sequence[str]) -> tuple[str, str, list[tuple[str, str]]]:
        parser: Any = parser_of(style)
        if thinks and style is not ToolStyle.HARMONY:
            parser = ThinkParser(False, parser, True, style.openings, lambda: make_parser(style, TOOLS))
        parts = [*(part for piece in pieces for part in parser.add(piece)), *parser.finish(cut)]
        return (
            "".join(part.text for part in parts if isinstance(part, Reasoning)),
            "".join(part for part in parts if isinstance(part, str)),
            [(call.name, call.arguments) for call in calls_in(parts)],
        )

    cuts = sorted(source.randint(0, len(text)) for _ in range(source.randint(0, len(text))))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = found([text])
    assert found(pieces) == whole == found(list(text))
    _, content, calls = whole
    for _, arguments in calls if not cut else calls[:-1]:
        assert isinstance(json.loads(arguments), dict)
    if not calls and style is not ToolStyle.HARMONY and not thinks:
        assert content == (text.replace("<|python_tag|>", "") if style is ToolStyle.LLAMA else text)


def test_every_name_of_a_parser_stands_for_one_there_is() -> None:
    assert {ToolStyle(name) for name in TOOL_PARSERS.values() if name != "auto"} == set(ToolStyle)
    assert {ReasoningStyle(name) for name in REASONING_PARSERS.values() if name != "auto"} == set(ReasoningStyle)
