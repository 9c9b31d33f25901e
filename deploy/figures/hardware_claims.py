"""The article's claims about hardware: 400 tokens/s for a user at 400K context, a tenth of Blackwell's cost for a token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from deploy.figures.claims import Claim, Verdict, judged
from deploy.figures.fronts import (
    AFD,
    AGENTIC,
    CODING,
    DRAFTER,
    RUBIN,
    WHOLE,
    Layout,
    Point,
    best_at,
    by_price,
    by_throughput,
    point_at,
    points_of,
    relaid,
)
from deploy.figures.sensitivity import Sensitivity, crossing, sensitivities, value_for
from deploy.figures.sources import (
    AGENTX_MEASURED,
    AGENTX_RATIO_HIGH,
    AGENTX_RATIO_LOW,
    AGENTX_SPEEDS,
    ALL_TO_ALL_FLOOR,
    FUSED_KERNEL,
    HARDWARE_PRICES,
    LPX_PROJECTION,
    RUBIN_CLAIM,
)
from orchestrator.profiles.catalog import Catalog

SPEED_TARGET = 400.0
COST_TARGET = 10.0
#: Where the effects of assumptions on the ratio of costs are looked at, tokens/s/user.
COST_SPEED = 100.0
COST_WORKLOAD = CODING
#: Systems that the claim of speed may be about, the one without LPX first.
FAST_SYSTEMS = (RUBIN, AFD, WHOLE, DRAFTER)
#: Speeds at which prices are compared, tokens/s/user, as far as both systems reach them.
SPEEDS = (25.0, 50.0, 75.0, 100.0, 150.0, 200.0, 250.0, 300.0)
#: Speeds at which others have measured a ratio, tokens/s/user.
MEASURED_SPEEDS = (60.0, 200.0)


@dataclass(frozen=True, slots=True)
class Fastest:
    """The fastest layout of a system at 400K context, and what its speed hangs on."""

    layout: Layout
    #: One user on every decode node.
    alone: Point
    #: The fastest without drafted tokens; None if the system is there to draft.
    undrafted: Point | None
    #: The cheapest point at which every user still gets the target; None if nobody does.
    at_target: Point | None
    #: Effects of the unpublished numbers on the speed, the largest first, and the value of that one which gives the target.
    effects: tuple[Sensitivity, ...]
    deciding_value: float | None
    #: The acceptance of drafted tokens that gives the target; None if none does or none are drafted.
    acceptance_needed: float | None

    @property
    def slowest(self) -> float | None:
        """Return the speed with the one assumption at that end which hurts most; None if the model fits at no end."""
        ends = (end for effect in self.effects for end in (effect.result_low, effect.result_high) if end is not None)
        return min(ends, default=None)

    @property
    def within_range(self) -> bool:
        """Tell whether the assumption with the largest effect gives the target within its stated range."""
        if not self.effects or self.deciding_value is None:
            return False
        return self.effects[0].low <= self.deciding_value <= self.effects[0].high


def fastest(candidates: Sequence[Layout], catalog: Catalog) -> Fastest | None:
    """Return the fastest of a system's layouts for 400K of context; None if the model fits none of them."""
    fitting = [layout for layout in candidates if layout.batch_max(AGENTIC)]
    if not fitting:
        return None
    singles = [(one, point_at(one, AGENTIC, 1)) for one in fitting]
    layout, alone = max(singles, key=lambda pair: pair[1].tokens_per_s_per_user)
    plain = [point for one, point in singles if not one.decode.hardware.draft_tokens]

    def speed(changed: Catalog) -> float | None:
        return _speed(relaid(layout, changed))

    effects = sensitivities(layout.hardware(layout.decode).assumptions, catalog, speed)
    points = [point for one in fitting for point in points_of(one, AGENTIC)]
    return Fastest(
        layout=layout,
        alone=alone,
        undrafted=max(plain, key=lambda point: point.tokens_per_s_per_user, default=None),
        at_target=best_at(points, SPEED_TARGET, by_price),
        effects=effects,
        deciding_value=value_for(effects[0], catalog, speed, SPEED_TARGET) if effects else None,
        acceptance_needed=_acceptance_for(layout, catalog, SPEED_TARGET),
    )


def _speed(layout: Layout | None) -> float | None:
    return None if layout is None or not layout.batch_max(AGENTIC) else point_at(layout, AGENTIC, 1).tokens_per_s_per_user


def _acceptance_for(layout: Layout, catalog: Catalog, target: float) -> float | None:
    hardware = layout.decode.hardware
    if not hardware.draft_tokens:
        return None
    return crossing(lambda share: _speed(relaid(layout, catalog, replace(hardware, acceptance=share))), 0.01, 0.999, target)


def speed_claim(found: Mapping[str, Fastest]) -> Claim:
    """Return the claim of 400 tokens/s at 400K, judged by the fastest of all systems; `found` by the systems' names."""
    best = max(found.values(), key=lambda one: one.alone.tokens_per_s_per_user)
    speed = best.alone.tokens_per_s_per_user
    if speed >= SPEED_TARGET:
        verdict = Verdict.ASSUMING if best.effects else Verdict.REPRODUCED
        lead = "Reached with LPX only, by numbers that nobody has published or measured"
        without = found.get(RUBIN.name)
        if without is not None and without.alone.tokens_per_s_per_user >= SPEED_TARGET:
            lead = "Reached without LPX, by numbers that nobody has published"
    else:
        near = any(one.within_range for one in found.values())
        verdict = Verdict.ASSUMING if near else Verdict.NOT_SUPPORTED
        lead = f"Missed by a factor of {SPEED_TARGET / speed:.2f}"
    return Claim(
        id="speed",
        text="The platform delivers 400 and more tokens a second to every user of a trillion-parameter MoE at 400K context.",
        stated="400+ tokens/s/user",
        ours="; ".join(f"{name}: {one.alone.tokens_per_s_per_user:.0f}" for name, one in found.items()),
        numbers=_speed_numbers(found),
        how="1 / decode_seconds of Kimi-K2's shape at 404K context (the model itself has 262,144 positions), one user a decode "
        "node, the fastest layout of each system",
        verdict=verdict,
        reason=". ".join([lead, *(_what_it_takes(one) for one in found.values())]) + ".",
        support=(LPX_PROJECTION, AGENTX_SPEEDS, FUSED_KERNEL, ALL_TO_ALL_FLOOR),
        assumptions=tuple(dict.fromkeys(effect.name for one in found.values() for effect in one.effects)),
    )


def _speed_numbers(found: Mapping[str, Fastest]) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {}
    for name, one in found.items():
        numbers[name] = one.alone.tokens_per_s_per_user
        numbers[f"{name}, undrafted"] = one.undrafted and one.undrafted.tokens_per_s_per_user
        numbers[f"{name}, acceptance for 400"] = one.acceptance_needed
        numbers[f"{name}, {one.effects[0].name if one.effects else 'no assumption'} for 400"] = one.deciding_value
    return numbers


def _what_it_takes(one: Fastest) -> str:
    """Return half a sentence on one system: how it stands to the target, and at which value of what it would just reach it."""
    speed, name = one.alone.tokens_per_s_per_user, one.layout.system.name
    standing = f"{name} stays {SPEED_TARGET / speed:.2f} times below it" if speed < SPEED_TARGET else f"{name} reaches it"
    if one.at_target is not None:
        standing += f" at {one.at_target.usd_per_million_tokens:.2f} USD for a million tokens"
    if one.slowest is not None and speed >= SPEED_TARGET:
        standing += f", with any one assumption at its worse end {one.slowest:.0f}"
    if one.effects and one.deciding_value is not None:
        effect = one.effects[0]
        where = "within" if one.within_range else "outside"
        standing += f"; 400 is {effect.name} at {one.deciding_value:.3g} {effect.unit} ({where} its range)"
    if one.acceptance_needed is not None:
        standing += f" or an acceptance of {one.acceptance_needed:.2f}"
    return standing


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times the better price, or throughput, one system has over another at one speed."""

    tokens_per_s_per_user: float
    price: float
    throughput: float


def ratios(better: Sequence[Point], baseline: Sequence[Point]) -> list[Ratio]:
    """Return the ratios at the speeds that both systems reach."""
    found: list[Ratio] = []
    for speed in SPEEDS:
        ours, theirs = best_at(better, speed, by_price), best_at(baseline, speed, by_price)
        if ours is None or theirs is None:
            continue
        fuller, emptier = best_at(better, speed, by_throughput), best_at(baseline, speed, by_throughput)
        assert fuller is not None, f"a price but no throughput at {speed} tokens/s/user"
        assert emptier is not None, f"a price but no throughput at {speed} tokens/s/user"
        price = theirs.usd_per_million_tokens / ours.usd_per_million_tokens
        found.append(Ratio(speed, price, fuller.tokens_per_s_per_gpu / emptier.tokens_per_s_per_gpu))
    return found


@dataclass(frozen=True, slots=True)
class CostEffects:
    """How many times cheaper one system is at one speed, and which assumptions move that."""

    base: float
    effects: tuple[Sensitivity, ...]


def cost_effects(better: Layout, baseline: Layout, catalog: Catalog) -> CostEffects:
    """Return what unpublished numbers do to the ratio of costs between two layouts, each at its best batch for the speed."""

    def ratio(changed: Catalog) -> float | None:
        ours, theirs = (_best_price(relaid(layout, changed)) for layout in (better, baseline))
        return None if ours is None or theirs is None else theirs / ours

    base = ratio(catalog)
    assert base is not None, f"{better.name} and {baseline.name} were chosen because they reach {COST_SPEED} tokens/s/user"
    names = {
        name
        for layout in (better, baseline)
        for pool in (layout.decode, layout.prefill)
        for name in layout.hardware(pool).assumptions
    }
    return CostEffects(base, sensitivities(names, catalog, ratio))


def _best_price(layout: Layout | None) -> float | None:
    found = None if layout is None else best_at(points_of(layout, COST_WORKLOAD), COST_SPEED, by_price)
    return None if found is None else found.usd_per_million_tokens


def cost_claim(owner: Mapping[str, Sequence[Ratio]], rental: Mapping[str, Sequence[Ratio]], effects: CostEffects | None) -> Claim:
    """Return the claim of a tenth of Blackwell's cost; ratios of GB200 to VR by workload, at owners' and at rental prices."""
    everywhere = [ratio for found in owner.values() for ratio in found]
    verdict, lead = _tenth(everywhere)
    reason = f"{lead}. Rental prices: {_ranges(rental)}."
    if everywhere:
        best = max(everywhere, key=lambda ratio: ratio.price)
        dearer = best.throughput / best.price
        reason += (
            f" At {best.tokens_per_s_per_user:.0f} tokens/s/user a VR GPU gives {best.throughput:.1f} times a GB200's tokens at "
            f"{dearer:.2f} times its cost; a tenth takes {COST_TARGET * dearer:.0f} times the tokens. Ratios are largest where "
            "the baseline is about to run out, so a large one says little without its speed."
        )
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
        return Verdict.ASSUMING, f"A tenth from {min(reached):.0f} tokens/s/user up, not below"
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


def measured_claim(found: Sequence[Ratio]) -> Claim:
    """Return how our VR to GB300 ratios stand beside measured ones: a check of the model, not a claim of the article."""
    near = [ratio for ratio in found if MEASURED_SPEEDS[0] <= ratio.tokens_per_s_per_user <= MEASURED_SPEEDS[1]]
    middle = sorted(ratio.price for ratio in near)[len(near) // 2] if near else 0.0
    verdict, reason = judged(middle, AGENTX_RATIO_LOW, AGENTX_RATIO_HIGH, "ratio")
    return Claim(
        id="measured",
        text="(Others' measurement) VR NVL72's tokens for a dollar over GB300 NVL72's, 60 to 200 tokens/s/user.",
        stated=f"{AGENTX_RATIO_LOW} to {AGENTX_RATIO_HIGH}x",
        ours=", ".join(f"{ratio.price:.1f}x at {ratio.tokens_per_s_per_user:.0f}" for ratio in near) or "no common speed",
        numbers={f"{ratio.tokens_per_s_per_user:.0f}": ratio.price for ratio in near},
        how="as the ratio above, against GB300, at 140K of context, owners' cost",
        verdict=verdict,
        reason=f"{reason} at the middle speed. The measurement is of another model (DeepSeek-V4-Pro) and counts all tokens.",
        support=(AGENTX_MEASURED,),
    )
