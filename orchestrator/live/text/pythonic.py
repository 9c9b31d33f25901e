"""Reads tool calls that are written as a list of Python calls, as Llama 3.2 and 4 are taught to.

    [get_weather(city="Paris", days=3), get_time()]

An argument comes out as JSON when it is whole. Arguments without a name are given those of the tool's parameters, in order; what
is no value in Python's way to write them, nor in JSON's, is a text.
"""

import json
import re
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Any, cast

from orchestrator.live.text.functions import Tools
from orchestrator.live.text.objects import literal, value_of
from orchestrator.live.text.tools import AnswerPart, MoreArguments, SteppingReader, ToolCall

#: A tool's or an argument's: those of tools that models are shown may have more letters than Python's own.
NAME = r"[\w.-]+"
#: Characters within which a call's name and the first of its arguments begin.
_HEAD_CHARS_MAX = 256
_FIRST = re.compile(r"\s*\[")
_HEAD = re.compile(rf"\s*({NAME})\(\s*(?=\)|{NAME}\s*=\s*[^=\s])")
_NAMED = re.compile(rf"\s*({NAME})\s*=(?!=)\s*")
_QUOTES = ('"""', "'''", '"', "'")
_OPENING, _CLOSING = "([{", ")]}"


class _At(Enum):
    """What comes next."""

    FIRST = auto()
    CALL = auto()
    ARGUMENT = auto()
    BETWEEN = auto()  # a comma and another call, or the end


class PythonReader(SteppingReader):
    """Reads the calls of a list.

    Args:
        tools: the tools there are; a call of anything else is none.
        make_id: returns an id for a call.
    """

    __slots__ = ("_at", "_members", "_parameters", "_scan", "_tools")

    def __init__(self, tools: Tools, make_id: Callable[[], str]) -> None:
        super().__init__(make_id)
        self._tools = tools
        self._at = _At.FIRST
        self._scan = _Scan()
        #: Arguments of the call so far, and the names of its parameters that were not given yet.
        self._members = 0
        self._parameters: list[str] = []

    @property
    def calling(self) -> bool:
        return self._at is _At.ARGUMENT

    def finish(self, cut: bool) -> list[AnswerPart]:
        """Return what was still kept back."""
        parts: list[AnswerPart] = []
        if self._at is _At.ARGUMENT and not cut:
            self._say_argument(self._kept + self._scan.quote, parts)
            parts.append(MoreArguments("}"))
        elif self._at is not _At.ARGUMENT:
            self.rest = self._kept
        self.over = True
        return parts

    # --- steps: True if there may be more to do -----------------------------------------------------------------------

    def _step(self, parts: list[AnswerPart]) -> bool:
        match self._at:
            case _At.FIRST:
                found = _FIRST.match(self._kept)
                if found is None:
                    return self._end(self._kept) if self._kept.strip() else False
                self._kept, self._at = self._kept[found.end() :], _At.CALL
                return True
            case _At.CALL:
                return self._begin(parts)
            case _At.ARGUMENT:
                return self._read_argument(parts)
            case _At.BETWEEN:
                return self._go_on()

    def _begin(self, parts: list[AnswerPart]) -> bool:
        """Read a call's name; it is one if it names a tool, and arguments with names follow or none."""
        found = _HEAD.match(self._kept, 0, _HEAD_CHARS_MAX)
        if found is None:
            start = self._kept.lstrip()
            return self._end(self._kept) if len(self._kept) >= _HEAD_CHARS_MAX or not _may_begin(start) else False
        name = found.group(1)
        if name not in self._tools:
            return self._end(self._kept)
        properties = self._tools[name].get("properties")
        self._parameters = [str(one) for one in cast("Mapping[str, Any]", properties)] if isinstance(properties, Mapping) else []
        self._members = 0
        self._kept, self._at = self._kept[found.end() :], _At.ARGUMENT
        self._scan = _Scan()
        self.told = True
        parts.append(ToolCall(self._make_id(), name, "{"))
        return True

    def _read_argument(self, parts: list[AnswerPart]) -> bool:
        end = self._scan.end(self._kept)
        if end is None:
            return False
        self._say_argument(self._kept[:end], parts)
        closed = self._kept[end] != ","
        self._kept = self._kept[end + 1 :]
        self._scan = _Scan()
        if closed:
            parts.append(MoreArguments("}"))
            self._at = _At.BETWEEN
        return True

    def _say_argument(self, written: str, parts: list[AnswerPart]) -> None:
        if not written.strip():
            return
        named = _NAMED.match(written)
        if named is not None:
            name, value = named.group(1), written[named.end() :]
        else:
            name, value = self._parameters[0] if self._parameters else str(self._members), written
        if name in self._parameters:
            self._parameters.remove(name)
        comma = ", " if self._members else ""
        self._members += 1
        as_json = json.dumps(value_of(value.strip(), (json.loads, literal)), ensure_ascii=False)
        parts.append(MoreArguments(f"{comma}{json.dumps(name, ensure_ascii=False)}: {as_json}"))

    def _go_on(self) -> bool:
        start = self._kept.lstrip()
        if start.startswith(","):
            self._kept, self._at = start[1:], _At.CALL
            return True
        if start:
            self._kept = start[1:] if start.startswith("]") else self._kept
            return self._end(self._kept)
        return False


class _Scan:
    """Looks for the end of an argument, each character once."""

    __slots__ = ("_depth", "_place", "quote")

    def __init__(self) -> None:
        self._place = 0
        self._depth = 0
        #: What closes the string that it is in; empty outside.
        self.quote = ""

    def end(self, text: str) -> int | None:
        """Return where the comma or bracket after an argument is; None if it is not there yet."""
        while self._place < len(text):
            char = text[self._place]
            step = 1
            if self.quote:
                if char == "\\":
                    step = 2
                elif text.startswith(self.quote, self._place):
                    step, self.quote = len(self.quote), ""
                elif len(text) - self._place < len(self.quote) and self.quote.startswith(text[self._place :]):
                    return None
            elif char in "\"'":
                if len(text) - self._place < 3 and text[self._place :] == char * (len(text) - self._place):
                    return None
                self.quote = next(quote for quote in _QUOTES if text.startswith(quote, self._place))
                step = len(self.quote)
            elif char in _OPENING:
                self._depth += 1
            elif self._depth == 0 and (char == "," or char in _CLOSING):
                return self._place
            elif char in _CLOSING:
                self._depth -= 1
            if self._place + step > len(text):
                return None
            self._place += step
        return None


def _may_begin(start: str) -> bool:
    """Tell whether a call may begin with a text: a name, then a bracket, then an argument's name."""
    return re.fullmatch(rf"(?:{NAME}(?:\(\s*(?:{NAME}\s*(?:=\s*)?)?)?)?", start) is not None
