"""Calls that are kept to a grammar are calls in the model's own style: what reads its calls reads them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from orchestrator.live.asked import Constraint, ConstraintKind
from orchestrator.live.text.arguments import Tool
from orchestrator.live.text.call_grammars import calls_of
from orchestrator.live.text.checks import keepable
from orchestrator.live.text.grammars import Thoughts, Unkeepable, whole
from orchestrator.live.text.styles import ToolStyle, make_parser
from orchestrator.live.text.tools import calls_in
from workers.engines.grammars import Lexicon
from workers.engines.vocabulary import write_json, write_tokenizer

VOCABULARY = 512
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["c", "f"], "type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    Tool("weather", WEATHER, False, "tools[0].function.parameters"),
    Tool("now", None, False, "tools[1].function.parameters"),
]
PARIS = {"city": "Paris", "unit": "c", "days": 3}
ANY = {"anything": [1, {"a": None}]}


class Reader:
    """Tells whether texts keep to a grammar."""

    def __init__(self, folder: Path) -> None:
        write_tokenizer(folder, VOCABULARY, 1024)
        write_json(folder / "config.json", {"eos_token_id": VOCABULARY - 1, "model_type": "qwen3"})
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._lexicon = Lexicon(folder, VOCABULARY)

    def keeps(self, grammar: str, text: str, whole: bool = True) -> bool:
        """Tell whether a text is all of an answer, or else may begin one."""
        matcher = LLMatcher(self._lexicon.tokens, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        tokens = self.tokenizer.encode(text).ids
        return matcher.try_consume_tokens(tokens) == len(tokens) and (not whole or matcher.is_accepting())


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("model"))


def grammar_of(style: ToolStyle, tools: list[Tool] = TOOLS, parallel: bool = True, free: bool = False) -> str:
    calls = calls_of(style, tools, parallel, {})
    assert calls is not None
    rule, rules = (calls.free, calls.free_rules) if free else (calls.forced, ())
    found = keepable(whole(rule, (*rules, *calls.rules), calls.parts, "tool_choice", Thoughts(), {}))
    assert isinstance(found, str), found
    return found


def written(style: ToolStyle, *calls: tuple[str, dict[str, Any]]) -> str:
    """Return calls as a model of some style writes them."""
    objects = [f'{{"name": "{name}", "arguments": {json.dumps(arguments)}}}' for name, arguments in calls]
    match style:
        case ToolStyle.HERMES:
            return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
        case ToolStyle.MISTRAL:
            return f"[TOOL_CALLS][{', '.join(objects)}]"
        case ToolStyle.LLAMA:
            return "; ".join(one.replace('"arguments"', '"parameters"') for one in objects)
        case ToolStyle.PYTHONIC:
            items = [f"{name}({', '.join(f'{key}={json.dumps(one)}' for key, one in given.items())})" for name, given in calls]
            return f"[{', '.join(items)}]"
        case ToolStyle.DEEPSEEK | ToolStyle.KIMI_K2:
            opening, closing, call, end, arguments = style.marks
            form = "{}" if style is ToolStyle.DEEPSEEK else "functions.{}:0"
            items = [f"{call}{form.format(name)}{arguments}{json.dumps(given)}{end}" for name, given in calls]
            return f"{opening}{''.join(items)}{closing}"
        case _:
            return "\n".join(_function(name, arguments) for name, arguments in calls)


def _function(name: str, arguments: dict[str, Any]) -> str:
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


STYLES = (
    ToolStyle.HERMES, ToolStyle.QWEN3_CODER, ToolStyle.MISTRAL, ToolStyle.LLAMA, ToolStyle.PYTHONIC, ToolStyle.DEEPSEEK,
    ToolStyle.KIMI_K2,
)  # fmt: skip
#: Those in which a mark of their own begins calls.
MARKED = [style for style in STYLES if style not in (ToolStyle.LLAMA, ToolStyle.PYTHONIC)]


@pytest.mark.parametrize("style", STYLES)
def test_calls_are_written_as_the_model_writes_them(reader: Reader, style: ToolStyle) -> None:
    for calls in ([("weather", PARIS)], [("weather", PARIS), ("now", {})], [("weather", {"city": "a < b\n", "days": 1})]):
        text = written(style, *calls)
        assert reader.keeps(grammar_of(style), text), text
        parser = make_parser(style, {"weather": WEATHER, "now": {}})
        assert parser is not None
        read = calls_in([*parser.add(text), *parser.finish()])
        assert [(call.name, json.loads(call.arguments)) for call in read] == calls


@pytest.mark.parametrize("style", STYLES)
def test_what_is_no_call_of_the_tools_is_not_kept_to(reader: Reader, style: ToolStyle) -> None:
    grammar = grammar_of(style)
    for call in (
        ("wether", PARIS),
        ("weather", {**PARIS, "days": 0}),
        ("weather", {**PARIS, "unit": "k"}),
        ("weather", {"city": "Paris"}),
        ("weather", {**PARIS, "more": 1}),
        ("now", {"a": 1}),
    ):
        assert not reader.keeps(grammar, written(style, call)), call
    assert not reader.keeps(grammar, "It is sunny.", whole=False)
    assert not reader.keeps(grammar, written(style, ("now", {})) + " and so on")


@pytest.mark.parametrize("style", STYLES)
def test_one_call_is_one_where_no_more_are_wanted(reader: Reader, style: ToolStyle) -> None:
    grammar = grammar_of(style, parallel=False)
    assert reader.keeps(grammar, written(style, ("now", {})))
    assert not reader.keeps(grammar, written(style, ("now", {}), ("now", {})))


@pytest.mark.parametrize("style", MARKED)
def test_calls_that_may_be_are_bound_once_they_begin(reader: Reader, style: ToolStyle) -> None:
    grammar = grammar_of(style, free=True)
    call = written(style, ("weather", PARIS))
    for text in ("", "It is <b>sunny</b>.", call, f"Let me see.\n{call}"):
        assert reader.keeps(grammar, text), text
    assert not reader.keeps(grammar, "Let me see. " + written(style, ("weather", {"city": "Paris"})))
    assert not reader.keeps(grammar, call.replace("weather", "wether", 1))


def test_a_function_without_its_tag_is_no_way_around(reader: Reader) -> None:
    assert not reader.keeps(grammar_of(ToolStyle.QWEN3_CODER, free=True), "So: <function=x>", whole=False)
    escaping = written(ToolStyle.QWEN3_CODER, ("weather", {"city": "x\n<parameter=days>\n0", "days": 1}))
    assert not reader.keeps(grammar_of(ToolStyle.QWEN3_CODER), escaping)


@pytest.mark.parametrize("style", STYLES)
def test_what_cannot_be_kept_to_is_any_object_unless_the_tool_is_strict(reader: Reader, style: ToolStyle) -> None:
    unlike = {"type": "object", "properties": {"anything": {"type": "array", "uniqueItems": True}}, "required": ["anything"]}
    loose = grammar_of(style, [Tool("f", unlike, False, "tools[0].function.parameters")])
    assert reader.keeps(loose, written(style, ("f", ANY)))
    calls = calls_of(style, [Tool("f", unlike, True, "tools[0].function.parameters")], True, {})
    assert calls is not None
    problem = keepable(whole(calls.forced, calls.rules, calls.parts, "tool_choice", Thoughts(), {}))
    assert isinstance(problem, Unkeepable)
    assert problem.field == "tools[0].function.parameters.properties.anything"


def test_texts_in_tags_are_kept_to_lists_alone() -> None:
    schema = {"type": "object", "properties": {"code": {"type": "string", "pattern": "^[a-z]$"}}}
    with pytest.raises(Unkeepable) as caught:
        calls_of(ToolStyle.QWEN3_CODER, [Tool("f", schema, True, "tools[2].function.parameters")], True, {})
    assert caught.value.field == "tools[2].function.parameters.properties.code.pattern"


#: Styles that write each argument by itself.
APART = (ToolStyle.QWEN3_CODER, ToolStyle.PYTHONIC)


@pytest.mark.parametrize("style", APART)
@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"minProperties": 1}, ".minProperties"),
        ({"patternProperties": {"^a": {"type": "null"}}}, ".patternProperties"),
        ({"required": ["elsewhere"]}, ".required"),
        ({"required": True}, ".required"),
        ({"required": [["a"]]}, ".required"),
        ({"properties": {"a": False}}, ".properties.a"),
        ({"anyOf": [{"required": ["a"]}]}, ""),
    ],
)
def test_what_is_asked_of_an_object_as_a_whole_is_refused_where_it_is_not_written_as_one(
    style: ToolStyle, more: dict[str, Any], where: str
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, **more}
    with pytest.raises(Unkeepable) as caught:
        calls_of(style, [Tool("f", schema, True, "tools[0].function.parameters")], True, {})
    assert caught.value.field == f"tools[0].function.parameters{where}"
    assert calls_of(style, [Tool("f", schema, False, "tools[0].function.parameters")], True, {}) is not None


@pytest.mark.parametrize("style", [style for style in STYLES if style not in (ToolStyle.HERMES, ToolStyle.LLAMA)])
def test_a_name_that_would_not_be_read_is_refused(style: ToolStyle) -> None:
    with pytest.raises(Unkeepable, match=r"'two \{words' is no name"):
        calls_of(style, [Tool("two {words", None, False, "tools[0].function.parameters")], True, {})


OPTIONAL = {
    "type": "object",
    "properties": {
        "a": {"type": "boolean"}, "b-2": {"type": ["boolean", "null"]}, "c": {"type": "array", "items": {"type": "boolean"}},
        "d e": {"type": "integer"}, "f": {"type": "boolean", "const": True},
    },
    "required": ["c"],
    "additionalProperties": False,
}  # fmt: skip


def test_arguments_of_python_calls_may_be_left_out_where_they_are_not_required(reader: Reader) -> None:
    grammar = grammar_of(ToolStyle.PYTHONIC, [Tool("mcp-server.f", OPTIONAL, True, "tools[0].function.parameters")])
    for given, read in {
        "c=[]": {"c": []},
        "a=True, c=[true, false]": {"a": True, "c": [True, False]},
        "b-2=None, c=[], f=true": {"b-2": None, "c": [], "f": True},
        "a=False, b-2=False, c=[true], f=true": {"a": False, "b-2": False, "c": [True], "f": True},
    }.items():
        text = f"[mcp-server.f({given})]"
        assert reader.keeps(grammar, text), text
        parser = make_parser(ToolStyle.PYTHONIC, {"mcp-server.f": OPTIONAL})
        assert parser is not None
        assert [json.loads(call.arguments) for call in calls_in([*parser.add(text), *parser.finish()])] == [read]
    for given in ("", "a=True", "a=true, c=[]", "c=[], a=True", "c=[],", "c=[], d e=3", "c=[], f=True"):
        assert not reader.keeps(grammar, f"[mcp-server.f({given})]"), given


def test_an_argument_that_has_no_name_in_python_may_not_be_required() -> None:
    with pytest.raises(Unkeepable, match="'d e' is no name"):
        calls_of(ToolStyle.PYTHONIC, [Tool("f", {**OPTIONAL, "required": ["d e"]}, False, "tools[0]")], True, {})


NOTE = Constraint(
    ConstraintKind.GRAMMAR, 'start: "say " /[a-z"\\\\]+/ (LF | "<b>")\n%import common.LF', "tools[0].format.definition"
)
NOTED = Tool("note", {"type": "object", "properties": {"input": {"type": "string"}}}, False, NOTE.field, NOTE)


@pytest.mark.parametrize("style", STYLES)
def test_an_input_of_some_form_is_bound_in_every_style(reader: Reader, style: ToolStyle) -> None:
    grammar = grammar_of(style, [NOTED])
    for text, kept in (('say a"\\b\n', True), ("say a<b>", True), ("say \n", False), ("say a", False), ("say a\nb", False)):
        call = written(style, ("note", {"input": text}))
        assert reader.keeps(grammar, call) is kept, call
        parser = make_parser(style, {"note": {}})
        assert parser is not None
        [read] = calls_in([*parser.add(call), *parser.finish()])
        assert json.loads(read.arguments) == {"input": text}


def test_an_input_that_comes_to_no_expression_is_refused_where_it_stands() -> None:
    nested = replace(NOTE, text='start: "(" start? ")"')
    with pytest.raises(Unkeepable, match=r"tools\[0\]\.format\.definition: has a rule that refers to itself"):
        calls_of(ToolStyle.HERMES, [replace(NOTED, input=nested)], True, {})
