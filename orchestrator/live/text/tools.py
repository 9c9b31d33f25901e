"""Tool calls in an answer, as they come out while it is written: pieces for whoever sends them on.

    ToolCall MoreArguments* ... text ...      a call begins with its name, told once; text between calls is content

See also: `styles.py` (how models write calls), `finding.py` (where calls are in a text).
"""

from collections.abc import Sequence
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
