"""One gateway's decisions: `Cluster.handle(event, now)` is the only entrance; routing, admission and the index do the hard parts.

A request's life:

    phase       entered by                         left by                                to
    WAITING     RequestArrived, all nodes full;    NodeReported, NodeJoined (room)        PROMPT       Assign
                a retry that finds no node         TimerFired                             over         Refuse or Abort
                                                   RequestAbandoned                       over
    PROMPT      RequestArrived; room for one       NodeReported with its FirstToken       STREAMING
                that waits                         NodeReported with its Ended:
                                                     STOP, LENGTH                         over         Complete
                                                     FAILED; or NodeLost                  PROMPT       Restart, Assign
                                                                                          WAITING      Restart
                                                     the same too often                   over         Abort
                                                   TimerFired (deadline)                  over         Cancel, Abort
                                                   RequestAbandoned                       over         Cancel
    STREAMING   FirstToken                         NodeReported with its Ended:
                                                     STOP, LENGTH                         over         Complete
                                                     FAILED; or NodeLost                  RESUMING     Resume
                                                     the same too often                   over         Abort
                                                   TimerFired (deadline)                  over         Cancel, Abort
                                                   RequestAbandoned                       over         Cancel
    RESUMING    a node failed it, or was lost,     Resumed: it had brought all it may     over         Complete
                after the first token                       there is more to come         PROMPT       Assign
                                                                                          WAITING
                                                   TimerFired (deadline)                  over         Abort
                                                   RequestAbandoned                       over

A request that resumes has brought tokens, which are given to the next node with its prompt; in PROMPT that node computes both,
and what fails there is resumed again. Every attempt has an id of its own on nodes: reports of one that was given up are nobody's.

Prefill and decode apart, a request has two parts. The prefill part ends with PREFILLED, or by failing or with its node: either
way the node that generates computes what it did not get, and the request goes on. What a prefill node still holds for a
request is given up with the first token, or with the request.

Rules for editors.

Rule 1: a request in any phase has a timer, at its deadline at the latest. Nothing hangs.
Rule 2: what was booked for a part is given back in the same call that ends the part.
Rule 3: reports about requests or nodes that are not known are late, not wrong: they are ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import assert_never

from orchestrator.core.cluster.admission import Admission
from orchestrator.core.cluster.candidates import Booking, Candidate, Options, Placement
from orchestrator.core.cluster.effects import Serving
from orchestrator.core.cluster.expectations import Told
from orchestrator.core.cluster.following import Trust
from orchestrator.core.cluster.hints import Hints
from orchestrator.core.cluster.pools import ModelPools
from orchestrator.core.cluster.resyncs import Resync
from orchestrator.core.cluster.router import make_router
from orchestrator.core.cluster.sessions import Sessions, Started
from orchestrator.core.cluster.stores import StoreView
from orchestrator.core.commands import (
    Abort,
    Assign,
    Cancel,
    ClearTimer,
    ClusterCommand,
    Complete,
    Expect,
    Refuse,
    ReportSourceLost,
    RequestResync,
    RequestStoreResync,
    Restart,
    Resume,
    SetTimer,
)
from orchestrator.core.config import ClusterConfig
from orchestrator.core.cost.costs import prompt_seconds
from orchestrator.core.events import (
    Answered,
    ClusterEvent,
    DrainRequested,
    Ended,
    FirstToken,
    GatewaysChanged,
    HintAsked,
    LeasesTold,
    NodeDraining,
    NodeJoined,
    NodeLost,
    NodeReported,
    RequestAbandoned,
    RequestArrived,
    Resumed,
    SessionEnded,
    StoreJoined,
    StoreLost,
    StoreReported,
    TimerFired,
    ToolFinished,
    ToolStarted,
)
from orchestrator.core.outlook import Outlook
from orchestrator.core.timers import (
    ClusterTimer,
    LeaseTimer,
    RefitTimer,
    RequestTimer,
    ResyncTimer,
    ReturnTimer,
    StoreResyncTimer,
)
from orchestrator.core.types import (
    Assignment,
    FinishReason,
    GatewayId,
    KvBatch,
    Load,
    ModelName,
    NodeId,
    NodeSpec,
    Request,
    RequestId,
    Role,
    StoreId,
    StoreLoad,
    StoreSpec,
    TenantId,
    attempt_id,
    request_of,
)


class Phase(Enum):
    """Where a request stands."""

    WAITING = "waiting"  # no node has room
    PROMPT = "prompt"  # given to nodes, nothing delivered yet
    STREAMING = "streaming"  # its first token came
    RESUMING = "resuming"  # its node was lost; what it brought is being counted


class Flight:
    """One request under way."""

    __slots__ = (
        "attempt",
        "cmx_tokens",
        "computes",
        "cpu_tokens",
        "deadline_at",
        "failed_on",
        "first",
        "generate",
        "given",
        "holder",
        "output_tokens_max",
        "peer_tokens",
        "phase",
        "predicted_cached_tokens",
        "prefill",
        "reads",
        "regretted_tokens",
        "request",
        "restarted",
        "resumed",
        "started",
        "stayed",
        "timer",
        "vain",
        "wake_at",
    )

    def __init__(self, request: Request, deadline_at: float) -> None:
        self.request = request
        #: What nodes are to begin with, as routing sees it: the request, or a prompt of its own and of what it has generated.
        self.given = request
        self.phase = Phase.WAITING
        self.deadline_at = deadline_at
        self.timer = RequestTimer(request.id)
        #: When that fires.
        self.wake_at = deadline_at
        #: The nodes that have a part in it; none while it waits.
        self.generate: NodeId | None = None
        self.prefill: NodeId | None = None
        #: The one of them that computes its prompt, as routing knows it; None until it first ran.
        self.computes: Candidate | None = None
        #: The node that has computed its prompt and may still hold the blocks for the one that generates.
        self.holder: NodeId | None = None
        #: Who reads blocks of its prompt from whom, as (reader, source).
        self.reads: tuple[tuple[NodeId, NodeId], ...] = ()
        #: Nodes on which it failed; they are tried again only if there is no other.
        self.failed_on: tuple[NodeId, ...] = ()
        #: Times it was started over, and times it went on after what it had brought; both together number its attempts.
        self.restarted = 0
        self.resumed = 0
        #: Attempts in a row that brought nothing.
        self.vain = 0
        self.attempt = request.id
        #: The first of all its tokens: what is said of its prompt is what was found for that. None before it came.
        self.first: FirstToken | None = None
        #: The most tokens that it brings: as asked for, or as the node had room for that brought the first of them.
        self.output_tokens_max = request.output_tokens_max
        self.predicted_cached_tokens = 0
        #: What its prefill node loaded from that one's store, by the tier it was in; fetched from a peer; had held and computed.
        self.cpu_tokens = 0
        self.cmx_tokens = 0
        self.peer_tokens = 0
        self.regretted_tokens = 0
        #: What its session was told of it; None until it first ran.
        self.started: Started | None = None
        #: Whether it was sent where its session's last turn ran.
        self.stayed = True

    @property
    def begun(self) -> bool:
        """Whether nodes had it before."""
        return self.restarted + self.resumed > 0

    @property
    def delivered(self) -> bool:
        """Whether anything of it reached the client."""
        return self.first is not None

    def try_again(self, failed_on: NodeId) -> None:
        """Begin another attempt: it has an id of its own."""
        self.failed_on = (*self.failed_on, failed_on)
        self.attempt = attempt_id(self.request.id, self.restarted + self.resumed)

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """The nodes that have a part in it, prefill first."""
        return tuple([node for node in (self.prefill, self.generate) if node is not None])


class KnownNode:
    """One node of the cluster."""

    __slots__ = ("candidate", "pools", "requests", "resync", "spec")

    def __init__(self, candidate: Candidate, pools: ModelPools) -> None:
        self.spec = candidate.spec
        #: What routing knows of it.
        self.candidate = candidate
        self.pools = pools
        #: Requests that it has a part in, in the order they came.
        self.requests: dict[RequestId, None] = {}
        self.resync = Resync()

    @property
    def resync_timer(self) -> ResyncTimer:
        return ResyncTimer(self.spec.id)

    @property
    def exact(self) -> bool:
        """Whether all that it told of its holdings has come."""
        return self.pools.index.trust(self.spec.id) is Trust.EXACT

    @property
    def told(self) -> int:
        """What was taken in of what it told: more than before while a resync comes."""
        return self.pools.index.applied(self.spec.id)

    def resync_request(self) -> RequestResync:
        return RequestResync(self.spec.id, self.pools.index.sequence(self.spec.id))

    def distrust(self) -> None:
        self.pools.distrust(self.spec.id)


class KnownPart:
    """One model's part of a store."""

    __slots__ = ("pools", "resync", "view")

    def __init__(self, view: StoreView, pools: ModelPools) -> None:
        #: What routing knows of it.
        self.view = view
        self.pools = pools
        self.resync = Resync()

    @property
    def resync_timer(self) -> StoreResyncTimer:
        return StoreResyncTimer(self.view.spec.id, self.view.model.model)

    @property
    def exact(self) -> bool:
        """Whether all that it told of its holdings has come, in `cpu` as in `cmx`."""
        index, segments = self.pools.index, self.pools.segments
        return index.trust(self.view.holder) is Trust.EXACT is segments.trust(self.view.spec.id)

    @property
    def told(self) -> int:
        """What was taken in of what it told: more than before while a resync comes."""
        return self.pools.index.applied(self.view.holder)

    def resync_request(self) -> RequestStoreResync:
        held = self.pools.index.sequence(self.view.holder)
        segments = self.pools.segments.sequence(self.view.spec.id)
        after = None if held is None or segments is None else min(held, segments)
        return RequestStoreResync(self.view.spec.id, self.view.model.model, after)

    def distrust(self) -> None:
        self.pools.distrust_store(self.view.spec.id)


@dataclass(slots=True)
class KnownStore:
    """One host's store, with its parts for the models that this cluster serves."""

    spec: StoreSpec
    parts: dict[ModelName, KnownPart]


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as status pages show it."""

    spec: NodeSpec
    load: Load
    draining: bool
    trust: Trust
    #: Requests of this gateway that it has a part in.
    requests: int
    #: Blocks it is believed to hold.
    believed_blocks: int


@dataclass(frozen=True, slots=True)
class StoredView:
    """A store's part for one model as status pages show it."""

    spec: StoreSpec
    model: ModelName
    load: StoreLoad
    exact: bool
    #: Blocks that it is believed to hold in `cpu`.
    believed_blocks: int


class Cluster:
    """The state of one gateway. Deterministic: equal events at equal times give equal commands."""

    def __init__(self, gateway: GatewayId, config: ClusterConfig) -> None:
        self.gateway = gateway
        self._config = config
        self._limits = config.limits
        self._router = make_router(config.router)
        self._sessions = Sessions(config.limits.sessions_max)
        models = tuple(ModelName(model) for model in config.models)
        gateways = max(config.gateway.count, gateway + 1)
        self._admission = Admission(config.limits, models, config.tenants, gateways, place=gateway)
        self._pools = {model: ModelPools(config.limits.node_waiting_max, self._admission.share) for model in models}
        self._hints = Hints(gateway, config, gateways, self._pools, self._sessions, self._router)
        self._known: dict[NodeId, KnownNode] = {}
        self._stores: dict[StoreId, KnownStore] = {}
        self._flights: dict[RequestId, Flight] = {}
        self._now = 0.0
        self._commands: list[ClusterCommand] = []

    # --- views ------------------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> tuple[NodeView, ...]:
        """All nodes, in the order they joined."""
        return tuple(_view(known) for known in self._known.values())

    @property
    def stores(self) -> tuple[StoredView, ...]:
        """All stores' parts, in the order the stores joined."""
        return tuple(
            StoredView(known.spec, model, part.view.load, part.exact, part.pools.index.believed_blocks(part.view.holder))
            for known in self._stores.values()
            for model, part in known.parts.items()
        )

    @property
    def ready(self) -> bool:
        """True while every model that has pools has at least one node that generates and is not draining."""
        return all(self._pools[ModelName(pool.model)].generates for pool in self._config.pools)

    @property
    def running(self) -> int:
        """Requests that nodes have."""
        return len(self._flights) - self._admission.waiting

    @property
    def waiting(self) -> int:
        """Requests that wait because every node is full."""
        return self._admission.waiting

    @property
    def hints(self) -> Hints:
        """Leases, who holds what, and what hints would come to; to be read only."""
        return self._hints

    @property
    def sessions(self) -> Sessions:
        """What is remembered of sessions, and why their prompts were computed again; to be read only."""
        return self._sessions

    # --- the entrance -----------------------------------------------------------------------------------------------------

    def handle(self, event: ClusterEvent, now: float) -> list[ClusterCommand]:
        """Take a fact at time `now`, in seconds, and return what to do about it, in order."""
        self._now = now
        match event:
            case NodeReported():
                self._on_node_reported(event)
            case RequestArrived():
                self._on_request_arrived(event.request)
            case RequestAbandoned():
                self._on_request_abandoned(event)
            case Resumed():
                self._on_resumed(event)
            case TimerFired():
                self._on_timer_fired(event.key)
            case NodeJoined():
                self._on_node_joined(event.node)
            case NodeLost():
                self._on_node_lost(event.node, event.reason)
            case NodeDraining():
                self._on_node_draining(event.node)
            case StoreReported():
                self._on_store_reported(event)
            case StoreJoined():
                self._on_store_joined(event.store)
            case StoreLost():
                self._on_store_lost(event.store)
            case Answered() | ToolStarted() | ToolFinished() | SessionEnded():
                self._tell(self._sessions.hinted(event, now))
            case GatewaysChanged():
                self._admission.divide(event.place, event.count, now)
                self._hints.leases.divide(event.count, now)
            case HintAsked(hint):
                self._commands += self._hints.asked(hint, now)
            case LeasesTold():
                if event.node in self._known or event.store in self._stores:
                    self._commands += self._hints.told(event, now)
            case DrainRequested():
                self._admission.draining = True
            case _:
                assert_never(event)
        commands, self._commands = self._commands, []
        return commands

    # --- requests ---------------------------------------------------------------------------------------------------------

    def _on_request_arrived(self, request: Request) -> None:
        """Refuse a request, give it to nodes, or let it wait behind those that wait already."""
        assert request.id not in self._flights, f"request {request.id} arrived twice"
        pools = self._pools.get(request.model)
        generates = pools is not None and pools.generates
        context_tokens_max = pools.context_tokens_max if pools is not None else 0
        refusal = self._admission.refusal(request, generates, context_tokens_max, self._now)
        if refusal is not None:
            self._commands.append(refusal)
            return
        assert pools is not None, f"nodes generate for {request.model}, which has no pools"
        flight = Flight(request, self._now + min(request.timeout_s, self._limits.request_s_max))
        queue = self._admission.queue(request.model)
        if not len(queue) and self._try_start(flight, pools):
            self._enter(flight)
            return
        refused = self._admission.overflow(request)
        if refused is request:
            self._commands.append(self._admission.overloaded(request))
            return
        if refused is not None:
            self._make_place(self._flights[refused.id])
        self._enter(flight)
        self._let_wait(flight)
        self._start_waiting(request.model)

    def _make_place(self, flight: Flight) -> None:
        """Refuse a request that waits, for one of a tenant that has less than its share of the places."""
        refusal = self._admission.overloaded(flight.request)
        if flight.begun:
            self._abort(flight, refusal.status, refusal.code, refusal.message)
        else:
            self._finish(flight)
            self._commands.append(refusal)

    def _enter(self, flight: Flight) -> None:
        self._admission.entered(flight.request, self._now)
        self._flights[flight.request.id] = flight

    def _let_wait(self, flight: Flight) -> None:
        """Let a request wait until a node has room, for a while."""
        flight.phase = Phase.WAITING
        self._admission.queue(flight.request.model).push(flight.request)
        self._wake(flight, min(flight.deadline_at, self._now + self._limits.waiting_s_max))

    def _start_waiting(self, model: ModelName) -> None:
        """Give waiting requests to nodes, in order, as long as there is room for the tenant whose turn it is."""
        queue = self._admission.queue(model)
        if not len(queue):
            return
        passed: list[TenantId] = []
        while (first := queue.first(passed)) is not None:
            flight = self._flights[first]
            if self._try_start(flight, self._pools[model]):
                queue.started(first, flight.predicted_cached_tokens)
            else:
                passed.append(flight.request.tenant)

    def _try_start(self, flight: Flight, pools: ModelPools) -> bool:
        """Give a request to the nodes that the router chooses; False if none has room."""
        request, given = flight.request, flight.given
        session = self._sessions.of(request)
        sticky = session.nodes if session is not None else ()
        options = pools.options(given, flight.failed_on, sticky)
        placement = self._router.place(given, options) if options is not None else None
        if options is None or placement is None:
            return False
        prefill, computes = placement.prefill, placement.computes
        flight.generate = placement.generate.spec.id
        flight.prefill = prefill.spec.id if prefill is not None else None
        flight.computes = computes
        flight.phase = Phase.PROMPT
        if not flight.delivered:
            flight.predicted_cached_tokens = placement.cached_tokens
            flight.stayed = session is None or computes.spec.id in sticky
        again = flight.started is not None
        flight.started = started = self._sessions.started(request, flight.generate, flight.prefill, again, self._now)
        self._wake(flight, flight.deadline_at)
        flight.reads = self._assign(flight, placement, started.outlook)
        self._tell(started.told)
        if request.session is not None:
            self._commands += self._hints.returned(request.model, request.tenant, request.session)
        self._book(given, placement, options, pools)
        return True

    def _tell(self, told: Sequence[Told]) -> None:
        """Tell nodes what is expected of contexts that they may hold; those that are gone hold nothing."""
        if told:
            self._commands += [Expect(node, outlook) for node, outlook in told if node in self._known]

    def _assign(self, flight: Flight, placement: Placement, outlook: Outlook | None) -> tuple[tuple[NodeId, NodeId], ...]:
        """Give nodes their parts; return who of them reads from whom."""
        generate, prefill = placement.generate, placement.prefill
        request, given_tokens = flight.request, flight.given.prompt_tokens
        room = generate.context_tokens_max - request.prompt_tokens
        most = flight.output_tokens_max if flight.delivered else request.output_tokens_max
        flight.output_tokens_max = output_tokens_max = min(most, room)
        left = output_tokens_max - (given_tokens - request.prompt_tokens)
        assert left > 0, f"request {request.id}: {given_tokens} tokens and {output_tokens_max} of output leave room for {left}"
        source = self._known[placement.source].spec if placement.source is not None else None
        source_tokens, stored_tokens = placement.source_tokens, placement.stored_tokens
        share = self._admission.share(request.tenant)
        parts: list[Assign] = []
        if prefill is not None:
            part = _part(flight, Role.PREFILL, source, source_tokens, stored_tokens, outlook, share)
            parts.append(Assign(prefill.spec.id, part, placement.scores))
            source, source_tokens, stored_tokens = prefill.spec, given_tokens, 0
        apart = prefill is not None
        part = _part(flight, Role.GENERATE, source, source_tokens, stored_tokens, outlook, share, apart)
        parts.append(Assign(generate.spec.id, part, placement.scores))
        self._commands += parts
        return tuple([(part.node, part.assignment.source) for part in parts if part.assignment.source is not None])

    def _book(self, request: Request, placement: Placement, options: Options, pools: ModelPools) -> None:
        """Count the work on the nodes that got it, and expect them to hold the prompt's blocks."""
        computes, cached = placement.computes, placement.cached_tokens
        uncached = request.prompt_tokens - cached
        seconds = prompt_seconds(computes.profile, uncached, cached, computes.spec.step_tokens_max)
        held = options.matches.blocks(computes.column) * computes.spec.block_tokens
        present = max(held, placement.source_tokens, placement.stored_tokens)
        queued = max(uncached, request.prompt_tokens - present)
        computes.give(request.id, Booking(uncached, seconds, queued, request.prompt_tokens, self._now, request.tenant))
        if placement.prefill is not None:
            context_tokens = request.prompt_tokens + (request.output_tokens_max if placement.generate.beats else 0)
            placement.generate.give(request.id, Booking(0, 0.0, 0, context_tokens, self._now, request.tenant))
        for candidate in (placement.prefill, placement.generate):
            if candidate is not None:
                self._known[candidate.spec.id].requests[request.id] = None
                pools.predicted.add(candidate.spec.id, request.id, request.hashes, options.present[candidate.column])

    def _on_request_abandoned(self, event: RequestAbandoned) -> None:
        flight = self._flights.get(event.request)
        if flight is not None:
            self._admission.delivered(flight.request.tenant, event.output_tokens, self._now)
            self._cancel_parts(flight)
            self._finish(flight)

    def _finish(self, flight: Flight) -> None:
        """Forget a request that is over, whatever it still had."""
        request = flight.request
        for node in (flight.prefill, flight.generate):
            if node is not None:
                self._end_part(flight, node)
        if flight.started is not None:
            self._tell(self._sessions.paused(flight.started, self._now))
        if flight.phase is Phase.WAITING:
            self._admission.queue(request.model).remove(request.id)
        self._admission.left(request)
        del self._flights[request.id]
        self._commands.append(ClearTimer(flight.timer))

    def _end_part(self, flight: Flight, node: NodeId) -> None:
        """Give back what was booked for a request on a node (rule 2)."""
        request = flight.request.id
        known = self._known[node]
        del known.requests[request]
        known.candidate.take(request)
        known.pools.predicted.remove(node, request)
        if node == flight.prefill:
            flight.prefill = None
        else:
            flight.generate = None

    def _cancel_parts(self, flight: Flight) -> None:
        self._cancel_prefill(flight)
        node = flight.generate
        if node is not None:
            self._commands.append(Cancel(node, flight.attempt))
            self._end_part(flight, node)

    def _cancel_prefill(self, flight: Flight) -> None:
        """Let the prefill node drop what it still does or holds for a request: the node that generates needs it no longer."""
        node, flight.holder = flight.prefill or flight.holder, None
        if node is None:
            return
        if node in self._known:
            self._commands.append(Cancel(node, flight.attempt))
        if flight.prefill is not None:
            self._end_part(flight, node)

    def _wake(self, flight: Flight, at: float) -> None:
        """Set a request's timer (rule 1)."""
        flight.wake_at = at
        self._commands.append(SetTimer(flight.timer, at))

    # --- what nodes report ------------------------------------------------------------------------------------------------

    def _on_node_reported(self, event: NodeReported) -> None:
        """Take in holdings and load, then what became of requests, then fill the room that this made."""
        known = self._known.get(event.node)
        if known is None:
            return
        if event.kv:
            self._apply(known, event.kv)
        candidate = known.candidate
        candidate.report(event.load, self._now)
        for report in event.prefetches:  # what they brought may be what a request that ends here has found
            self._hints.prefetched(event.node, report)
        for first in event.first_tokens:
            flight = self._attempted(first.request)
            if flight is not None and flight.generate == event.node:
                flight.phase, flight.vain = Phase.STREAMING, 0
                flight.first = flight.first or first
                candidate.computed(flight.request.id)
                known.pools.predicted.remove(event.node, flight.request.id)
                self._cancel_prefill(flight)
        for ended in event.ended:
            flight = self._attempted(ended.request)
            if flight is not None and event.node == flight.generate:
                self._on_generate_ended(flight, ended)
            elif flight is not None and event.node == flight.prefill:
                self._end_part(flight, event.node)
                flight.holder = event.node if ended.reason is FinishReason.PREFILLED else None
                if not flight.delivered:
                    flight.cpu_tokens, flight.cmx_tokens = ended.cpu_tokens, ended.cmx_tokens
                    flight.peer_tokens, flight.regretted_tokens = ended.peer_tokens, ended.regretted_tokens
        self._start_waiting(known.spec.model)

    def _attempted(self, attempt: RequestId) -> Flight | None:
        """Return the request that nodes are at under this id; None if they should not be any more."""
        flight = self._flights.get(request_of(attempt))
        return flight if flight is not None and flight.attempt == attempt else None

    def _on_generate_ended(self, flight: Flight, ended: Ended) -> None:
        """Complete a request, or let it be tried elsewhere."""
        node = flight.generate
        assert node is not None, f"request {ended.request} ended on no node"
        self._end_part(flight, node)
        if ended.reason is FinishReason.STOP or ended.reason is FinishReason.LENGTH:
            self._complete(flight, _as_first(ended, flight))
            return
        message = ended.message or f"the node ended it: {ended.reason.value}"
        self._try_again_or_abort(flight, node, "node_failed", f"{node}: {message}")

    def _complete(self, flight: Flight, ended: Ended) -> None:
        request = flight.request
        assert flight.computes is not None, f"request {request.id} is complete and no node computed it"
        block_tokens = flight.computes.spec.block_tokens
        cached_tokens = max(0, request.prompt_tokens - ended.computed_tokens)
        computed_tokens, regretted_tokens = (
            request.prompt_tokens - cached_tokens,
            flight.regretted_tokens + ended.regretted_tokens,
        )
        self._sessions.ended(request, computed_tokens, flight.stayed, block_tokens, regretted_tokens)
        self._admission.completed(request.model, self._now)
        self._admission.delivered(request.tenant, ended.output_tokens, self._now)
        self._cancel_parts(flight)
        self._finish(flight)
        cmx_tokens = min(flight.cmx_tokens + ended.cmx_tokens, cached_tokens)
        cpu_tokens = min(flight.cpu_tokens + ended.cpu_tokens, cached_tokens - cmx_tokens)
        if self._hints.effects.watches(request.tenant):
            came_at = flight.deadline_at - min(request.timeout_s, self._limits.request_s_max)
            serving = Serving(request, came_at, flight.computes, cached_tokens, cpu_tokens, cmx_tokens)
            self._hints.effects.served(serving, self._pools[request.model], self._now)
        peer_tokens = min(flight.peer_tokens + ended.peer_tokens, cached_tokens - cmx_tokens - cpu_tokens)
        counts = (cached_tokens, flight.predicted_cached_tokens, cpu_tokens, cmx_tokens, peer_tokens)
        self._commands.append(Complete(request.id, ended, *counts))

    def _try_again_or_abort(self, flight: Flight, node: NodeId, code: str, message: str) -> None:
        """Let a request go on, or start over, on other nodes; or end it with an error if that was done too often.

        Attempts that bring nothing are few in a row: a request that takes its nodes along must not take them all.
        """
        self._cancel_parts(flight)
        flight.vain += flight.phase is Phase.PROMPT
        if flight.vain > self._limits.retries_max or (flight.delivered and flight.resumed >= self._limits.resumes_max):
            self._abort(flight, 502 if flight.delivered else 503, code, message)
            return
        if flight.delivered:
            flight.resumed += 1
            flight.phase = Phase.RESUMING
            flight.try_again(node)
            self._commands.append(Resume(flight.request.id, message))
            return
        flight.restarted += 1
        flight.cpu_tokens = flight.cmx_tokens = flight.peer_tokens = flight.regretted_tokens = 0
        flight.try_again(node)
        self._commands.append(Restart(flight.request.id, message))
        self._start_or_wait(flight)

    def _start_or_wait(self, flight: Flight) -> None:
        if not self._try_start(flight, self._pools[flight.request.model]):
            self._let_wait(flight)

    def _on_resumed(self, event: Resumed) -> None:
        """Let a request go on from what it has brought; it is complete if only the word of that was lost."""
        flight = self._flights.get(event.request)
        if flight is None or flight.phase is not Phase.RESUMING:
            return
        request, tokens = flight.request, event.output_tokens
        if event.stopped or tokens >= flight.output_tokens_max:
            reason = FinishReason.STOP if event.stopped else FinishReason.LENGTH
            self._complete(flight, _as_first(Ended(request.id, reason, tokens, 0), flight))
            return
        flight.given = replace(request, prompt_tokens=request.prompt_tokens + tokens, hashes=event.hashes, scored=False)
        self._start_or_wait(flight)

    def _abort(self, flight: Flight, status: int, code: str, message: str) -> None:
        self._cancel_parts(flight)
        self._finish(flight)
        self._commands.append(Abort(flight.request.id, status, code, message))

    # --- holdings ---------------------------------------------------------------------------------------------------------

    def _apply(self, known: KnownNode, batches: tuple[KvBatch, ...]) -> None:
        """Take in a node's holdings."""
        told = known.told
        for batch in batches:
            known.pools.apply(known.spec.id, batch)
        self._follow(known, known.told > told)

    def _follow(self, known: KnownNode | KnownPart, progressed: bool) -> None:
        """Ask for a resync once if something was missed of what somebody told, and wait on while it is coming."""
        if known.exact:
            if known.resync.awaited:
                known.resync.end()
                self._commands.append(ClearTimer(known.resync_timer))
        elif not known.resync.awaited:
            self._ask_resync(known)
        elif progressed:
            self._commands.append(SetTimer(known.resync_timer, self._now + known.resync.wait_s))

    def _ask_resync(self, known: KnownNode | KnownPart) -> None:
        known.resync.ask()
        self._commands.append(known.resync_request())
        self._commands.append(SetTimer(known.resync_timer, self._now + known.resync.wait_s))

    def _on_resync_missing(self, known: KnownNode | KnownPart) -> None:
        """Ask again; after too many times believe nothing of the teller until it starts over."""
        if known.resync.awaited:
            if known.resync.vain:
                known.distrust()
            self._ask_resync(known)

    # --- timers -----------------------------------------------------------------------------------------------------------

    def _on_timer_fired(self, key: ClusterTimer) -> None:
        match key:
            case ResyncTimer(node):
                known = self._known.get(node)
                if known is not None:
                    self._on_resync_missing(known)
            case StoreResyncTimer(store, model):
                stored = self._stores.get(store)
                if stored is not None and model in stored.parts:
                    self._on_resync_missing(stored.parts[model])
            case RequestTimer(request):
                flight = self._flights.get(request)
                if flight is not None:
                    self._on_time_up(flight)
            case LeaseTimer(lease):
                self._commands += self._hints.expire(lease, self._now)
            case RefitTimer():
                self._commands += self._hints.refit(self._now)
            case ReturnTimer(number):
                self._commands += self._hints.returns(number, self._now)
            case _:
                assert_never(key)

    def _on_time_up(self, flight: Flight) -> None:
        """End a request that has had its time: the whole of it, or that for finding a node."""
        request = flight.request
        waits = flight.phase is Phase.WAITING
        if flight.wake_at >= flight.deadline_at:
            message = f"not finished within {min(request.timeout_s, self._limits.request_s_max):g} seconds"
            if waits and not flight.begun:
                self._finish(flight)
                self._commands.append(Refuse(request.id, 504, "deadline_exceeded", message))
            else:
                self._abort(flight, 504, "deadline_exceeded", message)
            return
        assert waits, f"request {request.id} is {flight.phase.value} and woke before {flight.deadline_at}"
        refusal = self._admission.waited_too_long(request, self._limits.waiting_s_max)
        if flight.begun:
            self._abort(flight, 503, refusal.code, refusal.message)
        else:
            self._finish(flight)
            self._commands.append(refusal)

    # --- nodes ------------------------------------------------------------------------------------------------------------

    def _on_node_joined(self, spec: NodeSpec) -> None:
        """Take a node in, in place of its former self if there is one, and ask what it holds."""
        pools = self._pools.get(spec.model)
        former = self._known.get(spec.id)
        if pools is None or (former is not None and former.spec.incarnation >= spec.incarnation):
            return
        if former is not None:
            self._on_node_lost(spec.id, "it was started anew")
        known = self._known[spec.id] = KnownNode(pools.join(spec), pools)
        self._ask_resync(known)
        self._commands += self._hints.node_joined(spec, self._now)
        self._start_waiting(spec.model)

    def _on_node_lost(self, node: NodeId, reason: str) -> None:
        """Forget a node, let what it had go on or start over elsewhere, and tell those who read from it."""
        known = self._known.get(node)
        if known is None:
            return
        generating: list[Flight] = []
        for request in tuple(known.requests):
            flight = self._flights[request]
            if flight.generate == node:
                generating.append(flight)
            self._end_part(flight, node)
        if known.resync.awaited:
            self._commands.append(ClearTimer(known.resync_timer))
        del self._known[node]
        known.pools.leave(node)
        self._commands += self._hints.node_lost(node, self._now)
        for flight in generating:
            self._try_again_or_abort(flight, node, "node_lost", f"{node} was lost: {reason}")
        for flight in self._flights.values():
            if flight.phase is Phase.PROMPT:
                self._tell_readers(flight, node)

    def _tell_readers(self, flight: Flight, lost: NodeId) -> None:
        """Let the nodes that have a part in a request and read it from a lost one compute what is missing."""
        for reader, source in flight.reads:
            if source == lost and reader in flight.nodes:
                self._commands.append(ReportSourceLost(reader, flight.attempt, lost))

    def _on_node_draining(self, node: NodeId) -> None:
        known = self._known.get(node)
        if known is not None:
            known.candidate.draining = True

    # --- stores -----------------------------------------------------------------------------------------------------------

    def _on_store_joined(self, spec: StoreSpec) -> None:
        """Take a store in, in place of its former self if there is one, and ask what it holds of each model served here."""
        former = self._stores.get(spec.id)
        if former is not None and former.spec.incarnation >= spec.incarnation:
            return
        if former is not None:
            self._on_store_lost(spec.id)
        known = self._stores[spec.id] = KnownStore(spec, {})
        for stored in spec.models:
            pools = self._pools.get(stored.model)
            if pools is not None:
                part = known.parts[stored.model] = KnownPart(pools.join_store(spec, stored), pools)
                self._ask_resync(part)
        self._commands += self._hints.store_joined(spec, self._now)

    def _on_store_lost(self, store: StoreId) -> None:
        """Forget a store: what it had in `cpu` is gone."""
        known = self._stores.pop(store, None)
        for part in known.parts.values() if known is not None else ():
            if part.resync.awaited:
                self._commands.append(ClearTimer(part.resync_timer))
            part.pools.leave_store(store)
        if known is not None:
            self._commands += self._hints.store_lost(store, self._now)

    def _on_store_reported(self, event: StoreReported) -> None:
        """Take in what a store holds of a model, and how it does."""
        known = self._stores.get(event.store)
        part = known.parts.get(event.model) if known is not None else None
        if part is None:
            return
        told = part.told
        for batch in event.kv:
            part.pools.apply_store(event.store, batch)
        part.pools.report_store(event.store, event.load)
        if event.kv:
            self._follow(part, part.told > told)

    # --- invariants -------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check every invariant. Raises `AssertionError`; for tests and simulations, as it walks everything."""
        for request, flight in self._flights.items():
            self._validate_flight(request, flight)
        self._admission.validate([flight.request for flight in self._flights.values()])
        for node, known in self._known.items():
            assert known.candidate.requests == len(known.requests), f"{node}: {known.candidate.requests} booked"
            for request in known.requests:
                assert node in self._flights[request].nodes, f"{node} has a part in request {request} that does not know of it"
        for pools in self._pools.values():
            pools.validate()
        for store in self._stores.values():
            for model, part in store.parts.items():
                assert part.resync.awaited or part.exact, f"{store.spec.id} is believed in part of {model}, and is not asked"
        self._hints.validate()

    def _validate_flight(self, request: RequestId, flight: Flight) -> None:
        waits = request in self._admission.queue(flight.request.model)
        assert waits == (flight.phase is Phase.WAITING), f"request {request} is {flight.phase.value}, waits: {waits}"
        idle = waits or flight.phase is Phase.RESUMING
        assert idle == (flight.generate is None), f"request {request} is {flight.phase.value} on {flight.generate}"
        assert request_of(flight.attempt) == request, f"request {request} is attempted as {flight.attempt}"
        assert flight.delivered or flight.given is flight.request, f"request {request} has brought nothing and goes on"
        assert flight.wake_at >= self._now, f"request {request} should have woken at {flight.wake_at}, it is {self._now}"
        assert flight.wake_at <= flight.deadline_at, f"request {request} wakes at {flight.wake_at}, after {flight.deadline_at}"
        for node in flight.nodes:
            assert request in self._known[node].requests, f"request {request} is on {node}, which does not know of it"


def _part(
    flight: Flight,
    role: Role,
    source: NodeSpec | None,
    source_tokens: int,
    stored_tokens: int,
    outlook: Outlook | None,
    share: float,
    pending: bool = False,
) -> Assignment:
    request, given = flight.request, flight.given
    return Assignment(
        request=flight.attempt,
        role=role,
        prompt_tokens=request.prompt_tokens,
        hashes=given.hashes,
        output_tokens_max=flight.output_tokens_max,
        source=source.id if source is not None else None,
        source_tokens=source_tokens,
        source_pending=pending,
        source_incarnation=source.incarnation if source is not None else None,
        stored_tokens=stored_tokens,
        priority=request.priority,
        outlook=outlook,
        name=request.name,
        tenant=request.tenant,
        share=share,
        generated_tokens=given.prompt_tokens - request.prompt_tokens,
        scored=given.scored,
    )


def _as_first(ended: Ended, flight: Flight) -> Ended:
    """Return the end of a request whose prompt counts as its first attempt found it, by the id that clients know."""
    if not flight.begun:
        return ended
    if not flight.resumed:
        return replace(ended, request=flight.request.id)
    first = flight.first
    assert first is not None, f"request {flight.request.id} was resumed and has brought nothing"
    return replace(
        ended,
        request=flight.request.id,
        computed_tokens=first.computed_tokens,
        cpu_tokens=first.cpu_tokens,
        cmx_tokens=first.cmx_tokens,
        peer_tokens=first.peer_tokens,
        regretted_tokens=first.regretted_tokens,
    )


def _view(known: KnownNode) -> NodeView:
    node, index, candidate = known.spec.id, known.pools.index, known.candidate
    return NodeView(
        spec=known.spec,
        load=candidate.load,
        draining=candidate.draining,
        trust=index.trust(node),
        requests=candidate.requests,
        believed_blocks=index.believed_blocks(node),
    )
