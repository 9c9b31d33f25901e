"""A block pool that knows the future: it forgets the block whose next use in the trace is furthest away (Belady's rule).

No node can do that; it shows how much a better rule of eviction could still win. The future is the trace's order of turns, which
a closed loop follows nearly, not exactly.
"""

from collections.abc import Iterable, Sequence
from heapq import heappop

from orchestrator.core.kvpool import BlockPool, Run
from orchestrator.core.types import BlockHash
from orchestrator.sim.prompts import Prompts
from orchestrator.traces import TracedTurn

#: The next use of what is never used again.
NEVER = 1 << 60


class Future:
    """When each block is used next, as the number of the turn that uses it; moves on with every turn that has come."""

    __slots__ = ("_next", "_prompts", "_segments")

    def __init__(self, turns: Sequence[TracedTurn], prompts: Prompts) -> None:
        self._prompts = prompts
        self._next: dict[BlockHash, int] = {}
        #: By turn: (blocks, the turn that uses them next), over the prompt; deeper blocks are used later.
        self._segments: dict[int, list[tuple[int, int]]] = {}
        for number in range(len(turns) - 1, -1, -1):
            names = prompts.of(turns[number])
            following = [self._next.get(name, NEVER) for name in names]
            self._segments[turns[number].id] = _runs(following)
            for name in names:
                self._next[name] = number

    def passed(self, turn: TracedTurn) -> None:
        """Note that a turn is being computed: its blocks' next use is the one after it. Nothing if that was noted before."""
        segments = self._segments.pop(turn.id, None)
        if segments is None:
            return
        names = self._prompts.of(turn)
        start = 0
        for count, following in segments:
            for name in names[start : start + count]:
                self._next[name] = following
            start += count

    def of(self, name: BlockHash) -> int:
        """Return the next use of a block."""
        return self._next.get(name, NEVER)


def _runs(values: Iterable[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and runs[-1][1] == value:
            runs[-1] = (runs[-1][0] + 1, value)
        else:
            runs.append((1, value))
    return runs


class OptimalPool(BlockPool):
    """A `BlockPool` that evicts by the future instead of the past; everything else is the same."""

    __slots__ = ("_future",)

    def __init__(self, blocks: int, future: Future) -> None:
        super().__init__(blocks)
        self._future = future

    def _urgency(self, run: Run) -> int:
        return -self._future.of(run.names[-1])

    def _evictable(self, run: Run) -> int:
        """Blocks that are used next in the same turn go together."""
        following, names = self._future.of(run.names[-1]), run.names
        count = 1
        while count < len(names) and self._future.of(names[-count - 1]) == following:
            count += 1
        return count

    def _fresh(self, entry: tuple[int, int, Run]) -> bool:
        return entry[2].evictable

    def _next_idle(self) -> Run | None:
        """The future moves on: what was looked up too long ago is ranked anew."""
        while self._idle_runs:
            entry = heappop(self._idle_runs)
            urgency, _, run = entry
            if self._fresh(entry):
                if urgency == self._urgency(run):
                    return run
                self._rank(run)
        return None
