"""What the arguments of a call must be: a tool's schema, or the form of its one input.

All of them as one part of JSON, or, for styles that write each by itself, one after the other. What a strict tool asks for and
cannot be kept to is refused; of others it is not kept to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from orchestrator.live.asked import Constraint, ConstraintKind
from orchestrator.live.text.expressions import NoExpression, expression_of
from orchestrator.live.text.grammars import CHARS_MAX, Part, Unkeepable, inline_part, schema_part

#: What arguments are without a schema that can be kept to.
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
#: What says elsewhere what an object is.
ELSEWHERE = {"$ref", "anyOf", "oneOf", "allOf"}
#: What else binds an object that is not written as one.
_UNHEEDED = (
    "minProperties", "maxProperties", "patternProperties", "propertyNames", "dependentRequired", "dependentSchemas",
    "dependencies", "enum", "const", "not", "if",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tool:
    """What a model may call."""

    name: str
    #: Of its arguments; None for none.
    schema: Mapping[str, Any] | None
    strict: bool
    #: Where the client wrote the schema.
    field: str
    #: What its one argument, `input`, must be to the letter; None: what the schema says.
    input: Constraint | None = None


def arguments_part(number: int, tool: Tool) -> Part:
    """Return all arguments of a tool as JSON, as the part `tool_NUMBER`. Raises `Unkeepable`."""
    if tool.input is not None:
        schema = {"type": "object", "properties": {"input": input_schema(tool.input)}, "required": ["input"]}
        return inline_part(f"tool_{number}", {**schema, "additionalProperties": False}, tool.input.field)
    return schema_part(f"tool_{number}", _object_schema(tool), tool.field, None if tool.strict else ANY_OBJECT)


def input_schema(form: Constraint) -> Mapping[str, Any]:
    """Return what an input must be as a schema: an expression, since what is in a text of JSON is written as JSON has it."""
    return {"type": "string", "pattern": f"^(?:{input_expression(form)})$"}


def input_expression(form: Constraint) -> str:
    """Return what an input must be as an expression. Raises `Unkeepable`."""
    if len(form.text) > CHARS_MAX:
        raise Unkeepable(form.field, f"must be at most {CHARS_MAX} characters, is {len(form.text)}")
    if form.kind is ConstraintKind.REGEX:
        return form.text
    try:
        return expression_of(form.text)
    except NoExpression as error:
        raise Unkeepable(form.field, f"{error}; a grammar of an input must come to one expression") from error


def _object_schema(tool: Tool) -> Mapping[str, Any]:
    """Return the schema of all arguments: those of any call are an object. Raises `Unkeepable`."""
    if tool.schema is None:
        return {"type": "object", "additionalProperties": False}
    named = tool.schema.get("type")
    if named is not None and "object" not in (cast("list[Any]", named) if isinstance(named, list) else [named]):
        refuse(tool, ".type", "must be object, as arguments are")
        return ANY_OBJECT
    return tool.schema if tool.schema.keys() & ELSEWHERE else {**tool.schema, "type": "object"}


def refuse(tool: Tool, where: str, problem: str) -> None:
    """Refuse what a strict tool asks for; of others it is not kept to."""
    if tool.strict:
        raise Unkeepable(tool.field + where, problem)


@dataclass(frozen=True, slots=True)
class Property:
    """One of an object's."""

    name: str
    #: With what it may refer to.
    schema: Mapping[str, Any]
    required: bool
    field: str

    def part(self, name: str, strict: bool) -> Part:
        """Return its values as JSON; of a tool that is not strict any, where they cannot be kept to."""
        return schema_part(name, self.schema, self.field, None if strict else {})


def properties_of(tool: Tool) -> list[Property] | None:
    """Return all arguments that a call may have, for styles that write each by itself; None: any.

    Raises:
        Unkeepable: a strict tool asks for something else.
    """
    schema = _object_schema(tool)
    listed = schema.get("properties", {} if schema.get("additionalProperties") is False else None)
    if schema.keys() & ELSEWHERE or not isinstance(listed, Mapping):
        refuse(tool, "", "in this model's style of calls only the properties of an object can be kept to")
        return None
    for key in _UNHEEDED:
        if key in schema:
            refuse(tool, f".{key}", "cannot be kept to in this model's style of calls")
    properties, named = cast("Mapping[str, Any]", listed), schema.get("required")
    required = cast("list[Any]", named) if isinstance(named, list) else []
    if (named is not None and not isinstance(named, list)) or any(str(name) not in properties for name in required):
        refuse(tool, ".required", "must be a list of properties, in this model's style of calls")
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    found: list[Property] = []
    for name, inner in properties.items():
        own: Mapping[str, Any] = cast("Mapping[str, Any]", inner) if isinstance(inner, Mapping) else {}
        if inner is False:
            refuse(tool, f".properties.{name}", "must not be false: leave it out")
        found.append(Property(name, {**shared, **own}, name in required, f"{tool.field}.properties.{name}"))
    return found
