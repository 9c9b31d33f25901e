"""Takes blocks that nodes offer: which of them are wanted, where they go, and what becomes of slots that a lost node was copying.

    Offered   its parent is held .. what follows is held in part .. Grant of slots for the rest, or for as much as there is room
              .. OfferWritten: the blocks are kept, and told of .. what was not written is set free
              what another offer brings just now .. it waits for that one
              no parent, nothing new, no room, no chain: Grant without slots, and the offer is over

Rule 1: slots that a node may write to, or read from, are nobody else's until it says so, or is long gone.
Rule 2: a block is brought by one offer at a time, and none is that is held, whatever a node says follows on what.
"""

from collections.abc import Sequence

from orchestrator.core.commands import Grant, SetTimer, StoreCommand
from orchestrator.core.config import StoreConfig
from orchestrator.core.events import Offered
from orchestrator.core.kvpool import Claim
from orchestrator.core.store.shelves import Shelf
from orchestrator.core.timers import DetachTimer
from orchestrator.core.types import BlockHash, BlockId, NodeId, OfferId, SlotId

#: Offers at once, those included that wait for others; one more is not taken.
OFFERS_MAX = 1024


class Offer:
    """One offer that is not over."""

    __slots__ = ("claim", "event", "first", "followers", "follows", "shelf", "slots")

    def __init__(self, event: Offered, shelf: Shelf) -> None:
        self.event = event
        self.shelf = shelf
        #: Index of the first granted block, and the slots of it and those behind it; none while it waits for another offer.
        self.first = 0
        self.slots: list[BlockId] = []
        #: On the chain before them.
        self.claim: Claim | None = None
        #: The one it waits for, and those that wait for it.
        self.follows: Offer | None = None
        self.followers: list[Offer] = []

    @property
    def granted(self) -> tuple[BlockHash, ...]:
        """Names of the blocks that are being copied."""
        return self.event.hashes[self.first : self.first + len(self.slots)]


class Left:
    """What a lost node may still be copying."""

    __slots__ = ("claims", "slots")

    def __init__(self) -> None:
        self.claims: list[tuple[Shelf, Claim]] = []
        self.slots: list[tuple[Shelf, list[BlockId]]] = []


class Offers:
    """All offers, and what lost nodes left behind."""

    __slots__ = ("_again", "_bytes", "_coming", "_config", "_left", "_offers", "_orders")

    def __init__(self, config: StoreConfig, orders: list[StoreCommand]) -> None:
        self._config = config
        self._orders = orders
        self._offers: dict[OfferId, Offer] = {}
        #: Bytes of the slots that are granted.
        self._bytes = 0
        #: Which offer brings a block just now.
        self._coming: dict[tuple[Shelf, BlockHash], Offer] = {}
        #: Offers whose waiting is over.
        self._again: list[Offer] = []
        self._left: dict[NodeId, Left] = {}

    def open(self, shelf: Shelf, event: Offered) -> None:
        """Grant slots for what is wanted of an offer."""
        assert event.offer not in self._offers, f"offer {event.offer} is open already"
        if len(self._offers) >= OFFERS_MAX:
            self._decline(event, shelf)
            return
        offer = self._offers[event.offer] = Offer(event, shelf)
        self._consider(offer)

    def _consider(self, offer: Offer) -> None:
        """Grant an offer what is wanted, let it wait for another that brings the same, or end it."""
        shelf, event = offer.shelf, offer.event
        pool = shelf.pool
        claim = pool.claim(event.parent)
        if claim is None:
            self._wait_or_end(offer, event.parent, orphan=True)
            return
        held = pool.match(event.hashes, len(event.hashes))
        if held and not pool.ends(event.hashes[held - 1], claim.depth + held):  # elsewhere than its node says: no chain
            pool.release(claim)
            self._end(offer)
            shelf.count("declined", len(event.hashes))
            return
        if held:
            pool.extend(claim, event.hashes[held - 1], claim.depth + held)
        if held == len(event.hashes) or (shelf, event.hashes[held]) in self._coming:
            pool.release(claim)
            self._wait_or_end(offer, None if held == len(event.hashes) else event.hashes[held], orphan=False)
            return
        wanted = len(event.hashes) - held
        room = min(self._unknown(shelf, event.hashes[held:]), self._room(shelf), pool.available_blocks)
        shelf.count("declined", wanted - room)
        if not room:
            pool.release(claim)
            self._end(offer)
            return
        offer.first, offer.slots, offer.claim = held, pool.allocate(room), claim
        self._bytes += room * shelf.model.block_bytes
        shelf.users += 1
        for name in offer.granted:
            self._coming[shelf, name] = offer
        self._orders.append(Grant(event.offer, held, tuple(map(SlotId, offer.slots))))

    def _unknown(self, shelf: Shelf, names: Sequence[BlockHash]) -> int:
        """Return how many blocks, the first ones, are neither held nor coming nor named twice: all, if they are a chain."""
        new = shelf.new_blocks(names)
        return next((place for place, name in enumerate(names[:new]) if (shelf, name) in self._coming), new)

    def _room(self, shelf: Shelf) -> int:
        """Return how many blocks more may be under way; one always may when none is."""
        room = (self._config.offers_bytes_max - self._bytes) // shelf.model.block_bytes
        return max(room, 0 if self._bytes else 1)

    def _wait_or_end(self, offer: Offer, block: BlockHash | None, orphan: bool) -> None:
        """Let an offer wait for the one that brings a block; end it if none does."""
        leader = self._coming.get((offer.shelf, block)) if block is not None else None
        if leader is None:
            self._end(offer, orphan)
            return
        offer.follows = leader
        leader.followers.append(offer)

    def _end(self, offer: Offer, orphan: bool = False) -> None:
        del self._offers[offer.event.offer]
        self._orders.append(Grant(offer.event.offer, 0, (), orphan))

    def _decline(self, event: Offered, shelf: Shelf) -> None:
        shelf.count("declined", len(event.hashes))
        self._orders.append(Grant(event.offer, 0, ()))

    def refuse(self, event: Offered) -> None:
        """End an offer by a node that has not attached, or of a model that is not stored."""
        self._orders.append(Grant(event.offer, 0, ()))

    def written(self, identity: OfferId, blocks: int) -> None:
        """Keep what was copied of an offer. Ignored if its node was lost meanwhile."""
        offer = self._offers.get(identity)
        if offer is None:
            return
        assert offer.claim is not None, f"offer {identity} was written and not granted"
        assert blocks <= len(offer.slots), f"offer {identity}: {blocks} blocks written, {len(offer.slots)} granted"
        del self._offers[identity]
        shelf, claim, slots, names = offer.shelf, offer.claim, offer.slots, offer.granted
        self._close(offer)
        shelf.users -= 1
        if blocks:
            shelf.store(claim, slots[:blocks], names[:blocks])
            shelf.count("taken", blocks)
        if blocks < len(slots):
            shelf.fail("copy")
        shelf.pool.give_back(slots[blocks:])
        shelf.pool.release(claim)

    def _close(self, offer: Offer) -> None:
        """Count out what was granted; who waited for it is considered again."""
        for name in offer.granted:
            del self._coming[offer.shelf, name]
        self._bytes -= len(offer.slots) * offer.shelf.model.block_bytes
        for follower in offer.followers:
            follower.follows = None
            self._again.append(follower)
        offer.followers, offer.slots, offer.claim = [], [], None

    def proceed(self) -> None:
        """Consider again what waited for an offer that is over."""
        again, self._again = self._again, []
        for offer in again:
            if self._offers.get(offer.event.offer) is offer:
                self._consider(offer)

    def detach(self, node: NodeId, claims: list[tuple[Shelf, Claim]], now: float) -> None:
        """End a lost node's offers; keep what it may still be copying, from or to, for a while.

        Given are its reads' claims, each counted as a user of its shelf.
        """
        gone = [offer for offer in self._offers.values() if offer.event.node == node]
        slots: list[tuple[Shelf, list[BlockId]]] = []
        for offer in gone:
            del self._offers[offer.event.offer]
            if offer.follows is not None:
                offer.follows.followers.remove(offer)
            if offer.claim is not None:
                claims.append((offer.shelf, offer.claim))  # its shelf has a user less and one more
                slots.append((offer.shelf, offer.slots))
                self._close(offer)
        if not claims:
            return
        left = self._left.setdefault(node, Left())
        left.claims += claims
        left.slots += slots
        self._orders.append(SetTimer(DetachTimer(node), now + self._config.detached_s))

    def forget(self, node: NodeId) -> None:
        """Set free what a lost node may have been copying: that is long over."""
        left = self._left.pop(node, Left())
        for shelf, slots in left.slots:
            shelf.pool.give_back(slots)
        for shelf, claim in left.claims:
            shelf.pool.release(claim)
            shelf.users -= 1

    def held(self) -> tuple[list[tuple[Shelf, Claim]], list[tuple[Shelf, BlockId]]]:
        """Return all claims, and all slots that are being copied to."""
        claims = [claim for left in self._left.values() for claim in left.claims]
        slots = [(shelf, slot) for left in self._left.values() for shelf, part in left.slots for slot in part]
        for offer in self._offers.values():
            claims += [(offer.shelf, offer.claim)] if offer.claim is not None else []
            slots += [(offer.shelf, slot) for slot in offer.slots]
        return claims, slots

    def validate(self) -> None:
        """Check every invariant; raises AssertionError with the numbers."""
        size = sum(len(offer.slots) * offer.shelf.model.block_bytes for offer in self._offers.values())
        assert size == self._bytes, f"{size} bytes are granted, {self._bytes} are counted"
        assert not self._again, f"{len(self._again)} offers were not considered again"
        for identity, offer in self._offers.items():
            leader = offer.follows
            waits = leader is not None and offer in leader.followers and self._offers.get(leader.event.offer) is leader
            assert waits != bool(offer.slots), f"offer {identity} has {len(offer.slots)} slots, waits: {waits}"
        coming = sum(len(offer.slots) for offer in self._offers.values())
        assert coming == len(self._coming), f"{coming} blocks are granted, {len(self._coming)} are listed"
