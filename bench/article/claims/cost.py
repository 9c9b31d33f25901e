"""The article's claim of a tenth of Blackwell's cost for a token: ratios of cost speed by speed, and what they hang on."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from bench.article.claim import Claim, Finding, Verdict
from bench.article.effects import effects_section
from bench.article.sensitivity import Reach, Sensitivity, reach
from bench.article.sources import AGENTX_MEASURED, HARDWARE_PRICES, Source
from bench.article.study import Fronts, Study, fronts_of, named
from orchestrator.cli.fronts import (
    CODING,
    GB200,
    RUBIN,
    WORKLOADS,
    Layout,
    Merit,
    Point,
    System,
    best_at,
    by_price,
    by_throughput,
    layouts,
    points_of,
    relaid,
)
from orchestrator.cli.report.page import Section, Table
from orchestrator.profiles.catalog import Catalog

RUBIN_CLAIM = Source(
    "NVIDIA's projection: a tenth of GB200 NVL72's cost per token, Kimi-K2-Thinking with 32K in and 8K out",
    "https://developer.nvidia.com/blog/inside-the-nvidia-rubin-platform-six-new-chips-one-ai-supercomputer/",
)

COST_TARGET = 10.0
#: The number of the catalogue that turns owners' cost into rental prices.
RENTAL = {"economics.rental": 1.0}
#: Speeds of the table under the fronts, tokens/s/user.
TABLE_SPEEDS = (50.0, 100.0, 200.0, 400.0)
#: Where the effects of assumptions on the ratio of costs are looked at, tokens/s/user.
COST_SPEED = 100.0
COST_WORKLOAD = CODING
#: Speeds at which systems are compared, tokens/s/user, as far as both reach them.
SPEEDS = (25.0, 50.0, 75.0, 100.0, 150.0, 200.0, 250.0, 300.0)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times the better price, or throughput, one system has over another at one speed."""

    tokens_per_s_per_user: float
    price: float
    throughput: float


def gain(better: Sequence[Point], baseline: Sequence[Point], speed: float, merit: Merit) -> float | None:
    """Return how many times better one system is than another at one speed; None if one of them does not reach it."""
    ours, theirs = best_at(better, speed, merit), best_at(baseline, speed, merit)
    if ours is None or theirs is None:
        return None
    # A price is a negative merit: the smaller the better.
    return merit(theirs) / merit(ours) if merit(ours) < 0 else merit(ours) / merit(theirs)


def ratios(better: Sequence[Point], baseline: Sequence[Point]) -> list[Ratio]:
    """Return the ratios at the speeds that both systems reach."""
    found: list[Ratio] = []
    for speed in SPEEDS:
        price, throughput = (gain(better, baseline, speed, merit) for merit in (by_price, by_throughput))
        if price is not None and throughput is not None:
            found.append(Ratio(speed, price, throughput))
    return found


@dataclass(frozen=True, slots=True)
class CostEffects:
    """How many times cheaper one system is at one speed, and which assumptions move that."""

    base: float
    reach: Reach

    @property
    def effects(self) -> tuple[Sensitivity, ...]:
        return self.reach.effects


def cost_effects(better: Layout, baseline: Layout, catalog: Catalog) -> CostEffects:
    """Return what unpublished numbers do to the ratio of costs between two layouts, each at its best batch for the speed."""

    def ratio(changed: Catalog) -> float | None:
        ours, theirs = (_best_price(relaid(layout, changed)) for layout in (better, baseline))
        return None if ours is None or theirs is None else theirs / ours

    base = ratio(catalog)
    assert base is not None, f"{better.name} and {baseline.name} were chosen because they reach {COST_SPEED} tokens/s/user"
    names = {name for layout in (better, baseline) for name in layout.assumptions}
    return CostEffects(base, reach(names, catalog, ratio, COST_TARGET))


def _best_price(layout: Layout | None) -> float | None:
    found = None if layout is None else best_at(points_of(layout, COST_WORKLOAD), COST_SPEED, by_price)
    return None if found is None else found.usd_per_million_tokens


def cost_claim(owner: Mapping[str, Sequence[Ratio]], rental: Mapping[str, Sequence[Ratio]], effects: CostEffects | None) -> Claim:
    """Return the claim of a tenth of Blackwell's cost; ratios of GB200 to VR by workload, at owners' and at rental prices."""
    everywhere = [(name, ratio) for name, found in owner.items() for ratio in found]
    verdict, lead = _tenth([ratio for _, ratio in everywhere])
    if verdict is Verdict.NOT_SUPPORTED and effects is not None and effects.reach.within_range:
        verdict = Verdict.ASSUMING
    reason = f"{lead}. Rental prices: {_ranges(rental)}."
    if everywhere:
        name, best = max(everywhere, key=lambda pair: pair[1].price)
        last = max(owner[name], key=lambda ratio: ratio.tokens_per_s_per_user)
        dearer = best.throughput / best.price
        reason += (
            f" At {best.tokens_per_s_per_user:.0f} tokens/s/user ({name}) a VR GPU gives {best.throughput:.1f} times a GB200's "
            f"tokens at {dearer:.2f} times its cost; a tenth takes {COST_TARGET * dearer:.0f} times the tokens. There the "
            f"ratio is largest: {best.price:.1f}, and {last.price:.1f} at {last.tokens_per_s_per_user:.0f}, the fastest looked "
            "at that both reach. A ratio says little without its speed."
        )
    if effects is not None:
        reason += f" At {COST_SPEED:.0f} ({COST_WORKLOAD.name}) it is {effects.base:.2f}, the layouts kept: {effects.reach}."
    return Claim(
        id="cost",
        text="Vera Rubin NVL72 serves tokens at a tenth of Blackwell's cost for a million.",
        stated="1/10",
        ours=f"GB200 NVL72's cost over VR NVL72's, owners' cost: {_ranges(owner)}",
        numbers={**_ratio_numbers("owner", owner), **_ratio_numbers("rental", rental)},
        how="USD for a million generated tokens on GB200 over VR, prefill included, both at their best layout for the speed",
        verdict=verdict,
        reason=reason,
        support=(RUBIN_CLAIM, AGENTX_MEASURED, HARDWARE_PRICES),
        assumptions=() if effects is None else tuple(effect.name for effect in effects.effects),
    )


def _tenth(everywhere: Sequence[Ratio]) -> tuple[Verdict, str]:
    """Judge ratios of cost at several speeds."""
    if not everywhere:
        return Verdict.NOT_SUPPORTED, "The two reach no common speed"
    reached = [ratio.tokens_per_s_per_user for ratio in everywhere if ratio.price >= COST_TARGET]
    if len(reached) == len(everywhere):
        return Verdict.REPRODUCED, "A tenth at every speed and in every workload"
    if reached:
        shown = ", ".join(f"{speed:.0f}" for speed in sorted(set(reached)))
        return Verdict.ASSUMING, f"A tenth in some workload at {shown} tokens/s/user, not elsewhere"
    best = max(ratio.price for ratio in everywhere)
    return Verdict.NOT_SUPPORTED, f"Missed by a factor of {COST_TARGET / best:.1f} at the best of the speeds looked at"


def _ranges(found: Mapping[str, Sequence[Ratio]]) -> str:
    """Return the least and the largest ratio of each workload, and the speed of the latter."""
    parts: list[str] = []
    for name, some in found.items():
        if some:
            best = max(some, key=lambda ratio: ratio.price)
            least = min(ratio.price for ratio in some)
            parts.append(f"{name} {least:.1f} to {best.price:.1f} (at {best.tokens_per_s_per_user:.0f} tokens/s/user)")
    return ", ".join(parts) or "none"


def _ratio_numbers(basis: str, found: Mapping[str, Sequence[Ratio]]) -> dict[str, float]:
    return {
        f"{basis}, {name}, {ratio.tokens_per_s_per_user:.0f} tokens/s/user": ratio.price
        for name, some in found.items()
        for ratio in some
    }


def find(study: Study) -> Finding:
    """Return what the fronts of VR and GB200 say, at owners' and at rental prices."""
    rental = study.catalog.overridden(RENTAL)
    owned, rented = _by_workload(study.fronts), _by_workload(fronts_of({one: layouts(one, rental) for one in (GB200, RUBIN)}))
    better, baseline = _cheapest(study, RUBIN), _cheapest(study, GB200)
    cost = None if better is None or baseline is None else cost_effects(better, baseline, study.catalog)
    labelled = {**_labelled("owners' cost", owned), **_labelled("rental", rented)}
    sections = [_front_table(study.fronts), _ratios_section(labelled), *([_hangs_on(cost)] if cost else [])]
    numbers = {
        "ratios": {name: [asdict(ratio) for ratio in some] for name, some in labelled.items()},
        "effects": {"cost": [asdict(effect) for effect in cost.effects] if cost else []},
    }
    return Finding((cost_claim(owned, rented, cost),), tuple(sections), numbers)


def _by_workload(fronts: Fronts) -> dict[str, list[Ratio]]:
    """Return by workload how much cheaper VR's tokens are than GB200's."""
    return {one.name: ratios(fronts[RUBIN.name, one.name], fronts[GB200.name, one.name]) for one in WORKLOADS}


def _labelled(basis: str, found: Mapping[str, Sequence[Ratio]]) -> dict[str, Sequence[Ratio]]:
    return {f"{workload}, {basis}": some for workload, some in found.items()}


def _cheapest(study: Study, system: System) -> Layout | None:
    """Return a system's cheapest layout where the effects of assumptions on cost are looked at; None if it is too slow."""
    chosen = best_at(study.fronts[system.name, COST_WORKLOAD.name], COST_SPEED, by_price)
    return None if chosen is None else named(study.made[system], chosen.layout)


def _front_table(fronts: Fronts) -> Section:
    headers = ("system, work", *(f"at {speed:.0f} tokens/s/user" for speed in TABLE_SPEEDS), "fastest")
    rows: list[Sequence[str]] = []
    for (system, workload), points in fronts.items():
        found = [best_at(points, speed, by_price) for speed in TABLE_SPEEDS]
        cells = ["-" if one is None else f"{one.usd_per_million_tokens:.2f} USD" for one in found]
        fastest = max((point.tokens_per_s_per_user for point in points), default=None)
        rows.append((f"{system}, {workload}", *cells, "does not fit" if fastest is None else f"{fastest:.0f}"))
    return Section("USD for a million tokens at some speeds", table=Table(headers, rows), folded=True)


def _ratios_section(found: Mapping[str, Sequence[Ratio]]) -> Section:
    headers = ("GB200 NVL72's cost over VR NVL72's", *(f"at {speed:.0f} tokens/s/user" for speed in SPEEDS))
    rows: list[Sequence[str]] = []
    for name, some in found.items():
        by_speed = {ratio.tokens_per_s_per_user: f"{ratio.price:.2f}" for ratio in some}
        rows.append((name, *(by_speed.get(speed, "-") for speed in SPEEDS)))
    return Section("How many times cheaper a token is", table=Table(headers, rows), folded=True)


def _hangs_on(cost: CostEffects) -> Section:
    text = (
        f"GB200 NVL72's price over VR NVL72's at {COST_SPEED:.0f} tokens/s/user, {COST_WORKLOAD.name}, owners' cost, with the "
        f"layouts kept: {cost.base:.2f}. The article states {COST_TARGET:.0f}.",
    )
    return effects_section("What the ratio of costs hangs on", text, cost.effects, cost.base, "times cheaper", "times cheaper")
