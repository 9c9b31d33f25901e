"""Reads tool calls that are written as JSON: objects (Hermes, Llama), and names with their arguments (Mistral, DeepSeek, Kimi).

A call is a name and the JSON text of its arguments as the model wrote it, so that a next turn renders to the same prompt.
Arguments come out while they are written once the name stands before them and they begin as an object; what is written in
another order or form is read when it is whole. Arguments that are missing, null or empty are an empty object; those that are no
object are no call.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from enum import Enum, auto
from typing import Any, TypeAlias

import msgspec

from orchestrator.live.text.tools import AnswerPart, MoreArguments, SteppingReader, ToolCall
from orchestrator.live.text.values import ValueReader

#: A tool's name and its arguments as JSON text.
Described: TypeAlias = tuple[str, str]

#: Characters before arguments within which a name must be found for them to come out as they are written.
HEAD_CHARS_MAX = 1024
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\\x00-\x1f]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{\s*["}])')
_MEMBERS = ("name", "arguments", "parameters", "type", "id", "function", "description")
_FIRST = re.compile(r"\s*(\[?)\s*(?:(\{)|\Z)")
_BETWEEN = re.compile(r"[\s,;]*")


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")
    parameters: msgspec.Raw = msgspec.Raw()


_CALL = msgspec.json.Decoder(_Call)


def read_object(text: str) -> Described | None:
    """Return the call that an object describes, in JSON or as Python writes it; None if it describes none."""
    try:
        return _described(_CALL.decode(text))
    except (ValueError, RecursionError):
        pass
    try:
        return _described(_CALL.decode(json.dumps(literal(text), ensure_ascii=False, allow_nan=False)))
    except (ValueError, TypeError, RecursionError):
        return None


def literal(text: str) -> Any:
    """Return what a text says in Python's way to write values. Raises `ValueError` if it says nothing."""
    try:
        with warnings.catch_warnings():
            # Python would warn of odd escapes in what a model wrote.
            warnings.simplefilter("ignore")
            return ast.literal_eval(text.strip())
    except (TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from error


def value_of(text: str, ways: Sequence[Callable[[str], Any]]) -> Any:
    """Return what a text says in the first of some ways to write values that says what JSON can; the text if none does."""
    for read in ways:
        try:
            found = read(text)
            # Numbers that JSON has none for, text that is none, and sets would not reach the client.
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, TypeError, RecursionError, MemoryError):
            continue
        return found
    return text


def _described(call: _Call) -> Described | None:
    """Return a call with its arguments as text. Raises `ValueError` or `RecursionError` for what cannot be read."""
    arguments = bytes(call.parameters or call.arguments).decode()
    if arguments.startswith('"'):
        arguments = msgspec.json.decode(arguments, type=str)
    if arguments.strip() in ("", "null"):
        arguments = "{}"
    return (call.name, arguments) if call.name and isinstance(json.loads(arguments), dict) else None


class _At(Enum):
    """What comes next."""

    FIRST = auto()  # an object, or a list of them
    HEAD = auto()  # an object up to its arguments
    ARGUMENTS = auto()
    REMAINDER = auto()  # of the object
    SKIPPED = auto()  # members after the arguments
    BETWEEN = auto()  # another object, or the end


class ObjectsReader(SteppingReader):
    """Reads calls that are objects, after each other or in a list.

    Args:
        ends: tags that end them wherever they stand outside strings.
        make_id: returns an id for a call.
        known: the names of tools; an object that names none of them is no call. None: any name is one.
    """

    __slots__ = ("_at", "_ends", "_head", "_known", "_listed", "_mended", "_value", "_written")

    def __init__(self, ends: Sequence[str], make_id: Callable[[], str], known: Collection[str] | None = None) -> None:
        super().__init__(make_id)
        self._ends = ends
        self._known = known
        self._at = _At.FIRST
        self._listed = False
        #: What of an object's text its name and the beginning of its arguments are looked for in.
        self._head = ""
        #: An object as it is written and as it is mended, until it is known for a call.
        self._written: list[str] = []
        self._mended: list[str] = []
        self._value = ValueReader()

    @property
    def calling(self) -> bool:
        return self._at is _At.ARGUMENTS

    def finish(self, cut: bool) -> list[AnswerPart]:
        """Return what was still kept back."""
        if self._at is _At.ARGUMENTS:
            return [MoreArguments(more)] if (more := self._value.finish(cut)) else []
        if self._at is not _At.SKIPPED:
            self._end("".join(self._written) + self._kept)
        return []

    # --- steps: True if there may be more to do -----------------------------------------------------------------------

    def _step(self, parts: list[AnswerPart]) -> bool:
        match self._at:
            case _At.FIRST:
                return self._begin()
            case _At.HEAD:
                return self._read_object(parts)
            case _At.ARGUMENTS:
                if more := self._value.add(self._take()):
                    parts.append(MoreArguments(more))
                return self._after_value(_At.REMAINDER)
            case _At.REMAINDER:
                return self._read_remainder()
            case _At.SKIPPED:
                self._value.add(self._take())
                return self._after_value(_At.BETWEEN)
            case _At.BETWEEN:
                return self._go_on()

    def _begin(self) -> bool:
        found = _FIRST.match(self._kept)
        if found is None:
            return self._end(self._kept)
        if not found.group(2):
            return False
        self._listed = bool(found.group(1))
        self._kept = self._kept[found.start(2) :]
        return self._open()

    def _open(self) -> bool:
        self._value = ValueReader(self._ends)
        self._head = ""
        self._at = _At.HEAD
        return True

    def _read_object(self, parts: list[AnswerPart]) -> bool:
        """Read on in an object, until its arguments begin or all of it is there."""
        text = self._take()
        self._written.append(text)
        if len(self._head) < HEAD_CHARS_MAX:
            self._head = (self._head + text)[:HEAD_CHARS_MAX]
            if _is_another(self._head):
                return self._end("".join(self._written))
            head = _HEAD.match(self._head)
            if head is not None:
                return self._tell(head.group(1), head.end(), parts)
        self._mended.append(self._value.add(text))
        if not self._value.done:
            return False
        written = "".join(self._written)
        written = written[: len(written) - len(self._value.rest)]
        call = read_object(written if self._value.guessed else "".join(self._mended))
        if call is None or not self._is_known(call[0]):
            return self._end(written + self._value.rest if self.told else self._value.rest)
        self._reset()
        self.told = True
        parts.append(ToolCall(self._make_id(), *call))
        return self._after_value(_At.BETWEEN)

    def _tell(self, name: str, end: int, parts: list[AnswerPart]) -> bool:
        """Tell of a call whose arguments begin at a place of its object."""
        written = "".join(self._written)
        if not self._is_known(name):
            return self._end(written)
        self._reset()
        self.told = True
        parts.append(ToolCall(self._make_id(), name, ""))
        self._value = ValueReader(self._ends)
        self._kept = written[end:]
        self._at = _At.ARGUMENTS
        return True

    def _read_remainder(self) -> bool:
        """Read what an object has after its arguments: as a rule what closes it."""
        start = self._kept.lstrip()
        if start.startswith(","):
            # More members, which mean nothing.
            self._value = ValueReader(self._ends)
            self._value.add('{"":0')
            self._at = _At.SKIPPED
        elif start:
            self._kept = start[1:] if start.startswith("}") else self._kept
            self._at = _At.BETWEEN
        return bool(start)

    def _go_on(self) -> bool:
        """Begin another object, or end."""
        found = _BETWEEN.match(self._kept)
        assert found is not None
        after = self._kept[found.end() :]
        if not after:
            return False
        if after.startswith("{"):
            self._kept = after
            return self._open()
        return self._end(after[1:] if self._listed and after.startswith("]") else self._kept)

    def _after_value(self, at: _At) -> bool:
        if self._value.done:
            self._kept, self._at = self._value.rest, at
        return self._value.done

    # --- parts ----------------------------------------------------------------------------------------------------------

    def _take(self) -> str:
        text, self._kept = self._kept, ""
        return text

    def _is_known(self, name: str) -> bool:
        return self._known is None or name in self._known

    def _reset(self) -> None:
        self._written.clear()
        self._mended.clear()


def _is_another(head: str) -> bool:
    """Tell whether the beginning of an object shows that it is no call: by the name of its first member."""
    begun = head[1:].lstrip()
    if not begun.startswith('"'):
        return begun[:1] not in ("", "'")
    name, closed, _ = begun[1:].partition('"')
    return not any(member == name if closed else member.startswith(name) for member in _MEMBERS)


class NamedReader:
    """Reads a call that is a name and an object.

    Args:
        head: matches what comes before the object; its group `name` is the name, `id` an id if the model gives one.
        ends: tags that end the object wherever they stand outside strings.
        make_id: returns an id for a call that has none.
    """

    __slots__ = ("_head", "_kept", "_make_id", "_value", "over", "rest", "told")

    def __init__(self, head: re.Pattern[str], ends: Sequence[str], make_id: Callable[[], str]) -> None:
        self._head = head
        self._make_id = make_id
        self._kept: str = ""
        self._value = ValueReader(ends)
        self.told = False
        self.over = False
        self.rest: str = ""

    @property
    def calling(self) -> bool:
        return self.told and not self.over

    def add(self, text: str) -> list[AnswerPart]:
        """Take more text; return what is certain now of the call."""
        if self.told:
            return self._read(text)
        self._kept += text
        head = self._head.match(self._kept, 0, HEAD_CHARS_MAX)
        if head is not None:
            self.told = True
            groups = head.groupdict()
            return [ToolCall(groups.get("id") or self._make_id(), groups["name"], ""), *self._read(self._kept[head.end() :])]
        if len(self._kept) >= HEAD_CHARS_MAX:
            self.over, self.rest = True, self._kept
        return []

    def finish(self, cut: bool) -> list[AnswerPart]:
        """Return what was still kept back."""
        self.over = True
        return [MoreArguments(more)] if self.told and (more := self._value.finish(cut)) else []

    def _read(self, text: str) -> list[AnswerPart]:
        more = self._value.add(text)
        self.over, self.rest = self._value.done, self._value.rest
        return [MoreArguments(more)] if more else []
