"""What harnesses' actions have earned: how much of later prompts was found of what each is about, and thanks to it.

A prompt's tokens, as it was served:

    |------- in hbm -------|---- loaded from cpu ----|---- from cmx ----|---- computed ----|
    |-- found of what an action is about --------------------|
    |-- earned --|         |-- earned ------|                              those that would have been gone without it

Nobody sees what would have been. A pin, and a word of a tool that runs, count as having earned what had not been used for longer
than what its holder forgot meanwhile for want of room (`core/idling.py`); a prefetch, what the next prompt loaded of the blocks
that a store brought for it, or found of those that the node brought which computed it. What two actions earned counts for one of
them: a session's own come first, then older ones. Seconds saved are the router's prices: computing those tokens, or loading them
from a lower tier if that has them and is sooner, less what it took to get them as it was done.

Bounded by tenant: of more actions the oldest is forgotten, with what it earned; sums by verb stay.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.core.blocks import common_blocks
from orchestrator.core.cluster.candidates import Candidate
from orchestrator.core.cluster.contexts import Marks
from orchestrator.core.cluster.leases import Leases
from orchestrator.core.cluster.pools import ModelPools
from orchestrator.core.cluster.prefetches import PREFETCHES_MAX
from orchestrator.core.cost.costs import prompt_seconds
from orchestrator.core.events import PrefetchEnded
from orchestrator.core.hints import Earned, Hint, Receipt, Verb
from orchestrator.core.types import BlockHash, LeaseId, ModelName, NodeId, PrefetchId, Request, SessionId, TenantId, Tier

#: Actions of a tenant whose effects are known; those of one session, or of none, that may still earn something.
EFFECTS_MAX, OPEN_MAX = 1024, 32
#: Forked sessions of a tenant whose parents are known.
KIN_MAX = 4096

_Place = tuple[ModelName, SessionId | None]


@dataclass(frozen=True, slots=True)
class Serving:
    """How a request was served."""

    request: Request
    #: When it came.
    came_at: float
    #: The node that computed what was not there.
    by: Candidate
    cached_tokens: int
    #: Those of them that its host's store brought.
    cpu_tokens: int
    cmx_tokens: int

    @property
    def hbm_end(self) -> int:
        """The token up to which nodes had the prompt."""
        return self.cached_tokens - self.cpu_tokens - self.cmx_tokens

    @property
    def cpu_end(self) -> int:
        """The token up to which it came from `cpu`."""
        return self.cached_tokens - self.cmx_tokens


@dataclass(slots=True)
class _Credit:
    """Tokens that some action has earned already: up to one in hbm, and up to one of those loaded from `cpu`."""

    hbm_end: int
    cpu_end: int


class _Effect:
    """One action, and what it has earned so far."""

    __slots__ = ("block_bytes", "brought", "earned", "lease", "marks", "node", "prefetch", "session", "tier", "used_at")

    def __init__(self, earned: Earned, hint: Hint, receipt: Receipt, now: float, former: "_Effect | None") -> None:
        self.earned = earned
        self.session: SessionId | None = hint.session if former is None else former.session
        self.lease: LeaseId | None = receipt.lease
        self.tier = receipt.tier
        #: What is kept of its chain.
        self.marks: Marks = Marks.of(hint.hashes) if former is None else former.marks
        #: Of a prefetch: the blocks [first, end) that a store is bringing, or that a node has brought, and that node.
        self.brought = receipt.brought
        self.node: NodeId | None = None
        #: Of one into a node's memory.
        self.prefetch = receipt.prefetch
        self.block_bytes = receipt.size_bytes // max(1, receipt.blocks)
        #: When what it is about was used last, as far as is known.
        self.used_at = now


class _Tenant:
    """One tenant's actions."""

    __slots__ = ("effects", "kin", "open")

    def __init__(self) -> None:
        #: By message and action, oldest first.
        self.effects: OrderedDict[tuple[str, str], _Effect] = OrderedDict()
        #: Those that may earn something, by whose next prompt might show it.
        self.open: dict[_Place, list[_Effect]] = {}
        #: Parents of sessions, oldest first.
        self.kin: OrderedDict[_Place, SessionId | None] = OrderedDict()


class Effects:
    """What all actions of one gateway's tenants have earned."""

    __slots__ = ("_coming", "_leases", "_sums", "_tenants")

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._tenants: dict[TenantId, _Tenant] = {}
        self._sums: dict[Verb, Earned] = {}
        #: Of prefetches whose end nodes have not told yet.
        self._coming: dict[PrefetchId, _Effect] = {}

    @property
    def sums(self) -> Mapping[Verb, Earned]:
        """What actions have earned in all, by verb."""
        return self._sums

    def of(self, tenant: TenantId, session: SessionId | None, hashes: Sequence[BlockHash]) -> tuple[Earned, ...]:
        """Return what a tenant's actions on a session, or on blocks of a chain, have earned so far, oldest action first."""
        known = self._tenants.get(tenant)
        return tuple(
            effect.earned
            for effect in (known.effects.values() if known is not None else ())
            if (session is not None and effect.session == session) or effect.marks.repeated_blocks(hashes)
        )

    def watches(self, tenant: TenantId) -> bool:
        """Whether a tenant's next prompt may show what an action has earned."""
        known = self._tenants.get(tenant)
        return known is not None and bool(known.open)

    # --- actions ----------------------------------------------------------------------------------------------------------

    def began(self, hint: Hint, receipt: Receipt, now: float) -> None:
        """Note an action that was done."""
        size_bytes = receipt.size_bytes
        if hint.verb is Verb.PREFETCH:  # what is there already is not brought
            first, end = receipt.brought
            size_bytes = size_bytes * (end - first) // max(1, receipt.blocks)
        earned = Earned(hint.verb, hint.message, hint.action, receipt.lease, size_bytes)
        known = self._tenants.setdefault(hint.tenant, _Tenant())
        former: _Effect | None = None
        if receipt.lease is not None and not hint.hashes:  # it named a lease alone
            former = next((one for one in reversed(known.effects.values()) if one.lease == receipt.lease), None)
        effect = known.effects[hint.message, hint.action] = _Effect(earned, hint, receipt, now, former)
        self._add(hint.verb, Earned(hint.verb, size_bytes=size_bytes))
        if receipt.prefetch is not None:
            self._coming[receipt.prefetch] = effect
            if len(self._coming) > PREFETCHES_MAX:  # the node has not told, and will not
                del self._coming[next(iter(self._coming))]
        if hint.model is not None:
            self._open(known, hint, effect)
        while len(known.effects) > EFFECTS_MAX:
            _, oldest = known.effects.popitem(last=False)
            for place in [place for place, effects in known.open.items() if oldest in effects]:
                self._close(known, place, oldest)

    def brought(self, node: NodeId, report: PrefetchEnded) -> None:
        """Note what a node has brought for a prefetch that is over."""
        effect = self._coming.pop(report.prefetch, None)
        if effect is not None:
            first, end = min(report.first_block, effect.marks.blocks), min(report.end_block, effect.marks.blocks)
            effect.node, effect.brought = node, (first, end)
            more = Earned(Verb.PREFETCH, size_bytes=(end - first) * effect.block_bytes)
            effect.earned = replace(effect.earned.plus(more), ended=report.reason)
            self._add(Verb.PREFETCH, more)

    def lost(self, prefetch: PrefetchId) -> None:
        """Note that the node is gone which was to bring something."""
        self._coming.pop(prefetch, None)

    def _open(self, known: _Tenant, hint: Hint, effect: _Effect) -> None:
        """Let later prompts show what an action earns, if they can."""
        assert hint.model is not None, "what no model has earns nothing"
        places: list[_Place] = []
        match hint.verb:
            case Verb.PIN:
                places.append((hint.model, hint.session))
                for former in [one for one in known.open.get(places[0], ()) if one.lease == effect.lease]:  # it was renewed
                    self._close(known, places[0], former)
            case Verb.PREFETCH if effect.brought[1] or effect.prefetch is not None:
                places.append((hint.model, hint.session))
            case Verb.TOOL_STARTED | Verb.TOOL_FINISHED:
                places.append((hint.model, hint.session))
            case Verb.FORK:
                places += [(hint.model, child) for child in hint.children]
                known.kin.update(dict.fromkeys(places, hint.session))
                while len(known.kin) > KIN_MAX:
                    known.kin.popitem(last=False)
            case _:
                pass
        for place in places:
            effects = known.open.setdefault(place, [])
            effects.append(effect)
            if len(effects) > OPEN_MAX:
                del effects[0]

    @staticmethod
    def _close(known: _Tenant, place: _Place, effect: _Effect) -> None:
        effects = known.open[place]
        effects.remove(effect)
        if not effects:
            del known.open[place]

    # --- prompts ----------------------------------------------------------------------------------------------------------

    def served(self, serving: Serving, pools: ModelPools, now: float) -> None:
        """Let a request show what actions have earned."""
        request = serving.request
        known = self._tenants.get(request.tenant)
        if known is None:
            return
        own: _Place = request.model, request.session
        places = dict.fromkeys((own, (request.model, known.kin.get(own)), (request.model, None)))
        credit = _Credit(0, serving.hbm_end)
        for place in places:
            for effect in tuple(known.open.get(place, ())):
                if self._show(effect, serving, pools, credit, now):
                    self._close(known, place, effect)

    def _show(self, effect: _Effect, serving: Serving, pools: ModelPools, credit: _Credit, now: float) -> bool:
        """Count what one action has earned; return whether that is all it can."""
        hashes = serving.request.hashes
        verb, over = effect.earned.verb, effect.earned.verb is not Verb.PIN
        if verb is Verb.PIN:
            held = self._leases.get(effect.lease, serving.request.tenant) if effect.lease is not None else None
            if held is None:
                return True
            blocks = common_blocks(held.lease.hashes, hashes)
        else:
            blocks = effect.marks.repeated_blocks(hashes)
        if not blocks:
            return False
        block_tokens = serving.by.spec.block_tokens
        covered = blocks * block_tokens
        hbm = cpu = (0, 0)
        if verb is Verb.PREFETCH:
            first, end = (block * block_tokens for block in effect.brought)
            if effect.prefetch is None:
                cpu = max(first, credit.cpu_end), min(end, serving.cpu_end)
            elif effect.node == serving.by.spec.id:
                hbm = max(first, credit.hbm_end), min(end, serving.hbm_end)
        elif verb is not Verb.FORK:
            idle_s = serving.came_at - effect.used_at
            if (verb is not Verb.PIN or effect.tier is Tier.HBM) and _outlasted(serving.by, idle_s):
                hbm = credit.hbm_end, min(covered, serving.hbm_end)
            if verb is Verb.PIN and effect.tier is not Tier.CMX and _outlasted_in_cpu(serving.by, idle_s):
                cpu = credit.cpu_end, min(covered, serving.cpu_end)
        effect.used_at = now
        saved_s = 0.0
        if hbm[1] > hbm[0]:
            saved_s += _lost_s(serving, pools, *hbm, tier=Tier.HBM)
            credit.hbm_end = hbm[1]
        if cpu[1] > cpu[0]:
            saved_s += _lost_s(serving, pools, *cpu, tier=Tier.CPU)
            credit.cpu_end = cpu[1]
        tokens = max(0, hbm[1] - hbm[0]) + max(0, cpu[1] - cpu[0])
        more = Earned(verb, found_tokens=min(covered, serving.cached_tokens), earned_tokens=tokens, saved_s=saved_s)
        effect.earned = effect.earned.plus(more)
        self._add(verb, more)
        return over

    def _add(self, verb: Verb, more: Earned) -> None:
        former = self._sums.get(verb)
        self._sums[verb] = more if former is None else former.plus(more)

    def validate(self) -> None:
        """Raise `AssertionError` unless the books agree."""
        for tenant, known in self._tenants.items():
            assert len(known.effects) <= EFFECTS_MAX, f"{len(known.effects)} actions of {tenant} are known"
            assert len(known.kin) <= KIN_MAX, f"parents of {len(known.kin)} sessions of {tenant} are known"
            for place, effects in known.open.items():
                assert 0 < len(effects) <= OPEN_MAX, f"{len(effects)} actions of {tenant} may earn something at {place}"


def _outlasted(node: Candidate, idle_s: float) -> bool:
    """Return whether what idled so long on a node would have been forgotten there for want of room."""
    return node.load.blocks_evicted > 0 and idle_s > node.load.evicted_idle_s


def _outlasted_in_cpu(node: Candidate, idle_s: float) -> bool:
    """Return whether what idled so long in the memory of a node's host would have been forgotten there."""
    load = node.store.load if node.store is not None else None
    return load is not None and load.counts.cpu_evicted > 0 and idle_s > load.evicted_idle_s


def _lost_s(serving: Serving, pools: ModelPools, first: int, end: int, tier: Tier) -> float:
    """Return the seconds that tokens [first, end) of a prompt would have cost had they not been in a tier, less what they did."""
    node, request = serving.by, serving.request
    spec, tokens = node.spec, end - first
    uncached, cached, most = request.prompt_tokens - serving.cached_tokens, serving.cached_tokens, spec.step_tokens_max
    computed_s = prompt_seconds(spec.profile, uncached + tokens, cached - tokens, most)
    lost_s = (computed_s - prompt_seconds(spec.profile, uncached, cached, most)) * node.load.cost_scale
    if node.store is None:
        return lost_s
    cpu_bytes_per_s, cmx_bytes_per_s, cmx_latency_s = node.store.rates
    size_bytes = tokens // spec.block_tokens * node.store.model.block_bytes
    cpu_s = spec.profile.fetch_latency_s + size_bytes / cpu_bytes_per_s
    held = pools.index.find(request.hashes).blocks(node.store.column) * spec.block_tokens
    if tier is Tier.HBM and held >= end:
        return min(lost_s, cpu_s)
    segment_blocks = node.store.model.segment_blocks
    if node.store.model.cmx and pools.segments.blocks(request.hashes, segment_blocks) * spec.block_tokens >= end:
        lost_s = min(lost_s, cmx_latency_s + size_bytes / cmx_bytes_per_s + cpu_s)
    return max(0.0, lost_s - cpu_s) if tier is Tier.CPU else lost_s
