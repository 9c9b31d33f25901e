"""Dynamo's side of the simulation measurement: run by bench/simulate.py with the python named by DYNAMO_PYTHON.

Needs ai-dynamo and ai-dynamo-runtime and nothing of this repository. Takes one JSON object on standard input: `path` (Mooncake
JSONL), `trace_block`, `repetitions`, and `cases` (each `nodes`, `block`, `capacity_tokens`, `mode`); prints one for each case.
"""

import json
import os
import sys
import time

os.environ.setdefault("DYN_LOG", "error")  # below that the router writes a line for every decision

from dynamo.mocker.config import normalize_mocker_config  # pyright: ignore[reportMissingImports]
from dynamo.replay import run_trace_replay  # pyright: ignore[reportMissingImports]


def main() -> None:
    plan = json.load(sys.stdin)
    for case in plan["cases"]:
        engine = {"block_size": case["block"], "num_gpu_blocks": case["capacity_tokens"] // case["block"]}
        times: list[float] = []
        summary = {}
        for _ in range(plan["repetitions"]):
            start = time.process_time()
            report = run_trace_replay(
                plan["path"],
                trace_block_size=plan["trace_block"],
                extra_engine_args=normalize_mocker_config({"engine": engine}),
                num_workers=case["nodes"],
                router_mode=case["mode"],
            )
            times.append(time.process_time() - start)
            summary = report.summary
        figures = {"cpu_s": times, "requests": summary["completed_requests"], "hit": summary["prefix_cache_reused_ratio"]}
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
