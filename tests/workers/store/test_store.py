"""A host's store and its nodes over real gRPC: bytes come back as they went, whatever is lost on the way."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from orchestrator.core.blocks import pack_hashes
from orchestrator.core.commands import LoadBlocks
from orchestrator.core.events import FetchEnded, FetchProgressed, OfferEnded
from orchestrator.core.store import moves, recalls
from orchestrator.core.types import (
    BlockHash,
    BlockId,
    CostProfile,
    KvBatch,
    Lease,
    LeaseId,
    NodeId,
    RequestId,
    TenantId,
    Tier,
)
from orchestrator.wire import codec, node_pb2, store_codec, store_pb2, store_pb2_grpc
from orchestrator.wire.buckets import open_bucket
from orchestrator.wire.journal import read_journal
from orchestrator.wire.replay import replay
from orchestrator.wire.trust import Caller
from tests.builders import TRUST
from tests.workers.store.hosts import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    BLOCKS,
    LAYOUT,
    MODEL,
    NAMES,
    PAGES,
    SEGMENT,
    STORE,
    Host,
    Node,
    PoolEngine,
    content,
    host,
    objects,
    run,
    until,
)
from workers.memory import SharedArena, TransferLimits, host_id
from workers.store.cmx import Cmx, CmxFailed, Damage, model_key
from workers.store.models import ModelBlocks
from workers.tiers import StorePlace


class Pause:
    """A copy that waits until it is let go on."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        self.go_on.wait(10)


SMALL = TransferLimits(frame_bytes_max=2 * BLOCK_BYTES)


@pytest.mark.parametrize("visible", [True, False])
def test_what_one_node_offers_another_loads_in_pieces_of_any_size(visible: bool) -> None:
    async def scenario() -> None:
        async with host() as there:
            one, other = await there.node("one", limits=SMALL), await there.node("other", engine=PoolEngine(visible))
            one.engine.fill(10)
            assert await one.offer(0, 7) == OfferEnded(1)
            assert await one.offer(7, 10) == OfferEnded(2)
            ended = await other.load(0, 10)
            assert ended == FetchEnded(ended.request, 10 * BLOCK_TOKENS)
            assert other.holds(0, 10)
            # What is known already is not copied again, and what nobody has is not promised.
            assert await other.offer(0, 10) == OfferEnded(1 + ended.request)
            ended = await one.load(8, 12)
            assert (ended.tokens, ended.failure, ended.cmx_tokens) == (10 * BLOCK_TOKENS, None, 0)
            moved = [(move.source, move.target, move.bytes) for move in (*one.moved, *other.moved)]
            assert moved == [
                ("hbm", "cpu", 7 * BLOCK_BYTES),
                ("hbm", "cpu", 3 * BLOCK_BYTES),
                ("cpu", "hbm", 2 * BLOCK_BYTES),
                ("cpu", "hbm", 10 * BLOCK_BYTES),
            ]

    run(scenario)


@pytest.mark.parametrize(("portion", "limits", "copies"), [(1, TransferLimits(), 1), (3, SMALL, 5), (1, SMALL, 5), (5, SMALL, 5)])
def test_small_answers_are_copied_together_and_large_ones_in_pieces(
    portion: int, limits: TransferLimits, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recalls, "PORTION_BYTES", portion * BLOCK_BYTES)

    async def scenario() -> None:
        async with host() as there:
            one = await there.node("one")
            one.engine.fill(10)
            await one.offer(0, 10)
            calls: list[None] = []
            engine = PoolEngine(visible=False)
            engine.before = lambda: calls.append(None)
            node = await there.node("two", engine=engine, limits=limits)
            request, tokens = node.begin_load(0, 10), [0]
            while isinstance(event := await node.next(), FetchProgressed):
                tokens.append(event.tokens)
            assert event == FetchEnded(request, 10 * BLOCK_TOKENS)
            assert node.holds(0, 10)
            assert len(calls) == copies
            assert tokens == sorted(set(tokens))

    run(scenario)


@pytest.mark.parametrize("visible", [True, False], ids=["straight", "through memory"])
def test_what_outlives_everything_is_loaded_after_everything_was_restarted(tmp_path: Path, visible: bool) -> None:
    async def scenario() -> None:
        await put(tmp_path, 10)
        assert len(objects(tmp_path)) == 2  # whole segments alone
        async with host(tmp_path) as there:
            node = await there.node("later", engine=PoolEngine(visible))
            ended = await node.load(0, 10)
            assert ended == FetchEnded(ended.request, 8 * BLOCK_TOKENS, cmx_tokens=8 * BLOCK_TOKENS, direct=visible)
            assert node.holds(0, 8)
            (moved,) = node.moved
            assert (moved.source, moved.target, moved.bytes) == ("cmx" if visible else "cpu", "hbm", 8 * BLOCK_BYTES)
            # It is in the memory now, if it went through there.
            load = there.server.driver.load(MODEL)
            assert load.slots_cached + load.slots_used == (0 if visible else 8)
            ended = await node.load(0, 8)
            assert (ended.tokens, ended.cmx_tokens) == (8 * BLOCK_TOKENS, 8 * BLOCK_TOKENS if visible else 0)

    run(scenario)


async def put(cmx: Path, blocks: int) -> None:
    """Put the whole segments of so many blocks into a folder."""
    async with host(cmx) as there:
        node = await there.node()
        node.engine.fill(blocks)
        await node.offer(0, blocks)
        await until(lambda: there.server.driver.load(MODEL).segments == blocks // SEGMENT)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def another(path: Path) -> None:
    """Put another segment where one should be."""
    path.write_bytes(next(one for one in path.parents[1].rglob("*") if one.is_file() and one != path).read_bytes())


@pytest.mark.parametrize("visible", [True, False], ids=["straight", "through memory"])
@pytest.mark.parametrize(
    ("damage", "failure"),
    [(Path.unlink, "missing"), (flipped, "damaged"), (lambda path: os.truncate(path, 100), "damaged"), (another, "damaged")],
    ids=["gone", "flipped", "cut", "foreign"],
)
def test_a_damaged_object_is_a_counted_miss_and_gone(tmp_path: Path, damage: Any, failure: str, visible: bool) -> None:
    async def scenario() -> None:
        await put(tmp_path, 12)
        second = next(path for path in objects(tmp_path) if path.name == NAMES[2 * SEGMENT - 1].hex())
        damage(second)
        async with host(tmp_path) as there:
            node = await there.node(engine=PoolEngine(visible))
            driver = there.server.driver
            await until(lambda: driver.load(MODEL).segments in (2, 3))  # one that is cut is not found
            ended = await node.load(0, 12)
            assert (ended.tokens, ended.failure) == (SEGMENT * BLOCK_TOKENS, None)
            assert node.holds(0, SEGMENT)
            assert dict(driver.load(MODEL).counts.failures) == {failure: 1}
            await until(lambda: driver.load(MODEL).segments == 2)
            await until(lambda: not second.exists())
            # Whoever asks again computes it, and can store it again.
            assert (await node.load(0, 12)).tokens == SEGMENT * BLOCK_TOKENS

    run(scenario)


@pytest.mark.parametrize(("first", "last"), [(0, 8), (1, 8), (3, 7), (5, 6), (4, 8), (2, 11), (9, 12)])
@pytest.mark.parametrize("limits", [TransferLimits(), SMALL])
def test_of_segments_that_are_partly_wanted_nothing_else_is_written(
    tmp_path: Path, first: int, last: int, limits: TransferLimits
) -> None:
    async def scenario() -> None:
        await put(tmp_path, 12)
        async with host(tmp_path) as there:
            node = await there.node(limits=limits)
            places = [BlockId(BLOCKS - 1 - 2 * number if number % 3 else 2 * number) for number in range(12)]
            node.tiers.load(LoadBlocks(RequestId(1), NAMES[:12], first, tuple(places[first:last]), last * BLOCK_TOKENS))
            while isinstance(event := await node.next(), FetchProgressed):
                assert event.direct
            tokens = last * BLOCK_TOKENS
            assert event == FetchEnded(RequestId(1), tokens, cmx_tokens=(last - first) * BLOCK_TOKENS, direct=True)
            wanted = {places[number]: content(number) for number in range(first, last)}
            for block in range(BLOCKS):
                assert bytes(node.engine.block(block)) == wanted.get(BlockId(block), bytes(BLOCK_BYTES))

    run(scenario)


@pytest.mark.parametrize(("held", "first"), [(4, 0), (6, 0), (6, 5), (6, 7), (2, 3)])
def test_what_is_in_the_memory_comes_from_there_and_the_rest_straight(tmp_path: Path, held: int, first: int) -> None:
    async def scenario() -> None:
        await put(tmp_path, 12)
        async with host(tmp_path) as there:
            one, other = await there.node("one"), await there.node("other")
            one.engine.fill(held)
            await one.offer(0, held)
            ended = await other.load(first, 12)
            from_memory = max(0, held - first)
            straight = 12 - max(held, first)
            assert ended == FetchEnded(ended.request, 12 * BLOCK_TOKENS, cmx_tokens=straight * BLOCK_TOKENS, direct=True)
            assert other.holds(first, 12)
            moved = [(move.source, move.bytes) for move in other.moved]
            ways = (("cpu", from_memory), ("cmx", straight))
            assert moved == [(tier, blocks * BLOCK_BYTES) for tier, blocks in ways if blocks]
            await until(lambda: there.server.driver.load(MODEL).slots_used == 0)

    run(scenario)


def test_a_store_that_learnt_nothing_of_what_went_past_it_takes_what_follows_with_what_comes_before(tmp_path: Path) -> None:
    async def scenario() -> None:
        await put(tmp_path, 8)
        async with host(tmp_path) as there:
            node = await there.node()
            assert (await node.load(0, 8)).tokens == 8 * BLOCK_TOKENS
            for number in range(8, 12):
                node.engine.block(number)[:] = content(number)
            assert (await node.offer(8, 12)).failure == "what comes before is not held"
            assert (await node.offer(0, 12)).failure is None
            await until(lambda: there.server.driver.load(MODEL).segments == 3)
            assert there.server.driver.load(MODEL).counts.written == SEGMENT  # what was there was not written again

    run(scenario)


def test_nodes_read_the_same_segments_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        await put(tmp_path, 48)
        async with host(tmp_path, moves_bytes_max=3 * SEGMENT * BLOCK_BYTES) as there:
            nodes = [await there.node(f"n{number}") for number in range(3)]
            ended = await asyncio.gather(*(node.load(0, 48) for node in nodes))
            assert [end.tokens for end in ended] == [48 * BLOCK_TOKENS] * 3
            assert [node.holds(0, 48) for node in nodes] == [True] * 3

    run(scenario)


def test_blocks_in_another_form_than_the_pools_go_through_the_memory(tmp_path: Path) -> None:
    async def scenario() -> None:
        layout = "fp8 of tests"
        models = (ModelBlocks(MODEL, "weights", layout, BLOCK_TOKENS, BLOCK_BYTES),)
        async with host(tmp_path, models=models) as there:
            node = await there.node(engine=PoolEngine(layout=layout))
            node.engine.fill(4)
            await node.offer(0, 4)
            await until(lambda: there.server.driver.load(MODEL).segments == 1)
        async with host(tmp_path, models=models) as there:
            node = await there.node(engine=PoolEngine(layout=layout))
            ended = await node.load(0, 4)
            assert (ended.tokens, ended.direct) == (4 * BLOCK_TOKENS, False)
            assert [move.source for move in node.moved] == ["cpu"]

    run(scenario)


class PausedReads:
    """Reads of segments that wait before they begin, and after each piece ask whether to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pause = Pause()
        read = Cmx.read

        def paused(cmx: Cmx, segment: BlockHash, slabs: Any, stopped: Any) -> None:
            self.pause()
            read(cmx, segment, slabs, stopped)

        monkeypatch.setattr(Cmx, "read", paused)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.pause.reached.wait, 10)


def test_a_read_that_is_stopped_ends_once_nothing_writes_to_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        await put(tmp_path, 12)
        async with host(tmp_path) as there:
            node = await there.node()
            reads = PausedReads(monkeypatch)
            request = node.begin_load(0, 12)
            await reads.reached()
            assert node.tiers.stop(request)
            assert node.events.empty()
            reads.pause.go_on.set()
            assert await node.next() == FetchEnded(request, 0, failure="stopped")
            assert there.server.driver.load(MODEL).counts.failures == ()
            assert (await node.load(0, 12)).tokens == 12 * BLOCK_TOKENS
            assert node.holds(0, 12)

    run(scenario)


def test_a_store_that_dies_while_a_node_reads_ends_that_once_nothing_writes_to_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        await put(tmp_path, 12)
        async with host(tmp_path) as there:
            node = await there.node()
            reads = PausedReads(monkeypatch)
            request = node.begin_load(0, 12)
            await reads.reached()
            stopping = asyncio.ensure_future(there.server.stop())
            await until(lambda: not node.tiers.attached)
            assert node.events.empty(), "the piece is still being read"
            reads.pause.go_on.set()
            assert await node.next() == FetchEnded(request, 0, failure=f"store {STORE} is gone")
            await stopping
            await there.start()
            await node.attached(there.place)
            assert (await node.load(0, 12)).tokens == 12 * BLOCK_TOKENS
            assert node.holds(0, 12)

    run(scenario)


def test_a_segment_that_is_deleted_while_it_waits_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        await put(tmp_path, 12)
        async with host(tmp_path) as there:
            node = await there.node()
            reads = PausedReads(monkeypatch)
            request = node.begin_load(0, 12)
            await reads.reached()
            for path in objects(tmp_path):
                path.unlink()
            reads.pause.go_on.set()
            assert await node.next() == FetchEnded(request, 0)
            assert dict(there.server.driver.load(MODEL).counts.failures) == {"missing": 1}

    run(scenario)


def test_a_node_that_cannot_read_the_folder_any_more_leaves_that_to_its_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "PAUSE_S_MIN", 0.01)

    async def scenario() -> None:
        await put(tmp_path, 8)
        async with host(tmp_path) as there:
            node = await there.node()
            read, denied = Cmx.read, [True]

            def deny(cmx: Cmx, segment: BlockHash, slabs: Any, stopped: Any) -> None:
                if denied:
                    raise CmxFailed(Damage.DENIED, "not you")
                read(cmx, segment, slabs, stopped)

            monkeypatch.setattr(Cmx, "read", deny)
            assert (await node.load(0, 8)).tokens == 0
            denied.clear()
            while not (ended := await node.load(0, 8)).tokens:
                pass
            assert (ended.tokens, ended.direct) == (8 * BLOCK_TOKENS, False)
            assert dict(there.server.driver.load(MODEL).counts.failures) == {"unavailable": 1}

    run(scenario)


def test_a_store_that_dies_ends_what_was_under_way_and_its_successor_is_found() -> None:
    async def scenario() -> None:
        async with host() as there:
            pause, engine = Pause(), PoolEngine(visible=False)
            node = await there.node(engine=engine, limits=SMALL)
            node.engine.fill(8)
            assert (await node.offer(0, 4)).failure is None
            engine.before = pause
            offer = node.begin_offer(4, 8)
            await asyncio.to_thread(pause.reached.wait, 10)
            stopping = asyncio.ensure_future(there.server.stop())
            await until(lambda: not node.tiers.attached)
            assert node.events.empty(), "the piece is still being copied"
            pause.go_on.set()
            assert await node.next() == OfferEnded(offer, f"store {STORE} is gone")
            await stopping
            ended = await node.load(0, 4)
            assert (ended.tokens, ended.failure) == (0, "there is no store")
            await there.start()
            await node.attached(there.place)
            assert (await node.offer(0, 4)).failure is None
            assert (await node.load(0, 4)).tokens == 4 * BLOCK_TOKENS

    run(scenario)


def test_what_is_stopped_ends_after_the_piece_that_is_being_copied() -> None:
    async def scenario() -> None:
        async with host() as there:
            one = await there.node("one")
            one.engine.fill(8)
            await one.offer(0, 8)
            pause, engine = Pause(), PoolEngine(visible=False)
            engine.before = pause
            node = await there.node("two", engine=engine, limits=SMALL)
            request = node.begin_load(0, 8)
            await asyncio.to_thread(pause.reached.wait, 10)
            assert node.tiers.stop(request)
            offer = node.begin_offer(8, 12)  # which the store wants
            node.tiers.stop_offer(offer)
            pause.go_on.set()
            ended = {await node.next(), await node.next()}
            assert ended == {FetchEnded(request, 2 * BLOCK_TOKENS, failure="stopped"), OfferEnded(offer, "stopped")}
            assert node.holds(0, 2)
            assert not node.tiers.stop(request)
            # Whatever was granted meanwhile was given back: all of the memory is there for others.
            engine.before = lambda: None
            assert (await node.load(0, 8)).tokens == 8 * BLOCK_TOKENS

    run(scenario)


def test_blocks_that_have_no_stored_form_are_not_stored() -> None:
    async def scenario() -> None:
        async with host() as there:
            engine = PoolEngine(visible=False)
            engine.encodable = False
            node = await there.node(engine=engine)
            assert await node.offer(0, 2) == OfferEnded(1, "a NaN")
            assert (await node.load(0, 2)).tokens == 0
            engine.encodable = True
            node.engine.fill(2)
            assert await node.offer(0, 2) == OfferEnded(3)

    run(scenario)


def test_copies_take_as_long_as_a_profile_says() -> None:
    async def scenario() -> None:
        async with host() as there:
            node = await there.node(profile=CostProfile(fetch_latency_s=0.02, fetch_bytes_per_s=1e9))
            node.engine.fill(2)
            await node.offer(0, 2)
            assert node.moved[0].seconds >= 0.02

    run(scenario)


# --- by hand ----------------------------------------------------------------------------------------------------------


def hello(**changes: Any) -> store_pb2.AttachFrame:
    fields: dict[str, Any] = {
        "node": "n0", "model": MODEL, "fingerprint": "weights", "layout": LAYOUT, "block_tokens": BLOCK_TOKENS,
        "block_bytes": BLOCK_BYTES, "process": os.getpid(), "host": host_id(),
    }  # fmt: skip
    return store_pb2.AttachFrame(hello=store_pb2.NodeHello(**{**fields, **changes}))


def stub_of(there: Host) -> tuple[grpc.aio.Channel, Any]:
    channel = grpc.aio.insecure_channel(there.place.address)
    return channel, store_pb2_grpc.StoreStub(channel)


def offering(first: int, last: int, number: int = 1) -> store_pb2.AttachFrame:
    parent = NAMES[first - 1] if first else b""
    return store_pb2.AttachFrame(offers=[store_pb2.Offer(offer=number, parent=parent, hashes=pack_hashes(NAMES[first:last]))])


async def to_its_end(call: Any, *frames: store_pb2.AttachFrame) -> None:
    for frame in frames:
        await call.write(frame)
    while await call.read() is not grpc.aio.EOF:
        pass


async def attach(stub: Any, **changes: Any) -> Any:
    call = stub.Attach(metadata=TRUST.metadata(Caller.ATTACHED, STORE))
    await call.write(hello(**changes))
    assert (await call.read()).HasField("arena")
    return call


def waiting_process() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_what_a_lost_node_may_still_write_to_is_nobody_elses_until_its_process_is_gone() -> None:
    async def scenario() -> None:
        async with host(detached_s=0.01) as there:
            channel, stub = stub_of(there)
            process = await asyncio.to_thread(waiting_process)
            try:
                call = await attach(stub, process=process.pid)
                await call.write(offering(0, 8))
                granted = (await call.read()).grants[0]
                assert len(granted.slots) == 8
                call.cancel()
                driver = there.server.driver
                node = await there.node("n1")
                node.engine.fill(8)
                assert driver.nodes == {NodeId("n0"), NodeId("n1")}
                used = driver.load(MODEL).slots_used
                assert used >= 8
                process.communicate(b"\n")
                await until(lambda: driver.nodes == {NodeId("n1")})
                await until(lambda: driver.load(MODEL).slots_used == used - 8)
                assert (await node.offer(0, 8)).failure is None
                assert (await node.load(0, 8)).tokens == 8 * BLOCK_TOKENS
            finally:
                process.kill()
                process.wait()
                await channel.close()

    run(scenario)


def test_a_new_hello_of_a_node_says_that_nothing_of_the_former_call_goes_on() -> None:
    async def scenario() -> None:
        async with host(detached_s=0.01) as there:
            channel, stub = stub_of(there)
            former = await attach(stub)
            await former.write(offering(0, 8))
            assert (await former.read()).grants
            later = await attach(stub)
            await until(lambda: there.server.driver.load(MODEL).slots_used == 0)
            await later.write(offering(0, 8))
            assert len((await later.read()).grants[0].slots) == 8
            await channel.close()

    run(scenario)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"model": "other"}, grpc.StatusCode.FAILED_PRECONDITION),
        ({"fingerprint": "other"}, grpc.StatusCode.FAILED_PRECONDITION),
        ({"layout": "plain bfloat16 of tests"}, grpc.StatusCode.FAILED_PRECONDITION),
        ({"block_bytes": 1}, grpc.StatusCode.FAILED_PRECONDITION),
        ({"host": "elsewhere"}, grpc.StatusCode.FAILED_PRECONDITION),
        ({"node": ""}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"process": 4_000_000_000}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"process": 0}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_a_node_whose_blocks_are_others_or_that_is_none_is_refused(changes: dict[str, Any], status: grpc.StatusCode) -> None:
    async def scenario() -> None:
        async with host() as there:
            channel, stub = stub_of(there)
            call = stub.Attach(metadata=TRUST.metadata(Caller.ATTACHED, STORE))
            await call.write(hello(**changes))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is status
            assert there.server.driver.refused_calls == 1
            await channel.close()

    run(scenario)


def read_of(**changes: Any) -> store_pb2.AttachFrame:
    fields: dict[str, Any] = {"read": 1, "hashes": pack_hashes(NAMES[:4]), "first_block": 0, "tokens": 16, **changes}
    return store_pb2.AttachFrame(reads=[store_pb2.Read(**fields)])


@pytest.mark.parametrize(
    "frame",
    [
        read_of(tokens=17),
        read_of(hashes=b"x"),
        store_pb2.AttachFrame(offers=[store_pb2.Offer(offer=1)]),
        store_pb2.AttachFrame(written=[store_pb2.Written(offer=9)]),
        store_pb2.AttachFrame(reads=[*read_of().reads, *read_of().reads]),
        store_pb2.AttachFrame(copied=[store_pb2.Copied(read=7, answers=5)]),
        # Nothing of the memory fails so, nor does what was not answered.
        store_pb2.AttachFrame(copied=[store_pb2.Copied(read=7, answers=1, failure="corrupt")]),
        store_pb2.AttachFrame(copied=[store_pb2.Copied(read=7, failure="corrupt")]),
    ],
)
def test_frames_that_mean_nothing_end_their_call_alone(frame: store_pb2.AttachFrame) -> None:
    async def scenario() -> None:
        async with host() as there:
            node = await there.node("other")
            channel, stub = stub_of(there)
            call = await attach(stub)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await to_its_end(call, read_of(read=7), frame)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            node.engine.fill(4)
            await node.offer(0, 4)
            assert (await node.load(0, 4)).tokens == 4 * BLOCK_TOKENS
            await channel.close()

    run(scenario)


@pytest.mark.parametrize("failure", ["nothing", "", "missing", "corrupt"])
def test_what_a_node_says_of_segments_is_believed_if_it_can_be(tmp_path: Path, failure: str) -> None:
    async def scenario() -> None:
        await put(tmp_path, 12)
        async with host(tmp_path) as there:
            channel, stub = stub_of(there)
            driver = there.server.driver
            await until(lambda: driver.load(MODEL).segments == 3)
            call = await attach(stub)
            await call.write(read_of(hashes=pack_hashes(NAMES[:12]), tokens=48, direct=True))
            served = [answer async for answer in answers(call, 3)]
            assert [(answer.segment, answer.tokens, list(answer.slots)) for answer in served] == [
                (0, 16, []), (1, 32, []), (2, 48, []),
            ]  # fmt: skip
            await call.write(store_pb2.AttachFrame(copied=[store_pb2.Copied(read=1, answers=2, failure=failure)]))
            if failure == "nothing":
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await to_its_end(call)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            elif failure:
                (last,) = [answer async for answer in answers(call, 1)]
                assert (last.final, last.tokens) == (True, 16)
                assert dict(driver.load(MODEL).counts.failures) == {"missing" if failure == "missing" else "damaged": 1}
                # The third it is through with, unread.
                await call.write(store_pb2.AttachFrame(copied=[store_pb2.Copied(read=1, answers=2)], closed=[1]))
            else:
                await call.write(store_pb2.AttachFrame(copied=[store_pb2.Copied(read=1, answers=1)]))
                (last,) = [answer async for answer in answers(call, 1)]
                assert (last.final, last.tokens) == (True, 48)
                await call.write(store_pb2.AttachFrame(closed=[1]))
            await until(lambda: driver.load(MODEL).reads_waiting == 0)
            assert driver.load(MODEL).segments == (2 if failure in ("missing", "corrupt") else 3)
            node = await there.node("n1")
            assert (await node.load(0, 4)).tokens == 16
            await channel.close()

    run(scenario)


async def answers(call: Any, count: int) -> AsyncIterator[store_pb2.Slots]:
    """Return the next answers to reads."""
    while count > 0:
        frame = await asyncio.wait_for(call.read(), 10)
        for answer in frame.slots:
            yield answer
            count -= 1


def test_a_node_that_is_lost_while_it_reads_by_itself_keeps_nothing_from_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        await put(tmp_path, 12)
        async with host(tmp_path, moves_bytes_max=SEGMENT * BLOCK_BYTES) as there:
            channel, stub = stub_of(there)
            call = await attach(stub)
            await call.write(read_of(hashes=pack_hashes(NAMES[:12]), tokens=48, direct=True))
            (served,) = [answer async for answer in answers(call, 1)]
            assert served.HasField("segment")
            call.cancel()
            # Its process lives, but there is nothing of the store's that it could touch.
            await until(lambda: there.server.driver.nodes == set())
            node = await there.node("n1")
            assert (await node.load(0, 12)).tokens == 48
            await channel.close()

    run(scenario)


class Liar(store_pb2_grpc.StoreServicer):
    """A store that answers reads with whatever it was given."""

    def __init__(self, arena: SharedArena, folder: store_pb2.Folder | None, lies: Sequence[store_pb2.Slots]) -> None:
        self.placed = store_pb2.Arena(memory=arena.place(()), slots=PAGES, folder=folder)
        self.lies = lies

    async def Attach(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
        await context.read()
        await context.write(store_pb2.ArenaFrame(arena=self.placed))
        while isinstance(frame := await context.read(), store_pb2.AttachFrame):
            for read in frame.reads:
                answers = [store_pb2.Slots(read=read.read) for _ in self.lies]
                for answer, lie in zip(answers, self.lies, strict=True):
                    answer.MergeFrom(lie)
                await context.write(store_pb2.ArenaFrame(slots=answers))


@pytest.mark.parametrize(
    ("folder", "lies"),
    [
        (False, [store_pb2.Slots(segment=0, tokens=16)]),
        (True, [store_pb2.Slots(segment=1, tokens=32)]),
        (True, [store_pb2.Slots(segment=0, tokens=0)]),
        (True, [store_pb2.Slots(segment=0, tokens=32)]),
        (True, [store_pb2.Slots(segment=2, tokens=48)]),
        (True, [store_pb2.Slots(segment=1 << 30, tokens=1 << 31)]),
        (True, [store_pb2.Slots(segment=0, tokens=16), store_pb2.Slots(segment=0, tokens=16)]),
    ],
    ids=["no folder", "a hole", "nothing", "too much", "beyond", "far beyond", "twice"],
)
def test_a_store_that_serves_segments_which_were_not_asked_for_is_left(
    tmp_path: Path, folder: bool, lies: list[store_pb2.Slots]
) -> None:
    async def scenario() -> None:
        await put(tmp_path, 8)
        bucket = open_bucket(f"file://{tmp_path}", "store.cmx")
        key = model_key("weights", LAYOUT, BLOCK_TOKENS, BLOCK_BYTES, SEGMENT)
        place = Cmx(bucket, key, BLOCK_BYTES, SEGMENT, 10.0).place() if folder else None
        arena, server = SharedArena(PAGES * BLOCK_BYTES), grpc.aio.server()
        store_pb2_grpc.add_StoreServicer_to_server(Liar(arena, place, lies), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        with ThreadPoolExecutor(2) as executor:
            node = Node("n0", executor)
            await node.attached(StorePlace(STORE, f"127.0.0.1:{port}"))
            ended = await node.load(0, 10)
            assert ended.failure == f"store {STORE} is gone"
            assert node.holds(0, ended.tokens // BLOCK_TOKENS)
            await node.tiers.close()
        await server.stop(0)
        arena.close()

    run(scenario)


@pytest.mark.parametrize("caller", [Caller.GATEWAY, Caller.PEER, Caller.STORE_GATEWAY])
def test_no_other_token_opens_a_nodes_call(caller: Caller) -> None:
    async def scenario() -> None:
        async with host() as there:
            channel, stub = stub_of(there)
            call = stub.Attach(metadata=TRUST.metadata(caller, STORE))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await to_its_end(call)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            await channel.close()

    run(scenario)


# --- gateways ---------------------------------------------------------------------------------------------------------


async def connect(stub: Any, gateway: int) -> tuple[Any, store_pb2.FromStore]:
    call = stub.Connect(metadata=TRUST.metadata(Caller.STORE_GATEWAY, STORE))
    await call.write(store_pb2.ToStore(hello=store_pb2.GatewayHello(gateway=gateway)))
    return call, await call.read()


async def next_holdings(call: Any) -> list[store_pb2.Holdings]:
    while True:
        frame = await asyncio.wait_for(call.read(), 10)
        await call.write(store_pb2.ToStore(frames_received=1 << 40))
        if frame.holdings:
            return list(frame.holdings)


def held(batch: KvBatch) -> tuple[BlockHash, ...]:
    return tuple(name for run in batch.stored for name in run.hashes)


def test_gateways_hear_what_is_held_and_which_leases_there_are(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with host(tmp_path / "cmx", str(tmp_path / "journal")) as there:
            channel, stub = stub_of(there)
            call, first = await connect(stub, 0)
            spec = store_codec.spec_from(first.welcome)
            assert (spec.id, spec.host, spec.models[0].model, spec.models[0].cmx) == (STORE, host_id(), MODEL, True)
            node = await there.node()
            node.engine.fill(5)
            await node.offer(0, 5)
            _, batch = store_codec.holdings_from((await next_holdings(call))[0])
            assert held(batch) == NAMES[:5]
            _, batch = store_codec.holdings_from((await next_holdings(call))[0])
            assert batch.segments_stored == NAMES[3:4]
            lease = Lease(LeaseId("l"), TenantId("t"), MODEL, NAMES[:5], Tier.CPU, 100.0, 5 * BLOCK_BYTES)
            await call.write(store_pb2.ToStore(leases=[codec.lease_message(lease)]))
            await until(lambda: there.server.driver.load(MODEL).leased != ())
            later, first = await connect(stub, 1)
            assert [told.id for told in first.leases] == ["l"]
            assert 0 < first.leases[0].ttl_s < 100.0
            await later.write(store_pb2.ToStore(resyncs=[store_pb2.Resync(model=MODEL)]))
            pages: list[KvBatch] = []
            while not pages or pages[-1].more:
                pages += [store_codec.holdings_from(told)[1] for told in await next_holdings(later)]
            assert pages[0].cleared
            assert [name for page in pages for name in held(page)] == list(NAMES[:5])
            assert [name for page in pages for name in page.segments_stored] == [NAMES[3]]
            await call.write(store_pb2.ToStore(ended_leases=[node_pb2.EndedLease(id="l", revision=lease.revision)]))
            await until(lambda: there.server.driver.load(MODEL).leased == ())
            await channel.close()
        (journal,) = (tmp_path / "journal").iterdir()
        assert str(tmp_path) not in repr(read_journal(journal).header)
        assert replay(read_journal(journal)) is None

    run(scenario)


@pytest.mark.parametrize(
    "frame",
    [
        store_pb2.ToStore(resyncs=[store_pb2.Resync(model="other")]),
        store_pb2.ToStore(leases=[node_pb2.Lease(id="l", model=MODEL, tier="cpu", ttl_s=1.0)]),
        store_pb2.ToStore(prefetches=[store_pb2.Prefetch(model="other", hashes=bytes(16), blocks=1)]),
        store_pb2.ToStore(evictions=[store_pb2.Evict(model=MODEL, hashes=bytes(16), end_block=2, tier="cpu")]),
    ],
)
def test_what_a_gateway_says_that_means_nothing_ends_its_call_alone(frame: store_pb2.ToStore) -> None:
    async def scenario() -> None:
        async with host() as there:
            channel, stub = stub_of(there)
            call, _ = await connect(stub, 0)
            await call.write(frame)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            _, first = await connect(stub, 0)
            assert first.HasField("welcome")
            await channel.close()

    run(scenario)


def test_a_gateway_that_reads_nothing_does_not_make_the_store_keep_frames() -> None:
    async def scenario() -> None:
        async with host() as there:
            channel, stub = stub_of(there)
            call, _ = await connect(stub, 0)
            node = await there.node()
            for first in range(0, 40, 2):
                assert (await node.offer(first, first + 2)).failure is None
            frames, holdings = 0, 0
            while holdings < 20:
                frame = await asyncio.wait_for(call.read(), 10)
                frames, holdings = frames + 1, holdings + len(frame.holdings)
                if frames == codec.FRAMES_UNREAD_MAX:
                    await call.write(store_pb2.ToStore(frames_received=frames))
            assert frames <= codec.FRAMES_UNREAD_MAX + 2
            await channel.close()

    run(scenario)
