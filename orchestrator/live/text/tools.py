"""Tool calls in an answer, as they come out while it is written: pieces for whoever sends them on.

    ToolCall MoreArguments* ... text ...      a call begins with its name, told once; text between calls is content

See also: `styles.py` (how models write calls), `finding.py` (where calls are in a text).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call; `arguments` is JSON text as the model wrote it, so that a next turn renders to the same prompt.

    While an answer is written, that is its beginning: all of it, some or nothing, and `MoreArguments` follow.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class MoreArguments:
    """How the arguments of the last call that began go on."""

    text: str


def calls_in(pieces: Sequence[object]) -> list[ToolCall]:
    """Return the calls among the pieces of a whole answer, each with all its arguments."""
    calls: list[ToolCall] = []
    for piece in pieces:
        if isinstance(piece, ToolCall):
            calls.append(piece)
        elif isinstance(piece, MoreArguments):
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + piece.text)
    return calls


AnswerPart = str | ToolCall | MoreArguments


class ToolParser(Protocol):
    """Splits one generation into content and calls, in order."""

    @property
    def calling(self) -> bool:
        """The arguments of a call are being written."""
        ...

    def add(self, text: str) -> list[AnswerPart]:
        """Take more text; return what is certain now."""
        ...

    def finish(self, cut: bool = False) -> list[AnswerPart]:
        """Return what was still kept back; nothing is added afterwards.

        Arguments that have not ended are made valid JSON. If the text is `cut` off, since it may have no more tokens, they stay
        as they are: nobody is to take them for what the model would have written.
        """
        ...


class CallReader(Protocol):
    """Reads the calls in a text that begins where one may; what follows them is not its business."""

    @property
    def told(self) -> bool:
        """A call came out: the text is no content."""
        ...

    @property
    def calling(self) -> bool:
        """The arguments of a call are being written."""
        ...

    @property
    def over(self) -> bool:
        """It has read its last call, or knows that there is none."""
        ...

    @property
    def rest(self) -> str:
        """What it has not read, once it is over."""
        ...

    def add(self, text: str) -> list[AnswerPart]:
        """Take more text; return what is certain now of its calls."""
        ...

    def finish(self, cut: bool) -> list[AnswerPart]:
        """Return what was still kept back, as parsers do; it is over then."""
        ...


class SteppingReader(ABC):
    """The part of a `CallReader` that goes through what it is given step by step.

    Args:
        make_id: returns an id for a call.
    """

    __slots__ = ("_kept", "_make_id", "over", "rest", "told")

    def __init__(self, make_id: Callable[[], str]) -> None:
        self._make_id = make_id
        #: Text that is not read yet, or not certain.
        self._kept: str = ""
        self.told = False
        self.over = False
        self.rest: str = ""

    def add(self, text: str) -> list[AnswerPart]:
        """Take more text; return what is certain now of the calls."""
        self._kept += text
        parts: list[AnswerPart] = []
        while self._kept and not self.over and self._step(parts):
            pass
        return parts

    @abstractmethod
    def _step(self, parts: list[AnswerPart]) -> bool:
        """Read on in what is kept; True if there may be more to do."""
        ...

    def _end(self, rest: str) -> bool:
        """Read nothing more; return that there is nothing more to do."""
        self.over, self.rest = True, rest
        return False
