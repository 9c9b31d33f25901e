"""The article's claim of 400 tokens a second for a user at 400K of context: each system's fastest layout, what it hangs on."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from bench.article.claim import Claim, Finding, Verdict
from bench.article.effects import effects_section
from bench.article.sensitivity import Sensitivity, crossing, leading, sensitivities, value_for
from bench.article.sources import AGENTX_SPEEDS, LPX_PROJECTION, Source
from bench.article.study import Study
from orchestrator.cli.fronts import (
    AFD,
    AGENTIC,
    DRAFTER,
    INTERACTIVITY,
    RUBIN,
    WHOLE,
    Layout,
    Point,
    Workload,
    best_at,
    by_price,
    model_of,
    point_at,
    points_of,
    relaid,
)
from orchestrator.cli.report.page import Section, Table
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import acceptance_of

FUSED_KERNEL = Source(
    "TileRT on 8 B200 with GLM-5: 340 tokens/s/user at 8K context with one request at a time and fused communication",
    "https://inferencex.semianalysis.com/blog/ultra-high-interactivity-on-nvidia",
)
ALL_TO_ALL_FLOOR = Source(
    "TensorRT-LLM on GB200: dispatch and combine of a layer's experts take about 50 us however small the batch",
    "https://github.com/NVIDIA/TensorRT-LLM/tree/main/docs/source/blogs/tech_blog",
)

SPEED_TARGET = 400.0
#: Systems that the claim may be about, the one without LPX first.
FAST_SYSTEMS = (RUBIN, AFD, WHOLE, DRAFTER)


@dataclass(frozen=True, slots=True)
class Fastest:
    """The fastest layout of a system for one workload, and what its speed hangs on."""

    layout: Layout
    #: The speed that is wanted, tokens/s/user.
    target: float
    #: One user on every decode node.
    alone: Point
    #: The fastest without drafted tokens; None if the system is there to draft.
    undrafted: Point | None
    #: The cheapest point at which every user still gets the target; None if nobody does.
    at_target: Point | None
    #: Effects of the unpublished numbers on the speed, the largest first; the one it hangs most on beside the acceptance, and the
    #: value of it that gives the target.
    effects: tuple[Sensitivity, ...]
    leading: Sensitivity | None
    deciding_value: float | None
    #: The chance that a drafted token is accepted, and the one that gives the target; None if none does or none are drafted.
    acceptance: float | None
    acceptance_needed: float | None
    #: Positions that the model was trained with.
    positions: int

    @property
    def slowest(self) -> float | None:
        """Return the speed with the one assumption at that end which hurts most; None if the model fits at no end."""
        ends = (end for effect in self.effects for end in (effect.result_low, effect.result_high) if end is not None)
        return min(ends, default=None)

    @property
    def within_range(self) -> bool:
        """Tell whether the assumption it hangs most on gives the target within its stated range."""
        return self.leading is not None and self.leading.holds(self.deciding_value)

    @property
    def drafting(self) -> Sensitivity | None:
        """Return the effect of the chance that a drafted token is accepted, if it has one."""
        return next(filter(_drafts, self.effects), None)

    @property
    def ways(self) -> list[str]:
        """Return what would give the target, one thing at a time."""
        found: list[str] = []
        if self.leading is not None and self.deciding_value is not None:
            value, where = self.deciding_value, "within" if self.within_range else "outside"
            found.append(
                f"{self.leading.name} at {value:.3g} {self.leading.unit} instead of {self.leading.value:g} ({where} its range)"
            )
        if self.acceptance_needed is not None:
            found.append(f"an acceptance of {self.acceptance_needed:.2f}")
        return found


def _drafts(effect: Sensitivity) -> bool:
    return effect.name.endswith(".acceptance")


def fastest(
    candidates: Sequence[Layout], catalog: Catalog, workload: Workload = AGENTIC, target: float = SPEED_TARGET
) -> Fastest | None:
    """Return the fastest of a system's layouts for a workload; None if its context fits none of them."""
    fitting = [layout for layout in candidates if layout.batch_max(workload)]
    if not fitting:
        return None
    singles = [(one, point_at(one, workload, 1)) for one in fitting]
    layout, alone = max(singles, key=lambda pair: pair[1].tokens_per_s_per_user)
    hardware = layout.decode.hardware
    plain = [point for one, point in singles if not one.decode.hardware.draft_tokens]

    def speed(changed: Catalog) -> float | None:
        return _speed(relaid(layout, changed), workload)

    def accepting(share: float) -> float | None:
        return _speed(relaid(layout, catalog, replace(hardware, acceptance=share)), workload)

    effects = sensitivities(layout.hardware(layout.decode).assumptions, catalog, speed)
    most = leading([effect for effect in effects if not _drafts(effect)])
    points = [point for one in fitting for point in points_of(one, workload)]
    return Fastest(
        layout=layout,
        target=target,
        alone=alone,
        undrafted=max(plain, key=lambda point: point.tokens_per_s_per_user, default=None),
        at_target=best_at(points, target, by_price),
        effects=effects,
        leading=most,
        deciding_value=None if most is None else value_for(most, catalog, speed, target),
        acceptance=acceptance_of(hardware, catalog) if hardware.draft_tokens else None,
        acceptance_needed=crossing(accepting, 0.01, 0.999, target) if hardware.draft_tokens else None,
        positions=layout.decode.engine.context_tokens_max,
    )


def _speed(layout: Layout | None, workload: Workload) -> float | None:
    return None if layout is None or not layout.batch_max(workload) else point_at(layout, workload, 1).tokens_per_s_per_user


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
        ours="; ".join(_shown(one) for one in found.values()),
        numbers=_speed_numbers(found),
        how=f"1 / decode_seconds of {model_of(RUBIN)} at {AGENTIC.context_tokens:,} tokens of context (the model itself has "
        f"{best.positions:,} positions), one user a decode node, the fastest layout of each system",
        verdict=verdict,
        reason=". ".join([lead, *(_what_it_takes(one) for one in found.values())]) + ".",
        support=(LPX_PROJECTION, AGENTX_SPEEDS, FUSED_KERNEL, ALL_TO_ALL_FLOOR),
        assumptions=tuple(dict.fromkeys(effect.name for one in found.values() for effect in one.effects)),
    )


def _shown(one: Fastest) -> str:
    speed, drafting = one.alone.tokens_per_s_per_user, one.drafting
    shown = f"{one.layout.system.name}: {speed:.0f}"
    if one.acceptance is None:
        return shown
    shown += f" at an acceptance of {one.acceptance:g}"
    if drafting is None or drafting.result_low is None or drafting.result_high is None:
        return shown
    return f"{shown} ({drafting.result_low:.0f} at {drafting.low:g}, {drafting.result_high:.0f} at {drafting.high:g})"


def _speed_numbers(found: Mapping[str, Fastest]) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {}
    for name, one in found.items():
        numbers[name] = one.alone.tokens_per_s_per_user
        numbers[f"{name}, undrafted"] = one.undrafted and one.undrafted.tokens_per_s_per_user
        numbers[f"{name}, acceptance"] = one.acceptance
        numbers[f"{name}, acceptance for 400"] = one.acceptance_needed
        numbers[f"{name}, {one.leading.name if one.leading else 'no assumption'} for 400"] = one.deciding_value
    return numbers


def _what_it_takes(one: Fastest) -> str:
    """Return half a sentence on one system: how it stands to the target, and at which value of what it would just reach it."""
    speed, name, target = one.alone.tokens_per_s_per_user, one.layout.system.name, one.target
    standing = f"{name} stays {target / speed:.2f} times below it" if speed < target else f"{name} reaches it"
    if one.acceptance is not None:
        profile = one.layout.decode.profile
        standing += f" with {profile.tokens_per_pass:.2f} tokens for {profile.pass_tokens} computed, the acceptance being assumed"
    if one.at_target is not None:
        standing += f", at {one.at_target.usd_per_million_tokens:.2f} USD for a million tokens"
    if one.slowest is not None and speed >= target:
        standing += f", and {one.slowest:.0f} with the one assumption that hurts most at its worse end"
    return f"{standing}; {target:.0f} is {' or '.join(one.ways)}" if one.ways else standing


def find(study: Study) -> Finding:
    """Return what the fastest layouts say."""
    found = {system.name: one for system in FAST_SYSTEMS if (one := fastest(study.made[system], study.catalog)) is not None}
    sections = [_speeds_section(found), *(_hangs_on(one) for one in found.values() if one.effects)]
    effects = {f"speed, {name}": [asdict(effect) for effect in one.effects] for name, one in found.items()}
    return Finding((speed_claim(found),), tuple(sections), {"effects": effects})


def _speeds_section(found: Mapping[str, Fastest]) -> Section:
    headers = (
        "system",
        "tokens/s",
        "layout",
        "undrafted",
        "acceptance",
        "400 at acceptance",
        "hangs most on, acceptance aside",
        "400 at",
        "USD at 400",
    )
    rows = [
        (
            name,
            f"{one.alone.tokens_per_s_per_user:.0f}",
            one.layout.name,
            "-" if one.undrafted is None else f"{one.undrafted.tokens_per_s_per_user:.0f}",
            "-" if one.acceptance is None else f"{one.acceptance:g}",
            "-" if one.acceptance_needed is None else f"{one.acceptance_needed:.2f}",
            one.leading.name if one.leading else "-",
            "-" if one.deciding_value is None else f"{one.deciding_value:.3g} ({'in' if one.within_range else 'out of'} range)",
            "-" if one.at_target is None else f"{one.at_target.usd_per_million_tokens:.2f}",
        )
        for name, one in found.items()
    ]
    text = (
        f"{model_of(RUBIN)}, {AGENTIC.context_tokens:,} tokens of context, one user on every decode node. Acceptance: the "
        "chance that a drafted token is taken if those before it were; an assumption that every drafted speed rests on. USD: "
        f"for a million tokens at the cheapest point at which every user still gets {SPEED_TARGET:.0f} a second.",
    )
    return Section("400 tokens a second at 400K context, system by system", text, table=Table(headers, rows), folded=True)


def _hangs_on(one: Fastest) -> Section:
    text = (f"One user a decode node, {one.layout.name}. The article states {SPEED_TARGET:.0f} and more.",)
    heading = f"What the speed at 400K context hangs on: {one.layout.system.name}"
    return effects_section(heading, text, one.effects, one.alone.tokens_per_s_per_user, INTERACTIVITY, "tokens/s")
