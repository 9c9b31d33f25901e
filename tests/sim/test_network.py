"""Messages keep their order however late they are; blocks wait for links, and every fetch ends exactly once."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from orchestrator.core.commands import Fetch, SendBlocks
from orchestrator.core.events import BlocksSent, ExportClosed, ExportOpened, FetchEnded, FetchProgressed, NodeEvent
from orchestrator.core.types import BlockId, CostProfile, ExportId, NodeId, NodeSpec, RequestId
from orchestrator.sim.agenda import Agenda
from orchestrator.sim.faults import Faults
from orchestrator.sim.network import Network, Transfers
from tests.builders import node_spec, prompt_hashes

HOP_S = 0.25
A, B, C = (node_spec(id=NodeId(name), profile=CostProfile(fetch_bytes_per_s=64.0, fetch_latency_s=0.5)) for name in "abc")


def network(agenda: Agenda, faults: Faults | None = None, seed: int = 1) -> Network:
    return Network(agenda, HOP_S, faults, Random(seed))


def finish(agenda: Agenda) -> None:
    while len(agenda):
        agenda.step()


def sent(faults: Faults | None, every_s: float, count: int, seed: int = 1) -> list[tuple[int, float]]:
    """Send numbered messages on one way, and return numbers and seconds on the way as they arrive."""
    agenda = Agenda()
    wire = network(agenda, faults, seed)
    arrived: list[tuple[int, float]] = []
    for number in range(count):
        start = number * every_s
        agenda.at(start, wire.send, "x", "y", lambda number=number, start=start: arrived.append((number, agenda.now - start)))
    finish(agenda)
    return arrived


def test_a_message_takes_the_latency() -> None:
    assert sent(None, every_s=1.0, count=3) == [(0, HOP_S), (1, HOP_S), (2, HOP_S)]


def test_messages_of_one_moment_arrive_in_order() -> None:
    assert [number for number, _ in sent(None, every_s=0.0, count=50)] == list(range(50))


def test_late_messages_hold_up_those_behind_them_and_no_longer_than_they_may() -> None:
    arrived = sent(Faults(until_s=100.0, late_share=0.5, late_s_max=3.0), every_s=0.5, count=200)
    assert [number for number, _ in arrived] == list(range(200))
    seconds = [seconds for _, seconds in arrived]
    assert max(seconds) <= HOP_S + 3.0
    assert len([one for one in seconds if one > HOP_S]) > 50
    assert len([one for one in seconds if one == HOP_S]) > 10


def test_messages_on_other_ways_are_not_held_up() -> None:
    agenda = Agenda()
    wire = network(agenda, Faults(until_s=1.0, late_share=1.0, late_s_max=1000.0))
    arrived: list[str] = []
    wire.send("x", "y", arrived.append, "late")
    # After faults end, only the way on which something is late waits for it.
    for source, target in (("x", "y"), ("y", "x"), ("x", "z")):
        agenda.at(1.0, wire.send, source, target, arrived.append, f"{source}{target}")
    finish(agenda)
    assert arrived == ["yx", "xz", "late", "xy"]


def test_the_same_seed_gives_the_same_delays() -> None:
    faults = Faults(until_s=100.0, late_share=0.5)
    assert sent(faults, 0.5, 50, seed=3) == sent(faults, 0.5, 50, seed=3) != sent(faults, 0.5, 50, seed=4)


class Bench:
    """Transfers between nodes that do nothing by themselves; what is told to whom, and when."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.agenda = Agenda()
        self.told: list[tuple[float, str, NodeEvent]] = []
        self.moved: list[tuple[NodeId, int]] = []
        wire = network(self.agenda)
        self.transfers = Transfers(self.agenda, wire, self._tell, lambda *moved: self.moved.append(moved), faults, Random(1))

    def _tell(self, node: NodeId, event: NodeEvent) -> None:
        self.told.append((self.agenda.now, node, event))

    def at(self, when: float, action: Any, *arguments: Any) -> None:
        self.agenda.at(when, action, *arguments)

    def run(self) -> list[tuple[float, str, NodeEvent]]:
        """Let everything happen; return what was told since."""
        finish(self.agenda)
        told, self.told = self.told, []
        return told


def fetch(request: int = 1, source: NodeSpec = A) -> Fetch:
    return Fetch(RequestId(request), source.id, prompt_hashes("ab"), 0, (BlockId(5), BlockId(6)), 8, pending=False)


def blocks(export: int, count: int, tokens: int, final: bool = True) -> SendBlocks:
    return SendBlocks(ExportId(export), tuple(map(BlockId, range(count))), tokens, final, computed_tokens=tokens if final else 0)


def opened(export: int, request: int = 1) -> ExportOpened:
    return ExportOpened(ExportId(export), RequestId(request), prompt_hashes("ab"), 0, 8, pending=False)


def test_a_fetch_opens_at_its_source_moves_block_by_block_and_ends() -> None:
    bench = Bench()
    bench.transfers.start(B, fetch())
    assert bench.run() == [(HOP_S, "a", opened(1))]
    bench.transfers.carry(blocks(1, 1, 4, final=False))
    bench.transfers.carry(blocks(1, 1, 8))
    assert len(bench.transfers) == 1
    assert bench.run() == [
        # A block of 64 bytes at 64 bytes a second, and half a second of latency; the next one waits for the link alone.
        (HOP_S + 1.5, "a", BlocksSent(ExportId(1), (BlockId(0),))),
        (HOP_S + 1.5, "b", FetchProgressed(RequestId(1), 4)),
        (HOP_S + 2.5, "a", BlocksSent(ExportId(1), (BlockId(0),))),
        (HOP_S + 2.5, "b", FetchEnded(RequestId(1), 8, computed_tokens=8)),
        (HOP_S + 2.5 + HOP_S, "a", ExportClosed(ExportId(1))),
    ]
    assert (bench.moved, len(bench.transfers)) == ([("b", 64), ("b", 64)], 0)


def test_an_end_without_blocks_comes_after_the_blocks_before_it() -> None:
    bench = Bench()
    bench.transfers.start(B, fetch())
    bench.run()
    bench.transfers.carry(blocks(1, 0, 0))
    assert [(when, event) for when, node, event in bench.run() if node == "b"] == [(HOP_S, FetchEnded(RequestId(1), 0))]
    bench.transfers.start(B, fetch())
    bench.run()
    begun = bench.agenda.now
    bench.transfers.carry(blocks(2, 2, 8, final=False))
    bench.transfers.carry(blocks(2, 0, 8))
    ended = [(when - begun, event) for when, node, event in bench.run() if node == "b"]
    assert ended[-1] == (pytest.approx(2.5), FetchEnded(RequestId(1), 8, computed_tokens=8))


def arrivals(*fetches: tuple[NodeSpec, NodeSpec]) -> list[float]:
    """Return how long one block takes on each of some ways (reader, source) that are asked for at one moment."""
    bench = Bench()
    for number, (reader, source) in enumerate(fetches, 1):
        bench.transfers.start(reader, fetch(number, source))
    bench.run()
    begun = bench.agenda.now
    for number in range(1, len(fetches) + 1):
        bench.transfers.carry(blocks(number, 1, 8))
    ended = {event.request: when - begun for when, _, event in bench.run() if isinstance(event, FetchEnded)}
    return [ended[RequestId(number)] for number in range(1, len(fetches) + 1)]


@pytest.mark.parametrize(
    ("ways", "seconds"),
    [
        ([(B, A)], [1.5]),
        # One source's link out, one reader's link in.
        ([(B, A), (C, A)], [1.5, 2.5]),
        ([(C, A), (C, B)], [1.5, 2.5]),
        # Out and in are two links, and so are those of other nodes.
        ([(B, A), (A, B)], [1.5, 1.5]),
        ([(B, A), (C, B)], [1.5, 1.5]),
        # The third waits for both of the others' links.
        ([(B, A), (A, C), (A, B)], [1.5, 1.5, 2.5]),
        ([(B, A), (B, A), (B, A)], [1.5, 2.5, 3.5]),
    ],
)
def test_a_link_carries_one_transfer_at_a_time(ways: list[tuple[NodeSpec, NodeSpec]], seconds: list[float]) -> None:
    assert arrivals(*ways) == seconds


def test_blocks_go_at_the_readers_rate() -> None:
    slow = replace(B, profile=CostProfile(fetch_bytes_per_s=16.0, fetch_latency_s=0.0))
    at_once = replace(C, profile=CostProfile(fetch_bytes_per_s=float("inf"), fetch_latency_s=0.0))
    assert arrivals((slow, A)) == [4.0]
    assert arrivals((at_once, A)) == [0.0]


def test_a_fetch_that_is_given_up_ends_with_what_had_come_and_nothing_comes_after() -> None:
    bench = Bench()
    bench.transfers.start(B, fetch())
    bench.run()
    bench.transfers.carry(blocks(1, 1, 4, final=False))
    bench.transfers.carry(blocks(1, 1, 8))
    bench.at(2.0, bench.transfers.stop, B.id, RequestId(1))
    told = bench.run()
    assert [(when, event) for when, node, event in told if node == "b"] == [
        (HOP_S + 1.5, FetchProgressed(RequestId(1), 4)),
        (2.0, FetchEnded(RequestId(1), 4)),
    ]
    assert told[-1] == (2.0 + HOP_S, "a", ExportClosed(ExportId(1)))
    # It is over: neither giving it up again nor more blocks do anything.
    bench.transfers.stop(B.id, RequestId(1))
    bench.transfers.carry(blocks(1, 1, 8))
    assert (bench.run(), len(bench.transfers), bench.moved) == ([], 0, [("b", 64)])


def test_a_fetch_may_be_given_up_before_its_source_hears_of_it() -> None:
    bench = Bench()
    bench.transfers.start(B, fetch())
    bench.transfers.stop(B.id, RequestId(1))
    assert bench.run() == [(0.0, "b", FetchEnded(RequestId(1), 0)), (HOP_S, "a", ExportClosed(ExportId(1)))]


def test_a_request_may_fetch_again_after_its_fetch_ended() -> None:
    bench = Bench()
    bench.transfers.start(B, fetch())
    bench.transfers.stop(B.id, RequestId(1))
    bench.run()
    bench.transfers.start(B, fetch(source=C))
    bench.run()
    bench.transfers.carry(blocks(2, 2, 8))
    assert bench.run()[-2:] == [
        (pytest.approx(2 * HOP_S + 2.5), "b", FetchEnded(RequestId(1), 8, computed_tokens=8)),
        (pytest.approx(3 * HOP_S + 2.5), "c", ExportClosed(ExportId(2))),
    ]


@pytest.mark.parametrize(("lost", "ended"), [(A, {1, 3}), (B, {1, 2}), (C, {2, 3})])
def test_a_lost_node_ends_what_it_read_and_what_it_was_read_for(lost: NodeSpec, ended: set[int]) -> None:
    bench = Bench()
    for number, (reader, source) in enumerate(((B, A), (C, B), (A, C)), 1):
        bench.transfers.start(reader, fetch(number, source))
    bench.run()
    bench.transfers.drop(lost.id)
    bench.transfers.drop(lost.id)
    found = [event for _, _, event in bench.run() if isinstance(event, FetchEnded)]
    assert sorted(found, key=lambda event: event.request) == [
        FetchEnded(RequestId(number), 0, failure=f"{lost.id} is gone") for number in sorted(ended)
    ]
    assert len(bench.transfers) == 1


def test_a_node_that_comes_back_does_not_wait_for_what_it_lost() -> None:
    bench = Bench()
    bench.transfers.start(B, fetch())
    bench.run()
    bench.transfers.carry(blocks(1, 100, 8))
    bench.transfers.drop(B.id)
    begun = bench.agenda.now
    bench.transfers.start(B, fetch(2, C))
    bench.at(begun + HOP_S, bench.transfers.carry, blocks(2, 1, 8))
    ended = {event.request: when - begun for when, _, event in bench.run() if isinstance(event, FetchEnded)}
    assert ended == {1: 0.0, 2: pytest.approx(HOP_S + 1.5)}


def test_connections_break_while_faults_last_and_not_after() -> None:
    bench = Bench(Faults(until_s=10.0, broken_fetch_share=1.0))
    bench.transfers.start(B, fetch())
    bench.run()
    bench.transfers.carry(blocks(1, 1, 8))
    assert [event for _, node, event in bench.run() if node == "b"] == [
        FetchEnded(RequestId(1), 0, failure="the connection broke")
    ]
    assert bench.moved == []
    bench.transfers.start(B, fetch(2))
    bench.at(10.0, bench.transfers.carry, blocks(2, 1, 8))
    assert [event for _, node, event in bench.run() if node == "b"] == [FetchEnded(RequestId(2), 8, computed_tokens=8)]
