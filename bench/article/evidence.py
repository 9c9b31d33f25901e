"""Everything that the figures show, computed once: the session's run, the fronts, the simulated points, the claims."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from bench.article.cache_claims import cache_claims
from bench.article.checks import Check, check
from bench.article.claims import Claim
from bench.article.cost_claim import (
    COST_SPEED,
    COST_WORKLOAD,
    CostEffects,
    Ratio,
    cost_claim,
    cost_effects,
    ratios,
)
from bench.article.fronts import (
    AGENTIC,
    BATCH,
    CODING,
    GB200,
    GB300,
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
from bench.article.gpu_afd import gpu_afd, gpu_afd_claim
from bench.article.lpx_claim import LpxGain, free_decode_gains, lpx_claim, lpx_gains
from bench.article.measured import FASTEST_MEASURED, WORKLOAD, Compared, compared, measured_claim
from bench.article.session import SessionRun, one_shot, read_session, run_session
from bench.article.session_claims import session_claims
from bench.article.speed_claim import FAST_SYSTEMS, Fastest, fastest, speed_claim
from bench.article.tiers import Restoring, Spared, restoring, spared
from orchestrator.profiles.catalog import Assumption, Catalog
from orchestrator.profiles.resolve import resolve
from orchestrator.sim.bounds import infinite_cache

#: Every number of the catalogue that turns owners' cost into rental prices.
RENTAL = {"economics.rental": 1.0}
#: Points of the fronts that are simulated: these systems, workloads and speeds.
CHECKED_SYSTEMS = (GB200, RUBIN)
CHECKED_WORKLOADS = (BATCH, CODING)
CHECKED_SPEEDS = (50.0, 100.0, 200.0)

#: Profiles that only the times to fetch a context rest on.
RESTORING = ("cmx.", "vera.")

#: Points by (system, workload).
Fronts = Mapping[tuple[str, str], Sequence[Point]]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the page and the JSON file are made of."""

    session: SessionRun
    fronts: Fronts
    checks: tuple[Check, ...]
    fastest: Mapping[str, Fastest]
    #: None if the systems do not both reach the speed at which that is looked at.
    cost: CostEffects | None
    #: VR over GB200, by what is counted.
    ratios: Mapping[str, Sequence[Ratio]]
    #: VR and GB300 beside measurements.
    compared: tuple[Compared, ...]
    #: Ways to use LPX over VR alone, and by speed what decoding for nothing would give.
    lpx_gains: tuple[LpxGain, ...]
    free_decode_gains: Mapping[float, float]
    restoring: tuple[Restoring, ...]
    spared: tuple[Spared, ...]
    claims: tuple[Claim, ...]
    #: Those that anything here rests on, with the overrides in place.
    assumptions: tuple[Assumption, ...]


def gather(overrides: Mapping[str, float]) -> Evidence:
    """Compute it all. Raises `CatalogError` for an override of a number that does not exist."""
    catalog = Catalog.load(overrides)
    turns = read_session()
    session = run_session(resolve(cluster(RUBIN.file), catalog), turns)
    made = {system: layouts(system, catalog) for system in SYSTEMS}
    fronts = _fronts(made)
    there = {system.name: found for system in FAST_SYSTEMS if (found := fastest(made[system], catalog)) is not None}
    rental = catalog.overridden(RENTAL)
    owned, rented = _ratios(fronts), _ratios(_fronts({system: layouts(system, rental) for system in (GB200, RUBIN)}))
    better, baseline = _cheapest(made[RUBIN], fronts), _cheapest(made[GB200], fronts)
    cost = None if better is None or baseline is None else cost_effects(better, baseline, catalog)
    agentic = {system: fronts[system.name, AGENTIC.name] for system in SYSTEMS}
    gains, bounds = lpx_gains(made, agentic, catalog), free_decode_gains(made[RUBIN], agentic[RUBIN])
    beside = _beside_measurements(made, fronts, catalog)
    claims = (
        *session_claims(session),
        *cache_claims(session, infinite_cache(turns), infinite_cache(one_shot(turns))),
        speed_claim(there),
        cost_claim(owned, rented, cost),
        lpx_claim(gains, bounds),
        measured_claim(beside),
        gpu_afd_claim(gpu_afd(catalog)),
    )
    used = {name for some in made.values() for layout in some for name in layout.assumptions}
    used |= {name for claim in claims for name in claim.assumptions}
    return Evidence(
        session=session,
        fronts=fronts,
        checks=tuple(_checks(made, fronts)),
        fastest=there,
        cost=cost,
        ratios={**_labelled("owners' cost", owned), **_labelled("rental", rented)},
        compared=tuple(beside),
        lpx_gains=tuple(gains),
        free_decode_gains=bounds,
        restoring=tuple(restoring(catalog)),
        spared=tuple(spared(catalog)),
        claims=claims,
        assumptions=tuple(one for one in catalog.assumptions if one.name in used or one.name.startswith(RESTORING)),
    )


def _beside_measurements(made: Mapping[System, Sequence[Layout]], fronts: Fronts, catalog: Catalog) -> list[Compared]:
    both = ((system, FASTEST_MEASURED[system.name]) for system in (RUBIN, GB300))
    found = [fastest(made[system], catalog, WORKLOAD, speed) for system, speed in both]
    better, baseline = (fronts[system.name, WORKLOAD.name] for system in (RUBIN, GB300))
    return compared(better, baseline, [one for one in found if one is not None])


def _fronts(made: Mapping[System, Sequence[Layout]]) -> Fronts:
    return {
        (system.name, workload.name): sweep(system, workload, some) for system, some in made.items() for workload in WORKLOADS
    }


def _ratios(fronts: Fronts) -> dict[str, list[Ratio]]:
    """Return by workload how much cheaper VR's tokens are than GB200's."""
    return {one.name: ratios(fronts[RUBIN.name, one.name], fronts[GB200.name, one.name]) for one in WORKLOADS}


def _checks(made: Mapping[System, Sequence[Layout]], fronts: Fronts) -> Iterator[Check]:
    for system, workload, speed in product(CHECKED_SYSTEMS, CHECKED_WORKLOADS, CHECKED_SPEEDS):
        chosen = best_at(fronts[system.name, workload.name], speed, by_price)
        if chosen is not None:
            yield check(_named(made[system], chosen.layout), workload, round(chosen.batch))


def _labelled(basis: str, found: Mapping[str, Sequence[Ratio]]) -> dict[str, Sequence[Ratio]]:
    return {f"{workload}, {basis}": some for workload, some in found.items()}


def _cheapest(made: Sequence[Layout], fronts: Fronts) -> Layout | None:
    """Return a system's cheapest layout where the effects of assumptions on cost are looked at; None if it is too slow."""
    if not made:
        return None
    chosen = best_at(fronts[made[0].system.name, COST_WORKLOAD.name], COST_SPEED, by_price)
    return None if chosen is None else _named(made, chosen.layout)


def _named(made: Sequence[Layout], name: str) -> Layout:
    return next(layout for layout in made if layout.name == name)
