"""`weft demo`: a small cluster on this machine, an agent's session through it over HTTP, and a table of what came of it.

The session (`data/agent_session.jsonl`) is reenacted twice, each time on a cluster that starts empty: routed by predicted time,
and routed round robin. Both are run, not computed, so both columns are measurements of this machine.
"""

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import quantiles

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from orchestrator.cli.cluster_file import AGENT_SESSION, LOCAL_CLUSTER, read_cluster
from orchestrator.cli.reenact import Reenactment, Scale, ScaledTurn, TurnResult, scaled_turns
from orchestrator.cli.serve import quiet_output, start_fleet
from orchestrator.core.config import ClusterConfig, RouterPolicy
from orchestrator.fleet.fleet import Fleet

#: The sample is scaled already; only its pauses are too long for a demo. Token ids from 64 on are ordinary tokens of the built-in
#: model's vocabulary of 512.
SCALE = Scale(block_tokens=16, output=1.0, gap=0.05, token_first=64, token_count=384, gap_s_max=0.5)
POLICIES = {RouterPolicy.PREDICTED_TIME: "by predicted time", RouterPolicy.ROUND_ROBIN: "round robin"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one reenactment came to. Times in seconds."""

    requests: int
    failures: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    #: KV bytes that went from one node to another.
    moved_bytes: int
    seconds: float
    ttft_p50_s: float
    ttft_p90_s: float
    itl_p50_s: float

    @property
    def hit_rate(self) -> float:
        """Share of the input that was not computed."""
        return self.cached_tokens / max(self.input_tokens, 1)


def run_demo(as_json: bool) -> bool:
    """Run the demo and print its table; True if every request was answered. Raises `FleetFailed`."""
    out, err = Console(file=sys.stdout), Console(stderr=True, highlight=False)
    config = read_cluster(LOCAL_CLUSTER)
    config = replace(config, gateway=replace(config.gateway, http_port=0, grpc_port=0))
    turns = scaled_turns(AGENT_SESSION, SCALE)
    outcomes: dict[RouterPolicy, Outcome] = {}
    with quiet_output():
        for policy, words in POLICIES.items():
            routed = replace(config, router=replace(config.router, policy=policy))
            outcomes[policy] = _run(routed, turns, words, err)
    if as_json:
        print(json.dumps({str(policy): asdict(one) | {"hit_rate": one.hit_rate} for policy, one in outcomes.items()}, indent=2))
    else:
        show_outcomes(config, outcomes, out)
    return not any(outcome.failures for outcome in outcomes.values())


def _run(config: ClusterConfig, turns: Sequence[ScaledTurn], words: str, err: Console) -> Outcome:
    """Start a cluster, reenact the session on it and stop it."""
    with Fleet.local(config) as fleet:
        url, *_ = start_fleet(fleet, config, err, threading.Event())
        with _progress(len(turns), words, err) as on_end:
            started = time.perf_counter()
            results = asyncio.run(_reenact(url, next(iter(config.models)), turns, on_end))
            seconds = time.perf_counter() - started
        return _outcome(results, _moved_bytes(url), seconds)


async def _reenact(url: str, model: str, turns: Sequence[ScaledTurn], on_end: Callable[[TurnResult], None]) -> list[TurnResult]:
    return await Reenactment(url, model, turns, on_end).run()


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


def _moved_bytes(url: str) -> int:
    """Return the KV bytes moved so far, as the gateway counts them."""
    page = httpx.get(f"{url}/metrics", trust_env=False).raise_for_status().text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return int(sum(sample.value for sample in samples if sample.name == "weft_kv_moved_bytes_total"))


def _outcome(results: Sequence[TurnResult], moved_bytes: int, seconds: float) -> Outcome:
    good = [result for result in results if not result.failure]
    ttft = [result.ttft_s for result in good]
    itl = [result.itl_s for result in good if result.itl_s is not None]
    return Outcome(
        requests=len(results),
        failures=len(results) - len(good),
        input_tokens=sum(len(result.turn.prompt) for result in good),
        cached_tokens=sum(result.cached_tokens for result in good),
        output_tokens=sum(result.output_tokens for result in good),
        moved_bytes=moved_bytes,
        seconds=seconds,
        ttft_p50_s=_quantile(ttft, 50),
        ttft_p90_s=_quantile(ttft, 90),
        itl_p50_s=_quantile(itl, 50),
    )


def _quantile(values: Sequence[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else sum(values)


def show_outcomes(config: ClusterConfig, outcomes: Mapping[RouterPolicy, Outcome], out: Console) -> None:
    """Print the demo's table."""
    nodes = ", ".join(f"{pool.nodes} {pool.kind}" for pool in config.pools)
    out.print(
        f"One agent session, a main agent and six sub-agents, on {nodes} nodes. Both columns were run here.", highlight=False
    )
    table = Table("", *POLICIES.values())
    rows: dict[str, Callable[[Outcome], str]] = {
        "requests (failed)": lambda one: f"{one.requests} ({one.failures})",
        "input tokens": lambda one: f"{one.input_tokens:,}",
        "  cached": lambda one: f"{one.cached_tokens:,}",
        "  computed": lambda one: f"{one.input_tokens - one.cached_tokens:,}",
        "hit rate": lambda one: f"{one.hit_rate:.1%}",
        "KV moved between nodes": lambda one: f"{one.moved_bytes / 1e6:.1f} MB",
        "output tokens": lambda one: f"{one.output_tokens:,}",
        "TTFT p50": lambda one: f"{1000 * one.ttft_p50_s:.0f} ms",
        "TTFT p90": lambda one: f"{1000 * one.ttft_p90_s:.0f} ms",
        "inter-token time p50": lambda one: f"{1000 * one.itl_p50_s:.1f} ms",
        "session took": lambda one: f"{one.seconds:.1f} s",
    }
    for name, text in rows.items():
        table.add_row(name, *(text(outcomes[policy]) for policy in POLICIES))
    out.print(table)
    ours, theirs = (outcomes[policy] for policy in POLICIES)
    moved, waited = theirs.moved_bytes / max(ours.moved_bytes, 1), theirs.ttft_p50_s / max(ours.ttft_p50_s, 1e-9)
    computed = (theirs.input_tokens - theirs.cached_tokens) / max(ours.input_tokens - ours.cached_tokens, 1)
    cost = f"{computed:.1f} times the prompt tokens computed, {moved:.1f} times the KV moved, {waited:.1f} times the median TTFT"
    out.print(f"What round robin cost: {cost}.", highlight=False)
