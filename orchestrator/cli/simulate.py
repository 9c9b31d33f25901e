"""`weft simulate`: a trace through a cluster in virtual time, every policy beside the others and what none can beat."""

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from orchestrator.cli.block_bytes import block_bytes_of
from orchestrator.cli.cases import Case, run_cases
from orchestrator.cli.cluster_file import UnusableInput, check_file, check_folder, located, read_cluster, read_mapping, write_file
from orchestrator.cli.fronts import AGENTIC
from orchestrator.cli.options import count, number, pairs, whole
from orchestrator.cli.overrides import Overrides, parse_overrides, set_field
from orchestrator.cli.platforms import SPEED_TARGET, pareto_table, platform_table, platforms, platforms_json
from orchestrator.cli.report.comparison import Column, comparison, figure_of
from orchestrator.cli.report.page import Table, plotly_script
from orchestrator.cli.report.simulation import Simulation, bounds_text, write_report
from orchestrator.cli.workload import add_trace, read_workload
from orchestrator.core.config import ClusterConfig, ConfigError, PoolConfig, RouterPolicy, require
from orchestrator.core.types import PoolName
from orchestrator.profiles.catalog import Catalog, CatalogError
from orchestrator.profiles.resolve import Resolved, resolve
from orchestrator.sim.bounds import Bound, infinite_cache, offline_optimum
from orchestrator.sim.faults import Faults
from orchestrator.sim.prompts import misfit
from orchestrator.sim.runs import CacheRule, Run, failure_kind
from orchestrator.traces import TracedTurn

#: KV blocks of all nodes together in the run that evicts nothing: about 80 bytes of this machine's memory each.
BLOCKS_MAX = 32_000_000
#: And in every run, where they are not all used: half of that each.
EMPTY_BLOCKS_MAX = 1 << 28
#: Characters of a table's first column and of each other, where no terminal gives the width.
NAME_WIDTH, FIGURE_WIDTH = 30, 20
#: The settings of what may go wrong, and what kind of number each is.
FAULTS: Mapping[str, type] = get_type_hints(Faults)
NO_EVICTION, OPTIMAL_EVICTION = "no eviction", "optimal eviction"


def add_simulate(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="cluster file, such as deploy/sim/vr-nvl72.toml")
    add_trace(parser)
    policies = [str(policy) for policy in RouterPolicy]
    parser.add_argument(
        "--policy", nargs="+", choices=policies, default=policies, metavar="NAME", help=f"of {', '.join(policies)} (all)"
    )
    caches = [str(cache) for cache in CacheRule]
    parser.add_argument(
        "--cache", nargs="+", choices=caches, default=["value"], metavar="NAME", help=f"of {', '.join(caches)} (value)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="a number of the hardware profiles, such as lp30.tdp_w=500, or a cluster field, such as pools[0].nodes=8",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every random choice (%(default)s)")
    parser.add_argument(
        "--faults",
        type=_faults,
        metavar="until_s=S,NAME=VALUE,...",
        help=f"let things go wrong for so many seconds; NAME is one of {', '.join(FAULTS)}",
    )
    parser.add_argument("--check", action="store_true", help="check every invariant after every event; slow")
    parser.add_argument("--limit", type=count, metavar="N", help="simulate the trace's first N requests")
    parser.add_argument(
        "--load", type=count, default=1, metavar="N", help="N times the traffic: copies that share no prefix (%(default)s)"
    )
    parser.add_argument("--no-bounds", action="store_true", help="leave out the runs without eviction and with optimal eviction")
    parser.add_argument("--jobs", type=count, metavar="N", help="processes at most (as many as cores, for large traces)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures as JSON; - for standard output, then no table"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write index.html with charts there")
    parser.add_argument("--assumptions", action="store_true", help="list the numbers nobody has published, and their ranges")
    parser.add_argument(
        "--platforms",
        action="store_true",
        help="the article's platforms on a session of 400K tokens of context: speed, price, what binds; needs no trace",
    )
    parser.set_defaults(run=run_simulate)


def _faults(text: str) -> Faults:
    """Return what goes wrong by `until_s=600,crashes=2`."""
    readers = {int: whole, float: number}
    given = {key: readers[FAULTS[key]](key, value) for key, value in pairs(text, tuple(FAULTS)).items()}
    if "until_s" not in given:
        raise argparse.ArgumentTypeError("until_s is missing: the second from which on nothing goes wrong any more")
    try:
        return Faults(**given)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_simulate(options: argparse.Namespace) -> int:
    """Do what the command's options say and return the exit code. Raises `UnusableInput`, `ConfigError`, `TraceError`."""
    catalog = Catalog.load()
    config = read_cluster(options.cluster) if options.cluster else None
    overrides = parse_overrides(options.set, catalog.names, config)
    try:
        catalog = catalog.overridden(overrides.numbers)
    except CatalogError as error:
        raise UnusableInput(f"--set {error}") from None
    if options.assumptions:
        _list_assumptions(catalog, options.json)
    if options.platforms:
        _tell_platforms(catalog, options.json)
        return 0
    if config is None or options.trace is None:
        if options.assumptions:
            return 0
        raise UnusableInput(f"simulate: --{'trace' if config else 'cluster'} is needed")
    if not options.assumptions:
        _check_places(options)
        config = _changed(options.cluster, config, overrides)
        _run_all(options, config, _resolved(options.cluster, config, catalog, overrides), catalog)
    return 0


def _check_places(options: argparse.Namespace) -> None:
    """See now, not after minutes, that there is somewhere to write to, and what to draw with."""
    if options.json is not None:
        check_file("--json", options.json)
    if options.report is not None:
        check_folder("--report", options.report)
        plotly_script()


def _changed(path: Path, config: ClusterConfig, overrides: Overrides) -> ClusterConfig:
    """Return the cluster with the fields that were set."""
    if not overrides.cluster:
        return config
    mapping = read_mapping(path)
    for field, value in overrides.cluster.values():
        set_field(mapping, field, value)
    try:
        return ClusterConfig.from_mapping(mapping)
    except ConfigError as error:
        raise _unusable(path, error, overrides) from None


def _unusable(path: Path, error: ConfigError, overrides: Overrides) -> UnusableInput:
    """Say what is wrong with a field, or with an entry of it, and where it was given: on the command line or in the file."""
    given = any(f"{error.where}.".startswith((f"{name}.", f"{name}[")) for name in overrides.cluster)
    return UnusableInput(f"--set {error}") if given else located(path, error)


def _resolved(path: Path, config: ClusterConfig, catalog: Catalog, overrides: Overrides) -> Resolved:
    try:
        resolved = resolve(config, catalog, block_bytes_of(config))
        _check_memory(resolved.config)
    except ConfigError as error:
        raise _unusable(path, error, overrides) from None
    return resolved


def _check_memory(config: ClusterConfig) -> None:
    """Raise `ConfigError` for more KV blocks than a simulation can hold, at the pool that has most of them."""
    blocks = [pool.nodes * pool.engine.blocks for pool in config.pools]
    most = blocks.index(max(blocks))
    problem = f"all pools' nodes have {sum(blocks):,} KV blocks together; at most {EMPTY_BLOCKS_MAX:,} can be simulated"
    require(sum(blocks) <= EMPTY_BLOCKS_MAX, f"pools[{most}].nodes", problem)


def _run_all(options: argparse.Namespace, config: ClusterConfig, resolved: Resolved, catalog: Catalog) -> None:
    workload = read_workload(options.trace, options.limit, options.seed, options.load, options.time_unit)
    _check_blocks(options.trace, workload.turns, config)
    caches = [CacheRule(cache) for cache in dict.fromkeys(options.cache)]
    policies = [RouterPolicy(policy) for policy in dict.fromkeys(options.policy)]
    cases = [
        Case(resolved, policy, cache, workload.turns, options.seed, options.faults, options.check)
        for cache in caches
        for policy in policies
    ]
    with _progress(len(cases), "simulating") as progress:
        runs = run_cases(cases, options.jobs, progress)
    columns = [Column(_heading(case, caches), run) for case, run in zip(cases, runs, strict=True)]
    pick = best_of(runs)
    bounds = [] if options.no_bounds else _bound_columns(cases[pick], runs[pick], options.jobs)
    simulation = Simulation(
        command=shlex.join(["weft", *sys.argv[1:]]),
        cluster=config,
        catalog=catalog,
        pick=cases[pick],
        columns=columns,
        bounds=bounds,
        picked=pick,
        notes=workload.notes,
    )
    _tell(options, simulation)


def _check_blocks(trace: str, turns: Sequence[TracedTurn], config: ClusterConfig) -> None:
    """See that the trace's blocks can be told in the cluster's."""
    for size in dict.fromkeys(pool.engine.block_tokens for pool in config.serving_pools):
        problem = misfit(turns, size)
        if problem is not None:
            raise UnusableInput(f"--trace {trace}: {problem}")


def _heading(case: Case, caches: Sequence[CacheRule]) -> str:
    return str(case.policy) if len(caches) == 1 else f"{case.policy}, {case.cache}"


def best_of(runs: Sequence[Run]) -> int:
    """Return which run is best: most requests completed, then shortest sessions in the mean, then soonest first tokens."""

    def merit(index: int) -> tuple[float, ...]:
        run = runs[index]
        times = (figure_of(run, ("session_s", "mean")), figure_of(run, ("ttft_s", "p50")))
        return (-run.figures["completed"], *(float("inf") if time is None else time for time in times))

    return min(range(len(runs)), key=merit)


def _bound_columns(pick: Case, run: Run, jobs: int | None) -> list[Column]:
    """Return what the best policy reaches if nothing is ever evicted, and if what is evicted is chosen knowing the future.

    The caches beside them serve the turns that completed there, in the order in which they came there.
    """
    pools = pick.resolved.config.serving_pools
    served = [request.turn for request in run.outcome.served if request.completed]
    endless = infinite_cache(served)
    capacity_tokens = sum(run.outcome.pools[PoolName(pool.name)].blocks * pool.engine.block_tokens for pool in pools)
    optimum = offline_optimum(served, capacity_tokens)
    cases = [
        replace(pick, resolved=_without_eviction(pick.resolved, pick.turns, endless)),
        replace(pick, cache=CacheRule.OPTIMAL),
    ]
    with _progress(len(cases), "bounds") as progress:
        first, second = run_cases(cases, jobs, progress)
    return [Column(NO_EVICTION, first, endless), Column(OPTIMAL_EVICTION, second, optimum)]


def _without_eviction(resolved: Resolved, turns: Sequence[TracedTurn], endless: Bound) -> Resolved:
    """Return the cluster with room on every node for all that the trace ever computes, as far as this machine's memory goes."""
    computed = endless.input_tokens - endless.cached_tokens + sum(turn.output_tokens for turn in turns)
    most = BLOCKS_MAX // sum(pool.nodes for pool in resolved.config.serving_pools)
    pools: list[PoolConfig] = []
    for pool in resolved.config.pools:
        if pool.drafter is not None:
            pools.append(pool)
            continue
        # Every request has a last block of its own besides, and so has its generation where it was handed over.
        wanted = ceil(computed / pool.engine.block_tokens) + 2 * len(turns)
        blocks = max(pool.engine.blocks, min(most, wanted))
        pools.append(replace(pool, engine=replace(pool.engine, blocks=blocks)))
    return replace(resolved, config=replace(resolved.config, pools=tuple(pools)))


def _tell(options: argparse.Namespace, simulation: Simulation) -> None:
    if options.json is not None:
        _write_json(options.json, as_json(simulation, options))
    if options.json != Path("-"):
        print_table(comparison([*simulation.columns, *simulation.bounds]))
        for line in summary(simulation):
            print(line)
    if options.report:
        with _progress(1, "report") as progress:
            _made(options.report, lambda folder: write_report(folder, simulation, options.jobs, progress))


def summary(simulation: Simulation) -> list[str]:
    """Return what is to be said under the table."""
    lines = list(simulation.notes)
    if simulation.bounds:
        lines.append(bounds_text(simulation))
    failed = [request for column in simulation.columns for request in column.run.outcome.served if not request.completed]
    for kind, requests in sorted(Counter(map(failure_kind, failed)).items()):
        example = next(request.failure for request in failed if failure_kind(request) == kind)
        lines.append(f"{requests:,} requests of all policies together failed, such as: {example}")
    return lines


def as_json(simulation: Simulation, options: argparse.Namespace) -> dict[str, Any]:
    """Return all that was found, as it is written to a JSON file."""
    keys = {NO_EVICTION: "infinite_cache", OPTIMAL_EVICTION: "offline_optimum"}
    bounds = {keys[one.heading]: asdict(one.bound) | {"run": one.run.figures} for one in simulation.bounds if one.bound}
    return {
        "cluster": str(options.cluster),
        "trace": options.trace,
        "seed": options.seed,
        "set": options.set,
        "notes": list(simulation.notes),
        "runs": [column.run.figures for column in simulation.columns],
        "bounds": bounds,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file("--json", path, json.dumps(content, indent=2) + "\n")


def _made(folder: Path, write: Callable[[Path], None]) -> None:
    """Have a folder written to and say where."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
    except OSError as error:
        raise UnusableInput(f"{folder}: {error.strerror}") from None
    print(f"weft: wrote {folder / 'index.html'}", file=sys.stderr)


def _tell_platforms(catalog: Catalog, path: Path | None) -> None:
    found = platforms(catalog)
    if path is not None:
        _write_json(path, platforms_json(found))
    if path != Path("-"):
        print_table(platform_table(found))
        print_table(pareto_table(found))
        print(f"{AGENTIC.why}; {found[0].model} and, where LPX holds weights, FP8 there. Reached or not, and why:")
        for one in found:
            print(one.why(SPEED_TARGET))


def _list_assumptions(catalog: Catalog, path: Path | None) -> None:
    if path is not None:
        _write_json(path, {"assumptions": [asdict(one) for one in catalog.assumptions]})
    if path != Path("-"):
        rows = [[one.name, f"{one.value:g}", f"{one.low:g} to {one.high:g}", one.unit, one.why] for one in catalog.assumptions]
        print_table(Table(["assumption", "value", "range", "unit", "why"], rows))


def print_table(table: Table) -> None:
    """Print a table; where it goes to no terminal, as wide as it likes to be."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=NAME_WIDTH + FIGURE_WIDTH * len(table.headers))
    shown = RichTable()
    for index, header in enumerate(table.headers):
        shown.add_column(header, justify="right" if index and len(table.rows) else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)


@contextmanager
def _progress(total: float, words: str) -> Iterator[Callable[[float], None]]:
    """Show a bar on a terminal, nothing in a pipe; what is yielded is told how much of `total` is done."""
    console = Console(stderr=True)
    parts = (TextColumn(words), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*parts, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(words, total=total)
        yield lambda done: bar.update(task, completed=done)
