"""Reads tool calls whose parameters are tags, as Qwen3-Coder writes them; a value is what its tool's schema makes of its text.

    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>

A text comes out while it is written; a number or structure when it is whole. A closing tag inside a value is part of it unless
what may follow a parameter follows; one left out is where the next parameter begins, or where the function ends. What a value's
text means follows vLLM's parser for these models, so that a model does the same behind either.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from math import isfinite
from typing import Any, TypeAlias, cast

from orchestrator.live.text.objects import literal, value_of
from orchestrator.live.text.tools import AnswerPart, MoreArguments, SteppingReader, ToolCall

#: By the name of each tool the JSON schema of its parameters, empty if it has none.
Tools: TypeAlias = Mapping[str, Mapping[str, Any]]

FUNCTION_OPEN, FUNCTION_CLOSE = "<function=", "</function>"
_PARAMETER_OPEN, _PARAMETER_CLOSE, _CALL_CLOSE = "<parameter=", "</parameter>", "</tool_call>"
_TAGS = (_PARAMETER_OPEN, _PARAMETER_CLOSE, FUNCTION_CLOSE, _CALL_CLOSE)
_FUNCTION = re.compile(r"\s*<function=([^<>{}\"'\s]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>")
#: Longer names are none; more white space than that is before no tag.
_AHEAD_MAX = 256
_SPACES = re.compile(r"\s*")
#: What no name has.
_NO_NAME = {FUNCTION_OPEN: re.compile(r"[<{}\"'\s]"), _PARAMETER_OPEN: re.compile(r"[<\n]")}
_TEXTS = frozenset({"string", "str", "text", "varchar", "char", "enum"})
_TRUTHS = frozenset({"boolean", "bool", "binary"})
_NOTHING = frozenset({"null", "none"})


class _At(Enum):
    """What comes next."""

    FUNCTION = auto()
    MEMBER = auto()  # a parameter, or what closes the function
    VALUE = auto()


class FunctionsReader(SteppingReader):
    """Reads functions after each other.

    Args:
        tools: the tools there are; names that are none of them are read as well.
        make_id: returns an id for a call.
        tagged: a closing tag follows the last function, so that a lone `</function>` may be part of a value.
    """

    __slots__ = ("_at", "_held", "_members", "_over", "_properties", "_schema", "_streams", "_tagged", "_tools")

    def __init__(self, tools: Tools, make_id: Callable[[], str], tagged: bool) -> None:
        super().__init__(make_id)
        self._tools = tools
        self._tagged = tagged
        self._at = _At.FUNCTION
        self._properties: Mapping[str, Any] = {}
        #: Parameters of the function so far.
        self._members = 0
        self._schema: object = None
        #: The value comes out as it is written, as a text; else what there is of it is held.
        self._streams = False
        self._held: list[str] = []
        #: No more text comes.
        self._over = False

    @property
    def calling(self) -> bool:
        return self._at is not _At.FUNCTION

    def finish(self, cut: bool) -> list[AnswerPart]:
        """Return what was still kept back."""
        parts: list[AnswerPart] = []
        if cut and self._at is _At.VALUE and self._streams:
            self._say(self._kept, parts)
        elif not cut:
            self._over = True
            parts += self.add("")
            if self._at is _At.VALUE:
                self._say(self._kept.removesuffix("\n"), parts)
                self._end_value(parts)
                self._kept = ""
            if self._at is _At.MEMBER:
                parts.append(MoreArguments("}"))
        self.over, self.rest = True, self._kept if self._at is _At.FUNCTION else ""
        return parts

    # --- steps: True if there may be more to do -----------------------------------------------------------------------

    def _step(self, parts: list[AnswerPart]) -> bool:
        match self._at:
            case _At.FUNCTION:
                return self._begin(parts)
            case _At.MEMBER:
                return self._go_on(parts)
            case _At.VALUE:
                return self._read_value(parts)

    def _begin(self, parts: list[AnswerPart]) -> bool:
        """Read a function's name; it is one if a parameter or its end follows."""
        found = _FUNCTION.match(self._kept)
        follows = self._follows(self._kept, found.end()) if found is not None else self._is_begun(self._kept, FUNCTION_OPEN)
        if found is None or not follows:
            return self._end(self._kept) if follows is False else False
        self._kept = self._kept[found.end() :]
        name = found.group(1)
        self._properties = _object(self._tools.get(name, {}).get("properties"))
        self._members = 0
        self._at = _At.MEMBER
        self.told = True
        parts.append(ToolCall(self._make_id(), name, "{"))
        return True

    def _go_on(self, parts: list[AnswerPart]) -> bool:
        """Read a parameter's name, or the function's end: one of both follows."""
        found = _PARAMETER.match(self._kept)
        if found is None:
            start = self._kept.lstrip()
            if start.startswith((FUNCTION_CLOSE, _CALL_CLOSE)):
                self._kept, self._at = start.removeprefix(FUNCTION_CLOSE), _At.FUNCTION
                parts.append(MoreArguments("}"))
                return True
            return False
        first = self._kept[found.end() : found.end() + 1]
        if not first and not self._over:
            return False
        self._kept = self._kept[found.end() :].removeprefix("\n")
        name = found.group(1)
        self._schema = self._properties.get(name)
        kinds = _kinds(_object(self._schema))
        self._streams = "null" not in kinds and _kind_of(kinds) in _TEXTS
        comma, quote = ", " if self._members else "", '"' if self._streams else ""
        parts.append(MoreArguments(f"{comma}{json.dumps(name, ensure_ascii=False)}: {quote}"))
        self._members += 1
        self._at = _At.VALUE
        return True

    def _read_value(self, parts: list[AnswerPart]) -> bool:
        text, place = self._kept, 0
        while (found := text.find("<", place)) >= 0:
            start = found - 1 if text[:found].endswith("\n") else found
            end = self._end_at(text, found, start < found)
            if end is None:
                self._say(text[:start], parts)
                self._kept = text[start:]
                return False
            if end:
                self._say(text[:start], parts)
                self._end_value(parts)
                self._kept = text[end:]
                return True
            place = found + 1
        said = text.removesuffix("\n")
        self._say(said, parts)
        self._kept = text[len(said) :]
        return False

    # --- values -------------------------------------------------------------------------------------------------------

    def _say(self, text: str, parts: list[AnswerPart]) -> None:
        """Take some of a value."""
        if not text:
            return
        if self._streams:
            parts.append(MoreArguments(json.dumps(text, ensure_ascii=False)[1:-1]))
            return
        self._held.append(text)
        written = "".join(self._held[:5])
        if _kind_of(_kinds(_object(self._schema))) in _TEXTS and not any(one.startswith(written.lower()) for one in _NOTHING):
            # A text after all, and not nothing.
            parts.append(MoreArguments(json.dumps("".join(self._held), ensure_ascii=False)[:-1]))
            self._held.clear()
            self._streams = True

    def _end_value(self, parts: list[AnswerPart]) -> None:
        value = '"' if self._streams else json.dumps(typed("".join(self._held), self._schema), ensure_ascii=False)
        parts.append(MoreArguments(value))
        self._held.clear()
        self._at = _At.MEMBER

    # --- what follows: None where more text must tell -------------------------------------------------------------------

    def _end_at(self, text: str, place: int, line: bool) -> int | None:
        """Return where what follows a value begins if a tag at a place ends it; 0 if none does."""
        if text.startswith(_PARAMETER_CLOSE, place):
            return self._place_if(self._follows(text, place + len(_PARAMETER_CLOSE)), place + len(_PARAMETER_CLOSE))
        if text.startswith(FUNCTION_CLOSE, place):
            return self._place_if(self._is_closed(text, place), place)
        if line and text.startswith(_PARAMETER_OPEN, place):
            return self._place_if(self._is_begun(text[place : place + _AHEAD_MAX], _PARAMETER_OPEN), place)
        begun = any(tag.startswith(text[place:]) for tag in _TAGS)
        return None if begun and not self._over else 0

    def _place_if(self, follows: bool | None, place: int) -> int | None:
        return place if follows else None if follows is None else 0

    def _follows(self, text: str, place: int) -> bool | None:
        """Tell whether a parameter follows, or the function's end."""
        spaces = _SPACES.match(text, place, place + _AHEAD_MAX)
        assert spaces is not None
        start = spaces.end()
        if start == len(text):
            return True if self._over else None
        if text.startswith(FUNCTION_CLOSE, start):
            return self._is_closed(text, start)
        if text.startswith(_PARAMETER_OPEN, start):
            return self._is_begun(text[start : start + _AHEAD_MAX], _PARAMETER_OPEN)
        if self._tagged and text.startswith(_CALL_CLOSE, start):
            return True
        begun = any(tag.startswith(text[start:]) for tag in _TAGS)
        return None if begun and not self._over else False

    def _is_closed(self, text: str, place: int) -> bool | None:
        """Tell whether a function ends with the tag at a place."""
        if not self._tagged:
            return True
        spaces = _SPACES.match(text, place + len(FUNCTION_CLOSE), place + len(FUNCTION_CLOSE) + _AHEAD_MAX)
        assert spaces is not None
        start = text[spaces.end() : spaces.end() + _AHEAD_MAX]
        if not start:
            return True if self._over else None
        if start.startswith((_CALL_CLOSE, FUNCTION_OPEN)):
            return True
        begun = _CALL_CLOSE.startswith(start) or FUNCTION_OPEN.startswith(start)
        return None if begun and not self._over else False

    def _is_begun(self, text: str, tag: str) -> bool | None:
        """Tell whether a text begins with a tag that has a name: True once it is whole."""
        start = text.lstrip()
        if not start.startswith(tag):
            return None if tag.startswith(start) and not self._over else False
        name, whole, _ = start[len(tag) :].partition(">")
        if whole:
            return bool(name) and not _NO_NAME[tag].search(name)
        return None if len(name) < _AHEAD_MAX - len(tag) and not _NO_NAME[tag].search(name) and not self._over else False


def typed(value: str, schema: object) -> Any:
    """Return what a text means to a schema; what does not fit stays text, for the tool to refuse."""
    kinds = _kinds(_object(schema))
    kind = _kind_of(kinds)
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
    # An object or list in JSON, or in Python's way, which models fall into.
    return value_of(value, (json.loads, literal))


def is_text(schema: object) -> bool:
    """Tell whether a value is read as a text, or as nothing where that is allowed; others are read as JSON."""
    return _kind_of(_kinds(_object(schema))) in _TEXTS


def _kind_of(kinds: Sequence[str]) -> str:
    """Return the type that a value is read as, of those that are allowed."""
    return next((kind for kind in kinds if kind != "null"), "null" if kinds else "string")


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
