"""Hosts' stores in virtual time: the core's `Store`s, the links over which blocks come and go, and the storage they share.

Three links carry blocks, each in both directions at once and one copy after the other in each:

    node --- its own link --- cpu (its host's arena) --- its host's link --- cmx (shared by all hosts)

A node that reads segments by itself waits for its host's link to `cmx` alone. What a store decides is the core's; here it only
takes its time, or fails. See also: `workers/store/`, which does it in real time.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from random import Random
from typing import assert_never

from orchestrator.core.commands import (
    CancelMove,
    ClearTimer,
    DeleteCmx,
    Grant,
    LoadBlocks,
    Offer,
    PublishHoldings,
    ReadCmx,
    ServeSegment,
    ServeSlots,
    SetTimer,
    StoreCommand,
    WriteCmx,
)
from orchestrator.core.config import PoolConfig, StoreConfig, require
from orchestrator.core.events import (
    CmxFound,
    CmxRead,
    CmxWritten,
    FetchEnded,
    FetchProgressed,
    NodeAttached,
    NodeDetached,
    NodeEvent,
    Offered,
    OfferEnded,
    OfferWritten,
    ReadClosed,
    ReadOpened,
    ResyncRequested,
    SegmentRead,
    SlotsRead,
    StoreEvent,
    StoreReported,
    TimerFired,
)
from orchestrator.core.store.store import Store
from orchestrator.core.types import (
    BlockHash,
    ExportId,
    GatewayId,
    ModelName,
    MoveFailure,
    MoveId,
    NodeId,
    NodeSpec,
    OfferId,
    PoolName,
    RequestId,
    SlotId,
    StoredModel,
    StoreId,
    StoreSpec,
    is_prefetch,
)
from orchestrator.profiles.resolve import Below, Resolved
from orchestrator.sim.agenda import Agenda, Timers
from orchestrator.sim.faults import Faults
from orchestrator.sim.network import Network
from orchestrator.sim.outcome import StoreUse

#: What is in `cmx`, by model; shared by all stores.
Shared = dict[ModelName, dict[BlockHash, None]]


@dataclass(slots=True)
class _Offer:
    """An offer on its way into the arena."""

    node: NodeSpec
    command: Offer
    #: What the store takes of it, once it has said so.
    grant: Grant | None = None


@dataclass(slots=True)
class _Read:
    """A node's read out of the arena."""

    node: NodeSpec
    command: LoadBlocks
    opened_s: float
    #: Prompt tokens that have arrived, and how many of them came from `cmx` since the read was opened.
    tokens: int
    cmx_tokens: int = 0
    #: Whether the last of them came past the arena.
    direct: bool = False
    #: When the last of what was put on the link arrives.
    arrives_s: float = 0.0


def host_of(pool: PoolConfig, number: int, below: Below) -> str:
    """Return the host that a pool's node is on."""
    return f"{pool.name}/{number // below.host_nodes}" if below.host_nodes is not None else "host"


def store_specs(config: StoreConfig, resolved: Resolved) -> list[StoreSpec]:
    """Return a store for each host, with a part for each model that has nodes there.

    Raises `ConfigError` if a model's part has no room for a segment.
    """
    hosts: dict[str, dict[ModelName, PoolConfig]] = {}
    for pool in resolved.config.serving_pools:
        for number in range(pool.nodes):
            host = host_of(pool, number, resolved.below[PoolName(pool.name)])
            hosts.setdefault(host, {}).setdefault(ModelName(pool.model), pool)
    specs: list[StoreSpec] = []
    for host, models in hosts.items():
        stored = tuple(_stored(config, resolved, pool, models) for pool in models.values())
        below = resolved.below[PoolName(next(iter(models.values())).name)]
        rates = (below.cpu_bytes_per_s, below.cmx_bytes_per_s, below.cmx_latency_s)
        specs.append(StoreSpec(StoreId(f"store {host}"), 1, host, "", stored, *rates))
    return specs


def _stored(config: StoreConfig, resolved: Resolved, pool: PoolConfig, models: Iterable[ModelName]) -> StoredModel:
    """Return the part of a host's store that a pool's model has beside others."""
    block_bytes = resolved.below[PoolName(pool.name)].block_bytes
    slots = config.part_bytes(pool.model, models) // block_bytes
    needed = config.segment_blocks * block_bytes
    problem = f"leaves a host of {pool.name} no room for a segment of {config.segment_blocks} blocks ({needed} bytes)"
    require(slots >= config.segment_blocks, "store.cpu_bytes", problem)
    return StoredModel(
        ModelName(pool.model), pool.engine.block_tokens, block_bytes, slots, config.segment_blocks, bool(config.cmx)
    )


class SimulatedStore:
    """One host's store.

    Args:
        spec, config: what it is; its rates are those of the host's links.
        cpu_latency_s: seconds before a copy between a node and the arena begins.
        shared: what is in `cmx`.
        direct: pools whose nodes read segments by themselves.
        tell_node: lets something happen to a node.
        report: tells gateways, or one of them, of holdings.
    """

    __slots__ = (
        "_agenda", "_cpu_latency_s", "_direct", "_ending", "_faults", "_free_s", "_moves", "_network", "_offer_of", "_offers",
        "_random", "_read_of", "_reads", "_recalled_s", "_report", "_serial", "_shared", "_tell_node", "_timers", "alive",
        "events", "spec", "store", "use",
    )  # fmt: skip

    def __init__(
        self,
        spec: StoreSpec,
        config: StoreConfig,
        cpu_latency_s: float,
        agenda: Agenda,
        network: Network,
        timers: Timers,
        shared: Shared,
        direct: Collection[PoolName],
        use: StoreUse,
        tell_node: Callable[[NodeId, NodeEvent], None],
        report: "Callable[[SimulatedStore, StoreReported, GatewayId | None], None]",
        faults: Faults | None,
        random: Random,
    ) -> None:
        self.spec = spec
        self.store = Store(spec, config)
        self.use = use
        #: False once it has crashed; a new one takes its place.
        self.alive = True
        #: Calls of the store's `handle`.
        self.events = 0
        self._cpu_latency_s = cpu_latency_s
        self._agenda = agenda
        self._network = network
        self._timers = timers
        self._shared = shared
        self._direct = direct
        self._tell_node = tell_node
        self._report = report
        self._faults = faults
        self._random = random
        #: Numbers offers and reads.
        self._serial = 0
        self._offers: dict[OfferId, _Offer] = {}
        self._offer_of: dict[tuple[NodeId, OfferId], OfferId] = {}
        self._reads: dict[ExportId, _Read] = {}
        self._read_of: dict[tuple[NodeId, RequestId], ExportId] = {}
        self._moves: dict[MoveId, ReadCmx | WriteCmx] = {}
        #: Those that have ended, of which their nodes are told at this very moment.
        self._ending = 0
        #: When each link, in each direction, is free again.
        self._free_s: dict[tuple[str, str], float] = {}
        #: When what is in a slot came from `cmx`.
        self._recalled_s: dict[tuple[ModelName, SlotId], float] = {}

    @property
    def unfinished(self) -> int:
        """Reads and offers of whose end nodes have not been told."""
        return len(self._reads) + len(self._offers) + self._ending

    def tell(self, event: StoreEvent) -> None:
        """Let something happen to the store now."""
        if not self.alive:
            return
        self.events += 1
        for command in self.store.handle(event, self._agenda.now):
            self._obey(command)

    def found(self) -> None:
        """Let a store that has just started find what is in `cmx`."""
        for model, segments in self._shared.items():
            if segments:
                self.tell(CmxFound(model, tuple(segments)))

    def attach(self, node: NodeSpec) -> None:
        self.tell(NodeAttached(node.id, node.model))

    def resync(self, gateway: GatewayId, model: ModelName, after: int | None) -> None:
        self.tell(ResyncRequested(gateway, after, model))

    def detach(self, node: NodeId) -> None:
        """Break off what a lost node offers and reads."""
        for offer in [number for number, offered in self._offers.items() if offered.node.id == node]:
            self._drop_offer(offer)
        for read in [number for number, reading in self._reads.items() if reading.node.id == node]:
            self._drop_read(read)
        self.tell(NodeDetached(node))

    def crash(self) -> None:
        """Stop at once: what nodes offer and read ends, and what is in the arena is lost."""
        self.alive = False
        self._timers.drop(self.spec.id)
        for offer in tuple(self._offers):
            self._end_offer(offer, "the store is gone")
        for read in tuple(self._reads):
            self._end_read(read, "the store is gone")
        self._moves.clear()

    def _obey(self, command: StoreCommand) -> None:
        match command:
            case Grant():
                self._on_grant(command)
            case ServeSlots():
                self._on_serve(command)
            case ServeSegment():
                self._on_serve_segment(command)
            case ReadCmx() | WriteCmx():
                self._on_move(command)
            case CancelMove(move):
                self._agenda.at(self._agenda.now, self._end_move, move, MoveFailure.CANCELLED)
            case DeleteCmx(model, segments):
                for segment in segments:
                    self._shared[model].pop(segment, None)
            case PublishHoldings(model, batches, gateway):
                self._report(self, StoreReported(self.spec.id, model, self.store.load(model), batches), gateway)
            case SetTimer(key, at):
                self._timers.set(self.spec.id, key, at, self.tell, TimerFired(key))
            case ClearTimer(key):
                self._timers.clear(self.spec.id, key)
            case _:
                assert_never(command)

    def _carry(self, link: str, way: str, size: int, bytes_per_s: float, latency_s: float) -> float:
        """Put bytes on a link behind what is on it; return when they have arrived."""
        start_s = max(self._agenda.now, self._free_s.get((link, way), 0.0))
        free_s = self._free_s[link, way] = start_s + size / bytes_per_s
        return free_s + latency_s

    # --- what nodes offer -------------------------------------------------------------------------------------------------

    def offer(self, node: NodeSpec, command: Offer) -> None:
        """Let a node offer blocks."""
        self._serial += 1
        number = OfferId(self._serial)
        self._offers[number] = _Offer(node, command)
        self._offer_of[node.id, command.offer] = number
        if self.alive:
            self._network.send(node.id, self.spec.id, self._open_offer, number)
        else:
            self._end_offer(number, "there is no store")

    def stop_offer(self, node: NodeId, offer: OfferId) -> None:
        """Give an offer up; nothing of it counts as copied."""
        number = self._offer_of.get((node, offer))
        if number is not None:
            granted = self._offers[number].grant is not None
            self._end_offer(number, "stopped")
            if granted:
                self._agenda.at(self._agenda.now, self.tell, OfferWritten(number, 0))

    def _open_offer(self, number: OfferId) -> None:
        offered = self._offers.get(number)
        if offered is not None:
            command = offered.command
            self.tell(Offered(number, offered.node.id, offered.node.model, command.parent, command.hashes))

    def _on_grant(self, grant: Grant) -> None:
        """Copy what the store takes of an offer; one that was stopped meanwhile is over."""
        offered = self._offers.get(grant.offer)
        if offered is None:
            if grant.slots:
                self._agenda.at(self._agenda.now, self.tell, OfferWritten(grant.offer, 0))
        elif not grant.slots:
            self._end_offer(grant.offer, "its parent is not held" if grant.orphan else None)
        else:
            offered.grant = grant
            size = len(grant.slots) * self._block_bytes(offered.node.model)
            arrives_s = self._carry(offered.node.id, "out", size, self.spec.cpu_bytes_per_s, self._cpu_latency_s)
            self._agenda.at(arrives_s, self._written, grant, size)

    def _written(self, grant: Grant, size: int) -> None:
        offered = self._offers.get(grant.offer)
        if offered is None:
            return
        self.use.offered_bytes += size
        for slot in grant.slots:
            self._recalled_s.pop((offered.node.model, slot), None)
        complete = grant.first + len(grant.slots) == len(offered.command.hashes)
        self._end_offer(grant.offer, None if complete else "no room")
        self.tell(OfferWritten(grant.offer, len(grant.slots)))

    def _end_offer(self, number: OfferId, failure: str | None) -> None:
        offered = self._drop_offer(number)
        self._tell_end(offered.node.id, OfferEnded(offered.command.offer, failure))

    def _drop_offer(self, number: OfferId) -> _Offer:
        offered = self._offers.pop(number)
        del self._offer_of[offered.node.id, offered.command.offer]
        return offered

    # --- what nodes load --------------------------------------------------------------------------------------------------

    def load(self, node: NodeSpec, command: LoadBlocks) -> None:
        """Let a node read blocks."""
        self._serial += 1
        number = ExportId(self._serial)
        self._reads[number] = _Read(node, command, self._agenda.now, command.first_block * node.block_tokens)
        self._read_of[node.id, command.request] = number
        if self.alive:
            self._network.send(node.id, self.spec.id, self._open_read, number)
        else:
            self._end_read(number, "there is no store")

    def stop_load(self, node: NodeId, request: RequestId) -> None:
        """Give a read up, if the node reads for that request."""
        number = self._read_of.get((node, request))
        if number is not None:
            self._end_read(number, "stopped")
            self._agenda.at(self._agenda.now, self.tell, ReadClosed(number))

    def _open_read(self, number: ExportId) -> None:
        reading = self._reads.get(number)
        if reading is not None:
            node, command = reading.node, reading.command
            background, direct = is_prefetch(command.request), node.pool in self._direct
            wanted = (command.hashes, command.first_block, command.tokens)
            self.tell(ReadOpened(number, node.id, node.model, *wanted, background, direct))

    def _on_serve(self, command: ServeSlots) -> None:
        """Put slots on the node's link; an end without any does not overtake those before it."""
        reading = self._reads.get(command.read)
        if reading is None:
            return
        size = len(command.slots) * self._block_bytes(reading.node.model)
        if size:
            arrives_s = self._carry(reading.node.id, "in", size, self.spec.cpu_bytes_per_s, self._cpu_latency_s)
            reading.arrives_s = max(arrives_s, reading.arrives_s)
        reading.arrives_s = max(reading.arrives_s, self._agenda.now)
        self._agenda.at(reading.arrives_s, self._arrive, command, size)

    def _arrive(self, command: ServeSlots, size: int) -> None:
        reading = self._reads.get(command.read)
        if reading is None:
            return
        self.use.loaded_bytes += size
        model, since = reading.node.model, reading.opened_s
        recalled = sum(self._recalled_s.get((model, slot), -1.0) >= since for slot in command.slots)
        reading.cmx_tokens += recalled * reading.node.block_tokens
        reading.tokens = command.tokens
        if command.final:
            self._end_read(command.read, None)
        else:
            self._agenda.at(
                self._agenda.now, self._tell_node, reading.node.id, FetchProgressed(reading.command.request, command.tokens)
            )
        if command.slots:
            self.tell(SlotsRead(command.read, command.slots))
        if command.final:
            self.tell(ReadClosed(command.read))

    def _on_serve_segment(self, command: ServeSegment) -> None:
        """Put a segment on the host's link to `cmx`, from where a node reads it; it does not overtake what it is behind."""
        reading = self._reads.get(command.read)
        if reading is None:
            return
        model = next(stored for stored in self.spec.models if stored.model == reading.node.model)
        arrives_s = self._carry("cmx", "in", model.segment_bytes, self.spec.cmx_bytes_per_s, self.spec.cmx_latency_s)
        reading.arrives_s = max(arrives_s, reading.arrives_s)
        self._agenda.at(reading.arrives_s, self._end_segment, command, model.segment_bytes)

    def _end_segment(self, command: ServeSegment, size: int) -> None:
        reading = self._reads.get(command.read)
        if reading is None:
            return
        failure = self._read_damage(reading.node.model, command.segment)
        if failure is None:
            self.use.cmx_read_bytes += size
            tokens = command.tokens - reading.tokens
            self.use.loaded_bytes += tokens // reading.node.block_tokens * self._block_bytes(reading.node.model)
            reading.cmx_tokens += tokens
            reading.tokens = command.tokens
            reading.direct = True
            progress = FetchProgressed(reading.command.request, command.tokens, direct=True)
            self._agenda.at(self._agenda.now, self._tell_node, reading.node.id, progress)
        self.tell(SegmentRead(command.read, command.number, failure))

    def _end_read(self, number: ExportId, failure: str | None) -> None:
        reading = self._drop_read(number)
        request, tokens, cmx_tokens = reading.command.request, reading.tokens, reading.cmx_tokens
        ended = FetchEnded(request, tokens, failure=failure, cmx_tokens=cmx_tokens, direct=reading.direct)
        self._tell_end(reading.node.id, ended)

    def _drop_read(self, number: ExportId) -> _Read:
        reading = self._reads.pop(number)
        del self._read_of[reading.node.id, reading.command.request]
        return reading

    def _tell_end(self, node: NodeId, event: OfferEnded | FetchEnded) -> None:
        """Let a node know of an end once it is through with what it is told now."""
        self._ending += 1
        self._agenda.at(self._agenda.now, self._told_end, node, event)

    def _told_end(self, node: NodeId, event: OfferEnded | FetchEnded) -> None:
        self._ending -= 1
        self._tell_node(node, event)

    # --- cmx --------------------------------------------------------------------------------------------------------------

    def _on_move(self, command: ReadCmx | WriteCmx) -> None:
        """Put a segment on the host's link to `cmx`."""
        self._moves[command.move] = command
        way = "in" if isinstance(command, ReadCmx) else "out"
        size = len(command.slots) * self._block_bytes(command.model)
        arrives_s = self._carry("cmx", way, size, self.spec.cmx_bytes_per_s, self.spec.cmx_latency_s)
        self._agenda.at(arrives_s, self._end_move, command.move, None)

    def _end_move(self, move: MoveId, failure: MoveFailure | None) -> None:
        command = self._moves.pop(move, None)
        if command is None:
            return
        failure = failure or self._damage(command)
        size = 0 if failure is not None else len(command.slots) * self._block_bytes(command.model)
        if isinstance(command, ReadCmx):
            self.use.cmx_read_bytes += size
            if failure is None:
                self._recalled_s.update(dict.fromkeys([(command.model, slot) for slot in command.slots], self._agenda.now))
            self.tell(CmxRead(move, failure))
        else:
            self.use.cmx_written_bytes += size
            if failure is None:
                self._shared[command.model][command.segment] = None
            self.tell(CmxWritten(move, failure))

    def _damage(self, command: ReadCmx | WriteCmx) -> MoveFailure | None:
        """Return what is wrong with a transfer that came to its end, if anything is."""
        if isinstance(command, ReadCmx):
            return self._read_damage(command.model, command.segment)
        return MoveFailure.UNAVAILABLE if self._is_damaged() else None

    def _read_damage(self, model: ModelName, segment: BlockHash) -> MoveFailure | None:
        """Return what is wrong with a segment that was read, if anything is."""
        if self._is_damaged():
            return MoveFailure.DAMAGED
        return None if segment in self._shared[model] else MoveFailure.MISSING

    def _is_damaged(self) -> bool:
        faults = self._faults
        return faults is not None and self._agenda.now < faults.until_s and self._random.random() < faults.damaged_share

    def _block_bytes(self, model: ModelName) -> int:
        return next(stored.block_bytes for stored in self.spec.models if stored.model == model)
