"""The lines of one session's turns: which context a new prompt goes on with, and which it leaves.

turn 1   [ a b c ]
turn 2   [ a b c d e ]            goes on: the same context
turn 3   [ a b x ]                goes another way: a new context; the former one is left
turn 4   [ a b c d e f ]          goes on with what was left: a branch that came back
"""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.core.outlook import ContextId
from orchestrator.core.types import BlockHash, NodeId, RequestId

#: Hashes kept of a prompt, evenly spaced: they tell how much of it a new prompt repeats to one part in so many.
MARKS_MAX = 16
#: Contexts of one session that are followed at once; of more the one that was used longest ago is forgotten.
CONTEXTS_MAX = 4


@dataclass(frozen=True, slots=True)
class Marks:
    """What is kept of a prompt: some of its blocks' hashes."""

    #: (blocks up to and with this one, its hash), shortest first; the last is that of the last full block.
    hashes: tuple[tuple[int, BlockHash], ...] = ()

    @property
    def blocks(self) -> int:
        """Full blocks of the prompt."""
        return self.hashes[-1][0] if self.hashes else 0

    @staticmethod
    def of(hashes: Sequence[BlockHash]) -> "Marks":
        """Return the marks of a prompt."""
        count = min(len(hashes), MARKS_MAX)
        ends = [len(hashes) * (mark + 1) // count for mark in range(count)]
        return Marks(tuple([(end, hashes[end - 1]) for end in ends]))

    def repeated_blocks(self, hashes: Sequence[BlockHash]) -> int:
        """Return how many of this prompt's blocks another prompt repeats, as far as the marks tell."""
        repeated = 0
        for blocks, block in self.hashes:
            if blocks > len(hashes) or hashes[blocks - 1] != block:
                break
            repeated = blocks
        return repeated

    def nearly_all(self, repeated: int) -> bool:
        """Tell whether a prompt that repeats so many blocks changes no more than the last part that the marks tell apart."""
        return len(self.hashes) < 2 or repeated >= self.hashes[-2][0]


class Context:
    """One line of turns."""

    __slots__ = ("expected_s", "forgotten", "id", "kind", "marks", "nodes", "paused_s", "request", "running", "turns")

    def __init__(self, identity: ContextId) -> None:
        self.id = identity
        #: Of the last prompt.
        self.marks = Marks()
        #: Its last turn.
        self.request = RequestId(identity)
        self.turns = 0
        #: Turns under way.
        self.running = 0
        #: Since when none is, and the class of the pause; None before the first has ended.
        self.paused_s: float | None = None
        self.kind = ""
        #: Seconds that the tool takes which it waits for, if that was said.
        self.expected_s: float | None = None
        #: Where its last turn ran.
        self.nodes: tuple[NodeId, ...] = ()
        #: True once its pauses count no more.
        self.forgotten = False

    def forget(self) -> None:
        """Note that it is followed no longer, though a turn of it may still be under way."""
        self.paused_s, self.forgotten = None, True


@dataclass(frozen=True, slots=True)
class Course:
    """Where a new prompt goes."""

    context: Context
    #: What it goes another way than, if that has no turn under way.
    left: Context | None = None


def course_of(contexts: list[Context], new: ContextId, hashes: Sequence[BlockHash]) -> Course:
    """Return which of a session's contexts a prompt goes on with; a new one, of that id and put last, if with none."""
    best: Context | None = None
    repeated = -1
    for context in reversed(contexts):
        if context.id == new:  # a second attempt
            return Course(context)
        blocks = context.marks.repeated_blocks(hashes)
        if blocks > repeated:
            best, repeated = context, blocks
    if best is not None and best.marks.nearly_all(repeated):
        contexts.remove(best)
        contexts.append(best)
        return Course(best)
    context = Context(new)
    contexts.append(context)
    if len(contexts) > CONTEXTS_MAX:
        contexts.pop(0).forget()
    return Course(context, best if best is not None and repeated and not best.running else None)
