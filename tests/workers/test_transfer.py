"""Blocks cross from one node to another over real gRPC, by every transport, and every end is reported once."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio
import pytest

from orchestrator.core.commands import Fetch, SendBlocks
from orchestrator.core.events import BlocksSent, ExportClosed, ExportOpened, FetchEnded, FetchProgressed, NodeEvent
from orchestrator.core.types import BlockHash, BlockId, CostProfile, ExportId, NodeId, RequestId
from orchestrator.wire import node_pb2_grpc
from tests.builders import TRUST
from workers.engines.base import EngineDescription, NotEncodable
from workers.memory import (
    ByteBudget,
    Copier,
    PeerMemory,
    PeerUnmappable,
    SharedArena,
    TransferFailed,
    TransferLimits,
    host_id,
)
from workers.transfer import Channels, Exports, Fetches
from workers.transports import OBJECT, SHM, ObjectTransport, PacedTransport, SharedMemoryTransport, Transport, runs

BLOCKS = 16
BLOCK_TOKENS = 4
BLOCK_BYTES = 4096
STORED_BYTES = BLOCK_BYTES // 2
#: A block of this has no stored form.
UNENCODABLE = 255
SOURCE = NodeId("prefill-0")
REQUEST = RequestId(7)
HASHES = tuple(BlockHash(os.urandom(16)) for _ in range(6))
HOST = host_id()
DESCRIPTION = EngineDescription(BLOCKS, BLOCK_TOKENS, BLOCK_BYTES, STORED_BYTES, "halves", 256, 64, "weights", "cpu", True)


class PoolEngine:
    """An engine that has a pool and nothing else; `visible` says whether the pool is in host memory."""

    def __init__(self, visible: bool) -> None:
        self.description = DESCRIPTION
        self.arena = SharedArena(BLOCKS * BLOCK_BYTES)
        self.pool = self.arena.view if visible else None

    def read_blocks(self, blocks: Sequence[BlockId], into: memoryview) -> None:
        for index, block in enumerate(blocks):
            into[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES] = self.block(block)

    def write_blocks(self, blocks: Sequence[BlockId], data: memoryview) -> None:
        for index, block in enumerate(blocks):
            self.block(block)[:] = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]

    def encode_blocks(self, blocks: Sequence[BlockId], into: memoryview) -> None:
        """Blocks here are made of one byte: half of one says it all."""
        if any(self.block(block)[0] == UNENCODABLE for block in blocks):
            raise NotEncodable("a NaN")
        for index, block in enumerate(blocks):
            into[index * STORED_BYTES : (index + 1) * STORED_BYTES] = self.block(block)[:STORED_BYTES]

    def decode_blocks(self, blocks: Sequence[BlockId], data: memoryview) -> None:
        for index, block in enumerate(blocks):
            self.block(block)[:] = bytes(data[index * STORED_BYTES : (index + 1) * STORED_BYTES]) * 2

    def block(self, block: int) -> memoryview:
        return self.arena.view[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]


class DictStore:
    """An object store in a dict."""

    def __init__(self) -> None:
        self.objects: dict[bytes, bytes] = {}
        self.full = False

    def put(self, data: memoryview) -> tuple[object, bytes]:
        if self.full:
            raise TransferFailed("the store is full")
        reference = os.urandom(8)
        self.objects[reference] = bytes(data)
        return reference, reference

    def get(self, reference: bytes, timeout_s: float) -> memoryview:
        return memoryview(self.objects[reference])


@dataclass
class Side:
    """One node's half of a transfer, with a list where the core would be."""

    engine: PoolEngine
    transports: dict[str, Transport]
    limits: TransferLimits
    names: list[str]
    events: asyncio.Queue[NodeEvent] = field(default_factory=asyncio.Queue)
    moved: list[tuple[RequestId, int, float, float]] = field(default_factory=list)
    channels: Channels = field(default_factory=lambda: Channels(4, TRUST))

    def __post_init__(self) -> None:
        put = self.events.put_nowait
        self.exports = Exports(self.transports, BLOCK_BYTES, BLOCK_TOKENS, put, self.limits)
        self.fetches = Fetches(
            self.transports,
            lambda host: self.names,
            BLOCK_BYTES,
            BLOCK_TOKENS,
            self.channels,
            PeerMemory(4),
            put,
            lambda request, size, seconds, began_s_ago: self.moved.append((request, size, seconds, began_s_ago)),
        )

    async def next(self) -> NodeEvent:
        return await asyncio.wait_for(self.events.get(), 10)


def side(names: list[str], limits: TransferLimits, store: DictStore, executor: ThreadPoolExecutor, visible: bool) -> Side:
    engine = PoolEngine(visible)
    copier = Copier(executor, limits.inline_bytes_max)
    transports: dict[str, Transport] = {
        SHM: SharedMemoryTransport(engine, engine.arena if visible else None, PeerMemory(4), copier, limits),
        OBJECT: ObjectTransport(engine, store, copier, limits),
    }
    profile = CostProfile(fetch_latency_s=0.0, fetch_bytes_per_s=1e9)
    return Side(engine, {name: PacedTransport(inner, profile) for name, inner in transports.items()}, limits, names)


@dataclass
class Pair:
    source: Side
    target: Side
    address: str
    server: grpc.aio.Server
    store: DictStore


@asynccontextmanager
async def pair(names: list[str], visible: bool = True, limits: TransferLimits | None = None) -> AsyncIterator[Pair]:
    limits = limits or TransferLimits()
    store = DictStore()
    with ThreadPoolExecutor(1) as executor:
        source, target = (side(names, limits, store, executor, visible) for _ in range(2))

        class Service(node_pb2_grpc.NodeServicer):
            async def Fetch(self, request_iterator: object, context: object) -> None:  # noqa: N802
                await source.exports.serve(context)  # type: ignore[arg-type]

        server = grpc.aio.server()
        node_pb2_grpc.add_NodeServicer_to_server(Service(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        for block in range(BLOCKS):
            source.engine.block(block)[:] = bytes([block + 1]) * BLOCK_BYTES
        try:
            yield Pair(source, target, f"127.0.0.1:{port}", server, store)
        finally:
            await target.fetches.close()
            await target.channels.close()
            await server.stop(None)


def fetch(blocks: tuple[int, ...] = (9, 10, 3, 4), first_block: int = 1, tokens: int = 18) -> Fetch:
    targets = tuple(BlockId(block) for block in blocks)
    return Fetch(REQUEST, SOURCE, HASHES, first_block, targets, tokens, pending=True, incarnation=1_795_815_557_914)


def send(export: ExportId, blocks: tuple[int, ...], tokens: int, final: bool = False, computed: int = 0) -> SendBlocks:
    return SendBlocks(export, tuple(BlockId(block) for block in blocks), tokens, final, computed)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))  # type: ignore[arg-type]


@pytest.mark.parametrize("visible", [True, False])
@pytest.mark.parametrize("name", [SHM, OBJECT])
def test_blocks_arrive_in_order_and_are_acknowledged(name: str, visible: bool) -> None:
    async def scenario() -> None:
        async with pair([name], visible) as both:
            both.target.fetches.start(fetch(), both.address, HOST)
            opened = await both.source.next()
            assert opened == ExportOpened(ExportId(1), REQUEST, HASHES, 1, 18, True, 1_795_815_557_914)
            both.source.exports.send(send(ExportId(1), (5, 6, 7), 16))
            # The three blocks after the first one are there: 16 tokens without a hole.
            assert await both.target.next() == FetchProgressed(REQUEST, 16)
            assert await both.source.next() == BlocksSent(ExportId(1), (5, 6, 7))
            both.source.exports.send(send(ExportId(1), (0,), 18, final=True, computed=11))
            assert await both.target.next() == FetchEnded(REQUEST, 18, 11, None)
            assert await both.source.next() == BlocksSent(ExportId(1), (0,))
            assert await both.source.next() == ExportClosed(ExportId(1))
            pool = both.target.engine
            assert [pool.block(block)[0] for block in (9, 10, 3, 4)] == [6, 7, 8, 1]
            assert bytes(pool.block(3)) == bytes([8]) * BLOCK_BYTES
            ((request, size, seconds, began_s_ago),) = both.target.moved
            assert (request, size) == (REQUEST, 4 * (BLOCK_BYTES if name == SHM else STORED_BYTES))
            assert 0 < seconds <= began_s_ago

    run(scenario)


def test_objects_have_the_stored_form_and_what_has_none_is_computed_by_the_reader() -> None:
    async def scenario() -> None:
        async with pair([OBJECT]) as both:
            both.source.engine.block(7)[:] = bytes([UNENCODABLE]) * BLOCK_BYTES
            both.target.fetches.start(fetch(), both.address, HOST)
            await both.source.next()
            both.source.exports.send(send(ExportId(1), (5, 6), 12))
            assert await both.target.next() == FetchProgressed(REQUEST, 12)
            assert [len(data) for data in both.store.objects.values()] == [2 * STORED_BYTES]
            both.source.exports.send(send(ExportId(1), (7,), 16))
            ended = await both.target.next()
            failure = "blocks cannot be sent as halves: a NaN"
            assert ended == FetchEnded(REQUEST, 12, 0, failure)

    run(scenario)


def test_large_sends_are_cut_into_frames_within_the_budget() -> None:
    limits = TransferLimits(
        frame_bytes_max=BLOCK_BYTES, fetch_bytes_max=2 * BLOCK_BYTES, staged_bytes_max=BLOCK_BYTES, inline_bytes_max=0
    )

    async def scenario() -> None:
        async with pair([SHM], visible=False, limits=limits) as both:
            both.target.fetches.start(fetch(), both.address, HOST)
            await both.source.next()
            both.source.exports.send(send(ExportId(1), (5, 6, 7, 8), 18, final=True))
            assert [await both.target.next() for _ in range(3)] == [FetchProgressed(REQUEST, count) for count in (8, 12, 16)]
            assert await both.target.next() == FetchEnded(REQUEST, 18, 0, None)
            # One answer for one command, however many frames it took.
            assert await both.source.next() == BlocksSent(ExportId(1), (5, 6, 7, 8))
            assert [both.target.engine.block(block)[0] for block in (9, 10, 3, 4)] == [6, 7, 8, 9]

    run(scenario)


def test_an_export_with_nothing_ends_at_once() -> None:
    async def scenario() -> None:
        async with pair([SHM]) as both:
            both.target.fetches.start(fetch(), both.address, HOST)
            await both.source.next()
            both.source.exports.send(send(ExportId(1), (), 4, final=True))
            assert await both.target.next() == FetchEnded(REQUEST, 4, 0, None)
            assert both.target.moved == []

    run(scenario)


@pytest.mark.parametrize("turns", [0, 1, 50])
def test_a_stopped_fetch_ends_once_and_closes_the_export(turns: int) -> None:
    async def scenario() -> None:
        async with pair([SHM]) as both:
            both.target.fetches.start(fetch(), both.address, HOST)
            for _ in range(turns):
                await asyncio.sleep(0)
            opened = turns == 50
            if opened:
                await both.source.next()
            both.target.fetches.stop(REQUEST)
            assert await both.target.next() == FetchEnded(REQUEST, 4, 0, "stopped")
            if opened:
                assert await both.source.next() == ExportClosed(ExportId(1))

    run(scenario)


def test_a_source_that_dies_ends_the_fetch() -> None:
    async def scenario() -> None:
        async with pair([SHM]) as both:
            both.target.fetches.start(fetch(), both.address, HOST)
            await both.source.next()
            both.source.exports.send(send(ExportId(1), (5,), 8))
            assert await both.target.next() == FetchProgressed(REQUEST, 8)
            # Not before it is acknowledged, or the acknowledgement may be lost with the rest.
            assert await both.source.next() == BlocksSent(ExportId(1), (5,))
            await both.server.stop(None)
            ended = await both.target.next()
            assert isinstance(ended, FetchEnded)
            assert ended.tokens == 8
            assert ended.failure is not None
            assert await both.source.next() == ExportClosed(ExportId(1))

    run(scenario)


def test_a_source_that_is_not_there_ends_the_fetch() -> None:
    async def scenario() -> None:
        async with pair([SHM]) as both:
            await both.server.stop(None)
            both.target.fetches.start(fetch(), both.address, HOST)
            ended = await both.target.next()
            assert isinstance(ended, FetchEnded)
            assert "unreachable" in str(ended.failure)

    run(scenario)


def test_a_fetch_from_a_silent_source_ends_when_the_core_gives_it_up() -> None:
    async def scenario() -> None:
        async with pair([SHM]) as both:
            both.target.fetches.start(fetch(), both.address, HOST)
            assert isinstance(await both.source.next(), ExportOpened)
            both.target.fetches.stop(REQUEST)
            assert await both.target.next() == FetchEnded(REQUEST, 4, 0, "stopped")
            assert await both.source.next() == ExportClosed(ExportId(1))

    run(scenario)


def test_memory_that_cannot_be_mapped_is_not_tried_twice() -> None:
    async def scenario() -> None:
        async with pair([SHM, OBJECT]) as both:
            both.source.engine.arena.path = "/proc/1/fd/999999"
            both.target.fetches.start(fetch(), both.address, HOST)
            await both.source.next()
            both.source.exports.send(send(ExportId(1), (5, 6, 7, 8), 18, final=True))
            ended = await both.target.next()
            assert isinstance(ended, FetchEnded)
            assert "cannot map" in str(ended.failure)
            assert await both.source.next() == ExportClosed(ExportId(1))
            both.target.fetches.start(fetch(), both.address, HOST)
            await both.source.next()
            both.source.exports.send(send(ExportId(2), (5, 6, 7, 8), 18, final=True))
            assert await both.target.next() == FetchEnded(REQUEST, 18, 0, None)
            assert len(both.store.objects) == 1

    run(scenario)


def test_a_source_says_what_it_cannot_do() -> None:
    async def scenario() -> None:
        async with pair(["pigeon"]) as both:
            both.target.fetches.start(fetch(), both.address, HOST)
            ended = await both.target.next()
            assert isinstance(ended, FetchEnded)
            assert "pigeon" in str(ended.failure)

    run(scenario)


def test_more_blocks_than_asked_for_are_refused() -> None:
    async def scenario() -> None:
        async with pair([SHM]) as both:
            both.target.fetches.start(fetch(), both.address, HOST)
            await both.source.next()
            both.source.exports.send(send(ExportId(1), (5, 6, 7, 8, 0), 22, final=True))
            ended = await both.target.next()
            assert isinstance(ended, FetchEnded)
            assert ended.failure == "prefill-0 sent more than the 4 blocks asked for"

    run(scenario)


def test_another_files_memory_is_noticed() -> None:
    arena, other = SharedArena(100), SharedArena(100)
    peers = PeerMemory(2)
    assert len(peers.view(arena.place([0]))) == 100
    place = arena.place([0])
    place.path = other.path
    with pytest.raises(PeerUnmappable, match="is not the memory"):
        peers.view(place)
    place.size = 99
    with pytest.raises(PeerUnmappable, match="does not have"):
        peers.view(place)


def test_budget_is_first_come_first_served_and_survives_cancels() -> None:
    async def scenario() -> None:
        budget = ByteBudget(10)
        await budget.acquire(8)
        order: list[str] = []

        async def take(name: str, size: int) -> None:
            await budget.acquire(size)
            order.append(name)

        large = asyncio.ensure_future(take("large", 25))
        small = asyncio.ensure_future(take("small", 2))
        gone = asyncio.ensure_future(take("gone", 1))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait((gone,))
        # The small one would fit, but the large one was first: it goes alone, when all is free.
        assert order == []
        budget.release(8)
        await large
        assert order == ["large"]
        budget.release(25)
        await small
        assert order == ["large", "small"]
        budget.release(2)
        await budget.acquire(10)

    run(scenario)


def test_runs_are_joined_only_where_both_sides_are_consecutive() -> None:
    assert runs((1, 2, 3, 7, 8), (5, 6, 9, 10, 11)) == [(1, 5, 2), (3, 9, 1), (7, 10, 2)]
    assert runs((), ()) == []


def test_a_store_that_is_full_ends_the_fetch() -> None:
    async def scenario() -> None:
        async with pair([OBJECT]) as both:
            both.target.fetches.start(fetch(), both.address, HOST)
            await both.source.next()
            both.store.full = True
            both.source.exports.send(send(ExportId(1), (5,), 8))
            ended = await both.target.next()
            assert isinstance(ended, FetchEnded)
            assert ended.failure == "the store is full"

    run(scenario)
