"""What a node brings before a request asks for it: while nobody waits, as far as there is room, no longer than it is wanted."""

from collections.abc import Callable

import pytest

from orchestrator.core.commands import (
    ClearTimer,
    Fetch,
    LoadBlocks,
    NodeCommand,
    Offer,
    PublishKv,
    ReportPrefetchEnded,
    SetTimer,
    StopFetch,
)
from orchestrator.core.config import SchedulerConfig
from orchestrator.core.events import (
    Assigned,
    BlocksRetired,
    BlocksWanted,
    DrainRequested,
    FetchEnded,
    FetchProgressed,
    GatewayLost,
    LeasePlaced,
    NodeEvent,
    PrefetchCancelled,
    PrefetchEnded,
    SliceResult,
    StepFinished,
    TimerFired,
)
from orchestrator.core.node import prefetches as prefetches_module
from orchestrator.core.node.node import Node
from orchestrator.core.timers import PrefetchTimer
from orchestrator.core.types import (
    BlockId,
    GatewayId,
    NodeId,
    OfferId,
    Prefetch,
    PrefetchEnd,
    PrefetchId,
    StepId,
    prefetch_id,
)
from tests.builders import assignment, lease, prompt_hashes

MakeNode = Callable[..., Node]
G0 = GatewayId(0)
P1, P2, P3 = (prefetch_id(G0, serial) for serial in (1, 2, 3))
PEER = NodeId("peer")
#: Tokens in blocks of four, of a chain of one letter a block.
A, AB, ABC, ABCD = 4, 8, 12, 16


def wanted(identity: PrefetchId = P1, prompt: str = "abcd", stored: int | None = None, **changes: object) -> BlocksWanted:
    """Return that a gateway expects a prompt; the store has all of it."""
    stored_blocks = len(prompt) if stored is None else stored
    fields: dict[str, object] = {"keep_s": 30.0, "stored_blocks": stored_blocks, **changes}
    return BlocksWanted(Prefetch(identity, prompt_hashes(prompt), **fields))  # type: ignore[arg-type]


def ended(identity: PrefetchId, reason: PrefetchEnd, first: int = 0, end: int = 0) -> ReportPrefetchEnded:
    return ReportPrefetchEnded(PrefetchEnded(identity, reason, first, end))


def load(identity: PrefetchId, prompt: str, first: int, blocks: tuple[int, ...]) -> LoadBlocks:
    numbers = tuple(BlockId(block) for block in blocks)
    return LoadBlocks(identity, prompt_hashes(prompt), first, numbers, (first + len(blocks)) * 4)


def feed(node: Node, *events: NodeEvent, now: float = 0.0) -> list[NodeCommand]:
    """Let several things happen; returns what the last one led to, but for what gateways are told of holdings."""
    commands: list[NodeCommand] = []
    for event in events:
        commands = node.handle(event, now)
        node.validate()
    return [command for command in commands if not isinstance(command, PublishKv)]


def serve(node: Node, number: int, prompt: str, step: int) -> int:
    """Let a request be computed from start to end, in one step; returns the tokens that were computed of its prompt."""
    commands = feed(node, Assigned(assignment(number, prompt, output_tokens_max=1)))
    computed = len(prompt) * 4 + 1 - next(command.slices[0].start for command in commands if hasattr(command, "slices"))
    feed(node, StepFinished(StepId(step), (SliceResult(assignment(number).request, 1),), 0.0))
    return computed


def test_a_chain_is_loaded_from_the_store_and_kept_until_a_request_goes_on_from_it(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    # While nothing else is to be done it begins at once; its time is kept by the node's own clock.
    assert feed(node, wanted(), now=1.0) == [SetTimer(PrefetchTimer(P1), 31.0), load(P1, "abcd", 0, (0, 1, 2, 3))]
    assert node.load().blocks_prefetched == 4
    # What has come is cached, what gateways hear of; the rest follows.
    (told,) = node.handle(FetchProgressed(P1, AB), 1.1)
    assert isinstance(told, PublishKv)
    assert feed(node, FetchEnded(P1, ABCD), now=1.2) == []
    assert (node.load().blocks_prefetched, node.load().prefetched, node.load().prefetch_room_blocks) == (4, 4, 0)
    # A flood of other prompts does not push it out ..
    for number in range(2, 10):
        serve(node, number, chr(ord("k") + number) * 5, number - 1)
    assert node.load().blocks_prefetched == 4
    # .. and the prompt that was expected computes its last token only. It keeps the blocks from then on.
    commands = feed(node, Assigned(assignment(20, "abcd")), now=2.0)
    assert commands[:2] == [ClearTimer(PrefetchTimer(P1)), ended(P1, PrefetchEnd.USED, 0, 4)]
    assert commands[2].slices[0].start == ABCD  # type: ignore[union-attr]
    assert (node.load().blocks_prefetched, node.load().prefetch_used, node.load().prefetch_wasted) == (0, 4, 0)


def test_what_the_store_lacks_comes_from_a_peer_and_is_offered_to_the_store(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    serve(node, 1, "a", 1)
    feed(node, wanted(stored=2, source=PEER, source_blocks=4, source_incarnation=7))
    # The store has one block beyond what is here, and then loses it.
    commands = feed(node, FetchEnded(P1, A, failure="evicted"))
    (fetch,) = [command for command in commands if isinstance(command, Fetch)]
    assert (fetch.request, fetch.source, fetch.incarnation, fetch.pending) == (P1, PEER, 7, False)
    assert (fetch.first_block, fetch.tokens, len(fetch.blocks)) == (1, ABCD, 3)
    (offer,) = [command for command in feed(node, FetchEnded(P1, ABCD)) if isinstance(command, Offer)]
    assert (offer.offer, offer.hashes) == (OfferId(2), prompt_hashes("abcd")[1:])


def test_without_a_store_it_comes_from_a_peer_alone(make_node: MakeNode) -> None:
    node = make_node()
    commands = feed(node, wanted(source=PEER, source_blocks=3))
    assert [type(command) for command in commands] == [SetTimer, Fetch]
    assert feed(node, FetchEnded(P1, ABC)) == []
    assert node.load().blocks_prefetched == 3


def test_what_is_here_already_is_kept_and_nothing_is_asked_for(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    serve(node, 1, "abcd", 1)
    assert feed(node, wanted()) == [SetTimer(PrefetchTimer(P1), 30.0)]
    assert (node.load().blocks_prefetched, node.load().prefetched) == (4, 0)
    assert feed(node, PrefetchCancelled(P1)) == [
        ClearTimer(PrefetchTimer(P1)),
        ended(P1, PrefetchEnd.CANCELLED, 4, 4),
    ]


def test_nobody_that_has_anything_ends_it(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    feed(node, wanted(source=PEER, source_blocks=4))
    feed(node, FetchEnded(P1, 0, failure="the store is gone"))  # a store that dies ends its loads
    assert feed(node, FetchEnded(P1, 0, failure="peer is gone")) == [
        ClearTimer(PrefetchTimer(P1)),
        ended(P1, PrefetchEnd.NOT_FOUND),
    ]
    assert node.load().blocks_free == 16


def test_a_part_that_came_is_kept_when_a_store_dies(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    feed(node, wanted(), FetchProgressed(P1, AB), FetchEnded(P1, AB, failure="the store is gone"))
    assert node.load().blocks_prefetched == 2
    assert feed(node, TimerFired(PrefetchTimer(P1)), now=30.0)[-1] == ended(P1, PrefetchEnd.LAPSED, 0, 2)
    # It is ordinary cache now, and what is pushed out of it was brought in vain.
    for number in range(2, 10):
        serve(node, number, chr(ord("k") + number) * 5, number - 1)
    assert (node.load().prefetch_used, node.load().prefetch_wasted) == (0, 2)


def test_more_than_the_share_is_not_taken(make_node: MakeNode) -> None:
    node = make_node(SchedulerConfig(prefetched_share_max=0.25), stores=True)  # 4 of 16 blocks
    assert feed(node, wanted(prompt="abcdef"))[1] == load(P1, "abcdef", 0, (0, 1, 2, 3))
    assert feed(node, wanted(P2, "xy")) == [ended(P2, PrefetchEnd.NO_ROOM)]
    feed(node, FetchEnded(P1, ABCD))
    # What two have in common counts once; there is no room for what only the second has.
    assert feed(node, wanted(P2, "abcd")) == [SetTimer(PrefetchTimer(P2), 30.0)]
    assert feed(node, wanted(P3, "abcdz")) == [ended(P3, PrefetchEnd.NO_ROOM)]
    assert node.load().blocks_prefetched == 4
    assert make_node(SchedulerConfig(prefix_caching=False), stores=True).load().prefetch_room_blocks == 0


def test_blocks_that_are_in_use_are_not_taken_and_those_that_decoding_will_need_are_left(make_node: MakeNode) -> None:
    node = make_node(SchedulerConfig(prefetched_share_max=1.0), stores=True)
    feed(node, Assigned(assignment(1, "klmnopqrstuv", tail=1)))  # 13 of 16 blocks, and it may want one more
    assert node.load().prefetch_room_blocks == 2
    assert feed(node, wanted())[1] == load(P1, "abcd", 0, (13, 14))
    feed(node, FetchEnded(P1, AB))
    assert node.load().blocks_prefetched == 2


def test_it_waits_while_a_request_waits_or_loads(make_node: MakeNode) -> None:
    node = make_node(sequences_max=1, stores=True)
    feed(node, Assigned(assignment(1, "k")), Assigned(assignment(2, "l", output_tokens_max=1)))
    # The second waits for its slot.
    assert feed(node, wanted()) == [SetTimer(PrefetchTimer(P1), 30.0)]
    stopped = SliceResult(assignment(1).request, 1, (), True)
    assert LoadBlocks not in map(type, feed(node, StepFinished(StepId(1), (SliceResult(stopped.request, 1),), 0.0)))
    commands = feed(node, StepFinished(StepId(2), (stopped,), 0.0))
    assert [type(one) for one in commands].count(LoadBlocks) == 1


def test_a_request_that_loads_goes_first(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    feed(node, Assigned(assignment(1, "klm", stored_tokens=12)))
    assert feed(node, wanted()) == [SetTimer(PrefetchTimer(P1), 30.0)]
    commands = feed(node, FetchEnded(assignment(1).request, 12))
    assert [command.request for command in commands if isinstance(command, LoadBlocks)] == [P1]


def test_a_request_that_comes_while_it_is_brought_takes_over(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    feed(node, wanted(), FetchProgressed(P1, AB))
    commands = feed(node, Assigned(assignment(1, "abcde", stored_tokens=20)))
    assert commands[0] == StopFetch(P1)
    # It loads what has not come by then, from there on.
    (own,) = [command for command in commands if isinstance(command, LoadBlocks)]
    assert (own.request, own.first_block, own.tokens) == (assignment(1).request, 2, 20)
    # What still comes is cached if nobody else has brought it by then.
    assert feed(node, FetchProgressed(P1, ABC), FetchEnded(P1, ABC, failure="stopped")) == [
        ClearTimer(PrefetchTimer(P1)),
        ended(P1, PrefetchEnd.USED, 0, 3),
    ]
    feed(node, FetchEnded(assignment(1).request, 20))


def test_a_request_that_shares_only_a_beginning_leaves_it_alone(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    feed(node, wanted(), FetchEnded(P1, ABCD))
    assert ended(P1, PrefetchEnd.USED, 0, 4) not in feed(node, Assigned(assignment(1, "abx")))
    assert node.load().blocks_prefetched == 4


def test_it_gives_way_to_a_prompt_that_lacks_blocks(make_node: MakeNode) -> None:
    node = make_node(SchedulerConfig(prefetched_share_max=0.5), stores=True)
    feed(node, wanted(P1, "abcd"), FetchEnded(P1, ABCD), wanted(P2, "xyz"), FetchEnded(P2, ABC))
    assert node.load().blocks_prefetched == 7
    # 11 of 16 blocks: what came last goes, and what came before can stay.
    commands = feed(node, Assigned(assignment(1, "klmnopqrst")))
    assert [command for command in commands if isinstance(command, ReportPrefetchEnded)] == [ended(P2, PrefetchEnd.NO_ROOM, 0, 3)]
    assert (node.load().running, node.load().blocks_prefetched) == (1, 4)


def test_what_is_under_way_gives_way_once_nothing_is_written_to_it_any_more(make_node: MakeNode) -> None:
    node = make_node(SchedulerConfig(prefetched_share_max=0.5), stores=True)
    feed(node, LeasePlaced(lease("l", "opqr")))
    serve(node, 1, "opqr", 1)
    feed(node, wanted(P1, "abcdefgh"))
    assert feed(node, Assigned(assignment(2, "klmnkl"))) == [StopFetch(P1)]  # 7 blocks, 4 are free
    assert (node.load().waiting, node.load().blocks_leased) == (1, 4)  # leases need not give way
    commands = feed(node, FetchEnded(P1, AB, failure="stopped"))
    assert ended(P1, PrefetchEnd.NO_ROOM, 0, 2) in commands
    assert (node.load().running, node.load().blocks_leased) == (1, 4)


def test_it_gives_way_to_a_sequence_that_grows(make_node: MakeNode) -> None:
    node = make_node(SchedulerConfig(prefetched_share_max=1.0), blocks=8, stores=True)
    feed(node, Assigned(assignment(1, "klm", tail=3, output_tokens_max=40)))  # 4 of 8 blocks
    feed(node, wanted(P1, "abcdef"), FetchEnded(P1, 12, failure="no more"))
    assert node.load().blocks_prefetched == 3
    number, tokens = 1, 0
    while node.load().blocks_prefetched:
        feed(node, StepFinished(StepId(number), (SliceResult(assignment(1).request, 1),), 0.0))
        number, tokens = number + 1, tokens + 1
        assert tokens < 20, "it never gave way"
    assert (node.load().preemptions, node.load().running) == (0, 1)


def test_its_time_may_be_over_before_all_has_come(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    feed(node, wanted(keep_s=5.0))
    assert feed(node, TimerFired(PrefetchTimer(P1)), now=5.0) == [StopFetch(P1)]
    assert feed(node, FetchEnded(P1, A, failure="stopped"), now=5.1)[-1] == ended(P1, PrefetchEnd.LAPSED, 0, 1)
    assert feed(node, TimerFired(PrefetchTimer(P1)), now=6.0) == []


@pytest.mark.parametrize("event", [PrefetchCancelled(P1), GatewayLost(G0), DrainRequested()])
def test_who_asked_for_it_or_the_nodes_end_ends_it(make_node: MakeNode, event: NodeEvent) -> None:
    node = make_node(stores=True)
    feed(node, wanted(P1, "ab"), FetchEnded(P1, AB), wanted(P2, "xy"))
    commands = feed(node, event)
    assert ended(P1, PrefetchEnd.CANCELLED, 0, 2) in commands
    if event != PrefetchCancelled(P1):
        assert StopFetch(P2) in commands
        feed(node, FetchEnded(P2, 0, failure="stopped"))
        assert node.load().blocks_prefetched == 0
    assert feed(node, PrefetchCancelled(P1)) == []


def test_a_node_that_leaves_takes_none(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    assert feed(node, DrainRequested(), wanted()) == [ended(P1, PrefetchEnd.NO_ROOM)]
    assert node.load().prefetch_room_blocks == 0


def test_it_is_not_evicted_with_others_chains_but_for_being_cancelled(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    feed(node, wanted(), FetchEnded(P1, ABCD), BlocksRetired(prompt_hashes("abcd"), 0, at_once=True))
    assert node.load().blocks_prefetched == 4
    feed(node, PrefetchCancelled(P1), BlocksRetired(prompt_hashes("abcd"), 0, at_once=True))
    assert node.load().blocks_free == 16


def test_it_is_brought_in_portions_one_at_a_time(make_node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetches_module, "PORTION_BYTES", 2 * 64)
    node = make_node(SchedulerConfig(prefetched_share_max=0.5), stores=True)
    assert feed(node, wanted())[1] == load(P1, "abcd", 0, (0, 1))
    assert feed(node, wanted(P2, "xy")) == [SetTimer(PrefetchTimer(P2), 30.0)]
    # A request that comes meanwhile goes before the rest.
    feed(node, Assigned(assignment(1, "kl", stored_tokens=8)))
    assert feed(node, FetchEnded(P1, AB)) == []
    commands = feed(node, FetchEnded(assignment(1).request, 8))
    assert [(one.request, one.first_block) for one in commands if isinstance(one, LoadBlocks)] == [(P1, 2)]
    assert [one.request for one in feed(node, FetchEnded(P1, ABCD)) if isinstance(one, LoadBlocks)] == [P2]


def test_there_are_only_so_many(make_node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetches_module, "PREFETCHES_MAX", 1)
    node = make_node(stores=True)
    assert feed(node, wanted(P1, "ab"), wanted(P2, "xy")) == [ended(P2, PrefetchEnd.NO_ROOM)]
    # Of a gateway's former start: one end answers both.
    assert feed(node, wanted(P1, "ab")) == []
