"""What all claims are computed from, made once: the session's run, every system's layouts and fronts, the simulated points."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from bench.article.checks import Check, check
from bench.article.session import SessionRun, read_session, run_session
from orchestrator.cli.fronts import (
    BATCH,
    CODING,
    GB200,
    RUBIN,
    SYSTEMS,
    WORKLOADS,
    Layout,
    Point,
    System,
    best_at,
    by_price,
    cluster,
    layouts,
    sweep,
)
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import resolve
from orchestrator.traces import TracedTurn

#: Points of the fronts that are simulated: these systems, workloads and speeds.
CHECKED_SYSTEMS = (GB200, RUBIN)
CHECKED_WORKLOADS = (BATCH, CODING)
CHECKED_SPEEDS = (50.0, 100.0, 200.0)

#: Points by (system, workload).
Fronts = Mapping[tuple[str, str], Sequence[Point]]


@dataclass(frozen=True, slots=True)
class Study:
    """What the claims have in common."""

    #: With the overrides in place.
    catalog: Catalog
    turns: Sequence[TracedTurn]
    session: SessionRun
    made: Mapping[System, Sequence[Layout]]
    fronts: Fronts
    checks: tuple[Check, ...]

    @property
    def assumptions(self) -> set[str]:
        """Names of the unpublished numbers that any layout rests on."""
        return {name for some in self.made.values() for layout in some for name in layout.assumptions}


def begin(overrides: Mapping[str, float]) -> Study:
    """Compute it. Raises `CatalogError` for an override of a number that does not exist."""
    catalog = Catalog.load(overrides)
    turns = read_session()
    made = {system: layouts(system, catalog) for system in SYSTEMS}
    fronts = fronts_of(made)
    session = run_session(resolve(cluster(RUBIN.file), catalog), turns)
    return Study(catalog, turns, session, made, fronts, tuple(_checks(made, fronts)))


def fronts_of(made: Mapping[System, Sequence[Layout]]) -> Fronts:
    """Return the points of all layouts, by system and workload."""
    return {
        (system.name, workload.name): sweep(system, workload, some) for system, some in made.items() for workload in WORKLOADS
    }


def named(made: Sequence[Layout], name: str) -> Layout:
    """Return the layout of that name."""
    return next(layout for layout in made if layout.name == name)


def _checks(made: Mapping[System, Sequence[Layout]], fronts: Fronts) -> Iterator[Check]:
    for system, workload, speed in product(CHECKED_SYSTEMS, CHECKED_WORKLOADS, CHECKED_SPEEDS):
        chosen = best_at(fronts[system.name, workload.name], speed, by_price)
        if chosen is not None:
            yield check(named(made[system], chosen.layout), workload, round(chosen.batch))
