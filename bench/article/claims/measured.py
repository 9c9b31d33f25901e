"""Our model of VR and GB300 beside what AgentX measured: tokens for a dollar, tokens for a MW and top speed, each for itself."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bench.article.claim import ABOUT, Claim, Finding, Verdict, about
from bench.article.claims.cost import gain
from bench.article.claims.gpu_afd import AGENTX_FASTEST_GB300, AGENTX_FASTEST_VR
from bench.article.claims.speed import Fastest, fastest
from bench.article.sources import AGENTX_MEASURED, AGENTX_SPEEDS
from bench.article.study import Study
from orchestrator.cli.fronts import CODING, GB300, RUBIN, Point, by_power, by_price, model_of
from orchestrator.cli.report.page import Badge, Section, Table, Tone

#: (tokens/s/user, least, most) of VR over GB300 as AgentX measured it: tokens for a dollar, tokens/s for a MW. A single number
#: stands twice.
AGENTX_PER_DOLLAR = ((60.0, 1.4, 3.0), (100.0, 1.4, 3.0), (200.0, 2.72, 2.72))
AGENTX_PER_MW = ((100.0, 59.4 / 28.5, 59.4 / 21.1), (150.0, 7.2, 7.2))

#: The same kind of work as AgentX's, as far as its lengths go.
WORKLOAD = CODING
FASTEST_MEASURED = {RUBIN.name: AGENTX_FASTEST_VR, GB300.name: AGENTX_FASTEST_GB300}


@dataclass(frozen=True, slots=True)
class Compared:
    """One measured number and ours."""

    what: str
    #: Least and most that was measured; a single number stands twice.
    low: float
    high: float
    #: None if one of the systems does not reach the speed.
    ours: float | None
    #: What ours takes to be as measured, where that was looked for.
    takes: str = ""

    @property
    def measured(self) -> str:
        return f"{self.low:.3g}" if self.low == self.high else f"{self.low:.3g} to {self.high:.3g}"

    @property
    def factor(self) -> float | None:
        """How many times the measured number ours is: 1 within what was measured."""
        if self.ours is None:
            return None
        return self.ours / min(max(self.ours, self.low), self.high)

    @property
    def holds(self) -> bool:
        """Tell whether ours is within what was measured, or about a single measured number."""
        low, high = (self.low, self.high) if self.low < self.high else about(self.low)
        return self.ours is not None and low <= self.ours <= high


def compared(better: Sequence[Point], baseline: Sequence[Point], found: Sequence[Fastest]) -> list[Compared]:
    """Return all comparisons; the points are those of VR and of GB300, `found` is each one's fastest layout."""
    rows: list[Compared] = []
    for what, measurements, merit in (
        ("tokens for a dollar", AGENTX_PER_DOLLAR, by_price),
        ("tokens/s for each MW", AGENTX_PER_MW, by_power),
    ):
        for speed, low, high in measurements:
            ours = gain(better, baseline, speed, merit)
            rows.append(Compared(f"{what} at {speed:.0f} tokens/s/user", low, high, ours))
    for one in found:
        name, speed = one.layout.system.name, one.alone.tokens_per_s_per_user
        rows.append(Compared(f"tokens/s of {name}'s fastest user", one.target, one.target, speed, _as_slow(one)))
    return rows


def _as_slow(one: Fastest) -> str:
    return " or ".join(one.ways) or "more than any value of the assumption that it hangs most on"


def measured_claim(rows: Sequence[Compared]) -> Claim:
    """Return how our model stands beside the measurements, judged by the worst of them: a check, not the article's claim."""
    missed = [row for row in rows if not row.holds]
    reasons = [f"{row.what}: {_missed(row)}" for row in missed]
    lead = f"{len(rows) - len(missed)} of {len(rows)} hold"
    return Claim(
        id="measured",
        text=f"(Others' measurement) {RUBIN.name} over {GB300.name}: tokens for a dollar, tokens for a MW; each one's fastest "
        "user.",
        stated="; ".join(f"{row.what} {row.measured}" for row in rows),
        ours="; ".join(f"{_number(row)} ({'holds' if row.holds else 'misses'})" for row in rows),
        numbers={row.what: row.ours for row in rows},
        how=f"as the costs above, {model_of(RUBIN)}, {WORKLOAD.why}; owners' cost and all-in power. A ratio of all tokens, which "
        "AgentX counts, is that of generated ones if the work is the same",
        verdict=Verdict.NOT_REPRODUCED if missed else Verdict.REPRODUCED,
        reason=". ".join([lead, *reasons, *_shifted(rows)])
        + ". The measurement is of another model (DeepSeek-V4-Pro, whose attention is sparse) and of P90 users under load; "
        "ours are formulas at a steady batch, the fastest user alone.",
        support=(AGENTX_MEASURED, AGENTX_SPEEDS),
    )


def _number(row: Compared) -> str:
    return "not reached" if row.ours is None else f"{row.ours:.3g}"


def _missed(row: Compared) -> str:
    if row.factor is None:
        return "not reached by both"
    shown = f"{row.factor:.2f} times what was measured"
    return f"{shown}; as measured, it takes {row.takes}" if row.takes else shown


def _shifted(rows: Sequence[Compared]) -> list[str]:
    """Return, if our baseline runs out later than the measured one, what that does to ratios near its end."""
    last = next((row for row in rows if GB300.name in row.what), None)
    if last is None or last.holds or last.ours is None:
        return []
    return [
        f"{GB300.name} runs out at {last.low:.0f} tokens/s/user as measured and at {last.ours:.0f} in ours, so what happens to "
        "ratios near its end comes at other speeds in ours"
    ]


def find(study: Study) -> Finding:
    """Return how VR and GB300 stand beside measurements."""
    both = ((system, FASTEST_MEASURED[system.name]) for system in (RUBIN, GB300))
    found = [fastest(study.made[system], study.catalog, WORKLOAD, speed) for system, speed in both]
    better, baseline = (study.fronts[system.name, WORKLOAD.name] for system in (RUBIN, GB300))
    rows = compared(better, baseline, [one for one in found if one is not None])
    numbers = {"compared": [{**asdict(one), "holds": one.holds, "factor": one.factor} for one in rows]}
    return Finding((measured_claim(rows),), (_section(rows),), numbers)


def _section(found: Sequence[Compared]) -> Section:
    """Return our VR and GB300 beside what others measured of them, number by number."""
    headers = ("what", "measured", "ours", "ours over measured", "")
    rows = [
        (one.what, one.measured, *_ours(one), Badge("holds", Tone.GOOD) if one.holds else Badge("misses", Tone.BAD))
        for one in found
    ]
    text = (
        "SemiAnalysis AgentX on DeepSeek-V4-Pro against our formulas. Ours holds if it lies in a measured range, or within "
        f"{ABOUT:g} times of a single number.",
    )
    return Section("The model against measurements of VR and GB300", text, table=Table(headers, rows), folded=True)


def _ours(one: Compared) -> tuple[str, str]:
    return "not reached" if one.ours is None else f"{one.ours:.3g}", "-" if one.factor is None else f"{one.factor:.2f}"
