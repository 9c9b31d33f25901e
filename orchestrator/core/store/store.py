"""One host's store: `Store.handle(event, now)` is the only entrance. It owns the arena, and the host's way to cmx.

    node       offers what it computed   -> `offers.py`    its blocks come into the arena
    node       reads a prompt            -> `recalls.py`   blocks of the arena go out, and what cmx has comes in behind them
    gateways   lease, advise, evict      -> `leases.py`, `recalls.py`, `writes.py`
    nobody     the link is idle          -> `writes.py`    whole segments go on to cmx
               gateways are told what came and went, for each model in one row of numbered batches

The arena is parted among the models: each has a `Shelf` with a block pool of its own. What is in there is closed under prefix,
what is in cmx need not be. Whatever is unfinished has a running command (a grant, slots served, a move) or a timer.

See also `workers/store/`, which carries out what is ordered here.
"""

from typing import assert_never

from orchestrator.core.commands import PublishHoldings, StoreCommand
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
    StoreEvent,
    TimerFired,
)
from orchestrator.core.store.leases import Leases
from orchestrator.core.store.moves import Moves
from orchestrator.core.store.offers import Offers
from orchestrator.core.store.recalls import Recalls
from orchestrator.core.store.segments import Segments
from orchestrator.core.store.shelves import Shelf
from orchestrator.core.store.writes import Writes
from orchestrator.core.timers import CmxTimer, DetachTimer, LeaseTimer, MoveTimer, StoreTimer
from orchestrator.core.types import GatewayId, Lease, ModelName, MoveId, NodeId, StoreLoad, StoreSpec, Tier


class Store:
    """The state of one store. Deterministic: equal events at equal times give equal commands."""

    def __init__(self, spec: StoreSpec, config: StoreConfig) -> None:
        """Make an empty store."""
        self.spec = spec
        self._orders: list[StoreCommand] = []
        self._segments = Segments({model.model: model.segment_bytes for model in spec.models})
        self._shelves = {model.model: Shelf(model, config, self._segments) for model in spec.models}
        self._nodes: dict[NodeId, ModelName] = {}
        self._moves = Moves(config, self._orders)
        self._offers = Offers(config, self._orders)
        self._recalls = Recalls(self._moves, self._orders)
        self._writes = Writes(self._shelves, self._segments, config, self._moves, self._orders)
        self._leases = Leases(config.leased_share_max, self._orders)
        self._now = 0.0

    def handle(self, event: StoreEvent, now: float) -> list[StoreCommand]:
        """Take a fact at time `now`, in seconds, and return what to do about it, in order."""
        self._now = now
        for shelf in self._shelves.values():
            shelf.pool.now = now
        match event:
            case Offered():
                self._on_offered(event)
            case OfferWritten():
                self._offers.written(event.offer, event.blocks)
            case ReadOpened():
                self._on_read_opened(event)
            case SlotsRead():
                self._recalls.read(event.read, len(event.slots), now)
            case SegmentRead():
                self._recalls.segment_read(event, now)
            case ReadClosed():
                self._recalls.close(event.read, now)
            case CmxRead():
                self._recalls.arrived(self._moves.end(event.move, event.failure, now), event.failure, now)
            case CmxWritten():
                self._writes.written(self._moves.end(event.move, event.failure, now), event.failure, now)
            case NodeAttached():
                self._nodes[event.node] = event.model
            case NodeDetached():
                self._on_node_detached(event.node)
            case CmxFound():
                self._on_cmx_found(event)
            case LeasePlaced():
                self._on_lease_placed(event)
            case LeaseEnded():
                self._leases.end(event)
            case PrefetchAsked():
                self._on_prefetch_asked(event)
            case EvictAsked():
                self._on_evict_asked(event)
            case ResyncRequested():
                self._on_resync_requested(event.gateway, event.model, event.after)
            case TimerFired():
                self._on_timer_fired(event.key)
            case _:
                assert_never(event)
        self._proceed()
        orders = list(self._orders)
        self._orders.clear()
        return orders

    def load(self, model: ModelName) -> StoreLoad:
        """Return the counts of one model that the next frame to each gateway carries."""
        shelf = self._shelves[model]
        pool = shelf.pool
        reads, blocks = self._recalls.waiting(shelf)
        return StoreLoad(
            slots_free=pool.free_blocks,
            slots_cached=pool.idle_blocks,
            slots_used=pool.blocks - pool.available_blocks,
            segments=self._segments.count(model),
            reads_waiting=reads,
            waiting_bytes=blocks * shelf.model.block_bytes,
            cpu_bytes_per_s=shelf.cpu.bytes_per_s,
            cmx_bytes_per_s=shelf.cmx.bytes_per_s,
            counts=shelf.counted(),
            leased=self._leases.leased(shelf),
            evicted_idle_s=pool.idling.idle_s,
        )

    def leases(self, now: float) -> tuple[Lease, ...]:
        """Return what is leased here, for a gateway that has just joined."""
        return self._leases.told(now)

    def _proceed(self) -> None:
        """Do what is possible now, what prompts wait for first, and tell what changed in the holdings."""
        for shelf in self._shelves.values():
            self._leases.grown(shelf)
        self._offers.proceed()
        self._recalls.proceed(self._now)
        self._writes.proceed(self._recalls.busy, self._now)
        for shelf in self._shelves.values():
            self._tell(shelf)

    def _tell(self, shelf: Shelf) -> None:
        """Tell leases and gateways what came and went of a model."""
        model = shelf.model.model
        stored, removed = self._segments.take_changes(model)
        self._leases.changed(shelf, [*removed, *stored])
        batches = shelf.record(stored, removed)
        if batches:
            self._orders.append(PublishHoldings(model, batches))

    def _on_offered(self, event: Offered) -> None:
        """Take what is wanted from a node that has attached for that model."""
        if self._nodes.get(event.node) != event.model or event.model not in self._shelves:
            self._offers.refuse(event)
        else:
            self._offers.open(self._shelves[event.model], event)

    def _on_read_opened(self, event: ReadOpened) -> None:
        shelf = self._shelves.get(event.model)
        if shelf is None or self._nodes.get(event.node) != event.model:
            self._recalls.refuse(event, shelf.model.block_tokens if shelf is not None else 0)
        else:
            self._recalls.open(shelf, event, self._now)

    def _on_node_detached(self, node: NodeId) -> None:
        """End all that a lost node was doing."""
        if self._nodes.pop(node, None) is not None:
            self._offers.detach(node, self._recalls.detach(node, self._now), self._now)

    def _on_cmx_found(self, event: CmxFound) -> None:
        shelf = self._shelves.get(event.model)
        if shelf is not None and shelf.model.cmx:
            self._writes.found(shelf, event.segments)

    def _on_lease_placed(self, event: LeasePlaced) -> None:
        """Keep what is leased; what may not be in cmx alone is brought from there."""
        lease = event.lease
        shelf = self._shelves.get(lease.model)
        if shelf is not None and self._leases.place(shelf, event, self._now) and lease.tier is not Tier.CMX:
            self._recalls.prefetch(shelf, lease.hashes, len(lease.hashes), self._now)

    def _on_prefetch_asked(self, event: PrefetchAsked) -> None:
        shelf = self._shelves.get(event.model)
        if shelf is not None:
            self._recalls.prefetch(shelf, event.hashes, event.blocks, self._now)

    def _on_evict_asked(self, event: EvictAsked) -> None:
        """Let blocks leave a tier, at once or once they are in the one below; there is no hbm here, and nothing below cmx."""
        shelf = self._shelves.get(event.model)
        if shelf is None:
            return
        if event.tier is Tier.CMX:
            self._writes.evict(shelf, event.hashes, event.first_block, event.end_block)
        elif event.tier is Tier.CPU and event.demote:
            self._writes.demote(shelf, event.hashes, event.first_block, event.end_block)
        elif event.tier is Tier.CPU:
            shelf.pool.drop(event.hashes, event.first_block, event.end_block)

    def _on_resync_requested(self, gateway: GatewayId, model: ModelName | None, after: int | None) -> None:
        """Tell one gateway what it missed of a model, or all that is held. Nothing is untold between events."""
        shelf = self._shelves.get(model) if model is not None else None
        if shelf is not None:
            self._orders.append(PublishHoldings(shelf.model.model, shelf.since(after), gateway))

    def _on_timer_fired(self, key: StoreTimer) -> None:
        """Give a late move up, let a lease end, use again what a lost node may have been copying, try cmx again."""
        match key:
            case MoveTimer(identity):
                self._on_late(identity)
            case LeaseTimer(lease):
                self._leases.expire(lease)
            case DetachTimer(node):
                self._offers.forget(node)
            case CmxTimer():
                self._moves.resume()
            case _:
                assert_never(key)

    def _on_late(self, identity: MoveId) -> None:
        """Give up a move that takes too long; what was to be written is tried again later."""
        move = self._moves.running.get(identity)
        if move is None or move.cancelled:
            return
        move.shelf.fail("late")
        if move.claim is None:
            self._recalls.late(move, self._now)
        else:
            self._moves.cancel(move)

    # --- invariants -------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every invariant; raises AssertionError with the numbers. Dear: for tests and simulations."""
        self._segments.validate()
        self._moves.validate()
        self._offers.validate()
        self._recalls.validate()
        self._writes.validate()
        self._leases.validate()
        parts = (self._offers.held(), self._recalls.held())
        claims = [*self._leases.claims, *self._moves.claims, *(claim for part in parts for claim in part[0])]
        slots = [slot for part in parts for slot in part[1]]
        for shelf in self._shelves.values():
            shelf.pool.validate([claim for of, claim in claims if of is shelf], [slot for of, slot in slots if of is shelf])
