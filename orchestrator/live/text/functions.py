"""Reads tool calls whose parameters are tags, as Qwen3-Coder writes them; a value is what its tool's schema makes of its text.

    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>

What a value's text means follows vLLM's parser for these models, so that a model does the same behind either.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from math import isfinite
from typing import Any, TypeAlias, cast

#: By the name of each tool the JSON schema of its parameters, empty if it has none.
Tools: TypeAlias = Mapping[str, Mapping[str, Any]]

FUNCTION_OPEN, FUNCTION_CLOSE = "<function=", "</function>"
_FUNCTION = re.compile(r"\s*<function=([^<>{}\"'\s]+)>(.*?)(</function>\s*(?=<function=|\Z)|\Z)", re.DOTALL)
#: A closing tag inside a value is part of it unless what may follow a parameter follows; one left out is where the next begins.
_PARAMETER = re.compile(
    r"\s*<parameter=([^<>\n]+)>\n?(.*?)\n?(</parameter>\s*(?=<parameter=|\Z)|(?=\n<parameter=)|\Z)", re.DOTALL
)
_TEXTS = frozenset({"string", "str", "text", "varchar", "char", "enum"})
_TRUTHS = frozenset({"boolean", "bool", "binary"})
_NOTHING = frozenset({"null", "none"})


def read_functions(text: str, tools: Tools) -> list[tuple[str, dict[str, Any]]]:
    """Return names and arguments of calls that follow each other and nothing else; none at all if there is anything else.

    A last call may lack its closing tag if its parameters are whole: what was cut off inside a value is no call.
    """
    calls: list[tuple[str, dict[str, Any]]] = []
    while text.strip():
        found = _FUNCTION.match(text)
        if found is None:
            return []
        name, inner, close = found.groups()
        arguments = _arguments(inner, tools.get(name, {}), bool(close))
        if arguments is None:
            return []
        calls.append((name, arguments))
        text = text[found.end() :]
    return calls


def _arguments(inner: str, schema: Mapping[str, Any], closed: bool) -> dict[str, Any] | None:
    properties = _object(schema.get("properties"))
    arguments: dict[str, Any] = {}
    while inner.strip():
        parameter = _PARAMETER.match(inner)
        if parameter is None:
            return None
        name, value, close = parameter.groups()
        inner = inner[parameter.end() :]
        if not close and not inner and not closed:
            return None
        arguments[name] = typed(value, properties.get(name))
    return arguments


def typed(value: str, schema: object) -> Any:
    """Return what a text means to a schema; what does not fit stays text, for the tool to refuse."""
    kinds = _kinds(_object(schema))
    kind = next((kind for kind in kinds if kind != "null"), "null" if kinds else "string")
    if value.lower() in _NOTHING and ("null" in kinds or kind not in _TEXTS):
        return None
    if kind in _TEXTS:
        return value
    if kind in _TRUTHS:
        return value.lower() == "true"
    try:
        if kind.startswith(("int", "uint", "long", "short", "unsigned")):
            return int(value)
        if kind.startswith(("num", "float")):
            number = float(value)
            return int(number) if number.is_integer() else number if isfinite(number) else value
    except (ValueError, OverflowError):
        return value
    return _structure(value)


def _structure(value: str) -> Any:
    """Return the object or list that a text is in JSON, or in Python's way, which models fall into."""
    for read in (json.loads, _literal):
        try:
            found = read(value)
            # Numbers that JSON has none for, text that is none, and sets would not reach the client.
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        return found
    return value


def _literal(value: str) -> Any:
    with warnings.catch_warnings():
        # Python would warn of odd escapes in what a model wrote.
        warnings.simplefilter("ignore")
        return ast.literal_eval(value)


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    """Return the types that a schema allows, lower case; none if it names none."""
    named = schema.get("type")
    if named is None:
        options = [schema.get(name) for name in ("anyOf", "oneOf")]
        named = [_object(one).get("type") for option in options if isinstance(option, list) for one in cast("list[Any]", option)]
    listed = cast("list[Any]", named) if isinstance(named, list) else [named]
    return [kind.strip().lower() for kind in listed if isinstance(kind, str)]


def _object(value: object) -> Mapping[str, Any]:
    """Return an object of a schema that anybody may have written; what is none says nothing."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}
