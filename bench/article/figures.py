"""The article's Figures 3 to 7 from our session and our fronts, and the simulated points beside the formulas."""

from collections.abc import Sequence

from bench.article.checks import DECODE_NODES, PREFILL_NODES, Check
from bench.article.session import growth_chart
from bench.article.sources import HARDWARE_PRICES
from bench.article.study import Study
from orchestrator.cli.fronts import (
    GB200,
    INTERACTIVITY,
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
from orchestrator.cli.report.charts import Series, cache_chart, context_chart, pareto_chart
from orchestrator.cli.report.page import Section, Table
from orchestrator.core.config import DecodeMode


def figures(study: Study) -> list[Section]:
    """Return the figures in the article's order, then each for all systems, folded."""
    return [
        *_session(study),
        _workload_section(study, "Figure 6: throughput against interactivity on Blackwell", by_throughput),
        _workload_section(study, "Figure 7: cost against interactivity on Blackwell", by_price),
    ]


def details(study: Study) -> list[Section]:
    """Return Figures 6 and 7 for every system and kind of work, and how the formulas stand to the simulator."""
    merits = (by_throughput, by_power, by_price)
    systems = [_systems_section(study, workload, merit) for merit in merits for workload in WORKLOADS]
    return [*systems, _checks_section(study.checks)]


def _session(study: Study) -> list[Section]:
    served = study.session.served
    how = (
        f"The article's session, {len(served)} requests in closed loop, alone on {gpus_of(cluster(RUBIN.file))} GPUs of a "
        f"{RUBIN.name} (deploy/sim/{RUBIN.file}). The session is ours, made to the article's totals: the contexts are put in, "
        "time and hits are not."
    )
    return [
        Section("Figure 3: input tokens, request by request, of each agent", [how], growth_chart(study.session)),
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


def _workload_section(study: Study, heading: str, merit: Merit) -> Section:
    """Return one system's fronts for batch, coding and agentic work, as the article draws them."""
    series = [_series(one.name, study.fronts[GB200.name, one.name], merit) for one in WORKLOADS]
    series += _simulated([one for one in study.checks if one.system == GB200.name], merit)
    text = (
        f"{GB200.name}, {model_of(GB200)}. " + ". ".join(f"{one.name.capitalize()}: {one.why}" for one in WORKLOADS) + ".",
        "Tokens are generated ones; the prefill that they take is in. Points: the same through the whole simulator.",
    )
    return Section(heading, text, pareto_chart(series, INTERACTIVITY, axis(merit)))


def _systems_section(study: Study, workload: Workload, merit: Merit) -> Section:
    figure = 7 if merit is by_price else 6
    systems = [one for one in SYSTEMS if merit is not by_throughput or one.mode is not DecodeMode.WHOLE]
    series = [_series(one.name, study.fronts[one.name, workload.name], merit) for one in systems]
    series += _simulated([one for one in study.checks if one.workload == workload.name], merit)
    text = [f"{workload.why[0].upper()}{workload.why[1:]}."]
    if merit is by_throughput:
        text.append("LPX chips are no GPUs and not counted here; all of decode on LPX has no GPU at all. Compare cost and power.")
    if merit is by_price:
        text.append(f"Owners' cost: {HARDWARE_PRICES.text} ({HARDWARE_PRICES.url}); nobody has published a price of LPX.")
    heading = f"Figure {figure}, all systems, {workload.name}: {axis(merit)}"
    return Section(heading, text, pareto_chart([one for one in series if one.x], INTERACTIVITY, axis(merit)), folded=True)


def _checks_section(checks: Sequence[Check]) -> Section:
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
        f"Points of the fronts through the whole simulator, {DECODE_NODES} decode and {PREFILL_NODES} prefill nodes under "
        "closed-loop load. The formula is taken at the batches that were there at every moment.",
    )
    return Section("Fronts against the simulator", text, table=Table(headers, rows), folded=True)
