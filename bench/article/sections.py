"""The page of figures, section by section: what is computed elsewhere, as charts and tables."""

from collections.abc import Sequence

from bench.article.checks import Check
from bench.article.claims import MEANINGS, Claim
from bench.article.evidence import Evidence
from bench.article.fronts import (
    GB200,
    RUBIN,
    SYSTEMS,
    WORKLOADS,
    Merit,
    Point,
    Workload,
    by_power,
    by_price,
    by_throughput,
    cluster,
    front,
    gpus_of,
    model_of,
)
from bench.article.session import growth_chart
from bench.article.sources import HARDWARE_PRICES
from bench.article.tables import (
    INTERACTIVITY,
    assumptions_section,
    checks_section,
    cost_section,
    front_table,
    lpx_section,
    measured_section,
    ratios_section,
    restoring_section,
    spared_section,
    speed_section,
    speeds_section,
)
from orchestrator.cli.report.charts import Series, cache_chart, context_chart, pareto_chart
from orchestrator.cli.report.page import Section, Table
from orchestrator.core.config import DecodeMode


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
        front_table(evidence),
        ratios_section(evidence),
        lpx_section(evidence),
        measured_section(evidence),
        checks_section(evidence.checks),
        *(speed_section(one) for one in evidence.fastest.values() if one.effects),
        *([cost_section(evidence.cost)] if evidence.cost else []),
        restoring_section(evidence),
        spared_section(evidence),
        assumptions_section(evidence),
    ]


def _claims(evidence: Evidence) -> list[Section]:
    rows = [(claim.text, claim.stated, claim.ours, str(claim.verdict)) for claim in evidence.claims]
    reasons = [(claim.text, claim.reason, claim.how, _support(claim)) for claim in evidence.claims]
    text = (
        "Verdicts are computed from the numbers beside them. " + " ".join(f"{key}: {MEANINGS[key]}." for key in MEANINGS),
        "Rows in brackets are not the article's: they hold our model against what others have measured or projected.",
    )
    why = Table(("claim", "why the verdict, and what it would take", "how it was computed", "public support"), reasons)
    return [
        Section("The article's numbers and ours", text, table=Table(("claim", "stated", "ours", "verdict"), rows)),
        Section("Why: formulas, sources, what would have to be true", table=why),
        speeds_section(evidence),
    ]


def _support(claim: Claim) -> str:
    return "; ".join(f"{source.text} ({source.url})" for source in claim.support) or "none needed"


def _session(evidence: Evidence) -> list[Section]:
    served = evidence.session.served
    how = (
        f"The article's session, {len(served)} requests in closed loop, alone on {gpus_of(cluster(RUBIN.file))} GPUs of a "
        f"{RUBIN.name} (deploy/sim/{RUBIN.file}). The session is ours, made to the article's totals: the contexts are put in, "
        "time and hits are not."
    )
    return [
        Section("Figure 3: input tokens, request by request, of each agent", [how], growth_chart(evidence.session)),
        Section("Figure 4: context of every request over the session", [how], context_chart(served)),
        Section("Figure 5: cached and computed input tokens", [how], cache_chart(served)),
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
        f"{GB200.name}, {model_of(GB200)}. " + ". ".join(f"{one.name.capitalize()}: {one.why}" for one in WORKLOADS) + ".",
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
