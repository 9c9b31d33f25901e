"""Runs a trace through a cluster in virtual time and makes of it the figures that people compare.

    field                           unit       what it is
    policy, cache                              how nodes were chosen; which unused KV blocks were forgotten first
    requests, completed             count      requests in the trace; those that ended well. All below is of completed ones
    input_tokens                    tokens     prompts, whether computed or not
    cached_tokens                   tokens     part of the prompts that was not computed, on whichever node it lay
    hit_rate                        0 to 1     cached_tokens / input_tokens
    hit_rate_by_tier                0 to 1     its parts: hbm (a node's own or a peer's), cpu and cmx (loaded from a store)
      {hbm, cpu, cmx}
    output_tokens                   tokens     generated
    ttft_s {p50, p90, p99}          s          from a request's arrival to its first token
    itl_s {p50, p90, p99}           s          between two tokens of one request, each pair counted once, failed requests' too
    tokens_per_s_per_user           tokens/s   tokens after the first over the time they took, one value a request of two tokens;
      {p50, p10}                               p10: nine requests in ten are faster, the slow tail
    session_s {p50, p90, mean}      s          from a session's first arrival to its last end, pauses of tools and users included,
                                               only of sessions that completed wholly; a request of no session is its own
    tokens_per_s_per_gpu            tokens/s   output_tokens / duration_s / GPUs of all pools
    usd_per_million_output_tokens   USD        price of all nodes for duration_s, idle ones too, over output_tokens
    usd_per_million_tokens          USD        the same price over input_tokens + output_tokens, cached ones counted
    kwh_per_million_tokens          kWh        energy of all nodes at full power for duration_s, over input_tokens + output_tokens
    pools {name: ...}                          see `_pool`
    stores                                     of all hosts, see `_stores`; null where there are none
    duration_s, wall_s              s          virtual time from the first arrival to the last end; time that simulating took
    failures {reason: count}                   requests that did not complete
    restarted, resumed              count      times that requests, failed ones too, were started over before a first token, or
                                               went on elsewhere after it, because a node was lost
    replayed_tokens                 tokens     of outputs, that nodes were given to go on from
    assumptions                                names of the unpublished numbers that went into it

What cannot be said is null: percentiles of nothing, prices and energy unless every pool has hardware.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import fmean
from typing import Any

from orchestrator.core.config import CachePolicy, ClusterConfig, PoolConfig, RouterPolicy
from orchestrator.core.types import PoolName
from orchestrator.profiles.resolve import PoolHardware, Resolved
from orchestrator.sim.faults import Faults
from orchestrator.sim.hints import HintProgram
from orchestrator.sim.outcome import BeatUse, Distribution, Outcome, PoolSample, PoolUse, Served, StoreUse
from orchestrator.sim.world import World, WorldOptions
from orchestrator.traces import TracedTurn

S_PER_H = 3600.0


class CacheRule(StrEnum):
    """Which unused blocks are forgotten first: what nodes can do, least often used, and the optimum that knows the future."""

    LRU = "lru"
    LFU = "lfu"
    VALUE = "value"
    OPTIMAL = "optimal"


@dataclass(frozen=True, slots=True)
class Run:
    """One trace through one cluster under one policy."""

    #: As JSON: see this file's table.
    figures: dict[str, Any]
    outcome: Outcome


def simulate(
    resolved: Resolved,
    turns: Sequence[TracedTurn],
    policy: RouterPolicy,
    cache: CacheRule | CachePolicy,
    seed: int,
    progress: Callable[[float], None] | None = None,
    faults: Faults | None = None,
    checks: bool = False,
    hints: HintProgram = HintProgram.NONE,
) -> Run:
    """Run a trace and return its figures; `progress` is told the share of requests that ended.

    `hints` is what agents tell the cluster between their turns. With `faults` things go wrong as that says; with `checks` every
    invariant is checked after every event, which is slow.
    """
    rule = CacheRule(cache)
    options = WorldOptions(seed=seed, frequency_cache=rule is CacheRule.LFU, hints=hints, faults=faults, checks=checks)
    chosen = replace(resolved, config=_configured(resolved.config, policy, rule, seed))
    if rule is CacheRule.OPTIMAL:  # when each turn comes hangs on how fast the ones before it were answered
        foreseen = World(chosen, turns, options).run().served
        options = replace(options, optimal_cache=True, order=[one.turn.id for one in foreseen])
    outcome = World(chosen, turns, options).run(progress)
    return Run({"policy": str(policy), "cache": str(rule), **figures(outcome, resolved.hardware)}, outcome)


def _configured(config: ClusterConfig, policy: RouterPolicy, rule: CacheRule, seed: int) -> ClusterConfig:
    """Return a cluster that routes by the policy and forgets by the rule; those that no node has are the world's to impose."""
    router = replace(config.router, policy=policy, seed=seed)
    if rule not in list(CachePolicy):
        return replace(config, router=router)
    pools = tuple(_forgetting(pool, CachePolicy(rule)) for pool in config.pools)
    return replace(config, router=router, pools=pools)


def _forgetting(pool: PoolConfig, rule: CachePolicy) -> PoolConfig:
    return pool if pool.drafter is not None else replace(pool, scheduler=replace(pool.scheduler, cache=rule))


def figures(outcome: Outcome, hardware: Mapping[PoolName, PoolHardware]) -> dict[str, Any]:
    """Return what an outcome amounts to; the fields are in this file's table."""
    completed = [request for request in outcome.served if request.completed]
    inputs = sum(request.turn.input_tokens for request in completed)
    cached = sum(request.cached_tokens for request in completed)
    outputs = sum(request.output_tokens for request in completed)
    ttfts = [request.ttft_s for request in completed if request.ttft_s is not None]
    speeds = [request.tokens_per_s for request in completed if request.tokens_per_s is not None]
    sessions = session_seconds(outcome.served)
    return {
        "requests": len(outcome.served),
        "completed": len(completed),
        "input_tokens": inputs,
        "cached_tokens": cached,
        "hit_rate": _ratio(cached, inputs),
        "hit_rate_by_tier": _tiers(completed, cached, inputs),
        "output_tokens": outputs,
        "ttft_s": percentiles(ttfts, 50, 90, 99),
        "itl_s": _gap_percentiles(outcome.itl_s, 50, 90, 99),
        "tokens_per_s_per_user": percentiles(speeds, 50, 10),
        "session_s": {**percentiles(sessions, 50, 90), "mean": fmean(sessions) if sessions else None},
        **_economics(outcome, hardware, inputs, outputs),
        "pools": {name: _pool(use, outcome.duration_s, hardware.get(name)) for name, use in outcome.pools.items()},
        "stores": _stores(outcome.stores) if outcome.stores is not None else None,
        "duration_s": outcome.duration_s,
        "wall_s": outcome.wall_s,
        "failures": _failures(outcome.served),
        "restarted": sum(request.restarts for request in outcome.served),
        "resumed": sum(request.resumes for request in outcome.served),
        "replayed_tokens": sum(request.replayed_tokens for request in outcome.served),
        "assumptions": sorted({name for pool in hardware.values() for name in pool.assumptions}),
    }


def _tiers(completed: Sequence[Served], cached: int, inputs: int) -> dict[str, float | None]:
    cpu, cmx = sum(request.cpu_tokens for request in completed), sum(request.cmx_tokens for request in completed)
    return {"hbm": _ratio(cached - cpu - cmx, inputs), "cpu": _ratio(cpu, inputs), "cmx": _ratio(cmx, inputs)}


def _stores(use: StoreUse) -> dict[str, Any]:
    """Return the stores' figures.

    `cpu` is the room for blocks in all hosts' memory, and the share of it that held any, in the mean over the run's samples;
    `segments` those in `cmx`, at most; bytes are counts of the whole run.
    """
    held = fmean(use.slots_held or [0])
    return {
        "hosts": use.hosts,
        "cpu": {"blocks": use.slots, "held": _ratio(held, use.slots)},
        "segments": max(use.segments, default=0),
        "offered_bytes": use.offered_bytes,
        "loaded_bytes": use.loaded_bytes,
        "cmx_written_bytes": use.cmx_written_bytes,
        "cmx_read_bytes": use.cmx_read_bytes,
    }


def _failures(served: Sequence[Served]) -> dict[str, int]:
    reasons = Counter(failure_kind(request) for request in served if not request.completed)
    return dict(sorted(reasons.items()))


def failure_kind(request: Served) -> str:
    """Return why a request did not complete, without the numbers that are its own."""
    return (request.failure or "unfinished").partition(":")[0]


def session_seconds(served: Sequence[Served]) -> list[float]:
    """Return how long each session took whose every request completed, pauses included."""
    sessions: dict[str, list[Served]] = {}
    for request in served:
        sessions.setdefault(request.turn.session, []).append(request)
    return [
        max(request.ended_s or 0.0 for request in requests) - min(request.arrived_s for request in requests)
        for requests in sessions.values()
        if all(request.completed for request in requests)
    ]


def percentiles(values: Sequence[float], *wanted: int) -> dict[str, float | None]:
    """Return percentiles by name (`p50`), with linear interpolation between the two nearest values; None of nothing."""
    ordered = sorted(values)
    return {f"p{percent}": _percentile(ordered, percent / 100) if ordered else None for percent in wanted}


def _percentile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _gap_percentiles(gaps: Distribution, *wanted: int) -> dict[str, float | None]:
    return {f"p{percent}": gaps.percentile(percent / 100) if gaps.weight else None for percent in wanted}


def _economics(outcome: Outcome, hardware: Mapping[PoolName, PoolHardware], inputs: int, outputs: int) -> dict[str, float | None]:
    """Return throughput of a GPU, price and energy of tokens; None throughout unless every pool has hardware."""
    names = ("tokens_per_s_per_gpu", "usd_per_million_output_tokens", "usd_per_million_tokens", "kwh_per_million_tokens")
    if not set(outcome.pools) <= set(hardware):
        return dict.fromkeys(names)
    hours = outcome.duration_s / S_PER_H
    gpus = _over_nodes(outcome.pools, {name: pool.gpus for name, pool in hardware.items()})
    usd = _over_nodes(outcome.pools, {name: pool.usd_per_hour for name, pool in hardware.items()}) * hours
    kwh = _over_nodes(outcome.pools, {name: pool.kw for name, pool in hardware.items()}) * hours
    values = (
        _ratio(outputs, outcome.duration_s * gpus),
        _ratio(usd * 1e6, outputs),
        _ratio(usd * 1e6, inputs + outputs),
        _ratio(kwh * 1e6, inputs + outputs),
    )
    return dict(zip(names, values, strict=True))


def _over_nodes(pools: Mapping[PoolName, PoolUse], per_node: Mapping[PoolName, float]) -> float:
    return sum(use.nodes * per_node[name] for name, use in pools.items())


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _pool(use: PoolUse, duration_s: float, hardware: PoolHardware | None) -> dict[str, Any]:
    """Return a pool's figures.

    `utilisation` is the share of node time in which a step ran; `queue` and `running` are requests that wait on its nodes and
    run there, in the mean and at most over the run's samples; `kv` is the share of its blocks that hold running contexts
    (`used`) or contexts kept for later (`cached`), in the mean; tokens and bytes are counts of the whole run.
    """
    samples = use.samples or [PoolSample(0.0, 0, 0, 0, 0, 0)]
    used = fmean(sample.blocks_used for sample in samples)
    cached = fmean(sample.blocks_cached for sample in samples)
    return {
        "nodes": use.nodes,
        "utilisation": _ratio(use.busy_s, use.nodes * duration_s),
        "queue": {"mean": fmean(sample.waiting for sample in samples), "max": max(sample.waiting for sample in samples)},
        "running": {"mean": fmean(sample.running for sample in samples), "max": max(sample.running for sample in samples)},
        "kv": {"blocks": use.blocks, "used": _ratio(used, use.blocks), "cached": _ratio(cached, use.blocks)},
        "prefill_tokens": use.prefill_tokens,
        "output_tokens": use.output_tokens,
        "fetched_bytes": use.fetched_bytes,
        "preemptions": use.preemptions,
        "drafted_tokens": use.drafted_tokens,
        "accepted_tokens": use.accepted_tokens,
        "prefetched_blocks": use.prefetched_blocks,
        "prefetch_used_blocks": use.prefetch_used_blocks,
        "prefetch_wasted_blocks": use.prefetch_wasted_blocks,
        "experts": _experts(hardware),
        "split": _split(use, duration_s) if use.split is not None else None,
        "beat": _beat(use.beat) if use.beat is not None else None,
    }


def _experts(hardware: PoolHardware | None) -> dict[str, float] | None:
    """Return by how much the busiest chip's expert work exceeds the mean, spread by number and placed by load, as shares."""
    balance = hardware.machine.balance if hardware is not None and hardware.machine is not None else None
    return None if balance is None else {"spread": balance.spread, "placed": balance.placed}


def _beat(use: BeatUse) -> dict[str, Any]:
    """Return the figures of a pool that keeps a beat.

    `beats` had somebody in a slot, `missed` of them had more work than fits; `slots` are those taken, `work` the share of a
    beat that their work took, both in the mean.
    """
    return {
        "beat_s": use.beat_s,
        "beats": use.beats,
        "missed": use.missed,
        "slots": _ratio(use.slots, use.beats),
        "work": _ratio(use.work_s, use.beats * use.beat_s),
    }


def _split(use: PoolUse, duration_s: float) -> dict[str, Any]:
    """Return the figures of a pool whose passes have two halves.

    `attention_busy` and `ffn_busy` are the shares of the run in which either half's chips worked, `balance` the first over the
    second (1: neither waits for the other), `hidden` the share of the shorter half and of the hops that micro-batches hid.
    """
    split = use.split
    assert split is not None, "a pool without halves has no figures of them"
    return {
        "microbatches": split.microbatches,
        "attention_busy": _ratio(split.attention_s, use.nodes * duration_s),
        "ffn_busy": _ratio(split.ffn_s, use.nodes * duration_s),
        "balance": _ratio(split.attention_s, split.ffn_s),
        "hidden": split.hidden_share,
    }
