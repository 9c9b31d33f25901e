"""NVIDIA's projected gains of three ways to use LPX beside ours: tokens a second for each MW against VR NVL72 alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from bench.article.claim import ABOUT, Claim, Finding, Verdict
from bench.article.claims.cost import SPEEDS, gain
from bench.article.sensitivity import Reach, reach
from bench.article.sources import LPX_PROJECTION, Source
from bench.article.study import Study
from orchestrator.cli.fronts import (
    AFD,
    AGENTIC,
    DRAFTER,
    RUBIN,
    SYSTEMS,
    WHOLE,
    Layout,
    Point,
    System,
    best_at,
    by_power,
    model_of,
    points_of,
    prefill_seconds_of,
    relaid,
)
from orchestrator.cli.report.page import Section, Table
from orchestrator.profiles.catalog import Catalog

#: That projection's gains over VR NVL72 alone.
LPX_AFD_GAIN, LPX_WHOLE_GAIN, LPX_DRAFTER_GAIN = 3.0, 3.0, 5.0
LPX_PAIRING = Source(
    "one LPX rack of 256 chips stands beside an NVL72 of 72 GPUs; by analysts, NVIDIA has not said it",
    "https://newsletter.semianalysis.com/p/nvidia-the-inference-kingdom-expands",
)

QUOTED: Mapping[System, float] = {AFD: LPX_AFD_GAIN, WHOLE: LPX_WHOLE_GAIN, DRAFTER: LPX_DRAFTER_GAIN}


@dataclass(frozen=True, slots=True)
class LpxGain:
    """How many times VR's tokens/s for each MW one way to use LPX gives, and what the projected gain would take."""

    system: str
    quoted: float
    #: By tokens/s/user, as far as both reach it.
    by_speed: Mapping[float, float]
    #: Where the gain is largest, and what it hangs on there with the layouts kept.
    best_speed: float
    reach: Reach

    @property
    def best(self) -> float:
        return self.by_speed[self.best_speed]

    @property
    def reached(self) -> bool:
        """Tell whether the gain is about the quoted one, or more, at some speed."""
        return self.best >= self.quoted / ABOUT


def lpx_gains(
    made: Mapping[System, Sequence[Layout]], points: Mapping[System, Sequence[Point]], catalog: Catalog
) -> list[LpxGain]:
    """Return the gains at 400K of context of those ways that share a speed with VR alone; layouts and points by system."""
    return [found for system, quoted in QUOTED.items() if (found := _gain(made, points, catalog, system, quoted)) is not None]


def _gain(
    made: Mapping[System, Sequence[Layout]],
    points: Mapping[System, Sequence[Point]],
    catalog: Catalog,
    system: System,
    quoted: float,
) -> LpxGain | None:
    by_speed = {speed: found for speed in SPEEDS if (found := gain(points[system], points[RUBIN], speed, by_power)) is not None}
    if not by_speed:
        return None
    best_speed = max(by_speed, key=lambda speed: by_speed[speed])
    better, baseline = (_layout_at(made[one], points[one], best_speed) for one in (system, RUBIN))

    def ratio(changed: Catalog) -> float | None:
        laid = [relaid(layout, changed) for layout in (better, baseline)]
        ours, theirs = ([] if one is None else points_of(one, AGENTIC) for one in laid)
        return gain(ours, theirs, best_speed, by_power)

    takes = reach({*better.assumptions, *baseline.assumptions}, catalog, ratio, quoted)
    return LpxGain(system.name, quoted, by_speed, best_speed, takes)


def _layout_at(made: Sequence[Layout], points: Sequence[Point], speed: float) -> Layout:
    chosen = best_at(points, speed, by_power)
    assert chosen is not None, f"a gain but no point at {speed} tokens/s/user"
    return next(layout for layout in made if layout.name == chosen.layout)


def free_decode_gains(made: Sequence[Layout], points: Sequence[Point]) -> dict[float, float]:
    """Return, by speed, the gain over VR alone if decoding drew no power at all: prompts are computed on VR in all three ways."""
    found: dict[float, float] = {}
    for speed in SPEEDS:
        chosen = best_at(points, speed, by_power)
        if chosen is None:
            continue
        layout = next(one for one in made if one.name == chosen.layout)
        prefill_kw_s = layout.hardware(layout.prefill).kw * prefill_seconds_of(layout, AGENTIC) / AGENTIC.output_tokens
        found[speed] = 1e3 / chosen.tokens_per_s_per_mw / prefill_kw_s
    return found


def lpx_claim(found: Sequence[LpxGain], bounds: Mapping[float, float]) -> Claim:
    """Return the projection of three gains, judged by the worst of them; `bounds` are the gains of decoding for nothing."""
    quoted = {system.name: gain for system, gain in QUOTED.items()}
    return Claim(
        id="lpx_gains",
        text="(NVIDIA's projection) LPX beside VR NVL72 gives 3 to 5 times its tokens a second for each MW at 400K context.",
        stated="; ".join(f"{name}: about {gain:g}x" for name, gain in quoted.items()),
        ours="; ".join(f"{one.system}: {_span(one)}" for one in found) or "no common speed",
        numbers={f"{one.system}, {speed:.0f}": value for one in found for speed, value in one.by_speed.items()},
        how=f"tokens/s for each MW over VR NVL72's, {model_of(RUBIN)}, {AGENTIC.why}; prefill included, both at their best "
        "layout for the speed",
        verdict=_verdict(found),
        reason=" ".join([_bound(bounds, min(quoted.values())), *(_reason(one) for one in found)])
        + " The projection is of a model twice as large, and says neither at which speed nor against which batch.",
        support=(LPX_PROJECTION, LPX_PAIRING),
        assumptions=tuple(dict.fromkeys(effect.name for one in found for effect in one.reach.effects)),
    )


def _verdict(found: Sequence[LpxGain]) -> Verdict:
    if len(found) == len(QUOTED) and all(one.reached or one.reach.within_range for one in found):
        return Verdict.ASSUMING
    return Verdict.NOT_SUPPORTED


def _span(one: LpxGain) -> str:
    least = min(one.by_speed, key=lambda speed: one.by_speed[speed])
    return f"{one.by_speed[least]:.2f}x at {least:.0f} to {one.best:.2f}x at {one.best_speed:.0f} tokens/s/user"


def _bound(bounds: Mapping[float, float], least: float) -> str:
    """Return which speeds no decoding whatever could give the least of the quoted gains at."""
    short = [speed for speed, bound in bounds.items() if bound < least]
    if not short:
        return ""
    slowest, fastest = min(short), max(short)
    return (
        f"Decoding for nothing would give {bounds[slowest]:.1f}x at {slowest:.0f} and {bounds[fastest]:.1f}x at {fastest:.0f} "
        f"tokens/s/user, since prompts are computed on VR all the same: {least:g}x can only be at higher speeds."
    )


def _reason(one: LpxGain) -> str:
    if one.reached:
        return (
            f"{one.system} gives {one.best:.2f}x at {one.best_speed:.0f}, about {one.quoted:g}x or more, by unpublished numbers."
        )
    factor = one.quoted / one.best
    return (
        f"{one.system} misses {one.quoted:g}x by a factor of {factor:.1f} at its best speed, {one.best_speed:.0f}; {one.reach}."
    )


def find(study: Study) -> Finding:
    """Return what three ways to use LPX give for each MW."""
    agentic = {system: study.fronts[system.name, AGENTIC.name] for system in SYSTEMS}
    gains, bounds = lpx_gains(study.made, agentic, study.catalog), free_decode_gains(study.made[RUBIN], agentic[RUBIN])
    numbers = {"lpx_gains": [asdict(one) for one in gains], "free_decode_gains": bounds}
    return Finding((lpx_claim(gains, bounds),), (_section(gains, bounds),), numbers)


def _section(gains: Sequence[LpxGain], bounds: Mapping[float, float]) -> Section:
    """Return the gains of three ways to use LPX beside the projected ones."""
    headers = ("tokens/s for each MW over VR NVL72's", "projected", *(f"at {speed:.0f}" for speed in SPEEDS))
    rows: list[Sequence[str]] = [(one.system, f"about {one.quoted:g}", *_by_speed(one.by_speed)) for one in gains]
    rows.append(("decoding for nothing, prompts on VR", "-", *_by_speed(bounds)))
    text = (
        f"{model_of(RUBIN)}, {AGENTIC.why}; columns are tokens/s for every user, as far as both reach it. The projection says "
        "neither at which speed nor against which batch. Where VR alone gives out there is no ratio. The last row is what no "
        "way to decode can beat.",
    )
    return Section("What LPX adds for each MW, beside NVIDIA's projection", text, table=Table(headers, rows), folded=True)


def _by_speed(found: Mapping[float, float]) -> list[str]:
    return [f"{found[speed]:.2f}" if speed in found else "-" for speed in SPEEDS]
