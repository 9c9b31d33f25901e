"""A block pool that knows the future: it forgets the block whose next use in the trace is furthest away (Belady's rule).

No node can do that; it shows how much a better rule of eviction could still win. The future is the trace's order of turns, which
a closed loop follows nearly, not exactly.
"""

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from orchestrator.core.kvpool import BlockPool
from orchestrator.core.types import BlockHash, BlockId
from orchestrator.sim.prompts import Prompts
from orchestrator.wire.traces import TracedTurn

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
        """Note that a turn has come: its blocks' next use is the one after it."""
        names = self._prompts.of(turn)
        start = 0
        for count, following in self._segments.pop(turn.id):
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

    __slots__ = ("_future", "_idled", "_ranked")

    def __init__(self, blocks: int, future: Future) -> None:
        super().__init__(blocks)
        self._future = future
        #: (minus the next use when it was looked up, order of idling, block), perhaps out of date.
        self._ranked: list[tuple[int, int, BlockId]] = []
        #: When each block idled last, as a running number; a chain's end idles before its front, so ties keep that order.
        self._idled: list[int] = [0] * (blocks + 1)

    def release(self, blocks: Iterable[BlockId]) -> None:
        released = list(blocks)
        super().release(released)
        for block in released:
            name = self._hash_of[block]
            if name is not None and block in self._idle:
                self._idled[-1] += 1
                self._idled[block] = self._idled[-1]
                heappush(self._ranked, (-self._future.of(name), self._idled[block], block))

    def _victims(self, count: int) -> list[BlockId]:
        return [self._victim() for _ in range(count)]

    def _victim(self) -> BlockId:
        while True:
            key, idled, block = heappop(self._ranked)
            name = self._hash_of[block]
            if name is None or idled != self._idled[block] or block not in self._idle:
                continue
            if -self._future.of(name) != key:
                heappush(self._ranked, (-self._future.of(name), idled, block))
                continue
            del self._idle[block]
            return block
