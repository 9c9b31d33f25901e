"""Measures tiers below the engine: time to the first token of a long context from each, bytes a second against memcpy and files.

    python -m bench.tiers [--tokens 8192] [--moved 400000] [--json FILE]

First `weft serve` with a model that is large enough for its prefill to be felt: a context is computed, found in the node's pool
(`hbm`), in the host's memory after the node was killed (`cpu`), and in `cmx` after everything was restarted. Tokens must be the
same each time; exit code 1 says that they are not.

Then a store and two nodes without engines: a context's bytes, as many as a profile says, into the host's memory, out of it, and
out of `cmx`, beside one plain copy of as many bytes here, and beside reading the files. What comes from `cmx` must
also be checked: how fast that is done with the same files by a thread on each processor, and nothing else to do, is what there is
to be had.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, cast

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table
from xxhash import xxh3_128

from bench.servers import Server, family, weft_server
from orchestrator.core.commands import LoadBlocks, Offer
from orchestrator.core.config import StoreConfig
from orchestrator.core.events import FetchEnded, NodeEvent, OfferEnded
from orchestrator.core.types import (
    BlockHash,
    BlockId,
    CostProfile,
    ModelName,
    NodeId,
    NodeSpec,
    OfferId,
    PoolKind,
    PoolName,
    RequestId,
    StoreId,
)
from orchestrator.wire.trust import Trust
from workers.engines.base import Engine, EngineDescription
from workers.engines.checkpoint import create_checkpoint
from workers.memory import Copier, SharedArena, TransferLimits, copy_bytes, host_id
from workers.store.cmx import FILE_PIECE_BYTES, HEADER_BYTES
from workers.store.models import ModelBlocks
from workers.store.server import StoreServer
from workers.tiers import StorePlace, Tiers

BLOCK_TOKENS, SEGMENT_BLOCKS, OUTPUT_TOKENS = 64, 8, 16
#: A dense model of 0.1B in float32: 16 layers, 8 KV heads of 64 dimensions, 64 KiB of KV a token.
MODEL = {
    "layers": 16,
    "hidden": 512,
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 64,
    "intermediate": 1536,
    "context_tokens_max": 16384,
}
CLUSTER = """
[store]
cpu_bytes = 2147483648
cmx = "file://{folder}"
[models.default]
[[pools]]
name = "all"
kind = "aggregated"
[pools.engine]
block_tokens = 64
blocks = 200
[pools.scheduler]
step_tokens_max = 1024
sequences_max = 8
[pools.profile]
step_s = 0.01
prefill_token_s = 0.001
"""
#: KV bytes of a token in the second part: an 8B model's grouped keys and values in FP8 are 64 KiB, a latent one's 4 KiB or so.
TOKEN_BYTES = 4096
WAIT_S = 120.0
SECRET = b"the measurement's"
#: A context's blocks are offered and loaded this many at a time, as nodes do.
OFFER_BLOCKS = 1024
#: Times that each load is measured whose rates are put into a cluster file.
RATE_ROUNDS = 9
#: A plain copy in pieces of the size that moves have.
PIECEWISE = "memcpy in pieces"
#: What loading from `cmx` cannot do without: read and take the checksum, a thread on each processor.
CHECKED = "files, checked"
#: Times that files are read, and a context is loaded from `cmx` after a restart, by turns; the best counts.
RESTORES = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One way, and what it came to."""

    what: str
    value: float
    unit: str
    beside: str
    ratio: float


# --- time to the first token ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request."""

    ttft_s: float
    text: str
    cached_tokens: int


def ask(server: Server, prompt: Sequence[int]) -> Answer:
    """Send a prompt and read its answer as it comes."""
    body = {
        "model": "default", "prompt": list(prompt), "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    started, first, text, cached = time.perf_counter(), 0.0, "", 0
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=600, trust_env=False) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            for choice in chunk["choices"]:
                first = first or time.perf_counter() - started
                text += choice["text"]
            cached = chunk["usage"]["prompt_tokens_details"]["cached_tokens"] if chunk.get("usage") else cached
    return Answer(first, text, cached)


def wait_for(server: Server, holds: Callable[[dict[str, Any]], bool]) -> None:
    """Wait until something holds of a cluster's status. Raises `TimeoutError`."""
    until = time.monotonic() + WAIT_S
    while True:
        status = cast(dict[str, Any], httpx.get(f"{server.url}/status", timeout=30, trust_env=False).json())
        if holds(status):
            return
        if time.monotonic() > until:
            raise TimeoutError(f"it does not come about: {status}")
        time.sleep(0.05)


def kill(server: Server, name: str) -> None:
    """End the actor of that name at once."""
    for pid in (pid for root in server.pids for pid in family(root)):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if command.startswith(f"ray::{name}".encode()):
            os.kill(pid, signal.SIGKILL)


def restarted(status: dict[str, Any]) -> bool:
    """Tell whether the node is up again."""
    return all(node["up"] and node["restarts"] for node in status["nodes"])


def first_tokens(tokens: int) -> tuple[list[Row], list[str]]:
    """Measure the time to the first token from each tier. Returns rows, and what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        create_checkpoint(model, "llama", 1, **MODEL)
        cluster = CLUSTER.format(folder=Path(folder) / "cmx")
        prompt = [random.Random(1).randrange(100, 400) for _ in range(tokens)]
        whole = tokens // BLOCK_TOKENS
        segments = whole // SEGMENT_BLOCKS
        found: dict[str, Answer] = {}
        with weft_server(cluster, model) as server:
            wait_for(server, lambda status: bool(status["stores"]))
            ask(server, prompt[: BLOCK_TOKENS // 2])  # what the first request of all pays is no matter of tiers
            found["computed"] = ask(server, prompt)
            wait_for(server, lambda status: status["stores"][0]["segments"] >= segments)
            found["hbm"] = ask(server, prompt)
            kill(server, "NodeProcess")
            wait_for(server, restarted)
            found["cpu"] = ask(server, prompt)
        with weft_server(cluster, model) as server:
            wait_for(server, lambda status: bool(status["stores"]) and status["stores"][0]["segments"] >= segments)
            found["cmx, everything restarted"] = ask(server, prompt)
        computed = found["computed"]
        wrong = [f"{name}: other tokens than computed" for name, one in found.items() if one.text != computed.text]
        wrong += [
            f"{name}: {one.cached_tokens} cached" for name, one in found.items() if name != "computed" and not one.cached_tokens
        ]
        rows = [
            Row(f"TTFT of {tokens} tokens: {name}", one.ttft_s * 1000, "ms", "computed", computed.ttft_s / one.ttft_s)
            for name, one in found.items()
        ]
    return rows, wrong


# --- bytes a second ---------------------------------------------------------------------------------------------------


class Pool:
    """An engine that is a pool of bytes and nothing else."""

    def __init__(self, blocks: int, block_bytes: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self.arena = SharedArena(blocks * block_bytes)
        self.pool = self.arena.view
        self.description = EngineDescription(
            blocks=blocks,
            block_tokens=block_tokens,
            block_bytes=block_bytes,
            stored_bytes=block_bytes,
            stored_layout="plain bytes",
            vocabulary=1,
            context_tokens_max=blocks * block_tokens,
            fingerprint="bytes",
            device="cpu",
            computes=True,
        )


class Mover:
    """A node without an engine, which offers and loads."""

    def __init__(
        self,
        name: str,
        blocks: int,
        block_bytes: int,
        trust: Trust,
        executor: ThreadPoolExecutor,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self.engine = Pool(blocks, block_bytes, block_tokens)
        spec = NodeSpec(
            NodeId(name), ModelName("m"), PoolName("p"), PoolKind.AGGREGATED, 1, blocks, block_tokens, block_bytes, 1, 1,
            blocks * block_tokens, CostProfile(), "", host_id(),
        )  # fmt: skip
        self._events: asyncio.Queue[NodeEvent] = asyncio.Queue()
        self._offers = 0
        copier, limits = Copier(executor, 0), TransferLimits()
        engine = cast(Engine, self.engine)
        self.tiers = Tiers(spec, engine, None, copier, trust, limits, self._events.put_nowait, lambda moved: None)

    async def offer(self, names: Sequence[BlockHash]) -> float:
        """Offer a context, and return the seconds until the store has it."""
        started = time.perf_counter()
        for first in range(0, len(names), OFFER_BLOCKS):
            part = tuple(names[first : first + OFFER_BLOCKS])
            blocks = tuple(BlockId(block) for block in range(first, first + len(part)))
            self._offers += 1
            self.tiers.offer(Offer(OfferId(self._offers), names[first - 1] if first else None, part, blocks))
            event = await self._events.get()
            assert isinstance(event, OfferEnded)
            assert event.failure is None, event.failure
        return time.perf_counter() - started

    async def load(self, names: Sequence[BlockHash]) -> float:
        """Load a context, and return the seconds until it is in the pool."""
        started, count = time.perf_counter(), len(names)
        blocks = tuple(BlockId(block) for block in range(count))
        self.tiers.load(LoadBlocks(RequestId(1), tuple(names), 0, blocks, count * self.engine.description.block_tokens))
        while not isinstance(event := await self._events.get(), FetchEnded):
            pass
        assert event.tokens == count * self.engine.description.block_tokens, event
        return time.perf_counter() - started


async def moved_bytes(tokens: int, folder: Path) -> list[Row]:
    """Measure copies of a context of so many tokens."""
    blocks = tokens // BLOCK_TOKENS // SEGMENT_BLOCKS * SEGMENT_BLOCKS
    size = TOKEN_BYTES * BLOCK_TOKENS
    total = blocks * size
    names = _names(blocks)
    trust, model = Trust(SECRET), ModelBlocks(ModelName("m"), "bytes", "plain bytes", BLOCK_TOKENS, size)
    plain = StoreConfig(cpu_bytes=total + (64 << 20), segment_blocks=SEGMENT_BLOCKS, cmx_bytes=2 * total)
    config = replace(plain, cmx=f"file://{folder}")
    seconds: dict[str, float] = {}
    with ThreadPoolExecutor(2) as executor:
        source, target = (Mover(name, blocks, size, trust, executor) for name in ("source", "target"))
        for start in range(0, total, 64 << 20):
            end = min(start + (64 << 20), total)
            source.engine.pool[start:end] = np.random.default_rng(start).bytes(end - start)
            target.engine.pool[start:end] = bytes(end - start)  # memory that was never touched is slower to write
        server = await _begin(1, plain, model, source, target)
        seconds["memcpy"] = min(_timed(lambda: copy_bytes(target.engine.pool, source.engine.pool)) for _ in range(3))
        # Much at once goes past the caches and is faster for it; moves go in pieces, so that they can be followed and stopped.
        seconds[PIECEWISE] = min(_timed(lambda: _copy_pieces(target.engine.pool, source.engine.pool)) for _ in range(3))
        seconds["hbm to cpu, slots never used before"] = await source.offer(_names(blocks, blocks))
        seconds["hbm to cpu"] = await source.offer(names)
        seconds["cpu to hbm"] = await target.load(names)
        assert bytes(target.engine.pool[-size:]) == bytes(source.engine.pool[-size:])
        await _leave(server, source, target)
        server = await _begin(2, config, model, source)
        await source.offer(names)
        await _all_stored(server, blocks)
        await _leave(server, source)
        last = bytes(source.engine.pool[-size:])
        for start in range(3, 3 + RESTORES):
            taken = {"files": _read_files(folder, target.engine.pool)}
            taken[CHECKED] = _timed(lambda: _check_files(folder, target.engine.pool))
            server = await _begin(start, config, model, target)
            await _all_stored(server, blocks)
            taken["cmx to hbm"] = await target.load(names)
            assert bytes(target.engine.pool[-size:]) == last
            await _leave(server, target)
            seconds |= {name: min(took, seconds.get(name, took)) for name, took in taken.items()}
    besides = [
        ("memcpy", ""),
        (PIECEWISE, "memcpy"),
        *((name, PIECEWISE) for name in seconds if name.startswith("hbm to cpu")),
        ("cpu to hbm", PIECEWISE),
        ("files", ""),
        (CHECKED, "files"),
        ("cmx to hbm", "files"),
        ("cmx to hbm", CHECKED),
    ]
    what, gigabytes = f"{blocks * BLOCK_TOKENS} tokens of {TOKEN_BYTES} bytes", total / 1e9
    return [
        Row(f"{what}: {name}", gigabytes / seconds[name], "GB/s", beside, seconds[beside or name] / seconds[name])
        for name, beside in besides
    ]


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast blocks come into a node's pool, and the seconds before the first of them."""

    cpu_bytes_per_s: float
    cpu_latency_s: float
    cmx_bytes_per_s: float
    cmx_latency_s: float


async def measure_rates(block_tokens: int, block_bytes: int, blocks: int, folder: Path) -> Rates:
    """Measure loads of contexts of up to so many blocks: the median of several, by the line through two sizes."""
    blocks = blocks // SEGMENT_BLOCKS * SEGMENT_BLOCKS
    names = _names(blocks)
    model = ModelBlocks(ModelName("m"), "bytes", "plain bytes", block_tokens, block_bytes)
    trust, sizes = Trust(SECRET), (2 * SEGMENT_BLOCKS, blocks)
    cpu: dict[int, list[float]] = {size: [] for size in sizes}
    cmx: dict[int, list[float]] = {size: [] for size in sizes}
    store = StoreConfig(cpu_bytes=2 * blocks * block_bytes, segment_blocks=SEGMENT_BLOCKS, cmx=f"file://{folder}")
    with ThreadPoolExecutor(2) as executor:
        mover = Mover("mover", blocks, block_bytes, trust, executor, block_tokens)
        server = await _begin(1, store, model, mover)
        await mover.offer(names)
        for turn in range(2 * RATE_ROUNDS):
            cpu[sizes[turn % 2]].append(await mover.load(names[: sizes[turn % 2]]))
        await _all_stored(server, blocks)
        await _leave(server, mover)
        for start in range(2 * RATE_ROUNDS):
            size = sizes[start % 2]
            server = await _begin(2 + start, store, model, mover)
            await _all_stored(server, blocks)
            cmx[size].append(await mover.load(names[:size]))
            await _leave(server, mover)
    cpu_bytes_per_s, cpu_latency_s = _line(cpu, block_bytes)
    cmx_bytes_per_s, cmx_latency_s = _line(cmx, block_bytes)
    return Rates(cpu_bytes_per_s, cpu_latency_s, cmx_bytes_per_s, max(cmx_latency_s - cpu_latency_s, 0.0))


def _names(blocks: int, first: int = 0) -> list[BlockHash]:
    return [BlockHash(random.Random(number).randbytes(16)) for number in range(first, first + blocks)]


def _line(seconds: Mapping[int, Sequence[float]], block_bytes: int) -> tuple[float, float]:
    """Return bytes a second and the seconds before the first by what two sizes, in blocks, took."""
    (small, small_s), (large, large_s) = sorted((size, median(taken)) for size, taken in seconds.items())
    rate = (large - small) * block_bytes / (large_s - small_s)
    return rate, max(small_s - small * block_bytes / rate, 0.0)


class StoreProcess:
    """A store in a process of its own, as it always is.

    Raises what its start raises.
    """

    def __init__(self, start: int, config: StoreConfig, model: ModelBlocks, secret: bytes) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_store_process, args=(theirs, start, config, model, secret), daemon=True)
        self._process.start()
        theirs.close()
        #: Where it listens; its memory is taken by then.
        self.address = cast(str, self._asked("address"))

    @property
    def segments(self) -> int:
        """Segments that it knows to be in `cmx`."""
        return cast(int, self._asked("segments"))

    def stop(self) -> None:
        """End it, and wait for that."""
        self._asked("stop")
        self._process.join(WAIT_S)

    def _asked(self, what: str) -> object:
        self._pipe.send(what)
        if not self._pipe.poll(WAIT_S):
            raise TimeoutError(f"the store does not say {what}")
        return self._pipe.recv()


def _store_process(pipe: "Connection[Any, Any]", start: int, config: StoreConfig, model: ModelBlocks, secret: bytes) -> None:
    asyncio.run(_serve_store(pipe, start, config, model, Trust(secret)))


async def _serve_store(pipe: "Connection[Any, Any]", start: int, config: StoreConfig, model: ModelBlocks, trust: Trust) -> None:
    server = StoreServer(StoreId("s"), start, config, [model], trust)
    address = await server.start()
    await server.populated()
    try:
        while (what := await asyncio.to_thread(pipe.recv)) != "stop":
            pipe.send(address if what == "address" else server.driver.load(ModelName("m")).segments)
    finally:
        await server.stop()
        pipe.send("stopped")


async def _begin(start: int, config: StoreConfig, model: ModelBlocks, *movers: Mover) -> StoreProcess:
    store = await asyncio.to_thread(StoreProcess, start, config, model, SECRET)
    for mover in movers:
        mover.tiers.use(StorePlace(StoreId("s"), store.address))
        assert await mover.tiers.wait_attached(10)
        assert await mover.tiers.wait_mapped(WAIT_S)  # as it is some seconds after a start
    return store


async def _all_stored(store: StoreProcess, blocks: int) -> None:
    """Wait until a store knows all segments of a context to be in `cmx`."""
    for _ in range(int(WAIT_S / 0.05)):
        if store.segments >= blocks // SEGMENT_BLOCKS:
            return
        await asyncio.sleep(0.05)
    raise TimeoutError("the context does not get into cmx")


async def _leave(store: StoreProcess, *movers: Mover) -> None:
    for mover in movers:
        mover.tiers.use(None)
    await asyncio.to_thread(store.stop)


def _copy_pieces(target: memoryview, source: memoryview) -> None:
    piece = TransferLimits().frame_bytes_max
    for start in range(0, len(source), piece):
        copy_bytes(target[start : start + piece], source[start : start + piece])


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _read_files(folder: Path, target: memoryview) -> float:
    """Read all objects into memory, one after the other, and return the seconds."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())

    def read() -> None:
        place = 0
        for path in paths:
            with path.open("rb", buffering=0) as file:
                place = (place + file.readinto(target[place : min(place + path.stat().st_size, len(target))])) % len(target)

    return _timed(read)


def _check_files(folder: Path, pool: memoryview) -> None:
    """Read all objects into memory and take their checksums, with all processors."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    size = len(pool) // len(paths)

    def carry(number: int) -> None:
        digest = xxh3_128()
        with paths[number].open("rb", buffering=0) as file:
            digest.update(file.read(HEADER_BYTES))
            for start in range(number * size, (number + 1) * size, FILE_PIECE_BYTES):
                piece = slice(start, min(start + FILE_PIECE_BYTES, (number + 1) * size))
                file.readinto(pool[piece])
                digest.update(pool[piece])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for _ in threads.map(carry, range(len(paths))):
            pass


def main() -> int:
    """Measure, print a table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tiers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of the context whose first token is waited for (%(default)s)")
    parser.add_argument("--moved", type=int, default=400_000, help="tokens of the context whose bytes are moved (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    rows: list[Row] = []
    wrong: list[str] = []
    if options.moved:
        with tempfile.TemporaryDirectory() as folder:
            rows += asyncio.run(moved_bytes(options.moved, Path(folder)))
    if options.tokens:
        found, wrong = first_tokens(options.tokens)
        rows += found
    table = Table("what", "", "beside", "ratio")
    for row in rows:
        table.add_row(row.what, f"{row.value:,.2f} {row.unit}", row.beside, f"{row.ratio:.2f}x")
    Console(width=140).print(table)
    for problem in wrong:
        print(problem)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
