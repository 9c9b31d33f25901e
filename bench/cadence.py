"""Measures how evenly tokens come from the pool that keeps a beat and from the one for throughput, under one mixed load.

    python -m bench.cadence [--seconds 40] [--beat 0.05] [--realtime 10] [--split] [--json FILE]

`weft serve` runs one prefill node, one node for throughput that computes prompts as well (as agents' turns have it) and one that
keeps a beat. At the same time: streams of class cadence, as many of class standard, and agents
whose long prompts arrive all the time, one after the other. Of both kinds of streams the times between two tokens are taken as
they arrive, at the client. Printed are p50, p99, p99.9, the jitter (standard deviation), p99 over p50 of either, and what the
node counted: its beats and those that it missed. `--realtime 0` is without priority, which shows what it brings. With
`--split` the node that keeps the beat has its FFNs in another process.
"""

import argparse
import asyncio
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import pstdev, quantiles
from time import monotonic, sleep

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from bench.servers import Server, weft_server
from workers.engines.checkpoint import create_checkpoint

#: More slots than streams: a gateway hears a little later that one is free, and sends the next stream elsewhere if none is.
SLOTS, STREAMS, AGENTS = 8, 4, 2
#: Tokens of a stream's answer and prompt, and of an agent's turns.
STREAM_TOKENS, PROMPT_TOKENS, AGENT_PROMPT_TOKENS, AGENT_TOKENS = 400, 64, 3000, 8
#: The first tokens of a stream tell of its prompt.
SKIPPED = 3
#: Seconds in which every node is to serve.
START_S = 60.0
MODEL = {"layers": 4, "hidden": 128, "intermediate": 256}
ENGINE = """
[pools.engine]
device = "cpu"
dtype = "float32"
block_tokens = 16
blocks = 4096
threads = 1
context_tokens_max = 4096
[pools.scheduler]
sequences_max = 32
step_tokens_max = 512
"""
CLUSTER = (
    '[models.default]\n[[pools]]\nname = "prefill"\nkind = "prefill"\n'
    f'{ENGINE}[[pools]]\nname = "throughput"\nkind = "aggregated"\n'
    f'{ENGINE}[[pools]]\nname = "cadence"\nkind = "lpx"\n'
    f"{ENGINE.replace('sequences_max = 32', f'sequences_max = {SLOTS}')}"
)
SPLIT = "[pools.split]\nthreads = 1\nimbalance_max = 0\n"


@dataclass(frozen=True, slots=True)
class Evenness:
    """Seconds between two tokens of a pool's streams."""

    tokens: int
    p50_s: float
    p99_s: float
    p999_s: float
    jitter_s: float
    tightness: float


def evenness(gaps_s: list[float]) -> Evenness:
    """Return the figures of some gaps, at least two of them."""
    cuts = quantiles(gaps_s, n=1000, method="inclusive")
    p50, p99, p999 = cuts[499], cuts[989], cuts[998]
    return Evenness(len(gaps_s), p50, p99, p999, pstdev(gaps_s), p99 / p50)


async def stream(client: httpx.AsyncClient, seed: int, tokens: int, output: int, tier: str, gaps_s: list[float] | None) -> None:
    """Stream one answer, and add the seconds between its tokens to `gaps_s`."""
    body = {
        "model": "default",
        "prompt": Random(seed).choices(range(64, 464), k=tokens),
        "max_tokens": output,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
        "service_tier": tier,
    }
    last, seen = 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now, seen = monotonic(), seen + 1
            if gaps_s is not None and seen > SKIPPED:
                gaps_s.append(now - last)
            last = now


async def again(client: httpx.AsyncClient, number: int, until: float, tier: str, gaps_s: list[float] | None) -> None:
    """Stream one answer after the other."""
    tokens, output = (PROMPT_TOKENS, STREAM_TOKENS) if gaps_s is not None else (AGENT_PROMPT_TOKENS, AGENT_TOKENS)
    turn = 0
    while monotonic() < until:
        await stream(client, 1000 * number + turn, tokens, output, tier, gaps_s)
        turn += 1


def await_nodes(server: Server) -> None:
    """Wait until every node serves: the gateway is ready before the one that keeps the beat has measured its longest step."""
    until = monotonic() + START_S
    while not all(node["up"] for node in httpx.get(f"{server.url}/status", trust_env=False).json()["nodes"]):
        if monotonic() > until:
            raise SystemExit(f"not every node serves after {START_S:g} s")
        sleep(0.2)


async def measure(server: Server, seconds: float) -> dict[str, Evenness]:
    """Load both pools for so long and return how evenly their tokens came."""
    gaps_s: dict[str, list[float]] = {"cadence": [], "throughput": []}
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits, trust_env=False) as client:
        for tier in ("cadence", "standard"):
            await stream(client, 7, PROMPT_TOKENS, 8, tier, None)
        until = monotonic() + seconds
        loads = [again(client, 1 + number, until, "cadence", gaps_s["cadence"]) for number in range(STREAMS)]
        loads += [again(client, 101 + number, until, "standard", gaps_s["throughput"]) for number in range(STREAMS)]
        loads += [again(client, 201 + agent, until, "standard", None) for agent in range(AGENTS)]
        await asyncio.gather(*loads)
    return {pool: evenness(gaps) for pool, gaps in gaps_s.items()}


def counted(server: Server) -> dict[str, float]:
    """Return the beats, and those that were missed."""
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    names = {"beats": "weft_beats_total", "missed": "weft_beats_missed_total"}
    return {word: sum(one.value for one in samples if one.name == name) for word, name in names.items()}


def show(found: dict[str, Evenness], beats: dict[str, float], beat_s: float) -> None:
    """Print the table."""
    table = Table("pool", "gaps", "p50 ms", "p99 ms", "p99.9 ms", "jitter ms", "p99/p50")
    for pool, one in found.items():
        times = [f"{1000 * value:.2f}" for value in (one.p50_s, one.p99_s, one.p999_s, one.jitter_s)]
        table.add_row(pool, str(one.tokens), *times, f"{one.tightness:.2f}")
    console = Console()
    console.print(table)
    tighter = found["throughput"].tightness / found["cadence"].tightness
    console.print(f"a beat of {1000 * beat_s:g} ms: {beats['missed']:.0f} of {beats['beats']:.0f} missed; {tighter:.1f}x tighter")


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--beat", type=float, default=0.05, help="seconds")
    parser.add_argument("--realtime", type=int, default=10, help="priority of the node that keeps the beat; 0: none")
    parser.add_argument("--split", action="store_true", help="FFNs of the pool that keeps the beat on a rank of their own")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cluster = f"{CLUSTER}[pools.profile]\nbeat_s = {options.beat}\n[pools.beat]\nrealtime = {options.realtime}\n"
    cluster += SPLIT if options.split else ""
    with tempfile.TemporaryDirectory() as folder:
        create_checkpoint(Path(folder), "qwen3", 7, **MODEL)
        with weft_server(cluster, Path(folder)) as server:
            await_nodes(server)
            found = asyncio.run(measure(server, options.seconds))
            beats = counted(server)
    show(found, beats, options.beat)
    if options.json:
        pools = {pool: asdict(one) for pool, one in found.items()}
        options.json.write_text(
            json.dumps({"beat_s": options.beat, "realtime": options.realtime, "split": options.split, **beats, "pools": pools})
        )


if __name__ == "__main__":
    main()
