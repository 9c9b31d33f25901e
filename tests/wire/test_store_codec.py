"""What stores say: every noun comes back as it went, and a message that means nothing is refused."""

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message

from orchestrator.core.events import EvictAsked, PrefetchAsked, ReadOpened
from orchestrator.core.types import (
    BlockHash,
    ExportId,
    KvBatch,
    LeasedBytes,
    ModelName,
    NodeId,
    StoreCounts,
    StoredModel,
    StoredRun,
    StoreId,
    StoreLoad,
    StoreSpec,
    TenantId,
    Tier,
)
from orchestrator.wire import store_codec, store_pb2
from orchestrator.wire.codec import MalformedMessage

HASHES = tuple(BlockHash(bytes([number]) * 16) for number in range(3))
PACKED = b"".join(HASHES)
MODEL = StoredModel(ModelName("m"), 4, 64, 100, 8, True)


def wired(message: Message) -> Any:
    return type(message).FromString(message.SerializeToString())


def test_a_store_comes_back_as_it_went() -> None:
    spec = StoreSpec(StoreId("s"), 7, "host", "1.2.3.4:5", (MODEL, StoredModel(ModelName("n"), 1, 2, 0)), 1e9, 2e9, 0.5)
    assert store_codec.spec_from(wired(store_codec.welcome_message(spec))) == spec


def test_a_change_of_holdings_comes_back_as_it_went() -> None:
    batch = KvBatch(9, (StoredRun(None, HASHES[:2]),), HASHES[2:], True, 5, 1, True, HASHES[:1], HASHES[1:])
    assert store_codec.holdings_from(wired(store_codec.holdings_message(ModelName("m"), batch))) == (ModelName("m"), batch)


def test_a_load_comes_back_as_it_went() -> None:
    counts = StoreCounts(*range(1, 14), failures=(("damaged", 2), ("missing", 1)))
    load = StoreLoad(1, 2, 3, 4, 5, 6, 7.0, 8.0, counts, (LeasedBytes(TenantId("t"), Tier.CPU, 9),), 10.5)
    assert store_codec.load_from(wired(store_codec.load_message(ModelName("m"), load))) == (ModelName("m"), load)


def test_what_nodes_and_gateways_ask_for_is_read() -> None:
    read = store_pb2.Read(read=1, hashes=PACKED, first_block=1, tokens=9)
    event = ReadOpened(ExportId(5), NodeId("n"), ModelName("m"), HASHES, 1, 9)
    assert store_codec.read_from(read, ExportId(5), NodeId("n"), MODEL, folder=False) == event
    assert store_codec.offer_from(store_pb2.Offer(offer=1, hashes=PACKED)) == (None, HASHES)
    assert store_codec.offer_from(store_pb2.Offer(offer=1, parent=HASHES[0], hashes=PACKED)) == (HASHES[0], HASHES)
    asked = store_codec.prefetch_from(store_pb2.Prefetch(model="m", hashes=PACKED, blocks=3))
    assert asked == PrefetchAsked(ModelName("m"), HASHES, 3)
    evicted = store_codec.evict_from(
        store_pb2.Evict(model="m", hashes=PACKED, first_block=1, end_block=3, tier="cpu", demote=True)
    )
    assert evicted == EvictAsked(ModelName("m"), HASHES, 1, 3, Tier.CPU, True)


def welcome(**changes: Any) -> store_pb2.Welcome:
    fields: dict[str, Any] = {"store": "s", "cpu_bytes_per_s": 1.0, "cmx_bytes_per_s": 1.0, **changes}
    return store_pb2.Welcome(**fields)


@pytest.mark.parametrize(
    ("call", "message", "problem"),
    [
        (store_codec.spec_from, welcome(cpu_bytes_per_s=float("nan")), "has rates"),
        (store_codec.spec_from, welcome(cmx_bytes_per_s=-1), "has rates"),
        (store_codec.spec_from, welcome(cmx_latency_s=float("inf")), "a latency of inf"),
        (store_codec.spec_from, welcome(models=[store_pb2.StoredModel(model="m")]), "blocks of no size"),
        (store_codec.prefetch_from, store_pb2.Prefetch(hashes=PACKED, blocks=4), "a prefetch of 4 blocks with 3 hashes"),
        (store_codec.prefetch_from, store_pb2.Prefetch(hashes=PACKED), "a prefetch of 0 blocks with 3 hashes"),
        (store_codec.evict_from, store_pb2.Evict(hashes=PACKED, first_block=2, end_block=2, tier="cpu"), "cannot be evicted"),
        (store_codec.evict_from, store_pb2.Evict(hashes=PACKED, end_block=4, tier="cpu"), "cannot be evicted"),
        (store_codec.evict_from, store_pb2.Evict(hashes=PACKED, end_block=1, tier="hbm"), "a store has no hbm"),
        (store_codec.offer_from, store_pb2.Offer(offer=3), "offer 3 offers nothing"),
        (store_codec.offer_from, store_pb2.Offer(parent=b"x", hashes=PACKED), "parent must have 16 bytes, has 1"),
        (store_codec.load_from, store_pb2.ModelLoad(cpu_bytes_per_s=float("inf")), "a store measured inf bytes a second"),
        (store_codec.load_from, store_pb2.ModelLoad(leased=[store_pb2.LeasedBytes(tier="")]), "there is no tier ''"),
    ],
)
def test_a_message_that_means_nothing_is_refused(call: Callable[[Any], object], message: Message, problem: str) -> None:
    with pytest.raises(MalformedMessage, match=problem):
        call(message)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("folder", "asked", "direct"), [(True, True, True), (True, False, False), (False, True, False)])
def test_a_read_says_whether_a_request_waits_for_it_and_whether_its_node_reads_segments_of_a_folder(
    background: bool, folder: bool, asked: bool, direct: bool
) -> None:
    read = store_pb2.Read(read=1, hashes=PACKED, first_block=1, tokens=12, background=background, direct=asked)
    opened = store_codec.read_from(store_pb2.Read.FromString(read.SerializeToString()), ExportId(7), NodeId("n"), MODEL, folder)
    assert opened == ReadOpened(ExportId(7), NodeId("n"), MODEL.model, HASHES, 1, 12, background, direct)


@pytest.mark.parametrize(("first_block", "tokens"), [(0, 0), (1, 4), (0, 13), (3, 13), (1 << 31, 12)])
def test_a_read_of_what_is_no_part_of_its_prompt_is_refused(first_block: int, tokens: int) -> None:
    read = store_pb2.Read(read=1, hashes=PACKED, first_block=first_block, tokens=tokens)
    with pytest.raises(MalformedMessage, match="a read of tokens"):
        store_codec.read_from(read, ExportId(1), NodeId("n"), MODEL, folder=True)
