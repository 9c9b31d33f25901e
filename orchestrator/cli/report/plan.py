"""Makes one page of a search for a plan: what speed costs, which plan was picked and why, what fell out."""

from collections.abc import Callable, Sequence

from orchestrator.cli.report.charts import Series, pareto_chart
from orchestrator.cli.report.page import Section, Table, page
from orchestrator.cli.report.plan_text import Told, front_table, pruned_table, reasons, shortfalls
from orchestrator.plan.measure import Measured


def write_plan_report(told: Told) -> str:
    """Return the page's HTML."""
    answer = told.answer
    sections = [
        Section("The plan", reasons(told) if answer.pick else shortfalls(told)),
        _chart(told, "Time between tokens against price", "ITL, ms", lambda one: 1e3 * one.itl_s),
        _chart(told, "Time to first token against price", "TTFT, s", lambda one: one.ttft_s),
        Section("Plans that nothing beats in price, times and goodput together", table=front_table(told)),
        Section("All simulated plans", table=_plans(told)),
        Section("What fell out before simulation", table=pruned_table(answer)),
    ]
    if answer.pick is not None and answer.pick.assumptions:
        sections.append(Section("Unpublished numbers that the pick rests on", table=_assumptions(told, answer.pick)))
    return page("Weft: a plan", [told.command, *told.notes], sections)


def _chart(told: Told, heading: str, y: str, value: Callable[[Measured], float]) -> Section:
    families: dict[str, list[Measured]] = {}
    for one in told.answer.measured:
        chip, mode, pools = one.plan.family
        families.setdefault(f"{chip}, {'aggregated' if pools == 1 else 'prefill + decode'}, {mode}", []).append(one)
    series = [_points(told, name, ones, value, markers_only=True) for name, ones in families.items()]
    series.append(_points(told, "nothing is better", told.answer.front, value, markers_only=False))
    slo = told.question.slo
    text = f"Limits: TTFT {slo.ttft_s:g} s, ITL {1e3 * slo.itl_s:g} ms, at the {100 * slo.percentile:g}th percentile."
    return Section(heading, [text], figure=pareto_chart(series, "USD an hour", y))


def _points(told: Told, name: str, plans: Sequence[Measured], value: Callable[[Measured], float], markers_only: bool) -> Series:
    return Series(
        name=name,
        x=[one.price.usd_per_hour for one in plans],
        y=[value(one) for one in plans],
        labels=[f"{told.number(one)}: {one.plan}" for one in plans],
        markers_only=markers_only,
    )


def _plans(told: Told) -> Table:
    ordered = sorted(told.answer.measured, key=told.number)
    rows = [
        [str(told.number(one)), str(one.plan), f"{one.price.usd_per_hour:.2f}", f"{one.ttft_s:.3g}", f"{1e3 * one.itl_s:.3g}"]
        for one in ordered
    ]
    return Table(["plan", "made of", "USD/h", "TTFT, s", "ITL, ms"], rows)


def _assumptions(told: Told, pick: Measured) -> Table:
    used = [one for one in told.catalog.assumptions if one.name in pick.assumptions]
    rows = [[one.name, f"{one.value:g} {one.unit}", f"{one.low:g} to {one.high:g}", one.why] for one in used]
    return Table(["number", "taken as", "may be", "why"], rows)
