"""How a model writes calls of some tools, as a grammar: in its own style, so that what reads its calls reads these as well.

    hermes, qwen3_coder   <tool_call> item, again after a line's end
    mistral               [TOOL_CALLS] [item, item]
                          [TOOL_CALLS] item [TOOL_CALLS] item          if the model has the token [ARGS]
    llama                 item; item
    deepseek, kimi_k2     SECTION item item END          an item is in marks of its own; of DeepSeek's forms that of V3.1
    pythonic              [item, item]                   values as JSON has them, but for True, False and None
    harmony               item                           a message in a channel: an answer ends with its first call

Arguments are kept to a tool's schema. Of a tool that is not strict whose schema cannot be kept to, they are any object. In
qwen3_coder a text stands for itself, up to its closing tag: it is kept to `enum` and `const`, and to nothing else.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from orchestrator.live.asked import Constraint
from orchestrator.live.text.arguments import (
    ELSEWHERE,
    Property,
    Tool,
    arguments_part,
    input_expression,
    input_schema,
    properties_of,
    refuse,
)
from orchestrator.live.text.functions import FUNCTION_OPEN, is_text
from orchestrator.live.text.grammars import Part, Unkeepable, expression_literal, inline_part, literal, mark, schema_part
from orchestrator.live.text.pythonic import NAME as PYTHON_NAME
from orchestrator.live.text.reasoning import CHANNEL_MARKS
from orchestrator.live.text.styles import ToolStyle

#: Calls in one answer.
CALLS_MAX = 128
#: Of a text in a tag that would be read as something else.
_TAGS = ("<parameter=", "</parameter>", "<function=", "</function>", "<tool_call>", "</tool_call>")
#: Names that are read in calls, where not all are.
_NAMES = {
    ToolStyle.QWEN3_CODER: r"[^<>{}\"'\s]+",
    ToolStyle.MISTRAL: r"[^\s\[\]{}]+",
    ToolStyle.DEEPSEEK: r"[^\s{<]+",
    ToolStyle.KIMI_K2: r"[^\s:<{]+",
    ToolStyle.PYTHONIC: PYTHON_NAME,
    ToolStyle.HARMONY: r"[^\s<]+",
}
#: Values as Python writes them where JSON does not.
_PYTHON_WORDS = {"boolean": '"True" | "False"', "null": '"None"'}
_ANY_PYTHON_NAME = "[A-Za-z_][A-Za-z0-9_]{0,63}"


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls as rules."""

    #: The rule for an answer that is calls: one or several, and nothing else.
    forced: str
    #: Further rules that it needs, a line each.
    rules: Sequence[str]
    parts: Sequence[Part]
    #: The rule for a text that calls may follow; empty where nothing tells that they begin.
    free: str = ""
    #: Rules that it needs besides.
    free_rules: Sequence[str] = ()


def calls_of(style: ToolStyle, tools: Sequence[Tool], parallel: bool, marks: Mapping[str, int]) -> Calls | None:
    """Return calls of some tools; None if it is not known here how a style writes them.

    Args:
        style: the model's.
        tools: at least one.
        parallel: there may be several calls.
        marks: numbers of the marks that are no text.

    Raises:
        Unkeepable: a strict tool's schema cannot be kept to in this style, or a name cannot be written in it.
    """
    _check_names(style, tools)
    match style:
        case ToolStyle.HERMES | ToolStyle.QWEN3_CODER:
            opening, closing = style.marks
            tagged = style is ToolStyle.QWEN3_CODER
            items = [_function_item(*one) if tagged else _object_item(*one, "arguments", "\n", "\n") for one in enumerate(tools)]
            rest = _several(f"{literal(chr(10))} {mark(opening, marks)}", parallel)
            rules = _rules(items, f" {mark(closing, marks)}")
            return _marked(opening, rest, rules, _parts(items), marks, (FUNCTION_OPEN,) if tagged else ())
        case ToolStyle.MISTRAL:
            opening, arguments, _ = style.marks
            if arguments in marks:
                items = [_named_item(*one, mark(arguments, marks)) for one in enumerate(tools)]
                return _marked(opening, _several(mark(opening, marks), parallel), _rules(items), _parts(items), marks)
            items = [_object_item(*one, "arguments") for one in enumerate(tools)]
            rest = f'"[" {_several(literal(", "), parallel)} "]"'
            return _marked(opening, rest, _rules(items), _parts(items), marks)
        case ToolStyle.LLAMA:
            items = [_object_item(*one, "parameters") for one in enumerate(tools)]
            return Calls(_several(literal("; "), parallel), _rules(items), _parts(items))
        case ToolStyle.PYTHONIC:
            items = [_python_item(*one) for one in enumerate(tools)]
            return Calls(f'"[" {_several(literal(", "), parallel)} "]"', _rules(items), _parts(items))
        case ToolStyle.DEEPSEEK | ToolStyle.KIMI_K2:
            opening, closing, call, end, arguments = style.marks
            begun = mark(call, marks)
            if style is ToolStyle.DEEPSEEK:
                items = [_named_item(*one, mark(arguments, marks), begun) for one in enumerate(tools)]
            else:
                # An item is numbered; its name with the number is its id.
                numbered = f"/[0-9]{{1,3}}/ {mark(arguments, marks)}"
                items = [_named_item(*one, numbered, begun, "functions.{}:") for one in enumerate(tools)]
            rest = f"{_several('', parallel)} {mark(closing, marks)}"
            return _marked(opening, rest, _rules(items, f" {mark(end, marks)}"), _parts(items), marks, (call,))
        case ToolStyle.HARMONY:
            return _in_channels(tools, marks)
        case ToolStyle.NONE:
            return None


def _check_names(style: ToolStyle, tools: Sequence[Tool]) -> None:
    for tool in tools:
        if style in _NAMES and re.fullmatch(_NAMES[style], tool.name) is None:
            raise Unkeepable(tool.field, f"{tool.name!r} is no name that calls have in this model's style ({style})")


def _marked(
    opening: str, rest: str, rules: Sequence[str], parts: Sequence[Part], marks: Mapping[str, int], also_open: Sequence[str] = ()
) -> Calls:
    """Return calls that a mark begins.

    Args:
        opening: the mark.
        rest: the rule for what follows it.
        rules: those that it needs.
        parts: those that they need.
        marks: numbers of the marks that are no text.
        also_open: what is read as the beginning of a call besides.
    """
    special = marks.get(opening)
    silent = (*also_open, *(() if special is not None else (opening,)))
    opened = f"opened: BEFORE <[{special}]>" if special is not None else f"opened[lazy]: BEFORE {literal(opening)}"
    free_rules = (opened, f"BEFORE: {_text_without(also_open)}", "last: LAST", f"LAST: {_text_without(silent)}")
    return Calls(f"{mark(opening, marks)} {rest}", rules, parts, f"(last | opened {rest})", free_rules)


@dataclass(frozen=True, slots=True)
class _Item:
    """One tool's call without what is around all calls."""

    rule: str
    rules: Sequence[str]
    parts: Sequence[Part]


def _several(between: str, parallel: bool) -> str:
    return f"item ({between} item){{0,{CALLS_MAX - 1}}}" if parallel else "item"


def _rules(items: Sequence[_Item], closing: str = "") -> list[str]:
    names = " | ".join(f"item_{number}" for number in range(len(items)))
    own = [f"item_{number}: {item.rule}{closing}" for number, item in enumerate(items)]
    return [f"item: {names}", *own, *dict.fromkeys(rule for item in items for rule in item.rules)]


def _parts(items: Sequence[_Item]) -> list[Part]:
    return [part for item in items for part in item.parts]


def _object_item(number: int, tool: Tool, key: str, before: str = "", after: str = "") -> _Item:
    """Return a call as an object of JSON."""
    head = f'{before}{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{key}": '
    part = arguments_part(number, tool)
    return _Item(f"{literal(head)} @{part.name} {literal('}' + after)}", (), (part,))


def _named_item(number: int, tool: Tool, arguments: str, before: str = "", form: str = "{}") -> _Item:
    """Return a call as a name in some form, a mark and an object."""
    part = arguments_part(number, tool)
    return _Item(f"{before} {literal(form.format(tool.name))} {arguments} @{part.name}", (), (part,))


# --- functions whose parameters are tags ------------------------------------------------------------------------------


def _function_item(number: int, tool: Tool) -> _Item:
    """Return a call as tags: parameters in the schema's order, those that are not required or not."""
    if tool.input is not None:
        return _input_function(number, tool, tool.input)
    properties = properties_of(tool)
    head, tail = literal(f"\n<function={tool.name}>\n"), literal("</function>\n")
    if properties is None:
        any_parameter = r"any_parameter: /<parameter=[\w.-]{1,64}>\n/ text"
        return _Item(f"{head} any_parameter{{0,{CALLS_MAX}}} {tail}", (any_parameter, *_TEXT), ())
    rules: list[str] = []
    parts: list[Part] = []
    order: list[str] = []
    for place, one in enumerate(properties):
        rule = f"value_{number}_{place}"
        order.append(rule if one.required else f"{rule}?")
        opening = literal(f"<parameter={one.name}>\n")
        if is_text(one.schema):
            rules.append(f"{rule}: {opening} {_text_value(tool, one)}")
        else:
            parts.append(one.part(rule, tool.strict))
            rules.append(f"{rule}: {opening} @{rule} {literal(_VALUE_END)}")
    return _Item(" ".join((head, *order, tail)), (*rules, *_TEXT), parts)


def _input_function(number: int, tool: Tool, form: Constraint) -> _Item:
    """Return a call with a text of some form."""
    rule = f"value_{number}"
    written = f"INPUT_{number}: {expression_literal(input_expression(form))} & {_text_without(_TAGS)}"
    value = f"{rule}[lazy]: INPUT_{number} {literal(_VALUE_END)}"
    head = literal(f"\n<function={tool.name}>\n<parameter=input>\n")
    return _Item(f"{head} {rule} {literal('</function>' + chr(10))}", (value, written), ())


def _text_value(tool: Tool, one: Property) -> str:
    """Return a text and the tag that closes it, as a rule."""
    described = one.schema
    listed: object = described.get("enum", [described["const"]] if "const" in described else None)
    values = cast("list[object]", listed) if isinstance(listed, list) else []
    if values and all(isinstance(one, str | None) for one in values):
        return f"({' | '.join(literal('null' if one is None else str(one)) for one in values)}) {literal(_VALUE_END)}"
    for key in ("pattern", "format", "minLength", "maxLength"):
        if key in described:
            refuse(tool, f".properties.{one.name}.{key}", "cannot be kept to in this model's style of calls")
    return "text"


def _text_without(tags: Sequence[str]) -> str:
    """Return an expression for any text in which none of some tags is."""
    if not tags:
        return "/(?s:.*)/"
    found = "|".join(re.escape(tag).replace("/", r"\/") for tag in tags)
    return f"/(?s:.*)/ & ~/(?s:.*)({found})(?s:.*)/"


_VALUE_END = "\n</parameter>\n"
#: Any text in a tag, with the tag that closes it.
_TEXT = (f"text[lazy]: TEXT {literal(_VALUE_END)}", f"TEXT: {_text_without(_TAGS)}")


# --- calls as Python has them -----------------------------------------------------------------------------------------


def _python_item(number: int, tool: Tool) -> _Item:
    """Return a call with named arguments, in the schema's order, those that are not required or not."""
    head = literal(f"{tool.name}(")
    if tool.input is not None:
        part = inline_part(f"value_{number}", input_schema(tool.input), tool.input.field)
        return _Item(f'{head} "input=" @{part.name} ")"', (), (part,))
    properties = properties_of(tool)
    if properties is None:
        part = schema_part(f"any_{number}", {}, tool.field)
        argument = f"/{_ANY_PYTHON_NAME}=/ @{part.name}"
        return _Item(f'{head} ({argument} (", " {argument}){{0,{CALLS_MAX}}})? ")"', (), (part,))
    rules: list[str] = []
    parts: list[Part] = []
    for place, one in enumerate(_written(tool, properties)):
        rule = f"value_{number}_{place}"
        words = _python_words(one.schema)
        rules.append(f"{rule}: {literal(f'{one.name}=')} {f'({words})' if words else f'@{rule}'}")
        parts += [] if words else [one.part(rule, tool.strict)]
    return _Item(f'{head} first_{number}_0 ")"', (*rules, *_listed(number, _written(tool, properties))), parts)


def _written(tool: Tool, properties: Sequence[Property]) -> list[Property]:
    """Return those whose names can be written. Raises `Unkeepable` if one that cannot be is required."""
    found: list[Property] = []
    for one in properties:
        if re.fullmatch(PYTHON_NAME, one.name):
            found.append(one)
        elif one.required:
            raise Unkeepable(one.field, f"{one.name!r} is no name that arguments have in this model's style of calls")
    return found


def _listed(number: int, properties: Sequence[Property]) -> list[str]:
    """Return rules for values with commas between them, of which those that are not required may be left out."""
    rules = [f'first_{number}_{len(properties)}: ""', f'more_{number}_{len(properties)}: ""']
    for place, one in enumerate(properties):
        value, first, more = f"value_{number}_{place}", f"first_{number}_{place + 1}", f"more_{number}_{place + 1}"
        rules.append(f"first_{number}_{place}: {value} {more}" + ("" if one.required else f" | {first}"))
        rules.append(f'more_{number}_{place}: ", " {value} {more}' + ("" if one.required else f" | {more}"))
    return rules


def _python_words(schema: Mapping[str, Any]) -> str:
    """Return all values that a schema allows, as Python has them; empty if they are not few and no others' than Python's."""
    named = schema.get("type")
    kinds = cast("list[Any]", named) if isinstance(named, list) else [named]
    plain = not schema.keys() & {"enum", "const", "not", "if", *ELSEWHERE}
    words = [_PYTHON_WORDS.get(str(kind), "") for kind in kinds]
    return " | ".join(words) if plain and all(words) else ""


# --- calls in channels ------------------------------------------------------------------------------------------------


def _in_channels(tools: Sequence[Tool], marks: Mapping[str, int]) -> Calls:
    """Return a call as a message to a function; before one that is not forced thoughts may be, and what is said meanwhile."""
    start, channel, message, constrain, *_ = (mark(one, marks) for one in CHANNEL_MARKS)
    parts = [arguments_part(*one) for one in enumerate(tools)]
    rules = [f"item: {' | '.join(f'item_{number}' for number in range(len(tools)))}"]
    for number, (tool, part) in enumerate(zip(tools, parts, strict=True)):
        to = f" to=functions.{tool.name}"
        header = f'({channel} {literal(f"commentary{to}")} | {literal(to)} {channel} "commentary")'
        rules.append(f'item_{number}: {header} (" " {constrain}? "json")? {message} @{part.name}')
    aside = f'aside: {channel} ("analysis" | "commentary") {message} thought {start} "assistant"'
    last = f'last: {channel} ("analysis" | "commentary" | "final") {message} /(?s:.*)/'
    return Calls("item", rules, parts, "aside* (item | last)", (aside, last))
