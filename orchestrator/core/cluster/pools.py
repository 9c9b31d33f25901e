"""The nodes of one model, and their hosts' stores: what they hold, what they do, and which nodes may take a request.

See also `kvindex.py` and `segments.py` for holdings, `candidates.py` and `stores.py` for load; `cluster.py` has one of these for
each model.
"""

from collections.abc import Callable, Sequence

from orchestrator.core.cluster.candidates import Candidate, Options
from orchestrator.core.cluster.following import Trust
from orchestrator.core.cluster.kvindex import KvIndex, Matches, PredictedKv
from orchestrator.core.cluster.segments import SegmentIndex
from orchestrator.core.cluster.stores import StoreView, holder
from orchestrator.core.types import (
    BlockHash,
    KvBatch,
    NodeId,
    NodeSpec,
    Request,
    ServiceClass,
    StoredModel,
    StoreId,
    StoreLoad,
    StoreSpec,
    TenantId,
)

#: A hit on a node that missed batches counts this much until it is mended: some of its blocks may be gone.
STALE_CREDIT = 0.5


class ModelPools:
    """All nodes that serve one model, in the order they joined."""

    __slots__ = (
        "_anybodys",
        "_candidates",
        "_cost_groups",
        "_node_waiting_max",
        "_peers",
        "_share_of",
        "_stale",
        "_store_columns",
        "_stores",
        "context_tokens_max",
        "index",
        "predicted",
        "segments",
    )

    def __init__(self, node_waiting_max: int, share_of: Callable[[TenantId], float]) -> None:
        self._share_of = share_of
        self._node_waiting_max = node_waiting_max
        self._candidates: dict[NodeId, Candidate] = {}
        #: Those that generate for requests of any class.
        self._anybodys: list[Candidate] = []
        #: By their column in the index.
        self._peers: dict[int, Candidate] = {}
        #: Numbers the groups of nodes on which equal work costs the same.
        self._cost_groups: dict[object, int] = {}
        #: Nodes whose holdings are believed in part only.
        self._stale: dict[NodeId, None] = {}
        #: Longest prompt plus output that any node takes; 0 without nodes that generate.
        self.context_tokens_max = 0
        self._stores: dict[StoreId, StoreView] = {}
        #: Their columns in the index, as a mask.
        self._store_columns = 0
        self.index = KvIndex()
        self.segments = SegmentIndex()
        self.predicted = PredictedKv()

    @property
    def generates(self) -> bool:
        """True while at least one node takes requests of any class to generate for."""
        return False in [candidate.draining for candidate in self._anybodys]

    def join(self, spec: NodeSpec) -> Candidate:
        """Take a node in, of which nothing is known but what it is, and return its candidate."""
        self.index.add_node(spec.id, spec.blocks)
        key = (spec.profile, spec.block_bytes, spec.block_tokens, spec.step_tokens_max, spec.kind)
        cost_group = self._cost_groups.setdefault(key, len(self._cost_groups))
        candidate = Candidate(spec, self.index.column(spec.id), cost_group, self._share_of)
        self._candidates[spec.id] = candidate
        self._peers[candidate.column] = candidate
        self._find_stores()
        self._measure()
        return candidate

    def leave(self, node: NodeId) -> None:
        """Forget a node."""
        candidate = self._candidates.pop(node)
        del self._peers[candidate.column]
        self._stale.pop(node, None)
        self.index.remove_node(node)
        if not self._candidates:
            self._cost_groups.clear()
        self._measure()

    def join_store(self, spec: StoreSpec, model: StoredModel) -> StoreView:
        """Take in what a store keeps of this model, of which nothing is known yet."""
        self.index.add_node(holder(spec.id), model.slots)
        self.segments.add_store(spec.id)
        view = self._stores[spec.id] = StoreView(spec, model, self.index.column(holder(spec.id)))
        self._find_stores()
        return view

    def leave_store(self, store: StoreId) -> None:
        """Forget a store; what it put into the shared storage stays."""
        del self._stores[store]
        self.index.remove_node(holder(store))
        self.segments.remove_store(store)
        self._find_stores()

    def apply_store(self, store: StoreId, batch: KvBatch) -> None:
        """Take in what a store says of its holdings."""
        self.index.apply(holder(store), batch)
        self.segments.apply(store, batch)
        self._follow_column(store)

    def distrust_store(self, store: StoreId) -> None:
        """Believe nothing of a store until it starts over."""
        self.index.distrust(holder(store))
        self.segments.distrust(store)
        self._follow_column(store)

    def report_store(self, store: StoreId, load: StoreLoad) -> None:
        """Take in what a store says of itself."""
        view = self._stores[store]
        rates = view.rates
        view.report(load)
        if view.rates != rates:
            self._find_stores()

    def _follow_column(self, store: StoreId) -> None:
        view, column = self._stores[store], self.index.column(holder(store))
        if column != view.column:
            view.column = column
            self._find_stores()

    def _find_stores(self) -> None:
        """Let every node that can load know the store of its host, and note where the stores are in the index."""
        by_host = {view.spec.host: view for view in self._stores.values()}
        groups: dict[object, int] = {}
        for candidate in self._candidates.values():
            view = by_host.get(candidate.spec.host) if candidate.spec.stores else None
            candidate.store = view
            candidate.store_column = view.column if view is not None else None
            key = (view.rates, view.model.cmx) if view is not None else None
            candidate.load_group = groups.setdefault(key, len(groups))
        self._store_columns = sum(1 << view.column for view in self._stores.values())

    def _measure(self) -> None:
        self._anybodys = [one for one in self._candidates.values() if one.generates and not one.beats]
        self.context_tokens_max = max([candidate.context_tokens_max for candidate in self._anybodys], default=0)

    def apply(self, node: NodeId, batch: KvBatch) -> Trust:
        """Take in what a node says of its holdings. Returns how far they are believed now."""
        trust = self.index.apply(node, batch)
        self._note(node, trust)
        return trust

    def distrust(self, node: NodeId) -> None:
        """Believe nothing of a node until it starts over."""
        self.index.distrust(node)
        self._note(node, Trust.BLIND)

    def _note(self, node: NodeId, trust: Trust) -> None:
        """Follow a node's column, which changes when it starts over, and whether it is believed."""
        candidate, column = self._candidates[node], self.index.column(node)
        if column != candidate.column:
            del self._peers[candidate.column]
            candidate.column = column
            self._peers[column] = candidate
        if trust is Trust.STALE:
            self._stale[node] = None
        else:
            self._stale.pop(node, None)

    def options(self, request: Request, excluded: Sequence[NodeId], sticky: Sequence[NodeId]) -> Options | None:
        """Return what may serve a request now, None if every node is full for its tenant. Excluded nodes are a last resort.

        Class cadence goes to a node that keeps its beat, as long as there is one with room and somebody computes prompts for it;
        else where everybody else goes.
        """
        generators: list[Candidate] = []
        beating: list[Candidate] = []
        prefillers: list[Candidate] = []
        prefillers_full = False
        for candidate in self._candidates.values():
            if candidate.stale or (candidate.tells_tenants and candidate.seen_by != request.tenant):
                candidate.refresh(request.tenant)
            if candidate.draining:
                continue
            if candidate.beats:
                wanted = request.service_class is ServiceClass.CADENCE and candidate.spec.id not in excluded
                if wanted and candidate.keeps_beat(request):
                    beating.append(candidate)
                continue
            if candidate.waiting >= self._node_waiting_max and not candidate.displaces(request.tenant, self._node_waiting_max):
                prefillers_full |= not candidate.generates
                continue
            if not candidate.generates:
                prefillers.append(candidate)
            elif candidate.context_tokens_max > request.prompt_tokens:
                generators.append(candidate)
        if beating and prefillers:
            generators = beating
        if not generators:
            return None
        if excluded:
            generators = [candidate for candidate in generators if candidate.spec.id not in excluded] or generators
            prefillers = [candidate for candidate in prefillers if candidate.spec.id not in excluded]
        # Nobody has anything for a request whose whole prompt is to be computed.
        hashes = () if request.scored else request.hashes
        found = self.index.find(hashes)
        present = found.by_column(self.index.columns)
        matches, cmx_blocks = found, 0
        if self._stores:
            matches, cmx_blocks = self._stored(hashes, found, present)
        for node in self._stale:
            column = self._candidates[node].column
            present[column] = int(present[column] * STALE_CREDIT)
        for node in self.predicted.nodes:
            column = self._candidates[node].column
            present[column] = self.predicted.extend(node, hashes, present[column])
        stores = bool(self._stores)
        return Options(generators, prefillers, self._peers, present, matches, sticky, prefillers_full, stores, cmx_blocks)

    def _stored(self, hashes: Sequence[BlockHash], found: Matches, present: list[int]) -> tuple[Matches, int]:
        """Return what nodes have of a prompt, and how many of its blocks are in the storage that the stores share."""
        for view in self._stores.values():
            if self.index.trust(view.holder) is Trust.STALE:
                present[view.column] = int(present[view.column] * STALE_CREDIT)
        segment_blocks = min(view.model.segment_blocks for view in self._stores.values())
        return found.within(~self._store_columns), self.segments.blocks(hashes, segment_blocks)

    def validate(self) -> None:
        """Raise `AssertionError` unless all parts agree on which nodes there are."""
        self.index.validate()
        for node, candidate in self._candidates.items():
            candidate.validate()
            column = self.index.column(node)
            assert candidate.column == column, f"{node} is in column {column}, not {candidate.column}"
            assert self._peers[candidate.column] is candidate, f"column {candidate.column} is not {node}"
        assert len(self._peers) == len(self._candidates), f"{len(self._peers)} columns for {len(self._candidates)} nodes"
        self.segments.validate()
        for store, view in self._stores.items():
            column = self.index.column(holder(store))
            assert view.column == column, f"{store} is in column {column}, not {view.column}"
            assert self._store_columns >> column & 1, f"column {column} of {store} is taken for a node's"
        for candidate in self._candidates.values():
            loads_from = candidate.store
            known = loads_from is None or self._stores.get(loads_from.spec.id) is loads_from
            assert known, f"{candidate.spec.id} loads from one that left"
        for node in (*self._stale, *self.predicted.nodes):
            assert node in self._candidates, f"{node} is remembered after it left"
