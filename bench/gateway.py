"""Requests and streamed tokens a second through the whole live path, with an engine that takes no time.

    python -m bench.gateway [--seconds 4] [--concurrency 1,16,64,256] [--workload NAME] [--json FILE]

Runs `weft serve` with four profiled nodes and KV-aware routing and loads it over HTTP. With DYNAMO_PYTHON naming the python
of an environment that has ai-dynamo, NVIDIA Dynamo's frontend (KV routing) and four mocker workers are loaded in the same run,
with the same model directory, prompts and client, inside a network namespace that has only loopback.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.load import WORKLOADS, LoadResult, load
from bench.model import make_tiny_model
from bench.servers import Server, dynamo_python, dynamo_server, isolated, reexecute_isolated, weft_server

NODES = 4
CLUSTER = f"""
[models.tiny]

[[pools]]
name = "decode"
model = "tiny"
kind = "aggregated"
nodes = {NODES}
nodes_per_process = {NODES}
engine = {{ name = "profiled", block_tokens = 16, blocks = 65536 }}
scheduler = {{ sequences_max = 1024, step_tokens_max = 16384 }}
"""


def measure(
    server: Server, model: str, words: Sequence[str], workloads: Sequence[str], concurrencies: Sequence[int], seconds: float
) -> list[LoadResult]:
    """Load one server with each workload at every concurrency."""
    results: list[LoadResult] = []
    url = f"{server.url}/v1/chat/completions"
    for workload in (WORKLOADS[name] for name in workloads):
        bodies = workload.bodies(words, model)
        load(url, workload, bodies, 4, 1.0, server.pids)  # fills caches and connections
        for concurrency in concurrencies:
            results.append(load(url, workload, bodies, concurrency, seconds, server.pids))
            print(f"  {server.name:7s} {_line(results[-1])}", flush=True)
    return results


def _line(result: LoadResult) -> str:
    failed = f" failed={result.failed} {result.first_failure}" if result.failed else ""
    return (
        f"{result.workload:9s} c={result.concurrency:<3d} {result.requests_per_s:7.0f} req/s {result.tokens_per_s:8.0f} tok/s "
        f"ttft p50 {result.ttft_p50_ms:6.2f} ms, cpu {result.server_cpu_us_per_token:6.1f} us/token{failed}"
    )


def table(ours: Sequence[LoadResult], peers: Sequence[LoadResult]) -> Table:
    """Return both beside each other with their ratio."""
    shown = Table(title="gateway + nodes, engine at zero cost, KV routing")
    for column in ("load", "c", "weft req/s", "tok/s", "ttft p50/p99 ms", "cpu us/token", "dynamo req/s", "ttft p50 ms", "ratio"):
        shown.add_column(column, justify="right")
    by_load = {(result.workload, result.concurrency): result for result in peers}
    for result in ours:
        peer = by_load.get((result.workload, result.concurrency))
        theirs = (f"{peer.requests_per_s:.0f}", f"{peer.ttft_p50_ms:.2f}") if peer else ("-", "-")
        ratio = f"{result.requests_per_s / max(peer.requests_per_s, 1e-9):.2f}x" if peer else "-"
        shown.add_row(
            result.workload,
            str(result.concurrency),
            f"{result.requests_per_s:.0f}",
            f"{result.tokens_per_s:.0f}",
            f"{result.ttft_p50_ms:.2f}/{result.ttft_p99_ms:.2f}",
            f"{result.server_cpu_us_per_token:.1f}",
            *theirs,
            ratio,
        )
    return shown


def servers(model: Path) -> list[AbstractContextManager[Server]]:
    """Return what is to be measured: ours, and Dynamo if it is installed and can be kept on loopback."""
    found: list[AbstractContextManager[Server]] = [weft_server(CLUSTER, model)]
    python = dynamo_python()
    if python is not None and isolated():
        found.append(dynamo_server(python, model, NODES))
    return found


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table, write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.gateway", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds for each figure (default 4)")
    parser.add_argument("--concurrency", default="1,16,64,256", help="clients at once (default 1,16,64,256)")
    parser.add_argument("--workload", choices=tuple(WORKLOADS), action="append", help="only this one (default: all)")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    if dynamo_python() is not None and not isolated():
        code = reexecute_isolated("bench.gateway", arguments)
        if code is not None:
            return code
        print("no network namespace can be made here: Dynamo is left out", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        model, words = make_tiny_model(Path(folder) / "tiny")
        results: dict[str, list[LoadResult]] = {}
        for server in servers(model):
            with server as started:
                concurrencies = [int(part) for part in options.concurrency.split(",")]
                results[started.name] = measure(
                    started, model.name, words, options.workload or tuple(WORKLOADS), concurrencies, options.seconds
                )
    Console(width=140).print(table(results["weft"], results.get("dynamo", ())))
    if options.json:
        rows = {name: [asdict(result) for result in found] for name, found in results.items()}
        options.json.write_text(json.dumps(rows, indent=1))
    return 1 if any(result.failed for result in results["weft"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
