"""Makes a report's sections of simulated runs: what agents asked for, what was cached, how pools were used, how long it took."""

from collections.abc import Sequence
from itertools import accumulate

from orchestrator.cli.report.charts import (
    Axes,
    Series,
    bars_chart,
    cache_chart,
    context_chart,
    distribution_chart,
    lines_chart,
    longest_sessions,
    stacked_chart,
)
from orchestrator.cli.report.comparison import Column, figure_of, number, percent, seconds, size
from orchestrator.cli.report.page import Section, Table
from orchestrator.sim.outcome import Distribution, Outcome, PoolUse, Served, StoreUse
from orchestrator.sim.runs import Run, percentiles

#: Points of a cumulative curve, in hundredths.
QUANTILES = (0, 1, 2, *range(5, 100, 5), 98, 99, 100)


def context_section(outcome: Outcome) -> Section:
    """Return prompt lengths over time, by agent."""
    shown = len({request.turn.session for request in longest_sessions(outcome.served)})
    sessions = len({request.turn.session for request in outcome.served})
    text = ["Prompt length of every request when it arrived, a line an agent. A line that falls is a context that was compacted."]
    if shown < sessions:
        text.append(f"Drawn are the {shown:,} sessions with most requests, of {sessions:,}; the table counts all.")
    main = [request for request in outcome.served if request.turn.agent == "main"]
    others = [request for request in outcome.served if request.turn.agent != "main"]
    rows = [_lengths(name, served) for name, served in (("main agents", main), ("sub-agents", others)) if served]
    table = Table(["", "requests", "mean prompt, tokens", "longest prompt, tokens"], rows)
    return Section("Context growth by agent", text, context_chart(outcome.served), table)


def _lengths(name: str, served: Sequence[Served]) -> list[str]:
    lengths = [request.turn.input_tokens for request in served]
    return [name, f"{len(lengths):,}", number(sum(lengths) / len(lengths)), f"{max(lengths):,}"]


def cache_section(run: Run) -> Section:
    """Return cached and computed prompt tokens."""
    cached, inputs = run.figures["cached_tokens"], run.figures["input_tokens"]
    served = [one for one in run.outcome.served if one.completed]
    cpu, cmx = sum(one.cpu_tokens for one in served), sum(one.cmx_tokens for one in served)
    parts = [
        ("from nodes' memory (hbm)", cached - cpu - cmx),
        ("from hosts' memory (cpu)", cpu),
        ("from shared storage (cmx)", cmx),
    ]
    rows = [
        ["from cache", f"{cached:,}", percent(cached / inputs if inputs else None)],
        *([name, f"{tokens:,}", percent(tokens / inputs if inputs else None)] for name, tokens in parts if run.outcome.stores),
        ["computed", f"{inputs - cached:,}", percent(1 - cached / inputs if inputs else None)],
    ]
    text = ["Prompt tokens that were found in a cache, on whichever node, and those that had to be computed."]
    chart = cache_chart(run.outcome.served)
    return Section("Cached and uncached tokens", text, chart, Table(["", "prompt tokens", "share"], rows))


def pool_sections(columns: Sequence[Column], best: Outcome) -> list[Section]:
    """Return how busy pools were under each policy, and how the best run used their nodes and their memory over time."""
    busy = {
        column.heading: {str(pool): figure_of(column.run, ("pools", pool, "utilisation")) or 0.0 for pool in best.pools}
        for column in columns
    }
    rows = [[heading, *(percent(value) for value in values.values())] for heading, values in busy.items()]
    text = ["Share of node time in which a step ran."]
    made = [Section("Pool utilisation", text, bars_chart(busy, "share of node time"), Table(["", *best.pools], rows))]
    made.append(_requests_section(best))
    made += [_memory_section(name, use) for name, use in best.pools.items() if use.samples]
    if best.stores is not None and best.stores.slots_held:
        made.append(_stores_section(best, best.stores))
    return made


def _requests_section(best: Outcome) -> Section:
    series: list[Series] = []
    for name, use in best.pools.items():
        minutes = [sample.at_s / 60 for sample in use.samples]
        series.append(Series(f"{name}: running", minutes, [sample.running for sample in use.samples]))
        series.append(Series(f"{name}: waiting", minutes, [sample.waiting for sample in use.samples]))
    text = ["Requests on the nodes of each pool over time."]
    return Section("Requests running and waiting", text, lines_chart(series, Axes("minutes since the start", "requests")))


def _memory_section(name: str, use: PoolUse) -> Section:
    minutes = [sample.at_s / 60 for sample in use.samples]
    totals = [sample.blocks_used + sample.blocks_cached + sample.blocks_free for sample in use.samples]
    kinds = (
        ("in use", [sample.blocks_used for sample in use.samples]),
        ("kept for later", [sample.blocks_cached for sample in use.samples]),
        ("free", [sample.blocks_free for sample in use.samples]),
    )
    series = [
        Series(kind, minutes, [count / total for count, total in zip(counts, totals, strict=True)]) for kind, counts in kinds
    ]
    text = [f"KV blocks in the accelerators' memory (the hbm tier) of all {use.nodes} nodes together, {max(totals):,} in all."]
    return Section(f"Tier occupancy: {name}", text, stacked_chart(series, Axes("minutes since the start", "share of blocks")))


def _stores_section(best: Outcome, use: StoreUse) -> Section:
    """Return how full the tiers below nodes' memory were, and what went through them."""
    minutes = [sample.at_s / 60 for sample in next(iter(best.pools.values())).samples]
    most = max(use.segments, default=0)
    series = [Series("cpu: share of its room", minutes, [held / use.slots if use.slots else 0.0 for held in use.slots_held])]
    if most:
        series.append(Series("cmx: share of its fullest", minutes, [segments / most for segments in use.segments]))
    rows = [
        ["cpu", f"{max(use.slots_held):,} of {use.slots:,} blocks", size(use.offered_bytes), size(use.loaded_bytes)],
        ["cmx", f"{most:,} segments", size(use.cmx_written_bytes), size(use.cmx_read_bytes)],
    ]
    text = [f"KV in the memory of {use.hosts} hosts (cpu) and in the storage that they share (cmx)."]
    table = Table(["", "at most", "came in", "went out"], rows)
    return Section("Tier occupancy: stores", text, lines_chart(series, Axes("minutes since the start", "share")), table)


def distribution_sections(columns: Sequence[Column]) -> list[Section]:
    """Return how first tokens and gaps between tokens are spread, by policy."""
    waits = {column.heading: _curve(column.run.outcome.served) for column in columns}
    gaps = {column.heading: gap_curve(column.run.outcome.itl_s) for column in columns}
    made: list[Section] = []
    for heading, curves, field in (("Time to first token", waits, "ttft_s"), ("Time between tokens", gaps, "itl_s")):
        ends = ("p50", "p90", "p99")
        rows = [[column.heading, *(seconds(figure_of(column.run, (field, end))) for end in ends)] for column in columns]
        text = ["Share of all that took at most so long, by policy."]
        made.append(Section(heading, text, distribution_chart(curves, "seconds"), Table(["", *ends], rows)))
    return made


def _curve(served: Sequence[Served]) -> list[tuple[float, float]]:
    waits = [request.ttft_s for request in served if request.completed and request.ttft_s is not None]
    values = percentiles(waits, *QUANTILES).values()
    return [(value, share / 100) for value, share in zip(values, QUANTILES, strict=True) if value]


def gap_curve(gaps: Distribution) -> list[tuple[float, float]]:
    """Return a distribution as (value, share of all that are at most so large)."""
    buckets = [(value, weight) for value, weight in gaps.buckets() if value > 0]
    shares = accumulate(weight / gaps.weight for _, weight in buckets)
    return [(value, share) for (value, _), share in zip(buckets, shares, strict=True)]
