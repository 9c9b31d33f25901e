"""What no cache can beat on a trace: an endless one, and one of a given size that knows the future.

Both take the turns one after the other in the given order, in one cache that all of them share. A turn finds the blocks of its
prompt from the first on, up to the first that is missing; its last token is always computed. Its prompt and its answer leave
their blocks behind. A cache that knows the future keeps the blocks that are used again soonest (Belady,
https://doi.org/10.1147/sj.52.0078). A block is used whenever one behind it in its chain is, so what goes first is always the end
of a chain, and no cache of that size that serves the turns in that order has more hits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from orchestrator.sim.names import Runs, between, generated_runs, successors
from orchestrator.traces import TracedTurn

Ints = NDArray[np.int64]

#: Stands for a use that never comes.
NEVER = 1 << 40


@dataclass(frozen=True, slots=True)
class Bound:
    """How much of all prompts need not be computed."""

    hit_rate: float
    cached_tokens: int
    input_tokens: int


@dataclass(frozen=True, slots=True)
class _Use:
    """One turn's blocks as ranges of segments."""

    #: What it could find in a cache, first block first.
    wanted: tuple[tuple[int, int], ...]
    #: All that it leaves behind: the same, the prompt's last block if it cannot be found, the answer's blocks.
    left: tuple[tuple[int, int], ...]


class _Segments:
    """All blocks of a trace, cut into runs that are never used in part."""

    __slots__ = ("depth", "sizes", "uses")

    def __init__(self, turns: Sequence[TracedTurn]) -> None:
        after = successors(turns)
        runs = [_runs(turn, after.get(turn.id)) for turn in turns]
        cuts = sorted({end for both in runs for part in both for first, count in part for end in (first, first + count)})
        number = {cut: index for index, cut in enumerate(cuts)}
        #: Blocks of each segment, and blocks that stand before it in its chain.
        self.sizes: Ints = np.diff(np.array([*cuts, 0], dtype=np.int64)) if cuts else np.zeros(0, dtype=np.int64)
        self.depth: Ints = np.zeros(len(cuts), dtype=np.int64)
        self.uses: list[_Use] = []
        for wanted, left in runs:
            ranges = tuple((number[first], number[first + count]) for first, count in left)
            self._set_depths(ranges)
            count = sum(size for _, size in wanted)
            self.uses.append(_Use(tuple(self._first(ranges, count)), ranges))

    def _set_depths(self, ranges: Sequence[tuple[int, int]]) -> None:
        before = 0
        for start, end in ranges:
            sizes = self.sizes[start:end]
            self.depth[start:end] = before + np.cumsum(sizes) - sizes
            before += int(sizes.sum())

    def _first(self, ranges: Sequence[tuple[int, int]], count: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of the first `count` blocks; there is a cut behind them."""
        for start, end in ranges:
            stop = start
            while stop < end and count > 0:
                count -= int(self.sizes[stop])
                stop += 1
            if stop > start:
                yield start, stop


def _runs(turn: TracedTurn, successor: TracedTurn | None) -> tuple[Runs, Runs]:
    """Return the blocks that a turn could find, and all that it leaves behind."""
    if not turn.block_tokens:
        return (), ()
    wanted = tuple(between(turn.block_runs, 0, (turn.input_tokens - 1) // turn.block_tokens))
    answer = generated_runs(turn, successor) if successor is not None else ()
    return wanted, (*turn.block_runs, *answer)


def working_set_tokens(turns: Sequence[TracedTurn]) -> int:
    """Return the most tokens that at one moment were used before and are wanted again: a cache of that size forgets none."""
    segments = _Segments(turns)
    last = np.full(len(segments.sizes), -1, dtype=np.int64)
    for number, use in enumerate(segments.uses):
        for start, end in use.wanted:
            last[start:end] = number
    here = np.zeros(len(segments.sizes), dtype=np.bool_)
    most = held = 0
    for number, (turn, use) in enumerate(zip(turns, segments.uses, strict=True)):
        for start, end in use.left:
            kept = last[start:end] > number
            change = kept.astype(np.int64) - here[start:end]
            held += int((change * segments.sizes[start:end]).sum()) * turn.block_tokens
            here[start:end] = kept
        most = max(most, held)
    return most


def infinite_cache(turns: Sequence[TracedTurn]) -> Bound:
    """Return what a cache that forgets nothing would save."""
    segments = _Segments(turns)
    seen = np.zeros(len(segments.sizes), dtype=np.bool_)
    cached = 0
    for turn, use in zip(turns, segments.uses, strict=True):
        for start, end in use.wanted:
            missing = np.flatnonzero(~seen[start:end])
            found = end if not len(missing) else start + int(missing[0])
            cached += int(segments.sizes[start:found].sum()) * turn.block_tokens
            if found < end:
                break
        for start, end in use.left:
            seen[start:end] = True
    return _bound(turns, cached)


def offline_optimum(turns: Sequence[TracedTurn], capacity_tokens: int) -> Bound:
    """Return what the best possible cache of so many tokens would save."""
    segments = _Segments(turns)
    block_tokens = next((turn.block_tokens for turn in turns if turn.block_tokens), 1)
    cache = _Clairvoyant(segments, capacity_tokens // block_tokens)
    cached = 0
    for use, next_uses in zip(segments.uses, _next_uses(segments), strict=True):
        cached += cache.hits(use) * block_tokens
        cache.keep(use, next_uses)
    return _bound(turns, cached)


def _bound(turns: Sequence[TracedTurn], cached_tokens: int) -> Bound:
    total = sum(turn.input_tokens for turn in turns)
    return Bound(cached_tokens / total if total else 0.0, cached_tokens, total)


def _next_uses(segments: _Segments) -> list[list[Ints]]:
    """Return, for each turn and range that it leaves behind, the number of the next turn that wants each segment."""
    coming = np.full(len(segments.sizes), NEVER, dtype=np.int64)
    found: list[list[Ints]] = []
    for number in range(len(segments.uses) - 1, -1, -1):
        use = segments.uses[number]
        found.append([coming[start:end].copy() for start, end in use.left])
        for start, end in use.wanted:
            coming[start:end] = number
    return found[::-1]


class _Clairvoyant:
    """A cache that knows when each segment is wanted next. Of a segment it may keep the first blocks only."""

    __slots__ = ("_depth", "_free", "_kept", "_next", "_order", "_sizes")

    def __init__(self, segments: _Segments, blocks: int) -> None:
        self._sizes: list[int] = segments.sizes.tolist()
        self._depth: list[int] = segments.depth.tolist()
        self._kept = [0] * len(self._sizes)
        self._next = [NEVER] * len(self._sizes)
        self._free = blocks
        #: (-next use, -depth, segment): what to drop first. Entries whose segment has another next use by now are void.
        self._order: list[tuple[int, int, int]] = []

    def hits(self, use: _Use) -> int:
        """Return how many of a turn's first blocks are here."""
        found = 0
        for start, end in use.wanted:
            for segment in range(start, end):
                found += self._kept[segment]
                if self._kept[segment] < self._sizes[segment]:
                    return found
        return found

    def keep(self, use: _Use, next_uses: Sequence[Ints]) -> None:
        """Take in what a turn leaves behind, then drop what is wanted last until all fits."""
        for (start, end), coming in zip(use.left, next_uses, strict=True):
            for segment, next_use in zip(range(start, end), coming.tolist(), strict=True):
                kept = self._sizes[segment] if next_use < NEVER else 0
                self._free += self._kept[segment] - kept
                self._kept[segment] = kept
                self._next[segment] = next_use
                if kept:
                    heappush(self._order, (-next_use, -self._depth[segment], segment))
        while self._free < 0:
            self._drop()
        if len(self._order) > 4 * len(self._sizes):
            self._order = list({entry for entry in self._order if self._valid(entry)})
            heapify(self._order)

    def _drop(self) -> None:
        entry = heappop(self._order)
        if not self._valid(entry):
            return
        segment = entry[2]
        dropped = min(self._kept[segment], -self._free)
        self._kept[segment] -= dropped
        self._free += dropped
        if self._kept[segment]:
            heappush(self._order, entry)

    def _valid(self, entry: tuple[int, int, int]) -> bool:
        return self._next[entry[2]] == -entry[0] and self._kept[entry[2]] > 0
