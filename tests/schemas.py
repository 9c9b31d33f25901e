"""JSON schemas made up from a seed: what clients ask for, and what nobody can keep to."""

from collections.abc import Callable
from random import Random
from typing import Any

_NAMES = ("city", "unit", "a", "b c", "größe", 'quo"te', "x/y", "items", "type", "n")
_TEXTS = ("", "yes", "no", 'say "hi"', "naïve", "line\nbreak", "back\\slash", "日本", "😀", "tab\t", "/etc")
_PATTERNS = (
    "^[a-z]{2,4}$",
    "^(a|b)+$",
    "[0-9]",
    r"^\d{3}-\d{2}$",
    "^x?y*z+$",
    r"^[^\s\"]{1,6}$",
    "^$",
    "é|ü",
    r"^\w+@\w+\.(com|org)$",
)
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "duration", "uri")
#: What no grammar says, or none that is known here.
_BEYOND: tuple[dict[str, Any], ...] = (
    {"uniqueItems": True, "type": "array"},
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"maxLength": 3}},
    {"contains": {"type": "integer"}, "type": "array"},
    {"propertyNames": {"maxLength": 2}, "type": "object"},
    {"type": "string", "format": "no-such-format"},
    {"type": "string", "pattern": "(?=a)b"},
    {"$ref": "#/nowhere"},
    {"$ref": "https://example.com/schema.json"},
    {"type": "integer", "minimum": 3, "maximum": 2},
    {"type": "string", "minLength": 3, "maxLength": 2},
    {"enum": []},
    {"type": "object", "required": ["gone"], "properties": {"gone": False}},
    {"type": "quaternion"},
    {"oneOf": [{"type": "integer"}, {"minimum": 3, "type": "number"}]},
)


class Schemas:
    """Makes schemas; equal seeds make equal ones."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def make(self) -> dict[str, Any]:
        """Return one; some may not be kept to, and some refer to themselves."""
        source = self._random
        schema = self._any(source.choice((1, 2, 2, 3)))
        if source.random() < 0.2:
            inner = self._any(1)
            node = {
                "type": "object",
                "properties": {"value": inner, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            }
            schema = {"type": "object", "properties": {"first": {"$ref": "#/$defs/node"}, "rest": schema}}
            schema |= {
                "required": ["first", "rest"],
                "$defs": {"node": node | {"required": ["next"], "additionalProperties": False}},
            }
        if source.random() < 0.3:
            schema |= {"title": "made up", "description": "for a test", "$schema": "https://json-schema.org/draft/2020-12/schema"}
        return schema

    def _any(self, depth: int) -> dict[str, Any]:
        source = self._random
        if source.random() < 0.03:
            return dict(source.choice(_BEYOND))
        leaves: list[Callable[[int], dict[str, Any]]] = [self._string, self._number, self._listed, self._plain]
        inner: list[Callable[[int], dict[str, Any]]] = [self._object, self._object, self._array, self._union, self._both]
        return source.choice(leaves + inner if depth else leaves)(depth - 1)

    def _string(self, _: int) -> dict[str, Any]:
        source = self._random
        kind = source.random()
        if kind < 0.35:
            return {"type": "string", "pattern": source.choice(_PATTERNS)}
        if kind < 0.6:
            return {"type": "string", "format": source.choice(_FORMATS)}
        least = source.randrange(4)
        return {"type": "string", "minLength": least, "maxLength": least + source.randrange(6)}

    def _number(self, _: int) -> dict[str, Any]:
        source = self._random
        schema: dict[str, Any] = {"type": source.choice(("integer", "integer", "number"))}
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if source.random() < 0.3:
                schema[name] = source.choice((-1000, -1, 0, 1, 7, 99, 12345, -0.5, 2.25))
        if source.random() < 0.15:
            # Of 0.01 the validator itself, which divides floats, says that 545.34 is no multiple.
            schema["multipleOf"] = source.choice((2, 5, 100, 0.5, 0.25))
        return schema

    def _listed(self, _: int) -> dict[str, Any]:
        source = self._random
        values = [source.choice((*_TEXTS, 0, -1, 1.5, True, None, [1, "a"], {"k": []})) for _ in range(source.randrange(1, 5))]
        return {"enum": values} if source.random() < 0.7 else {"const": values[0]}

    def _plain(self, _: int) -> dict[str, Any]:
        kinds = ["boolean", "null", "integer"]
        return {"type": self._random.choice([*kinds, self._random.sample(kinds, 2)])}

    def _object(self, depth: int) -> dict[str, Any]:
        source = self._random
        names = source.sample(_NAMES, source.randrange(0, 5))
        schema: dict[str, Any] = {"type": "object", "properties": {name: self._any(depth) for name in names}}
        if source.random() < 0.8:
            schema["required"] = [name for name in names if source.random() < 0.7]
        kind = source.random()
        if kind < 0.6:
            schema["additionalProperties"] = False
        elif kind < 0.8:
            schema["additionalProperties"] = self._any(0)
        elif kind < 0.9:
            schema |= {"patternProperties": {"^p_[a-z]$": self._any(0)}, "additionalProperties": False}
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        source = self._random
        least = source.randrange(3)
        schema: dict[str, Any] = {
            "type": "array",
            "items": self._any(depth),
            "minItems": least,
            "maxItems": least + source.randrange(3),
        }
        if source.random() < 0.2:
            schema["prefixItems"] = [self._any(0) for _ in range(source.randrange(1, 3))]
        return schema

    def _union(self, depth: int) -> dict[str, Any]:
        word = self._random.choice(("anyOf", "anyOf", "oneOf"))
        return {word: [self._any(depth) for _ in range(self._random.randrange(1, 4))]}

    def _both(self, depth: int) -> dict[str, Any]:
        first, second = self._object(depth), self._object(depth)
        for one in (first, second):
            one.pop("additionalProperties", None)
        return {"allOf": [first, second]}
