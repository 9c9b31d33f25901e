"""What this gateway has asked nodes to bring before a request asks for it, until each says what became of that.

A node decides what it brings (`core/node/prefetches.py`); here is kept whose it is, so that a tenant stays within its quota and
can have it given up. Bounded: what a node should have ended long ago, and has not told, counts no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.core.blocks import common_blocks
from orchestrator.core.cluster.candidates import Candidate, Options, best_peer
from orchestrator.core.hints import Hint, Verb
from orchestrator.core.types import (
    BlockHash,
    GatewayId,
    ModelName,
    NodeId,
    NodeSpec,
    Prefetch,
    PrefetchId,
    SessionId,
    TenantId,
    prefetch_id,
)

#: Seconds for which blocks are kept if it is not said when they are wanted, and at most.
KEPT_S, KEPT_S_MAX = 60.0, 600.0
#: Prefetches that are not over; one more is rejected.
PREFETCHES_MAX = 1024
#: Seconds by which a node's word of an end may be late.
LATE_S = 10.0


@dataclass(frozen=True, slots=True)
class Way:
    """How a chain's blocks would get to a node: from its host's store first, then from a peer."""

    node: Candidate
    #: Blocks that it holds, that its store can bring it, and that a peer has.
    there: int
    stored: int
    peer: NodeSpec | None
    peer_blocks: int
    #: Blocks that any node holds which takes prompts: they go where that is, unless it costs more.
    held: int

    @property
    def reach(self) -> int:
        """Blocks that it can come to have."""
        return max(self.there, self.stored, self.peer_blocks)

    @staticmethod
    def of(node: Candidate, options: Options) -> "Way":
        """Return the way to a node."""
        matches, store, stored = options.matches, node.store, 0
        if store is not None and node.store_column is not None:
            stored = max(options.present[node.store_column], options.cmx_blocks if store.model.cmx else 0)
        peer, peer_blocks = best_peer(options, node, 0) or (None, 0)
        held = max(matches.blocks(taker.column) for taker in (*options.generators, *options.prefillers))
        return Way(node, matches.blocks(node.column), stored, peer.spec if peer is not None else None, peer_blocks, held)


@dataclass(frozen=True, slots=True)
class Asked:
    """One prefetch that a node has."""

    prefetch: Prefetch
    node: NodeId
    tenant: TenantId
    model: ModelName
    session: SessionId | None
    #: Of what is to be brought.
    size_bytes: int
    #: When the node is done with it.
    over_at: float


class Prefetches:
    """All prefetches of one gateway that are not over."""

    __slots__ = ("_asked", "_gateway", "_serial")

    def __init__(self, gateway: GatewayId) -> None:
        self._gateway = gateway
        self._serial = 0
        self._asked: dict[PrefetchId, Asked] = {}

    def full(self, now: float) -> bool:
        """Return whether there are as many as may be."""
        if len(self._asked) >= PREFETCHES_MAX:
            self._asked = {identity: one for identity, one in self._asked.items() if one.over_at + LATE_S > now}
        return len(self._asked) >= PREFETCHES_MAX

    def ask(self, hint: Hint, way: Way, blocks: int, keep_s: float, now: float) -> Prefetch:
        """Note that a node is asked for so many blocks beyond those it has, and return what it is asked for."""
        assert hint.model is not None, "the target is resolved to blocks of a model"
        self._serial += 1
        end, source = way.there + blocks, way.peer if way.peer_blocks > way.stored else None
        prefetch = Prefetch(
            id=prefetch_id(self._gateway, self._serial),
            hashes=hint.hashes[:end],
            keep_s=keep_s,
            stored_blocks=min(way.stored, end),
            source=source.id if source is not None else None,
            source_blocks=min(way.peer_blocks, end) if source is not None else 0,
            source_incarnation=source.incarnation if source is not None else None,
        )
        node = way.node.spec
        size_bytes = blocks * node.block_bytes
        asked = Asked(prefetch, node.id, hint.tenant, hint.model, hint.session, size_bytes, now + keep_s)
        self._asked[prefetch.id] = asked
        return prefetch

    def size_bytes(self, tenant: TenantId, now: float) -> int:
        """Return the bytes that nodes bring, or keep, for a tenant."""
        return sum(one.size_bytes for one in self._asked.values() if one.tenant == tenant and one.over_at > now)

    def covering(self, tenant: TenantId, model: ModelName, hashes: Sequence[BlockHash], now: float) -> Asked | None:
        """Return a tenant's prefetch of a whole chain, or of more; None if there is none."""
        end = len(hashes)
        for one in self._asked.values():
            chain = one.prefetch.hashes
            if (one.tenant, one.model) == (tenant, model) and one.over_at > now and chain[end - 1 : end] == hashes[-1:]:
                return one
        return None

    def meant(self, hint: Hint, first: int) -> list[Asked]:
        """Return the tenant's own that a hint ends: those of its session, or of its blocks from `first` on.

        Those of another session stay: it goes on from what the two have in common.
        """
        own = [one for one in self._asked.values() if (one.tenant, one.model) == (hint.tenant, hint.model)]
        if hint.session is not None:
            if hint.verb in (Verb.UNPIN, Verb.END_SESSION):
                return [one for one in own if one.session == hint.session]
            own = [one for one in own if one.session in (None, hint.session)]
        return [one for one in own if first < len(one.prefetch.hashes) <= common_blocks(one.prefetch.hashes, hint.hashes)]

    def ended(self, prefetch: PrefetchId, node: NodeId) -> bool:
        """Note that a node is done with one; False if it has no such, or none any more."""
        asked = self._asked.get(prefetch)
        if asked is None or asked.node != node:
            return False
        del self._asked[prefetch]
        return True

    def lost(self, node: NodeId) -> list[PrefetchId]:
        """Forget those of a node that is gone, and return them."""
        lost = [identity for identity, one in self._asked.items() if one.node == node]
        for identity in lost:
            del self._asked[identity]
        return lost

    def validate(self) -> None:
        """Raise `AssertionError` unless there are no more than may be."""
        assert len(self._asked) <= PREFETCHES_MAX, f"{len(self._asked)} prefetches are not over"
