"""Measures rules of eviction: agents' sessions whose contexts do not fit, under each rule and with the future known.

    python -m bench.cache_policy [--trace FILE ...] [--share S] [--load N] [--limit N] [--nodes N] [--starts N]
                                 [--json FILE]

Each trace goes through the simulator, closed loop, over the nodes and the cluster that serve live, once for each rule,
and for ours with what agents may tell between their turns (`orchestrator/sim/hints.py`). All nodes
together hold a share of the trace's working set (`orchestrator/sim/bounds.py`), a quarter unless told otherwise; one node, so
that rules of eviction are compared and not rules of routing. Saved seconds are those that computing every prompt from its first
token would have taken, less those of what was not cached: deep tokens weigh more than shallow ones. All times are virtual, and so
every figure is the same on every machine. Copied sessions start at random: of those the mean over several such starts is shown,
since the order of a few turns moves a figure by as much as rules differ.

Then all of it again with a store below the nodes, whose `cpu` holds twice as much as they do and whose `cmx` holds everything:
what a rule forgets comes back by a copy there, and the seconds of those copies count against what was saved.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from bench.agent_mix import TRACE
from bench.simulate import STEP_TOKENS_MAX
from orchestrator.cli.workload import read_workload
from orchestrator.core.config import (
    ClusterConfig,
    EngineConfig,
    LimitsConfig,
    PoolConfig,
    RouterPolicy,
    SchedulerConfig,
    StoreConfig,
)
from orchestrator.core.cost.costs import prompt_seconds
from orchestrator.core.types import CostProfile, PoolKind, PoolName
from orchestrator.profiles.resolve import Below, Resolved
from orchestrator.sim.bounds import infinite_cache, offline_optimum, working_set_tokens
from orchestrator.sim.hints import HintProgram
from orchestrator.sim.outcome import Served
from orchestrator.sim.runs import CacheRule, simulate
from orchestrator.traces import TracedTurn

ARTICLE_SESSION = Path(__file__).parent / "article" / "data" / "seed_session.jsonl.gz"
#: What is run unless traces are named: (file, copies of its sessions).
DEFAULT_TRACES = ((TRACE, 1), (ARTICLE_SESSION, 12))
BLOCK_TOKENS = 64
#: Of the order of eight H200 that share a model of eight billion parameters: fast enough that requests rarely wait for each
#: other, so that it is rules of eviction that are measured and not queues.
PROFILE = CostProfile(0.002, 2.5e-6, 2.5e-11, 5e-6, 5e-9)
#: Bytes of that model's KV a token (32 layers, 8 heads of 128 numbers, bfloat16), and what brings them: 50 GB/s for each card
#: from its host's memory, one port of 400 Gbit/s for the host from storage. `cpu` holds so many times what the nodes do.
TOKEN_BYTES = 2 * 32 * 8 * 128 * 2
CPU_BYTES_PER_S, CMX_BYTES_PER_S, CMX_LATENCY_S = 400e9, 50e9, 1e-3
CPU_OF_HBM = 2
SEED = 0


@dataclass(frozen=True, slots=True)
class Result:
    """One rule on one trace."""

    rule: str
    hit_rate: float
    #: What was found in the node's own memory, in `cpu` and in `cmx`.
    by_tier: dict[str, float]
    saved_s: float
    session_s: float
    prefill_tokens: int
    failed: int


def cluster(nodes: int, capacity_tokens: int, tiers: bool = False) -> Resolved:
    """Return equal nodes that do everything and hold so many tokens together, perhaps with a store below."""
    pool = PoolConfig(
        name="nodes",
        kind=PoolKind.AGGREGATED,
        nodes=nodes,
        engine=EngineConfig(name="profiled", block_tokens=BLOCK_TOKENS, blocks=capacity_tokens // nodes // BLOCK_TOKENS),
        scheduler=SchedulerConfig(step_tokens_max=STEP_TOKENS_MAX, sequences_max=256),
        profile=PROFILE,
    )
    limits = LimitsConfig(waiting_s_max=1e6, request_s_max=1e6, tenant_requests_max=1_000_000, waiting_max=1_000_000)
    if not tiers:
        return Resolved(ClusterConfig(pools=(pool,), limits=limits), {})
    block_bytes = BLOCK_TOKENS * TOKEN_BYTES
    store = StoreConfig(
        cpu_bytes=CPU_OF_HBM * capacity_tokens * TOKEN_BYTES,
        cmx="file:///cmx",
        cmx_bytes=1 << 62,
        offers_bytes_max=1 << 36,
        moves_bytes_max=1 << 34,
        cpu_bytes_per_s=CPU_BYTES_PER_S,
        cmx_bytes_per_s=CMX_BYTES_PER_S,
        cmx_latency_s=CMX_LATENCY_S,
    )
    below = Below(None, CPU_BYTES_PER_S, PROFILE.fetch_latency_s, CMX_BYTES_PER_S, CMX_LATENCY_S, block_bytes, block_bytes)
    return Resolved(ClusterConfig(pools=(pool,), limits=limits, store=store), {}, {PoolName(pool.name): below})


def saved_seconds(served: Sequence[Served]) -> float:
    """Return the seconds of prefill that cached tokens have saved, less those in which they came from a store."""
    completed = [one for one in served if one.completed]
    copied_s = sum(one.cpu_tokens / CPU_BYTES_PER_S + one.cmx_tokens / CMX_BYTES_PER_S for one in completed) * TOKEN_BYTES
    computed_s = sum(
        prompt_seconds(PROFILE, one.turn.input_tokens, 0, STEP_TOKENS_MAX)
        - prompt_seconds(PROFILE, one.turn.input_tokens - one.cached_tokens, one.cached_tokens, STEP_TOKENS_MAX)
        for one in completed
    )
    return computed_s - copied_s


def measure(turns: Sequence[TracedTurn], resolved: Resolved, rule: CacheRule, hints: HintProgram = HintProgram.NONE) -> Result:
    """Run a trace under a rule."""
    run = simulate(resolved, turns, RouterPolicy.PREDICTED_TIME, rule, SEED, hints=hints)
    figures = run.figures
    return Result(
        rule=str(rule) if hints is HintProgram.NONE else f"{rule}, {hints} hints",
        hit_rate=figures["hit_rate"],
        by_tier=figures["hit_rate_by_tier"],
        saved_s=saved_seconds(run.outcome.served),
        session_s=figures["session_s"]["mean"],
        prefill_tokens=sum(pool["prefill_tokens"] for pool in figures["pools"].values()),
        failed=figures["requests"] - figures["completed"],
    )


def mean(results: Sequence[Result]) -> Result:
    """Return what several runs of one rule came to on average; failures are added up."""
    return Result(
        rule=results[0].rule,
        hit_rate=fmean(one.hit_rate for one in results),
        by_tier={tier: fmean(one.by_tier[tier] for one in results) for tier in results[0].by_tier},
        saved_s=fmean(one.saved_s for one in results),
        session_s=fmean(one.session_s for one in results),
        prefill_tokens=round(fmean(one.prefill_tokens for one in results)),
        failed=sum(one.failed for one in results),
    )


def compare(path: Path, load: int, limit: int | None, share: float, nodes: int, starts: int) -> dict[str, object]:
    """Run a trace under every rule, print the comparison and return it."""
    workloads = [read_workload(str(path), limit, SEED + start, load).turns for start in range(starts if load > 1 else 1)]
    turns = workloads[0]
    whole = working_set_tokens(turns)
    capacity = int(share * whole)
    longest = max(turn.input_tokens + turn.output_tokens for turn in turns)
    if capacity // nodes < longest + BLOCK_TOKENS:
        problem = f"{nodes} nodes that hold {capacity:,} tokens together do not hold its longest context of {longest:,}"
        raise SystemExit(f"{path}: {problem}; give a greater --load or --share")
    endless, best = infinite_cache(turns), offline_optimum(turns, capacity)
    print(
        f"{path.name} x{load}: {len(turns):,} requests, working set {whole:,} tokens, {nodes} nodes hold {capacity:,}; "
        f"hits of an endless cache {endless.hit_rate:.2%}, in recorded order at most {best.hit_rate:.2%}"
    )
    rules = {tiers: _rules(workloads, share, nodes, tiers) for tiers in (False, True)}
    return {
        "trace": path.name,
        "load": load,
        "starts": len(workloads),
        "requests": len(turns),
        "working_set_tokens": whole,
        "capacity_tokens": capacity,
        "nodes": nodes,
        "endless_hit_rate": endless.hit_rate,
        "offline_hit_rate": best.hit_rate,
        "rules": [asdict(result) for result in rules[False]],
        "rules_with_tiers": [asdict(result) for result in rules[True]],
    }


def _rules(workloads: Sequence[Sequence[TracedTurn]], share: float, nodes: int, tiers: bool) -> list[Result]:
    """Run the workloads under every rule and print what came of it."""
    clusters = [cluster(nodes, int(share * working_set_tokens(one)), tiers) for one in workloads]

    def measured(rule: CacheRule, hints: HintProgram = HintProgram.NONE) -> Result:
        return mean([measure(one, resolved, rule, hints) for one, resolved in zip(workloads, clusters, strict=True)])

    results = [measured(rule) for rule in CacheRule]
    results[-1:-1] = [measured(CacheRule.VALUE, hints) for hints in list(HintProgram)[1:]]
    by_rule = {result.rule: result for result in results}
    lru, optimum = by_rule[CacheRule.LRU], by_rule[CacheRule.OPTIMAL]
    print(f"  with {CPU_OF_HBM}x of that in cpu, the rest in cmx" if tiers else "  without tiers below")
    for one in results:
        saved, session = one.saved_s / lru.saved_s, one.session_s / lru.session_s
        found = " + ".join(f"{one.by_tier[tier]:.2%}" for tier in one.by_tier) if tiers else f"{one.hit_rate:.2%}"
        print(
            f"    {one.rule:<20} hits {found:>24}  saved {one.saved_s:9.1f} s = {saved:.4f} of lru, "
            f"{one.saved_s / optimum.saved_s:.3f} of optimal  mean session {one.session_s:8.1f} s = {session:.4f} of lru"
            f"  computed {one.prefill_tokens:,}" + (f"  FAILED {one.failed}" if one.failed else ""),
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trace", type=Path, action="append", metavar="FILE", help="default: the samples in the repository")
    parser.add_argument("--share", type=float, default=0.25, help="of the working set that the nodes hold (default 0.25)")
    parser.add_argument("--load", type=int, default=1, help="copies of the named traces' sessions, from random moments on")
    parser.add_argument("--limit", type=int, help="only the first so many requests")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--starts", type=int, default=4, help="random starts of copied sessions, over which to average")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    traces = [(path, arguments.load) for path in arguments.trace] if arguments.trace else DEFAULT_TRACES
    figures = [compare(path, load, arguments.limit, arguments.share, arguments.nodes, arguments.starts) for path, load in traces]
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
