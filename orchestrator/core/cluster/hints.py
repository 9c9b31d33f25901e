"""What harnesses ask of the cache, decided: each `Hint` gets one `Receipt`, and nodes are told what follows from it.

    HintAsked ── done before? ── yes ──> AnswerHint(DUPLICATE)
                      └─ no ──> by its verb ──> AnswerHint, and PlaceLease, EndLease or EvictBlocks to holders

`leases.py` has the rules of leases, the index who holds what. Nothing that a hint does changes what a model says.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import assert_never

from orchestrator.core.blocks import hash_bytes
from orchestrator.core.cluster.candidates import Router
from orchestrator.core.cluster.effects import Effects
from orchestrator.core.cluster.leases import REFIT_S, TTL_S, Grant, Held, Leases, Refused, Wanted, leased_blocks
from orchestrator.core.cluster.pools import ModelPools
from orchestrator.core.cluster.prefetches import KEPT_S, KEPT_S_MAX, Prefetches, Way
from orchestrator.core.cluster.returns import LATE_S, Returns
from orchestrator.core.cluster.sessions import Sessions
from orchestrator.core.cluster.stores import holder
from orchestrator.core.commands import (
    AnswerHint,
    CancelPrefetch,
    ClearTimer,
    ClusterCommand,
    EndLease,
    EvictBlocks,
    EvictStored,
    Expect,
    PlaceLease,
    PrefetchBlocks,
    PrefetchStored,
    RetainBlocks,
    SetTimer,
)
from orchestrator.core.config import ClusterConfig
from orchestrator.core.cost.costs import prompt_seconds
from orchestrator.core.events import LeasesTold, PrefetchEnded, SessionEnded, ToolFinished, ToolStarted
from orchestrator.core.hints import NEUTRAL, PRIORITY_MAX, Hint, Holding, LeaseChange, Outcome, Price, Reason, Receipt, Verb
from orchestrator.core.outlook import ContextId, Outlook
from orchestrator.core.timers import LeaseTimer, RefitTimer
from orchestrator.core.types import (
    BlockHash,
    GatewayId,
    Lease,
    LeaseId,
    ModelName,
    NodeId,
    NodeSpec,
    Request,
    RequestId,
    SessionId,
    StoredModel,
    StoreId,
    StoreSpec,
    TenantId,
    Tier,
)

#: What nobody can be asked for, by verb, where there is no store.
_NO_STORE = {
    Verb.DEMOTE: "there is no tier below hbm for blocks to sink to",
    Verb.SHARE: "there is no tier below hbm that several nodes have blocks from",
}
#: A bit that no number of a request has.
_CHAIN = 1 << 63
#: Nodes that are to have what is shared, unless it is said.
COPIES = 2
#: The reason that stands for a grant that is less in several ways: the one that costs most.
_GRAVEST = (Reason.QUOTA_BYTES, Reason.LOWER_TIER, Reason.QUOTA_BYTE_SECONDS, Reason.TTL_MAX)
_CLIPPED = {
    Reason.QUOTA_BYTES: "the tenant's quota of bytes has room for a part of it",
    Reason.LOWER_TIER: "the tier that was asked for has no room left for this tenant",
    Reason.QUOTA_BYTE_SECONDS: "the tenant has no byte-seconds left for longer",
    Reason.TTL_MAX: "no lease lasts longer here",
    Reason.LEASED: "a lease covers the first part of it",
    Reason.NO_ROOM: "the node has room for a part of it beside what it runs",
}


class Hints:
    """One gateway's part of all hints: leases, what was done already, and whom to tell."""

    __slots__ = (
        "_block_bytes",
        "_config",
        "_done",
        "_fits",
        "_nodes",
        "_pools",
        "_prefetches",
        "_returns",
        "_router",
        "_sessions",
        "_stored",
        "_stores",
        "effects",
        "leases",
    )

    def __init__(
        self,
        gateway: GatewayId,
        config: ClusterConfig,
        gateways: int,
        pools: dict[ModelName, ModelPools],
        sessions: Sessions,
        router: Router,
    ) -> None:
        self._config = config.leases
        self._stored = config.store
        self._pools = pools
        self._sessions = sessions
        self._router = router
        self._prefetches = Prefetches(gateway)
        self._returns = Returns()
        self.leases = Leases(config.leases, config.tenants, gateways)
        self.effects = Effects(self.leases)
        #: Nodes that have joined, in that order.
        self._nodes: dict[NodeId, NodeSpec] = {}
        #: Stores that have joined.
        self._stores: dict[StoreId, StoreSpec] = {}
        #: Bytes of a model's block, as its nodes told last.
        self._block_bytes: dict[ModelName, int] = {}
        #: What had an effect, by message and action: each tenant's own, oldest first, at most `actions_remembered_max`.
        self._done: dict[TenantId, OrderedDict[tuple[str, str], Receipt]] = {}
        #: False while leases exceed the memory there is and wait for the refit.
        self._fits = True

    # --- views ------------------------------------------------------------------------------------------------------------

    def holdings(self, model: ModelName, hashes: Sequence[BlockHash]) -> tuple[Holding, ...]:
        """Return who is believed to hold a beginning of a chain, best tier first, then most first."""
        pools = self._pools[model]
        matches = pools.index.find(hashes)
        held = [
            Holding(Tier.HBM, node, matches.blocks(pools.index.column(node)))
            for node, spec in self._nodes.items()
            if spec.model == model
        ]
        stores = self._stores_of(model)
        held += [Holding(Tier.CPU, store, matches.blocks(pools.index.column(holder(store)))) for store in stores]
        segment_blocks = next((part.segment_blocks for part in self._parts_of(model) if part.cmx), 0)
        held.append(Holding(Tier.CMX, "", pools.segments.blocks(hashes, segment_blocks) if segment_blocks else 0))
        return tuple(sorted((one for one in held if one.blocks), key=lambda one: (one.tier.level, -one.blocks, one.holder)))

    def _stores_of(self, model: ModelName) -> tuple[StoreId, ...]:
        return tuple(store for store, spec in self._stores.items() if any(part.model == model for part in spec.models))

    def _parts_of(self, model: ModelName) -> list[StoredModel]:
        """Return what stores have for a model."""
        return [part for spec in self._stores.values() for part in spec.models if part.model == model]

    def block_bytes(self, model: ModelName) -> int:
        """Return the bytes of a model's block; 0 while no node has told."""
        return self._block_bytes.get(model, 0)

    def price(self, hint: Hint, now: float) -> Price:
        """Return what a hint would come to; nothing is done. Only pins have a price."""
        tier = hint.tier or Tier.HBM
        left = self.leases.bytes_left(hint.tenant, tier)
        saved = self.leases.byte_s_left(hint.tenant, now)
        if hint.verb is not Verb.PIN:
            return Price(self._cannot(hint) or Receipt(Outcome.APPLIED), bytes_left=left, byte_s_left=saved)
        wanted = self._wanted(hint)
        granted = self.leases.grant(wanted, now) if isinstance(wanted, Wanted) else wanted
        if isinstance(granted, Receipt | Refused):
            return Price(_refusal(granted), bytes_left=left, byte_s_left=saved)
        cached_s, computed_s = self._ttft_s(wanted.model, wanted.hashes) if isinstance(wanted, Wanted) else (0.0, 0.0)
        receipt = self._receipt(hint, granted, None)
        return Price(receipt, granted.size_bytes * granted.ttl_s, left, saved, cached_s, computed_s)

    def _ttft_s(self, model: ModelName, hashes: Sequence[BlockHash]) -> tuple[float, float]:
        """Return the predicted seconds to a first token after a chain on an idle node: from what is held, and from nothing."""
        spec = next((spec for spec in self._nodes.values() if spec.model == model and spec.kind.generates), None)
        if spec is None:
            return 0.0, 0.0
        tokens, held = len(hashes) * spec.block_tokens, self._held_blocks(model, hashes) * spec.block_tokens
        most = spec.step_tokens_max
        return prompt_seconds(spec.profile, tokens - held + 1, held, most), prompt_seconds(spec.profile, tokens + 1, 0, most)

    # --- what is asked ----------------------------------------------------------------------------------------------------

    def asked(self, hint: Hint, now: float) -> list[ClusterCommand]:
        """Do what a hint asks for, unless it was done; return the answer and what follows from it."""
        done = self._done.setdefault(hint.tenant, OrderedDict())
        name = hint.message, hint.action
        before = done.get(name)
        if before is not None:
            return [AnswerHint(hint.tenant, hint.verb, *name, replace(before, outcome=Outcome.DUPLICATE, first=before.outcome))]
        receipt, commands = self._do(hint, now)
        if receipt.outcome.effective:
            done[name] = receipt
            self.effects.began(hint, receipt, now)
            if len(done) > self._config.actions_remembered_max:
                done.popitem(last=False)
        return [AnswerHint(hint.tenant, hint.verb, *name, receipt), *commands]

    def _do(self, hint: Hint, now: float) -> tuple[Receipt, list[ClusterCommand]]:
        cannot = self._cannot(hint)
        if cannot is not None:
            return cannot, []
        match hint.verb:
            case Verb.PIN:
                return self._pin(hint, now)
            case Verb.UNPIN:
                return self._unpin(hint, now)
            case Verb.EVICT | Verb.SUPERSEDE:
                return self._evict(hint)
            case Verb.PREFETCH:
                return self._prefetch(hint, now)
            case Verb.DEMOTE:
                return self._demote(hint, now)
            case Verb.FORK:
                return self._fork(hint), []
            case Verb.END_SESSION:
                return self._end_session(hint, now)
            case Verb.TOOL_STARTED | Verb.TOOL_FINISHED:
                return self._pause(hint, now)
            case Verb.SHARE:
                return self._share(hint)
            case Verb.RETAIN:
                return self._retain(hint) if hint.priority >= NEUTRAL else self._evict(hint)
            case _:
                assert_never(hint.verb)

    def _cannot(self, hint: Hint) -> Receipt | None:
        """Return why nobody here could do what a hint asks for, None if somebody could."""
        missing = None if self._stores else _NO_STORE.get(hint.verb)
        if missing is not None:
            return Receipt(Outcome.UNSUPPORTED, Reason.NO_HOLDER, missing)
        if (
            hint.verb in (Verb.PIN, Verb.EVICT, Verb.PREFETCH, Verb.DEMOTE)
            and hint.tier not in (None, Tier.HBM)
            and not self.leases.has_tier(hint.tier)
        ):
            return Receipt(Outcome.UNSUPPORTED, Reason.NO_TIER, f"this cluster has no {hint.tier.value} tier")
        return None

    # --- leases -----------------------------------------------------------------------------------------------------------

    def _pin(self, hint: Hint, now: float) -> tuple[Receipt, list[ClusterCommand]]:
        wanted = self._wanted(hint)
        if isinstance(wanted, Receipt):
            return wanted, []
        known = self.leases.get(wanted.id, hint.tenant)
        if known is not None and hint.lease is None:  # the same message went to another gateway, and holders told of it
            lease = known.lease
            ttl_s = known.expires_at - now
            receipt = Receipt(Outcome.DUPLICATE, None, "", lease.id, len(lease.hashes), lease.size_bytes, lease.tier, ttl_s)
            return replace(receipt, first=Outcome.APPLIED), []
        granted = self.leases.grant(wanted, now)
        if isinstance(granted, Refused):
            return _refusal(granted), []
        held = self.leases.place(wanted, granted, now)
        change = LeaseChange.PLACED if known is None else LeaseChange.RENEWED
        return self._receipt(hint, granted, held.lease.id), self._placing(held, change, now)

    def _wanted(self, hint: Hint) -> Wanted | Receipt:
        """Return the lease that a pin asks for, or why it can be none."""
        assert hint.model is not None, "a pin is resolved to blocks of a model"
        if not hint.hashes:
            return Receipt(Outcome.REJECTED, Reason.TOO_SHORT, "the target fills no block")
        block_bytes = self._block_bytes.get(hint.model)
        if block_bytes is None:
            return Receipt(Outcome.REJECTED, Reason.NO_NODE, f"no node has served {hint.model} yet")
        if hint.lease is not None:
            known = self.leases.get(hint.lease, hint.tenant)
            if known is None or known.lease.model != hint.model:
                return Receipt(Outcome.MISSING, Reason.NO_LEASE, "this tenant has no such lease of that model")
        tier, number = hint.tier or Tier.HBM, hint.lease or _lease_id(hint)
        return Wanted(number, hint.tenant, hint.model, hint.hashes, block_bytes, tier, hint.ttl_s, hint.session)

    def _receipt(self, hint: Hint, granted: Grant, lease: LeaseId | None) -> Receipt:
        reason = next((reason for reason in _GRAVEST if reason in granted.clipped), None)
        outcome, message = Outcome.CLIPPED if reason is not None else Outcome.APPLIED, _CLIPPED.get(reason, "") if reason else ""
        if reason is None and hint.model is not None and self._held_blocks(hint.model, hint.hashes) < granted.blocks:
            outcome, reason = Outcome.DEFERRED, Reason.NOT_RESIDENT
            message = "blocks that nobody holds yet are kept from when they are computed"
        return Receipt(outcome, reason, message, lease, granted.blocks, granted.size_bytes, granted.tier, granted.ttl_s)

    def _unpin(self, hint: Hint, now: float) -> tuple[Receipt, list[ClusterCommand]]:
        ending, cancelling = self._meant(hint), self._cancelling(hint, 0)
        if not (ending or cancelling):
            return Receipt(Outcome.MISSING, Reason.NO_LEASE, "this tenant has no lease on that"), []
        blocks = max((len(held.lease.hashes) for held in ending), default=0)
        size_bytes = sum(held.lease.size_bytes for held in ending)
        only = ending[0].lease.id if len(ending) == 1 else None
        commands = [command for held in ending for command in self._ending(held, LeaseChange.UNPINNED, now)]
        return Receipt(Outcome.APPLIED, lease=only, blocks=blocks, size_bytes=size_bytes), [*cancelling, *commands]

    def _meant(self, hint: Hint) -> list[Held]:
        """Return the tenant's leases that a target means: that one, or those placed with the session, or with these blocks."""
        if hint.lease is not None:
            held = self.leases.get(hint.lease, hint.tenant)
            return [held] if held is not None else []
        mine = [held for held in self.leases.of(hint.tenant) if held.lease.model == hint.model]
        if hint.session is not None:
            return [held for held in mine if held.lease.session == hint.session]
        return [held for held in mine if hint.hashes and held.lease.hashes == hint.hashes[: len(held.lease.hashes)]]

    def _placing(self, held: Held, change: LeaseChange, now: float) -> list[ClusterCommand]:
        return _placed(held, change, self._holders(held.lease.model), self._stores_of(held.lease.model), now)

    def _ending(self, held: Held, change: LeaseChange, now: float) -> list[ClusterCommand]:
        """End a lease before its time, and tell holders."""
        self.leases.end(held, now)
        return _over(held.lease, change, self._holders(held.lease.model), self._stores_of(held.lease.model))

    def _holders(self, model: ModelName) -> tuple[NodeId, ...]:
        return tuple(node for node, spec in self._nodes.items() if spec.model == model)

    def expire(self, lease: LeaseId, now: float) -> list[ClusterCommand]:
        """End a lease whose time is up; holders do so by their own clocks."""
        held = self.leases.expire(lease, now)
        return [EndLease(held.lease, LeaseChange.EXPIRED, ())] if held is not None else []

    # --- blocks that are dead ---------------------------------------------------------------------------------------------

    def _evict(self, hint: Hint) -> tuple[Receipt, list[ClusterCommand]]:
        """Let a target's own blocks be forgotten first, but for those that a lease covers."""
        leased = leased_blocks(self._leases_on(hint), hint.hashes)
        first = max(hint.first_block, leased)
        clipped = first > hint.first_block
        if clipped and first >= len(hint.hashes):
            return Receipt(Outcome.REJECTED, Reason.LEASED, "a lease covers all of it; unpin it first"), []
        commands = self._cancelling(hint, first) if hint.tier in (None, Tier.HBM) else []
        evicting, blocks = self._evicting(hint, first)
        commands += evicting
        if not commands:
            return Receipt(Outcome.MISSING, Reason.NOT_RESIDENT, "nobody holds any of it there"), []
        reason = Reason.LEASED if clipped else None
        outcome, message = (Outcome.CLIPPED, _CLIPPED[Reason.LEASED]) if clipped else (Outcome.APPLIED, "")
        return Receipt(outcome, reason, message, blocks=blocks, size_bytes=self._size(hint, blocks), tier=hint.tier), commands

    def _evicting(self, hint: Hint, first: int) -> tuple[list[ClusterCommand], int]:
        """Return what tells holders that a chain's blocks from `first` on are dead, and how many they are at most."""
        assert hint.model is not None, "the target is resolved to blocks of a model"
        held = [one for one in self.holdings(hint.model, hint.hashes) if one.blocks > first and hint.tier in (None, one.tier)]
        nodes = tuple(NodeId(one.holder) for one in held if one.tier is Tier.HBM)
        commands: list[ClusterCommand] = []
        if nodes:
            commands.append(EvictBlocks(hint.model, hint.hashes, first, hint.verb is Verb.EVICT, nodes))
        for tier in (Tier.CPU, Tier.CMX):
            end = max((one.blocks for one in held if one.tier is tier), default=0)
            if end and hint.verb is Verb.EVICT:  # what only a dead branch has goes first there by itself
                stores = self._stores_of(hint.model)
                commands.append(EvictStored(hint.model, hint.hashes, first, end, tier, False, stores))
        return commands, max((one.blocks for one in held), default=first) - first

    def _cancelling(self, hint: Hint, first: int) -> list[ClusterCommand]:
        """Return what ends the prefetches that bring a target's blocks from `first` on, or were asked for with its session."""
        return [CancelPrefetch(asked.node, asked.prefetch.id) for asked in self._prefetches.meant(hint, first)]

    def _size(self, hint: Hint, blocks: int) -> int:
        return blocks * self._block_bytes.get(hint.model, 0) if hint.model is not None else 0

    def _retain(self, hint: Hint) -> tuple[Receipt, list[ClusterCommand]]:
        """Let nodes expect prompts that begin with the target: how likely they are is what the priority says."""
        assert hint.model is not None, "the target is resolved to blocks of a model"
        held = [one for one in self.holdings(hint.model, hint.hashes) if one.tier is Tier.HBM]
        if not held:
            return Receipt(Outcome.MISSING, Reason.NOT_RESIDENT, "no node holds any of it"), []
        ttl_s = hint.ttl_s or TTL_S
        chance = (hint.priority - NEUTRAL) / (PRIORITY_MAX - NEUTRAL)
        # A context of its own, apart from all that requests have (`_CHAIN`): the same target said again is the same.
        context = ContextId(int.from_bytes(hash_bytes(hint.hashes[-1])[:8], "little") | _CHAIN)
        outlook = Outlook(context, (ttl_s,), (chance,)) if chance else Outlook(context)
        blocks = held[0].blocks
        receipt = Receipt(Outcome.APPLIED, blocks=blocks, size_bytes=self._size(hint, blocks), tier=Tier.HBM, ttl_s=ttl_s)
        return receipt, [RetainBlocks(hint.model, hint.hashes, outlook, tuple(NodeId(one.holder) for one in held))]

    # --- blocks between tiers ---------------------------------------------------------------------------------------------

    def _prefetch(self, hint: Hint, now: float) -> tuple[Receipt, list[ClusterCommand]]:
        """Have blocks brought into `cpu`, or to the node where a prompt that goes on from them would be computed."""
        assert hint.model is not None, "the target is resolved to blocks of a model"
        if not self.holdings(hint.model, hint.hashes):
            return Receipt(Outcome.MISSING, Reason.NOT_RESIDENT, "nobody holds any of it"), []
        if hint.tier not in (None, Tier.HBM):
            return self._recall(hint)
        receipt, commands = self._bring(hint, now)
        if receipt.outcome is Outcome.REJECTED and self._stores:
            recalled, others = self._recall(hint)
            if recalled.tier is Tier.CPU:
                message = f"brought up to cpu, no further: {receipt.message}"
                return replace(recalled, outcome=Outcome.CLIPPED, reason=Reason.LOWER_TIER, message=message), others
        return receipt, commands

    def _bring(self, hint: Hint, now: float) -> tuple[Receipt, list[ClusterCommand]]:
        """Have the node bring blocks that would compute the next prompt, as far as it has room and the tenant's quota goes."""
        assert hint.model is not None, "the target is resolved to blocks of a model"
        same = self._prefetches.covering(hint.tenant, hint.model, hint.hashes, now)
        if same is not None:
            left_s = same.over_at - now
            return self._in_hbm(hint, len(hint.hashes), Outcome.DEFERRED, f"on their way to {same.node}", left_s), []
        way = self._way_for(hint)
        if way is None:
            return Receipt(Outcome.REJECTED, Reason.NO_NODE, "no node would take a prompt now"), []
        if way.held >= way.reach:
            return self._in_hbm(hint, way.held, Outcome.APPLIED), []
        blocks, why = self._allowed(hint, way, now)
        node = way.node.spec
        if not blocks:
            full = why is Reason.NO_ROOM
            message = f"{node.id} has no room beside what it runs" if full else "the tenant has no bytes of hbm left"
            return Receipt(Outcome.REJECTED, why, message), []
        keep_s = min(hint.ttl_s or KEPT_S, KEPT_S_MAX)
        why = why or (Reason.TTL_MAX if keep_s < hint.ttl_s else None)
        prefetch = self._prefetches.ask(hint, way, blocks, keep_s, now)
        receipt = self._in_hbm(hint, len(prefetch.hashes), Outcome.DEFERRED, f"on their way to {node.id}", keep_s)
        if why is not None:
            receipt = replace(receipt, outcome=Outcome.CLIPPED, reason=why, message=_CLIPPED[why])
        return replace(receipt, prefetch=prefetch.id), [PrefetchBlocks(node.id, prefetch)]

    def _in_hbm(self, hint: Hint, blocks: int, outcome: Outcome, message: str = "", ttl_s: float = 0.0) -> Receipt:
        """Return what is said of blocks that are in hbm, or are on their way there."""
        reason = Reason.NOT_RESIDENT if outcome is Outcome.DEFERRED else None
        return Receipt(outcome, reason, message, None, blocks, self._size(hint, blocks), Tier.HBM, ttl_s)

    def _way_for(self, hint: Hint) -> Way | None:
        """Return how a target gets to where the router would have a prompt computed that goes on from it; None if nowhere."""
        assert hint.model is not None, "the target is resolved to blocks of a model"
        spec = next((spec for spec in self._nodes.values() if spec.model == hint.model), None)
        if spec is None:
            return None
        tokens = len(hint.hashes) * spec.block_tokens + 1
        request = Request(RequestId(0), hint.model, hint.tenant, tokens, hint.hashes, 1, hint.session)
        session = self._sessions.of(request)
        options = self._pools[hint.model].options(request, (), session.nodes if session is not None else ())
        placement = self._router.place(request, options) if options is not None else None
        return Way.of(placement.computes, options) if placement is not None and options is not None else None

    def _allowed(self, hint: Hint, way: Way, now: float) -> tuple[int, Reason | None]:
        """Return how many blocks a node may be asked to bring for a tenant, and why they are not all that it lacks."""
        node, blocks = way.node, way.reach - way.there
        room = node.load.prefetch_room_blocks if node.reported else blocks
        if self._prefetches.full(now):
            room = 0
        left = self.leases.bytes_left(hint.tenant, Tier.HBM) - self._prefetches.size_bytes(hint.tenant, now)
        quota = max(0, left) // node.spec.block_bytes
        if min(room, quota) >= blocks:
            return blocks, None
        return (room, Reason.NO_ROOM) if room <= quota else (quota, Reason.QUOTA_BYTES)

    def prefetched(self, node: NodeId, report: PrefetchEnded) -> None:
        """Take in what became of a prefetch."""
        if self._prefetches.ended(report.prefetch, node):
            self.effects.brought(node, report)

    def _recall(self, hint: Hint) -> tuple[Receipt, list[ClusterCommand]]:
        """Have the store that has most of a chain bring what cmx has beyond; nodes load from there when they are asked."""
        assert hint.model is not None, "the target is resolved to blocks of a model"
        held = self.holdings(hint.model, hint.hashes)
        stores = {StoreId(one.holder): one.blocks for one in held if one.tier is Tier.CPU}
        here = max(stores.values(), default=0)
        there = max((one.blocks for one in held if one.tier is Tier.CMX), default=0)
        if held and held[0].tier is Tier.HBM and held[0].blocks >= max(here, there):
            blocks, tier = held[0].blocks, Tier.HBM
            return Receipt(Outcome.APPLIED, blocks=blocks, size_bytes=self._size(hint, blocks), tier=tier), []
        commands: list[ClusterCommand] = []
        if there > here:
            candidates = self._stores_of(hint.model)
            best = max(candidates, key=lambda store: (stores.get(store, 0), store))
            commands.append(PrefetchStored(hint.model, hint.hashes, there, (best,)))
        blocks = max(here, there)
        size_bytes, brought = self._size(hint, blocks), (here, there) if commands else (0, 0)
        receipt = Receipt(Outcome.APPLIED, blocks=blocks, size_bytes=size_bytes, tier=Tier.CPU, brought=brought)
        if commands:
            return replace(receipt, outcome=Outcome.DEFERRED, reason=Reason.NOT_RESIDENT, message="on their way"), commands
        return receipt, []

    def _share(self, hint: Hint) -> tuple[Receipt, list[ClusterCommand]]:
        """Have stores bring what cmx has to hosts that lack it, until enough nodes hold it or may load it from their store."""
        assert hint.model is not None, "the target is resolved to blocks of a model"
        held = self.holdings(hint.model, hint.hashes)
        near = {one.holder: one.blocks for one in held if one.tier is not Tier.CMX}
        there = max((one.blocks for one in held if one.tier is Tier.CMX), default=0)
        blocks = max((one.blocks for one in held if one.tier is not Tier.HBM), default=0)
        if not blocks:
            return Receipt(Outcome.MISSING, Reason.NOT_RESIDENT, "no tier below hbm has any of it"), []
        nodes = [spec for spec in self._nodes.values() if spec.model == hint.model]
        stores = {self._stores[store].host: store for store in self._stores_of(hint.model)}
        full = {host for host, store in stores.items() if near.get(store, 0) >= blocks}
        count = sum(spec.host in full or near.get(spec.id, 0) >= blocks for spec in nodes)
        wanted = hint.copies or COPIES
        bringing: list[StoreId] = []
        lacking = [(host, store) for host, store in stores.items() if host not in full and there >= blocks]
        for host, store in sorted(lacking, key=lambda one: (-near.get(one[1], 0), one[1])):
            gained = sum(spec.host == host and near.get(spec.id, 0) < blocks for spec in nodes)
            if count < wanted and gained:
                bringing.append(store)
                count += gained
        receipt = Receipt(Outcome.APPLIED, blocks=blocks, size_bytes=self._size(hint, blocks), tier=Tier.CPU)
        commands: list[ClusterCommand] = []
        if bringing:
            commands.append(PrefetchStored(hint.model, hint.hashes, blocks, tuple(bringing)))
            receipt = replace(receipt, outcome=Outcome.DEFERRED, reason=Reason.NOT_RESIDENT, message="on their way")
        if count < wanted:
            message = f"{count} of {wanted} nodes hold it, or are on hosts that can"
            receipt = replace(receipt, outcome=Outcome.CLIPPED, reason=Reason.FEWER_COPIES, message=message)
        return receipt, commands

    def _demote(self, hint: Hint, now: float) -> tuple[Receipt, list[ClusterCommand]]:
        """Let blocks sink that a lower tier has; of a lease, lower it."""
        tier = hint.tier or Tier.HBM
        if hint.lease is not None:
            held = self.leases.get(hint.lease, hint.tenant)
            if held is None:
                return Receipt(Outcome.MISSING, Reason.NO_LEASE, "this tenant has no such lease"), []
            if tier.level <= held.lease.tier.level:
                return Receipt(Outcome.REJECTED, Reason.INVALID, f"{tier.value} is not below {held.lease.tier.value}"), []
            if self.leases.bytes_left(hint.tenant, tier) < held.lease.size_bytes:
                return Receipt(Outcome.REJECTED, Reason.QUOTA_BYTES, f"{tier.value} has no room left for this lease"), []
            lease = self.leases.lower(held, tier, now)
            size_bytes, blocks = lease.lease.size_bytes, len(lease.lease.hashes)
            receipt = Receipt(Outcome.APPLIED, None, "", lease.lease.id, blocks, size_bytes, tier, lease.expires_at - now)
            return receipt, self._placing(lease, LeaseChange.LOWERED, now)
        if tier is Tier.HBM:
            return Receipt(Outcome.REJECTED, Reason.INVALID, "hbm is the best tier: nothing sinks to it"), []
        return self._sink(hint, tier)

    def _sink(self, hint: Hint, tier: Tier) -> tuple[Receipt, list[ClusterCommand]]:
        """Let blocks leave the tiers above one, as far as it, or one below, has them and no lease keeps them."""
        assert hint.model is not None, "the target is resolved to blocks of a model"
        held = self.holdings(hint.model, hint.hashes)
        first = max(hint.first_block, leased_blocks(self._leases_on(hint), hint.hashes))
        stored = max((one.blocks for one in held if one.tier is not Tier.HBM), default=0)
        if stored <= first:
            return Receipt(Outcome.MISSING, Reason.NOT_RESIDENT, f"{tier.value} has none of it that may leave what is above"), []
        commands = self._cancelling(hint, first)
        nodes = tuple(NodeId(one.holder) for one in held if one.tier is Tier.HBM and one.blocks > first)
        if nodes:
            commands.append(EvictBlocks(hint.model, hint.hashes[:stored], first, True, nodes))
        if tier is Tier.CMX:
            stores = self._stores_of(hint.model)
            commands.append(EvictStored(hint.model, hint.hashes, first, stored, Tier.CPU, True, stores))
        blocks = stored - first
        return Receipt(Outcome.APPLIED, blocks=blocks, size_bytes=self._size(hint, blocks), tier=tier), commands

    def _leases_on(self, hint: Hint) -> list[Held]:
        return [held for held in self.leases.of(hint.tenant) if held.lease.model == hint.model]

    # --- sessions ---------------------------------------------------------------------------------------------------------

    def _fork(self, hint: Hint) -> Receipt:
        assert hint.model is not None, "a session is resolved to one of a model"
        assert hint.session is not None, "a fork is of a session"
        if not self._sessions.fork(hint.model, hint.tenant, hint.session, hint.children):
            return Receipt(Outcome.MISSING, Reason.NO_SESSION, "this tenant has no such session here")
        return Receipt(Outcome.APPLIED, blocks=len(hint.hashes))

    def _pause(self, hint: Hint, now: float) -> tuple[Receipt, list[ClusterCommand]]:
        """Let nodes know when a session is expected back."""
        assert hint.model is not None, "a session is resolved to one of a model"
        assert hint.session is not None, "a pause is that of a session"
        if not self._sessions.knows(hint.model, hint.tenant, hint.session):
            return Receipt(Outcome.MISSING, Reason.NO_SESSION, "this tenant has no such session here"), []
        event: ToolStarted | ToolFinished
        if hint.verb is Verb.TOOL_STARTED:
            event = ToolStarted(hint.model, hint.tenant, hint.session, hint.tool_class, hint.expected_s)
            returning = self._returns.pause(hint, now)
        else:
            event = ToolFinished(hint.model, hint.tenant, hint.session)
            returning = self._returns.over(hint.model, hint.tenant, hint.session)
            returning += self._bring_back(replace(hint, ttl_s=LATE_S), now)
        return Receipt(Outcome.APPLIED, blocks=len(hint.hashes)), [*self._expect(event, now), *returning]

    def returned(self, model: ModelName, tenant: TenantId, session: SessionId) -> list[ClusterCommand]:
        """Note that a session's next turn runs: nothing is to be brought for it any more."""
        return self._returns.over(model, tenant, session)

    def returns(self, number: int, now: float) -> list[ClusterCommand]:
        """Have a session's context brought back, just before its next turn is expected."""
        hint = self._returns.due(number)
        return self._bring_back(hint, now) if hint is not None else []

    def _bring_back(self, hint: Hint, now: float) -> list[ClusterCommand]:
        """Return what has a session's context brought into hbm, if it is not there and can be."""
        return self._bring(hint, now)[1] if hint.hashes else []

    def _expect(self, event: ToolStarted | ToolFinished | SessionEnded, now: float) -> list[ClusterCommand]:
        """Return what nodes are to expect of a session's context from now on."""
        return [Expect(node, outlook) for node, outlook in self._sessions.hinted(event, now) if node in self._nodes]

    def _end_session(self, hint: Hint, now: float) -> tuple[Receipt, list[ClusterCommand]]:
        """End the leases placed with a session, forget it, and let go what only it needs."""
        assert hint.model is not None, "a session is resolved to one of a model"
        assert hint.session is not None, "an end is that of a session"
        commands = [*self._returns.over(hint.model, hint.tenant, hint.session), *self._cancelling(hint, 0)]
        for held in [held for held in self._leases_on(hint) if held.lease.session == hint.session]:
            commands += self._ending(held, LeaseChange.SESSION_ENDED, now)
        known = self._sessions.knows(hint.model, hint.tenant, hint.session)
        commands += self._expect(SessionEnded(hint.model, hint.tenant, hint.session), now)
        evicting, blocks = self._evicting(hint, leased_blocks(self._leases_on(hint), hint.hashes)) if hint.hashes else ([], 0)
        if not (known or commands or evicting):
            return Receipt(Outcome.MISSING, Reason.NO_SESSION, "this tenant has no such session here"), []
        return Receipt(Outcome.APPLIED, blocks=blocks), [*commands, *evicting]

    # --- holders ----------------------------------------------------------------------------------------------------------

    def node_joined(self, spec: NodeSpec, now: float) -> list[ClusterCommand]:
        """Count a node's memory and tell it of its model's leases."""
        self._nodes[spec.id] = spec
        self._block_bytes[spec.model] = spec.block_bytes
        self._measure()
        placing = [PlaceLease(lease, None, (spec.id,)) for lease in self.leases.told(spec.model, now)]
        return [*placing, *self._watch_fit(now)]

    def node_lost(self, node: NodeId, now: float) -> list[ClusterCommand]:
        """Count a node's memory no more."""
        del self._nodes[node]
        for prefetch in self._prefetches.lost(node):
            self.effects.lost(prefetch)
        self._measure()
        return self._watch_fit(now)

    def told(self, event: LeasesTold, now: float) -> list[ClusterCommand]:
        """Take in leases that a holder was told of by others, or keeps from before; correct it where it is behind."""
        commands: list[ClusterCommand] = []
        nodes = (event.node,) if event.node is not None else ()
        stores = (event.store,) if event.store is not None else ()
        for end in event.ended:
            held = self.leases.learn_end(end.lease, end.revision, now)
            if held is not None:
                commands += _over(held.lease, LeaseChange.UNPINNED, (), ())
        for lease in event.placed:
            known = self.leases.get(lease.id, lease.tenant)
            held = self.leases.learn(lease, now)
            if held is not None:
                commands += _placed(held, LeaseChange.PLACED if known is None else LeaseChange.RENEWED, (), (), now)
            elif known is not None and known.lease.revision > lease.revision and known.expires_at > now:
                commands.append(PlaceLease(known.lease.until(known.expires_at, now), None, nodes, stores))
            elif (revision := self.leases.ended_revision(lease.id)) >= lease.revision:
                ended = replace(lease, revision=revision)
                commands.append(EndLease(ended, None, nodes, stores))
        return commands + self._watch_fit(now)

    def store_joined(self, spec: StoreSpec, now: float) -> list[ClusterCommand]:
        """Count a store's memory and tell it of its models' leases."""
        self._stores[spec.id] = spec
        self._measure()
        models = dict.fromkeys(part.model for part in spec.models)
        placing = [PlaceLease(lease, None, (), (spec.id,)) for model in models for lease in self.leases.told(model, now)]
        return [*placing, *self._watch_fit(now)]

    def store_lost(self, store: StoreId, now: float) -> list[ClusterCommand]:
        """Count a store's memory no more."""
        del self._stores[store]
        self._measure()
        return self._watch_fit(now)

    def _measure(self) -> None:
        """Note how much memory there is: nodes that generate keep contexts, what others hold passes through."""
        specs = [spec for spec in self._nodes.values() if spec.kind.generates]
        self.leases.set_capacity(Tier.HBM, sum(spec.leased_blocks_max * spec.block_bytes for spec in specs))
        share, cmx_bytes = (self._stored.leased_share_max, self._stored.cmx_bytes) if self._stored is not None else (0.0, 0)
        cpu = sum(part.slots * part.block_bytes for spec in self._stores.values() for part in spec.models)
        cmx = sum(cmx_bytes for spec in self._stores.values() if any(part.cmx for part in spec.models))
        self.leases.set_capacity(Tier.CPU, int(share * cpu))
        self.leases.set_capacity(Tier.CMX, int(share * cmx))

    def _watch_fit(self, now: float) -> list[ClusterCommand]:
        """Set or clear the timer for leases that exceed the memory there is (rule 3 of `leases.py`)."""
        fits = not self.leases.exceeded
        if fits == self._fits:
            return []
        self._fits = fits
        return [ClearTimer(RefitTimer()) if fits else SetTimer(RefitTimer(), now + REFIT_S)]

    def refit(self, now: float) -> list[ClusterCommand]:
        """Lower or drop leases that have exceeded the memory there is for long enough."""
        if self._fits:
            return []
        commands: list[ClusterCommand] = []
        for former, held in self.leases.fit(now):
            if held is not None:
                commands += self._placing(held, LeaseChange.LOWERED, now)
            else:
                model = former.lease.model
                commands += _over(former.lease, LeaseChange.NO_MEMORY, self._holders(model), self._stores_of(model))
        self._fits = True
        return commands + self._watch_fit(now)

    def _held_blocks(self, model: ModelName, hashes: Sequence[BlockHash]) -> int:
        """Return how many first blocks of a chain somebody holds."""
        return max((one.blocks for one in self.holdings(model, hashes)), default=0)

    def validate(self) -> None:
        """Raise `AssertionError` unless the books agree."""
        self.leases.validate()
        self.effects.validate()
        self._prefetches.validate()
        self._returns.validate()
        for tenant, done in self._done.items():
            assert len(done) <= self._config.actions_remembered_max, f"{len(done)} actions of {tenant} are remembered"
        assert self._fits or self.leases.exceeded, "leases fit, and are waited for"


def _placed(
    held: Held, change: LeaseChange, nodes: tuple[NodeId, ...], stores: tuple[StoreId, ...], now: float
) -> list[ClusterCommand]:
    commands: list[ClusterCommand] = [SetTimer(LeaseTimer(held.lease.id), held.expires_at)]
    if held.expires_at > now:  # else it ends before anybody hears of it
        commands.insert(0, PlaceLease(held.lease.until(held.expires_at, now), change, nodes, stores))
    return commands


def _over(lease: Lease, change: LeaseChange, nodes: tuple[NodeId, ...], stores: tuple[StoreId, ...]) -> list[ClusterCommand]:
    return [EndLease(lease, change, nodes, stores), ClearTimer(LeaseTimer(lease.id))]


def _refusal(refused: Receipt | Refused) -> Receipt:
    return refused if isinstance(refused, Receipt) else Receipt(Outcome.REJECTED, refused.reason, refused.message)


def _lease_id(hint: Hint) -> LeaseId:
    """Return the id of the lease that an action places: the same wherever it is sent."""
    parts = [part.encode() for part in (hint.tenant, hint.message, hint.action)]
    name = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return LeaseId(blake2b(name, digest_size=12).hexdigest())
