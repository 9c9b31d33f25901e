"""The noun of a trace: one recorded request, its prompt's blocks named by runs of numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: (first name, count), one after the other; neighbours that continue each other are one run.
Runs = tuple[tuple[int, int], ...]

#: Block names from here on stand for names in the file that are no small numbers: hashes and texts.
DENSE_FIRST = 1 << 48


class TraceError(ValueError):
    """A trace cannot be used; the message names file, line and field."""


@dataclass(frozen=True, slots=True)
class TracedTurn:
    """One recorded request."""

    id: int
    #: The agents of one session share this; a request without a session has one of its own.
    session: str
    #: Whose reasoning this is: "main", or the name of a sub-agent.
    agent: str
    arrival_s: float
    #: Ids of turns that must have ended.
    after: tuple[int, ...]
    #: Seconds between the end of the last of those and this turn's start.
    gap_s: float
    input_tokens: int
    output_tokens: int
    #: 0 where the trace has lengths only.
    block_tokens: int
    #: (first name, count) runs that name the prompt's full blocks in order. A name stands for the whole prefix up to its block.
    block_runs: Runs
    model: str = ""
    tenant: str = ""
    #: True where the agent's context was rewritten: compacted, edited or reset.
    seam: bool = False
    #: What the model wanted at its end: True a tool, False nothing further, None not recorded.
    calls: bool | None = None

    @property
    def blocks(self) -> list[int]:
        """Return the block names one by one."""
        return [block for first, count in self.block_runs for block in range(first, first + count)]


def merged(runs: Iterable[Sequence[int]]) -> Runs:
    """Return runs with neighbours that continue each other made one."""
    whole: list[tuple[int, int]] = []
    end = -1
    for first, count in runs:
        if first == end:
            last = whole[-1]
            whole[-1] = (last[0], last[1] + count)
        else:
            whole.append((first, count))
        end = first + count
    return tuple(whole)


def repeated(runs: Runs) -> int | None:
    """Return a block that is named twice, None if there is none."""
    end = -1
    for first, count in sorted(runs):
        if first < end:
            return first
        end = first + count
    return None


def cut(runs: Runs, count: int) -> Runs:
    """Return the first `count` blocks."""
    kept: list[tuple[int, int]] = []
    for first, size in runs:
        if count <= 0:
            break
        kept.append((first, min(size, count)))
        count -= size
    return tuple(kept)


class BlockNames:
    """Makes a file's block names numbers that lie together, whatever they are in the file."""

    __slots__ = ("_dense", "_parents")

    def __init__(self) -> None:
        self._dense: dict[int | str | tuple[int, int], int] = {}
        #: What each name of `chained` followed on when it was first seen.
        self._parents: dict[int, int] = {}

    def runs(self, names: Sequence[int | str]) -> Runs:
        """Return the runs of a prompt's block names. Small numbers stay what they are; others get numbers as they turn up."""
        try:
            small = not names or (min(names) >= 0 and max(names) < DENSE_FIRST)  # type: ignore[type-var]
        except TypeError:
            small = False
        return _runs(names if small else [self._number(name) for name in names])  # type: ignore[arg-type]

    def chained(self, names: Sequence[int | str]) -> Runs:
        """Return the runs of a prompt whose names may stand for single blocks: one that follows on another prefix is another."""
        blocks: list[int] = []
        former = -1
        for name in names:
            number = self._number(name)
            if self._parents.setdefault(number, former) == former:
                former = number
            else:
                former = self._dense.setdefault((former, number), DENSE_FIRST + len(self._dense))
            blocks.append(former)
        return _runs(blocks)

    def _number(self, name: int | str) -> int:
        if isinstance(name, int) and 0 <= name < DENSE_FIRST:
            return name
        return self._dense.setdefault(name, DENSE_FIRST + len(self._dense))


def _runs(blocks: Sequence[int]) -> Runs:
    runs: list[tuple[int, int]] = []
    first = end = -1
    for block in blocks:
        if block != end:
            if end > first:
                runs.append((first, end - first))
            first = block
        end = block + 1
    if end > first:
        runs.append((first, end - first))
    return tuple(runs)
