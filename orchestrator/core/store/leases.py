"""Keeps what is leased: in the arena by claims, in cmx by pins, as more of it comes and until the lease is over.

    lease at hbm, cpu   claims what is in the arena of its chain, and what comes later; what is in cmx alone is brought
    lease at cmx        claims it only until its whole segments are in cmx, where they stay; without cmx as one at cpu

Rule 1: leases never keep more than their share of the arena from eviction; one beyond that keeps the front of its chain.
"""

from collections.abc import Iterable
from math import ceil

from orchestrator.core.commands import ClearTimer, SetTimer, StoreCommand
from orchestrator.core.events import LeaseEnded, LeasePlaced
from orchestrator.core.kvpool import Claim
from orchestrator.core.store.shelves import Shelf
from orchestrator.core.timers import LeaseTimer
from orchestrator.core.types import BlockHash, Lease, LeasedBytes, LeaseId, ModelName, TenantId, Tier

#: Leases of a store; one more is not kept.
LEASES_MAX = 8192
#: Ends that are remembered, so that a late word of an ended lease does not bring it back.
ENDS_MAX = 8192


class Held:
    """One lease, and what is held for it."""

    __slots__ = ("claim", "expires_at", "lease", "missing", "shelf")

    def __init__(self, lease: Lease, expires_at: float, shelf: Shelf, claim: Claim, missing: dict[BlockHash, None]) -> None:
        self.lease = lease
        self.expires_at = expires_at
        self.shelf = shelf
        #: On what of its chain is kept in the arena.
        self.claim = claim
        #: Its whole segments that are not in cmx.
        self.missing = missing

    @property
    def sunk(self) -> bool:
        """Whether it needs no claim: what it is about may be in cmx alone, and is there."""
        return self.lease.tier is Tier.CMX and self.shelf.model.cmx and not self.missing


class Leases:
    """All leases of a store."""

    __slots__ = ("_clipped", "_ended", "_held", "_leased", "_of_segment", "_orders", "_share_max", "_waiting")

    def __init__(self, share_max: float, orders: list[StoreCommand]) -> None:
        self._share_max = share_max
        self._orders = orders
        self._held: dict[LeaseId, Held] = {}
        #: The last revisions of those that are over, the oldest first.
        self._ended: dict[LeaseId, int] = {}
        #: Those whose chains go on with a block that is not claimed, by that block.
        self._waiting: dict[BlockHash, dict[LeaseId, Held]] = {}
        #: Those that have less of their chain than there is, since leases have their share of the arena.
        self._clipped: dict[LeaseId, Held] = {}
        #: What `leased` said of a model, until something changes.
        self._leased: dict[ModelName, tuple[LeasedBytes, ...]] = {}
        #: Those that pin a segment.
        self._of_segment: dict[BlockHash, dict[LeaseId, Held]] = {}

    def place(self, shelf: Shelf, event: LeasePlaced, now: float) -> bool:
        """Hold what a lease is about; False if it was known, is over, or is one too many."""
        lease = event.lease
        former = self._held.get(lease.id)
        known = former.lease.revision if former is not None else self._ended.get(lease.id, -1)
        if lease.revision <= known:
            return False
        if former is None and len(self._held) >= LEASES_MAX:
            shelf.fail("too many leases")
            return False
        if former is not None:
            self._let_go(former)
        claim, model = shelf.pool.claim(None), shelf.model.model
        assert claim is not None
        segments = self._segments(shelf, lease)
        missing: dict[BlockHash, None] = {name: None for name in segments if not shelf.segments.holds(model, name)}
        held = self._held[lease.id] = Held(lease, now + lease.ttl_s, shelf, claim, missing)
        for name in segments:
            shelf.segments.pin(model, name)
            self._of_segment.setdefault(name, {})[lease.id] = held
        self._orders.append(SetTimer(LeaseTimer(lease.id), held.expires_at))
        self._extend(held)
        return True

    def end(self, event: LeaseEnded) -> None:
        """Let go of what a lease was about."""
        held = self._held.get(event.lease)
        if held is not None and held.lease.revision > event.revision:
            return
        if held is not None:
            self._orders.append(ClearTimer(LeaseTimer(event.lease)))
            self._close(held)
        self._remember(event.lease, max(event.revision, self._ended.get(event.lease, 0)))

    def expire(self, identity: LeaseId) -> None:
        """Let go of what a lease was about that has had its time."""
        held = self._held.get(identity)
        if held is not None:
            self._close(held)
            self._remember(identity, held.lease.revision)

    def grown(self, shelf: Shelf) -> None:
        """Claim what has come to the arena of chains that are leased."""
        names, shelf.grown = shelf.grown, []
        if not self._waiting:
            return
        for name in names:
            for held in list(self._waiting.get(name, {}).values()):
                self._extend(held)

    def changed(self, shelf: Shelf, segments: Iterable[BlockHash]) -> None:
        """Know that segments came to cmx, or went: whose lease asks for no more needs no claim, and the other way round."""
        for name in segments:
            for held in list(self._of_segment.get(name, {}).values()):
                if held.shelf is not shelf:
                    continue
                self._leased.pop(shelf.model.model, None)
                if shelf.segments.holds(shelf.model.model, name):
                    held.missing.pop(name, None)
                else:
                    held.missing[name] = None
                if held.sunk:
                    self._release(held)
                else:
                    self._extend(held)

    def told(self, now: float) -> tuple[Lease, ...]:
        """Return all leases as gateways are told of them."""
        return tuple(held.lease.until(held.expires_at, now) for held in self._held.values() if held.expires_at > now)

    def leased(self, shelf: Shelf) -> tuple[LeasedBytes, ...]:
        """Return what is held of a model, by tenant and tier."""
        model = shelf.model.model
        if model not in self._leased:
            self._leased[model] = self._count(shelf)
        return self._leased[model]

    def _count(self, shelf: Shelf) -> tuple[LeasedBytes, ...]:
        blocks: dict[tuple[TenantId, Tier], int] = {}
        size = shelf.model.segment_blocks
        for held in self._held.values():
            if held.shelf is shelf:
                segments = len(held.lease.hashes) // size - len(held.missing) if shelf.model.cmx else 0
                for tier, count in ((Tier.CPU, held.claim.depth), (Tier.CMX, segments * size)):
                    key = (held.lease.tenant, tier)
                    blocks[key] = blocks.get(key, 0) + count
        return tuple(
            LeasedBytes(tenant, tier, count * shelf.model.block_bytes) for (tenant, tier), count in blocks.items() if count
        )

    @property
    def claims(self) -> Iterable[tuple[Shelf, Claim]]:
        return ((held.shelf, held.claim) for held in self._held.values())

    @staticmethod
    def _segments(shelf: Shelf, lease: Lease) -> tuple[BlockHash, ...]:
        """Return the segments that a lease keeps in cmx."""
        return tuple(shelf.whole(lease.hashes, len(lease.hashes))) if shelf.model.cmx else ()

    def _extend(self, held: Held) -> None:
        """Claim as much of a chain as is in the arena, within what leases may take."""
        if held.sunk:
            return
        self._stop_waiting(held)
        pool, hashes = held.shelf.pool, held.lease.hashes
        there = pool.match(hashes, len(hashes))
        spare = pool.available_blocks - ceil(pool.blocks * (1 - self._share_max))
        excess = pool.idle_of(hashes, there) - spare
        if excess > 0 and there > held.claim.depth:
            self._clipped[held.lease.id] = held
            there = max(held.claim.depth, there - excess)
        else:
            self._clipped.pop(held.lease.id, None)
        if there > held.claim.depth:
            pool.extend(held.claim, hashes[there - 1], there)
        if there < len(hashes):
            self._waiting.setdefault(hashes[there], {})[held.lease.id] = held

    def _stop_waiting(self, held: Held) -> None:
        """Take a lease out of those that wait for a block; what it claims is about to change."""
        self._leased.pop(held.lease.model, None)
        depth, hashes = held.claim.depth, held.lease.hashes
        if depth < len(hashes) and (waiting := self._waiting.get(hashes[depth])) is not None:
            waiting.pop(held.lease.id, None)
            if not waiting:
                del self._waiting[hashes[depth]]

    def _release(self, held: Held) -> None:
        """Give a claim up."""
        self._stop_waiting(held)
        self._clipped.pop(held.lease.id, None)
        pool = held.shelf.pool
        pool.release(held.claim)
        claim = pool.claim(None)
        assert claim is not None
        held.claim = claim

    def _let_go(self, held: Held) -> None:
        """Give up all that a lease holds."""
        self._stop_waiting(held)
        self._clipped.pop(held.lease.id, None)
        held.shelf.pool.release(held.claim)
        del self._held[held.lease.id]
        for name in self._segments(held.shelf, held.lease):
            held.shelf.segments.unpin(held.shelf.model.model, name)
            del self._of_segment[name][held.lease.id]
            if not self._of_segment[name]:
                del self._of_segment[name]

    def _close(self, held: Held) -> None:
        """Give up all that a lease holds; others may now have what there was no room for."""
        self._let_go(held)
        for other in list(self._clipped.values()):
            if other.shelf is held.shelf:
                self._extend(other)

    def _remember(self, lease: LeaseId, revision: int) -> None:
        self._ended.pop(lease, None)
        self._ended[lease] = revision
        if len(self._ended) > ENDS_MAX:
            del self._ended[next(iter(self._ended))]

    def validate(self) -> None:
        """Check every invariant; raises AssertionError with the numbers."""
        for held in self._held.values():
            shelf, lease = held.shelf, held.lease
            segments = self._segments(shelf, lease)
            missing = {name for name in segments if not shelf.segments.holds(shelf.model.model, name)}
            assert missing == set(held.missing), f"lease {lease.id} lacks {len(missing)} segments, counts {len(held.missing)}"
            told, counted = self._leased.get(lease.model), self._count(shelf)
            assert told in (None, counted), f"{told} are said to be leased of {lease.model}, there are {counted}"
            depth = held.claim.depth
            waits = depth < len(lease.hashes) and lease.id in self._waiting.get(lease.hashes[depth], {})
            assert waits != (held.sunk or depth == len(lease.hashes)), f"lease {lease.id} claims {depth} blocks, waits: {waits}"
