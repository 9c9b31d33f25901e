"""Split decode against the same model in one process: step time, hop, what micro-batches hide, and what the cost model predicts.

    python -m bench.afd [--seconds 20] [--json FILE]

One attention rank, here, and one FFN rank in a process of its own, one thread and one core each; beside them the same model
in one process with one thread and with two. Three random models in float32, batches of 1, 8 and 32 sequences that decode after
256 tokens. Contenders take turns, step by step, so that what else the machine does hits all; medians. The hop is one way: half
of what a message takes beyond the FFN rank's computing, one micro-batch at a time; over lanes in shared memory, as within a host,
and over TCP, as between hosts, here by the loopback interface: what the network between two hosts takes comes on top.

Predicted is `ping_pong_seconds` of the core: the halves as measured with one micro-batch, of half the rows, and the hop, give the
time of a step with two.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from orchestrator.core.commands import Slice
from orchestrator.core.config import EngineConfig
from orchestrator.core.cost.overlap import ping_pong_seconds
from orchestrator.core.types import BlockId, RequestId, Sampling
from orchestrator.wire.trust import Trust
from workers.engines.base import NetworkPlace, SplitPlaces
from workers.engines.checkpoint import create_checkpoint
from workers.engines.eager import EagerEngine
from workers.engines.split.rank import FfnRank

#: Of the rank's process and of this one.
TRUST = Trust(b"bench")
CORES = os.sched_getaffinity(0)
BLOCK_TOKENS = 64
PROMPT_TOKENS = 256
BATCHES = (1, 8, 32)
#: Steps that each contender is timed for at most, and those before that are not.
STEPS_MAX, WARM_STEPS = 100, 3
BLOCKS_EACH = (PROMPT_TOKENS + 4 * (STEPS_MAX + WARM_STEPS)) // BLOCK_TOKENS + 1
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe 1M": ("qwen3_moe", {"vocabulary": 320}),
    "qwen3 24M": ("qwen3", {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 2, "head_dim": 64, "intermediate": 1536}),
    "qwen3_moe 113M": (
        "qwen3_moe",
        {
            "layers": 8, "hidden": 768, "heads": 8, "kv_heads": 2, "head_dim": 64, "experts": 16, "experts_per_token": 4,
            "moe_intermediate": 384,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Point:
    """One model at one batch; milliseconds a step unless named otherwise."""

    model: str
    batch: int
    one_thread_ms: float
    two_threads_ms: float
    #: With one micro-batch, with two, and with as many as measured steps say.
    serial_ms: float
    paired_ms: float
    chosen_ms: float
    attention_ms: float
    ffn_ms: float
    hop_us: float
    #: The same by TCP, and a step with one micro-batch.
    tcp_hop_us: float
    tcp_serial_ms: float
    #: Of the shorter half and all hops, what two micro-batches hide.
    hidden: float
    predicted_ms: float


def serve_rank(path: str, core: int, said: Connection) -> None:
    """Be the FFN rank."""
    os.sched_setaffinity(0, {core})
    rank = FfnRank(Path(path), "float32", "cpu", 0, 1, 0, threads=1, network=NetworkPlace("127.0.0.1", TRUST))
    said.send((rank.address, rank.network_address))
    rank.serve()


@contextmanager
def rank_of(path: Path) -> Iterator[tuple[str, str]]:
    """Have an FFN rank serve in a process of its own; yields its addresses, within a host and between hosts."""
    context = multiprocessing.get_context("spawn")
    heard, said = context.Pipe()
    process = context.Process(target=serve_rank, args=(str(path), max(CORES), said), daemon=True)
    process.start()
    try:
        yield heard.recv()
    finally:
        process.kill()
        process.join()


class Subject:
    """One contender: an engine whose sequences have all read their prompts."""

    def __init__(self, path: Path, batch: int, threads: int, split: SplitPlaces | None = None) -> None:
        config = EngineConfig(
            device="cpu", dtype="float32", block_tokens=BLOCK_TOKENS, blocks=batch * BLOCKS_EACH, threads=threads
        )
        self.engine = EagerEngine(path, config, sequences_max=batch, step_tokens_max=PROMPT_TOKENS, split=split)
        self._threads = threads
        self._requests = [RequestId(number) for number in range(batch)]
        self._place = PROMPT_TOKENS
        for request in self._requests:
            prompt = array("I", [64 + (request * 7 + place * 3) % 200 for place in range(PROMPT_TOKENS)])
            self.engine.add(request, prompt, Sampling())
            blocks = tuple(BlockId(request * BLOCKS_EACH + place) for place in range(BLOCKS_EACH))
            self.engine.step([Slice(request, 0, PROMPT_TOKENS, 0, blocks, True)])

    def step(self) -> float:
        """Return the seconds of a decode step of all sequences."""
        slices = [Slice(request, self._place, 1, 0, (), True) for request in self._requests]
        torch.set_num_threads(self._threads)
        os.sched_setaffinity(0, {min(CORES)} if self.engine.split is not None else CORES)
        began = time.perf_counter()
        self.engine.step(slices)
        self._place += 1
        return time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class Serial:
    """Where a step's seconds go with one micro-batch."""

    step_s: float
    attention_s: float
    ffn_s: float
    hop_s: float


class Watched:
    """A split contender whose halves are told apart step by step."""

    def __init__(self, subject: Subject, layers: int) -> None:
        self._subject = subject
        self._layers = layers
        self.seconds: list[float] = []
        self._attention: list[float] = []
        self._ffn: list[float] = []
        self._hops: list[float] = []

    def step(self) -> None:
        """Time a step."""
        split = self._subject.engine.split
        assert split is not None, "only a split engine has halves"
        times = split.times
        waited, ffn = times.waited_s, times.ffn_s
        seconds = self._subject.step()
        waited, ffn = times.waited_s - waited, times.ffn_s - ffn
        self.seconds.append(seconds)
        self._attention.append(seconds - waited)
        self._ffn.append(ffn)
        self._hops.append(max(waited - ffn, 0.0) / (2 * self._layers))

    def serial(self) -> Serial:
        """Return the medians; of halves that overlap they mean nothing."""
        return Serial(median(self.seconds), median(self._attention), median(self._ffn), median(self._hops))


def measure(name: str, path: Path, layers: int, batch: int, seconds: float) -> Point:
    """Have all contenders take turns for so many seconds."""
    with rank_of(path) as (near, far):

        def split(microbatches: int, sequences: int = batch, address: str = near) -> Subject:
            return Subject(path, sequences, 1, SplitPlaces((address,), microbatches=microbatches, trust=TRUST))

        alone = {threads: Subject(path, batch, threads) for threads in (1, 2)}
        whole, half = Watched(split(1), layers), Watched(split(1, max(batch // 2, 1)), layers)
        remote = Watched(split(1, address=far), layers)
        others = {2: split(2), 0: split(0)}
        found: dict[str, list[float]] = {"one": [], "two": [], "paired": [], "chosen": []}
        until = time.monotonic() + seconds
        for turn in range(STEPS_MAX + WARM_STEPS):
            if turn > 2 * WARM_STEPS and time.monotonic() > until:
                break
            steps = {"one": alone[1].step(), "two": alone[2].step(), "paired": others[2].step(), "chosen": others[0].step()}
            whole.step()
            half.step()
            remote.step()
            if turn >= WARM_STEPS:
                for key, took in steps.items():
                    found[key].append(took)
        serial, part, by_tcp = whole.serial(), half.serial(), remote.serial()
    count = min(2, batch)
    predicted = ping_pong_seconds(count * part.attention_s, count * part.ffn_s, part.hop_s, count, layers)
    paired = median(found["paired"])
    hideable = min(serial.attention_s, serial.ffn_s) + 2 * layers * serial.hop_s
    return Point(
        name,
        batch,
        1e3 * median(found["one"]),
        1e3 * median(found["two"]),
        1e3 * serial.step_s,
        1e3 * paired,
        1e3 * median(found["chosen"]),
        1e3 * serial.attention_s,
        1e3 * serial.ffn_s,
        1e6 * serial.hop_s,
        1e6 * by_tcp.hop_s,
        1e3 * by_tcp.step_s,
        (serial.step_s - paired) / hideable,
        1e3 * predicted,
    )


def table_of(points: list[Point]) -> Table:
    """Return what was measured as a table."""
    table = Table(title="split decode, one attention rank and one FFN rank: milliseconds a step")
    heads = "model|batch|one process|with 2 threads|split|2 micro-batches|chosen|attention|FFN|hop, us|by TCP|split by TCP|hidden"
    for head in (*heads.split("|"), "predicted", "off by"):
        table.add_column(head, justify="right")
    for point in points:
        off = point.predicted_ms / point.paired_ms - 1
        table.add_row(
            point.model,
            str(point.batch),
            *(f"{value:.2f}" for value in (point.one_thread_ms, point.two_threads_ms, point.serial_ms, point.paired_ms)),
            *(f"{value:.2f}" for value in (point.chosen_ms, point.attention_ms, point.ffn_ms)),
            f"{point.hop_us:.0f}",
            f"{point.tcp_hop_us:.0f}",
            f"{point.tcp_serial_ms:.2f}",
            f"{point.hidden:.0%}" if point.batch > 1 else "",
            f"{point.predicted_ms:.2f}",
            f"{off:+.0%}",
        )
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each model and batch, at most")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    points: list[Point] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (family, overrides) in MODELS.items():
            path = Path(folder) / name.replace(" ", "-")
            create_checkpoint(path, family, 5, **overrides)
            layers = overrides.get("layers", 4)
            points += [measure(name, path, layers, batch, options.seconds) for batch in BATCHES]
    Console(width=180).print(table_of(points))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(point) for point in points], indent=2))


if __name__ == "__main__":
    main()
