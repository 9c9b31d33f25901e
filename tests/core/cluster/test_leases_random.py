"""Random hints, turns, expiries and faults on two gateways, beside a plain model of what leases promise.

The model knows no tree, no timer and no message: a list of leases, and sums over it. After every step it and the clusters must
agree on which leases there are, on what each takes and on when each ends; and nodes, who only believe what they are told, on what
to keep.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.cluster.leases import REFIT_S, TTL_S, TTL_S_MIN
from orchestrator.core.commands import (
    AnswerHint,
    CancelPrefetch,
    ClearTimer,
    ClusterCommand,
    EndLease,
    EvictBlocks,
    PlaceLease,
    PrefetchBlocks,
    SetTimer,
)
from orchestrator.core.config import ClusterConfig, LeasesConfig, TenantConfig
from orchestrator.core.events import (
    ClusterEvent,
    HintAsked,
    LeaseEnded,
    LeasesTold,
    NodeJoined,
    NodeLost,
    PrefetchEnded,
    TimerFired,
)
from orchestrator.core.hints import Hint, Outcome, Reason, Receipt, Verb
from orchestrator.core.timers import ClusterTimer
from orchestrator.core.types import (
    GatewayId,
    KvBatch,
    Lease,
    LeaseId,
    ModelName,
    NodeId,
    Prefetch,
    PrefetchEnd,
    PrefetchId,
    SessionId,
    TenantId,
    Tier,
)
from tests.builders import prompt_hashes
from tests.core.cluster.cluster_builders import cluster_config, join_store, reported, spec_of, stored

BLOCK_BYTES = 64
BLOCKS = 40
SHARE = 0.5
TTL_S_MAX = 200.0
LEASES_MAX = 6
MODEL = ModelName("m")
TENANTS = (
    TenantConfig("t"),
    TenantConfig("u", share=2.0, pinned_bytes_max={"hbm": 12 * BLOCK_BYTES}),
    TenantConfig("v", pinned_byte_s_per_s=0.2 * BLOCK_BYTES),
)
CONFIG: ClusterConfig = replace(
    cluster_config(), tenants=TENANTS, leases=LeasesConfig(ttl_s_max=TTL_S_MAX, leases_max=LEASES_MAX)
)
PROMPTS = ("abcdefgh", "abcd", "abxy", "mnopqrstuvwx", "m", "")
SESSIONS = ("s1", "s2")


@dataclass
class Promise:
    """A lease, as the model has it."""

    tenant: str
    blocks: int
    ends_at: float
    session: str | None


@dataclass
class Plain:
    """What leases promise, said as simply as possible."""

    leases: dict[LeaseId, Promise] = field(default_factory=dict)
    nodes: int = 0
    #: Byte-seconds that tenant v has saved up, and when.
    saved: float = 0.2 * BLOCK_BYTES * 3600
    saved_at: float = 0.0

    def advance(self, now: float) -> None:
        self.saved = min(0.2 * BLOCK_BYTES * 3600, self.saved + (now - self.saved_at) * 0.2 * BLOCK_BYTES)
        self.saved_at = now
        self.leases = {name: one for name, one in self.leases.items() if one.ends_at > now}

    def blocks_of(self, tenant: str | None) -> int:
        return sum(one.blocks for one in self.leases.values() if tenant in (None, one.tenant))

    def room(self, tenant: str, former: Promise | None) -> int:
        """Return the blocks that a tenant may have once `former` is gone."""
        all_bytes = int(self.nodes * BLOCKS * BLOCK_BYTES * SHARE)
        quota = min(all_bytes, 12 * BLOCK_BYTES) if tenant == "u" else int(all_bytes / 4)
        left = min(quota - self.blocks_of(tenant) * BLOCK_BYTES, all_bytes - self.blocks_of(None) * BLOCK_BYTES)
        return max(0, left + (former.blocks if former else 0) * BLOCK_BYTES) // BLOCK_BYTES

    def unused(self, one: Promise | None, now: float) -> float:
        return one.blocks * BLOCK_BYTES * (one.ends_at - now) if one is not None else 0.0

    def pin(self, hint: Hint, now: float) -> tuple[Outcome, Reason | None, int, float]:
        """Return what a pin is to be granted: outcome, reason, blocks, seconds."""
        former = self.leases.get(hint.lease) if hint.lease is not None else None
        if not hint.hashes:
            return Outcome.REJECTED, Reason.TOO_SHORT, 0, 0.0
        if hint.lease is not None and (former is None or former.tenant != hint.tenant):
            return Outcome.MISSING, Reason.NO_LEASE, 0, 0.0
        mine = [one for one in self.leases.values() if one.tenant == hint.tenant]
        if former is None and len(mine) >= LEASES_MAX:
            return Outcome.REJECTED, Reason.TOO_MANY_LEASES, 0, 0.0
        ttl_s = min(hint.ttl_s or TTL_S, TTL_S_MAX)
        if ttl_s < TTL_S_MIN:
            return Outcome.REJECTED, Reason.TTL_MIN, 0, 0.0
        blocks = min(len(hint.hashes), self.room(hint.tenant, former))
        if not blocks:
            return Outcome.REJECTED, Reason.QUOTA_BYTES, 0, 0.0
        reason = Reason.TTL_MAX if (hint.ttl_s or TTL_S) > TTL_S_MAX else None
        if hint.tenant == "v":
            saved = self.saved + self.unused(former, now)
            if blocks * BLOCK_BYTES * ttl_s > saved:
                ttl_s, reason = saved / (blocks * BLOCK_BYTES), Reason.QUOTA_BYTE_SECONDS
            if ttl_s < TTL_S_MIN:
                return Outcome.REJECTED, Reason.QUOTA_BYTE_SECONDS, 0, 0.0
        if blocks < len(hint.hashes):
            reason = Reason.QUOTA_BYTES
        return (Outcome.APPLIED if reason is None else Outcome.CLIPPED), reason, blocks, ttl_s

    def place(self, name: LeaseId, hint: Hint, blocks: int, ttl_s: float, now: float) -> None:
        if hint.tenant == "v":
            self.saved += self.unused(self.leases.get(name), now) - blocks * BLOCK_BYTES * ttl_s
        self.leases[name] = Promise(hint.tenant, blocks, now + ttl_s, hint.session)

    def end(self, name: LeaseId, now: float) -> None:
        one = self.leases.pop(name)
        if one.tenant == "v":
            self.saved = min(0.2 * BLOCK_BYTES * 3600, self.saved + self.unused(one, now))


class HolderNode:
    """A node that does as it is told: keeps leases, forgets those whose time is up, tells other gateways what is new."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.kept: dict[LeaseId, tuple[Lease, float]] = {}
        self.ended: dict[LeaseId, int] = {}

    def place(self, lease: Lease, now: float) -> bool:
        known = self.kept.get(lease.id)
        if (known is not None and known[0].revision >= lease.revision) or self.ended.get(lease.id, -1) >= lease.revision:
            return False
        self.kept[lease.id] = lease, now + lease.ttl_s
        return True

    def end(self, lease: LeaseId, revision: int) -> bool:
        known = self.kept.get(lease)
        self.ended[lease] = max(self.ended.get(lease, -1), revision)
        if known is None or known[0].revision > revision:
            return False
        del self.kept[lease]
        return True

    def told(self, now: float) -> tuple[Lease, ...]:
        return tuple(replace(lease, ttl_s=at - now) for lease, at in self.kept.values() if at > now)


class World:
    """Two gateways and some nodes. Tenants t and u ask either gateway, v only the first, whose byte-seconds the model counts."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.plain = Plain()
        self.clusters = [Cluster(GatewayId(number), CONFIG) for number in range(2)]
        self.timers: list[dict[ClusterTimer, float]] = [{}, {}]
        self.nodes: dict[NodeId, HolderNode] = {}
        self.incarnation = 0
        self.serial = 0
        self.batches: dict[NodeId, int] = {}
        self.answers: list[Receipt] = []
        self.done: list[tuple[int, Hint, Receipt]] = []
        #: What nodes were asked to bring and are not done with, by gateway; and for whom, once that was told.
        self.prefetches: list[dict[PrefetchId, tuple[NodeId, Prefetch]]] = [{}, {}]
        self.wanted: list[dict[PrefetchId, tuple[str, SessionId | None]]] = [{}, {}]
        for number in range(2):
            join_store(self.clusters[number], "s0", *PROMPTS[:3])
        for name in ("a0", "a1"):
            self.join(NodeId(name), {})

    # --- what happens -----------------------------------------------------------------------------------------------------

    def tell(self, gateway: int, event: ClusterEvent) -> None:
        for command in self.clusters[gateway].handle(event, self.now):
            self.execute(gateway, command)

    def execute(self, gateway: int, command: ClusterCommand) -> None:
        match command:
            case AnswerHint():
                self.answers.append(command.receipt)
            case PlaceLease(lease, _, nodes, _):
                for node in nodes:
                    if self.nodes[node].place(lease, self.now):
                        self.tell(1 - gateway, LeasesTold(node, (lease,)))
            case EndLease(lease, _, nodes, _):
                for node in nodes:
                    if self.nodes[node].end(lease.id, lease.revision):
                        self.tell(1 - gateway, LeasesTold(node, (), (LeaseEnded(lease.id, lease.revision),)))
            case EvictBlocks(_, hashes, first_block, _, nodes):
                assert set(nodes) <= set(self.nodes), f"{nodes} are told, there are {list(self.nodes)}"
                assert first_block < len(hashes)
            case PrefetchBlocks(node, prefetch):
                assert node in self.nodes, f"{node} is asked to bring something, there are {list(self.nodes)}"
                self.prefetches[gateway][prefetch.id] = node, prefetch
            case CancelPrefetch(node, prefetch):
                assert self.prefetches[gateway][prefetch][0] == node
                self.end_prefetch(gateway, prefetch, PrefetchEnd.CANCELLED)
            case SetTimer(key, at):
                self.timers[gateway][key] = at
            case ClearTimer(key):
                self.timers[gateway].pop(key, None)
            case _:
                pass

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            due = [(at, number, str(key), key) for number in range(2) for key, at in self.timers[number].items() if at <= end]
            if not due:
                break
            at, number, _, key = min(due)
            self.now = max(self.now, at)
            self.plain.advance(self.now)
            del self.timers[number][key]
            self.tell(number, TimerFired(key))
        self.now = end
        self.plain.advance(end)

    def join(self, node: NodeId, kept: dict[LeaseId, tuple[Lease, float]]) -> None:
        self.incarnation += 1
        holder = self.nodes[node] = HolderNode(self.incarnation)
        holder.kept = dict(kept)
        self.plain.nodes = len(self.nodes)
        for number in range(2):
            self.tell(number, NodeJoined(spec_of(node, blocks=BLOCKS, incarnation=self.incarnation, stores=True, host="h0")))
            self.tell(number, reported(node, KvBatch(0, cleared=True), prefetch_room_blocks=self.random.choice((0, 3, 20))))
            self.tell(number, LeasesTold(node, holder.told(self.now)))
        self.batches[node] = 0

    def lose(self, node: NodeId) -> HolderNode:
        lost = self.nodes.pop(node)
        self.plain.nodes = len(self.nodes)
        for number in range(2):
            self.tell(number, NodeLost(node, "killed"))
            self.prefetches[number] = {name: one for name, one in self.prefetches[number].items() if one[0] != node}
        return lost

    def end_prefetch(self, gateway: int, prefetch: PrefetchId, reason: PrefetchEnd) -> None:
        """A node is done with a prefetch, as all of it, none of it, or something in between has come."""
        node, asked = self.prefetches[gateway].pop(prefetch)
        first = self.random.randint(0, len(asked.hashes))
        ended = PrefetchEnded(prefetch, reason, first, self.random.randint(first, len(asked.hashes)))
        room = self.random.choice((0, 3, 20))
        self.tell(gateway, replace(reported(node, prefetch_room_blocks=room), prefetches=(ended,)))

    # --- steps ------------------------------------------------------------------------------------------------------------

    def ask(self, gateway: int, hint: Hint) -> Receipt:
        self.answers.clear()
        self.tell(gateway, HintAsked(hint))
        (receipt,) = self.answers
        if receipt.outcome.effective:
            self.done.append((gateway, hint, receipt))
        return receipt

    def hint(self, verb: Verb, tenant: str, **fields: object) -> Hint:
        self.serial += 1
        return replace(Hint(verb, TenantId(tenant), f"m{self.serial}", "0", MODEL), **fields)

    def who(self) -> tuple[str, int]:
        tenant = self.random.choice("tuv")
        return tenant, 0 if tenant == "v" else self.random.randrange(2)

    def some_lease(self) -> LeaseId | None:
        """Return a lease, perhaps somebody else's, perhaps none at all."""
        names = [*self.plain.leases, LeaseId("none")]
        return self.random.choice(names)

    def step_pin(self) -> None:
        tenant, gateway = self.who()
        lease = self.some_lease() if self.random.random() < 0.3 else None
        hashes = prompt_hashes(self.random.choice(PROMPTS))
        session = SessionId(self.random.choice(SESSIONS)) if self.random.random() < 0.5 else None
        # No two times are alike: whether equal sums of floats are enough is a matter of rounding.
        ttl_s = self.random.choice((0.0, 0.5, 3.0, 40.0, 150.0, 1000.0)) * (1 + self.random.random() / 10)
        hint = self.hint(Verb.PIN, tenant, hashes=hashes, session=session, lease=lease, ttl_s=ttl_s)
        outcome, reason, blocks, ttl_s = self.plain.pin(hint, self.now)
        receipt = self.ask(gateway, hint)
        deferred = receipt.outcome is Outcome.DEFERRED and receipt.reason is Reason.NOT_RESIDENT
        assert receipt.outcome is outcome or (deferred and outcome is Outcome.APPLIED), (hint, receipt, outcome)
        assert receipt.reason is reason or deferred, (hint, receipt, reason)
        assert receipt.blocks == blocks
        assert receipt.ttl_s == pytest.approx(ttl_s)
        if receipt.outcome.effective:
            assert receipt.lease is not None
            self.plain.place(receipt.lease, hint, blocks, receipt.ttl_s, self.now)

    def step_unpin(self) -> None:
        tenant, gateway = self.who()
        name = self.some_lease()
        receipt = self.ask(gateway, self.hint(Verb.UNPIN, tenant, lease=name))
        mine = name in self.plain.leases and self.plain.leases[name].tenant == tenant
        assert (receipt.outcome is Outcome.APPLIED) == mine
        if mine:
            assert name is not None
            self.plain.end(name, self.now)

    def step_end_session(self) -> None:
        tenant, gateway = self.who()
        session = SessionId(self.random.choice(SESSIONS))
        brought = [name for name in self.prefetches[gateway] if self.wanted[gateway][name] == (tenant, session)]
        receipt = self.ask(gateway, self.hint(Verb.END_SESSION, tenant, session=session))
        ending = [name for name, one in self.plain.leases.items() if (one.tenant, one.session) == (tenant, session)]
        assert (receipt.outcome is Outcome.APPLIED) == bool(ending or brought)
        assert not set(brought) & set(self.prefetches[gateway])
        for name in ending:
            self.plain.end(name, self.now)

    def step_evict(self) -> None:
        """Evict something: whatever comes of it, no lease does."""
        tenant, gateway = self.who()
        hashes = prompt_hashes(self.random.choice(PROMPTS[:-1]))
        self.ask(gateway, self.hint(Verb.EVICT, tenant, hashes=hashes))

    def step_prefetch(self) -> None:
        """Have something brought into hbm, within the quota; no lease becomes another by it."""
        tenant, gateway = self.who()
        hashes = prompt_hashes(self.random.choice(PROMPTS[:-1]))
        session = SessionId(self.random.choice(SESSIONS)) if self.random.random() < 0.5 else None
        ttl_s = self.random.choice((0.0, 1.0, 50.0, 5000.0))
        hint = self.hint(Verb.PREFETCH, tenant, hashes=hashes, session=session, tier=Tier.HBM, ttl_s=ttl_s)
        receipt = self.ask(gateway, hint)
        if receipt.prefetch is not None:
            _, asked = self.prefetches[gateway][receipt.prefetch]
            assert asked.hashes == hashes[: receipt.blocks]
            assert receipt.ttl_s == asked.keep_s
            self.wanted[gateway][receipt.prefetch] = tenant, session
            brought = self.clusters[gateway].hints._prefetches.size_bytes(TenantId(tenant), self.now)
            assert 0 < brought < (self.plain.room(tenant, None) + 1) * BLOCK_BYTES, (receipt, brought)

    def step_prefetch_ended(self) -> None:
        gateway = self.random.randrange(2)
        if self.prefetches[gateway]:
            prefetch = self.random.choice(list(self.prefetches[gateway]))
            self.end_prefetch(gateway, prefetch, self.random.choice(list(PrefetchEnd)))

    def step_again(self) -> None:
        """Send something again: nothing may come of it."""
        if self.done:
            gateway, hint, first = self.random.choice(self.done[-50:])
            receipt = self.ask(gateway, hint)
            assert receipt == replace(first, outcome=Outcome.DUPLICATE, first=first.outcome)

    def step_turn(self) -> None:
        """A node computed something, or forgot all."""
        node = self.random.choice(list(self.nodes))
        batch = stored(self.random.choice(PROMPTS[:-1]), sequence=self.batches[node], cleared=self.random.random() < 0.3)
        if not batch.cleared:
            batch = replace(batch, sequence=self.batches[node] + 1)
        self.batches[node] = batch.sequence
        for number in range(2):
            self.tell(number, reported(node, batch, prefetch_room_blocks=self.random.choice((0, 3, 20))))

    def step_restart(self) -> None:
        """A node is lost and comes back at once, with nothing, or as it was: it was only unreachable."""
        node = self.random.choice(list(self.nodes))
        lost = self.lose(node)
        self.pass_time(self.random.choice((0.0, 1.0, REFIT_S / 4)))
        self.join(node, lost.kept if self.random.random() < 0.5 else {})

    def step_gateway(self) -> None:
        """The second gateway dies and another takes its place: what it knew of leases it has again from nodes."""
        self.clusters[1] = Cluster(GatewayId(1), CONFIG)
        self.timers[1] = {}
        self.prefetches[1], self.wanted[1] = {}, {}
        join_store(self.clusters[1], "s0", *PROMPTS[:3])
        self.done = [one for one in self.done if one[0] == 0]
        for node, holder in self.nodes.items():
            self.tell(1, NodeJoined(spec_of(node, blocks=BLOCKS, incarnation=holder.incarnation, stores=True, host="h0")))
            self.tell(1, reported(node, KvBatch(self.batches[node], cleared=True)))
            self.tell(1, LeasesTold(node, holder.told(self.now)))

    def step_wait(self) -> None:
        self.pass_time(self.random.choice((0.1, 1.0, 10.0, 60.0)) * self.random.random())

    # --- what must hold ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        expected = {name: (one.tenant, one.blocks) for name, one in self.plain.leases.items()}
        for number, cluster in enumerate(self.clusters):
            cluster.validate()
            leases = cluster.hints.leases
            held = {one.lease.id: one for tenant in TENANTS for one in leases.of(TenantId(tenant.name))}
            assert {name: (one.lease.tenant, len(one.lease.hashes)) for name, one in held.items()} == expected, number
            for name, one in held.items():
                assert one.expires_at == pytest.approx(self.plain.leases[name].ends_at)
                assert one.lease.size_bytes == len(one.lease.hashes) * BLOCK_BYTES
        for node, holder in self.nodes.items():
            kept = {lease.id: len(lease.hashes) for lease in holder.told(self.now)}
            assert kept == {name: blocks for name, (_, blocks) in expected.items()}, node
        saved = self.clusters[0].hints.leases.byte_s_left(TenantId("v"), self.now)
        assert saved == pytest.approx(self.plain.saved, abs=1e-3)


def run(seed: int, steps: int, broken: Callable[[World], None] | None = None) -> None:
    world = World(seed)
    for cluster in world.clusters:
        cluster.hints.leases.divide(1, 0.0)
    kinds = (
        [world.step_pin] * 8
        + [world.step_unpin] * 3
        + [world.step_wait] * 3
        + [world.step_turn] * 2
        + [world.step_prefetch] * 2
        + [world.step_prefetch_ended]
        + [world.step_end_session, world.step_evict, world.step_again, world.step_restart, world.step_gateway]
    )
    for number in range(steps):
        step = world.random.choice(kinds)
        try:
            step()
            if broken is not None:
                broken(world)
            world.check()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, step {number} ({step.__name__}): {error}") from error


@pytest.mark.parametrize("seed", range(2))
def test_leases_keep_what_they_promise(seed: int) -> None:
    run(seed, 400)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_leases_keep_what_they_promise_for_long(seed: int) -> None:
    run(100 + seed, 10_000)


def test_canary_a_lease_that_is_forgotten_is_noticed() -> None:
    def forget(world: World) -> None:
        leases = world.clusters[0].hints.leases
        for tenant in TENANTS:
            for held in leases.of(TenantId(tenant.name)):
                leases.end(held, world.now)

    with pytest.raises(AssertionError, match="seed 7, step"):
        run(7, 40, forget)
