"""Journals: what is written is read again exactly, a killed process leaves the rest usable, what is no journal is refused."""

import gzip
import random
import struct
from pathlib import Path

import msgspec
import pytest

from orchestrator.core.commands import NodeCommand
from orchestrator.core.config import (
    ClusterConfig,
    ClusterSettings,
    GatewayConfig,
    PoolConfig,
    SchedulerConfig,
    StoreConfig,
    TenantConfig,
)
from orchestrator.core.events import (
    Assigned,
    BlocksWanted,
    ExportOpened,
    FetchEnded,
    NodeEvent,
    SliceResult,
    StepFinished,
    TimerFired,
)
from orchestrator.core.node.node import Node
from orchestrator.core.timers import (
    ClusterTimer,
    CmxTimer,
    DetachTimer,
    ExportTimer,
    FetchTimer,
    GatewayTimer,
    HoldTimer,
    LeaseTimer,
    MoveTimer,
    NodeTimer,
    PrefetchTimer,
    RequestTimer,
    ResyncTimer,
    ReturnTimer,
    StoreResyncTimer,
    StoreTimer,
    UnknownTimer,
    cluster_timer,
    node_timer,
    store_timer,
)
from orchestrator.core.types import (
    Assignment,
    BlockHash,
    ExportId,
    GatewayId,
    LeaseId,
    ModelName,
    MoveId,
    NodeId,
    PoolKind,
    Prefetch,
    RequestId,
    Role,
    StepId,
    StoreId,
    prefetch_id,
    request_id,
)
from orchestrator.wire.journal import (
    ClusterHeader,
    JournalError,
    NodeHeader,
    NodeJournalWriter,
    StoreHeader,
    StoreJournalWriter,
    cluster_header,
    read_journal,
    recorded,
    store_header,
)
from orchestrator.wire.replay import replay
from tests.builders import node_spec, store_spec, stored_model
from tests.core.store.test_store_random import Scenario

HEADER = NodeHeader(node_spec(blocks=8), SchedulerConfig(step_tokens_max=16, sequences_max=4))


def assigned(serial: int) -> Assigned:
    hashes = (BlockHash(random.Random(serial).randbytes(16)),)
    return Assigned(Assignment(request_id(GatewayId(0), serial), Role.GENERATE, 6, hashes, output_tokens_max=3))


def life(path: Path) -> list[tuple[float, NodeEvent, list[NodeCommand]]]:
    """Write the journal of a node that serves a request, and is to have blocks for another; return what is in it."""
    core, told = Node(HEADER.spec, HEADER.scheduler), []
    one = SliceResult(request_id(GatewayId(0), 1), 1)
    events: list[NodeEvent] = [assigned(1), *(StepFinished(StepId(step), (one,), 0.1 + step / 7) for step in (1, 2, 3))]
    wanted = Prefetch(prefetch_id(GatewayId(0), 1), (BlockHash(bytes(16)),), 1 / 3, source=NodeId("peer"), source_blocks=1)
    events += [BlocksWanted(wanted), TimerFired(PrefetchTimer(wanted.id)), FetchEnded(wanted.id, 0)]
    writer = NodeJournalWriter(path, HEADER)
    for number, event in enumerate(events):
        now = 100 + number / 3
        commands = core.handle(event, now)
        told.append((now, event, commands))
        writer.record(now, event, commands)
    writer.close()
    writer.close()
    return told


def test_what_is_written_is_read_again_to_the_last_bit(tmp_path: Path) -> None:
    told = life(tmp_path / "one.journal.gz")
    journal = read_journal(tmp_path / "one.journal.gz")
    assert journal.header == HEADER
    assert [(entry.now, entry.event) for entry in journal.entries] == [(now, event) for now, event, _ in told]
    assert journal.ended == "stopped"


def test_a_fresh_core_answers_as_the_recorded_one_did(tmp_path: Path) -> None:
    life(tmp_path / "one.journal.gz")
    assert replay(read_journal(tmp_path / "one.journal.gz")) is None


def test_canary_a_missing_event_is_noticed_where_it_is_missing(tmp_path: Path) -> None:
    core, one = Node(HEADER.spec, HEADER.scheduler), SliceResult(request_id(GatewayId(0), 1), 1)
    writer = NodeJournalWriter(tmp_path / "one.journal.gz", HEADER)
    writer.record(1.0, assigned(1), core.handle(assigned(1), 1.0))
    core.handle(assigned(2), 1.5)  # this one is kept from the journal
    event = StepFinished(StepId(1), (one,), 0.1)
    writer.record(2.0, event, core.handle(event, 2.0))
    writer.close()
    difference = replay(read_journal(tmp_path / "one.journal.gz"))
    assert difference is not None
    assert (difference.number, difference.event) == (2, event)
    assert f"request={request_id(GatewayId(0), 2)}" in str(difference)


def test_an_error_of_the_core_is_an_answer_too(tmp_path: Path) -> None:
    for name, commands in (("raised", None), ("wrong", [])):
        writer = NodeJournalWriter(tmp_path / name, HEADER)
        writer.record(1.0, StepFinished(StepId(7), (), 0.1), commands)
        writer.close()
    assert replay(read_journal(tmp_path / "raised")) is None
    difference = replay(read_journal(tmp_path / "wrong"))
    assert difference is not None
    assert "step 7 ended but none runs" in str(difference)


def test_a_journal_cut_off_by_a_kill_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "one.journal.gz"
    told = life(path)
    whole = gzip.decompress(path.read_bytes())
    for cut in (len(whole) - 1, len(whole) - 100):
        path.write_bytes(gzip.compress(whole[:cut])[:-4])
        journal = read_journal(path)
        entries = list(journal.entries)
        assert journal.ended == ""
        assert [entry.event for entry in entries] == [event for _, event, _ in told[: len(entries)]]
        assert replay(read_journal(path)) is None


def test_a_journal_ends_at_its_size_and_says_so(tmp_path: Path) -> None:
    writer = NodeJournalWriter(tmp_path / "one.journal.gz", HEADER, file_bytes_max=900)
    for second in range(1, 200):
        writer.record(second * 10.0, assigned(second), ())
    writer.close()
    journal = read_journal(tmp_path / "one.journal.gz")
    assert 0 < len(list(journal.entries)) < 199
    assert "has reached 900 bytes" in journal.ended


def test_no_secret_and_no_key_is_in_a_header() -> None:
    config = ClusterConfig(
        cluster=ClusterSettings(secret="hidden"),
        gateway=GatewayConfig(metrics_key="hidden"),
        tenants=(TenantConfig("team", ("hidden",), share=3.0),),
        pools=(PoolConfig("both", PoolKind.AGGREGATED),),
        store=StoreConfig(cmx="s3://hidden"),
    )
    header = cluster_header(GatewayId(3), config)
    assert isinstance(header, ClusterHeader)
    assert "hidden" not in repr(header)
    assert header.config.pools == config.pools
    assert header.config.tenants == (TenantConfig("team", share=3.0),)  # what decisions depend on


def test_a_store_answers_as_it_did_whatever_happened_to_it(tmp_path: Path) -> None:
    scenario = Scenario(seed=3, turns=100)
    store, path = scenario.driver.store, tmp_path / "one.journal.gz"
    writer = StoreJournalWriter(path, store_header(store.spec, scenario.config))
    handle = store.handle
    store.handle = lambda event, now: list(recorded(writer, handle, event, now))
    scenario.driver.run()
    writer.close()
    journal = read_journal(path)
    assert journal.header == StoreHeader(store.spec, scenario.config)
    assert {type(entry.event).__name__ for entry in journal.entries} >= {"Offered", "ReadOpened", "CmxWritten", "LeasePlaced"}
    assert replay(read_journal(path)) is None


def test_the_place_of_cmx_is_not_in_a_header() -> None:
    assert "hidden" not in repr(store_header(store_spec(), StoreConfig(cmx="s3://hidden")))


def packed(*records: object) -> bytes:
    """Return a journal made by hand."""
    encoded = [msgspec.msgpack.encode(record) for record in records]
    return gzip.compress(b"".join(struct.pack("<I", len(record)) + record for record in encoded))


FIRST = ("weft-journal", 2, "0.1.0", "node", HEADER)
CLUSTER = (*FIRST[:3], "cluster", cluster_header(GatewayId(0), ClusterConfig(pools=(PoolConfig("both", PoolKind.AGGREGATED),))))


def store_first(**model: int) -> tuple[object, ...]:
    return (*FIRST[:3], "store", StoreHeader(store_spec(models=(stored_model(**model),)), StoreConfig()))


NESTED = struct.pack("<I", 9000) + b"\x91" * 9000


def test_a_journal_names_timers_by_text_and_reads_them_as_what_they_are(tmp_path: Path) -> None:
    core, writer = Node(HEADER.spec, HEADER.scheduler), NodeJournalWriter(tmp_path / "one", HEADER)
    opened = ExportOpened(ExportId(7), request_id(GatewayId(0), 1), (), 0, 6, pending=True)
    events: tuple[NodeEvent, ...] = (opened, TimerFired(ExportTimer(ExportId(7))))
    for now, event in enumerate(events):
        writer.record(now, event, core.handle(event, now))
    writer.close()
    first, second = read_journal(tmp_path / "one").entries
    assert first.commands is not None
    # As versions wrote it in which a key was nothing but its text.
    assert msgspec.msgpack.decode(first.commands[0][1]) == {"key": "export:7", "at": HEADER.scheduler.fetch_wait_s_max}
    assert second.event == events[1]
    assert replay(read_journal(tmp_path / "one")) is None


@pytest.mark.parametrize(
    "timer",
    [
        RequestTimer(request_id(GatewayId(3), 1)),
        ResyncTimer(NodeId("a:0")),
        StoreResyncTimer(StoreId("s:1"), ModelName("Qwen/Q:3")),
        ReturnTimer(7),
    ],
)
def test_the_text_of_a_clusters_timer_names_it(timer: ClusterTimer) -> None:
    assert cluster_timer(str(timer)) == timer


@pytest.mark.parametrize(
    "timer",
    [
        HoldTimer(RequestId(5)),
        FetchTimer(RequestId(5)),
        ExportTimer(ExportId(5)),
        GatewayTimer(GatewayId(5)),
        PrefetchTimer(prefetch_id(GatewayId(5), 5)),
    ],
)
def test_the_text_of_a_nodes_timer_names_it(timer: NodeTimer) -> None:
    assert node_timer(str(timer)) == timer


@pytest.mark.parametrize("timer", [MoveTimer(MoveId(5)), LeaseTimer(LeaseId("a:0")), DetachTimer(NodeId("a:0")), CmxTimer()])
def test_the_text_of_a_stores_timer_names_it(timer: StoreTimer) -> None:
    assert store_timer(str(timer)) == timer
    with pytest.raises(UnknownTimer, match="a store has no timer 'hold:1'"):
        store_timer("hold:1")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (packed((*FIRST[:3], ["node"], HEADER)), "is no weft-journal of version 2: starts with 'weft-journal', 2, ['node']"),
        (packed(store_first(slots=-1)), "its header is of no store: it has -1 slots for 'm'"),
        (packed(store_first(segment_blocks=0)), "its header is of no store: segment_blocks of 'm' is 0"),
        (packed((*FIRST[:4], {})), "its header does not fit this version of Weft: Object missing required field `spec`"),
        (packed((*FIRST[:4], NodeHeader(node_spec(blocks=-1), SchedulerConfig()))), "its header is of no node: it has -1 blocks"),
        (packed((*FIRST[:4], NodeHeader(node_spec(blocks=10**12), SchedulerConfig()))), "its header is of no node: it has 1000"),
        (gzip.compress(NESTED), "is no journal of Weft's"),
        (packed(FIRST, (1.0, "Closed", ["stopped"], ())), "record 2: Expected `object`, got `array`"),
        (packed(FIRST, (1.0, "Closed", {"reason": 7}, ())), "record 2: Expected `str`, got `int`"),
        (packed(FIRST, (1.0, "Closed", {}, ())), "record 2: knows no 'reason'"),
        (packed(FIRST, (1.0, "Nothing", {}, ())), "record 2: a node knows no event 'Nothing'"),
        (packed(FIRST, (1.0, "RequestAbandoned", {"request": 1}, ())), "record 2: a node knows no event 'RequestAbandoned'"),
        (packed(FIRST, (1.0, "DrainRequested", {}, (("Cancel", {}),))), "record 2: a node knows no command 'Cancel'"),
        (packed(CLUSTER, (1.0, "DrainRequested", {}, (("Forget", {}),))), "record 2: a cluster knows no command 'Forget'"),
        (packed(CLUSTER, (1.0, "Cancelled", {"request": 1}, ())), "record 2: a cluster knows no event 'Cancelled'"),
        (packed(CLUSTER, (1.0, "TimerFired", {"key": "hold:1"}, ())), "record 2: a cluster has no timer 'hold:1'"),
        (packed(store_first(), (1.0, "Assigned", {}, ())), "record 2: a store knows no event 'Assigned'"),
        (packed(store_first(), (1.0, "TimerFired", {"key": "hold:1"}, ())), "record 2: a store has no timer 'hold:1'"),
        (packed(FIRST, (1.0, "TimerFired", {"key": "request:1"}, ())), "record 2: a node has no timer 'request:1'"),
        (packed(FIRST, (1.0, "TimerFired", {"key": "hold:one"}, ())), "record 2: a timer must be about a number, is 'hold:one'"),
        (packed(FIRST, (1.0, "TimerFired", {"key": 5}, ())), "record 2: Expected `str`, got `int`"),
    ],
)
def test_what_is_made_by_hand_is_refused_where_it_is_wrong(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "one.journal.gz"
    path.write_bytes(content)
    with pytest.raises(JournalError) as refused:
        replay(read_journal(path))
    assert str(refused.value).startswith(f"{path}: {problem}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"text", "is not gzip"),
        (gzip.compress(b""), "is no journal"),
        (gzip.compress(b"\x02\x00\x00\x00\x01\x01"), "is no journal"),
        (None, "No such file"),
    ],
)
def test_what_is_no_journal_is_refused_in_one_line(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "other"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(JournalError) as refused:
        read_journal(path)
    assert str(refused.value).startswith(f"{path}: {problem}")
