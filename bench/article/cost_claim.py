"""The article's claim of a tenth of Blackwell's cost for a token: ratios of cost speed by speed, and what they hang on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.article.claims import Claim, Verdict
from bench.article.fronts import CODING, Layout, Merit, Point, best_at, by_price, by_throughput, points_of, relaid
from bench.article.sensitivity import Reach, Sensitivity, reach
from bench.article.sources import AGENTX_MEASURED, HARDWARE_PRICES, RUBIN_CLAIM
from orchestrator.profiles.catalog import Catalog

COST_TARGET = 10.0
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
