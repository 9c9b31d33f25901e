"""A store's rules as literals: what is told, what is asked for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.core.commands import (
    CancelMove,
    ClearTimer,
    DeleteCmx,
    Grant,
    PublishHoldings,
    ReadCmx,
    ServeSegment,
    ServeSlots,
    SetTimer,
    StoreCommand,
    WriteCmx,
)
from orchestrator.core.config import StoreConfig
from orchestrator.core.events import (
    CmxFound,
    CmxRead,
    CmxWritten,
    EvictAsked,
    LeaseEnded,
    LeasePlaced,
    NodeAttached,
    NodeDetached,
    Offered,
    OfferWritten,
    PrefetchAsked,
    ReadClosed,
    ReadOpened,
    ResyncRequested,
    SegmentRead,
    SlotsRead,
    TimerFired,
)
from orchestrator.core.store.store import Store
from orchestrator.core.timers import CmxTimer, DetachTimer, LeaseTimer, MoveTimer
from orchestrator.core.types import (
    BlockHash,
    ExportId,
    GatewayId,
    KvBatch,
    Lease,
    LeasedBytes,
    LeaseId,
    ModelName,
    MoveFailure,
    MoveId,
    NodeId,
    OfferId,
    SlotId,
    StoredRun,
    TenantId,
    Tier,
)
from tests.builders import BLOCK_TOKENS, prompt_hashes, store_spec, stored_model

MODEL, NODE, OTHER = ModelName("m"), NodeId("n0"), NodeId("n1")
MakeStore = Callable[..., Store]


@pytest.fixture
def make_store() -> Iterator[MakeStore]:
    """Return a maker of stores with two nodes attached: `config` sets the store's settings, everything else its one model."""
    made: list[Store] = []

    def make(config: StoreConfig | None = None, **model: Any) -> Store:
        store = Store(store_spec(models=(stored_model(**model),)), config or StoreConfig())
        for node in (NODE, OTHER):
            store.handle(NodeAttached(node, MODEL), 0.0)
        made.append(store)
        return store

    yield make
    for store in made:
        store.validate()


def slots(*numbers: int) -> tuple[SlotId, ...]:
    return tuple(map(SlotId, numbers))


def offered(number: int, chain: str, start: int = 0, node: NodeId = NODE) -> Offered:
    names = prompt_hashes(chain)
    return Offered(OfferId(number), node, MODEL, names[start - 1] if start else None, names[start:])


def keep(store: Store, chain: str, number: int = 99) -> None:
    """Offer a chain and write all that is granted."""
    (grant,) = store.handle(offered(number, chain), 0.0)
    assert isinstance(grant, Grant)
    store.handle(OfferWritten(OfferId(number), len(grant.slots)), 0.0)


def opened(chain: str, blocks: int | None = None, first: int = 0, number: int = 1) -> ReadOpened:
    tokens = (len(chain) if blocks is None else blocks) * BLOCK_TOKENS
    return ReadOpened(ExportId(number), NODE, MODEL, prompt_hashes(chain), first, tokens)


def only(commands: Sequence[StoreCommand], *kinds: type) -> list[StoreCommand]:
    """Return the commands of some kinds."""
    return [command for command in commands if isinstance(command, kinds)]


def moves(commands: Sequence[StoreCommand]) -> list[StoreCommand]:
    return only(commands, ReadCmx, ServeSegment, WriteCmx, CancelMove, DeleteCmx)


# --- offers -----------------------------------------------------------------------------------------------------------


def test_an_offer_is_granted_written_and_told_of(make_store: MakeStore) -> None:
    store = make_store()
    assert store.handle(offered(1, "abc"), 0.0) == [Grant(OfferId(1), 0, slots(0, 1, 2))]
    assert store.handle(OfferWritten(OfferId(1), 2), 0.0) == [  # the copy of the third failed
        PublishHoldings(MODEL, (KvBatch(1, (StoredRun(None, prompt_hashes("ab")),)),))
    ]
    # What is held is skipped.
    assert store.handle(offered(2, "abc"), 0.0) == [Grant(OfferId(2), 2, slots(2))]
    store.handle(OfferWritten(OfferId(2), 1), 0.0)
    assert store.handle(offered(3, "abc"), 0.0) == [Grant(OfferId(3), 0, ())]
    # What follows on a block that is held is taken without what is before it.
    assert store.handle(offered(4, "abcd", start=3), 0.0) == [Grant(OfferId(4), 0, slots(3))]
    counts = store.load(MODEL).counts
    assert (counts.taken, counts.failures) == (3, (("copy", 1),))


def test_an_offer_whose_parent_is_not_held_is_an_orphan(make_store: MakeStore) -> None:
    assert make_store().handle(offered(1, "abc", start=2), 0.0) == [Grant(OfferId(1), 0, (), orphan=True)]


def test_nothing_is_taken_from_a_node_that_has_not_attached_or_of_another_model(make_store: MakeStore) -> None:
    store = make_store()
    assert store.handle(offered(1, "a", node=NodeId("x")), 0.0) == [Grant(OfferId(1), 0, ())]
    other = Offered(OfferId(2), NODE, ModelName("x"), None, prompt_hashes("a"))
    assert store.handle(other, 0.0) == [Grant(OfferId(2), 0, ())]
    read = ReadOpened(ExportId(1), NodeId("x"), MODEL, prompt_hashes("ab"), 1, 8)
    assert store.handle(read, 0.0) == [ServeSlots(ExportId(1), (), BLOCK_TOKENS, final=True)]


def test_what_another_node_is_writing_is_waited_for_not_written_twice(make_store: MakeStore) -> None:
    store = make_store()
    store.handle(offered(1, "ab"), 0.0)
    assert store.handle(offered(2, "abc", node=OTHER), 0.0) == []
    assert store.handle(offered(3, "abd", start=2), 0.0) == []  # its parent is on its way
    told = store.handle(OfferWritten(OfferId(1), 2), 0.0)
    assert only(told, Grant) == [Grant(OfferId(2), 2, slots(2)), Grant(OfferId(3), 0, slots(3))]


def test_blocks_that_a_node_says_are_no_chain_are_not_taken_twice_or_in_two_places(make_store: MakeStore) -> None:
    store = make_store()
    a, b, c, d, e = prompt_hashes("abcde")

    def forged(number: int, *names: BlockHash) -> list[StoreCommand]:
        return store.handle(Offered(OfferId(number), NODE, MODEL, None, names), 0.0)

    assert forged(1, c, d) == [Grant(OfferId(1), 0, slots(0, 1))]
    # What is on its way, and what the offer itself named before, ends what is granted.
    assert forged(2, a, b, c, d) == [Grant(OfferId(2), 0, slots(2, 3))]
    assert forged(3, e, e) == [Grant(OfferId(3), 0, slots(4))]
    for number in (1, 2, 3):
        store.handle(OfferWritten(OfferId(number), 1), 0.0)
        store.validate()
    # So does what is held; and nothing is taken that follows on a block which is held elsewhere than it is said to be.
    assert forged(4, b, c) == [Grant(OfferId(4), 0, slots(3))]
    assert forged(5, a, c, d) == [Grant(OfferId(5), 0, ())]
    assert store.load(MODEL).counts.declined == 2 + 1 + 1 + 3
    # Nor is it read as if it were there.
    read = ReadOpened(ExportId(1), NODE, MODEL, (a, c, d), 0, 3 * BLOCK_TOKENS)
    assert store.handle(read, 0.0) == [ServeSlots(ExportId(1), (), 0, final=True)]
    # Nothing of it stands in the way of the node's end.
    forged(6, d, b)
    store.handle(NodeDetached(NODE), 0.0)


def test_a_segment_that_a_reader_says_holds_what_lies_elsewhere_is_not_taken(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(), segment_blocks=2, cmx=True)
    a, _, c, d, e, f = prompt_hashes("abcdef")
    store.handle(Offered(OfferId(1), NODE, MODEL, None, (a,)), 0.0)
    store.handle(OfferWritten(OfferId(1), 1), 0.0)
    # The first two name what the arena has in another place, or one block twice; the third is true.
    for number, names in enumerate([(c, d, a, f), (c, d, e, e), (c, d, e, f)]):
        read = ReadOpened(ExportId(number), NODE, MODEL, names, 0, 4 * BLOCK_TOKENS)
        orders = store.handle(read, 0.0)
        for asked in only(orders, ReadCmx):
            assert isinstance(asked, ReadCmx)
            orders += store.handle(CmxRead(asked.move), 0.1)
            store.validate()
        [*_, last] = only(orders, ServeSlots)
        assert isinstance(last, ServeSlots)
        assert (last.final, last.tokens) == (True, (4 if names[2:] == (e, f) else 2) * BLOCK_TOKENS)
        store.handle(ReadClosed(ExportId(number)), 0.2)
        store.validate()
    assert (store.load(MODEL).slots_used, store.load(MODEL).slots_cached) == (0, 5)


def test_bytes_under_way_bound_what_is_granted(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(offers_bytes_max=3 * 64))
    assert store.handle(offered(1, "ab"), 0.0) == [Grant(OfferId(1), 0, slots(0, 1))]
    assert store.handle(offered(2, "xyz"), 0.0) == [Grant(OfferId(2), 0, slots(2))]  # the front of it
    assert store.handle(offered(3, "q"), 0.0) == [Grant(OfferId(3), 0, ())]
    assert store.load(MODEL).counts.declined == 3


def test_what_idled_longest_makes_room_from_its_end(make_store: MakeStore) -> None:
    store = make_store(slots=4)
    keep(store, "ab")
    keep(store, "x")
    assert only(store.handle(offered(1, "yz"), 0.0), Grant, PublishHoldings) == [
        Grant(OfferId(1), 0, slots(3, 1)),
        PublishHoldings(MODEL, (KvBatch(3, (), prompt_hashes("ab")[1:]),)),
    ]


def test_slots_of_a_lost_node_are_left_alone_until_its_copies_are_over(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(detached_s=5.0), slots=4)
    keep(store, "a")
    store.handle(offered(1, "xyz"), 0.0)
    store.handle(opened("a"), 0.0)
    assert store.handle(NodeDetached(NODE), 1.0) == [SetTimer(DetachTimer(NODE), 6.0)]
    assert store.handle(offered(2, "q", node=OTHER), 2.0) == [Grant(OfferId(2), 0, ())]
    assert store.handle(OfferWritten(OfferId(1), 3), 2.0) == []  # its word comes too late
    store.handle(TimerFired(DetachTimer(NODE)), 6.0)
    assert store.load(MODEL).slots_free == 3


# --- reads ------------------------------------------------------------------------------------------------------------


def test_a_read_of_what_is_in_the_arena_is_served_at_once_and_keeps_it_until_it_is_closed(make_store: MakeStore) -> None:
    store = make_store(slots=4)
    keep(store, "abc")
    assert store.handle(opened("abcd", first=1), 0.0) == [ServeSlots(ExportId(1), slots(1, 2), 12, final=True)]
    assert only(store.handle(offered(1, "xy"), 0.0), Grant) == [Grant(OfferId(1), 0, slots(3))]  # nothing else may go
    store.handle(OfferWritten(OfferId(1), 0), 0.0)
    store.handle(SlotsRead(ExportId(1), slots(1, 2)), 0.5)
    store.handle(ReadClosed(ExportId(1)), 1.0)
    assert store.handle(ReadClosed(ExportId(1)), 1.0) == []
    load = store.load(MODEL)
    assert (load.slots_free, load.slots_cached, load.cpu_bytes_per_s) == (1, 3, 2 * 64 / 0.5)
    assert (load.counts.given, load.counts.cpu_hits, load.counts.misses) == (2, 2, 1)


def test_a_read_of_nothing_brings_nothing(make_store: MakeStore) -> None:
    store = make_store(cmx=True)
    in_cmx(store, "abcd")
    assert store.handle(opened("abcd", blocks=2, first=2), 0.0) == [ServeSlots(ExportId(1), (), 8, final=True)]


def in_cmx(store: Store, chain: str) -> None:
    """Let a chain's segments be found in cmx."""
    store.handle(CmxFound(MODEL, prompt_hashes(chain)[1::2]), 0.0)


def test_what_is_in_cmx_is_brought_segment_by_segment_and_served_in_order(make_store: MakeStore) -> None:
    store = make_store(cmx=True)
    in_cmx(store, "abcdef")
    b, d, f = prompt_hashes("abcdef")[1::2]
    first = store.handle(opened("abcdefg"), 0.0)
    assert moves(first) == [
        ReadCmx(MoveId(1), MODEL, b, slots(0, 1)),
        ReadCmx(MoveId(2), MODEL, d, slots(2, 3)),
        ReadCmx(MoveId(3), MODEL, f, slots(4, 5)),
    ]
    assert only(first, ServeSlots) == []
    load = store.load(MODEL)
    assert (load.reads_waiting, load.waiting_bytes) == (1, 6 * 64)
    # The second comes before the first, and waits for it.
    assert only(store.handle(CmxRead(MoveId(2)), 0.1), ServeSlots, PublishHoldings) == []
    assert only(store.handle(CmxRead(MoveId(1)), 0.2), ServeSlots) == [
        ServeSlots(ExportId(1), slots(0, 1, 2, 3), 16, final=False)
    ]
    # g is in no whole segment: nothing follows on f.
    assert only(store.handle(CmxRead(MoveId(3)), 0.3), ServeSlots) == [ServeSlots(ExportId(1), slots(4, 5), 24, final=True)]
    counts = store.load(MODEL).counts
    assert (counts.recalled, counts.cmx_hits, counts.misses) == (6, 6, 1)
    assert store.load(MODEL).slots_used == 6


def test_a_segment_that_is_not_there_ends_the_read_and_is_forgotten(make_store: MakeStore) -> None:
    store = make_store(cmx=True)
    in_cmx(store, "abcd")
    b, d = prompt_hashes("abcd")[1::2]
    store.handle(opened("abcd"), 0.0)
    assert moves(store.handle(CmxRead(MoveId(1), MoveFailure.DAMAGED), 0.1)) == [DeleteCmx(MODEL, (b,)), CancelMove(MoveId(2))]
    assert store.load(MODEL).segments == 1
    store.handle(CmxRead(MoveId(2), MoveFailure.CANCELLED), 0.2)
    store.handle(ReadClosed(ExportId(1)), 0.2)
    # One that another host's store wrote is not known here, and is looked for; whoever believes in it hears that it is not there.
    tried = store.handle(opened("xy", number=2), 1.0)
    assert moves(tried) == [ReadCmx(MoveId(3), MODEL, prompt_hashes("xy")[1], slots(3, 2))]
    assert only(store.handle(CmxRead(MoveId(3), MoveFailure.MISSING), 1.1), ServeSlots, PublishHoldings) == [
        ServeSlots(ExportId(2), (), 0, final=True),
        PublishHoldings(MODEL, (KvBatch(3, segments_removed=prompt_hashes("xy")[1:]),)),
    ]
    load = store.load(MODEL)
    assert (load.slots_free, load.counts.failures) == (16, (("damaged", 1), ("missing", 1)))
    assert d in store._segments.names(MODEL)


def test_a_late_move_is_given_up_and_its_slots_are_free_once_it_has_ended(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(move_s_max=10.0), cmx=True)
    in_cmx(store, "ab")
    assert SetTimer(MoveTimer(MoveId(1)), 10.0) in store.handle(opened("ab"), 0.0)
    late = store.handle(TimerFired(MoveTimer(MoveId(1))), 10.0)
    assert only(late, ServeSlots, CancelMove) == [CancelMove(MoveId(1)), ServeSlots(ExportId(1), (), 0, final=True)]
    assert store.load(MODEL).slots_used == 2
    store.handle(CmxRead(MoveId(1)), 11.0)
    assert store.load(MODEL).slots_free == 16
    assert store.load(MODEL).segments == 1  # it is there, only slow


def test_a_reader_that_gives_up_gives_its_moves_up_unless_another_waits_for_them(make_store: MakeStore) -> None:
    store = make_store(cmx=True)
    in_cmx(store, "abcd")
    store.handle(opened("abcd"), 0.0)
    assert moves(store.handle(opened("ab", number=2), 0.0)) == []  # the same move does for both
    assert moves(store.handle(ReadClosed(ExportId(1)), 0.1)) == [CancelMove(MoveId(2))]
    assert only(store.handle(CmxRead(MoveId(1)), 0.2), ServeSlots) == [ServeSlots(ExportId(2), slots(0, 1), 8, final=True)]
    store.handle(CmxRead(MoveId(2), MoveFailure.CANCELLED), 0.2)


def test_storage_that_does_not_answer_is_left_alone_for_a_while(make_store: MakeStore) -> None:
    store = make_store(cmx=True)
    in_cmx(store, "abcd")
    store.handle(opened("ab"), 0.0)
    assert SetTimer(CmxTimer(), 1.1) in store.handle(CmxRead(MoveId(1), MoveFailure.UNAVAILABLE), 0.1)
    assert store.handle(opened("cd", number=2), 0.2) == [ServeSlots(ExportId(2), (), 0, final=True)]
    assert store.load(MODEL).segments == 2
    store.handle(TimerFired(CmxTimer()), 1.1)
    assert moves(store.handle(opened("abcd", number=3), 1.2)) != []
    assert SetTimer(CmxTimer(), 3.3) in store.handle(CmxRead(MoveId(2), MoveFailure.UNAVAILABLE), 1.3)  # twice as long


def test_a_prompt_that_waits_goes_before_advice_and_bytes_under_way_are_bounded(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(moves_bytes_max=4 * 64), cmx=True)
    in_cmx(store, "abcdefgh")
    in_cmx(store, "uv")
    assert moves(store.handle(PrefetchAsked(MODEL, prompt_hashes("uv"), 2), 0.0)) == [
        ReadCmx(MoveId(1), MODEL, prompt_hashes("uv")[1], slots(0, 1))
    ]
    b, d, f, _ = prompt_hashes("abcdefgh")[1::2]
    assert moves(store.handle(opened("abcdef"), 0.0)) == [ReadCmx(MoveId(2), MODEL, b, slots(2, 3))]
    assert moves(store.handle(PrefetchAsked(MODEL, prompt_hashes("abcdefgh"), 8), 0.0)) == []
    assert moves(store.handle(CmxRead(MoveId(1)), 0.1)) == [ReadCmx(MoveId(3), MODEL, d, slots(4, 5))]
    assert moves(store.handle(CmxRead(MoveId(2)), 0.2)) == [ReadCmx(MoveId(4), MODEL, f, slots(6, 7))]
    # The read has asked for all it wants; what is advised has half of the bytes, which are taken.
    assert moves(store.handle(CmxRead(MoveId(3)), 0.3)) == []
    assert len(moves(store.handle(CmxRead(MoveId(4)), 0.4))) == 1
    assert store.load(MODEL).counts.prefetched == 2


def test_a_read_in_the_background_goes_behind_one_that_a_request_waits_for(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(moves_bytes_max=4 * 64), cmx=True)
    in_cmx(store, "abcdef")
    in_cmx(store, "uvwxyz")
    b, d, f = prompt_hashes("abcdef")[1::2]
    v, x, z = prompt_hashes("uvwxyz")[1::2]
    early = replace(opened("abcdef"), background=True)
    # It has half of the bytes at most.
    assert moves(store.handle(early, 0.0)) == [ReadCmx(MoveId(1), MODEL, b, slots(0, 1))]
    assert moves(store.handle(opened("uvwxyz", number=2), 0.0)) == [ReadCmx(MoveId(2), MODEL, v, slots(2, 3))]
    assert (store.load(MODEL).reads_waiting, store.load(MODEL).waiting_bytes) == (1, 6 * 64)
    assert moves(store.handle(CmxRead(MoveId(1)), 0.1)) == [ReadCmx(MoveId(3), MODEL, x, slots(4, 5))]
    assert moves(store.handle(CmxRead(MoveId(2)), 0.2)) == [ReadCmx(MoveId(4), MODEL, z, slots(6, 7))]
    # Whatever the other wants is on its way, and half of the bytes are free.
    assert moves(store.handle(CmxRead(MoveId(3)), 0.3)) == []
    assert moves(store.handle(CmxRead(MoveId(4)), 0.4)) == [ReadCmx(MoveId(5), MODEL, d, slots(8, 9))]
    assert moves(store.handle(CmxRead(MoveId(5)), 0.5)) == [ReadCmx(MoveId(6), MODEL, f, slots(10, 11))]


def test_what_was_brought_on_advice_is_read_or_wasted(make_store: MakeStore) -> None:
    store = make_store(slots=6, cmx=True)
    in_cmx(store, "abcd")
    store.handle(PrefetchAsked(MODEL, prompt_hashes("abcd"), 4), 0.0)
    for move in (1, 2):
        store.handle(CmxRead(MoveId(move)), 0.1)
    store.handle(opened("ab"), 0.2)
    store.handle(SlotsRead(ExportId(1), slots(0, 1)), 0.3)
    store.handle(ReadClosed(ExportId(1)), 0.3)
    counts = store.load(MODEL).counts
    assert (counts.prefetched, counts.prefetch_used, counts.prefetch_wasted) == (4, 2, 0)
    # Five others push out c, d and a block that was read.
    store.handle(offered(1, "uvwxy"), 0.4)
    counts = store.load(MODEL).counts
    assert (counts.prefetched, counts.prefetch_used, counts.prefetch_wasted) == (4, 2, 2)


def test_a_chain_that_the_arena_has_no_room_for_ends_where_the_room_does(make_store: MakeStore) -> None:
    store = make_store(slots=4, cmx=True)
    keep(store, "xyz")
    store.handle(opened("xyz", number=9), 0.0)
    in_cmx(store, "abcd")
    store.handle(CmxWritten(MoveId(1)), 0.0)
    assert only(store.handle(opened("abcd"), 0.0), ServeSlots, ReadCmx) == []  # the other reader will set slots free
    freed = store.handle(ReadClosed(ExportId(9)), 1.0)
    assert len(only(freed, ReadCmx)) == 2


# --- reads past the arena ---------------------------------------------------------------------------------------------


def straight(chain: str, blocks: int | None = None, first: int = 0, number: int = 1, background: bool = False) -> ReadOpened:
    """Return a read of a node that reads segments by itself."""
    return replace(opened(chain, blocks, first, number), background=background, direct=True)


def segment(chain: str, number: int, tokens: int, read: int = 1) -> ServeSegment:
    return ServeSegment(ExportId(read), prompt_hashes(chain)[2 * number + 1], number, tokens)


def read(number: int, failure: MoveFailure | None = None, read: int = 1) -> SegmentRead:
    return SegmentRead(ExportId(read), number, failure)


def test_a_node_reads_what_is_behind_the_arena_by_itself_and_the_arena_learns_nothing_of_it(make_store: MakeStore) -> None:
    store = make_store(cmx=True)
    keep(store, "abc")
    store.handle(CmxWritten(MoveId(1)), 0.0)
    in_cmx(store, "abcdefgh")
    first = store.handle(straight("abcdefghi"), 0.0)
    # c is copied from the arena, and read once more with d, since both are one segment.
    assert only(first, ServeSlots, ServeSegment) == [
        ServeSlots(ExportId(1), slots(0, 1, 2), 12, final=False),
        segment("abcdefgh", 1, 16),
        segment("abcdefgh", 2, 24),
        segment("abcdefgh", 3, 32),
    ]
    load = store.load(MODEL)
    assert (load.reads_waiting, load.waiting_bytes, load.slots_used) == (1, 5 * 64, 3)
    assert only(store.handle(SlotsRead(ExportId(1), slots(0, 1, 2)), 0.1), ServeSlots) == []
    assert only(store.handle(read(1), 0.2), ServeSlots, PublishHoldings) == []
    assert only(store.handle(read(2), 0.3), ServeSlots, PublishHoldings) == []
    assert only(store.handle(read(3), 0.4), ServeSlots, PublishHoldings) == [ServeSlots(ExportId(1), (), 32, final=True)]
    store.handle(ReadClosed(ExportId(1)), 0.5)
    load, counts = store.load(MODEL), store.load(MODEL).counts
    assert (counts.recalled, counts.cpu_hits, counts.cmx_hits, counts.misses, counts.given) == (0, 3, 5, 1, 8)
    assert (load.slots_cached, load.slots_free, load.reads_waiting) == (3, 13, 0)
    assert load.cmx_bytes_per_s > 0


@pytest.mark.parametrize(
    ("first", "blocks", "served"),
    [
        (0, 8, [(0, 8), (1, 16), (2, 24), (3, 32)]),
        (1, 7, [(0, 8), (1, 16), (2, 24), (3, 28)]),
        (2, 4, [(1, 16)]),
        (3, 4, [(1, 16)]),
        (4, 5, [(2, 20)]),
    ],
)
def test_a_node_reads_the_segments_alone_of_which_it_wants_something(
    make_store: MakeStore, first: int, blocks: int, served: list[tuple[int, int]]
) -> None:
    store = make_store(cmx=True)
    in_cmx(store, "abcdefgh")
    orders = store.handle(straight("abcdefgh", blocks, first), 0.0)
    assert only(orders, ServeSlots, ServeSegment) == [segment("abcdefgh", number, tokens) for number, tokens in served]
    for number, _ in served:
        orders = store.handle(read(number), 0.1)
    assert only(orders, ServeSlots) == [ServeSlots(ExportId(1), (), blocks * BLOCK_TOKENS, final=True)]
    assert store.load(MODEL).counts.cmx_hits == blocks - first


@pytest.mark.parametrize(
    ("failure", "known", "deleted"),
    [(MoveFailure.MISSING, 2, False), (MoveFailure.DAMAGED, 2, True), (MoveFailure.FULL, 3, False)],
)
def test_a_segment_that_a_node_cannot_read_ends_its_read_and_what_is_behind_is_given_up(
    make_store: MakeStore, failure: MoveFailure, known: int, deleted: bool
) -> None:
    store = make_store(cmx=True)
    in_cmx(store, "abcdef")
    store.handle(straight("abcdef"), 0.0)
    store.handle(read(0), 0.1)
    orders = store.handle(read(1, failure), 0.2)
    assert only(orders, ServeSlots, ServeSegment) == [ServeSlots(ExportId(1), (), 8, final=True)]
    assert moves(orders) == ([DeleteCmx(MODEL, prompt_hashes("abcdef")[3:4])] if deleted else [])
    assert store.handle(read(2), 0.3) == []  # which the node does not read, and is through with
    load = store.load(MODEL)
    assert (load.segments, load.counts.failures, load.counts.cmx_hits) == (known, ((failure.value, 1),), 2)


def test_a_node_that_cannot_reach_the_storage_has_it_left_alone(make_store: MakeStore) -> None:
    store = make_store(cmx=True)
    in_cmx(store, "abcd")
    store.handle(straight("abcd"), 0.0)
    assert SetTimer(CmxTimer(), 1.0) in store.handle(read(0, MoveFailure.UNAVAILABLE), 0.0)
    assert store.handle(straight("ab", number=2), 0.5) == [ServeSlots(ExportId(2), (), 0, final=True)]
    store.handle(TimerFired(CmxTimer()), 1.0)
    assert moves(store.handle(straight("ab", number=3), 1.0)) == [segment("ab", 0, 8, read=3)]


def test_a_node_that_is_late_with_a_segment_gets_no_more_of_it_and_takes_no_room_from_others(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(move_s_max=10.0, moves_bytes_max=2 * 128), cmx=True)
    in_cmx(store, "abcdef")
    store.handle(straight("abcdef"), 0.0)
    assert moves(store.handle(straight("ab", number=2), 1.0)) == []
    store.handle(read(0), 5.0)
    orders = store.handle(TimerFired(MoveTimer(MoveId(2))), 10.0)
    assert ServeSlots(ExportId(1), (), 8, final=True) in orders
    assert store.handle(read(1), 11.0) == []  # it came after all
    load = store.load(MODEL)
    assert (load.segments, load.counts.failures, load.reads_waiting) == (3, (("late", 1),), 1)
    assert moves(store.handle(ReadClosed(ExportId(1)), 12.0)) == []
    assert only(store.handle(read(0, read=2), 12.0), ServeSlots) == [ServeSlots(ExportId(2), (), 8, final=True)]


def test_bytes_under_way_to_nodes_are_bounded_and_free_once_the_reader_gives_up_or_is_lost(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(moves_bytes_max=2 * 128), cmx=True)
    in_cmx(store, "abcdefgh")
    in_cmx(store, "uvwx")
    assert moves(store.handle(straight("abcdefgh"), 0.0)) == [segment("abcdefgh", 0, 8), segment("abcdefgh", 1, 16)]
    assert moves(store.handle(straight("uvwx", number=2), 0.0)) == []
    assert moves(store.handle(read(0), 0.1)) == [segment("abcdefgh", 2, 24)]
    # What a reader no longer wants is nothing that anybody waits for: there is no move to be cancelled.
    assert moves(store.handle(ReadClosed(ExportId(1)), 0.2)) == [segment("uvwx", 0, 8, read=2), segment("uvwx", 1, 16, read=2)]
    assert store.handle(read(2), 0.3) == []
    store.handle(NodeDetached(NODE), 0.4)
    assert store.load(MODEL).reads_waiting == 0
    third = replace(straight("abcd", number=3), node=OTHER)
    assert moves(store.handle(third, 0.5)) == [segment("abcd", 0, 8, read=3), segment("abcd", 1, 16, read=3)]
    store.handle(TimerFired(DetachTimer(NODE)), 1.0)


def test_two_nodes_read_one_segment_each_for_itself_and_it_stays_meanwhile(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(cmx_bytes=2 * 128), cmx=True)
    in_cmx(store, "ab")
    assert moves(store.handle(straight("ab"), 0.0)) == [segment("ab", 0, 8)]
    assert moves(store.handle(replace(straight("ab", number=2), node=OTHER), 0.0)) == [segment("ab", 0, 8, read=2)]
    store.handle(read(0), 0.1)
    store.handle(ReadClosed(ExportId(1)), 0.1)
    # Another would have to leave for it to come.
    keep(store, "uvwx")
    assert store.load(MODEL).segments == 1
    assert only(store.handle(read(0, read=2), 0.2), ServeSlots) == [ServeSlots(ExportId(2), (), 8, final=True)]


def test_a_prompt_that_waits_is_read_for_before_a_prefetch(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(moves_bytes_max=4 * 128), cmx=True)
    in_cmx(store, "abcdefgh")
    in_cmx(store, "uvwxyz")
    # Half of the bytes under way are for what no request waits for.
    assert moves(store.handle(straight("uvwxyz", background=True), 0.0)) == [segment("uvwxyz", 0, 8), segment("uvwxyz", 1, 16)]
    urgent = store.handle(straight("abcdefgh", number=2), 0.0)
    assert moves(urgent) == [segment("abcdefgh", 0, 8, read=2), segment("abcdefgh", 1, 16, read=2)]
    assert moves(store.handle(read(0), 0.1)) == [segment("abcdefgh", 2, 24, read=2)]
    assert moves(store.handle(read(1), 0.1)) == [segment("abcdefgh", 3, 32, read=2)]
    assert moves(store.handle(read(0, read=2), 0.2)) == []
    assert moves(store.handle(read(1, read=2), 0.2)) == []
    assert moves(store.handle(read(2, read=2), 0.2)) == [segment("uvwxyz", 2, 24)]


def test_advice_brings_into_the_arena_what_a_node_reads_by_itself(make_store: MakeStore) -> None:
    store = make_store(cmx=True)
    in_cmx(store, "abcd")
    b, d = prompt_hashes("abcd")[1::2]
    assert moves(store.handle(PrefetchAsked(MODEL, prompt_hashes("abcd"), 4), 0.0)) == [
        ReadCmx(MoveId(1), MODEL, b, slots(0, 1)),
        ReadCmx(MoveId(2), MODEL, d, slots(2, 3)),
    ]
    # The first has arrived when a request comes; what has not is not waited for.
    store.handle(CmxRead(MoveId(1)), 0.1)
    assert only(store.handle(straight("abcd"), 0.1), ServeSlots, ServeSegment) == [
        ServeSlots(ExportId(1), slots(0, 1), 8, final=False),
        segment("abcd", 1, 16),
    ]
    store.handle(CmxRead(MoveId(2)), 0.2)
    assert only(store.handle(read(1), 0.3), ServeSlots) == [ServeSlots(ExportId(1), (), 16, final=True)]
    assert store.load(MODEL).counts.prefetched == 4


# --- cmx --------------------------------------------------------------------------------------------------------------


def test_a_whole_segment_is_written_behind_and_told_of(make_store: MakeStore) -> None:
    store = make_store(cmx=True)
    store.handle(offered(1, "abcde"), 0.0)
    b, d = prompt_hashes("abcd")[1::2]
    assert moves(store.handle(OfferWritten(OfferId(1), 5), 0.0)) == [
        WriteCmx(MoveId(1), MODEL, b, slots(0, 1)),
        WriteCmx(MoveId(2), MODEL, d, slots(2, 3)),
    ]
    assert store.handle(CmxWritten(MoveId(1)), 0.1) == [
        ClearTimer(MoveTimer(MoveId(1))),
        PublishHoldings(MODEL, (KvBatch(2, segments_stored=(b,)),)),
    ]
    # What could not be written is tried again, a while later.
    store.handle(CmxWritten(MoveId(2), MoveFailure.FULL), 0.1)
    assert moves(store.handle(TimerFired(CmxTimer()), 1.1)) == [WriteCmx(MoveId(3), MODEL, d, slots(2, 3))]
    assert moves(store.handle(CmxWritten(MoveId(3)), 1.2)) == []
    assert store.load(MODEL).counts.written == 4


def test_cmx_is_bounded_and_loses_suffixes_of_what_was_used_longest_ago(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(cmx_bytes=3 * 2 * 64), cmx=True)
    in_cmx(store, "uv")
    keep(store, "abcd")
    b, d = prompt_hashes("abcd")[1::2]
    for number in (1, 2):
        store.handle(CmxWritten(MoveId(number)), 0.0)
    store.handle(offered(1, "xyzw"), 0.0)
    third = store.handle(OfferWritten(OfferId(1), 4), 0.0)
    # First what was found, then d, which follows on b.
    assert only(third, DeleteCmx) == [DeleteCmx(MODEL, prompt_hashes("uv")[1:]), DeleteCmx(MODEL, (d,))]
    assert store._segments.holds(MODEL, b)


def test_the_end_of_a_chain_that_cmx_has_no_room_for_is_not_written_at_the_price_of_its_front(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(cmx_bytes=2 * 2 * 64), cmx=True)
    store.handle(offered(1, "abcdefgh"), 0.0)
    written = moves(store.handle(OfferWritten(OfferId(1), 8), 0.0))
    assert [command.segment for command in written if isinstance(command, WriteCmx)] == [*prompt_hashes("abcd")[1::2]]
    for number in (1, 2):
        assert moves(store.handle(CmxWritten(MoveId(number)), 0.1)) == []
    assert store.load(MODEL).segments == 2
    assert ("cmx full", 2) in store.load(MODEL).counts.failures


def test_a_segment_is_not_written_without_what_is_before_it(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(cmx_bytes=3 * 2 * 64), cmx=True)
    keep(store, "ab")
    store.handle(CmxWritten(MoveId(1)), 0.0)
    b, d = prompt_hashes("abcd")[1::2]
    store.handle(EvictAsked(MODEL, prompt_hashes("ab"), 0, 2, Tier.CMX), 0.1)
    store.handle(offered(2, "abcd", start=2), 0.2)
    written = moves(store.handle(OfferWritten(OfferId(2), 2), 0.2))
    assert [command.segment for command in written if isinstance(command, WriteCmx)] == [b, d]


# --- leases, advice ---------------------------------------------------------------------------------------------------


def lease(chain: str, tier: Tier = Tier.CPU, revision: int = 0, name: str = "l") -> LeasePlaced:
    return LeasePlaced(Lease(LeaseId(name), TenantId("t"), MODEL, prompt_hashes(chain), tier, 60.0, 0, revision))


def flood(store: Store, start: int = 1000) -> None:
    """Offer more than the arena has room for."""
    for number in range(start, start + 40):
        (grant, *_) = only(store.handle(offered(number, chr(number)), 0.0), Grant)
        if isinstance(grant, Grant) and grant.slots:
            store.handle(OfferWritten(OfferId(number), 1), 0.0)


def test_what_is_leased_stays_and_grows_until_the_lease_is_over(make_store: MakeStore) -> None:
    store = make_store()
    keep(store, "ab")
    assert SetTimer(LeaseTimer(LeaseId("l")), 61.0) in store.handle(lease("abcd"), 1.0)
    keep(store, "abcd")
    flood(store)
    assert store.load(MODEL).leased == (LeasedBytes(TenantId("t"), Tier.CPU, 4 * 64),)
    store.handle(lease("ab"), 2.0)  # the same revision again: nothing new
    store.handle(LeaseEnded(LeaseId("l"), 0), 3.0)
    store.handle(lease("abcd", revision=0), 3.1)  # a late word of one that is over
    assert store.load(MODEL).leased == ()
    flood(store, 2000)
    assert store.handle(opened("abcd"), 4.0) == [ServeSlots(ExportId(1), (), 0, final=True)]


def test_a_lease_ends_by_itself(make_store: MakeStore) -> None:
    store = make_store()
    keep(store, "ab")
    store.handle(lease("ab"), 1.0)
    store.handle(TimerFired(LeaseTimer(LeaseId("l"))), 61.0)
    assert store.load(MODEL).leased == ()


def test_leases_have_their_share_of_the_arena_and_no_more(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(leased_share_max=0.5), slots=8)
    keep(store, "abc")
    keep(store, "uvwxy")
    store.handle(lease("uvwxy"), 0.0)
    assert store.load(MODEL).leased == (LeasedBytes(TenantId("t"), Tier.CPU, 4 * 64),)
    store.handle(lease("abc", name="other"), 0.0)
    assert store.load(MODEL).leased == (LeasedBytes(TenantId("t"), Tier.CPU, 4 * 64),)
    store.handle(LeaseEnded(LeaseId("l"), 0), 0.0)
    assert store.load(MODEL).leased == (LeasedBytes(TenantId("t"), Tier.CPU, 3 * 64),)


def test_a_lease_at_cmx_holds_the_arena_only_until_its_segments_are_there(make_store: MakeStore) -> None:
    store = make_store(StoreConfig(cmx_bytes=2 * 2 * 64), cmx=True)
    store.handle(offered(1, "abc"), 0.0)
    store.handle(lease("abc", Tier.CMX), 0.0)
    store.handle(OfferWritten(OfferId(1), 3), 0.0)
    assert store.load(MODEL).leased == (LeasedBytes(TenantId("t"), Tier.CPU, 3 * 64),)
    store.handle(CmxWritten(MoveId(1)), 0.0)
    assert store.load(MODEL).leased == (LeasedBytes(TenantId("t"), Tier.CMX, 2 * 64),)
    in_cmx(store, "uvwxyz")  # more than there is room for
    assert store._segments.holds(MODEL, prompt_hashes("ab")[1])


def test_a_lease_at_cpu_brings_what_is_in_cmx_alone(make_store: MakeStore) -> None:
    store = make_store(cmx=True)
    in_cmx(store, "abcd")
    assert len(only(store.handle(lease("abcde"), 0.0), ReadCmx)) == 2
    store.handle(CmxRead(MoveId(1)), 0.1)
    store.handle(CmxRead(MoveId(2)), 0.1)
    assert LeasedBytes(TenantId("t"), Tier.CPU, 4 * 64) in store.load(MODEL).leased


def test_what_is_demoted_leaves_the_arena_once_it_is_in_cmx(make_store: MakeStore) -> None:
    store = make_store(cmx=True)
    keep(store, "abcde")
    store.handle(EvictAsked(MODEL, prompt_hashes("abcde"), 2, 5, Tier.CPU, demote=True), 0.0)
    store.handle(CmxWritten(MoveId(1)), 0.1)
    assert store.load(MODEL).slots_cached + store.load(MODEL).slots_used == 5
    told = store.handle(CmxWritten(MoveId(2)), 0.1)
    assert only(told, PublishHoldings) == [
        PublishHoldings(
            MODEL,
            (KvBatch(3, (), prompt_hashes("abcde")[:1:-1]), KvBatch(4, segments_stored=prompt_hashes("abcd")[3:])),
        )
    ]
    assert store.load(MODEL).slots_cached == 2


def test_what_is_evicted_leaves_its_tier_unless_it_is_leased(make_store: MakeStore) -> None:
    store = make_store(cmx=True)
    keep(store, "abcd")
    for number in (1, 2):
        store.handle(CmxWritten(MoveId(number)), 0.0)
    store.handle(lease("ab"), 0.0)
    store.handle(EvictAsked(MODEL, prompt_hashes("abcd"), 0, 4, Tier.CPU), 0.0)
    assert store.load(MODEL).slots_free == 14
    gone = store.handle(EvictAsked(MODEL, prompt_hashes("abcd"), 0, 4, Tier.CMX), 0.0)
    assert moves(gone) == [DeleteCmx(MODEL, prompt_hashes("abcd")[3:])]


# --- what gateways are told -------------------------------------------------------------------------------------------


def test_a_gateway_gets_what_it_missed_or_all_that_is_held(make_store: MakeStore) -> None:
    store = make_store(cmx=True)
    keep(store, "ab")
    store.handle(CmxWritten(MoveId(1)), 0.0)
    b: BlockHash = prompt_hashes("ab")[1]
    missed = store.handle(ResyncRequested(GatewayId(3), 1, MODEL), 0.0)
    assert missed == [PublishHoldings(MODEL, (KvBatch(2, segments_stored=(b,)),), GatewayId(3))]
    (everything,) = store.handle(ResyncRequested(GatewayId(3), None, MODEL), 0.0)
    assert everything == PublishHoldings(
        MODEL,
        (
            KvBatch(2, (StoredRun(None, prompt_hashes("ab")),), cleared=True, snapshot=1, more=True),
            KvBatch(2, snapshot=1, page=1, segments_stored=(b,)),
        ),
        GatewayId(3),
    )
    assert store.handle(ResyncRequested(GatewayId(3), None, ModelName("x")), 0.0) == []


# --- the checker ------------------------------------------------------------------------------------------------------


def lose_a_slot(store: Store) -> None:
    store._shelves[MODEL].pool._unused += 1


def forget_a_wakeup(store: Store) -> None:
    store._recalls._waiting.clear()


def forget_a_reader(store: Store) -> None:
    next(iter(store._moves.running.values())).recalls.clear()


def miscount_grants(store: Store) -> None:
    store._offers._bytes += 1


def miscount_moves(store: Store) -> None:
    store._moves._bytes += 1


def forget_a_segment(store: Store) -> None:
    next(iter(store._leases._held.values())).missing.clear()


@pytest.mark.parametrize(
    ("corrupt", "complaint"),
    [
        (lose_a_slot, "are not the 16 blocks"),
        (forget_a_wakeup, "read 1 is neither final nor waits"),
        (forget_a_reader, "nobody waits for move 1"),
        (miscount_grants, "128 bytes are granted, 129 are counted"),
        (miscount_moves, "256 bytes are under way, 257 are counted"),
        (forget_a_segment, "lease l lacks 1 segments, counts 0"),
    ],
)
def test_canary_the_checker_notices_what_is_wrong(corrupt: Callable[[Store], None], complaint: str) -> None:
    store = Store(store_spec(models=(stored_model(cmx=True),)), StoreConfig())
    store.handle(NodeAttached(NODE, MODEL), 0.0)
    store.handle(opened("abcd"), 0.0)
    store.handle(offered(1, "xy"), 0.0)
    store.handle(lease("xy", Tier.CMX), 0.0)
    store.validate()
    corrupt(store)
    with pytest.raises(AssertionError, match=complaint):
        store.validate()
