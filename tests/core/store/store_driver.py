"""Drives a store in fake time: nodes that copy, a cmx that takes its time and fails, timers in one heap.

For every slot it is kept which block's bytes are in it, so that a slot that is read while somebody else writes to it, or that
holds another block than was promised, is noticed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from random import Random

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
from orchestrator.core.events import (
    CmxRead,
    CmxWritten,
    NodeAttached,
    NodeDetached,
    Offered,
    OfferWritten,
    ReadClosed,
    ReadOpened,
    ResyncRequested,
    SegmentRead,
    SlotsRead,
    StoreEvent,
    TimerFired,
)
from orchestrator.core.store.store import Store
from orchestrator.core.timers import StoreTimer
from orchestrator.core.types import (
    BlockHash,
    ExportId,
    GatewayId,
    KvBatch,
    ModelName,
    MoveFailure,
    MoveId,
    NodeId,
    OfferId,
    SlotId,
)
from tests.core.node.node_driver import Belief


def torn(who: str, number: int) -> BlockHash:
    """Return what is in a slot that somebody is writing to."""
    return BlockHash(f"torn by {who} {number}".encode())


class HoldingsBelief(Belief):
    """What a gateway believes of one model of a store: blocks in the arena, segments in cmx."""

    def __init__(self) -> None:
        super().__init__()
        self.segments: set[BlockHash] = set()

    def apply(self, batch: KvBatch) -> None:
        if batch.page and not batch.cleared:  # a snapshot's next page has the number of the first
            self.sequence = batch.sequence - 1
        super().apply(batch)
        if batch.cleared:
            self.segments = set()
        self.segments.difference_update(batch.segments_removed)
        self.segments.update(batch.segments_stored)


@dataclass(slots=True)
class Reading:
    """One node's reading: what it wants, and what it has got of it."""

    opened: ReadOpened
    served: int
    in_flight: int = 0
    tokens: int = 0
    final: bool = False
    closed: bool = False
    #: Segments that the node is to read by itself, those served longest ago first, and whether it is at one of them.
    segments: list[ServeSegment] = field(default_factory=list[ServeSegment])
    busy: bool = False
    #: Blocks up to which such segments were served, and were read.
    promised: int = 0
    came: int = 0


@dataclass(slots=True)
class Transfer:
    """A move that runs."""

    command: ReadCmx | WriteCmx
    expected: tuple[BlockHash, ...]
    cancelled: bool = False


@dataclass(slots=True)
class Troubles:
    """What goes wrong, as shares of all moves or copies."""

    failing: float = 0.0
    hanging: float = 0.0
    short: float = 0.0
    kinds: tuple[MoveFailure, ...] = tuple(MoveFailure)


@dataclass(slots=True)
class Cmx:
    """The shared storage: blocks of each segment."""

    objects: dict[tuple[ModelName, BlockHash], tuple[BlockHash, ...]] = field(default_factory=dict)


class StoreDriver:
    """One store, the nodes of its host and its cmx."""

    def __init__(self, store: Store, random: Random, troubles: Troubles, cmx: Cmx, after: Callable[[Store], None]) -> None:
        self.store = store
        self.random = random
        self.troubles = troubles
        self.cmx = cmx
        #: Called with the store after every event.
        self.after = after
        self.now = 0.0
        self.models = {model.model: model for model in store.spec.models}
        self.arena: dict[ModelName, list[BlockHash | None]] = {name: [None] * model.slots for name, model in self.models.items()}
        self.beliefs = {model: HoldingsBelief() for model in self.models}
        self.chains: dict[BlockHash, tuple[BlockHash, ...]] = {}
        self.offers: dict[OfferId, Offered] = {}
        self.reads: dict[ExportId, Reading] = {}
        self.moves: dict[MoveId, Transfer] = {}
        #: Tokens that each read got in the end.
        self.got: dict[ExportId, int] = {}
        #: Blocks granted and served, to see that something happened.
        self.granted = self.copied = 0
        #: Blocks that nodes read from cmx by themselves.
        self.direct = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serials = count()
        self._identities = count(1)
        self._timers: dict[StoreTimer, int] = {}

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        heappush(self._heap, (self.now + delay_s, next(self._serials), action))

    def run(self, until: float = float("inf")) -> None:
        """Go on until nothing is left to happen, or until then."""
        while self._heap and self._heap[0][0] <= until:
            self.now, _, action = heappop(self._heap)
            action()

    def tell(self, event: StoreEvent) -> None:
        """Give the store an event now and do what it asks for."""
        commands = self.store.handle(event, self.now)
        self.after(self.store)
        for command in commands:
            self.execute(command)

    # --- what nodes do ----------------------------------------------------------------------------------------------------

    def attach(self, node: NodeId, model: ModelName) -> None:
        self.tell(NodeAttached(node, model))

    def detach(self, node: NodeId) -> None:
        """Lose a node; what it is copying goes on until it is done."""
        for offer in [key for key, offered in self.offers.items() if offered.node == node]:
            del self.offers[offer]
        for read in [key for key, reading in self.reads.items() if reading.opened.node == node]:
            self.reads.pop(read).closed = True
        self.tell(NodeDetached(node))

    def offer(self, node: NodeId, model: ModelName, chain: tuple[BlockHash, ...], start: int = 0) -> OfferId:
        """Offer the blocks of a chain from one on."""
        offer = OfferId(next(self._identities))
        self.learn(chain, model)
        event = Offered(offer, node, model, chain[start - 1] if start else None, chain[start:])
        self.offers[offer] = event
        self.tell(event)
        return offer

    def read(
        self,
        node: NodeId,
        model: ModelName,
        chain: tuple[BlockHash, ...],
        first: int = 0,
        blocks: int | None = None,
        background: bool = False,
        direct: bool = False,
    ) -> ExportId:
        """Read the blocks of a chain."""
        read = ExportId(next(self._identities))
        self.learn(chain, model)
        end = len(chain) if blocks is None else blocks
        opened = ReadOpened(read, node, model, chain, first, end * self.models[model].block_tokens, background, direct)
        self.reads[read] = Reading(opened, first)
        self.tell(opened)
        return read

    def close(self, read: ExportId) -> None:
        reading = self.reads.pop(read, None)
        if reading is not None:
            self.got[read] = reading.tokens
            reading.closed = True
            self.tell(ReadClosed(read))

    def learn(self, chain: tuple[BlockHash, ...], model: ModelName) -> None:
        """Note which blocks are in each segment of a chain."""
        size = self.models[model].segment_blocks
        for end in range(size, len(chain) + 1, size):
            self.chains[chain[end - 1]] = chain[end - size : end]

    def resync(self, model: ModelName) -> None:
        """Let a gateway lose all it believes of a model, and ask again."""
        self.beliefs[model] = HoldingsBelief()
        self.tell(ResyncRequested(GatewayId(1), None, model))
        self.check_belief(model)

    def check_belief(self, model: ModelName) -> None:
        """A gateway that heard everything believes exactly what is held."""
        belief, shelf = self.beliefs[model], self.store._shelves[model]
        assert sorted(belief.parents) == sorted(shelf.pool._place)
        assert belief.segments == set(shelf.segments.names(model))

    # --- what the store asks for ------------------------------------------------------------------------------------------

    def execute(self, command: StoreCommand) -> None:
        match command:
            case Grant():
                self._copy_in(command)
            case ServeSlots():
                self._copy_out(command)
            case ServeSegment():
                self._let_read(command)
            case ReadCmx() | WriteCmx():
                self._start(command)
            case CancelMove():
                self.moves[command.move].cancelled = True
                self.later(self.random.uniform(0, 0.1), lambda: self._end(command.move, MoveFailure.CANCELLED))
            case DeleteCmx():
                for segment in command.segments:
                    self.cmx.objects.pop((command.model, segment), None)
            case PublishHoldings():
                for batch in command.batches:
                    self.beliefs[command.model].apply(batch)
            case SetTimer():
                self._set_timer(command.key, command.at)
            case ClearTimer():
                self._timers.pop(command.key, None)

    def _set_timer(self, key: StoreTimer, at: float) -> None:
        number = self._timers[key] = next(self._serials)
        self.later(at - self.now, lambda: self._fire(key, number))

    def _fire(self, key: StoreTimer, number: int) -> None:
        if self._timers.get(key) == number:
            del self._timers[key]
            self.tell(TimerFired(key))

    def _copy_in(self, grant: Grant) -> None:
        """Copy granted blocks, some time after; a lost node goes on for a moment."""
        offered = self.offers[grant.offer]
        if not grant.slots:
            del self.offers[grant.offer]
            return
        arena, names = self.arena[offered.model], offered.hashes[grant.first : grant.first + len(grant.slots)]
        self.granted += len(names)
        mark = torn("offer", grant.offer)
        for slot in grant.slots:
            arena[slot] = mark
        written = len(names) if self.random.random() >= self.troubles.short else self.random.randrange(len(names))

        def done() -> None:
            for slot, name in list(zip(grant.slots, names, strict=True))[:written]:
                assert arena[slot] == mark, f"slot {slot} of offer {grant.offer} was written to by somebody else"
                arena[slot] = name
            if self.offers.pop(grant.offer, None) is not None:
                self.tell(OfferWritten(grant.offer, written))

        self.later(self.random.uniform(0.001, 0.2), done)

    def _copy_out(self, served: ServeSlots) -> None:
        """Check what is served, now and once it is copied."""
        reading = self.reads[served.read]
        assert not reading.final, f"read {served.read} is served after its end"
        opened = reading.opened
        names = opened.hashes[reading.served : reading.served + len(served.slots)]
        reading.served += len(served.slots)
        reading.in_flight += len(served.slots)
        reading.final = served.final
        reading.tokens = served.tokens
        assert not (served.slots and reading.promised), f"read {served.read}: slots behind what is in cmx alone"
        had = max(reading.served, reading.came if served.final else 0)
        assert served.tokens == had * self.models[opened.model].block_tokens
        assert served.tokens <= max(opened.tokens, opened.first_block * self.models[opened.model].block_tokens)
        self._check(opened.model, served.slots, names, f"read {served.read}")
        self.later(self.random.uniform(0.0, 0.1), lambda: self._copied(served, reading, names))

    def _copied(self, served: ServeSlots, reading: Reading, names: tuple[BlockHash, ...]) -> None:
        if reading.closed:
            return
        self._check(reading.opened.model, served.slots, names, f"read {served.read}")
        self.copied += len(names)
        reading.in_flight -= len(names)
        if served.slots:
            self.tell(SlotsRead(served.read, served.slots))
        if served.final:
            self.later(self.random.uniform(0.0, 0.1), lambda: self.close(served.read))

    def _let_read(self, command: ServeSegment) -> None:
        """Have a node read a segment that follows on what it was served, after those before it."""
        reading = self.reads[command.read]
        opened, model = reading.opened, self.models[reading.opened.model]
        assert opened.direct, f"read {command.read} is not for segments"
        assert not reading.final, f"read {command.read} is served after its end"
        start, size = command.number * model.segment_blocks, model.segment_blocks
        end = command.tokens // model.block_tokens
        assert start <= max(reading.served, reading.promised) < end <= start + size, f"segment {command.number} does not follow"
        assert command.tokens <= opened.tokens
        assert command.segment == opened.hashes[start + size - 1]
        reading.promised = end
        reading.segments.append(command)
        self._read_next(reading)

    def _read_next(self, reading: Reading) -> None:
        if reading.segments and not reading.busy and self.random.random() >= self.troubles.hanging:
            reading.busy = True
            self.later(self.random.uniform(0.005, 0.05), lambda: self._read_segment(reading))

    def _read_segment(self, reading: Reading) -> None:
        """Read the next segment; those that were given up are said to be done with."""
        if reading.closed:
            return
        command, opened = reading.segments.pop(0), reading.opened
        stored, failure = (opened.model, command.segment), None
        if not reading.final:
            failure = self.random.choice(self.troubles.kinds) if self.random.random() < self.troubles.failing else None
            failure = failure or (None if stored in self.cmx.objects else MoveFailure.MISSING)
        if failure is None and not reading.final:
            size = self.models[opened.model].segment_blocks
            names = opened.hashes[command.number * size : (command.number + 1) * size]
            assert self.cmx.objects[stored] == names, f"segment {command.number} is another"
            end = command.tokens // self.models[opened.model].block_tokens
            self.direct += end - max(reading.served, reading.came)
            reading.came = end
        self.tell(SegmentRead(command.read, command.number, failure))
        reading.busy = False
        self._read_next(reading)

    def _check(self, model: ModelName, slots: tuple[SlotId, ...], names: tuple[BlockHash, ...], whose: str) -> None:
        found = [self.arena[model][slot] for slot in slots]
        assert found == list(names), f"{whose}: slots {slots} hold {found}, not {names}"

    def _start(self, command: ReadCmx | WriteCmx) -> None:
        expected = self.chains[command.segment]
        self.moves[command.move] = Transfer(command, expected)
        if isinstance(command, WriteCmx):
            self._check(command.model, command.slots, expected, f"move {command.move}")
        else:
            for slot in command.slots:
                self.arena[command.model][slot] = torn("move", command.move)
        if self.random.random() < self.troubles.hanging:
            return
        failure = self.random.choice(self.troubles.kinds) if self.random.random() < self.troubles.failing else None
        self.later(self.random.uniform(0.005, 0.05), lambda: self._end(command.move, failure))

    def _end(self, identity: MoveId, failure: MoveFailure | None) -> None:
        """End a move that has not ended: one that was given up may have done what it was to."""
        transfer = self.moves.pop(identity, None)
        if transfer is None:
            return
        command = transfer.command
        stored = (command.model, command.segment)
        if isinstance(command, WriteCmx):
            self._check(command.model, command.slots, transfer.expected, f"move {identity}")
            if failure is None:
                self.cmx.objects[stored] = transfer.expected
            self.tell(CmxWritten(identity, failure))
            return
        arena = self.arena[command.model]
        failure = failure or (None if stored in self.cmx.objects else MoveFailure.MISSING)
        for slot, name in zip(command.slots, transfer.expected, strict=True):
            assert arena[slot] == torn("move", identity), f"slot {slot} of move {identity} was written to by somebody else"
            arena[slot] = name if failure is None else None
        self.tell(CmxRead(identity, failure))
