"""What a node keeps for leases: a claim on as much of each leased chain as it holds, up to a share of its pool for all of them.

A lease names more blocks than a node may hold: those that come later are claimed as they come. What is over the share is not
claimed, but counted; leases give way when nothing else would let a request in. A lease that may sink below `hbm` is only kept
in mind here, so that gateways can be told of it.

    leased chain    |--- claimed ---|--- held, over the share ---|--- not held ---|
"""

from collections.abc import Collection, Iterable

from orchestrator.core.events import LeaseEnded
from orchestrator.core.kvpool import BlockPool, Claim
from orchestrator.core.types import BlockHash, Lease, LeaseId, Tier

#: Leases that a node keeps in mind; one more is not taken.
LEASES_MAX = 4096
#: Leases that have ended whose late revisions are still known for such.
ENDED_MAX = 1024


class HeldLease:
    """A lease, and what this node has claimed for it."""

    __slots__ = ("claim", "expires_at", "lease", "unclaimed")

    def __init__(self, lease: Lease, expires_at: float) -> None:
        self.lease = lease
        self.expires_at = expires_at
        self.claim: Claim | None = None
        #: Blocks of its chain that were here and were not claimed, because of the share or for others' sake.
        self.unclaimed = 0

    @property
    def depth(self) -> int:
        """Blocks of its chain that are claimed."""
        return self.claim.depth if self.claim is not None else 0


class Leases:
    """The leases that one node knows of."""

    def __init__(self, pool: BlockPool, blocks_max: int) -> None:
        self._pool = pool
        self._blocks_max = blocks_max
        self._leases: dict[LeaseId, HeldLease] = {}
        #: Up to which revision leases have ended, the newest last.
        self._ended: dict[LeaseId, int] = {}
        #: The next block of leased chains that is not here, and the leases that wait for it.
        self._awaited: dict[BlockHash, dict[LeaseId, None]] = {}
        #: Blocks under claims, each counted once.
        self.blocks = 0

    @property
    def ids(self) -> Collection[LeaseId]:
        return self._leases.keys()

    @property
    def claims(self) -> Collection[Claim]:
        """The claims of all leases."""
        return [held.claim for held in self._leases.values() if held.claim is not None]

    @property
    def unclaimed_blocks(self) -> int:
        """Blocks that were here and were not claimed, by lease."""
        return sum([held.unclaimed for held in self._leases.values()])

    def told(self, now: float) -> tuple[Lease, ...]:
        """Return all leases as gateways are told of them: with the seconds that each has left."""
        return tuple(held.lease.until(held.expires_at, now) for held in self._leases.values() if held.expires_at > now)

    def ended(self) -> tuple[LeaseEnded, ...]:
        """Return the leases that are known to have ended."""
        return tuple(LeaseEnded(lease, revision) for lease, revision in self._ended.items())

    def place(self, lease: Lease, now: float) -> bool:
        """Keep a lease, or its newer revision; False if it is none, has ended, or is one too many."""
        held = self._leases.get(lease.id)
        if held is not None and held.lease.revision >= lease.revision:
            return False
        if self._ended.get(lease.id, -1) >= lease.revision or (held is None and len(self._leases) >= LEASES_MAX):
            return False
        new = HeldLease(lease, now + lease.ttl_s)
        former = self._forget(held) if held is not None else None
        self._leases[lease.id] = new
        if lease.tier is Tier.HBM:
            self._extend(new)
        if former is not None:  # only now, so that what both claim was claimed throughout
            self._pool.release(former)
            self._settle()
        return True

    def end(self, lease: LeaseId, revision: int) -> bool:
        """Give a lease up, whose later revisions count; False if it ended before, or goes on in a later one."""
        if self._ended.get(lease, -1) >= revision:
            return False
        held = self._leases.get(lease)
        if held is not None and held.lease.revision > revision:
            return False
        self._ended.pop(lease, None)
        self._ended[lease] = revision
        if len(self._ended) > ENDED_MAX:
            del self._ended[next(iter(self._ended))]
        if held is not None:
            self._drop(held)
        return True

    def expire(self, lease: LeaseId) -> None:
        """Give up a lease that has had its time."""
        self._drop(self._leases[lease])

    def note(self, names: Iterable[BlockHash]) -> None:
        """Claim for leases what has come to be here."""
        for name in names if self._awaited else ():
            for lease in self._awaited.pop(name, ()):
                self._extend(self._leases[lease])

    def give_way(self, blocks_short: int) -> bool:
        """Give claims up, of the leases placed last first, until so many blocks more can be used; False if that is too few."""
        if self._pool.kept_by(self.claims) < blocks_short:
            return False
        enough = self._pool.available_blocks + blocks_short
        for held in reversed(self._leases.values()):
            if self._pool.available_blocks >= enough:
                break
            if held.claim is not None:
                self._stop_awaiting(held)
                held.unclaimed += held.depth
                self._pool.release(held.claim)
                held.claim = None
        self.blocks = self._pool.claimed_by(self.claims)
        return True

    def _drop(self, held: HeldLease) -> None:
        claim = self._forget(held)
        if claim is not None:
            self._pool.release(claim)
        self._settle()

    def _forget(self, held: HeldLease) -> Claim | None:
        """Keep a lease no longer; return what it claimed, which is still to be released."""
        del self._leases[held.lease.id]
        self._stop_awaiting(held)
        self.blocks = self._pool.claimed_by(self.claims)
        return held.claim

    def _settle(self) -> None:
        """Let those claim more that were over the share, after a claim went."""
        for held in self._leases.values():
            if held.unclaimed:
                self._extend(held)

    def _extend(self, held: HeldLease) -> None:
        """Claim what has come to be here of a leased chain, as far as the share allows."""
        hashes = held.lease.hashes
        matched = self._pool.match(hashes, len(hashes))
        shared = self._pool.shared_depth(self.claims, hashes, matched)
        room = max(0, self._blocks_max - self.blocks)
        depth = shared + min(room, matched - shared)
        held.unclaimed = matched - depth
        if depth > held.depth:
            former, (held.claim, _) = held.claim, self._pool.acquire(hashes, depth)
            self._pool.seal(held.claim)
            if former is not None:
                self._pool.release(former)
            self.blocks += depth - shared
        if not held.unclaimed and matched < len(hashes):
            self._awaited.setdefault(hashes[matched], {})[held.lease.id] = None

    def _stop_awaiting(self, held: HeldLease) -> None:
        """Let a lease wait for no block any more: it waits for the one behind its claim, if for any."""
        hashes = held.lease.hashes
        if held.depth < len(hashes):
            waiting = self._awaited.get(hashes[held.depth], {})
            waiting.pop(held.lease.id, None)
            if not waiting:
                self._awaited.pop(hashes[held.depth], None)

    def validate(self) -> None:
        """Check that what is counted is what is claimed, and that whatever may still come is waited for."""
        claimed = self._pool.claimed_by(self.claims)
        assert self.blocks == claimed, f"{self.blocks} leased blocks are counted, {claimed} are claimed"
        assert claimed <= self._blocks_max, f"{claimed} blocks are leased, at most {self._blocks_max} may be"
        for name, waiting in self._awaited.items():
            assert waiting, f"nobody waits for {name!r}"
            for lease in waiting:
                held = self._leases[lease]
                assert held.lease.hashes[held.depth] == name, f"lease {lease} claims {held.depth} blocks and waits for {name!r}"
        for held in self._leases.values():
            assert held.depth <= len(held.lease.hashes), f"lease {held.lease.id} claims {held.depth} blocks"
