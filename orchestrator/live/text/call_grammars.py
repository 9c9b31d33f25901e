"""How a model writes calls of some tools, as a grammar: in its own style, so that what reads its calls reads these as well.

    hermes, qwen3_coder   <tool_call> item, again after a line's end
    mistral               [TOOL_CALLS] [item, item]
                          [TOOL_CALLS] item [TOOL_CALLS] item          if the model has the token [ARGS]
    llama                 item; item
    deepseek, kimi_k2     SECTION item item END          an item is in marks of its own; of DeepSeek's forms that of V3.1

Arguments are kept to a tool's schema. Of a tool that is not strict whose schema cannot be kept to, they are any object. In
qwen3_coder a text stands for itself, up to its closing tag: it is kept to `enum` and `const`, and to nothing else.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from orchestrator.live.text.functions import FUNCTION_OPEN, is_text
from orchestrator.live.text.grammars import Part, Unkeepable, literal, mark, schema_part
from orchestrator.live.text.styles import ToolStyle

#: Calls in one answer.
CALLS_MAX = 128
#: What arguments are without a schema that can be kept to.
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
#: Of a text in a tag that would be read as something else.
_TAGS = ("<parameter=", "</parameter>", "<function=", "</function>", "<tool_call>", "</tool_call>")
#: What says elsewhere what an object is.
_ELSEWHERE = {"$ref", "anyOf", "oneOf", "allOf"}


@dataclass(frozen=True, slots=True)
class Tool:
    """What a model may call."""

    name: str
    #: Of its arguments; None for none.
    schema: Mapping[str, Any] | None
    strict: bool
    #: Where the client wrote the schema.
    field: str


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls as rules: `calls` is one or several, and nothing else."""

    #: What begins them; empty where nothing does.
    opening: str
    #: The rule for what follows that.
    rest: str
    #: Further rules, a line each.
    rules: Sequence[str]
    parts: Sequence[Part]
    #: What is read as the beginning of a call besides.
    also_open: Sequence[str] = ()

    def forced(self, marks: Mapping[str, int]) -> str:
        """Return the rule for an answer that is calls."""
        return f"{mark(self.opening, marks)} {self.rest}" if self.opening else self.rest

    def free(self, marks: Mapping[str, int]) -> tuple[str, Sequence[str]]:
        """Return the rule, and those that it needs, for a text that calls may follow."""
        special = marks.get(self.opening)
        silent = (*self.also_open, *(() if special is not None else (self.opening,)))
        opened = f"opened: BEFORE <[{special}]>" if special is not None else f"opened[lazy]: BEFORE {literal(self.opening)}"
        rules = (opened, f"BEFORE: {_text_without(self.also_open)}", "last: LAST", f"LAST: {_text_without(silent)}")
        return f"(last | opened {self.rest})", rules


def calls_of(style: ToolStyle, tools: Sequence[Tool], parallel: bool, marks: Mapping[str, int]) -> Calls | None:
    """Return calls of some tools; None if it is not known here how a style writes them.

    Args:
        style: the model's.
        tools: at least one.
        parallel: there may be several calls.
        marks: numbers of the marks that are no text.

    Raises:
        Unkeepable: a strict tool's schema cannot be kept to in this style.
    """
    match style:
        case ToolStyle.HERMES | ToolStyle.QWEN3_CODER:
            opening, closing = style.marks
            tagged = style is ToolStyle.QWEN3_CODER
            items = [_function_item(*one) if tagged else _object_item(*one, "arguments", "\n", "\n") for one in enumerate(tools)]
            rest = _several(f"{literal(chr(10))} {mark(opening, marks)}", parallel)
            rules = _rules(items, f" {mark(closing, marks)}")
            return Calls(opening, rest, rules, _parts(items), (FUNCTION_OPEN,) if tagged else ())
        case ToolStyle.MISTRAL:
            opening, arguments, _ = style.marks
            if arguments in marks:
                items = [_named_item(*one, mark(arguments, marks)) for one in enumerate(tools)]
                return Calls(opening, _several(mark(opening, marks), parallel), _rules(items), _parts(items))
            items = [_object_item(*one, "arguments") for one in enumerate(tools)]
            return Calls(opening, f'"[" {_several(literal(", "), parallel)} "]"', _rules(items), _parts(items))
        case ToolStyle.LLAMA:
            items = [_object_item(*one, "parameters") for one in enumerate(tools)]
            return Calls("", _several(literal("; "), parallel), _rules(items), _parts(items))
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
            return Calls(opening, rest, _rules(items, f" {mark(end, marks)}"), _parts(items), (call,))
        case _:
            return None


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
    part = _arguments_part(number, tool)
    return _Item(f"{literal(head)} @{part.name} {literal('}' + after)}", (), (part,))


def _named_item(number: int, tool: Tool, arguments: str, before: str = "", form: str = "{}") -> _Item:
    """Return a call as a name in some form, a mark and an object."""
    part = _arguments_part(number, tool)
    return _Item(f"{before} {literal(form.format(tool.name))} {arguments} @{part.name}", (), (part,))


def _arguments_part(number: int, tool: Tool) -> Part:
    return schema_part(f"tool_{number}", _object_schema(tool), tool.field, None if tool.strict else ANY_OBJECT)


def _object_schema(tool: Tool) -> Mapping[str, Any]:
    """Return the schema of all arguments: those of any call are an object. Raises `Unkeepable`."""
    if tool.schema is None:
        return {"type": "object", "additionalProperties": False}
    named = tool.schema.get("type")
    if named is not None and "object" not in (cast("list[Any]", named) if isinstance(named, list) else [named]):
        _refuse(tool, ".type", "must be object, as arguments are")
        return ANY_OBJECT
    return tool.schema if tool.schema.keys() & _ELSEWHERE else {**tool.schema, "type": "object"}


def _refuse(tool: Tool, where: str, problem: str) -> None:
    """Refuse what a strict tool asks for; of others it is not kept to."""
    if tool.strict:
        raise Unkeepable(tool.field + where, problem)


# --- functions whose parameters are tags ------------------------------------------------------------------------------


def _function_item(number: int, tool: Tool) -> _Item:
    """Return a call as tags: parameters in the schema's order, those that are not required or not."""
    schema = _object_schema(tool)
    properties = schema.get("properties")
    head, tail = literal(f"\n<function={tool.name}>\n"), literal("</function>\n")
    if schema.keys() & _ELSEWHERE or not (isinstance(properties, Mapping) or schema.get("additionalProperties") is False):
        _refuse(tool, "", "in this model's style of calls only the properties of an object can be kept to")
        any_parameter = r"any_parameter: /<parameter=[\w.-]{1,64}>\n/ text"
        return _Item(f"{head} any_parameter{{0,{CALLS_MAX}}} {tail}", (any_parameter, *_TEXT), ())
    rules: list[str] = []
    parts: list[Part] = []
    order: list[str] = []
    for place, (name, inner) in enumerate(cast("Mapping[str, Any]", properties or {}).items()):
        rule = f"value_{number}_{place}"
        order.append(rule if name in schema.get("required", ()) else f"{rule}?")
        opening = literal(f"<parameter={name}>\n")
        if is_text(inner):
            rules.append(f"{rule}: {opening} {_text_value(tool, name, inner)}")
        else:
            shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
            otherwise: Mapping[str, Any] | None = None if tool.strict else {}
            parts.append(schema_part(rule, {**shared, **inner}, f"{tool.field}.properties.{name}", otherwise))
            rules.append(f"{rule}: {opening} @{rule} {literal(_VALUE_END)}")
    return _Item(" ".join((head, *order, tail)), (*rules, *_TEXT), parts)


def _text_value(tool: Tool, name: str, schema: object) -> str:
    """Return a text and the tag that closes it, as a rule."""
    described: Mapping[str, Any] = cast("Mapping[str, Any]", schema) if isinstance(schema, Mapping) else {}
    listed: object = described.get("enum", [described["const"]] if "const" in described else None)
    values = cast("list[object]", listed) if isinstance(listed, list) else []
    if values and all(isinstance(one, str | None) for one in values):
        return f"({' | '.join(literal('null' if one is None else str(one)) for one in values)}) {literal(_VALUE_END)}"
    for key in ("pattern", "format", "minLength", "maxLength"):
        if key in described:
            _refuse(tool, f".properties.{name}.{key}", "cannot be kept to in this model's style of calls")
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
