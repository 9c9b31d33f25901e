"""A host's store and its nodes over real gRPC: bytes come back as they went, whatever is lost on the way."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from orchestrator.core.blocks import pack_hashes
from orchestrator.core.events import FetchEnded, FetchProgressed, OfferEnded
from orchestrator.core.store import recalls
from orchestrator.core.types import BlockHash, CostProfile, KvBatch, Lease, LeaseId, NodeId, TenantId, Tier
from orchestrator.wire import codec, node_pb2, store_codec, store_pb2, store_pb2_grpc
from orchestrator.wire.journal import read_journal
from orchestrator.wire.replay import replay
from orchestrator.wire.trust import Caller
from tests.builders import TRUST
from tests.workers.store.hosts import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    LAYOUT,
    MODEL,
    NAMES,
    SEGMENT,
    STORE,
    Host,
    PoolEngine,
    host,
    objects,
    run,
    until,
)
from workers.memory import TransferLimits, host_id


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


def test_what_outlives_everything_is_loaded_after_everything_was_restarted(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with host(tmp_path) as there:
            node = await there.node()
            node.engine.fill(10)
            await node.offer(0, 10)
            await until(lambda: len(objects(tmp_path)) == 2)  # whole segments alone
            await node.tiers.close()
        async with host(tmp_path) as there:
            node = await there.node("later")
            ended = await node.load(0, 10)
            assert ended == FetchEnded(ended.request, 8 * BLOCK_TOKENS, cmx_tokens=8 * BLOCK_TOKENS)
            assert node.holds(0, 8)
            # It is in the memory now.
            ended = await node.load(0, 8)
            assert ended == FetchEnded(ended.request, 8 * BLOCK_TOKENS)

    run(scenario)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, flipped, lambda path: os.truncate(path, 100)], ids=["gone", "flipped", "cut"])
def test_a_damaged_object_is_a_counted_miss(tmp_path: Path, damage: Any) -> None:
    async def scenario() -> None:
        async with host(tmp_path) as there:
            node = await there.node()
            node.engine.fill(12)
            await node.offer(0, 12)
            await until(lambda: len(objects(tmp_path)) == 3)
        second = next(path for path in objects(tmp_path) if path.name == NAMES[2 * SEGMENT - 1].hex())
        damage(second)
        async with host(tmp_path) as there:
            node = await there.node()
            ended = await node.load(0, 12)
            assert ended.tokens == SEGMENT * BLOCK_TOKENS
            assert node.holds(0, SEGMENT)
            assert there.server.driver.load(MODEL).counts.failures

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
