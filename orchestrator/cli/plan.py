"""`weft plan`: which cluster serves a trace as fast as is asked, for the least money within a budget."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.cli.cases import Case, run_cases
from orchestrator.cli.cluster_file import UnusableInput, check_file, write_file
from orchestrator.cli.cluster_text import cluster_text
from orchestrator.cli.options import count, number, pairs, positive
from orchestrator.cli.overrides import parse_overrides
from orchestrator.cli.report.page import plotly_script
from orchestrator.cli.report.plan import write_plan_report
from orchestrator.cli.report.plan_text import Told, as_json, print_answer, reasons
from orchestrator.cli.workload import Workload, add_trace, read_workload
from orchestrator.core.config import ModelConfig, Precision, RouterPolicy
from orchestrator.core.types import ServiceClass
from orchestrator.plan.demand import demand_of
from orchestrator.plan.goal import PERCENTILES, Budget, Slo
from orchestrator.plan.measure import Builder, Measured, measured
from orchestrator.plan.planner import Answer, Effort, Planner, Question
from orchestrator.plan.space import KV, WEIGHTS, Choices, Plan
from orchestrator.plan.tiers import Tried, best_of, size_tiers
from orchestrator.profiles.catalog import Catalog, CatalogError
from orchestrator.profiles.resolve import Resolved
from orchestrator.sim.runs import CacheRule, Run
from orchestrator.traces import TracedTurn

#: Requests of a trace that each plan is simulated with, unless it is said otherwise.
REQUESTS_MAX = 8_000
QUICK_REQUESTS_MAX = 2_000
QUICK = Effort(shortlist=6, rounds=2, neighbours=2)
#: Tokens of a block where the trace names no blocks.
BLOCK_TOKENS = 64
BUDGETS = ("gpus", "usd_per_hour", "kw")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    classes = ", ".join(f"{name.value} {100 * share:g}" for name, share in PERCENTILES.items())
    add_trace(parser, required=True)
    parser.add_argument("--model", required=True, metavar="NAME", help="a built-in shape such as kimi-k2, or a config.json")
    parser.add_argument(
        "--slo",
        type=_slo,
        required=True,
        metavar="ttft=S,itl=S[,class=NAME][,pct=N][,beat=S]",
        help=f"seconds to the first token and between tokens, at percentile N; by class: {classes} (standard); with a "
        "beat, tokens come so many seconds apart from a pool that keeps it",
    )
    parser.add_argument(
        "--budget", type=_budget, default=Budget(), metavar="KEY=N[,...]", help=f"at most so many of {', '.join(BUDGETS)}"
    )
    parser.add_argument("--chips", type=_names, metavar="NAME,...", help="chips that may be used (all)")
    parser.add_argument("--weights", type=_precisions, metavar="NAME,...", help="precisions of weights to try (nvfp4,fp8)")
    parser.add_argument("--kv", type=_precisions, metavar="NAME,...", help="precisions of the KV cache to try (fp8)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="a number of the hardware profiles"
    )
    parser.add_argument("--limit", type=count, metavar="N", help=f"plan for the trace's first N requests ({REQUESTS_MAX})")
    parser.add_argument("--quick", action="store_true", help=f"fewer simulations, of {QUICK_REQUESTS_MAX} requests")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every random choice (%(default)s)")
    parser.add_argument("--jobs", type=count, metavar="N", help="processes at most (as many as cores, for large traces)")
    parser.add_argument(
        "--tiers", action="store_true", help="size the hosts' CPU memory and CMX below the pick, by simulating it"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the pick as a cluster file")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all that was found as JSON; - for standard output, then no table"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page with charts, such as plan.html")
    parser.set_defaults(run=run_plan)


def _slo(text: str) -> Slo:
    given = pairs(text, ("ttft", "itl", "class", "pct", "beat"))
    missing = [key for key in ("ttft", "itl") if key not in given]
    if missing:
        raise argparse.ArgumentTypeError(f"{missing[0]} is missing")
    name = given.get("class", (ServiceClass.CADENCE if "beat" in given else ServiceClass.STANDARD).value)
    if name not in list(ServiceClass):
        raise argparse.ArgumentTypeError(f"class: must be one of {', '.join(ServiceClass)}, is {name!r}")
    percentile = _percentile(given["pct"]) if "pct" in given else PERCENTILES[ServiceClass(name)]
    slo = Slo(positive("ttft", given["ttft"]), positive("itl", given["itl"]), percentile)
    if "beat" not in given:
        return slo
    beat_s = positive("beat", given["beat"])
    if beat_s > slo.itl_s:
        raise argparse.ArgumentTypeError(f"beat: must be at most itl ({slo.itl_s:g} s), is {beat_s:g}")
    return replace(slo, beat_s=beat_s)


def _percentile(text: str) -> float:
    percent = number("pct", text)
    if not 1 <= percent < 100:
        raise argparse.ArgumentTypeError(f"pct: must be from 1 to under 100, is {text}")
    return percent / 100


def _budget(text: str) -> Budget:
    return Budget(**{key: positive(key, value) for key, value in pairs(text, BUDGETS).items()})


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split(",")))


def _precisions(text: str) -> tuple[Precision, ...]:
    unknown = [name for name in _names(text) if name not in list(Precision)]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(Precision)}, is {unknown[0]!r}")
    return tuple(Precision(name) for name in _names(text))


@dataclass(frozen=True, slots=True)
class _Task:
    """A question with all that answering it takes."""

    question: Question
    workload: Workload
    builder: Builder
    options: argparse.Namespace

    def answer(self) -> Answer:
        options = self.options
        demand = demand_of(self.workload.turns)
        effort = QUICK if options.quick else Effort()
        return Planner(self.question, demand, self.builder.size, self._measure, effort).search()

    def _measure(self, plans: Sequence[Plan]) -> list[Measured]:
        """Simulate plans, side by side where that pays."""
        turns, seed = self.workload.turns, self.options.seed
        resolved = [self.builder.resolved(plan) for plan in plans]
        cases = [Case(one, RouterPolicy.PREDICTED_TIME, CacheRule.VALUE, turns, seed) for one in resolved]
        runs = _with_status(len(cases), lambda tell: run_cases(cases, self.options.jobs, tell))
        together = zip(plans, resolved, runs, strict=True)
        return [measured(plan, one, run.outcome, self.question.slo) for plan, one, run in together]

    def tiers(self, pick: Measured, catalog: Catalog) -> tuple[Tried, ...]:
        """Size what is below a plan's memory."""
        turns, options, slo = self.workload.turns, self.options, self.question.slo

        def measure(clusters: Sequence[Resolved]) -> list[Tried]:
            cases = [Case(one, RouterPolicy.PREDICTED_TIME, CacheRule.VALUE, turns, options.seed) for one in clusters]
            runs = _with_status(len(cases), lambda tell: run_cases(cases, options.jobs, tell))
            return [_tried(one, run, measured(pick.plan, one, run.outcome, slo)) for one, run in zip(clusters, runs, strict=True)]

        return size_tiers(demand_of(turns), self.builder.resolved(pick.plan), catalog, measure)


def _tried(cluster: Resolved, run: Run, reached: Measured) -> Tried:
    shares = run.figures["hit_rate_by_tier"]
    return Tried(cluster.config.store, shares["hbm"] or 0.0, shares["cpu"] or 0.0, shares["cmx"] or 0.0, reached.ttft_s)


def _with_status(total: int, work: Callable[[Callable[[float], None]], Any]) -> Any:
    """Say on a terminal how far the simulations are."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return work(lambda done: None)
    with console.status("simulating plans") as status:
        return work(lambda done: status.update(f"simulating plans: {done:.1f} of {total}"))


def run_plan(options: argparse.Namespace) -> int:
    """Find a plan, tell it, and return 0; 1 if there is none. Raises `UnusableInput` and `TraceError`."""
    catalog = _catalog(options)
    _check_places(options)
    model = _model(options.model, catalog)
    limit = options.limit or (QUICK_REQUESTS_MAX if options.quick else REQUESTS_MAX)
    workload = read_workload(options.trace, limit, options.seed, unit=options.time_unit)
    _check_contexts(workload.turns, options.model, catalog)
    question = Question(options.slo, options.budget, _choices(options, catalog))
    builder = Builder(catalog, model, workload.turns[0].block_tokens or BLOCK_TOKENS)
    task = _Task(question, workload, builder, options)
    answer = task.answer()
    tiers = task.tiers(answer.pick, catalog) if options.tiers and answer.pick is not None else ()
    told = Told(shlex.join(["weft", *sys.argv[1:]]), question, answer, workload.notes, catalog, tiers)
    if options.json is not None:
        _write("--json", options.json, json.dumps(as_json(told), indent=2) + "\n")
    if options.json != Path("-"):
        print_answer(told)
    if options.report is not None:
        _write("--report", options.report, write_plan_report(told))
    if answer.pick is None:
        return 1
    if options.out is not None:
        _write("--out", options.out, _cluster_file(builder, told, answer.pick))
    return 0


def _check_places(options: argparse.Namespace) -> None:
    """See now, not after minutes, that there is somewhere to write to."""
    for flag in ("out", "json", "report"):
        path = getattr(options, flag)
        if path is not None:
            check_file(f"--{flag}", path)
    if options.report is not None:
        plotly_script()


def _catalog(options: argparse.Namespace) -> Catalog:
    catalog = Catalog.load()
    numbers: Mapping[str, float] = parse_overrides(options.set, catalog.names, None).numbers
    try:
        return catalog.overridden(numbers)
    except CatalogError as error:
        raise UnusableInput(f"--set {error}") from None


def _model(name: str, catalog: Catalog) -> ModelConfig:
    """Return the model under any name that a trace has for it."""
    try:
        catalog.shape(name)
    except CatalogError as error:
        raise UnusableInput(f"--model {error}") from None
    if name in catalog.shapes:
        return ModelConfig(aliases=("*",), shape=name)
    path = Path(name).resolve()
    if not str(path).isprintable():
        raise UnusableInput(f"--model {name!a}: a cluster file can hold no such path")
    if not path.is_dir() and path.name != "config.json":
        return ModelConfig(aliases=("*",), shape=str(path))
    return ModelConfig(path=str(path if path.is_dir() else path.parent), aliases=("*",))


def _check_contexts(turns: Sequence[TracedTurn], model: str, catalog: Catalog) -> None:
    longest = max(turn.input_tokens + turn.output_tokens for turn in turns)
    limit = catalog.shape(model).context_tokens_max
    if longest > limit:
        raise UnusableInput(f"--trace: its longest request has {longest:,} tokens, {model} has {limit:,} positions")


def _choices(options: argparse.Namespace, catalog: Catalog) -> Choices:
    known = catalog.chips
    wanted = options.chips or known
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UnusableInput(f"--chips: {unknown[0]!r} is no chip; there are: {', '.join(known)}")
    chips = [catalog.chip(name) for name in wanted]
    gpus = tuple(chip.name for chip in chips if chip.is_gpu)
    if not gpus:
        raise UnusableInput("--chips: at least one of them must be a GPU, to compute prompts")
    return Choices(
        chips=gpus,
        halves=tuple(chip.name for chip in chips if not chip.is_gpu),
        domains=tuple((chip.name, chip.domain_chips) for chip in chips),
        weights=options.weights or WEIGHTS,
        kv=options.kv or KV,
    )


def _cluster_file(builder: Builder, told: Told, pick: Measured) -> str:
    config = builder.cluster(pick.plan)
    if told.tiers:
        config = replace(config, store=best_of(told.tiers).store)
    comments = ["Found by", "", f"    {told.command}", "", *reasons(told), ""]
    notes = {}
    if config.store is not None and config.store.cmx:
        notes["store"] = "`cmx`: give the folder or bucket that all hosts share."
    if not config.models["default"].path:
        notes["models.default"] = "To serve it, give the checkpoint: `weft serve --model DIR`, or `path` here."
    return cluster_text(config, comments, notes)


def _write(option: str, path: Path, text: str) -> None:
    write_file(option, path, text)
    if path != Path("-"):
        print(f"weft: wrote {path}", file=sys.stderr)
