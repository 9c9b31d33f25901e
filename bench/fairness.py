"""Measures what a tenant that floods a cluster does to the others.

    python -m bench.fairness [--quick] [--json FILE]

Four tenants have equal shares. Three offer a part of their share each; the fourth offers nothing ("alone") or ten times its
share ("flooded"), Poisson arrivals both times. A share is a quarter of what the cluster completes when one tenant floods it. The
others' TTFT is compared, flooded over alone; beside it stands a cluster in which all four are one tenant, which is what there is
without shares. Two gateways route; nodes and gateways are simulated, with the policies that the live system runs.

Where prefill and decode are apart, a flood costs the others little but the step that is running. Where one node does both, the
flood's answers are in every step of theirs as well, and a step is twice as long however fairly it is filled.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import quantiles
from typing import Any

from orchestrator.core.config import (
    ClusterConfig,
    EngineConfig,
    GatewayConfig,
    LimitsConfig,
    PoolConfig,
    RouterConfig,
    SchedulerConfig,
    TenantConfig,
)
from orchestrator.core.types import CostProfile, PoolKind
from orchestrator.profiles.resolve import Resolved
from orchestrator.sim.outcome import Served
from orchestrator.sim.world import World
from orchestrator.traces import TracedTurn

#: About one H200 with a model of eight billion parameters.
PROFILE = CostProfile(0.005, 2e-5, 2e-10, 2e-5, 2e-8, fetch_bytes_per_s=5e10)
BLOCK_TOKENS = 64
BLOCKS = (2 << 20) // BLOCK_TOKENS
FLOODER = "a"
OTHERS = ("b", "c", "d")
#: What the flooder offers of its share, and what each of the others does.
FLOOD_LOAD = 10.0
LOADS = (0.5, 0.8)
PROMPT_TOKENS = (2_000, 4_000)
OUTPUT_TOKENS = (20, 300)
#: Requests a second that fill any of these clusters.
FILLING_RATE = 200.0
KINDS: dict[str, dict[PoolKind, int]] = {
    "prefill, decode": {PoolKind.PREFILL: 2, PoolKind.DECODE: 2},
    "aggregated": {PoolKind.AGGREGATED: 4},
}


def cluster(kinds: dict[PoolKind, int]) -> Resolved:
    """Return a cluster of profiled nodes behind two gateways, for four tenants."""
    engine = EngineConfig(name="profiled", block_tokens=BLOCK_TOKENS, blocks=BLOCKS)
    pools = tuple(
        PoolConfig(kind.value, kind, nodes=count, engine=engine, scheduler=SchedulerConfig(), profile=PROFILE)
        for kind, count in kinds.items()
    )
    tenants = tuple(TenantConfig(name) for name in (FLOODER, *OTHERS))
    router = RouterConfig(disaggregation_tokens_min=256)
    config = ClusterConfig(gateway=GatewayConfig(count=2), limits=LimitsConfig(), router=router, pools=pools, tenants=tenants)
    return Resolved(config, {})


def arrivals(tenant: str, rate: float, seconds: float, seed: int) -> list[TracedTurn]:
    """Return one tenant's requests, `rate` a second for so long; no two share anything."""
    random = Random(f"{seed} {tenant}")
    made: list[TracedTurn] = []
    at_s = random.expovariate(rate)
    while at_s < seconds:
        prompt, output = random.randint(*PROMPT_TOKENS), random.randint(*OUTPUT_TOKENS)
        made.append(TracedTurn(0, "", "main", at_s, (), 0.0, prompt, output, 0, (), tenant=tenant))
        at_s += random.expovariate(rate)
    return made


def run(resolved: Resolved, streams: Sequence[list[TracedTurn]], told_apart: bool = True) -> dict[str, list[Served]]:
    """Serve the requests of several tenants; return what became of each one's. Not told apart they are one tenant's."""
    turns = sorted((turn for stream in streams for turn in stream), key=lambda turn: (turn.arrival_s, turn.tenant))
    owners = [turn.tenant for turn in turns]
    named = [
        replace(turn, id=number, session=str(number), tenant=turn.tenant if told_apart else OTHERS[0])
        for number, turn in enumerate(turns)
    ]
    served: dict[str, list[Served]] = {owner: [] for owner in sorted(set(owners))}
    for one in World(resolved, named).run().served:
        served[owners[one.turn.id]].append(one)
    return served


def filled_rate(resolved: Resolved, seconds: float) -> float:
    """Return the requests a second that a flooded cluster completes."""
    (served,) = run(resolved, [arrivals(FLOODER, FILLING_RATE, seconds, 0)]).values()
    ended = [one.ended_s for one in served if one.completed and one.ended_s is not None]
    return len(ended) / max(ended)


def figures(served: dict[str, list[Served]]) -> dict[str, float]:
    """Return the others' TTFT, the requests of theirs that failed, and the flooder's completed ones."""
    others = [one for tenant in OTHERS for one in served[tenant]]
    ttfts = [one.ttft_s for one in others if one.ttft_s is not None]
    cuts = quantiles(ttfts, n=100) if len(ttfts) > 1 else [float("nan")] * 99
    return {
        "requests": len(others),
        "failed": sum(not one.completed for one in others),
        "ttft_p50_s": cuts[49],
        "ttft_p99_s": cuts[98],
        "flooder_completed": sum(one.completed for one in served.get(FLOODER, ())),
    }


def measure(kinds: dict[PoolKind, int], load: float, seconds: float) -> dict[str, Any]:
    """Compare the others' times alone, flooded, and flooded without shares."""
    resolved = cluster(kinds)
    share = filled_rate(resolved, min(seconds, 60.0)) / (1 + len(OTHERS))
    others = [arrivals(tenant, load * share, seconds, 1) for tenant in OTHERS]
    flood = arrivals(FLOODER, FLOOD_LOAD * share, seconds, 1)
    return {
        "share_per_s": share,
        "alone": figures(run(resolved, others)),
        "flooded": figures(run(resolved, [*others, flood])),
        "one tenant": figures(run(resolved, [*others, flood], told_apart=False)),
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute of each instead of five")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    seconds = 60.0 if arguments.quick else 300.0
    rows: list[dict[str, Any]] = []
    print(f"{'cluster':<16}{'others offer':>13}{'':>13}{'TTFT p50':>10}{'p99':>10}{'x alone':>9}{'failed':>8}")
    for name, kinds in KINDS.items():
        for load in LOADS:
            row = measure(kinds, load, seconds)
            rows.append({"cluster": name, "load": load, **row})
            for case in ("alone", "flooded", "one tenant"):
                ratio = row[case]["ttft_p99_s"] / row["alone"]["ttft_p99_s"]
                times = f"{row[case]['ttft_p50_s'] * 1e3:>7.0f} ms{row[case]['ttft_p99_s'] * 1e3:>7.0f} ms{ratio:>8.2f}x"
                print(f"{name:<16}{load:>7.0%} share{case:>13}{times}{row[case]['failed']:>8.0f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
