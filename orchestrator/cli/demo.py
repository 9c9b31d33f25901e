"""`weft demo`: a small cluster on this machine, agents' sessions through it over HTTP, and a table of what came of it.

Copies of a session (`data/agent_session.jsonl`) are reenacted, more of them than fit the nodes' memory, each time on a cluster
that starts empty: with tiers below that memory and agents that tell of their pauses, without either, and without either routed
round robin; and with both where turns go their different ways, through prefill, split decode and a pool that keeps a beat. Main
agents' turns are of class cadence, which means something only there. All are run, not computed, so every column is a measurement
of this machine.
"""

import asyncio
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import quantiles

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from orchestrator.cli.cluster_file import AGENT_SESSION, AGENTS_CLUSTER, TIERS_CLUSTER, read_cluster
from orchestrator.cli.reenact import Harness, Reenactment, Scale, ScaledTurn, TurnResult, scaled
from orchestrator.cli.serve import quiet_output, start_fleet
from orchestrator.cli.sweeps import copies
from orchestrator.core.config import RouterPolicy
from orchestrator.fleet.fleet import Fleet
from orchestrator.sim.hints import HintProgram
from orchestrator.traces import read_trace

#: The sample is scaled already; only its pauses are too long for a demo. Token ids from 64 on are ordinary tokens of the built-in
#: model's vocabulary of 512.
SCALE = Scale(block_tokens=16, output=1.0, gap=0.05, token_first=64, token_count=384, gap_s_max=0.5)
#: Copies of the session that run side by side, no prefix in common.
SESSIONS = 4
#: Whose turns are asked for on a beat.
CADENCE_AGENT = "main"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to serve the sessions."""

    name: str
    policy: RouterPolicy
    #: With a store below the nodes' memory, and agents that tell of their pauses and ends.
    tiers: bool
    cluster: Path = TIERS_CLUSTER


WAYS = (
    Way("tiers and hints", RouterPolicy.PREDICTED_TIME, True),
    Way("without", RouterPolicy.PREDICTED_TIME, False),
    Way("round robin, without", RouterPolicy.ROUND_ROBIN, False),
    Way("prefill, split decode, cadence", RouterPolicy.PREDICTED_TIME, True, AGENTS_CLUSTER),
)


@dataclass(frozen=True, slots=True)
class Gaps:
    """Seconds between the pieces of answers as they came."""

    p50_s: float
    p99_s: float

    @staticmethod
    def of(results: Sequence[TurnResult]) -> "Gaps":
        """Return those of some turns together."""
        gaps_s = [gap for result in results for gap in result.gaps_s]
        return Gaps(_quantile(gaps_s, 50), _quantile(gaps_s, 99))

    @property
    def tightness(self) -> float:
        """How many times as long as usual a long one is."""
        return self.p99_s / max(self.p50_s, 1e-9)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one reenactment came to. Times in seconds."""

    requests: int
    failures: int
    input_tokens: int
    cached_tokens: int
    #: Those of them that came from below the nodes' memory.
    cpu_tokens: int
    cmx_tokens: int
    output_tokens: int
    seconds: float
    ttft_p50_s: float
    ttft_p90_s: float
    #: Of main agents, whose turns are of class cadence, and of all others.
    main: Gaps
    others: Gaps
    #: Turns, or a turn's prompt, that each pool computed.
    parts: Mapping[str, int]
    #: Beats kept or not, and those that were not; 0 where there is none.
    beats: int
    beats_missed: int

    @property
    def hit_rate(self) -> float:
        """Share of the input that was not computed."""
        return self.cached_tokens / max(self.input_tokens, 1)


def run_demo(as_json: bool) -> bool:
    """Run the demo and print its table; True if every request was answered. Raises `FleetFailed`."""
    out, err = Console(file=sys.stdout), Console(stderr=True, highlight=False)
    turns = [_asked(scaled(turn, SCALE)) for turn in copies(list(read_trace(AGENT_SESSION)), SESSIONS, 0)]
    with quiet_output():
        outcomes = {way.name: _run(way, turns, err) for way in WAYS}
    if as_json:
        print(json.dumps({name: asdict(one) | {"hit_rate": one.hit_rate} for name, one in outcomes.items()}, indent=2))
    else:
        show_outcomes(outcomes, out)
    return not any(outcome.failures for outcome in outcomes.values())


def _asked(turn: ScaledTurn) -> ScaledTurn:
    """Return a turn with the class that its agent asks for."""
    return replace(turn, service_tier="cadence") if turn.agent == CADENCE_AGENT else turn


def _run(way: Way, turns: Sequence[ScaledTurn], err: Console) -> Outcome:
    """Start a cluster that knows nothing yet, reenact the sessions on it and stop it."""
    config = read_cluster(way.cluster)
    config = replace(config, gateway=replace(config.gateway, http_port=0, grpc_port=0))
    with tempfile.TemporaryDirectory() as folder:
        store = replace(config.store, cmx=f"file://{Path(folder) / 'cmx'}") if config.store is not None and way.tiers else None
        config = replace(config, router=replace(config.router, policy=way.policy), store=store)
        with Fleet.local(config) as fleet:
            url, *_ = start_fleet(fleet, config, err, threading.Event())
            harness = Harness(_status(url)["grpc_address"], HintProgram.ORACLE) if way.tiers else None
            with _progress(len(turns), way.name, err) as on_end:
                started = time.perf_counter()
                results = asyncio.run(_reenact(url, next(iter(config.models)), turns, on_end, harness))
                seconds = time.perf_counter() - started
            return _outcome(results, _counted(url), seconds)


def _status(url: str) -> Mapping[str, str]:
    return httpx.get(f"{url}/status", trust_env=False).raise_for_status().json()


async def _reenact(
    url: str, model: str, turns: Sequence[ScaledTurn], on_end: Callable[[TurnResult], None], harness: Harness | None
) -> list[TurnResult]:
    return await Reenactment(url, model, turns, on_end, harness).run()


@contextlib.contextmanager
def _progress(total: int, words: str, err: Console) -> Iterator[Callable[[TurnResult], None]]:
    """Show each answered turn: whose it was, and the share of input that was cached so far."""
    name, note = TextColumn("{task.description:<18}"), TextColumn("{task.fields[note]}")
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note)
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task(words, total=total, note="")
        tokens = [0, 0]

        def on_end(result: TurnResult) -> None:
            tokens[0] += len(result.turn.prompt)
            tokens[1] += result.cached_tokens
            note = f"{tokens[1] / tokens[0]:.0%} of the input cached, {result.turn.agent}: {len(result.turn.prompt)} tokens"
            progress.update(task, advance=1, note=note)

        yield on_end


def _counted(url: str) -> Callable[[str, str], Mapping[str, int]]:
    """Read what the gateway has counted so far: of a counter, by the values of one label."""
    page = httpx.get(f"{url}/metrics", trust_env=False).raise_for_status().text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]

    def by_label(name: str, label: str) -> Mapping[str, int]:
        found: dict[str, int] = {}
        for sample in samples:
            if sample.name == name:
                value = sample.labels[label]
                found[value] = found.get(value, 0) + int(sample.value)
        return found

    return by_label


def _outcome(results: Sequence[TurnResult], counted: Callable[[str, str], Mapping[str, int]], seconds: float) -> Outcome:
    good = [result for result in results if not result.failure]
    ttft = [result.ttft_s for result in good]
    cached = counted("weft_cached_tokens_total", "tier")
    return Outcome(
        requests=len(results),
        failures=len(results) - len(good),
        input_tokens=sum(len(result.turn.prompt) for result in good),
        cached_tokens=sum(result.cached_tokens for result in good),
        cpu_tokens=cached.get("cpu", 0),
        cmx_tokens=cached.get("cmx", 0),
        output_tokens=sum(result.output_tokens for result in good),
        seconds=seconds,
        ttft_p50_s=_quantile(ttft, 50),
        ttft_p90_s=_quantile(ttft, 90),
        main=Gaps.of([result for result in good if result.turn.agent == CADENCE_AGENT]),
        others=Gaps.of([result for result in good if result.turn.agent != CADENCE_AGENT]),
        parts=counted("weft_node_requests_total", "pool"),
        beats=sum(counted("weft_beats_total", "pool").values()),
        beats_missed=sum(counted("weft_beats_missed_total", "pool").values()),
    )


def _quantile(values: Sequence[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else sum(values)


def show_outcomes(outcomes: Mapping[str, Outcome], out: Console) -> None:
    """Print the demo's table; `outcomes` are by the ways' names, in their order."""
    out.print(
        f"{SESSIONS} agent sessions side by side, each a main agent and six sub-agents. All columns were run here:",
        *(f"  {', '.join(way.name for way in WAYS if way.cluster == file)}: {_nodes(file)}" for file in _clusters()),
        sep="\n",
        highlight=False,
    )
    table = Table("", *outcomes)
    rows: dict[str, Callable[[Outcome], str]] = {
        "requests (failed)": lambda one: f"{one.requests} ({one.failures})",
        "turns or prompts by pool": lambda one: ", ".join(f"{pool} {count}" for pool, count in one.parts.items()),
        "input tokens": lambda one: f"{one.input_tokens:,}",
        "  found in hbm": lambda one: f"{one.cached_tokens - one.cpu_tokens - one.cmx_tokens:,}",
        "  found in cpu, cmx": lambda one: f"{one.cpu_tokens:,}, {one.cmx_tokens:,}",
        "  computed": lambda one: f"{one.input_tokens - one.cached_tokens:,}",
        "hit rate": lambda one: f"{one.hit_rate:.1%}",
        "output tokens": lambda one: f"{one.output_tokens:,}",
        "TTFT p50, p90": lambda one: f"{1000 * one.ttft_p50_s:.0f}, {1000 * one.ttft_p90_s:.0f} ms",
        "between tokens p50, p99": lambda one: "",
        "  main agents (cadence)": lambda one: _gaps(one.main),
        "  sub-agents": lambda one: _gaps(one.others),
        "beats (missed)": lambda one: f"{one.beats:,} ({one.beats_missed:,})" if one.beats else "-",
        "sessions took": lambda one: f"{one.seconds:.1f} s",
    }
    for name, text in rows.items():
        table.add_row(name, *(text(one) for one in outcomes.values()))
    out.print(table)
    _show_costs(outcomes, out)


def _clusters() -> Sequence[Path]:
    """Return the cluster files of all ways, each once."""
    return tuple(dict.fromkeys(way.cluster for way in WAYS))


def _nodes(file: Path) -> str:
    """Say what a cluster file has and how much that holds."""
    pools = read_cluster(file).pools
    nodes = ", ".join(f"{pool.nodes} {pool.kind}{' (attention | FFN)' if pool.split else ''}" for pool in pools)
    held = sum(pool.nodes * pool.engine.blocks * pool.engine.block_tokens for pool in pools)
    return f"{nodes} nodes, whose memory holds {held:,} tokens"


def _gaps(gaps: Gaps) -> str:
    return f"{1000 * gaps.p50_s:.1f}, {1000 * gaps.p99_s:.1f} ms"


def _show_costs(outcomes: Mapping[str, Outcome], out: Console) -> None:
    """Say what it costs to do without tiers and hints, and what a beat is good for."""
    ours = outcomes[WAYS[0].name]
    for way in WAYS:
        theirs = outcomes[way.name]
        if way.tiers:
            continue
        computed = (theirs.input_tokens - theirs.cached_tokens) / max(ours.input_tokens - ours.cached_tokens, 1)
        waited = theirs.ttft_p90_s / max(ours.ttft_p90_s, 1e-9)
        cost = f"{computed:.1f} times the prompt tokens computed, {waited:.1f} times the TTFT p90"
        out.print(f"What it costs {way.name}: {cost}, {theirs.seconds / ours.seconds:.1f} times as long.", highlight=False)
    beating = next(one for one in outcomes.values() if one.beats)
    out.print(
        f"Main agents' p99 is {beating.main.tightness:.1f} times their p50 on a beat, {ours.main.tightness:.1f} times without.",
        highlight=False,
    )
