"""The page of figures, section by section: what is computed elsewhere, as charts and tables."""

from collections.abc import Sequence

from plotly.graph_objects import Figure

from deploy.charts import Section, Series, Swing, Table, cache_chart, context_chart, pareto_chart, tornado_chart
from deploy.figures.checks import Check
from deploy.figures.claims import Claim
from deploy.figures.evidence import Evidence
from deploy.figures.fronts import (
    GB200,
    SYSTEMS,
    WORKLOADS,
    Merit,
    Point,
    Workload,
    best_at,
    by_power,
    by_price,
    by_throughput,
    front,
)
from deploy.figures.hardware_claims import COST_SPEED, COST_TARGET, COST_WORKLOAD, SPEED_TARGET, SPEEDS, CostEffects, Fastest
from deploy.figures.sensitivity import Sensitivity
from deploy.figures.session import growth_chart
from deploy.figures.sources import CMX_PORT, HARDWARE_PRICES
from orchestrator.core.config import DecodeMode

INTERACTIVITY = "tokens/s for every user"
#: Speeds of the table under the fronts, tokens/s/user.
TABLE_SPEEDS = (50.0, 100.0, 200.0, 400.0)
SWINGS_MAX = 10


def sections(evidence: Evidence) -> list[Section]:
    """Return the page's sections: the claims first, then the figures, what they rest on last."""
    return [
        *_claims(evidence),
        *_session(evidence),
        _workload_section(evidence, "Figure 6: throughput against interactivity on Blackwell", by_throughput),
        *(_systems_section(evidence, workload, by_throughput) for workload in WORKLOADS),
        *(_systems_section(evidence, workload, by_power) for workload in WORKLOADS),
        _workload_section(evidence, "Figure 7: cost against interactivity on Blackwell", by_price),
        *(_systems_section(evidence, workload, by_price) for workload in WORKLOADS),
        _front_table(evidence),
        _ratios(evidence),
        _checks(evidence.checks),
        *(_fastest(one) for one in evidence.fastest.values() if one.effects),
        *([_cost_effects(evidence.cost)] if evidence.cost else []),
        _restoring(evidence),
        _assumptions(evidence),
    ]


def _claims(evidence: Evidence) -> list[Section]:
    rows = [(claim.text, claim.stated, claim.ours, str(claim.verdict)) for claim in evidence.claims]
    reasons = [(claim.text, claim.reason, claim.how, _support(claim)) for claim in evidence.claims]
    text = ("Every verdict is computed from the numbers beside it; none is written down in advance.",)
    why = Table(("claim", "why the verdict, and what it would take", "how it was computed", "public support"), reasons)
    return [
        Section("The article's numbers and ours", text, table=Table(("claim", "stated", "ours", "verdict"), rows)),
        Section("Why: formulas, sources, what would have to be true", table=why),
        _speeds(evidence),
    ]


def _support(claim: Claim) -> str:
    return "; ".join(f"{source.text} ({source.url})" for source in claim.support) or "none needed"


def _speeds(evidence: Evidence) -> Section:
    headers = (
        "system",
        "tokens/s",
        "layout",
        "undrafted",
        "acceptance for 400",
        "hangs most on",
        "which gives 400 at",
        "USD at 400",
    )
    rows = [
        (
            name,
            f"{one.alone.tokens_per_s_per_user:.0f}",
            one.layout.name,
            "-" if one.undrafted is None else f"{one.undrafted.tokens_per_s_per_user:.0f}",
            "-" if one.acceptance_needed is None else f"{one.acceptance_needed:.2f}",
            one.effects[0].name if one.effects else "-",
            "-" if one.deciding_value is None else f"{one.deciding_value:.3g} ({'in' if one.within_range else 'out of'} range)",
            "-" if one.at_target is None else f"{one.at_target.usd_per_million_tokens:.2f}",
        )
        for name, one in evidence.fastest.items()
    ]
    text = (
        "Kimi-K2's shape, 404K tokens of context, one user on every decode node. USD: for a million tokens at the cheapest point "
        "at which every user still gets 400 a second.",
    )
    return Section("400 tokens a second at 400K context, system by system", text, table=Table(headers, rows))


def _session(evidence: Evidence) -> list[Section]:
    served = evidence.session.served
    how = "The article's session, 283 requests in closed loop, alone on 16 GPUs of a Vera Rubin NVL72 (deploy/sim/vr-nvl72.toml)."
    return [
        Section("Figure 3: input tokens, request by request, of each agent", (how,), growth_chart(evidence.session)),
        Section("Figure 4: context of every request over the session", (how,), context_chart(served)),
        Section("Figure 5: cached and computed input tokens", (how,), cache_chart(served)),
    ]


def axis(merit: Merit) -> str:
    """Return what a front's points are judged by, with its unit."""
    if merit is by_price:
        return "USD for a million tokens"
    return "tokens/s for each GPU" if merit is by_throughput else "tokens/s for each MW"


def _height(point: Point, merit: Merit) -> float:
    return abs(merit(point))


def _series(name: str, points: Sequence[Point], merit: Merit) -> Series:
    best = front(points, merit)
    labels = [f"{point.layout}, {point.batch:g} a node" for point in best]
    return Series(name, [point.tokens_per_s_per_user for point in best], [_height(point, merit) for point in best], labels)


def _simulated(checks: Sequence[Check], merit: Merit) -> list[Series]:
    if not checks:
        return []
    x, y = [one.point.tokens_per_s_per_user for one in checks], [_height(one.point, merit) for one in checks]
    return [Series("simulated", x, y, [f"{one.system}, {one.workload}, {one.users} users a node" for one in checks], True)]


def _workload_section(evidence: Evidence, heading: str, merit: Merit) -> Section:
    """Return one system's fronts for batch, coding and agentic work, as the article draws them."""
    series = [_series(one.name, evidence.fronts[GB200.name, one.name], merit) for one in WORKLOADS]
    series += _simulated([one for one in evidence.checks if one.system == GB200.name], merit)
    text = (
        f"{GB200.name}, Kimi-K2 in NVFP4. " + ". ".join(f"{one.name.capitalize()}: {one.why}" for one in WORKLOADS) + ".",
        "Tokens are generated ones; the prefill that they take is in. Points: the same through the whole simulator.",
    )
    return Section(heading, text, pareto_chart(series, INTERACTIVITY, axis(merit)))


def _systems_section(evidence: Evidence, workload: Workload, merit: Merit) -> Section:
    figure = 7 if merit is by_price else 6
    systems = [one for one in SYSTEMS if merit is not by_throughput or one.mode is not DecodeMode.WHOLE]
    series = [_series(one.name, evidence.fronts[one.name, workload.name], merit) for one in systems]
    series += _simulated([one for one in evidence.checks if one.workload == workload.name], merit)
    text = [f"{workload.why[0].upper()}{workload.why[1:]}."]
    if merit is by_throughput:
        text.append("LPX chips are no GPUs and not counted here; all of decode on LPX has no GPU at all. Compare cost and power.")
    if merit is by_price:
        text.append(f"Owners' cost: {HARDWARE_PRICES.text} ({HARDWARE_PRICES.url}); nobody has published a price of LPX.")
    heading = f"Figure {figure}, all systems, {workload.name}: {axis(merit)}"
    return Section(heading, text, pareto_chart([one for one in series if one.x], INTERACTIVITY, axis(merit)))


def _front_table(evidence: Evidence) -> Section:
    headers = ("system, work", *(f"at {speed:.0f} tokens/s/user" for speed in TABLE_SPEEDS), "fastest")
    rows: list[Sequence[str]] = []
    for (system, workload), points in evidence.fronts.items():
        found = [best_at(points, speed, by_price) for speed in TABLE_SPEEDS]
        cells = ["-" if one is None else f"{one.usd_per_million_tokens:.2f} USD" for one in found]
        fastest = max((point.tokens_per_s_per_user for point in points), default=None)
        rows.append((f"{system}, {workload}", *cells, "does not fit" if fastest is None else f"{fastest:.0f}"))
    return Section("USD for a million tokens at some speeds", table=Table(headers, rows))


def _ratios(evidence: Evidence) -> Section:
    headers = ("GB200 NVL72's cost over VR NVL72's", *(f"at {speed:.0f} tokens/s/user" for speed in SPEEDS))
    rows: list[Sequence[str]] = []
    for name, some in evidence.ratios.items():
        by_speed = {ratio.tokens_per_s_per_user: f"{ratio.price:.2f}" for ratio in some}
        rows.append((name, *(by_speed.get(speed, "-") for speed in SPEEDS)))
    return Section("How many times cheaper a token is", table=Table(headers, rows))


def _checks(checks: Sequence[Check]) -> Section:
    headers = ("point", "users a node", "decoding", "formula, tokens/s", "simulated, tokens/s", "difference")
    rows = [
        (
            f"{one.system}, {one.workload}",
            str(one.users),
            f"{one.batch:.1f}",
            f"{one.formula_tokens_per_s:.1f}",
            f"{one.simulated_tokens_per_s:.1f}",
            f"{one.deviation:+.1%}",
        )
        for one in checks
    ]
    text = (
        "Points of the fronts through the whole simulator, two decode nodes and eight prefill nodes under closed-loop load. "
        "The formula is taken at the batches that were there at every moment.",
    )
    return Section("Fronts against the simulator", text, table=Table(headers, rows))


def _fastest(one: Fastest) -> Section:
    """Return what the speed of a system hangs on."""
    text = (f"One user a decode node, {one.layout.name}. The article states {SPEED_TARGET:.0f} and more.",)
    heading = f"What the speed at 400K context hangs on: {one.layout.system.name}"
    chart = _tornado(one.effects, one.alone.tokens_per_s_per_user, INTERACTIVITY)
    return Section(heading, text, chart, _effects_table(one.effects, "tokens/s"))


def _end(value: float, unit: str) -> str:
    return f"{value:g} {unit}"


def _ends(effect: Sensitivity) -> tuple[str, str]:
    low, high = ("does not fit" if end is None else f"{end:.4g}" for end in (effect.result_low, effect.result_high))
    return low, high


def _effects_table(effects: Sequence[Sensitivity], result: str) -> Table:
    headers = ("assumption", "used", "range", "unit", f"{result} at its low end", "at its high end")
    return Table(
        headers,
        [
            (effect.name, f"{effect.value:g}", f"{effect.low:g} to {effect.high:g}", effect.unit, *_ends(effect))
            for effect in effects
        ],
    )


def _tornado(effects: Sequence[Sensitivity], base: float, result: str) -> Figure | None:
    """Return a chart of the largest effects; those that make the result vanish at one end are in the table alone."""
    swings = [
        Swing(one.name, one.result_low, one.result_high, _end(one.low, one.unit), _end(one.high, one.unit))
        for one in effects
        if one.result_low is not None and one.result_high is not None
    ]
    return tornado_chart(swings[:SWINGS_MAX], base, result) if swings else None


def _cost_effects(cost: CostEffects) -> Section:
    text = (
        f"GB200 NVL72's price over VR NVL72's at {COST_SPEED:.0f} tokens/s/user, {COST_WORKLOAD.name}, owners' cost, with the "
        f"layouts kept: {cost.base:.2f}. The article states {COST_TARGET:.0f}.",
    )
    chart, table = _tornado(cost.effects, cost.base, "times cheaper"), _effects_table(cost.effects, "times cheaper")
    return Section("What the ratio of costs hangs on", text, chart, table)


def _restoring(evidence: Evidence) -> Section:
    headers = (
        "context",
        "KV, GB",
        "from CPU memory, s",
        "from CMX, s",
        "computed again, s",
        "CMX sooner by",
        "CMX must give, GB/s",
    )
    rows = [
        (
            f"{one.context_tokens:,} tokens",
            f"{one.size_bytes / 1e9:.1f}",
            f"{one.cpu_s:.3f}",
            f"{one.cmx_s:.2f}",
            f"{one.recompute_s:.2f}",
            f"{one.cmx_gain:.0f} times",
            f"{one.cmx_bytes_per_s_least / 1e9:.2f}",
        )
        for one in evidence.restoring
    ]
    text = (
        "Kimi-K2 with an FP8 cache on one prefill GPU of VR NVL72, nothing else running. The last column is the rate at which "
        "fetching takes as long as computing: anything faster wins, and the longer the context, the less it takes.",
        f"{CMX_PORT.text} ({CMX_PORT.url}); the rate used is the assumption cmx.bytes_per_s.",
    )
    return Section("Fetching a context back or computing it again", text, table=Table(headers, rows))


def _assumptions(evidence: Evidence) -> Section:
    headers = ("assumption", "used", "range", "unit", "why")
    rows = [(one.name, f"{one.value:g}", f"{one.low:g} to {one.high:g}", one.unit, one.why) for one in evidence.assumptions]
    text = (
        "Numbers that nobody has published. Each can be set: weft simulate --figures DIR --set NAME=VALUE.",
        "Beside these: Kimi-K2 is taken to have one more layer to draft with, which it was not published with.",
    )
    return Section("Assumptions", text, table=Table(headers, rows))
