"""Names a trace's blocks in the cluster's block size, so that two prompts share a name exactly if they share that prefix.

A name stands for the whole prefix up to its block. Where the trace's blocks are larger they are divided, where they are smaller
only every so-manieth name is taken. Full blocks that the trace does not name (it has lengths only, or ends inside one of its
larger blocks) get names of their own, which nothing else has.

Names are numbers here, not hashes: the core only compares them, and neighbouring numbers stand side by side in its tables, which
takes about a third off the time of a simulation with many blocks.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import gcd
from typing import cast

from orchestrator.core.types import BlockHash
from orchestrator.sim.names import Runs, generated_runs, successors
from orchestrator.traces import TracedTurn


class Prompts:
    """The block names of a trace's turns."""

    __slots__ = ("_block_tokens", "_chains", "_own", "_own_of_others", "_successors")

    def __init__(self, turns: Iterable[TracedTurn], block_tokens: int, answers_return: bool = True) -> None:
        turns = list(turns)
        self._block_tokens = block_tokens
        self._successors: Mapping[int, TracedTurn] = successors(turns) if answers_return else {}
        #: The last chain of each agent: its runs and their names. The next one mostly begins alike.
        self._chains: dict[tuple[str, str], tuple[Runs, list[BlockHash]]] = {}
        #: By turn: the number over the first of its own names, which go downwards from there and stay below all of the trace's.
        self._own: dict[int, int] = {}
        lowest = [first * self._parts(turn) for turn in turns for first, _ in turn.block_runs]
        number = min(lowest, default=0)
        for turn in turns:
            self._own[turn.id] = number
            number -= (turn.input_tokens + turn.output_tokens) // block_tokens + 1
        #: The same for a turn that is not in the trace.
        self._own_of_others = number

    @property
    def block_tokens(self) -> int:
        """Tokens in one of the cluster's blocks."""
        return self._block_tokens

    def of(self, turn: TracedTurn) -> tuple[BlockHash, ...]:
        """Return the names of a prompt's full blocks."""
        count = turn.input_tokens // self._block_tokens
        key = turn.session, turn.agent
        former_runs, former = self._chains.get(key, ((), []))
        same = self._shared(former_runs, turn)
        names = former[:same]
        names += self._expanded(turn.block_runs, turn, len(names))
        self._chains[key] = turn.block_runs, names
        if len(names) >= count:
            return tuple(names[:count])
        return (*names, *self._own_names(turn, len(names), count))

    def generated(self, turn: TracedTurn) -> tuple[BlockHash, ...]:
        """Return the names of the blocks that a turn's whole answer fills: those after the prompt's full blocks."""
        first = turn.input_tokens // self._block_tokens
        end = (turn.input_tokens + turn.output_tokens - 1) // self._block_tokens
        if end <= first:
            return ()
        successor = self._successors.get(turn.id)
        if successor is None or turn.block_tokens == 0 or self._block_tokens < turn.block_tokens:
            return self._own_names(turn, first, end)
        runs = (*turn.block_runs, *generated_runs(turn, successor))
        return tuple(self._expanded(runs, turn, first)[: end - first])

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

    def _parts(self, turn: TracedTurn) -> int:
        """Return into how many of the cluster's blocks a turn's are divided."""
        return max(1, turn.block_tokens // self._block_tokens)

    def _expanded(self, runs: Iterable[tuple[int, int]], turn: TracedTurn, skip: int) -> list[BlockHash]:
        """Return the names in this block size after the first `skip`."""
        if not turn.block_tokens:
            return []
        names: list[int] = []
        parts, step = self._parts(turn), max(1, self._block_tokens // turn.block_tokens)
        position = 0  # in blocks of the trace, cut into parts
        for first, count in runs:
            start = max(0, skip * step - position)
            if step > 1:  # the last of every so many stands for all of them
                start += -(position + start + 1) % step
            names += range(first * parts + start, (first + count) * parts, step)
            position += count * parts
        return cast(list[BlockHash], names)

    def _own_names(self, turn: TracedTurn, first: int, end: int) -> tuple[BlockHash, ...]:
        """Return names that no other turn has, for the positions [first, end) of a turn's context."""
        own = self._own.get(turn.id, self._own_of_others) - 1
        return cast(tuple[BlockHash, ...], tuple(range(own - first, own - end, -1)))


def misfit(turns: Sequence[TracedTurn], block_tokens: int) -> str | None:
    """Return why blocks of a trace cannot be told in blocks of `block_tokens`, None if they can."""
    size = next((turn.block_tokens for turn in turns if turn.block_tokens), block_tokens)
    if gcd(size, block_tokens) == min(size, block_tokens):
        return None
    return f"the trace has blocks of {size} tokens, the cluster of {block_tokens}: one must be a multiple of the other"
