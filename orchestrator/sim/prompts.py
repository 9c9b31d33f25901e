"""Names a trace's blocks in the cluster's block size, so that two prompts share a name exactly if they share that prefix.

A name stands for the whole prefix up to its block. Where the trace's blocks are larger they are divided, where they are smaller
only every so-manieth name is taken. Full blocks that the trace does not name (it has lengths only, or ends inside one of its
larger blocks) get names of their own, which nothing else has.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import gcd
from typing import cast

from orchestrator.core.types import BlockHash
from orchestrator.sim.names import Runs, generated_runs, successors
from orchestrator.wire.traces import TracedTurn

#: Bytes of a name: the part of a block and the trace's name of it; or a position in a context and the turn, counted from 1.
#: No trace names blocks with more than 10 bytes, so that the end of a name tells the one from the other.
PART_BYTES, BLOCK_BYTES = 2, 14
POSITION_BYTES, TURN_BYTES = 10, 6


class Prompts:
    """The block names of a trace's turns."""

    __slots__ = ("_block_tokens", "_chains", "_successors")

    def __init__(self, turns: Iterable[TracedTurn], block_tokens: int, answers_return: bool = True) -> None:
        turns = list(turns)
        self._block_tokens = block_tokens
        self._successors: Mapping[int, TracedTurn] = successors(turns) if answers_return else {}
        #: The last chain of each agent: its runs and their names. The next one mostly begins alike.
        self._chains: dict[tuple[str, str], tuple[Runs, list[BlockHash]]] = {}

    def of(self, turn: TracedTurn) -> tuple[BlockHash, ...]:
        """Return the names of a prompt's full blocks."""
        count = turn.input_tokens // self._block_tokens
        key = turn.session, turn.agent
        former_runs, former = self._chains.get(key, ((), []))
        same = self._shared(former_runs, turn)
        names = former[:same]
        names += self._expanded(turn.block_runs, turn.block_tokens, len(names))
        self._chains[key] = turn.block_runs, names
        if len(names) >= count:
            return tuple(names[:count])
        return (*names, *_own_names(turn, len(names), count))

    def generated(self, turn: TracedTurn) -> tuple[BlockHash, ...]:
        """Return the names of the blocks that a turn's whole answer fills: those after the prompt's full blocks."""
        first = turn.input_tokens // self._block_tokens
        end = (turn.input_tokens + turn.output_tokens - 1) // self._block_tokens
        if end <= first:
            return ()
        successor = self._successors.get(turn.id)
        if successor is None or turn.block_tokens == 0 or self._block_tokens < turn.block_tokens:
            return _own_names(turn, first, end)
        runs = (*turn.block_runs, *generated_runs(turn, successor))
        return tuple(self._expanded(runs, turn.block_tokens, first)[: end - first])

    def _shared(self, former: Runs, turn: TracedTurn) -> int:
        """Return how many of this block size's first names two chains have in common for certain."""
        if not former or not turn.block_tokens:
            return 0
        blocks = 0
        for (first, count), (other, others) in zip(former, turn.block_runs, strict=False):
            if first != other:
                break
            blocks += min(count, others)
            if count != others:
                break
        return blocks * turn.block_tokens // self._block_tokens

    def _expanded(self, runs: Iterable[tuple[int, int]], trace_tokens: int, skip: int) -> list[BlockHash]:
        """Return the names in this block size after the first `skip`."""
        size = self._block_tokens
        names: list[BlockHash] = []
        if not trace_tokens:
            return names
        parts, step = max(1, trace_tokens // size), max(1, size // trace_tokens)
        parts_named = [part.to_bytes(PART_BYTES, "little") for part in range(parts)]
        skipped = skip * step // parts
        position = 0
        for first, count in runs:
            blocks = range(first + max(0, skipped - position), first + count)
            if step > 1:  # the last of every so many stands for all of them
                blocks = [block for block in blocks if not (position + block - first + 1) % step]
            named = [block.to_bytes(BLOCK_BYTES, "little", signed=True) for block in blocks]
            names += cast(list[BlockHash], [part + block for block in named for part in parts_named])
            position += count
        return names


def _own_names(turn: TracedTurn, first: int, end: int) -> tuple[BlockHash, ...]:
    """Return names that no other turn has, for the positions [first, end) of a turn's context."""
    own = (turn.id + 1).to_bytes(TURN_BYTES, "little", signed=True)
    return tuple(cast(list[BlockHash], [position.to_bytes(POSITION_BYTES, "little") + own for position in range(first, end)]))


def misfit(turns: Sequence[TracedTurn], block_tokens: int) -> str | None:
    """Return why blocks of a trace cannot be told in blocks of `block_tokens`, None if they can."""
    size = next((turn.block_tokens for turn in turns if turn.block_tokens), block_tokens)
    if gcd(size, block_tokens) == min(size, block_tokens):
        return None
    return f"the trace has blocks of {size} tokens, the cluster of {block_tokens}: one must be a multiple of the other"
