"""What an answer must be, in the words for it: OpenAI's `response_format`, vLLM's `structured_outputs`, and its older `guided_*`.

    response_format       {"type": "json_object"}  {"type": "json_schema", "json_schema": {"name", "schema", "strict"?}}
    structured_outputs    {"json" | "regex" | "choice" | "grammar" | "json_object": ...}
    guided_json, ...      the same, a field each

Of these one at most. A schema is kept to whether or not it is strict.
"""

import json
import re
from operator import attrgetter
from typing import Any, Protocol, cast

from orchestrator.live.asked import Constraint, ConstraintKind
from orchestrator.live.refusals import require

#: Any JSON object.
_OBJECT = '{"type":"object"}'
_KINDS = {
    "json": ConstraintKind.JSON_SCHEMA,
    "regex": ConstraintKind.REGEX,
    "choice": ConstraintKind.CHOICE,
    "grammar": ConstraintKind.GRAMMAR,
}
_said = attrgetter("response_format", "structured_outputs", *(f"guided_{name}" for name in _KINDS))
#: What most requests say.
_NOTHING = (None,) * (2 + len(_KINDS))
#: What vLLM's object may hold besides; true or given, they ask for what is not served.
_FURTHER = ("structural_tag", "disable_fallback", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
_NAME = re.compile(r"[\w-]{1,64}", re.ASCII)


class Constrained(Protocol):
    """The fields of a body."""

    response_format: Any
    structured_outputs: Any
    guided_json: Any
    guided_regex: Any
    guided_choice: Any
    guided_grammar: Any


def constraint_of(request: Constrained) -> Constraint | None:
    """Return what the answer must be, None for anything. Raises `Invalid`."""
    if _said(request) == _NOTHING:
        return None
    guided = {name: value for name in _KINDS if (value := getattr(request, f"guided_{name}")) is not None}
    found = [_constraint(name, value, f"guided_{name}") for name, value in guided.items()]
    if request.structured_outputs is not None:
        found.append(_structured(request.structured_outputs))
    written = request.response_format
    if written is not None and (form := formatted(written, "response_format", "json_schema")) is not None:
        found.append(form)
    for one in found[1:]:
        require(False, one.field, f"cannot be combined with {found[0].field}: one of them says what the answer must be")
    return found[0] if found else None


def formatted(written: object, field: str, describing: str = "") -> Constraint | None:
    """Return what an answer's form must be, None for text. Raises `Invalid`.

    Args:
        written: OpenAI's object for that.
        field: where it is.
        describing: the field in it that has a schema's name and the schema; empty: it has them itself.
    """
    format = _object(written, field)
    kind = format.get("type")
    require(
        kind in ("text", "json_object", "json_schema"),
        f"{field}.type",
        f"must be text, json_object or json_schema, is {_shown(kind)}",
    )
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint(ConstraintKind.JSON_SCHEMA, _OBJECT, field)
    where = f"{field}.{describing}" if describing else field
    described = _object(format.get(describing), where) if describing else format
    name, strict = described.get("name"), described.get("strict")
    named = isinstance(name, str) and _NAME.fullmatch(name) is not None
    require(named, f"{where}.name", f"must be 1 to 64 letters, digits, _ and -, is {_shown(name)}")
    require(strict is None or isinstance(strict, bool), f"{where}.strict", f"must be true or false, is {_shown(strict)}")
    return _constraint("json", _object(described.get("schema"), f"{where}.schema"), f"{where}.schema")


def _structured(written: object) -> Constraint:
    """Return what a `structured_outputs` asks for."""
    field = "structured_outputs"
    options = {name: value for name, value in _object(written, field).items() if value is not None and value is not False}
    for name in _FURTHER:
        require(name not in options, f"{field}.{name}", "is not served here; leave it out")
    known = [name for name in (*_KINDS, "json_object") if name in options]
    require(len(known) == 1, field, f"must have one of {', '.join(_KINDS)} and json_object, has {', '.join(known) or 'none'}")
    [name] = known
    if name == "json_object":
        return Constraint(ConstraintKind.JSON_SCHEMA, _OBJECT, f"{field}.{name}")
    return _constraint(name, options[name], f"{field}.{name}")


def _constraint(name: str, value: object, field: str) -> Constraint:
    """Return a constraint of one of vLLM's kinds: schemas as objects or JSON text, lists as they are, all else as text."""
    if name == "json" and not isinstance(value, str):
        value = json.dumps(_object(value, field))
    elif name == "choice":
        require(isinstance(value, list), field, f"must be a list of texts, is {_shown(value)}")
        value = json.dumps(value)
    require(isinstance(value, str), field, f"must be a text, is {_shown(value)}")
    return Constraint(_KINDS[name], cast("str", value), field)


def _object(value: object, field: str) -> dict[str, Any]:
    require(isinstance(value, dict), field, f"must be an object, is {_shown(value)}")
    return cast("dict[str, Any]", value)


def _shown(value: object) -> str:
    return "missing" if value is None else json.dumps(value)[:60]
