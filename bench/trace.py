"""Hit rate and balance of `weft serve` under real agent sessions, against one node that forgets nothing, and round robin.

    python -m bench.trace [--sessions 16] [--json FILE]
    python -m bench.trace --tiers [--sessions 16] [--json FILE]

Reenacts a recorded mix of coding-agent sessions (`data/agent_mix.jsonl.gz`), lengths scaled to 1/16, closed loop over HTTP: on
two prefill and two decode nodes routed by predicted time, on the same nodes routed round robin, and on one node with room
for all. Each of the four nodes holds less than all sessions together need, so that placement matters. With `--tiers` it is one
node that holds a quarter of the working set, with tiers below it and hints against without (`trace_tiers.py`).
"""

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from bench.agent_mix import BLOCK_TOKENS, NODE_SHARE, SCALE, TRACE, distinct_blocks, kept
from bench.servers import Server, weft_server
from bench.trace_tiers import run_tiers
from orchestrator.cli.reenact import Reenactment, ScaledTurn, TurnResult, scaled_turns

ENGINE = "engine = {{ threads = 1, block_tokens = {block_tokens}, blocks = {blocks} }}"
SCHEDULER = "scheduler = { step_tokens_max = 512, sequences_max = 64 }"
PROFILE = "profile = { step_s = 0.004, prefill_token_s = 5e-5, prefill_token_context_s = 1e-8, sequence_s = 5e-4 }"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One reenactment. `node_load_max` is the busiest node's computed tokens over the mean of its pool."""

    name: str
    requests: int
    failures: int
    input_tokens: int
    cached_tokens: int
    ttft_p50_s: float
    ttft_p90_s: float
    seconds: float
    node_load_max: float
    computed_by_node: dict[str, int]

    @property
    def hit_rate(self) -> float:
        """Share of the input tokens that were not computed."""
        return self.cached_tokens / self.input_tokens


def pool(name: str, kind: str, nodes: int, blocks: int) -> str:
    """Return one [[pools]] table."""
    engine = ENGINE.format(block_tokens=BLOCK_TOKENS, blocks=blocks)
    return f'[[pools]]\nname = "{name}"\nkind = "{kind}"\nnodes = {nodes}\n{engine}\n{SCHEDULER}\n{PROFILE}\n'


def split_cluster(policy: str, blocks: int) -> str:
    """Return a cluster file with two prefill and two decode nodes."""
    pools = pool("prefill", "prefill", 2, blocks) + pool("decode", "decode", 2, blocks)
    return f'[router]\npolicy = "{policy}"\n\n[models.default]\n\n{pools}'


def run(name: str, cluster: str, turns: Sequence[ScaledTurn]) -> Outcome:
    """Serve a cluster file and reenact the turns on it."""
    done = 0

    def on_end(result: TurnResult) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\r{name}: {done} of {len(turns)} turns", end="", file=sys.stderr, flush=True)
        if result.failure:
            print(f"{name}: turn {result.turn.id}: {result.failure}", file=sys.stderr)

    with weft_server(cluster) as server:
        results = asyncio.run(_reenact(server, turns, on_end))
        nodes = httpx.get(f"{server.url}/status", trust_env=False).raise_for_status().json()["nodes"]
    return _outcome(name, results, {node["node"]: (node["pool"], node["computed_tokens"]) for node in nodes})


async def _reenact(server: Server, turns: Sequence[ScaledTurn], on_end: Callable[[TurnResult], None]) -> list[TurnResult]:
    return await Reenactment(server.url, "default", turns, on_end).run()


def _outcome(name: str, results: Sequence[TurnResult], nodes: dict[str, tuple[str, int]]) -> Outcome:
    good = [result for result in results if not result.failure]
    pools: dict[str, list[int]] = {}
    for where, computed in nodes.values():
        pools.setdefault(where, []).append(computed)
    ttft = statistics.quantiles([result.ttft_s for result in good], n=10)
    return Outcome(
        name=name,
        requests=len(results),
        failures=len(results) - len(good),
        input_tokens=sum(len(result.turn.prompt) for result in good),
        cached_tokens=sum(result.cached_tokens for result in good),
        ttft_p50_s=ttft[4],
        ttft_p90_s=ttft[8],
        seconds=max(result.ended_s for result in results),
        node_load_max=max(max(loads) / max(statistics.mean(loads), 1) for loads in pools.values()),
        computed_by_node={node: computed for node, (_, computed) in nodes.items()},
    )


def table(outcomes: Sequence[Outcome], best: Outcome) -> Table:
    """Return the reenactments beside each other."""
    shown = Table(title="real agent sessions, lengths / 16")
    columns = ("", "requests", "hit rate", "of infinite cache", "computed tokens", "ttft p50", "p90", "took", "busiest / mean")
    for column in columns:
        shown.add_column(column, justify="right")
    for one in outcomes:
        shown.add_row(
            one.name,
            f"{one.requests} ({one.failures} failed)",
            f"{one.hit_rate:.2%}",
            f"{one.hit_rate / best.hit_rate:.2%}",
            str(one.input_tokens - one.cached_tokens),
            f"{one.ttft_p50_s * 1e3:.0f} ms",
            f"{one.ttft_p90_s * 1e3:.0f} ms",
            f"{one.seconds:.0f} s",
            f"{one.node_load_max:.2f}",
        )
    return shown


def main(arguments: Sequence[str]) -> int:
    """Reenact on all three clusters, print the table, write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.trace", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=16, help="sessions of the trace to reenact (default 16, all)")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--tiers", action="store_true", help="with tiers and hints against without instead, live and simulated")
    options = parser.parse_args(arguments)
    if options.tiers:
        return run_tiers(options.sessions, options.json)
    turns = kept(scaled_turns(TRACE, SCALE), options.sessions)
    blocks = distinct_blocks(turns)
    share = int(blocks * NODE_SHARE)
    clusters = {
        "one node, all fits": f"[models.default]\n\n{pool('all', 'aggregated', 1, 2 * blocks)}",
        "predicted time": split_cluster("predicted-time", share),
        "round robin": split_cluster("round-robin", share),
    }
    print(f"{len(turns)} turns, {blocks} distinct blocks, {share} on each of four nodes", flush=True)
    outcomes = [run(name, cluster, turns) for name, cluster in clusters.items()]
    Console(width=140).print(table(outcomes, outcomes[0]))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in outcomes], indent=1))
    return 1 if any(one.failures for one in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
