"""Writes the report of a simulation: one HTML file with charts of its best run, of all policies, of load and of assumptions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from orchestrator.cli.cases import Case, run_cases
from orchestrator.cli.report.charts import Series, by_width, pareto_chart, tornado_chart
from orchestrator.cli.report.comparison import Column, comparison, figure_of, number
from orchestrator.cli.report.page import Section, Table, page
from orchestrator.cli.report.runs import cache_section, context_section, distribution_sections, pool_sections
from orchestrator.cli.sweeps import SwungCases, copies, load_factors, stretch, swings, swung_cases
from orchestrator.core.config import ClusterConfig
from orchestrator.profiles.catalog import Catalog
from orchestrator.sim.runs import Run

INTERACTIVITY = ("tokens_per_s_per_user", "p50")
#: What a load sweep draws against interactivity: heading, axis, the way to the figure.
AGAINST_INTERACTIVITY = (
    ("Throughput against interactivity", "output tokens a second and GPU", ("tokens_per_s_per_gpu",)),
    ("Cost against interactivity", "USD per million output tokens", ("usd_per_million_output_tokens",)),
)
#: An assumption that moves a result by a smaller share is not drawn.
SWING_MIN = 0.001
#: What assumptions are asked for.
RESULTS = (
    ("USD per million tokens", ("usd_per_million_tokens",)),
    ("mean session time, seconds", ("session_s", "mean")),
    ("median time to first token, seconds", ("ttft_s", "p50")),
)


@dataclass(frozen=True, slots=True)
class Simulation:
    """What was asked of a simulation and what came of it."""

    command: str
    cluster: ClusterConfig
    #: With the numbers that were set.
    catalog: Catalog
    columns: Sequence[Column]
    #: Runs that stand for bounds; empty if none were made.
    bounds: Sequence[Column]
    #: The best of the columns, and what was run for it.
    picked: int
    pick: Case
    notes: Sequence[str]


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """The best policy under so many copies of the trace's first requests."""

    copies: int
    run: Run


@dataclass(frozen=True, slots=True)
class Sweeps:
    """What was run for the report alone."""

    load: Sequence[LoadPoint]
    swung: Sequence[SwungCases]
    #: Of each swung assumption the run at its low end and the one at its high end.
    swung_runs: Sequence[Run]


def write_report(folder: Path, simulation: Simulation, jobs: int | None, progress: Callable[[float], None]) -> None:
    """Write `index.html`. Makes some more runs, for the charts that ask what if; `progress` is told the share that is done."""
    text = page(_title(simulation), _made(simulation), sections(simulation, _sweep(simulation, jobs, progress)))
    # What was given on the command line need not be UTF-8.
    (folder / "index.html").write_text(text, encoding="utf-8", errors="backslashreplace")


def _sweep(simulation: Simulation, jobs: int | None, progress: Callable[[float], None]) -> Sweeps:
    short = replace(simulation.pick, turns=stretch(simulation.pick.turns))
    factors = load_factors(len(short.turns))
    cases = [replace(short, turns=copies(short.turns, factor, short.seed)) for factor in factors]
    swung = swung_cases(short, simulation.cluster, simulation.catalog)
    cases += [case for one in swung for case in (one.low, one.high)]
    runs = run_cases(cases, jobs, lambda done: progress(done / len(cases)))
    load = [LoadPoint(factor, run) for factor, run in zip(factors, runs, strict=False)]
    return Sweeps(load, swung, runs[len(load) :])


def _title(simulation: Simulation) -> str:
    return f"Simulation of {simulation.cluster.cluster.name}"


def _made(simulation: Simulation) -> list[str]:
    return [
        f"Made by: {simulation.command}",
        f"Weft {version('weft')}, seed {simulation.pick.seed}. All times are virtual.",
        f"Unless said otherwise, charts show the best run: {simulation.columns[simulation.picked].heading}.",
        *simulation.notes,
    ]


def sections(simulation: Simulation, sweeps: Sweeps) -> list[Section]:
    """Return all sections of a report in order."""
    best = simulation.columns[simulation.picked].run
    return [
        _overview(simulation),
        context_section(best.outcome),
        cache_section(best),
        *_load_sections(simulation, sweeps.load),
        *pool_sections(simulation.columns, best.outcome),
        *distribution_sections(simulation.columns),
        *_swing_sections(sweeps),
        _assumptions(simulation),
    ]


def bounds_text(simulation: Simulation) -> str:
    """Return what the two columns of bounds are."""
    return (
        f"The last two columns: {simulation.pick.policy} (most requests completed, then the shortest sessions), where nothing is "
        "ever evicted, and where a node evicts what the trace asks for again last, on whichever node. Their second row bounds "
        "every policy: the hit rate of one single cache, endless or of all nodes' capacity with the future known."
    )


def _overview(simulation: Simulation) -> Section:
    text = ["Every request of the trace, a column a policy. TTFT is time to first token, ITL time between tokens."]
    if simulation.bounds:
        text.append(bounds_text(simulation))
    return Section("All figures", text, table=comparison([*simulation.columns, *simulation.bounds]))


def _load_sections(simulation: Simulation, load: Sequence[LoadPoint]) -> list[Section]:
    """Return what the cluster yields and costs against how fast it feels; nothing for a cluster without hardware."""
    requests = load[0].run.figures["requests"]
    text = [
        f"{simulation.pick.policy} under more and more load: each point is the trace's first {requests:,} requests, so many "
        "times at once, the copies sharing no prefix. The other points are the runs of the whole trace, a policy each."
    ]
    made: list[Section] = []
    for heading, axis, figure in AGAINST_INTERACTIVITY:
        swept = _against(f"{simulation.pick.policy}, copies", [(f"{point.copies} x", point.run) for point in load], figure)
        whole = _against(
            "whole trace", [(column.heading, column.run) for column in simulation.columns], figure, markers_only=True
        )
        if swept.x:
            rows = [
                [label, number(x), number(y)]
                for one in (swept, whole)
                for label, x, y in zip(one.labels, one.x, one.y, strict=True)
            ]
            table = Table(["run", "tokens/s/user, median", axis], rows)
            made.append(Section(heading, text, pareto_chart([swept, whole], "tokens a second and user (median)", axis), table))
    return made


def _against(name: str, runs: Sequence[tuple[str, Run]], figure: Sequence[str], markers_only: bool = False) -> Series:
    points = [(label, figure_of(run, INTERACTIVITY), figure_of(run, figure)) for label, run in runs]
    known = [(label, x, y) for label, x, y in points if x is not None and y is not None]
    return Series(name, [x for _, x, _ in known], [y for _, _, y in known], [label for label, _, _ in known], markers_only)


def _swing_sections(sweeps: Sweeps) -> list[Section]:
    """Return how far each assumption moves each result; nothing where none is used or none matters."""
    base = sweeps.load[0].run
    made: list[Section] = []
    for name, figure in RESULTS:
        middle = figure_of(base, figure)
        if middle is None:
            continue
        least = SWING_MIN * middle
        moved = [swing for swing in swings(sweeps.swung, sweeps.swung_runs, figure) if abs(swing.high - swing.low) >= least]
        if not moved:
            continue
        text = [
            f"The trace's first {base.figures['requests']:,} requests, with one assumption at a time at either end of its range. "
            f"As it is: {number(middle)}. What moves it by less than {SWING_MIN:.1%} is left out."
        ]
        rows = [
            [one.name, f"{one.low_label}: {number(one.low)}", f"{one.high_label}: {number(one.high)}"] for one in by_width(moved)
        ]
        table = Table(["assumption", "at its low end", "at its high end"], rows)
        made.append(Section(f"Which assumptions mattered: {name}", text, tornado_chart(moved, middle, name), table))
    return made


def _assumptions(simulation: Simulation) -> Section:
    used = {name for pool in simulation.pick.resolved.hardware.values() for name in pool.assumptions}
    rows = [
        [one.name, f"{one.value:g}", f"{one.low:g} to {one.high:g}", one.unit, one.why]
        for one in simulation.catalog.assumptions
        if one.name in used
    ]
    text = ["Numbers that nobody has published and that this cluster depends on."] if rows else ["This cluster depends on none."]
    table = Table(["assumption", "value", "range", "unit", "why"], rows) if rows else None
    return Section("Assumptions", text, table=table)
