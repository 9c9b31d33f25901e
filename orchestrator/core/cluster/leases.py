"""Leases: which blocks tenants have been promised to keep, on which tier, until when, and how much each may have of it.

    place ──> held ──> renewed, moved, lowered ──> held ──> its time is up, unpinned, its session ends, its memory is gone

What a tenant may hold is limited twice. In bytes at a time, by tier: what its table says, else its share of what all leases
together may take of the tier's memory. And in byte-seconds, saved up at a rate: a lease costs its bytes times its seconds when it
is placed, and what is left of it comes back when it ends early. Over a limit less is granted, or nothing; never at the price of
somebody who was granted something before.

Every gateway knows all leases, since holders tell them on; so bytes are counted whole at each. Two gateways that grant at the
same moment may exceed a quota together by what they grant until they have heard of each other. Byte-seconds are counted where a
lease was placed; each gateway has an equal part of the rate.

Rules for editors.

Rule 1: for one id the highest revision counts, and an end counts more than the revisions up to it, in whatever order they come.
Rule 2: what is in use by tier and tenant changes where `_held` does, and nowhere else.
Rule 3: memory that is gone may come back at once (a node restarts): promises are kept for `REFIT_S` before they are cut.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.core.blocks import common_blocks
from orchestrator.core.cluster.rates import Bucket
from orchestrator.core.config import LeasesConfig, TenantConfig
from orchestrator.core.hints import Reason
from orchestrator.core.types import BlockHash, Lease, LeaseId, ModelName, SessionId, TenantId, Tier

#: Seconds of a lease that asks for none.
TTL_S = 300.0
#: A lease for less is none.
TTL_S_MIN = 1.0
#: Seconds of its rate of byte-seconds that a tenant may save up: gigabytes for an hour, or twelve times as many for five minutes.
SAVED_S = 3600.0
#: Seconds that leases may exceed the memory there is before they are lowered or dropped.
REFIT_S = 60.0
#: Leases that ended before their time and that are remembered, so that nobody who did not hear of it brings them back.
ENDED_MAX = 65_536


@dataclass(frozen=True, slots=True)
class Wanted:
    """A lease that somebody asks for."""

    id: LeaseId
    tenant: TenantId
    model: ModelName
    hashes: tuple[BlockHash, ...]
    block_bytes: int
    tier: Tier
    ttl_s: float
    session: SessionId | None = None


@dataclass(frozen=True, slots=True)
class Grant:
    """What would be granted of it."""

    blocks: int
    tier: Tier
    ttl_s: float
    size_bytes: int
    #: Why it is less than was asked for; empty if it is not.
    clipped: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing is granted."""

    reason: Reason
    message: str


class Held:
    """A lease that runs."""

    __slots__ = ("expires_at", "lease")

    def __init__(self, lease: Lease, expires_at: float) -> None:
        self.lease = lease
        self.expires_at = expires_at


class Leases:
    """All leases of a cluster, as one gateway knows them."""

    __slots__ = (
        "_buckets",
        "_capacity",
        "_config",
        "_ended",
        "_gateways",
        "_held",
        "_of_tenant",
        "_shares",
        "_spent",
        "_tenants",
        "_used",
        "_used_by",
    )

    def __init__(self, config: LeasesConfig, tenants: Sequence[TenantConfig] = (), gateways: int = 1) -> None:
        self._config = config
        self._tenants = {TenantId(tenant.name): tenant for tenant in tenants}
        self._shares = sum([tenant.share for tenant in tenants]) or 1.0
        self._gateways = gateways
        self._buckets = {
            name: Bucket(tenant.pinned_byte_s_per_s / gateways, SAVED_S)
            for name, tenant in self._tenants.items()
            if tenant.pinned_byte_s_per_s
        }
        #: Bytes that leases may have of a tier in all.
        self._capacity: dict[Tier, int] = dict.fromkeys(Tier, 0)
        self._held: dict[LeaseId, Held] = {}
        #: Each tenant's, in the order they were placed.
        self._of_tenant: dict[TenantId, dict[LeaseId, None]] = {}
        #: Bytes of leases, always the sums over `_held`.
        self._used: dict[Tier, int] = dict.fromkeys(Tier, 0)
        self._used_by: dict[tuple[TenantId, Tier], int] = {}
        #: Bytes times seconds that leases took, up to when that last changed.
        self._spent: dict[tuple[TenantId, Tier], tuple[float, float]] = {}
        #: Last revision of leases that ended before their time, and when they would have ended.
        self._ended: OrderedDict[LeaseId, tuple[int, float]] = OrderedDict()

    # --- views ------------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._held)

    def get(self, lease: LeaseId, tenant: TenantId) -> Held | None:
        """Return a tenant's lease; None if it has none of that id, whoever else may."""
        held = self._held.get(lease)
        return held if held is not None and held.lease.tenant == tenant else None

    def of(self, tenant: TenantId) -> list[Held]:
        """Return a tenant's leases, in the order they were placed."""
        return [self._held[lease] for lease in self._of_tenant.get(tenant, ())]

    def told(self, model: ModelName, now: float) -> list[Lease]:
        """Return a model's leases with the time they have left, for a holder that has just joined."""
        return [
            held.lease.until(held.expires_at, now)
            for held in self._held.values()
            if held.lease.model == model and held.expires_at > now
        ]

    @property
    def used_bytes(self) -> Mapping[tuple[TenantId, Tier], int]:
        """Bytes of leases by tenant and tier; those that were, and are none now, are 0."""
        return self._used_by

    def byte_seconds(self, now: float) -> dict[tuple[TenantId, Tier], float]:
        """Return the bytes times seconds that leases have taken so far, by tenant and tier."""
        return {key: spent + self._used_by[key] * max(0.0, now - at) for key, (spent, at) in self._spent.items()}

    def has_tier(self, tier: Tier) -> bool:
        """Whether anybody has memory for leases on that tier."""
        return self._capacity[tier] > 0

    def quota_bytes(self, tenant: TenantId, tier: Tier) -> int:
        """Return what a tenant may have of a tier, used or not."""
        config = self._tenants.get(tenant)
        leasable = self._capacity[tier]
        if config is None:
            return leasable
        given = config.pinned_bytes_max.get(tier)
        return min(leasable, given if given is not None else int(leasable * config.share / self._shares))

    def bytes_left(self, tenant: TenantId, tier: Tier) -> int:
        """Return what a tenant may still have of a tier, 0 or more."""
        own = self.quota_bytes(tenant, tier) - self._used_by.get((tenant, tier), 0)
        whole = self._capacity[tier] - self._used[tier]
        return max(0, min(own, whole))

    def byte_s_left(self, tenant: TenantId, now: float) -> float | None:
        """Return the byte-seconds that a tenant has saved up; None for any number."""
        bucket = self._buckets.get(tenant)
        return bucket.level(now) if bucket is not None else None

    # --- what may be had --------------------------------------------------------------------------------------------------

    def grant(self, wanted: Wanted, now: float) -> Grant | Refused:
        """Return what a lease would be granted now, in place of the one of its id if there is one. Changes nothing."""
        former = self._held.get(wanted.id)
        if former is None and len(self._of_tenant.get(wanted.tenant, ())) >= self._config.leases_max:
            return Refused(Reason.TOO_MANY_LEASES, f"this tenant has {self._config.leases_max} leases, the most it may")
        asked_s = wanted.ttl_s or TTL_S
        if asked_s < TTL_S_MIN:
            return Refused(Reason.TTL_MIN, f"a lease must last {TTL_S_MIN:g} seconds or more, not {asked_s:g}")
        clipped: list[Reason] = []
        ttl_s = min(asked_s, self._config.ttl_s_max)
        if ttl_s < asked_s:
            clipped.append(Reason.TTL_MAX)
        tier, blocks = self._fitting(wanted, former)
        if not blocks:
            quota = self.quota_bytes(wanted.tenant, wanted.tier)
            return Refused(
                Reason.QUOTA_BYTES, f"nothing is left of {quota} bytes on {wanted.tier.value} for this tenant's leases"
            )
        if tier is not wanted.tier:
            clipped.append(Reason.LOWER_TIER)
        elif blocks < len(wanted.hashes):
            clipped.append(Reason.QUOTA_BYTES)
        size_bytes = blocks * wanted.block_bytes
        saved = self._saved(wanted.tenant, former, now)
        if saved is not None and size_bytes * ttl_s > saved:
            ttl_s = saved / size_bytes
            clipped.append(Reason.QUOTA_BYTE_SECONDS)
            if ttl_s < TTL_S_MIN:
                message = f"{size_bytes} bytes for {TTL_S_MIN:g} s is more than the {max(0.0, saved):.0f} byte-seconds left"
                return Refused(Reason.QUOTA_BYTE_SECONDS, message)
        return Grant(blocks, tier, ttl_s, size_bytes, tuple(clipped))

    def _fitting(self, wanted: Wanted, former: Held | None) -> tuple[Tier, int]:
        """Return the best tier, from the wanted one down, that has room for all of it; else the wanted one, and for how much."""
        size_bytes = len(wanted.hashes) * wanted.block_bytes
        tier: Tier | None = wanted.tier
        while tier is not None:
            if self._room(wanted.tenant, tier, former) >= size_bytes:
                return tier, len(wanted.hashes)
            tier = tier.below
        # In blocks: what is left of the wanted tier.
        return wanted.tier, self._room(wanted.tenant, wanted.tier, former) // wanted.block_bytes

    def _room(self, tenant: TenantId, tier: Tier, former: Held | None) -> int:
        """Return what a tenant may have of a tier once `former` is gone."""
        own = self.quota_bytes(tenant, tier) - self._used_by.get((tenant, tier), 0)
        whole = self._capacity[tier] - self._used[tier]
        back = former.lease.size_bytes if former is not None and former.lease.tier is tier else 0
        return max(0, min(own, whole) + back)

    def _saved(self, tenant: TenantId, former: Held | None, now: float) -> float | None:
        bucket = self._buckets.get(tenant)
        return None if bucket is None else bucket.level(now) + _unused(former, now)

    # --- what is had ------------------------------------------------------------------------------------------------------

    def place(self, wanted: Wanted, granted: Grant, now: float) -> Held:
        """Place a lease as granted, in place of the one of its id if there is one; return it."""
        former = self._held.get(wanted.id)
        ended, _ = self._ended.pop(wanted.id, (-1, 0.0))
        lease = Lease(
            id=wanted.id,
            tenant=wanted.tenant,
            model=wanted.model,
            hashes=wanted.hashes[: granted.blocks],
            tier=granted.tier,
            ttl_s=granted.ttl_s,
            size_bytes=granted.size_bytes,
            revision=(former.lease.revision if former is not None else ended) + 1,
            session=wanted.session,
        )
        bucket = self._buckets.get(wanted.tenant)
        if bucket is not None:
            bucket.take(granted.size_bytes * granted.ttl_s - _unused(former, now), now)
        return self._keep(lease, now)

    def lower(self, held: Held, tier: Tier, now: float) -> Held:
        """Let a lease's blocks sink to a lower tier; return it as it is then."""
        lease = held.lease
        assert tier.level > lease.tier.level, f"{tier.value} is not below {lease.tier.value}"
        return self._keep(replace(lease, tier=tier, ttl_s=held.expires_at - now, revision=lease.revision + 1), now)

    def end(self, held: Held, now: float) -> None:
        """End a lease before its time; what was paid for the rest comes back."""
        bucket = self._buckets.get(held.lease.tenant)
        if bucket is not None:
            bucket.take(-_unused(held, now), now)
        self._remember_end(held.lease.id, held.lease.revision, held.expires_at, now)
        self._drop(held.lease.id, now)

    def expire(self, lease: LeaseId, now: float) -> Held | None:
        """End a lease whose time is up; None if there is none, or its time has not come."""
        held = self._held.get(lease)
        if held is None or held.expires_at > now:
            return None
        self._drop(lease, now)
        return held

    def learn(self, lease: Lease, now: float) -> Held | None:
        """Take in a lease that a holder tells of; None if nothing new is told, or the lease has ended."""
        known = self._held.get(lease.id)
        if known is not None and known.lease.revision >= lease.revision:
            return None
        if self.ended_revision(lease.id) >= lease.revision or lease.ttl_s <= 0:
            return None
        self._ended.pop(lease.id, None)
        return self._keep(replace(lease, ttl_s=min(lease.ttl_s, self._config.ttl_s_max)), now)

    def learn_end(self, lease: LeaseId, revision: int, now: float) -> Held | None:
        """Take in that a lease has ended; return it if it was known and is over with that."""
        held = self._held.get(lease)
        if held is not None and held.lease.revision > revision:
            return None
        expires_at = held.expires_at if held is not None else now + self._config.ttl_s_max
        self._remember_end(lease, revision, expires_at, now)
        if held is not None:
            self._drop(lease, now)
        return held

    def ended_revision(self, lease: LeaseId) -> int:
        """Return the last revision of a lease that is remembered to have ended early, -1 if none is."""
        return self._ended.get(lease, (-1, 0.0))[0]

    # --- memory that comes and goes ---------------------------------------------------------------------------------------

    def set_capacity(self, tier: Tier, size_bytes: int) -> None:
        """Have so much memory for leases on a tier from now on."""
        self._capacity[tier] = size_bytes

    def divide(self, gateways: int, now: float) -> None:
        """Have an equal part of the rates among so many gateways from now on."""
        self._gateways = gateways
        for tenant, bucket in self._buckets.items():
            bucket.refit(self._tenants[tenant].pinned_byte_s_per_s / gateways, now)

    @property
    def exceeded(self) -> tuple[Tier, ...]:
        """Tiers of which leases have more than they may."""
        return tuple(tier for tier in Tier if self._used[tier] > self._capacity[tier])

    def fit(self, now: float) -> list[tuple[Held, Held | None]]:
        """Lower what exceeds the memory there is, or end it where no lower tier has room; those that end soonest first.

        Returns each with what became of it; None if it was ended.
        """
        cut: list[tuple[Held, Held | None]] = []
        for tier in self.exceeded:
            leasable = self._capacity[tier]
            here = sorted(
                (held for held in self._held.values() if held.lease.tier is tier),
                key=lambda held: (held.expires_at, held.lease.id),
            )
            for held in here:
                if self._used[tier] <= leasable:
                    break
                cut.append((held, self._sink(held, now)))
        return cut

    def _sink(self, held: Held, now: float) -> Held | None:
        """Lower a lease to the next tier that has room for it, or end it."""
        lease, tier = held.lease, held.lease.tier.below
        while tier is not None:
            if self._room(lease.tenant, tier, None) >= lease.size_bytes:
                return self.lower(held, tier, now)
            tier = tier.below
        self.end(held, now)
        return None

    # --- books ------------------------------------------------------------------------------------------------------------

    def _keep(self, lease: Lease, now: float) -> Held:
        """Put a lease into the books, in place of its former self."""
        self._drop(lease.id, now)
        held = self._held[lease.id] = Held(lease, now + lease.ttl_s)
        self._of_tenant.setdefault(lease.tenant, {})[lease.id] = None
        self._count(lease, lease.size_bytes, now)
        return held

    def _drop(self, lease: LeaseId, now: float) -> None:
        held = self._held.pop(lease, None)
        if held is not None:
            self._count(held.lease, -held.lease.size_bytes, now)
            mine = self._of_tenant[held.lease.tenant]
            del mine[lease]
            if not mine:
                del self._of_tenant[held.lease.tenant]

    def _count(self, lease: Lease, size_bytes: int, now: float) -> None:
        self._used[lease.tier] += size_bytes
        key = lease.tenant, lease.tier
        used = self._used_by.get(key, 0)
        spent, at = self._spent.get(key, (0.0, now))
        self._spent[key] = spent + used * max(0.0, now - at), now
        self._used_by[key] = used + size_bytes

    def _remember_end(self, lease: LeaseId, revision: int, until: float, now: float) -> None:
        former, _ = self._ended.pop(lease, (-1, 0.0))
        self._ended[lease] = max(former, revision), until
        while self._ended and (len(self._ended) > ENDED_MAX or next(iter(self._ended.values()))[1] <= now):
            self._ended.popitem(last=False)

    def validate(self) -> None:
        """Raise `AssertionError` unless the books agree."""
        used: dict[tuple[TenantId, Tier], int] = dict.fromkeys(self._used_by, 0)
        for held in self._held.values():
            used[held.lease.tenant, held.lease.tier] += held.lease.size_bytes
            assert held.lease.id in self._of_tenant[held.lease.tenant], f"lease {held.lease.id} is not among its tenant's"
            assert held.lease.hashes, f"lease {held.lease.id} has no blocks"
        assert used == self._used_by, f"leases take {used}, counted are {self._used_by}"
        for tier in Tier:
            total = sum(size for (_, its), size in used.items() if its is tier)
            assert total == self._used[tier], f"leases on {tier.value} take {total} bytes, {self._used[tier]} are counted"
        listed = sum(len(mine) for mine in self._of_tenant.values())
        assert listed == len(self._held), f"{listed} leases are listed, {len(self._held)} held"
        both = [lease for lease in self._held if self.ended_revision(lease) >= self._held[lease].lease.revision]
        assert not both, f"leases {both} run and have ended"


def leased_blocks(held: Iterable[Held], hashes: Sequence[BlockHash]) -> int:
    """Return how many first blocks of a chain some of these leases cover."""
    return max((common_blocks(one.lease.hashes, hashes) for one in held), default=0)


def _unused(held: Held | None, now: float) -> float:
    """Return the byte-seconds that a lease has left."""
    return held.lease.size_bytes * max(0.0, held.expires_at - now) if held is not None else 0.0
