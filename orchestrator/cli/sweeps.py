"""Turns one simulation into a question: what if there were more load, or an unpublished number were at the end of its range?"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from orchestrator.cli.block_bytes import block_bytes_of
from orchestrator.cli.cases import Case
from orchestrator.cli.report.charts import Swing
from orchestrator.cli.report.comparison import figure_of
from orchestrator.core.config import ClusterConfig, ConfigError
from orchestrator.profiles.catalog import Assumption, Catalog
from orchestrator.profiles.resolve import resolve
from orchestrator.sim.runs import Run
from orchestrator.traces import TracedTurn

#: Requests of the trace that a sweep repeats, and requests of its heaviest point: they bound how long a report takes.
SWEPT_REQUESTS_MAX = 1_000
HEAVIEST_REQUESTS_MAX = 8_000
#: Each point of a load sweep has this times the load of the one before.
LOAD_STEP = 2
#: Seconds over which copies of a trace start that has only one arrival.
SPREAD_S_MIN = 60.0
#: Assumptions that are swept at most.
SWEPT_ASSUMPTIONS_MAX = 24


@dataclass(frozen=True, slots=True)
class SwungCases:
    """The two runs that tell what an assumption matters."""

    assumption: Assumption
    low: Case
    high: Case


def stretch(turns: Sequence[TracedTurn]) -> list[TracedTurn]:
    """Return the trace's first requests, as many as a sweep repeats."""
    return list(turns[:SWEPT_REQUESTS_MAX])


def load_factors(requests: int) -> list[int]:
    """Return how many copies of a stretch each point of a load sweep has, 1 first."""
    factors = [1]
    while requests * factors[-1] * LOAD_STEP <= HEAVIEST_REQUESTS_MAX:
        factors.append(factors[-1] * LOAD_STEP)
    return factors


def copies(turns: Sequence[TracedTurn], count: int, seed: int) -> list[TracedTurn]:
    """Return a trace and copies of it, `count` in all, that share no prefix; copied sessions start at random over its span."""
    chance = random.Random(seed)
    span_s = max(SPREAD_S_MIN, *(turn.arrival_s for turn in turns))
    copied = list(turns)
    for copy in range(1, count):
        copied += _copy(turns, copy, span_s, chance)
    return sorted(copied, key=lambda turn: (turn.arrival_s, turn.id))


def _copy(turns: Sequence[TracedTurn], copy: int, span_s: float, chance: random.Random) -> Iterator[TracedTurn]:
    ids = 1 + max(turn.id for turn in turns)
    blocks = 1 + max((first + length for turn in turns for first, length in turn.block_runs), default=0)
    shift_s: dict[str, float] = {}
    for turn in turns:
        if turn.session not in shift_s:
            shift_s[turn.session] = chance.uniform(0, span_s) - turn.arrival_s
        yield replace(
            turn,
            id=turn.id + copy * ids,
            session=f"{turn.session}+{copy}",
            arrival_s=turn.arrival_s + shift_s[turn.session],
            after=tuple(other + copy * ids for other in turn.after),
            block_runs=tuple((first + copy * blocks, length) for first, length in turn.block_runs),
        )


def swung_cases(pick: Case, config: ClusterConfig, catalog: Catalog) -> list[SwungCases]:
    """Return runs of a pick with each assumption that its cluster uses at its ends, where both can be and differ."""
    used = {name for pool in pick.resolved.hardware.values() for name in pool.assumptions}
    ranged = [one for one in catalog.assumptions if one.name in used and one.low < one.high]
    swung: list[SwungCases] = []
    blocks = block_bytes_of(config)
    for one in ranged[:SWEPT_ASSUMPTIONS_MAX]:
        try:
            low, high = (
                replace(pick, resolved=resolve(config, catalog.overridden({one.name: end}), blocks))
                for end in (one.low, one.high)
            )
        except ConfigError:
            continue
        if low.resolved != high.resolved:
            swung.append(SwungCases(one, low, high))
    return swung


def swings(cases: Sequence[SwungCases], runs: Sequence[Run], figure: tuple[str, ...]) -> list[Swing]:
    """Return how far each assumption moves one figure; `runs` are those of all cases, low and high in turn."""
    moved: list[Swing] = []
    for index, one in enumerate(cases):
        low, high = (figure_of(runs[2 * index + end], figure) for end in (0, 1))
        if low is not None and high is not None:
            labels = (f"{end:g} {one.assumption.unit}" for end in (one.assumption.low, one.assumption.high))
            moved.append(Swing(one.assumption.name, low, high, *labels))
    return moved
