"""Measures how fast the simulator is: requests simulated a second of CPU time, beside Dynamo's offline replay of the same trace.

    python -m bench.simulate [--trace FILE ...] [--nodes N] [--quick] [--json FILE]

DYNAMO_PYTHON names the python of an environment with ai-dynamo; without it only our side is measured. Both sides route by cached
prefixes and, as a second row, round robin, over equal nodes of equal KV capacity, and get the trace's recorded arrivals (no side
waits for dependencies here, because Dynamo's replay cannot). Times are CPU times of all of a process's threads, so that
what else runs disturbs them little. They cover reading the trace, simulating and the summary; the sides take turns, so that both
see the same machine. Besides: what twice the output and twice the requests cost, which shows
that time goes by requests and not by tokens.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.agent_mix import TRACE
from orchestrator.cli.sweeps import copies
from orchestrator.core.config import (
    ClusterConfig,
    EngineConfig,
    LimitsConfig,
    PoolConfig,
    RouterConfig,
    RouterPolicy,
    SchedulerConfig,
)
from orchestrator.core.types import CostProfile, PoolKind
from orchestrator.profiles.resolve import Resolved
from orchestrator.sim.world import World, WorldOptions
from orchestrator.traces import TracedTurn, read_trace

#: About one H200 with a model of eight billion parameters: step times of the order that Dynamo's mocker takes.
PROFILE = CostProfile(0.005, 2e-5, 2e-10, 2e-5, 2e-8, fetch_bytes_per_s=5e10)
CAPACITY_TOKENS = 2 << 20
STEP_TOKENS_MAX = 8192
MODES = {"kv_router": RouterPolicy.PREDICTED_TIME, "round_robin": RouterPolicy.ROUND_ROBIN}


def cluster(nodes: int, block: int, policy: RouterPolicy) -> Resolved:
    """Return equal nodes that do everything, as many blocks in each as Dynamo's get."""
    pool = PoolConfig(
        name="nodes",
        kind=PoolKind.AGGREGATED,
        nodes=nodes,
        engine=EngineConfig(name="profiled", block_tokens=block, blocks=CAPACITY_TOKENS // block),
        scheduler=SchedulerConfig(step_tokens_max=STEP_TOKENS_MAX, sequences_max=256),
        profile=PROFILE,
    )
    limits = LimitsConfig(waiting_s_max=3600.0, request_s_max=3600.0, tenant_requests_max=1_000_000, waiting_max=1_000_000)
    return Resolved(ClusterConfig(pools=(pool,), router=RouterConfig(policy=policy), limits=limits), {})


def open_loop(turns: Sequence[TracedTurn]) -> list[TracedTurn]:
    """Return the turns at their recorded times, depending on nothing."""
    return [replace(turn, after=(), gap_s=0.0) for turn in turns]


def simulate(turns: Sequence[TracedTurn], resolved: Resolved, answers_return: bool = True) -> tuple[float, float, int]:
    """Return CPU seconds, hit rate and completed requests of one run."""
    start = time.process_time()
    served = World(resolved, turns, WorldOptions(answers_return=answers_return)).run().served
    done = [one for one in served if one.completed]
    cached, tokens = sum(one.cached_tokens for one in done), sum(one.turn.input_tokens for one in done)
    return time.process_time() - start, cached / max(1, tokens), len(done)


def write_mooncake(turns: Sequence[TracedTurn], path: Path) -> int:
    """Write turns as Mooncake JSONL, which Dynamo reads; return its block size. Unnamed last blocks get names of their own."""
    size = turns[0].block_tokens
    with path.open("w", encoding="utf-8") as file:
        for turn in turns:
            names = turn.blocks
            names += [(1 << 40) + turn.id * 65536 + index for index in range(len(names), -(-turn.input_tokens // size))]
            line = {"timestamp": int(turn.arrival_s * 1e3), "input_length": turn.input_tokens}
            file.write(json.dumps(line | {"output_length": max(1, turn.output_tokens), "hash_ids": names}) + "\n")
    return size


def measure_dynamo(path: Path, trace_block: int, cases: list[dict[str, Any]], repetitions: int) -> list[dict[str, Any]]:
    """Return Dynamo's figures for each case, none without DYNAMO_PYTHON."""
    python = os.environ.get("DYNAMO_PYTHON")
    if not python:
        return []
    plan = {"path": str(path), "trace_block": trace_block, "repetitions": repetitions, "cases": cases}
    script = Path(__file__).with_name("simulate_dynamo.py")
    run = subprocess.run([python, str(script)], input=json.dumps(plan), capture_output=True, text=True, check=False, timeout=900)
    if run.returncode != 0:
        raise SystemExit(f"{python} {script.name} failed:\n{run.stderr[-2000:]}")
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def compare(path: Path, nodes: int, repetitions: int) -> list[dict[str, Any]]:
    """Measure both sides on one trace."""
    start = time.process_time()
    turns = open_loop(list(read_trace(path)))
    read_s = time.process_time() - start
    trace_block = next(turn.block_tokens for turn in turns)
    blocks = sorted({64, trace_block})
    cases = [
        {"nodes": nodes, "block": block, "capacity_tokens": CAPACITY_TOKENS, "mode": mode} for block in blocks for mode in MODES
    ]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        mooncake = Path(folder) / "trace.jsonl"
        write_mooncake(turns, mooncake)
        for case in cases:
            theirs: list[dict[str, Any]] = []
            ours: list[tuple[float, float, int]] = []
            for _ in range(repetitions):
                theirs += measure_dynamo(mooncake, trace_block, [case], 1)
                ours.append(simulate(turns, cluster(nodes, case["block"], MODES[case["mode"]])))
            cpu_s = statistics.median(run[0] for run in ours) + read_s
            row = {"trace": path.name, **case, "requests": ours[0][2], "cpu_s": cpu_s, "requests_per_s": ours[0][2] / cpu_s}
            row["hit"] = ours[0][1]
            if theirs:
                dynamo_s = statistics.median(run["cpu_s"][0] for run in theirs)
                row |= {"dynamo_cpu_s": dynamo_s, "dynamo_requests_per_s": theirs[0]["requests"] / dynamo_s}
                row |= {"dynamo_hit": theirs[0]["hit"], "faster": dynamo_s / cpu_s}
            rows.append(row)
            print(shown(row), flush=True)
    return rows


def shown(row: dict[str, Any]) -> str:
    ours = f"{row['requests_per_s']:>7,.0f} requests/s, {row['hit']:6.2%} hits"
    text = f"{row['trace']:<34} {row['nodes']} nodes, blocks of {row['block']:>3}, {row['mode']:<11}: {ours}"
    if "faster" in row:
        text += f"; Dynamo {row['dynamo_requests_per_s']:>6,.0f}, {row['dynamo_hit']:6.2%}: {row['faster']:.2f}x"
    return text


def scaling(path: Path, nodes: int, repetitions: int) -> dict[str, Any]:
    """Measure what twice the output, and twice the requests on twice the nodes, cost in CPU time: the least of all runs.

    Recorded prompts hold the recorded answers and not longer ones: here no answer is looked for in the prompt after it.
    """
    turns = list(read_trace(path))
    block = next(turn.block_tokens for turn in turns)
    longer = [replace(turn, output_tokens=2 * turn.output_tokens) for turn in turns]
    cases = {"once": (turns, nodes), "output": (longer, nodes), "requests": (copies(turns, 2, 0), 2 * nodes)}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, (asked, count) in cases.items():
            times[name].append(simulate(asked, cluster(count, block, RouterPolicy.PREDICTED_TIME), answers_return=False)[0])
    output, requests = (min(times[name]) / min(times["once"]) for name in ("output", "requests"))
    print(f"{path.name}: twice the output {output:.2f}x the time, twice the requests on twice the nodes {requests:.2f}x")
    return {"trace": path.name, "output": output, "requests": requests}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trace", type=Path, action="append", metavar="FILE", help=f"default: {TRACE.name}")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="once instead of three times")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    repetitions = 1 if arguments.quick else 3
    paths: list[Path] = arguments.trace or [TRACE]
    figures = {
        "python": sys.version,
        "speed": [row for path in paths for row in compare(path, arguments.nodes, repetitions)],
        "scaling": [scaling(path, arguments.nodes, repetitions) for path in paths],
    }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
