"""What a gateway tells Prometheus: one `weft_*` family set, and the same facts under the `vllm:*` names dashboards read.

Facts come from two sides, both on the gateway's event loop, so nothing here takes a lock:

    driver   `observe(now, event, commands)` for every event the cluster handled, `routed(seconds)` for each decision,
             `moved(...)` for each move of blocks that a node reports
    gateway  `answered(...)` for each HTTP answer, `open_turn(...)` for each generation, then `Watch.delivered(tokens)`

Every fact is exported by exactly one gateway, so that sums over all gateways are right: what is counted per request is counted
by the gateway that served it, and what is measured per node (blocks, steps, up) is exported by one of the gateways that take
requests: the node's place in the cluster modulo their number. With one gateway its endpoint covers the whole cluster; with
several, scrape each. The `vllm:*` families carry `engine`: the node for a node's gauges, the pool for what requests add up.

A histogram here is a list of counts and one bisection: observing costs a fraction of a microsecond (tokens are observed one by
one), where the client library's costs several. The library still writes the exposition.
"""

import time
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.core.cluster.sessions import ReprefillReason
from orchestrator.core.commands import Abort, Assign, ClearTimer, ClusterCommand, Complete, Refuse, Restart, Resume, SetTimer
from orchestrator.core.events import (
    ClusterEvent,
    Ended,
    NodeJoined,
    NodeLost,
    NodeReported,
    RequestAbandoned,
    RequestArrived,
    StoreJoined,
    StoreLost,
    StoreReported,
)
from orchestrator.core.hints import Earned, Outcome, Reason, Verb
from orchestrator.core.types import (
    FinishReason,
    GatewayId,
    Load,
    ModelName,
    NodeId,
    NodeSpec,
    PooledDrafts,
    PoolName,
    PrefetchEnd,
    RequestId,
    Role,
    ServiceClass,
    SplitLoad,
    StoreCounts,
    StoredModel,
    StoreId,
    StoreLoad,
    StoreSpec,
    TenantId,
    Tier,
    request_of,
)

#: Seconds. TTFT reaches 2560 s because a waiting request on a busy cluster counts too (the field's dashboards use this range).
TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
ITL_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
REQUEST_BOUNDS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
ROUTE_BOUNDS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.05, 0.1)
JITTER_BOUNDS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05)
STEP_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
MOVE_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
TOKEN_BOUNDS = (0, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)

#: The pool label of what ended before a node had it.
NO_POOL = "none"

#: Where cached tokens are told to be from beside the tiers: another node.
PEER = "peer"
#: What came of a question for a pool's drafts: fields of `PooledDrafts`.
DRAFT_OUTCOMES = ("answered", "late", "unreached")
#: The two halves of split decode.
ATTENTION, FFN = "attention", "ffn"
#: What stores count in blocks, and is told as such; what was forgotten is told with what nodes forgot.
STORE_EVENTS = tuple(item.name for item in fields(StoreCounts) if item.name not in ("failures", "cpu_evicted", "cmx_evicted"))
#: Reasons of a store's failures that are told apart.
REASONS_MAX = 32

#: vLLM's words for how a generation ended.
FINISHED = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.FAILED: "error",
    FinishReason.PREFILLED: "length",
}

Labels = tuple[str, ...]


class Distribution:
    """Counts of values by upper bound, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        #: One more than bounds: the last counts what is above them all.
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        """Count `value` `weight` times."""
        self.counts[bisect_left(self.bounds, value)] += weight
        self.total += value * weight

    def buckets(self) -> list[tuple[str, float]]:
        """Return cumulative (upper bound, count) pairs as the exposition format wants them."""
        pairs: list[tuple[str, float]] = []
        running = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            pairs.append(("+Inf" if bound == float("inf") else repr(float(bound)), running))
        return pairs


class Distributions:
    """Distributions of one quantity by label values."""

    __slots__ = ("bounds", "children")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.children: dict[Labels, Distribution] = {}

    def child(self, *labels: str) -> Distribution:
        """Return the distribution for these label values; keep it to skip the look-up."""
        found = self.children.get(labels)
        if found is None:
            found = self.children[labels] = Distribution(self.bounds)
        return found

    def family(self, name: str, text: str, label_names: Sequence[str], merge: int | None = None) -> Metric:
        """Return the exposition; with `merge` only the first that many labels are kept and the rest added up."""
        family = HistogramMetricFamily(name, text, labels=label_names)
        merged: dict[Labels, Distribution] = {}
        for labels, child in self.children.items():
            sums = merged.setdefault(labels[:merge], Distribution(self.bounds))
            sums.counts = [one + other for one, other in zip(sums.counts, child.counts, strict=True)]
            sums.total += child.total
        for labels, child in merged.items():
            family.add_metric(labels, child.buckets(), child.total)
        return family


@dataclass(slots=True)
class _Flight:
    """A request between its arrival and its end."""

    model: ModelName
    prompt_tokens: int
    #: Pool of the node that generates; None while the request waits for one.
    pool: PoolName | None = None
    #: Prompt tokens that its prefill node computed.
    prefilled_tokens: int = 0
    #: Whether it went on elsewhere after its node was lost.
    resumed: bool = False


@dataclass(slots=True)
class NodeState:
    """What is known of a node now; `spec` is None until it joined for the first time."""

    pool: PoolName
    up: bool = False
    spec: NodeSpec | None = None
    load: Load = field(default_factory=Load)
    #: Times it joined as another process than before.
    restarts: int = 0
    #: Counted by former lives of the node, whose own counters started at 0 again.
    preemptions_before: int = 0
    drafted_before: int = 0
    accepted_before: int = 0

    @property
    def preemptions(self) -> int:
        return self.preemptions_before + self.load.preemptions

    @property
    def drafted_tokens(self) -> int:
        return self.drafted_before + self.load.drafted_tokens

    @property
    def accepted_tokens(self) -> int:
        return self.accepted_before + self.load.accepted_tokens

    def start_over(self) -> None:
        """Keep what was counted; the node itself begins at 0."""
        self.preemptions_before, self.drafted_before = self.preemptions, self.drafted_tokens
        self.accepted_before, self.load = self.accepted_tokens, Load()

    def stop(self) -> None:
        """Keep what was counted of a node that may come back with it; of nothing else there is any."""
        load = self.load
        self.load = Load(
            preemptions=load.preemptions,
            drafted_tokens=load.drafted_tokens,
            accepted_tokens=load.accepted_tokens,
            beats=load.beats,
            beats_missed=load.beats_missed,
            split=load.split,
            pooled_drafts=load.pooled_drafts,
        )


class Watch:
    """Times one generation: from the request's arrival over its tokens to its end."""

    __slots__ = ("_arrived_s", "_class", "_clock", "_flight", "_itl", "_last", "_metrics", "_model", "_tokens")

    def __init__(self, metrics: "Metrics", model: ModelName, service_class: ServiceClass, arrived_s: float) -> None:
        self._metrics = metrics
        self._clock = metrics.clock
        self._model = model
        self._class = str(service_class)
        self._arrived_s = arrived_s
        self._last = arrived_s
        self._tokens = 0
        self._flight: _Flight | None = None
        self._itl: Distribution | None = None

    def assigned(self, request: RequestId) -> None:
        """Say which request this generation became, once the driver took it: its pool becomes known by it."""
        self._flight = self._metrics.flight(request)

    def delivered(self, tokens: int) -> None:
        """Observe that `tokens` more tokens came: the first is the TTFT, each later one an inter-token time."""
        now = self._clock()
        if self._itl is not None:
            if tokens:
                self._itl.observe((now - self._last) / tokens, tokens)
                self._last = now
        elif tokens:
            labels = self._labels()
            self._metrics.ttft.child(*labels).observe(now - self._arrived_s)
            self._itl = self._metrics.itl.child(*labels)
            if tokens > 1:
                self._itl.observe(0.0, tokens - 1)
            self._last = now
        self._tokens += tokens

    def ended(self, reason: FinishReason, wanted: str | None = None) -> None:
        """Observe the end; nothing is called afterwards."""
        labels = self._labels()
        self._metrics.request.child(*labels).observe(self._clock() - self._arrived_s)
        model, pool, _ = labels
        self._metrics.finished[model, pool, FINISHED[reason]] += 1
        self._metrics.output_tokens[model, pool] += self._tokens

    def _labels(self) -> tuple[str, str, str]:
        pool = self._flight.pool if self._flight is not None else None
        return self._model, pool or NO_POOL, self._class


class Metrics(Collector):
    """Everything one gateway counts and measures.

    Args:
        gateway: this gateway's number, from 0.
        gateways: gateways in the cluster.
        nodes: every node the cluster file asks for and its pool, in the file's order.
        clock: seconds, monotonic.
        cmx_bytes: what a store may have in `cmx`.
    """

    def __init__(
        self,
        gateway: GatewayId,
        gateways: int,
        nodes: Mapping[NodeId, PoolName],
        clock: Callable[[], float] = time.perf_counter,
        cmx_bytes: int = 0,
    ) -> None:
        self.clock = clock
        self._cmx_bytes = cmx_bytes
        self.ttft = Distributions(TTFT_BOUNDS)
        self.itl = Distributions(ITL_BOUNDS)
        self.request = Distributions(REQUEST_BOUNDS)
        self.finished: Tally[Labels] = Tally()
        self.output_tokens: Tally[Labels] = Tally()
        self._gateway = gateway
        self._route = Distribution(ROUTE_BOUNDS)
        self._hit_error = Distributions(TOKEN_BOUNDS)
        self._step = Distributions(STEP_BOUNDS)
        #: Of nodes that keep a beat.
        self._beat_jitter = Distributions(JITTER_BOUNDS)
        self._beats: Tally[Labels] = Tally()
        #: Of nodes that a pool drafts for: steps by what came of it, seconds that they waited, and sequences without a slot.
        self._draft_steps: Tally[Labels] = Tally()
        self._draft_wait_s: dict[Labels, float] = {}
        self._slotless: Tally[Labels] = Tally()
        self._beats_missed: Tally[Labels] = Tally()
        #: Of nodes of split decode: seconds that either half computed, and layers whose experts were placed anew.
        self._halves: dict[Labels, float] = {}
        self._expert_moves: Tally[Labels] = Tally()
        self._move = Distributions(MOVE_BOUNDS)
        self._moved_bytes: Tally[Labels] = Tally()
        #: Calls that nodes refused, and how many of them each last told of; frames that meant nothing.
        self._refused: Tally[Labels] = Tally()
        self._refused_told: dict[NodeId, int] = {}
        self._malformed: Tally[Labels] = Tally()
        self._requests: Tally[Labels] = Tally()
        #: By model: times that requests went on elsewhere, and the generated tokens that nodes were given for it.
        self._resumed: Tally[Labels] = Tally()
        self._replayed_tokens: Tally[Labels] = Tally()
        self._input_tokens: Tally[Labels] = Tally()
        self._cached_tokens: Tally[Labels] = Tally()
        #: Those of them that another node had, or a store, by the tier it had them in.
        self._loaded_tokens: Tally[Labels] = Tally()
        #: Prompt tokens of requests that were started over, or computed again for some that went on, and what the core counts by
        #: reason.
        self._restarted_tokens = self._resumed_tokens = 0
        self._by_reason: Mapping[ReprefillReason, int] = {}
        #: By verb, outcome and reason; by verb what actions have brought; leases by tenant and tier.
        self._hints: Tally[Labels] = Tally()
        self._earned: Mapping[Verb, Earned] = {}
        self._prefetches_ended: Tally[PrefetchEnd] = Tally()
        self._leased: Mapping[tuple[TenantId, Tier], int] = {}
        self._lease_byte_seconds: Callable[[], Mapping[tuple[TenantId, Tier], float]] = dict
        #: By node and pool: parts of this gateway's requests that ended there, and the tokens they computed.
        self._parts: Tally[Labels] = Tally()
        self._computed_tokens: Tally[Labels] = Tally()
        #: Those of them that the node had held and forgot.
        self._regretted_tokens: Tally[Labels] = Tally()
        self._flights: dict[RequestId, _Flight] = {}
        self._models: dict[ModelName, None] = {}
        #: All nodes, also those that other gateways export.
        self._nodes: dict[NodeId, NodeState] = {}
        self._foreign: frozenset[NodeId] = frozenset()
        #: What stores told last of themselves, by model. The first gateway exports it, and leases, of which all gateways know.
        self._stores: dict[tuple[StoreId, ModelName], StoreLoad] = {}
        #: Stores that are members or were heard of; what each is, while it is heard.
        self._store_specs: dict[StoreId, StoreSpec | None] = {}
        self._first = True
        self.set_members(nodes, range(gateways))
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    # --- from the gateway ---------------------------------------------------------------------------------------------

    def answered(self, model: str, endpoint: str, status: int, tenant: TenantId) -> None:
        """Count one HTTP answer. `model` is a served name or "unknown", never what the client wrote."""
        self._requests[model, endpoint, str(status), tenant] += 1

    def open_turn(self, model: ModelName, service_class: ServiceClass, arrived_s: float) -> Watch:
        """Return the watch of one generation of a request that arrived at `arrived_s` on this object's clock."""
        return Watch(self, model, service_class, arrived_s)

    @property
    def nodes(self) -> Mapping[NodeId, NodeState]:
        """Every node of the cluster as last heard of."""
        return self._nodes

    @property
    def stores(self) -> Mapping[tuple[StoreId, ModelName], StoreLoad]:
        """Every store's state for each model as last heard of."""
        return self._stores

    def requests_by_model(self) -> dict[str, tuple[int, int]]:
        """Return for each model how many of this gateway's requests run and how many wait."""
        running, waiting = self._flights_by_model()
        return {labels[0]: (int(count), int(waiting[labels])) for labels, count in running.items()}

    def render(self) -> bytes:
        """Return the exposition, in the Prometheus text format."""
        return generate_latest(self.registry)

    def attach(self, reprefilled: Mapping[ReprefillReason, int]) -> None:
        """Export what the core's sessions say of computed prompt tokens; the mapping is read at each scrape."""
        self._by_reason = reprefilled

    def attach_leases(
        self,
        leased: Mapping[tuple[TenantId, Tier], int],
        byte_seconds: Callable[[], Mapping[tuple[TenantId, Tier], float]],
        earned: Mapping[Verb, Earned],
    ) -> None:
        """Export bytes of leases, their bytes times seconds, and what actions have brought; all are read at each scrape."""
        self._leased, self._lease_byte_seconds, self._earned = leased, byte_seconds, earned

    def hinted(self, verb: Verb, outcome: Outcome, reason: Reason | None) -> None:
        """Count what became of one action of a harness, and why."""
        self._hints[verb, outcome, reason or ""] += 1

    def set_stores(self, stores: Iterable[StoreId]) -> None:
        """Learn which stores the cluster has from now on."""
        self._store_specs = {store: self._store_specs.get(store) for store in stores}

    def set_members(self, nodes: Mapping[NodeId, PoolName], gateways: Sequence[int]) -> None:
        """Learn which nodes and gateways the cluster has from now on; what was counted of a node that left is forgotten."""
        self._nodes = {node: self._nodes.get(node) or NodeState(pool) for node, pool in nodes.items()}
        exporters = [gateways[place % len(gateways)] if gateways else None for place in range(len(nodes))]
        self._first = not gateways or self._gateway == min(gateways)
        self._foreign = frozenset(node for node, by in zip(nodes, exporters, strict=True) if by != self._gateway)
        tallies = (self._parts, self._computed_tokens, self._regretted_tokens, self._halves, self._expert_moves)
        for tally in (*tallies, self._draft_steps, self._draft_wait_s, self._slotless):
            for labels in [labels for labels in tally if labels[0] not in nodes]:
                del tally[labels]

    # --- from the driver ----------------------------------------------------------------------------------------------

    def routed(self, seconds: float) -> None:
        """Observe the seconds one routing decision took."""
        self._route.observe(seconds)

    def moved(self, node: NodeId, source: str, target: str, size_bytes: int, seconds: float) -> None:
        """Count blocks that a node or a store has moved: `source` and `target` are tiers. The first gateway counts for stores."""
        if node not in self._foreign and (self._first or node in self._nodes):
            self._moved_bytes[source, target] += size_bytes
            self._move.child(source, target).observe(seconds)

    def follows(self, request: RequestId) -> bool:
        """Return False: what is counted here needs no times of single requests (see `spans.py`)."""
        del request
        return False

    def computed(self, node: NodeId, request: RequestId, began_s_ago: float) -> None:
        """Nothing is counted of what is not followed."""

    def fetched(self, node: NodeId, request: RequestId, began_s_ago: float) -> None:
        """`moved` has counted it."""

    def refused(self, node: NodeId, calls: int) -> None:
        """Take over how many calls a node has refused since its start."""
        if node not in self._foreign:
            told = self._refused_told.get(node, 0)
            self._refused[node,] += calls - told if calls >= told else calls
            self._refused_told[node] = calls

    def malformed(self, node: NodeId) -> None:
        """Count a frame of a node that meant nothing."""
        self._malformed[node,] += 1

    def flight(self, request: RequestId) -> _Flight | None:
        """Return the request's record while it is under way."""
        return self._flights.get(request)

    def observe(self, now: float, event: ClusterEvent, commands: Iterable[ClusterCommand]) -> None:
        """Take in what happened at `now` and what the cluster ordered for it."""
        del now
        match event:
            case NodeReported():
                self._on_report(event)
            case RequestArrived(request):
                self._flights[request.id] = _Flight(request.model, request.prompt_tokens)
            case NodeJoined(node):
                self._on_joined(node)
            case NodeLost(node, _):
                state = self._nodes.get(node)
                if state is not None:
                    state.up = False
                    state.stop()
            case StoreReported(store, model, load):
                self._stores[store, model] = load
            case StoreJoined(store):
                self._store_specs[store.id] = store
            case StoreLost(store, _):
                if store in self._store_specs:
                    self._store_specs[store] = None
                self._stores = {key: load for key, load in self._stores.items() if key[0] != store}
            case RequestAbandoned(request):
                self._flights.pop(request, None)
            case _:
                pass
        self._count(commands)

    def _count(self, commands: Iterable[ClusterCommand]) -> None:
        for command in commands:
            match command:
                case SetTimer() | ClearTimer():  # first, since every request has both
                    pass
                case Assign():
                    self._on_assign(command)
                case Complete():
                    self._on_complete(command)
                case Restart(request, _):
                    flight = self._flights.get(request)
                    if flight is not None:
                        self._restarted_tokens += flight.prompt_tokens
                        flight.pool, flight.prefilled_tokens = None, 0
                case Resume(request, _):
                    flight = self._flights.get(request)
                    if flight is not None:
                        self._resumed[flight.model,] += 1
                        flight.pool, flight.prefilled_tokens, flight.resumed = None, 0, True
                case Refuse() | Abort():
                    self._flights.pop(command.request, None)
                case _:
                    pass

    def _on_assign(self, command: Assign) -> None:
        assignment = command.assignment
        flight = self._flights.get(request_of(assignment.request))
        if flight is not None and assignment.role is Role.GENERATE:
            flight.pool = self._nodes[command.node].pool
            self._replayed_tokens[flight.model,] += assignment.generated_tokens

    def _on_complete(self, command: Complete) -> None:
        flight = self._flights.pop(command.request, None)
        if flight is None:
            return
        labels = (flight.model, flight.pool or NO_POOL)
        self._input_tokens[labels] += flight.prompt_tokens
        self._cached_tokens[labels] += command.cached_tokens
        if command.cpu_tokens or command.cmx_tokens or command.peer_tokens:
            for place, tokens in ((Tier.CPU, command.cpu_tokens), (Tier.CMX, command.cmx_tokens), (PEER, command.peer_tokens)):
                if tokens:
                    self._loaded_tokens[*labels, str(place)] += tokens
        self._hit_error.child(flight.model).observe(abs(command.predicted_cached_tokens - command.cached_tokens))

    def _on_joined(self, spec: NodeSpec) -> None:
        self._models[spec.model] = None
        state = self._nodes.setdefault(spec.id, NodeState(spec.pool))
        if state.spec is not None and state.spec.incarnation != spec.incarnation:
            state.restarts += 1
            state.start_over()
        state.pool, state.spec, state.up = spec.pool, spec, True

    def _on_report(self, event: NodeReported) -> None:
        for prefetch in event.prefetches:
            self._prefetches_ended[prefetch.reason] += 1
        state = self._nodes.get(event.node)
        if state is None:
            return
        load = event.load
        if load.beats:
            self._count_beats(event.node, state, load)
        if load.split is not None:
            self._count_halves(event.node, state, load.split)
        if load.pooled_drafts is not None:
            self._count_drafts(event.node, state, load.pooled_drafts)
        state.load = load
        for first in event.first_tokens:
            flight = self._flights.get(request_of(first.request))
            if flight is not None and flight.resumed:
                self._resumed_tokens += first.computed_tokens
        for ended in event.ended:
            self._on_part_ended(event.node, state.pool, ended)
        if load.step_s > 0.0 and event.node not in self._foreign:
            self._step.child(state.pool).observe(load.step_s)

    def _count_beats(self, node: NodeId, state: NodeState, load: Load) -> None:
        """Count the beats since a node's last report, and sample how late the last of them was."""
        beats = load.beats - state.load.beats
        if beats > 0:
            self._beats[node, state.pool] += beats
            self._beats_missed[node, state.pool] += load.beats_missed - state.load.beats_missed
            if node not in self._foreign:
                self._beat_jitter.child(state.pool).observe(load.beat_late_s)

    def _count_halves(self, node: NodeId, state: NodeState, split: SplitLoad) -> None:
        """Count what either half of a node did since its last report."""
        before = state.load.split or SplitLoad()
        for part, seconds in ((ATTENTION, split.attention_s - before.attention_s), (FFN, split.ffn_s - before.ffn_s)):
            self._halves[node, state.pool, part] = self._halves.get((node, state.pool, part), 0.0) + seconds
        if split.experts is not None:
            moves = before.experts.moves if before.experts is not None else 0
            self._expert_moves[node, state.pool] += split.experts.moves - moves

    def _count_drafts(self, node: NodeId, state: NodeState, drafts: PooledDrafts) -> None:
        """Count what a pool that drafts did for a node since its last report."""
        before, where = state.load.pooled_drafts or PooledDrafts(), (node, state.pool)
        for outcome in DRAFT_OUTCOMES:
            self._draft_steps[*where, outcome] += getattr(drafts, outcome) - getattr(before, outcome)
        self._draft_wait_s[where] = self._draft_wait_s.get(where, 0.0) + drafts.wait_s - before.wait_s
        self._slotless[where] += drafts.slotless - before.slotless

    def _on_part_ended(self, node: NodeId, pool: PoolName, ended: Ended) -> None:
        """Count what a node did for one request; a generating node's report includes what was computed for it elsewhere."""
        flight = self._flights.get(request_of(ended.request))
        elsewhere = 0 if flight is None else flight.prefilled_tokens
        if ended.reason is FinishReason.PREFILLED and flight is not None:
            flight.prefilled_tokens, elsewhere = ended.computed_tokens, 0
        labels = node, pool
        self._parts[labels] += 1
        self._computed_tokens[labels] += max(ended.computed_tokens - elsewhere, 0) + ended.output_tokens
        self._regretted_tokens[labels] += ended.regretted_tokens

    def computed_tokens(self, node: NodeId) -> int:
        """Return the tokens, of prompts and outputs, that a node has computed for this gateway's ended requests."""
        return int(self._computed_tokens[node, self._nodes[node].pool])

    # --- to Prometheus ------------------------------------------------------------------------------------------------

    def collect(self) -> Iterable[Metric]:
        """Yield every family, for the registry."""
        yield from self._request_families()
        yield from self._token_families()
        yield from self._hint_families()
        yield from self._node_families()
        yield from self._tier_families()
        yield from self._store_families()
        yield from self._vllm_request_families()
        yield from self._vllm_node_families()

    def _request_families(self) -> Iterable[Metric]:
        names = ("model", "pool", "class")
        yield _counter("weft_requests", "HTTP answers.", ("model", "endpoint", "status", "tenant"), self._requests)
        running, waiting = self._flights_by_model()
        yield _gauge("weft_requests_running", "Requests that a node has.", ("model",), running)
        yield _gauge("weft_requests_waiting", "Requests that wait at the gateway.", ("model",), waiting)
        yield self.ttft.family("weft_ttft_seconds", "Arrival of the request to its first token.", names)
        yield self.itl.family("weft_itl_seconds", "Time between two tokens of a generation.", names)
        yield self.request.family("weft_request_seconds", "Arrival of the request to the end of a generation.", names)
        route = HistogramMetricFamily("weft_route_seconds", "Time one routing decision took.")
        route.add_metric((), self._route.buckets(), self._route.total)
        yield route
        text = "Prompt tokens by which the predicted cache hit was off, either way."
        yield self._hit_error.family("weft_route_hit_error_tokens", text, ("model",))

    def _token_families(self) -> Iterable[Metric]:
        names = ("model", "pool")
        cached: dict[Labels, float] = {(*labels, Tier.HBM): count for labels, count in self._cached_tokens.items()}
        for (model, pool, tier), count in self._loaded_tokens.items():
            cached[model, pool, tier] = count
            cached[model, pool, Tier.HBM] -= count
        yield _counter("weft_input_tokens", "Prompt tokens of completed generations.", names, self._input_tokens)
        yield _counter("weft_cached_tokens", "Those of them that were not computed again.", (*names, "tier"), cached)
        yield _counter("weft_output_tokens", "Tokens delivered.", names, self.output_tokens)
        text = "Prompt tokens computed although they had been computed before."
        again: dict[Labels, float] = {
            (str(reason),): count for reason, count in self._by_reason.items() if reason is not ReprefillReason.NEW
        }
        again |= {("restarted",): self._restarted_tokens, ("resumed",): self._resumed_tokens}
        yield _counter("weft_reprefilled_tokens", text, ("reason",), again)
        text = "Times a generation went on elsewhere after its node was lost or failed."
        yield _counter("weft_resumed_requests", text, ("model",), self._resumed)
        text = "Generated tokens that nodes were given to go on from."
        yield _counter("weft_replayed_tokens", text, ("model",), self._replayed_tokens)

    def _hint_families(self) -> Iterable[Metric]:
        text = "What became of harnesses' actions on the cache, and why."
        yield _counter("weft_hint_actions", text, ("action", "outcome", "reason"), self._hints)
        earned = [((str(verb),), sums) for verb, sums in self._earned.items()]
        names = ("action",)
        found: dict[Labels, float] = {labels: sums.found_tokens for labels, sums in earned}
        thanks: dict[Labels, float] = {labels: sums.earned_tokens for labels, sums in earned}
        yield _counter(
            "weft_hint_bytes",
            "Bytes that actions kept, had brought or let go.",
            names,
            {labels: sums.size_bytes for labels, sums in earned},
        )
        yield _counter("weft_hint_found_tokens", "Tokens of later prompts found of what actions were about.", names, found)
        text = "Those of them that would not have been found without the action, as far as is known."
        yield _counter("weft_hint_earned_tokens", text, names, thanks)
        yield _counter(
            "weft_hint_saved_seconds",
            "Seconds that computing or loading those would have taken.",
            names,
            {labels: sums.saved_s for labels, sums in earned},
        )
        names = ("tenant", "tier")
        leased: dict[Labels, float] = {}
        spent: dict[Labels, float] = {}
        if self._first:
            leased = {(tenant, tier): size for (tenant, tier), size in self._leased.items()}
            spent = {(tenant, tier): byte_s for (tenant, tier), byte_s in self._lease_byte_seconds().items()}
        yield _gauge("weft_lease_bytes", "Bytes that leases promise to keep, by the lowest tier they may sink to.", names, leased)
        yield _counter("weft_lease_byte_seconds", "Bytes of leases times the seconds they lasted.", names, spent)

    def _node_families(self) -> Iterable[Metric]:
        up: dict[Labels, float] = {(node, state.pool): float(state.up) for node, state in self._exported()}
        blocks: dict[Labels, float] = {}
        leased: dict[Labels, float] = {}
        drafted: dict[Labels, float] = {}
        for node, state in self._exported():
            load = state.load
            drafted[node, "accepted"] = state.accepted_tokens
            drafted[node, "rejected"] = state.drafted_tokens - state.accepted_tokens
            leased[node, "kept"], leased[node, "over"] = load.blocks_leased, load.blocks_unleased
            for word, count in (("used", load.blocks_used), ("cached", load.blocks_cached), ("free", load.blocks_free)):
                blocks[node, Tier.HBM, word] = count
        for (store, model), load in self._exported_stores():
            for tier, word, count in (
                (Tier.CPU, "used", load.slots_used),
                (Tier.CPU, "cached", load.slots_cached),
                (Tier.CPU, "free", load.slots_free),
                (Tier.CMX, "cached", load.segments * model.segment_blocks),
            ):
                blocks[store, tier, word] = blocks.get((store, tier, word), 0) + count
        yield _gauge("weft_node_up", "1 while the gateway hears the node.", ("node", "pool"), up)
        yield _gauge("weft_kv_blocks", "KV blocks of a node, or of a host's store, by state.", ("node", "tier", "state"), blocks)
        text = "KV blocks that leases keep on a node, and those for which they had no room there."
        yield _gauge("weft_kv_leased_blocks", text, ("node", "state"), leased)
        yield from self._prefetch_families()
        yield self._step.family("weft_step_seconds", "Time of an engine step.", ("pool",))
        yield _counter("weft_speculation_tokens", "Tokens drafted and verified on a node.", ("node", "outcome"), drafted)
        yield from self._beat_families()
        yield from self._split_families()
        yield from self._draft_families()
        where = ("node", "pool")
        yield _counter("weft_node_requests", "Parts of requests that ended on a node.", where, self._parts)
        text = "Tokens of prompts and outputs that a node computed for ended requests."
        yield _counter("weft_node_computed_tokens", text, where, self._computed_tokens)
        ways = ("source", "target")
        yield _counter("weft_kv_moved_bytes", "KV bytes brought from one tier or node to another.", ways, self._moved_bytes)
        yield self._move.family("weft_kv_move_seconds", "Time of such a move.", ways)
        yield _counter(
            "weft_refused_calls", "Calls that a node refused: no token, another protocol, nonsense.", ("node",), self._refused
        )
        yield _counter(
            "weft_malformed_frames", "Frames of a node that meant nothing; its link started anew.", ("node",), self._malformed
        )

    def _prefetch_families(self) -> Iterable[Metric]:
        """Yield what nodes bring before a request asks for it, and what becomes of that."""
        kept: dict[Labels, float] = {}
        done: dict[Labels, float] = {}
        for node, state in self._exported():
            load = state.load
            kept[node,] = load.blocks_prefetched
            done[node, "brought"], done[node, "used"] = load.prefetched, load.prefetch_used
            done[node, "wasted"] = load.prefetch_wasted
        yield _gauge("weft_kv_prefetched_blocks", "Blocks that a node keeps for prefetches.", ("node",), kept)
        text = "Blocks that a node brought for prefetches; of those, found by a request, and forgotten before one came."
        yield _counter("weft_node_prefetch_blocks", text, ("node", "event"), done)
        ended: dict[Labels, float] = {(str(reason),): count for reason, count in self._prefetches_ended.items()}
        yield _counter("weft_prefetches_ended", "Prefetches into hbm, by why they ended.", ("reason",), ended)

    def _beat_families(self) -> Iterable[Metric]:
        """Yield how nodes keep their beat."""
        names = ("node", "pool")
        beats: dict[Labels, float] = {}
        for node, state in self._exported():
            if (count := self._beats[node, state.pool]) > 0:
                beats[node, state.pool] = count
        yield _counter("weft_beats", "Beats of a node on which it computed a step.", names, beats)
        text = "Beats on which somebody waited for a token that was not computed by their end."
        yield _counter("weft_beats_missed", text, names, {labels: self._beats_missed[labels] for labels in beats})
        text = "How long after its beat a step began, of a step at each load report."
        yield self._beat_jitter.family("weft_beat_jitter_seconds", text, ("pool",))

    def _split_families(self) -> Iterable[Metric]:
        """Yield what the halves of split decode do, and how evenly experts are spread over FFN ranks."""
        seconds: dict[Labels, float] = {}
        ranks: dict[Labels, float] = {}
        moves: dict[Labels, float] = {}
        uneven: dict[Labels, float] = {}
        links: dict[Labels, float] = {}
        for node, state in self._exported():
            split, where = state.load.split, (node, state.pool)
            for part in (ATTENTION, FFN):
                if (*where, part) in self._halves:
                    seconds[*where, part] = self._halves[*where, part]
            if where in self._expert_moves:
                moves[where] = self._expert_moves[where]
            if split is None or not state.up:
                continue
            ranks[*where, ATTENTION], ranks[*where, FFN] = 1, split.ffn_ranks
            links[*where, "shm"], links[*where, "tcp"] = split.links_shared, split.links_network
            if split.experts is not None:
                uneven[*where, "now"], uneven[*where, "first"] = split.experts.imbalance, split.experts.imbalance_first
        names = ("node", "pool")
        text = "Seconds that a node of split decode computed attention, and that FFN ranks computed for it, all together."
        yield _counter("weft_afd_seconds", text, (*names, "part"), seconds)
        yield _gauge(
            "weft_afd_ranks", "Ranks that may compute so; FFN ranks as its group has them a node.", (*names, "part"), ranks
        )
        text = "FFN ranks that a node sends rows to, by memory that they share and by TCP."
        yield _gauge("weft_afd_links", text, (*names, "transport"), links)
        text = "How much more than the mean the busiest FFN rank has to do, as experts are placed now and as they were at first."
        yield _gauge("weft_expert_imbalance", text, (*names, "placement"), uneven)
        yield _counter("weft_expert_moves", "Times that a layer's experts were placed anew.", names, moves)

    def _draft_families(self) -> Iterable[Metric]:
        """Yield how nodes get drafts of a pool."""
        steps: dict[Labels, float] = {}
        waits: dict[Labels, float] = {}
        slotless: dict[Labels, float] = {}
        slots: dict[Labels, float] = {}
        for node, state in self._exported():
            drafts, where = state.load.pooled_drafts, (node, state.pool)
            if drafts is None:
                continue
            steps |= {(*where, outcome): self._draft_steps[*where, outcome] for outcome in DRAFT_OUTCOMES}
            waits[where], slotless[where] = self._draft_wait_s.get(where, 0.0), self._slotless[where]
            if state.up:
                slots[*where, "taken"], slots[*where, "free"] = drafts.slots_taken, drafts.slots - drafts.slots_taken
        names = ("node", "pool")
        text = "Steps of a node for which a pool was to draft: answered in time, late, or with nobody there to ask."
        yield _counter("weft_draft_steps", text, (*names, "outcome"), steps)
        yield _counter("weft_draft_wait_seconds", "Seconds that a node's steps waited for a pool's drafts.", names, waits)
        text = "Sequences of a node that found no slot at the pool that drafts for it, each time that it asked."
        yield _counter("weft_draft_slotless", text, names, slotless)
        text = "Slots of the process that drafts for a node, and for others; none while it is not reached."
        yield _gauge("weft_draft_slots", text, (*names, "state"), slots)

    def _tier_families(self) -> Iterable[Metric]:
        """Yield how full each tier of each holder is, and what it forgets."""
        held: Tally[Labels] = Tally()
        room: Tally[Labels] = Tally()
        evicted: Tally[Labels] = Tally()
        idle: dict[Labels, float] = {}
        for node, state in self._exported():
            if state.spec is not None and state.up:
                load, labels = state.load, (node, Tier.HBM.value)
                held[labels] = (load.blocks_used + load.blocks_cached) * state.spec.block_bytes
                room[labels] = state.spec.blocks * state.spec.block_bytes
                evicted[labels], idle[labels] = load.blocks_evicted, load.evicted_idle_s
        for (store, model), load in self._exported_stores():
            cpu, cmx = (store, Tier.CPU.value), (store, Tier.CMX.value)
            held[cpu] += (load.slots_used + load.slots_cached) * model.block_bytes
            room[cpu] += model.slots * model.block_bytes
            evicted[cpu] += load.counts.cpu_evicted
            idle[cpu] = max(idle.get(cpu, 0.0), load.evicted_idle_s)
            if model.cmx:
                held[cmx] += load.segments * model.segment_bytes
                room[cmx] = self._cmx_bytes
                evicted[cmx] += load.counts.cmx_evicted
        names = ("node", "tier")
        yield _gauge("weft_kv_bytes", "Bytes of KV that a node or a store holds.", names, held)
        yield _gauge("weft_kv_capacity_bytes", "Bytes of KV that it may hold.", names, room)
        yield _counter("weft_kv_evicted_blocks", "Blocks that it forgot; on nodes for want of room.", names, evicted)
        text = "Seconds that what it forgot lately, for want of room, had not been used."
        yield _gauge("weft_kv_evicted_idle_seconds", text, names, idle)
        text = "Prompt tokens that a node computed although it had held them and forgot them not long before."
        yield _counter("weft_regretted_tokens", text, ("node", "pool"), self._regretted_tokens)

    def _store_families(self) -> Iterable[Metric]:
        up: dict[Labels, float] = {}
        if self._first:
            up = {(store,): float(spec is not None) for store, spec in self._store_specs.items()}
        done: Tally[Labels] = Tally()
        failures: Tally[Labels] = Tally()
        waiting: Tally[Labels] = Tally()
        wasted: Tally[Labels] = Tally()
        leased: Tally[Labels] = Tally()
        for (store, model), load in self._exported_stores():
            for event in STORE_EVENTS:
                done[store, event] += getattr(load.counts, event)
            for reason, count in load.counts.failures[:REASONS_MAX]:
                failures[store, reason] += count
            waiting[store,] += load.reads_waiting
            wasted[store,] += load.counts.prefetch_wasted * model.block_bytes
            for one in load.leased:
                leased[store, one.tenant, one.tier.value] += one.bytes
        yield _gauge("weft_store_up", "1 while the gateway hears the store.", ("store",), up)
        yield _counter("weft_store_blocks", "What a store did, in blocks.", ("store", "event"), done)
        yield _counter("weft_store_failures", "What went wrong in a store.", ("store", "reason"), failures)
        yield _gauge("weft_store_reads_waiting", "Reads that wait for blocks from cmx.", ("store",), waiting)
        text = "Bytes brought on advice and forgotten before anybody read them."
        yield _counter("weft_wasted_prefetch_bytes", text, ("store",), wasted)
        text = "Bytes that a store holds of leases; blocks of several leases count for each."
        yield _gauge("weft_lease_held_bytes", text, ("store", "tenant", "tier"), leased)

    def _vllm_request_families(self) -> Iterable[Metric]:
        names = ("model_name", "engine")
        sources: dict[Labels, float] = {}
        local: dict[Labels, float] = {}
        missed: dict[Labels, float] = {}
        external: dict[Labels, float] = {}
        for (model, pool), count in self._input_tokens.items():
            cached = self._cached_tokens[model, pool]
            brought = sum(self._loaded_tokens[model, pool, place] for place in (*map(str, Tier), PEER))
            sources[model, pool, "local_cache_hit"] = local[model, pool] = cached - brought
            sources[model, pool, "external_kv_transfer"] = external[model, pool] = brought
            sources[model, pool, "local_compute"] = count - cached
            missed[model, pool] = count - cached + brought
        yield _counter("vllm:prompt_tokens", "weft_input_tokens.", names, self._input_tokens)
        yield _counter("vllm:prompt_tokens_by_source", "Prompt tokens, cached or not.", (*names, "source"), sources)
        yield _counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", names, self._input_tokens)
        yield _counter("vllm:prefix_cache_hits", "Prompt tokens found on the node.", names, local)
        yield _counter("vllm:external_prefix_cache_queries", "Prompt tokens not found on the node.", names, missed)
        yield _counter("vllm:external_prefix_cache_hits", "Prompt tokens a store or another node had.", names, external)
        yield _counter("vllm:generation_tokens", "weft_output_tokens.", names, self.output_tokens)
        yield _counter("vllm:request_success", "Ended generations.", (*names, "finished_reason"), self.finished)
        yield self.ttft.family("vllm:time_to_first_token_seconds", "weft_ttft_seconds.", names, merge=2)
        yield self.itl.family("vllm:inter_token_latency_seconds", "weft_itl_seconds.", names, merge=2)
        yield self.request.family("vllm:e2e_request_latency_seconds", "weft_request_seconds.", names, merge=2)

    def _vllm_node_families(self) -> Iterable[Metric]:
        names = ("model_name", "engine")
        running: dict[Labels, float] = {}
        waiting: dict[Labels, float] = {}
        usage: dict[Labels, float] = {}
        preemptions: dict[Labels, float] = {}
        drafted: dict[Labels, float] = {}
        accepted: dict[Labels, float] = {}
        facts: dict[Labels, float] = {}
        for (model,), count in self._flights_by_model()[1].items():
            waiting[model, f"gateway-{self._gateway}"] = count
        for node, state in self._exported():
            if state.spec is None:
                continue
            labels = (state.spec.model, node)
            running[labels], waiting[labels] = state.load.running, state.load.waiting
            usage[labels] = state.load.blocks_used / state.spec.blocks
            preemptions[labels] = state.preemptions
            drafted[labels], accepted[labels] = state.drafted_tokens, state.accepted_tokens
            facts[(*labels, str(state.spec.block_tokens), str(state.spec.blocks))] = 1
        yield _gauge("vllm:num_requests_running", "Sequences in a node's batch.", names, running)
        yield _gauge("vllm:num_requests_waiting", "Sequences that wait, on a node or in the gateway.", names, waiting)
        yield _gauge("vllm:kv_cache_usage_perc", "Share of a node's blocks in use, 0 to 1.", names, usage)
        yield _counter("vllm:num_preemptions", "Sequences put back for want of blocks.", names, preemptions)
        yield _counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted and verified.", names, drafted)
        yield _counter("vllm:spec_decode_num_accepted_tokens", "Those of them that were right.", names, accepted)
        yield _gauge("vllm:cache_config_info", "A node's KV pool.", (*names, "block_size", "num_gpu_blocks"), facts)

    def _exported(self) -> list[tuple[NodeId, NodeState]]:
        return [(node, state) for node, state in self._nodes.items() if node not in self._foreign]

    def _exported_stores(self) -> list[tuple[tuple[StoreId, StoredModel], StoreLoad]]:
        """Return each store's parts that it told of, and in what state they are; the first gateway tells of them."""
        if not self._first:
            return []
        parts = {(spec.id, part.model): part for spec in self._store_specs.values() if spec is not None for part in spec.models}
        return [((key[0], parts[key]), load) for key, load in self._stores.items() if key in parts]

    def _flights_by_model(self) -> tuple[dict[Labels, float], dict[Labels, float]]:
        """Return requests under way that a node has, and those that none has yet."""
        running: dict[Labels, float] = {(model,): 0 for model in self._models}
        waiting = dict(running)
        for flight in self._flights.values():
            for counts, share in ((running, flight.pool is not None), (waiting, flight.pool is None)):
                counts[(flight.model,)] = counts.get((flight.model,), 0) + share
        return running, waiting


def _counter(name: str, text: str, label_names: Sequence[str], values: Mapping[Labels, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=label_names)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _gauge(name: str, text: str, label_names: Sequence[str], values: Mapping[Labels, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=label_names)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family
