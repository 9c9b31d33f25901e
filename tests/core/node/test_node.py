"""A node's rules as literals: events in, commands out."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.core.commands import (
    ClearTimer,
    DropGateway,
    Fetch,
    Forget,
    LoadBlocks,
    NodeCommand,
    Offer,
    PublishKv,
    ReportEnded,
    ReportFirstToken,
    RunStep,
    SendBlocks,
    SetTimer,
    Slice,
    StopFetch,
    StopOffer,
    TellLeases,
)
from orchestrator.core.config import SchedulerConfig
from orchestrator.core.events import (
    Assigned,
    BlocksSent,
    Cancelled,
    DrainRequested,
    Ended,
    Expected,
    ExportClosed,
    ExportOpened,
    FetchEnded,
    FetchProgressed,
    FirstToken,
    GatewayHeard,
    GatewayLost,
    LeaseEnded,
    LeasePlaced,
    NodeEvent,
    OfferEnded,
    ResyncRequested,
    SliceResult,
    SourceLost,
    StepFailed,
    StepFinished,
    TimerFired,
)
from orchestrator.core.node import leases as leases_module
from orchestrator.core.node import node as node_module
from orchestrator.core.node.node import Node
from orchestrator.core.outlook import ContextId, Outlook
from orchestrator.core.timers import ExportTimer, FetchTimer, GatewayTimer, HoldTimer, LeaseTimer
from orchestrator.core.types import (
    BlockHash,
    BlockId,
    CostProfile,
    ExportId,
    FinishReason,
    GatewayId,
    KvBatch,
    LeaseId,
    Load,
    NodeId,
    OfferId,
    RequestId,
    Role,
    StepId,
    StoredRun,
    Tier,
    request_id,
)
from tests.builders import assignment, lease, prompt_hashes

MakeNode = Callable[..., Node]
R1, R2, R3 = RequestId(1), RequestId(2), RequestId(3)
E1, E2 = ExportId(1), ExportId(2)
PEER = NodeId("peer")
SILENT, SILENT_S = FetchTimer(RequestId(1)), SchedulerConfig().fetch_silent_s_max
A, AB, ABC = prompt_hashes("abc")


def step(number: int, *slices: Slice, decoding: int = 0) -> RunStep:
    return RunStep(StepId(number), slices, decoding)


def part(request: int, start: int, count: int, first_block: int, blocks: tuple[int, ...], sample: bool = True) -> Slice:
    return Slice(RequestId(request), start, count, first_block, tuple(BlockId(block) for block in blocks), sample)


def finished(number: int, *results: SliceResult) -> StepFinished:
    return StepFinished(StepId(number), results, 0.0)


def token(request: int, *hashes: bytes, stopped: bool = False) -> SliceResult:
    return SliceResult(RequestId(request), 1, tuple(BlockHash(name) for name in hashes), stopped)


def nothing(request: int) -> SliceResult:
    return SliceResult(RequestId(request))


def ended(
    request: int, reason: FinishReason, output: int = 0, computed: int = 0, message: str = "", peer: int = 0
) -> ReportEnded:
    return ReportEnded(Ended(RequestId(request), reason, output, computed, message, peer_tokens=peer))


def first_token(request: int, computed: int) -> ReportFirstToken:
    return ReportFirstToken(FirstToken(RequestId(request), computed))


def stored(sequence: int, parent: bytes | None, *hashes: bytes) -> PublishKv:
    run = StoredRun(None if parent is None else BlockHash(parent), tuple(BlockHash(name) for name in hashes))
    return PublishKv((KvBatch(sequence, (run,)),))


def blocks(*numbers: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(number) for number in numbers)


def feed(node: Node, *events: NodeEvent, now: float = 0.0) -> list[NodeCommand]:
    """Let several things happen; returns what the last one led to."""
    commands: list[NodeCommand] = []
    for event in events:
        commands = node.handle(event, now)
        node.validate()
    return commands


def offer(number: int, parent: bytes | None, hashes: tuple[BlockHash, ...], *numbers: int) -> Offer:
    return Offer(OfferId(number), None if parent is None else BlockHash(parent), hashes, blocks(*numbers))


def offers(commands: list[NodeCommand]) -> list[NodeCommand]:
    return [command for command in commands if isinstance(command, Offer | StopOffer)]


# --- generating -------------------------------------------------------------------------------------------------------


def test_a_request_is_prefilled_decoded_and_reported(make_node: MakeNode) -> None:
    node = make_node()
    # The whole prompt is one chunk; its slice tells three blocks and asks for a token.
    assert feed(node, Assigned(assignment(1, "ab", tail=1, output_tokens_max=2))) == [step(1, part(1, 0, 9, 0, (0, 1, 2)))]
    # The first token is reported, the next step starts at once, the full blocks are published.
    assert feed(node, finished(1, token(1))) == [
        first_token(1, computed=9),
        step(2, part(1, 9, 1, 3, ()), decoding=1),
        stored(1, None, A, AB),
    ]
    # The second token is the last: blocks are given back before the end is reported.
    assert feed(node, finished(2, token(1))) == [Forget(R1), ended(1, FinishReason.LENGTH, output=2, computed=9)]
    assert node.load() == Load(blocks_free=14, blocks_cached=2, prefetch_room_blocks=4)


def test_a_request_that_comes_with_what_it_generated_goes_on_after_it(make_node: MakeNode) -> None:
    node = make_node()
    # Nine tokens of a prompt and four of five that may be generated: all of them are computed, and one more is sampled.
    resumed = assignment(1, "abc", tail=1, prompt_tokens=9, generated_tokens=4, output_tokens_max=6)
    assert feed(node, Assigned(resumed)) == [step(1, part(1, 0, 13, 0, (0, 1, 2, 3)))]
    # The first token that it brings here is reported; what is billed is the prompt alone.
    commands = feed(node, finished(1, token(1)))
    assert commands[:2] == [first_token(1, computed=9), step(2, part(1, 13, 1, 4, ()), decoding=1)]
    # The limit counts what was generated before.
    assert feed(node, finished(2, token(1))) == [Forget(R1), ended(1, FinishReason.LENGTH, output=6, computed=9)]


def test_a_prefill_computes_what_was_generated_too_for_the_node_that_goes_on(make_node: MakeNode) -> None:
    node = make_node()
    resumed = assignment(1, "abc", tail=1, prompt_tokens=9, generated_tokens=4, output_tokens_max=6, role=Role.PREFILL)
    assert feed(node, Assigned(resumed)) == [step(1, part(1, 0, 12, 0, (0, 1, 2), sample=False))]
    assert ended(1, FinishReason.PREFILLED, computed=9) in feed(node, finished(1, nothing(1)))
    feed(node, Cancelled(R1))


def test_a_fetch_of_what_goes_on_ends_before_its_last_token(make_node: MakeNode) -> None:
    node = make_node()
    resumed = assignment(
        1, "abc", tail=1, prompt_tokens=9, generated_tokens=4, source=PEER, source_tokens=13, source_pending=True
    )
    [fetch] = [command for command in feed(node, Assigned(replace(resumed, output_tokens_max=6))) if isinstance(command, Fetch)]
    assert (fetch.tokens, len(fetch.blocks)) == (12, 3)
    feed(node, FetchProgressed(R1, 12))
    assert feed(node, FetchEnded(R1, 12, 9))[-1] == step(1, part(1, 12, 1, 0, (0, 1, 2, 3)))
    assert first_token(1, computed=9) in feed(node, finished(1, token(1)))


def test_nothing_is_left_to_generate_of_what_has_brought_all(make_node: MakeNode) -> None:
    refused = assignment(1, "abc", tail=1, prompt_tokens=9, generated_tokens=4, output_tokens_max=4)
    message = "4 tokens of output were generated already, of 4 at most"
    assert feed(make_node(), Assigned(refused)) == [Forget(R1), ended(1, FinishReason.FAILED, message=message)]


def test_a_stop_token_ends_a_request(make_node: MakeNode) -> None:
    node = make_node()
    commands = feed(node, Assigned(assignment(1, "", tail=3)), finished(1, token(1, stopped=True)))
    assert commands == [first_token(1, computed=3), Forget(R1), ended(1, FinishReason.STOP, output=1, computed=3)]


def test_a_long_prompt_is_cut_into_chunks_and_samples_at_its_end_only(make_node: MakeNode) -> None:
    node = make_node(step_tokens_max=4)
    assert feed(node, Assigned(assignment(1, "a", tail=2))) == [step(1, part(1, 0, 4, 0, (0, 1), sample=False))]
    assert feed(node, finished(1, nothing(1))) == [step(2, part(1, 4, 2, 2, ())), stored(1, None, A)]


def test_a_second_request_reuses_the_prefix_and_is_billed_for_the_rest(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, "ab", output_tokens_max=1)), finished(1, token(1)))
    # Blocks 0 and 1 are reused; block 2 came back free.
    assert feed(node, Assigned(assignment(2, "abc", tail=1))) == [step(2, part(2, 8, 5, 0, (0, 1, 2, 3)))]
    assert feed(node, finished(2, token(2)))[0] == first_token(2, computed=5)


def test_a_prompt_that_is_cached_to_its_end_still_computes_a_token(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, "ab", tail=0, output_tokens_max=1)), finished(1, token(1)))
    # Only the first of its two cached blocks may be used: a sequence that samples computes at least one token.
    assert feed(node, Assigned(assignment(2, "ab", tail=0))) == [step(2, part(2, 4, 4, 0, (0, 2)))]


def test_without_prefix_caching_everything_is_computed_again(make_node: MakeNode) -> None:
    node = make_node(config=SchedulerConfig(prefix_caching=False))
    assert feed(node, Assigned(assignment(1, output_tokens_max=1)), finished(1, token(1)))[-1] == ended(
        1, FinishReason.LENGTH, 1, 9
    )
    assert feed(node, Assigned(assignment(2))) == [step(2, part(2, 0, 9, 0, (0, 1, 2)))]


def test_blocks_that_output_completes_are_published_under_the_names_the_engine_gives(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, "a", tail=3)), finished(1, token(1)))
    # Computing token 7 (of 0..7) completes the second block.
    assert feed(node, finished(2, token(1, b"a+"))) == [step(3, part(1, 8, 1, 2, (2,)), decoding=1), stored(2, A, b"a+")]


def test_siblings_that_arrive_together_compute_their_common_prefix_once(make_node: MakeNode) -> None:
    node = make_node(step_tokens_max=8)
    assert feed(node, Assigned(assignment(1, "ab", tail=1))) == [step(1, part(1, 0, 8, 0, (0, 1, 2), sample=False))]
    # The second follows the first; a stranger passes it, as far as the step allows.
    assert feed(node, Assigned(assignment(2, "ab", tail=2))) == []
    assert feed(node, Assigned(assignment(3, "", tail=2))) == []
    assert node.load().waiting == 2
    # The shared blocks are there: the sibling gets them and computes its own two tokens.
    assert feed(node, finished(1, nothing(1))) == [
        step(2, part(1, 8, 1, 3, ()), part(2, 8, 2, 0, (0, 1, 3)), part(3, 0, 2, 0, (4,))),
        stored(1, None, A, AB),
    ]


def test_a_follower_computes_for_itself_when_its_leader_is_cancelled(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, source=PEER, source_tokens=9, source_pending=True)))
    assert feed(node, Assigned(assignment(2))) == []  # the blocks it needs are on their way
    assert feed(node, Cancelled(R1)) == [ClearTimer(SILENT), StopFetch(R1), step(1, part(2, 0, 9, 0, (3, 4, 5)))]
    feed(node, FetchEnded(R1, 0))


def test_a_sequence_that_gives_way_to_itself_starts_over_without_its_duplicates(make_node: MakeNode) -> None:
    node = make_node(blocks=4)
    # Two short prompts whose outputs are alike: both compute block x, the first one's is cached.
    feed(node, Assigned(assignment(1, "", tail=2)), Assigned(assignment(2, "", tail=2, output_tokens_max=12)))
    feed(node, finished(1, token(1)), finished(2, token(1), token(2)))
    feed(node, finished(3, token(1, b"x", stopped=True), token(2)))
    feed(node, finished(4, token(2, b"x")), *(finished(number, token(2)) for number in (5, 6, 7)), finished(8, token(2, b"xy")))
    feed(node, *(finished(number, token(2)) for number in (9, 10, 11)))
    # It holds three blocks and the cached twin of its first, and needs a fourth: it takes the twin instead of its own.
    assert feed(node, finished(12, token(2, b"xyz")))[0] == step(13, part(2, 12, 1, 0, (0, 2, 3, 1)))
    assert node.load().preemptions == 1


# --- prefill and decode apart -----------------------------------------------------------------------------------------


def test_a_prefill_computes_all_but_the_last_token_and_is_held_for_a_while(make_node: MakeNode) -> None:
    node = make_node()
    assert feed(node, Assigned(assignment(1, role=Role.PREFILL))) == [step(1, part(1, 0, 8, 0, (0, 1), sample=False))]
    assert feed(node, finished(1, nothing(1)), now=5.0) == [
        Forget(R1),
        ended(1, FinishReason.PREFILLED, computed=8),
        SetTimer(HoldTimer(RequestId(1)), 35.0),
        stored(1, None, A, AB),
    ]
    assert node.load().blocks_used == 2
    assert feed(node, TimerFired(HoldTimer(RequestId(1))), now=35.0) == []
    assert node.load() == Load(blocks_free=14, blocks_cached=2, prefetch_room_blocks=4)


def test_a_prefill_that_is_cached_completely_needs_no_step_and_makes_room_for_the_next(make_node: MakeNode) -> None:
    node = make_node(sequences_max=1)
    feed(node, Assigned(assignment(1, output_tokens_max=1)), finished(1, token(1)), Assigned(assignment(3, "x")))
    feed(node, Assigned(assignment(2, role=Role.PREFILL)), Assigned(assignment(5, role=Role.PREFILL)))
    feed(node, Assigned(assignment(4, "y", output_tokens_max=1)))
    commands = feed(node, finished(2, token(3, stopped=True)))
    assert ended(2, FinishReason.PREFILLED, computed=0) in commands
    assert ended(5, FinishReason.PREFILLED, computed=0) in commands
    assert commands[-2] == step(3, part(4, 0, 5, 0, (3, 4)))


def test_an_export_follows_a_prefill_and_sends_the_unfilled_block_last(make_node: MakeNode) -> None:
    node = make_node(step_tokens_max=4)
    feed(node, Assigned(assignment(1, "a", tail=3, role=Role.PREFILL)))
    assert feed(node, ExportOpened(E1, R1, (A,), 0, 6, pending=True)) == []
    assert feed(node, finished(1, nothing(1)))[0] == SendBlocks(E1, blocks(0), 4, final=False)
    commands = feed(node, finished(2, nothing(1)))
    assert commands[2:] == [SetTimer(HoldTimer(RequestId(1)), 30.0), SendBlocks(E1, blocks(1), 6, final=True, computed_tokens=6)]
    # Sent and closed: the prompt is not held any longer.
    assert feed(node, BlocksSent(E1, blocks(0)), BlocksSent(E1, blocks(1))) == []
    assert feed(node, ExportClosed(E1)) == [ClearTimer(HoldTimer(RequestId(1)))]
    assert node.load() == Load(blocks_free=15, blocks_cached=1, prefetch_room_blocks=4)


def test_an_export_closed_before_it_was_sent_leaves_the_prompt_held_for_another(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, role=Role.PREFILL)), finished(1, nothing(1)))
    assert feed(node, ExportOpened(E1, R1, (A, AB), 0, 8, pending=True)) == [SendBlocks(E1, blocks(0, 1), 8, True, 8)]
    assert feed(node, ExportClosed(E1)) == []
    assert node.load().blocks_used == 2
    # The peer comes back and wants only what it lacks.
    assert feed(node, ExportOpened(E2, R1, (A, AB), 1, 8, pending=True)) == [SendBlocks(E2, blocks(1), 8, True, 8)]
    # Cancelled meanwhile: what is being read stays, and so does the block before it, which must not be evicted first.
    feed(node, Cancelled(R1))
    assert node.load().blocks_used == 2


def test_an_export_may_come_before_its_request(make_node: MakeNode) -> None:
    node = make_node()
    opened = ExportOpened(E1, R1, (A, AB), 0, 8, pending=True)
    assert feed(node, opened, now=1.0) == [SetTimer(ExportTimer(ExportId(1)), 6.0)]
    assert feed(node, Assigned(assignment(1, role=Role.PREFILL))) == [
        ClearTimer(ExportTimer(ExportId(1))),
        step(1, part(1, 0, 8, 0, (0, 1), sample=False)),
    ]
    assert SendBlocks(E1, blocks(0, 1), 8, True, 8) in feed(node, finished(1, nothing(1)))


def test_an_export_whose_request_does_not_come_is_answered_with_what_is_cached(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, "a", output_tokens_max=1)), finished(1, token(1)))
    feed(node, ExportOpened(E1, R2, (A, AB), 0, 8, pending=True))
    assert feed(node, TimerFired(ExportTimer(ExportId(1)))) == [SendBlocks(E1, blocks(0), 4, final=True)]
    assert node.load().blocks_used == 1  # until it is closed
    assert feed(node, ExportClosed(E1)) == []
    assert node.load().blocks_used == 0


def test_an_export_of_cached_blocks_starts_where_the_peer_wants(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, "ab", output_tokens_max=1)), finished(1, token(1)))
    assert feed(node, ExportOpened(E1, R2, (A, AB, ABC), 1, 12, pending=False)) == [SendBlocks(E1, blocks(1), 8, True)]
    assert feed(node, ExportOpened(E2, R2, (ABC,), 0, 4, pending=False)) == [SendBlocks(E2, (), 0, True)]
    assert node.load().blocks_used == 2  # the one sent, and the one before it, which must not be evicted first


def test_who_means_a_former_start_of_the_node_gets_nothing_and_is_told_so_at_once(make_node: MakeNode) -> None:
    node = make_node(incarnation=2)
    feed(node, Assigned(assignment(1, "ab", output_tokens_max=1)), finished(1, token(1)))
    for pending in (True, False):
        assert feed(node, ExportOpened(E1, R2, (A, AB), 0, 8, pending, incarnation=1)) == [SendBlocks(E1, (), 0, final=True)]
    assert feed(node, ExportClosed(E1)) == []
    assert feed(node, ExportOpened(E2, R2, (A, AB), 0, 8, False, incarnation=2)) == [SendBlocks(E2, blocks(0, 1), 8, True)]


def test_a_fetch_says_which_start_of_its_source_is_meant(make_node: MakeNode) -> None:
    node = make_node()
    given = assignment(1, source=PEER, source_tokens=9, source_incarnation=7)
    [fetch, _] = feed(node, Assigned(given))
    assert isinstance(fetch, Fetch)
    assert fetch.incarnation == 7


def test_more_exports_than_allowed_are_answered_with_nothing(make_node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "EXPORTS_MAX", 0)
    node = make_node()
    assert feed(node, ExportOpened(E1, R1, (A,), 0, 4, pending=True)) == [SendBlocks(E1, (), 0, final=True)]
    assert feed(node, ExportClosed(E1)) == []


def test_a_decode_node_fetches_what_is_being_computed_and_computes_the_last_token(make_node: MakeNode) -> None:
    node = make_node()
    source = {"source": PEER, "source_tokens": 9, "source_pending": True}
    # Blocks for the whole prompt; the last token's block is not fetched.
    assert feed(node, Assigned(assignment(1, **source))) == [
        Fetch(R1, PEER, (A, AB), 0, blocks(0, 1), 8, pending=True),
        SetTimer(SILENT, SILENT_S),
    ]
    assert feed(node, FetchProgressed(R1, 4)) == [stored(1, None, A)]
    assert feed(node, FetchEnded(R1, 8, computed_tokens=5)) == [
        ClearTimer(SILENT),
        step(1, part(1, 8, 1, 0, (0, 1, 2))),
        stored(2, A, AB),
    ]
    # Five tokens were computed for this request there, one here.
    assert feed(node, finished(1, token(1)))[0] == first_token(1, computed=6)


def test_what_a_fetch_does_not_bring_is_computed_here(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, source=PEER, source_tokens=9, source_pending=True)))
    commands = feed(node, FetchEnded(R1, 4, failure="link broken"))
    assert commands[1] == step(1, part(1, 4, 5, 0, (0, 1, 2)))
    assert feed(node, finished(1, token(1)))[0] == first_token(1, computed=5)


def test_a_source_that_is_silent_for_too_long_is_given_up(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, source=PEER, source_tokens=9, source_pending=True)))
    feed(node, FetchProgressed(R1, 4), now=1.0)
    # it was heard of since the timer was set: it has its whole time again
    assert feed(node, TimerFired(SILENT), now=SILENT_S) == [SetTimer(SILENT, 1.0 + SILENT_S)]
    assert feed(node, TimerFired(SILENT), now=1.0 + SILENT_S) == [StopFetch(R1)]
    # its blocks may be written to until the fetch has ended
    assert feed(node, SourceLost(R1, PEER), now=200.0) == []
    assert feed(node, FetchEnded(R1, 4, failure="stopped"), now=200.0)[0] == step(1, part(1, 4, 5, 0, (0, 1, 2)))


def test_a_fetch_from_a_lost_source_ends_and_the_rest_is_computed_here(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, source=PEER, source_tokens=9, source_pending=True)))
    assert feed(node, SourceLost(R1, NodeId("another"))) == []
    assert feed(node, SourceLost(R2, PEER)) == []
    assert feed(node, SourceLost(R1, PEER)) == [ClearTimer(SILENT), StopFetch(R1)]
    assert feed(node, SourceLost(R1, PEER)) == []
    assert feed(node, FetchEnded(R1, 0, failure="stopped"))[0] == step(1, part(1, 0, 9, 0, (0, 1, 2)))


def test_a_request_that_waits_does_not_ask_a_source_that_is_lost(make_node: MakeNode) -> None:
    node = make_node(sequences_max=1)
    feed(node, Assigned(assignment(1, "a", output_tokens_max=1)))
    feed(node, Assigned(assignment(2, "bc", source=PEER, source_tokens=9, source_pending=True)))
    assert node.load().waiting == 1
    feed(node, SourceLost(R2, PEER))
    commands = feed(node, finished(1, token(1)))
    assert not [command for command in commands if isinstance(command, Fetch)]
    assert [command.slices[0].count for command in commands if isinstance(command, RunStep)] == [9]


def test_blocks_cached_at_a_peer_are_fetched_if_there_is_a_whole_one(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, "a", output_tokens_max=1)), finished(1, token(1)))
    # Block a is here; the peer has 11 tokens, so b can be fetched and the rest of c cannot.
    assert feed(node, Assigned(assignment(2, "abc", source=PEER, source_tokens=11))) == [
        Fetch(R2, PEER, (A, AB, ABC), 1, blocks(1), 8, pending=False),
        SetTimer(FetchTimer(RequestId(2)), SILENT_S),
    ]
    # Others step meanwhile; this one has nothing to fetch.
    assert feed(node, Assigned(assignment(3, "a", source=PEER, source_tokens=7)))[0] == step(2, part(3, 4, 1, 0, (0, 4)))


def test_a_prefill_may_fetch_too_and_passes_on_what_its_source_computed(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, "ab", role=Role.PREFILL, source=PEER, source_tokens=8)))
    feed(node, ExportOpened(E1, R1, (A, AB), 0, 8, pending=True))
    assert feed(node, FetchProgressed(R1, 4))[0] == SendBlocks(E1, blocks(0), 4, final=False)
    assert feed(node, FetchEnded(R1, 8, computed_tokens=3))[2:5:2] == [
        ended(1, FinishReason.PREFILLED, computed=3, peer=6),
        SendBlocks(E1, blocks(1), 8, final=True, computed_tokens=3),
    ]


# --- ends of all kinds ------------------------------------------------------------------------------------------------


def test_a_waiting_request_is_cancelled_at_once(make_node: MakeNode) -> None:
    node = make_node(sequences_max=1)
    feed(node, Assigned(assignment(1)), Assigned(assignment(2)))
    assert feed(node, Cancelled(R2)) == [Forget(R2), ended(2, FinishReason.CANCELLED)]
    assert feed(node, Cancelled(R3)) == []  # unknown


def test_a_cancel_during_a_step_waits_for_its_end_and_drops_its_result(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1)))
    assert feed(node, Cancelled(R1), Cancelled(R1)) == []
    assert node.load().blocks_used == 3
    assert feed(node, finished(1, token(1))) == [Forget(R1), ended(1, FinishReason.CANCELLED)]
    assert node.load() == Load(blocks_free=16, prefetch_room_blocks=4)


def test_a_cancel_during_a_fetch_stops_it_and_waits_for_its_end(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, source=PEER, source_tokens=9, source_pending=True)))
    assert feed(node, Cancelled(R1)) == [ClearTimer(SILENT), StopFetch(R1)]
    assert feed(node, FetchProgressed(R1, 4)) == []
    assert node.load().blocks_used == 3
    assert feed(node, FetchEnded(R1, 4)) == [Forget(R1), ended(1, FinishReason.CANCELLED)]


def test_a_cancel_of_a_held_prompt_frees_it_and_its_end_is_not_reported_twice(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, role=Role.PREFILL)), finished(1, nothing(1)))
    assert feed(node, Cancelled(R1)) == [ClearTimer(HoldTimer(RequestId(1)))]
    assert node.load().blocks_used == 0


def test_a_gateway_that_hangs_is_noticed_by_its_silence_and_its_requests_end(make_node: MakeNode) -> None:
    node, mine, others = make_node(), request_id(GatewayId(1), 1), request_id(GatewayId(2), 1)
    timer = GatewayTimer(GatewayId(1))
    feed(node, Assigned(assignment(mine)), Assigned(assignment(others, "c")))
    news = node.news
    # looked at three times in the seconds that silence is borne for
    assert feed(node, GatewayHeard(GatewayId(1), 3.0), now=10.0) == [SetTimer(timer, 11.0)]
    assert feed(node, GatewayHeard(GatewayId(1), 3.0), now=10.9) == []
    assert feed(node, TimerFired(timer), now=11.0) == [SetTimer(timer, 12.0)]
    assert feed(node, TimerFired(timer), now=12.0) == [SetTimer(timer, 13.0)]
    assert feed(node, TimerFired(timer), now=13.0) == [SetTimer(timer, 14.0)]
    assert node.news == news  # nothing of it is worth a frame
    # three looks without a sign of life: what a step writes to ends with that, what waits ends at once
    assert feed(node, TimerFired(timer), now=14.0) == [DropGateway(GatewayId(1))]
    assert ended(mine, FinishReason.CANCELLED) in feed(node, finished(1, token(mine)), now=14.1)
    assert node.load().running == 1
    assert feed(node, TimerFired(timer), now=15.0) == []


def test_what_is_expected_of_a_context_calls_for_nothing_and_is_no_news(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, "abcd")))
    news = node.news
    assert feed(node, Expected(Outlook(ContextId(1), (1.0,), (0.5,)))) == []
    assert node.news == news


def test_a_node_that_stood_still_itself_takes_no_gateway_for_hung(make_node: MakeNode) -> None:
    node, timer = make_node(), GatewayTimer(GatewayId(1))
    feed(node, Assigned(assignment(request_id(GatewayId(1), 1))), GatewayHeard(GatewayId(1), 3.0))
    for look, now in enumerate((1.0, 2.0, 3.0, 40.0, 41.0, 42.0)):  # after 3.0 one more would be the third
        assert feed(node, TimerFired(timer), now=now) == [SetTimer(timer, now + 1.0)], look
    assert DropGateway(GatewayId(1)) in feed(node, TimerFired(timer), now=43.0)


def test_a_gateway_that_is_lost_is_listened_for_no_more(make_node: MakeNode) -> None:
    node, timer = make_node(), GatewayTimer(GatewayId(1))
    feed(node, GatewayHeard(GatewayId(1), 3.0))
    assert feed(node, GatewayLost(GatewayId(1)), now=1.0) == [ClearTimer(timer)]
    assert feed(node, GatewayHeard(GatewayId(1), 3.0), now=5.0) == [SetTimer(timer, 6.0)]


def test_a_held_prompt_that_is_assigned_again_starts_over_from_its_own_cache(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, role=Role.PREFILL)), finished(1, nothing(1)))
    assert feed(node, Assigned(assignment(1, role=Role.PREFILL)), now=2.0) == [
        ClearTimer(HoldTimer(RequestId(1))),
        Forget(R1),
        ended(1, FinishReason.PREFILLED),
        SetTimer(HoldTimer(RequestId(1)), 32.0),
    ]


def test_readers_of_a_cancelled_request_get_what_there_is(make_node: MakeNode) -> None:
    node = make_node(step_tokens_max=4)
    feed(node, Assigned(assignment(1, role=Role.PREFILL)), ExportOpened(E1, R1, (A, AB), 0, 8, pending=True))
    feed(node, finished(1, nothing(1)), Cancelled(R1))
    commands = feed(node, finished(2, nothing(1)))
    assert commands == [SendBlocks(E1, (), 4, True, 4), Forget(R1), ended(1, FinishReason.CANCELLED, computed=4)]
    assert node.load().blocks_used == 1  # the peer may still be reading it
    feed(node, BlocksSent(E1, blocks(0)), ExportClosed(E1))
    assert node.load().blocks_used == 0


def test_a_lost_gateway_takes_its_requests_with_it(make_node: MakeNode) -> None:
    node = make_node(sequences_max=1)
    mine, other = request_id(GatewayId(1), 1), request_id(GatewayId(2), 1)
    for request in (mine, other, mine + 1):
        feed(node, Assigned(assignment(request)))
    assert feed(node, GatewayLost(GatewayId(1))) == [Forget(RequestId(mine + 1)), ended(mine + 1, FinishReason.CANCELLED)]
    assert feed(node, finished(1, token(mine)))[:2] == [Forget(mine), ended(mine, FinishReason.CANCELLED)]
    assert node.load().running == 1


def test_a_failed_step_ends_its_sequences_and_the_node_goes_on(make_node: MakeNode) -> None:
    node = make_node(sequences_max=1)
    feed(node, Assigned(assignment(1)), Assigned(assignment(2, "x")))
    assert feed(node, StepFailed(StepId(1), "out of memory")) == [
        Forget(R1),
        ended(1, FinishReason.FAILED, message="out of memory"),
        step(2, part(2, 0, 5, 0, (0, 1))),
    ]


def test_a_sequence_that_fails_alone_ends_alone(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1)), finished(1, token(1)))
    assert feed(node, finished(2, SliceResult(R1, failure="not a number"))) == [
        Forget(R1),
        ended(1, FinishReason.FAILED, output=1, computed=9, message="not a number"),
    ]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([DrainRequested()], "draining"),
        ([Assigned(assignment(8)), Assigned(assignment(9))], "queue full: 1 requests wait, at most 1 may"),
        ([Assigned(assignment(1))], "this node still has this request"),
    ],
)
def test_assignments_that_cannot_be_taken_fail_at_once(make_node: MakeNode, events: list[NodeEvent], message: str) -> None:
    node = make_node(config=SchedulerConfig(waiting_max=1), sequences_max=1)
    feed(node, *events)
    commands = feed(node, Assigned(assignment(1)))
    assert commands[-1] == ended(1, FinishReason.FAILED, message=message)
    # The engine keeps what it has of a request that is still here.
    assert (Forget(R1) in commands) == (message != "this node still has this request")


def test_a_reader_of_a_refused_request_is_answered_at_once(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, DrainRequested(), ExportOpened(E1, R1, (A, AB), 0, 8, pending=True))
    assert feed(node, Assigned(assignment(1, role=Role.PREFILL))) == [
        Forget(R1),
        ended(1, FinishReason.FAILED, message="draining"),
        ClearTimer(ExportTimer(ExportId(1))),
        SendBlocks(E1, (), 0, final=True),
    ]


def test_waiting_requests_wait_while_held_prompts_pin_all_blocks(make_node: MakeNode) -> None:
    node = make_node(blocks=3)
    feed(node, Assigned(assignment(1, role=Role.PREFILL)), finished(1, nothing(1)))
    # The node that is to fetch the first may wait for the second: it is held less long from now on, which is said once.
    assert feed(node, Assigned(assignment(2, "xy", tail=0)), now=1.0) == [
        SetTimer(HoldTimer(R1), SchedulerConfig().fetch_wait_s_max)
    ]
    assert feed(node, Assigned(assignment(3, "xy", tail=0)), now=2.0) == []
    commands = feed(node, TimerFired(HoldTimer(RequestId(1))), now=5.0)
    assert commands == [step(2, part(2, 0, 8, 0, (2, 1))), PublishKv((KvBatch(2, removed=(AB,)),))]


def test_a_prompt_that_was_held_for_long_goes_at_once_when_somebody_waits_for_its_blocks(make_node: MakeNode) -> None:
    node = make_node(blocks=3)
    feed(node, Assigned(assignment(1, role=Role.PREFILL)), finished(1, nothing(1)))
    assert feed(node, Assigned(assignment(2, "xy", tail=0)), now=20.0) == [SetTimer(HoldTimer(R1), 20.0)]


def test_tokens_computed_again_after_a_preemption_are_billed_once(make_node: MakeNode) -> None:
    node = make_node(blocks=4)
    feed(node, Assigned(assignment(1, "a", tail=3, output_tokens_max=7)), Assigned(assignment(2, "b", tail=0)))
    feed(node, finished(1, token(1)))
    # Both need a block and one is left: the first takes it, the second gives way.
    assert feed(node, finished(2, token(1, b"a1"), token(2)))[1] == step(3, part(1, 8, 1, 2, (3,)), decoding=1)
    assert (node.load().preemptions, node.load().waiting) == (1, 1)
    feed(node, *(finished(number, token(1)) for number in (3, 4, 5)))
    # The first takes the second's block too: what it held is forgotten.
    assert feed(node, finished(6, token(1, b"a2")))[0] == step(7, part(1, 12, 1, 3, (2,)), decoding=1)
    # The second starts over with its prompt and the token it has.
    assert step(8, part(2, 0, 5, 0, (2, 3))) in feed(node, finished(7, token(1)))
    report = feed(node, *(finished(number, token(2)) for number in (8, 9, 10)))[-1]
    assert report == ended(2, FinishReason.LENGTH, output=4, computed=4)


# --- what gateways are told -------------------------------------------------------------------------------------------


def test_a_gateway_that_missed_batches_gets_them_or_everything(make_node: MakeNode) -> None:
    node = make_node(config=SchedulerConfig(resync_batches_max=1), sequences_max=1)
    for number, prompt in ((1, "a"), (2, "x")):
        feed(node, Assigned(assignment(number, prompt, output_tokens_max=1)), finished(number, token(number)))
    second = KvBatch(2, (StoredRun(None, prompt_hashes("x")),))
    runs = (StoredRun(None, (A,)), StoredRun(None, prompt_hashes("x")))
    gateway = GatewayId(7)
    assert feed(node, ResyncRequested(gateway, 1)) == [PublishKv((second,), gateway)]
    for number, after in ((1, 0), (2, None)):
        everything = KvBatch(2, runs, cleared=True, snapshot=number)
        assert feed(node, ResyncRequested(gateway, after)) == [PublishKv((everything,), gateway)]


def test_the_load_counts_what_is_there_now(make_node: MakeNode) -> None:
    node = make_node(step_tokens_max=8)
    feed(node, Assigned(assignment(1, "", tail=2)), finished(1, token(1)), Assigned(assignment(2, "ab", tail=1)))
    feed(node, Assigned(assignment(3, "xy", tail=1)))
    # One decodes two tokens of context, one is being prefilled, one waits; nothing of the nine tokens each is computed yet.
    load = Load(running=2, waiting=1, queued_tokens=18, context_tokens=2, blocks_free=12, blocks_used=4, prefetch_room_blocks=4)
    assert node.load() == load


def test_tokens_that_a_source_will_bring_are_not_queued_work(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1, "ab", tail=1, source=PEER, source_tokens=9, source_pending=True)))
    assert node.load().queued_tokens == 1
    feed(node, FetchEnded(R1, 0, failure="gone"))
    assert node.load().queued_tokens == 9


# --- the host's store -------------------------------------------------------------------------------------------------


def test_a_complete_prompt_is_offered_and_then_what_its_output_completed(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    commands = feed(node, Assigned(assignment(1, "ab", output_tokens_max=4)), finished(1, token(1)))
    assert offers(commands) == [offer(1, None, (A, AB), 0, 1)]
    commands = feed(node, OfferEnded(OfferId(1)), finished(2, token(1)), finished(3, token(1)), finished(4, token(1, b"abx")))
    assert offers(commands) == [offer(2, AB, (BlockHash(b"abx"),), 2)]
    feed(node, OfferEnded(OfferId(2)))
    # all of it was offered: the next turn adds what is new
    commands = feed(node, Assigned(assignment(2, "abc", output_tokens_max=1)), finished(5, token(2)))
    assert [(made.parent, made.hashes) for made in offers(commands) if isinstance(made, Offer)] == [(AB, (ABC,))]


def test_a_node_without_a_store_offers_and_loads_nothing(make_node: MakeNode) -> None:
    node = make_node()
    assert feed(node, Assigned(assignment(1, stored_tokens=8)))[0] == step(1, part(1, 0, 9, 0, (0, 1, 2)))
    assert offers(feed(node, finished(1, token(1)))) == []


def test_a_prompt_that_is_held_for_its_decode_node_is_offered(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    commands = feed(node, Assigned(assignment(1, "ab", role=Role.PREFILL)), finished(1, nothing(1)))
    assert offers(commands) == [offer(1, None, (A, AB), 0, 1)]


def test_what_the_store_did_not_take_is_offered_again_with_the_chains_next_use(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    feed(node, Assigned(assignment(1, "ab", output_tokens_max=1)), finished(1, token(1)))
    assert offers(feed(node, OfferEnded(OfferId(1), failure="no room"))) == []
    commands = feed(node, Assigned(assignment(2, "abc", output_tokens_max=1)), finished(2, token(2)))
    assert offers(commands) == [offer(2, None, (A, AB, ABC), 0, 1, 2)]


def test_offers_are_cut_to_a_share_of_the_pool_and_go_on_as_they_end(make_node: MakeNode) -> None:
    node = make_node(SchedulerConfig(offered_share_max=0.25), stores=True, blocks=8)
    commands = feed(node, Assigned(assignment(1, "abcde", output_tokens_max=1)), finished(1, token(1)))
    hashes = prompt_hashes("abcde")
    assert offers(commands) == [offer(1, None, hashes[:2], 0, 1)]
    assert offers(feed(node, OfferEnded(OfferId(1)))) == [offer(2, hashes[1], hashes[2:4], 2, 3)]
    assert offers(feed(node, OfferEnded(OfferId(2)))) == [offer(3, hashes[3], hashes[4:], 4)]
    assert offers(feed(node, OfferEnded(OfferId(3)))) == []


def test_what_follows_on_a_part_that_the_store_did_not_take_is_not_offered_to_it(make_node: MakeNode) -> None:
    node = make_node(SchedulerConfig(offered_share_max=0.25), stores=True, blocks=8)
    feed(node, Assigned(assignment(1, "abcde", output_tokens_max=1)), finished(1, token(1)))
    assert offers(feed(node, OfferEnded(OfferId(1), failure="no room"))) == []


def test_an_offer_keeps_its_blocks_until_it_has_ended_and_is_stopped_when_they_are_needed(make_node: MakeNode) -> None:
    node = make_node(SchedulerConfig(offered_share_max=1.0), stores=True, blocks=4)
    feed(node, Assigned(assignment(1, "ab", output_tokens_max=1)), finished(1, token(1)))
    # the offer claims two of four blocks, the other request needs three
    assert feed(node, Assigned(assignment(2, "xy", output_tokens_max=1)), now=1.0) == [StopOffer(OfferId(1))]
    assert feed(node, GatewayHeard(GatewayId(0), 3.0), now=2.0)[0] != StopOffer(OfferId(1))
    commands = feed(node, OfferEnded(OfferId(1), failure="stopped"), now=3.0)
    assert [command.slices[0].count for command in commands if isinstance(command, RunStep)] == [9]


def test_what_the_store_has_is_loaded_after_the_hit_and_reported_by_tier(make_node: MakeNode) -> None:
    node = make_node(SchedulerConfig(offered_share_max=0.0), stores=True)
    feed(node, Assigned(assignment(1, "a", output_tokens_max=1)), finished(1, token(1)))
    hashes = prompt_hashes("abcd")
    # block a is here; the store has 15 tokens, three whole blocks
    assert feed(node, Assigned(assignment(2, "abcd", stored_tokens=15))) == [
        LoadBlocks(R2, hashes, 1, blocks(1, 2), 12),
        SetTimer(FetchTimer(R2), SILENT_S),
    ]
    assert node.load().queued_tokens == 5
    feed(node, FetchProgressed(R2, 8))
    commands = feed(node, FetchEnded(R2, 12, cmx_tokens=4))
    assert commands[:2] == [ClearTimer(FetchTimer(R2)), step(2, part(2, 12, 5, 0, (0, 1, 2, 3, 4)))]
    assert feed(node, finished(2, token(2)))[0] == ReportFirstToken(FirstToken(R2, 5, cpu_tokens=4, cmx_tokens=4))


def test_what_a_load_does_not_bring_is_fetched_and_then_computed(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    hashes = prompt_hashes("abcd")
    feed(node, Assigned(assignment(1, "abcd", stored_tokens=8, source=PEER, source_tokens=12)))
    assert feed(node, FetchEnded(R1, 4, failure="not here"))[1:] == [
        Fetch(R1, PEER, hashes, 1, blocks(1, 2), 12, pending=False),
        SetTimer(SILENT, SILENT_S),
        PublishKv((KvBatch(1, (StoredRun(None, hashes[:1]),)),)),
    ]
    assert feed(node, FetchEnded(R1, 8))[1] == step(1, part(1, 8, 9, 0, (0, 1, 2, 3, 4)))


def test_a_source_that_is_lost_during_a_load_is_not_asked_afterwards(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    feed(node, Assigned(assignment(1, "abcd", stored_tokens=8, source=PEER, source_tokens=12)))
    assert feed(node, SourceLost(R1, PEER)) == []
    assert feed(node, FetchEnded(R1, 8))[1] == step(1, part(1, 8, 9, 0, (0, 1, 2, 3, 4)))


def test_what_was_loaded_is_not_offered_again(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    feed(node, Assigned(assignment(1, "abc", stored_tokens=8)), FetchEnded(R1, 8))
    assert offers(feed(node, finished(1, token(1)))) == [offer(1, AB, (ABC,), 2)]


def test_what_was_loaded_past_the_stores_memory_is_offered_to_it(make_node: MakeNode) -> None:
    node = make_node(stores=True)
    feed(node, Assigned(assignment(1, "abcd", stored_tokens=12)), FetchProgressed(R1, 4), FetchEnded(R1, 12, direct=True))
    # it has the first block in memory, and could not take the last without those between
    assert offers(feed(node, finished(1, token(1)))) == [offer(1, A, prompt_hashes("abcd")[1:], 1, 2, 3)]


def test_a_load_is_overtaken_once_computing_would_be_sooner(make_node: MakeNode) -> None:
    node = make_node(stores=True, profile=CostProfile(prefill_token_s=0.1))
    commands = feed(node, Assigned(assignment(1, "abcdefgh", stored_tokens=32)))
    # silent for as long as computing all of it would take: 32 tokens, of which 7 blocks may be loaded
    assert commands[1] == SetTimer(SILENT, pytest.approx(3.2))
    feed(node, FetchProgressed(R1, 4), now=0.1)
    assert feed(node, FetchProgressed(R1, 8), now=0.4) == [
        PublishKv((KvBatch(2, (StoredRun(A, (AB,)),)),)),
    ]
    # 4 blocks are missing, at 0.5 seconds a block; they would be computed in 1.6 seconds
    late = feed(node, FetchProgressed(R1, 16), now=1.6)
    assert late[:2] == [ClearTimer(SILENT), StopFetch(R1)]
    assert feed(node, FetchEnded(R1, 16, failure="stopped"), now=1.7)[0] == step(1, part(1, 16, 17, 0, tuple(range(9))))


def test_a_silent_store_is_given_up_when_the_prompt_could_have_been_computed(make_node: MakeNode) -> None:
    node = make_node(stores=True, profile=CostProfile(prefill_token_s=0.1))
    feed(node, Assigned(assignment(1, "abcd", stored_tokens=16)))
    feed(node, FetchProgressed(R1, 8), now=1.0)
    # what is missing takes 0.8 seconds to compute, and so long may the store be silent
    assert feed(node, TimerFired(SILENT), now=1.6) == [SetTimer(SILENT, pytest.approx(1.8))]
    assert feed(node, TimerFired(SILENT), now=1.8) == [StopFetch(R1)]


def test_a_preempted_sequence_loads_again_what_was_forgotten_of_it(make_node: MakeNode) -> None:
    node = make_node(SchedulerConfig(offered_share_max=0.0), stores=True, blocks=7)
    feed(node, Assigned(assignment(1, "ab", output_tokens_max=16)), finished(1, token(1)))
    feed(node, Assigned(assignment(2, "xy", output_tokens_max=16, stored_tokens=8)))
    feed(node, FetchEnded(R2, 8))
    loads = 0
    for number in range(2, 40):
        plan = node._scheduler.plan
        if plan is None or plan.step != number:
            break
        results = [token(one.request) if one.sample else nothing(one.request) for one in plan.slices]
        loads += sum(isinstance(command, LoadBlocks) for command in feed(node, finished(number, *results)))
    assert node.load().preemptions > 0
    assert loads > 0


# --- leases -----------------------------------------------------------------------------------------------------------

L, L2 = LeaseId("l"), LeaseId("l2")


def serve(node: Node, request: int, prompt: str, number: int, now: float = 0.0) -> int:
    """Let a request for one token come and go; returns how many prompt tokens it computed."""
    feed(node, Assigned(assignment(request, prompt, output_tokens_max=1)), now=now)
    plan = node._scheduler.plan
    assert plan is not None
    assert plan.step == number
    feed(node, finished(number, token(request)), now=now)
    return sum(part.count for part in plan.slices)


def flood(node: Node, first: int) -> int:
    """Fill the pool of 16 blocks with other prompts several times; returns the number of the next request and step."""
    for number in range(first, first + 12):
        serve(node, number, chr(ord("A") + number) * 5, number)
    return first + 12


def test_a_leased_chain_outlives_a_flood_until_its_time_is_over(make_node: MakeNode) -> None:
    node = make_node()
    serve(node, 1, "ab", 1)
    placed = lease("l", "ab", ttl_s=60.0)
    assert feed(node, LeasePlaced(placed), now=1.0) == [SetTimer(LeaseTimer(L), 61.0), TellLeases((placed,))]
    number = flood(node, 2)
    assert node.load().blocks_leased == 2
    assert serve(node, number, "ab", number) == 1
    assert feed(node, TimerFired(LeaseTimer(L)), now=61.0) == []
    number = flood(node, number + 1)
    assert serve(node, number, "ab", number) == 9


def test_what_comes_to_be_cached_of_a_leased_chain_is_kept_too_and_what_follows_on_it_is_not(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, LeasePlaced(lease("l", "abc")))
    serve(node, 1, "ab", 1)
    assert node.load().blocks_leased == 2
    serve(node, 2, "abcdef", 2)
    assert node.load().blocks_leased == 3
    number = flood(node, 3)
    assert serve(node, number, "abcdef", number) == 13


def test_a_lease_that_ends_keeps_nothing_and_late_word_of_it_is_ignored(make_node: MakeNode) -> None:
    node = make_node()
    serve(node, 1, "ab", 1)
    feed(node, LeasePlaced(lease("l", "ab", revision=2)))
    assert feed(node, LeaseEnded(L, 1)) == []
    over = LeaseEnded(L, 2)
    assert feed(node, over) == [ClearTimer(LeaseTimer(L)), TellLeases(ended=(over,))]
    assert node.load().blocks_leased == 0
    assert feed(node, LeasePlaced(lease("l", "ab", revision=2))) == []
    assert feed(node, over) == []
    assert feed(node, LeasePlaced(lease("l", "ab", revision=3)))[0] == SetTimer(LeaseTimer(L), 60.0)


def test_a_later_revision_replaces_a_lease_and_may_lower_it(make_node: MakeNode) -> None:
    node = make_node()
    serve(node, 1, "abc", 1)
    feed(node, LeasePlaced(lease("l", "ab")))
    feed(node, LeasePlaced(lease("l", "abc", revision=1)))
    assert node.load().blocks_leased == 3
    assert feed(node, LeasePlaced(lease("l", "ab"))) == []
    lowered = lease("l", "abc", revision=2, tier=Tier.CPU)
    assert feed(node, LeasePlaced(lowered), now=5.0) == [SetTimer(LeaseTimer(L), 65.0), TellLeases((lowered,))]
    assert node.load().blocks_leased == 0


def test_leases_share_what_they_have_in_common_and_take_no_more_than_their_share(make_node: MakeNode) -> None:
    node = make_node(SchedulerConfig(leased_share_max=0.25))  # 4 of 16 blocks
    serve(node, 1, "abcx", 1)
    serve(node, 2, "abcyz", 2)
    feed(node, LeasePlaced(lease("l", "abcx")))
    assert (node.load().blocks_leased, node.load().blocks_unleased) == (4, 0)
    feed(node, LeasePlaced(lease("l2", "abcyz")))
    assert (node.load().blocks_leased, node.load().blocks_unleased) == (4, 2)
    # the first one ends: what it alone had makes room for one block of the other
    feed(node, LeaseEnded(L, 0))
    assert (node.load().blocks_leased, node.load().blocks_unleased) == (4, 1)


def test_a_lease_of_another_model_is_not_this_nodes_business(make_node: MakeNode) -> None:
    node = make_node()
    assert feed(node, LeasePlaced(lease(model="another"))) == []
    assert feed(node, ResyncRequested(GatewayId(0), None))[1:] == []


def test_a_gateway_that_knows_nothing_is_told_of_all_leases_with_the_time_they_have_left(make_node: MakeNode) -> None:
    node = make_node()
    feed(
        node,
        LeasePlaced(lease("l", ttl_s=60.0)),
        LeasePlaced(lease("l2", tier=Tier.CPU, ttl_s=30.0)),
        LeaseEnded(LeaseId("x"), 4),
    )
    told = feed(node, ResyncRequested(GatewayId(3), None), now=10.0)[1]
    left = (lease("l", ttl_s=50.0), lease("l2", tier=Tier.CPU, ttl_s=20.0))
    assert told == TellLeases(left, (LeaseEnded(LeaseId("x"), 4),), GatewayId(3))


def test_leases_give_way_to_a_prompt_that_would_never_be_admitted_beside_them(make_node: MakeNode) -> None:
    node = make_node()
    serve(node, 1, "abcdefgh", 1)
    feed(node, LeasePlaced(lease("l", "abcd")), LeasePlaced(lease("l2", "abcdefgh")))
    assert node.load().blocks_leased == 8
    # 12 of 16 blocks: the lease placed last gives way, and the other need not
    assert serve(node, 2, "z" * 11, 2) == 45
    assert (node.load().blocks_leased, node.load().blocks_unleased) == (4, 8)
    assert serve(node, 3, "y" * 12, 3) == 49
    assert (node.load().blocks_leased, node.load().blocks_unleased) == (0, 12)


def test_a_node_keeps_no_more_leases_than_it_may(make_node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "LEASES_MAX", 1)
    node = make_node()
    feed(node, LeasePlaced(lease("l")))
    assert feed(node, LeasePlaced(lease("l2"))) == []
    assert feed(node, LeasePlaced(lease("l", revision=1)))[0] == SetTimer(LeaseTimer(L), 60.0)


def test_canary_the_checker_notices_a_leaked_block(make_node: MakeNode) -> None:
    node = make_node()
    feed(node, Assigned(assignment(1)))
    sequence = node._sequences[R1]
    lost = sequence.table.pop()
    with pytest.raises(AssertionError, match="free 13 \\+ cached 0 \\+ private 2 are not the 16 blocks"):
        node.validate()
    sequence.table.append(lost)
