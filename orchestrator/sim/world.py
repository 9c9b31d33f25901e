"""A whole cluster in virtual time: gateways' `Cluster`s, nodes, hosts' stores, links between them and the agents that use them.

The decisions are those of the live system, because they are the same objects: this file only carries what one of them says to
the other, a little later, and gives agents their answers. See also: `live/driver.py`, which does it in real time; `simulated.py`
(nodes), `stores.py`, `network.py` (links), `faults.py`, `checks.py`.

What is simplified against the live system: frames go out at once, where live nodes gather for some milliseconds; an answer's
blocks get their names when it ends; every token that a node made before it died has reached its client; with speculation tokens
count as coming evenly, not in the bursts of a pass; every request is of class `standard`.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from random import Random
from typing import assert_never

from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.cluster.sessions import owner_of
from orchestrator.core.commands import (
    Abort,
    AnswerHint,
    Assign,
    Cancel,
    CancelPrefetch,
    ClearTimer,
    ClusterCommand,
    Complete,
    DropGateway,
    EndLease,
    EvictBlocks,
    EvictStored,
    Expect,
    Fetch,
    Forget,
    LoadBlocks,
    NodeCommand,
    Offer,
    PlaceLease,
    PrefetchBlocks,
    PrefetchStored,
    PublishKv,
    Refuse,
    ReportEnded,
    ReportFirstToken,
    ReportPrefetchEnded,
    ReportSourceLost,
    RequestResync,
    RequestStoreResync,
    Restart,
    Resume,
    RetainBlocks,
    RunStep,
    SendBlocks,
    SetTimer,
    StopFetch,
    StopOffer,
    TellLeases,
)
from orchestrator.core.config import PoolConfig, StoreConfig
from orchestrator.core.cost.costs import node_profile
from orchestrator.core.events import (
    Answered,
    Assigned,
    BlocksRetained,
    BlocksRetired,
    BlocksWanted,
    Cancelled,
    ClusterEvent,
    Ended,
    EvictAsked,
    Expected,
    FirstToken,
    GatewayHeard,
    GatewayLost,
    HintAsked,
    LeaseEnded,
    LeasePlaced,
    LeasesTold,
    NodeEvent,
    NodeJoined,
    NodeLost,
    NodeReported,
    PrefetchAsked,
    PrefetchCancelled,
    PrefetchEnded,
    RequestAbandoned,
    RequestArrived,
    Resumed,
    ResyncRequested,
    SessionEnded,
    SourceLost,
    StoreEvent,
    StoreJoined,
    StoreLost,
    StoreReported,
    TimerFired,
    ToolStarted,
)
from orchestrator.core.hints import Hint, Verb
from orchestrator.core.kvpool import BlockPool
from orchestrator.core.node.node import Node
from orchestrator.core.types import (
    BlockHash,
    GatewayId,
    KvBatch,
    ModelName,
    NodeId,
    NodeSpec,
    PoolKind,
    PoolName,
    Request,
    RequestId,
    Role,
    SessionId,
    StoreId,
    StoreSpec,
    TenantId,
    gateway_of,
    request_id,
    request_of,
)
from orchestrator.profiles.resolve import Below, Resolved
from orchestrator.sim.agenda import Agenda, Timers
from orchestrator.sim.checks import Checks, Stuck
from orchestrator.sim.faults import Faults
from orchestrator.sim.frequency import FrequencyPool
from orchestrator.sim.halves import split_use
from orchestrator.sim.hints import TOOL, Agents, HintProgram, Pause
from orchestrator.sim.network import Network, Transfers
from orchestrator.sim.oracle import Future, OptimalPool
from orchestrator.sim.outcome import BeatUse, Distribution, Outcome, PoolSample, PoolUse, Served, StoreUse
from orchestrator.sim.prompts import Prompts
from orchestrator.sim.simulated import SimulatedNode
from orchestrator.sim.stores import Shared, SimulatedStore, host_of, store_specs
from orchestrator.traces import TracedTurn

#: Samples of the pools that a run keeps at most; beyond, every second one is dropped.
SAMPLES_MAX = 512
#: Context limit of nodes that name none, tokens.
CONTEXT_TOKENS_DEFAULT = 1 << 20
#: Blocks of nodes that name none.
BLOCKS_DEFAULT = 32768
#: Progress is told after so many ended requests.
PROGRESS_EVERY = 64


@dataclass(frozen=True, slots=True)
class WorldOptions:
    """How a world runs, beyond its cluster file."""

    #: Of everything random: faults, and nothing else.
    seed: int = 0
    #: Take every step by itself: the oracle that the closed form is held against.
    stepwise: bool = False
    #: Check every invariant after every event; slow.
    checks: bool = False
    #: Hash every command.
    digest: bool = False
    #: Forget blocks by Belady's rule, with knowledge of the trace.
    optimal_cache: bool = False
    #: For that: ids of the turns in the order in which they will come; empty for the trace's.
    order: Sequence[int] = ()
    #: Forget first what was used least often.
    frequency_cache: bool = False
    #: What agents tell between their turns.
    hints: HintProgram = HintProgram.NONE
    faults: Faults | None = None
    #: Seconds from gateway to node, and from node to node, for a message.
    hop_s: float = 0.0002
    #: Seconds from a client's sending to the gateway's decision, and from a frame to its tokens at the client.
    request_s: float = 0.0
    reply_s: float = 0.0
    #: An answer's tokens are in the prompt of the turn that continues it; False as where recorded prompts are replayed.
    answers_return: bool = True


class _Visit:
    """One turn of the trace in this world: what its client and the engines that answer it know."""

    __slots__ = (
        "_prompts", "attempt", "came_at", "came_tokens", "gateway", "output_tokens", "prompt_tokens", "served", "turn",
    )  # fmt: skip

    def __init__(self, turn: TracedTurn, served: Served, gateway: GatewayId, prompts: Prompts) -> None:
        self.turn = turn
        self.served = served
        self.gateway = gateway
        self.prompt_tokens = max(1, turn.input_tokens)
        self.output_tokens = max(1, turn.output_tokens)
        self._prompts = prompts
        #: What the node that answers calls it.
        self.attempt: RequestId | None = None
        #: Tokens that came from nodes which do not answer it any more, and when the newest of them did.
        self.came_tokens = 0
        self.came_at = 0.0

    def generated(self) -> tuple[BlockHash, ...]:
        """Return the names of the blocks that the answer fills."""
        return self._prompts.generated(self.turn)

    def given(self) -> tuple[BlockHash, ...]:
        """Return the names of the blocks that the prompt and what came of the answer fill."""
        before = self._prompts.of(self.turn)
        end = (self.prompt_tokens + self.came_tokens) // self._prompts.block_tokens
        return (*before, *self.generated())[:end]


class World:
    """One run of a trace through a cluster. Deterministic: equal arguments give equal outcomes, but for `wall_s`."""

    def __init__(self, resolved: Resolved, turns: Sequence[TracedTurn], options: WorldOptions | None = None) -> None:
        self._options = options = options or WorldOptions()
        self._config = config = resolved.config
        self._turns = turns
        self._random = Random(options.seed)
        self._digest = blake2b(digest_size=16)
        self.agenda = Agenda()
        self.clusters = {GatewayId(number): Cluster(GatewayId(number), config) for number in range(config.gateway.count)}
        self.nodes: dict[NodeId, SimulatedNode] = {}
        self.uses: dict[PoolName, PoolUse] = {}
        self.gaps_s = Distribution()
        self._incarnations: dict[NodeId, int] = {}
        #: Gateways that stand still, and those of them that were killed and are not back.
        self._hung: dict[GatewayId, None] = {}
        self._away: dict[GatewayId, None] = {}
        #: How many times as long the steps of slow nodes take.
        self._slowness: dict[NodeId, float] = {}
        self._network = Network(self.agenda, options.hop_s, options.faults, self._random)
        self.transfers = Transfers(self.agenda, self._network, self._tell_node, self._moved, options.faults, self._random)
        self._pools = {PoolName(pool.name): pool for pool in config.pools}
        #: By model: what its blocks are called; the longest prompt that its nodes take; and, for an optimal cache, the future.
        self._prompts: dict[ModelName, Prompts] = {}
        self._prompt_tokens_max: dict[ModelName, int] = {}
        self._futures: dict[ModelName, Future] = {}
        for model in map(ModelName, config.models):
            self._add_model(model)
        self._agents = Agents(turns, options.hints)
        #: Blocks of each agent's last context, where agents have those brought back.
        self._last_blocks: dict[tuple[str, str], int] = {}
        self._timers = Timers(self.agenda)
        #: By host, in a cluster that has them; and what is in the storage that they share.
        self.stores: dict[str, SimulatedStore] = {}
        self._shared: Shared = {}
        self._below: dict[str, Below] = {}
        #: Pools whose nodes read what is in `cmx` by themselves.
        self._direct = frozenset(name for name, below in resolved.below.items() if below.direct)
        self._store_use = StoreUse() if config.store is not None else None
        #: Whether a gateway cannot know that it missed a node's last batch, since no later one has shown the gap.
        self.unaware: dict[tuple[GatewayId, NodeId], bool] = {}
        #: Requests under way.
        self.visits: dict[RequestId, _Visit] = {}
        self._requests = 0
        self._ended = 0
        self._cluster_events = 0
        self._node_events = 0
        self.served: list[Served] = []
        self._progress: Callable[[float], None] | None = None
        self._checks = Checks(self) if options.checks else None
        if config.store is not None:
            self._add_stores(config.store, resolved)
        for pool in config.serving_pools:
            self._add_pool(pool, resolved)
        if options.faults is not None:
            self._plan_faults(options.faults)
        self._plan_arrivals()

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[float], None] | None = None) -> Outcome:
        """Let everything happen and return what it amounted to.

        Raises:
            Stuck: nothing is left to happen and requests are unfinished: a bug of the core or of this world.
        """
        began = time.perf_counter()
        gc.freeze()
        gc.disable()  # nothing cyclic is dropped on the way, and there are millions of block names to look through in vain
        try:
            return self._run(began, progress)
        finally:
            gc.enable()
            gc.unfreeze()

    def _run(self, began: float, progress: Callable[[float], None] | None) -> Outcome:
        self._progress = progress
        agenda, checks = self.agenda, self._checks
        last_arrival_s = max((turn.arrival_s for turn in self._turns), default=0.0)
        interval_s, sample_at = max(last_arrival_s, 1.0) / (SAMPLES_MAX / 2), 0.0
        while (due := agenda.next_at) is not None and self._ended < len(self._turns):
            while due > sample_at:
                interval_s = self._sample(sample_at, interval_s)
                sample_at += interval_s
            if checks is None:
                agenda.run(until=sample_at)
            else:
                agenda.step()
                checks.after_event()
        self._settle(checks)
        starts = [served.arrived_s for served in self.served]
        ends = [served.ended_s for served in self.served if served.ended_s is not None]
        for simulated in self.nodes.values():
            simulated.use.count(simulated.load)
        return Outcome(
            served=self.served,
            pools=self.uses,
            itl_s=self.gaps_s,
            stores=self._store_use,
            duration_s=max(ends, default=0.0) - min(starts, default=0.0),
            wall_s=time.perf_counter() - began,
            events=self._cluster_events + self._node_events + self._events_now(),
            digest=self._digest.hexdigest() if self._options.digest else "",
        )

    def _events_now(self) -> int:
        """Return the calls of nodes and stores that have not crashed since."""
        return sum(one.events for one in self.nodes.values()) + sum(one.events for one in self.stores.values())

    def _settle(self, checks: Checks | None) -> None:
        """See that every request ended; with checks, let what is still on its way arrive and look at what is left."""
        if self._ended < len(self._turns):
            raise Stuck(self.agenda.now, [visit.turn.id for visit in self.visits.values()], len(self._turns) - self._ended)
        if checks is not None:
            while len(self.agenda):
                self.agenda.step()
                checks.after_event()
            checks.at_the_end()

    def _sample(self, at: float, interval_s: float) -> float:
        """Note the pools' state; return the interval, which doubles whenever there are too many samples."""
        for name, use in self.uses.items():
            loads = [simulated.load for simulated in self.nodes.values() if simulated.spec.pool == name]
            use.samples.append(
                PoolSample(
                    at_s=at,
                    running=sum(load.running for load in loads),
                    waiting=sum(load.waiting for load in loads),
                    blocks_used=sum(load.blocks_used for load in loads),
                    blocks_cached=sum(load.blocks_cached for load in loads),
                    blocks_free=sum(load.blocks_free for load in loads),
                )
            )
            if len(use.samples) >= SAMPLES_MAX:
                del use.samples[1::2]
        self._sample_stores()
        full = any(len(use.samples) == SAMPLES_MAX // 2 and at > interval_s * SAMPLES_MAX / 2 for use in self.uses.values())
        return 2 * interval_s if full else interval_s

    def _sample_stores(self) -> None:
        use = self._store_use
        if use is None:
            return
        loads = [one.store.load(stored.model) for one in self.stores.values() for stored in one.spec.models]
        use.slots_held.append(sum(load.slots_used + load.slots_cached for load in loads))
        use.segments.append(sum(map(len, self._shared.values())))
        for samples in (use.slots_held, use.segments):
            if len(samples) >= SAMPLES_MAX:
                del samples[1::2]

    # --- the agents ---------------------------------------------------------------------------------------------------

    def _add_model(self, model: ModelName) -> None:
        pools = self._config.pools_of(model)
        turns = [turn for turn in self._turns if self._model_of(turn) == model]
        limit = max(pool.engine.context_tokens_max or CONTEXT_TOKENS_DEFAULT for pool in pools)
        prompts = Prompts(turns, pools[0].engine.block_tokens, self._options.answers_return)
        self._prompts[model], self._prompt_tokens_max[model] = prompts, limit
        if self._options.optimal_cache:
            self._futures[model] = Future([turn for turn in self._ordered(turns) if turn.input_tokens <= limit], prompts)

    def _ordered(self, turns: Sequence[TracedTurn]) -> list[TracedTurn]:
        """Return turns in the order in which they are expected to come."""
        place = {number: index for index, number in enumerate(self._options.order)}
        return sorted(turns, key=lambda turn: place.get(turn.id, len(place)))

    def _plan_arrivals(self) -> None:
        for turn in self._turns:
            if not turn.after:
                self.agenda.at(turn.arrival_s, self._arrive, turn)

    def _arrive(self, turn: TracedTurn) -> None:
        """Let a client send its turn."""
        gateway, session, model = self._place_of(turn)
        self._requests += 1
        request = request_id(gateway, self._requests)
        served = Served(turn, self.agenda.now)
        self.served.append(served)
        prompts = self._prompts[model]
        visit = self.visits[request] = _Visit(turn, served, gateway, prompts)
        fits = turn.input_tokens <= self._prompt_tokens_max[model]  # what is refused for its length needs no names
        hashes = prompts.of(turn) if fits else ()
        asked = Request(
            id=request,
            model=model,
            tenant=self._tenant_of(turn),
            prompt_tokens=visit.prompt_tokens,
            hashes=hashes,
            output_tokens_max=visit.output_tokens,
            session=session,
            service_class=self._config.class_for(self._tenant_of(turn)),
            timeout_s=self._config.limits.request_s_max,
        )
        self.agenda.at(self.agenda.now + self._options.request_s, self._ask, gateway, asked)
        faults = self._options.faults
        if faults is not None and self.agenda.now < faults.until_s and self._random.random() < faults.abandoned_share:
            self.agenda.at(self.agenda.now + self._random.uniform(0.0, faults.abandoned_s_max), self._abandon, request)

    def _ask(self, gateway: GatewayId, asked: Request) -> None:
        """Let a request reach its gateway, unless its client knows by now that this is gone."""
        if gateway in self._away and asked.id in self.visits:
            self._end(asked.id, "no gateway answers")
        elif asked.id in self.visits:
            self._tell_cluster(gateway, RequestArrived(asked))

    def _place_of(self, turn: TracedTurn) -> tuple[GatewayId, SessionId, ModelName]:
        """Return the gateway that a turn's session belongs to, the session, and the model."""
        session = SessionId(f"{turn.session}/{turn.agent}")
        gateway = owner_of(session, [one for one in self.clusters if one not in self._away] or self.clusters)
        return gateway, session, self._model_of(turn)

    @staticmethod
    def _tenant_of(turn: TracedTurn) -> TenantId:
        return TenantId(turn.tenant or "default")

    def _model_of(self, turn: TracedTurn) -> ModelName:
        """Return the model that a turn goes to: the one that answers to the recorded name, else the cluster's first."""
        named = self._config.named(turn.model)
        return named.model if named is not None else ModelName(next(iter(self._config.models)))

    def _abandon(self, request: RequestId) -> None:
        visit = self.visits.get(request)
        if visit is not None:
            self._tell_cluster(visit.gateway, RequestAbandoned(request))
            self._end(request, "abandoned by its client")

    def _end(self, request: RequestId, failure: str | None) -> None:
        """Give a client the end of its turn, and let the turns begin that waited for it."""
        visit = self.visits.pop(request)
        visit.served.ended_s = self.agenda.now + self._options.reply_s
        visit.served.failure = failure
        self._ended += 1
        if self._ended == len(self._turns):
            self.agenda.stop()
        if self._progress is not None and (self._ended % PROGRESS_EVERY == 0 or self._ended == len(self._turns)):
            self._progress(self._ended / len(self._turns))
        if failure is None and visit.turn.calls is not None:
            self._tell_of_answer(request, visit.turn)
        if self._options.hints is HintProgram.PREFETCH:
            self._last_blocks[visit.turn.session, visit.turn.agent] = len(visit.given())
        coming = self._agents.end(visit.turn)
        for turn in coming:
            self.agenda.at(visit.served.ended_s + turn.gap_s, self._arrive, turn)
        for told in self._agents.told(visit.turn, coming, self.agenda.now):
            gateway, session, model = self._place_of(told.turn)
            tenant = self._tenant_of(told.turn)
            if isinstance(told, Pause) and self._options.hints is HintProgram.PREFETCH:
                hashes = self._prompts[model].of(told.turn)[: self._last_blocks.get((told.turn.session, told.turn.agent), 0)]
                hint = Hint(Verb.TOOL_STARTED, tenant, f"before {told.turn.id}", told.tool, model, session, hashes)
                self._tell_cluster(gateway, HintAsked(replace(hint, tool_class=told.tool, expected_s=told.expected_s)))
            elif isinstance(told, Pause):
                self._tell_cluster(gateway, ToolStarted(model, tenant, session, told.tool, told.expected_s))
            else:
                self._tell_cluster(gateway, SessionEnded(model, tenant, session))

    def _tell_of_answer(self, request: RequestId, turn: TracedTurn) -> None:
        """Let a gateway have understood what a turn's model waits for."""
        gateway, session, model = self._place_of(turn)
        self._tell_cluster(gateway, Answered(request, model, self._tenant_of(turn), session, TOOL if turn.calls else ""))

    # --- gateways -----------------------------------------------------------------------------------------------------

    def _tell_cluster(self, gateway: GatewayId, event: ClusterEvent) -> None:
        if gateway in self._hung:
            return
        self._cluster_events += 1
        commands = self.clusters[gateway].handle(event, self.agenda.now)
        if self._options.digest:
            self._digest.update(repr(commands).encode())
        for command in commands:
            self._execute(gateway, command)

    def _execute(self, gateway: GatewayId, command: ClusterCommand) -> None:
        match command:
            case SetTimer(key, at):
                self._timers.set(gateway, key, at, self._tell_cluster, gateway, TimerFired(key))
            case ClearTimer(key):
                self._timers.clear(gateway, key)
            case Assign(node, assignment):
                visit = self.visits[request_of(assignment.request)]
                served = visit.served
                if assignment.role is Role.PREFILL:
                    served.prefill = node
                else:
                    served.node, visit.attempt = node, assignment.request
                    served.replayed_tokens += assignment.generated_tokens
                self._network.send(gateway, node, self._tell_node, node, Assigned(assignment))
            case Cancel(node, request):
                self._network.send(gateway, node, self._tell_node, node, Cancelled(request))
            case ReportSourceLost(node, request, source):
                self._network.send(gateway, node, self._tell_node, node, SourceLost(request, source))
            case Expect(node, outlook):
                self._network.send(gateway, node, self._tell_node, node, Expected(outlook))
            case RequestResync(node, after):
                self._network.send(gateway, node, self._tell_node, node, ResyncRequested(gateway, after))
            case RequestStoreResync(store, model, after):
                self._network.send(gateway, store, self._resync_store, store, gateway, model, after)
            case Complete(request, ended, cached_tokens):
                served = self.visits[request].served
                served.cached_tokens, served.output_tokens = cached_tokens, ended.output_tokens
                served.cpu_tokens, served.cmx_tokens = command.cpu_tokens, command.cmx_tokens
                self._end(request, None)
            case Refuse(request, status, code, message) | Abort(request, status, code, message):
                if request in self.visits:  # an abandoned one has ended already
                    self._end(request, f"{status} {code}: {message}")
            case Restart(request):
                served = self.visits[request].served
                served.restarts += 1
                served.prefill = None
                self.visits[request].came_tokens = 0
            case Resume(request):
                visit = self.visits[request]
                visit.served.resumes += 1
                visit.served.prefill = None
                resumed = Resumed(request, visit.came_tokens, visit.given())
                self.agenda.at(self.agenda.now, self._tell_cluster, gateway, resumed)
            case PlaceLease(lease, _, nodes, stores):
                for node in nodes:
                    self._network.send(gateway, node, self._tell_node, node, LeasePlaced(lease))
                self._tell_stores(gateway, stores, LeasePlaced(lease))
            case EndLease(lease, _, nodes, stores):
                for node in nodes:
                    self._network.send(gateway, node, self._tell_node, node, LeaseEnded(lease.id, lease.revision))
                self._tell_stores(gateway, stores, LeaseEnded(lease.id, lease.revision))
            case EvictBlocks(_, hashes, first_block, at_once, nodes):
                for node in nodes:
                    self._network.send(gateway, node, self._tell_node, node, BlocksRetired(hashes, first_block, at_once))
            case RetainBlocks(_, hashes, outlook, nodes):
                for node in nodes:
                    self._network.send(gateway, node, self._tell_node, node, BlocksRetained(hashes, outlook))
            case PrefetchStored(model, hashes, blocks, stores):
                self._tell_stores(gateway, stores, PrefetchAsked(model, hashes, blocks))
            case PrefetchBlocks(node, prefetch):
                self._network.send(gateway, node, self._tell_node, node, BlocksWanted(prefetch))
            case CancelPrefetch(node, prefetch):
                self._network.send(gateway, node, self._tell_node, node, PrefetchCancelled(prefetch))
            case EvictStored(model, hashes, first, end, tier, demote, stores):
                self._tell_stores(gateway, stores, EvictAsked(model, hashes, first, end, tier, demote))
            case AnswerHint():
                pass  # simulated harnesses go on whatever they are answered
            case _:
                assert_never(command)

    def _on_report(self, gateway: GatewayId, report: NodeReported, incarnation: int) -> None:
        """Take a node's frame in, unless it is from before a crash, or nobody reads it."""
        if self._incarnations[report.node] != incarnation or gateway in self._hung:
            return
        for first in report.first_tokens:
            visit = self.visits.get(request_of(first.request))
            if visit is not None and visit.attempt == first.request and visit.served.first_token_s is None:
                visit.served.first_token_s = self.agenda.now + self._options.reply_s
        self._tell_cluster(gateway, report)

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _add_pool(self, pool: PoolConfig, resolved: Resolved) -> None:
        name, below = PoolName(pool.name), resolved.below.get(PoolName(pool.name))
        hardware = resolved.hardware.get(name)
        known = below.pool_block_bytes if below is not None else hardware.block_bytes if hardware is not None else 0
        blocks = pool.engine.blocks or BLOCKS_DEFAULT
        split = split_use(hardware.machine) if hardware is not None else None
        beat = BeatUse(pool.profile.beat_s) if pool.kind is PoolKind.LPX else None
        self.uses[name] = PoolUse(nodes=pool.nodes, blocks=blocks * pool.nodes, split=split, beat=beat)
        for number in range(pool.nodes):
            spec = pool.node_spec(
                pool.node_id(number),
                1,
                node_profile(pool),
                blocks=blocks,
                block_tokens=pool.engine.block_tokens,
                block_bytes=known,
                context_tokens_max=pool.engine.context_tokens_max or CONTEXT_TOKENS_DEFAULT,
                host=host_of(pool, number, below) if below is not None else "",
                stores=below is not None,
            )
            self._start_node(spec)

    def _start_node(self, spec: NodeSpec) -> None:
        """Start a node, in place of a crashed one if there was one."""
        pool = self._pools[spec.pool]
        self.nodes[spec.id] = SimulatedNode(
            spec,
            Node(spec, pool.scheduler, self._pool_of(spec)),
            self.agenda,
            self.uses[spec.pool],
            self.gaps_s,
            self._obey,
            self.visit_of,
            pool.engine.speculation.acceptance,
            self._options.stepwise,
        )
        self.nodes[spec.id].set_slowness(self._slowness.get(spec.id, 1.0))
        self._incarnations[spec.id] = spec.incarnation
        if spec.stores:
            self.stores[spec.host].attach(spec)
        for gateway in self.clusters:
            if spec.incarnation == 1:  # here before the first client
                self._tell_cluster(gateway, NodeJoined(spec))
            else:
                self._network.send(spec.id, gateway, self._tell_cluster, gateway, NodeJoined(spec))

    def _pool_of(self, spec: NodeSpec) -> BlockPool | None:
        """Return the pool of a node that is to forget by a rule which no node has; None for its own."""
        if spec.model in self._futures:
            return OptimalPool(spec.blocks, self._futures[spec.model])
        return FrequencyPool(spec.blocks) if self._options.frequency_cache else None

    # --- stores -------------------------------------------------------------------------------------------------------

    def _add_stores(self, config: StoreConfig, resolved: Resolved) -> None:
        """Start a store on every host."""
        for pool in self._config.serving_pools:
            below = resolved.below[PoolName(pool.name)]
            for number in range(pool.nodes):
                self._below[host_of(pool, number, below)] = below
            self._shared.setdefault(ModelName(pool.model), {})
        for spec in store_specs(config, resolved):
            self._start_store(spec)

    def _start_store(self, spec: StoreSpec) -> None:
        """Start a store, in place of a crashed one if there was one."""
        use, config = self._store_use, self._config.store
        assert use is not None
        assert config is not None
        if spec.incarnation == 1:
            use.hosts += 1
            use.slots += sum(model.slots for model in spec.models)
        simulated = self.stores[spec.host] = SimulatedStore(
            spec,
            config,
            self._below[spec.host].cpu_latency_s,
            self.agenda,
            self._network,
            self._timers,
            self._shared,
            self._direct,
            use,
            self._tell_node,
            self._report_store,
            self._options.faults,
            self._random,
        )
        for node in self.nodes.values():
            if node.alive and node.spec.host == spec.host:
                simulated.attach(node.spec)
        for gateway in self.clusters:
            if spec.incarnation == 1:
                self._tell_cluster(gateway, StoreJoined(spec))
            else:
                self._network.send(spec.id, gateway, self._tell_cluster, gateway, StoreJoined(spec))
        if config.cmx:
            simulated.found()

    def _report_store(self, simulated: SimulatedStore, report: StoreReported, gateway: GatewayId | None) -> None:
        """Send what a store says of a model to gateways, or to the one that asked."""
        spec = simulated.spec
        for one in self.clusters if gateway is None else (gateway,):
            self._network.send(spec.id, one, self._on_store_report, one, report, spec)

    def _on_store_report(self, gateway: GatewayId, report: StoreReported, spec: StoreSpec) -> None:
        """Take a store's frame in, unless it is from before a crash, or nobody reads it."""
        if self.stores[spec.host].spec.incarnation == spec.incarnation and gateway not in self._hung:
            self._tell_cluster(gateway, report)

    def _tell_stores(self, gateway: GatewayId, stores: Sequence[StoreId], event: StoreEvent) -> None:
        for simulated in self.stores.values():
            if simulated.spec.id in stores:
                self._network.send(gateway, simulated.spec.id, simulated.tell, event)

    def _resync_store(self, store: StoreId, gateway: GatewayId, model: ModelName, after: int | None) -> None:
        for simulated in self.stores.values():
            if simulated.spec.id == store:
                simulated.resync(gateway, model, after)

    def visit_of(self, request: RequestId) -> _Visit:
        """Return what an engine must know of a request; one that has ended meanwhile is as good as answered."""
        nobodys = next(iter(self._prompts.values()))
        return self.visits.get(request_of(request)) or _Visit(_NOBODY, Served(_NOBODY, 0.0), gateway_of(request), nobodys)

    def _tell_node(self, node: NodeId, event: NodeEvent) -> None:
        simulated = self.nodes[node]
        simulated.tell(event)

    def _obey(self, simulated: SimulatedNode, commands: Sequence[NodeCommand], at: float) -> None:
        """Execute what a node ordered at a time, and tell gateways what it wants them to know."""
        if self._options.digest:
            self._digest.update(repr(commands).encode())
        first_tokens: list[FirstToken] = []
        ended: list[Ended] = []
        batches: list[KvBatch] = []
        prefetches: list[PrefetchEnded] = []
        for command in commands:
            match command:
                case RunStep():
                    simulated.start(command, at)
                    if self._futures:
                        self._pass_by(simulated.spec.model, command)
                case PublishKv(new, gateway):
                    if gateway is None:
                        batches += new
                    else:
                        self._report(simulated, (gateway,), (), (), new)
                case TellLeases(placed, gone, asking):
                    told = LeasesTold(simulated.spec.id, placed, gone)
                    for gateway in self.clusters if asking is None else (asking,):
                        self._network.send(simulated.spec.id, gateway, self._tell_cluster, gateway, told)
                case ReportFirstToken(report):
                    first_tokens.append(report)
                case ReportEnded(report):
                    ended.append(report)
                case ReportPrefetchEnded(report):
                    prefetches.append(report)
                case Forget(request):
                    self._keep(simulated, request)
                case SetTimer(key, fires_at):
                    self._timers.set(simulated.spec.id, key, fires_at, self._tell_node, simulated.spec.id, TimerFired(key))
                case ClearTimer(key):
                    self._timers.clear(simulated.spec.id, key)
                case DropGateway():
                    pass  # a killed gateway's stream: the next start has another
                case Fetch():
                    self.transfers.start(simulated.spec, command)
                case SendBlocks():
                    self.transfers.carry(command)
                case StopFetch(request):
                    self.transfers.stop(simulated.spec.id, request)
                    if simulated.spec.stores:
                        self.stores[simulated.spec.host].stop_load(simulated.spec.id, request)
                case LoadBlocks():
                    self.stores[simulated.spec.host].load(simulated.spec, command)
                case Offer():
                    self.stores[simulated.spec.host].offer(simulated.spec, command)
                case StopOffer(offer):
                    self.stores[simulated.spec.host].stop_offer(simulated.spec.id, offer)
                case _:
                    assert_never(command)
        if simulated.node.news != simulated.news:
            simulated.news = simulated.node.news
            self._report(simulated, tuple(self.clusters), first_tokens, ended, batches, prefetches)

    def _keep(self, simulated: SimulatedNode, request: RequestId) -> None:
        """Let an engine forget a request; the tokens that it brought are its client's."""
        tokens, token_at = simulated.forget(request)
        visit = self.visits.get(request_of(request))
        if visit is not None and visit.attempt == request and tokens:
            visit.came_tokens, visit.came_at = tokens, token_at

    def _pass_by(self, model: ModelName, command: RunStep) -> None:
        """Let the future move on with turns whose prompts are computed: until then what they will find is wanted."""
        for part in command.slices[command.decoding :]:
            visit = self.visits.get(request_of(part.request))
            if visit is not None:
                self._futures[model].passed(visit.turn)

    def _report(
        self,
        simulated: SimulatedNode,
        gateways: Sequence[GatewayId],
        first_tokens: Sequence[FirstToken],
        ended: Sequence[Ended],
        batches: Sequence[KvBatch],
        prefetches: Sequence[PrefetchEnded] = (),
    ) -> None:
        """Send a node's frame to gateways: each gets its own requests' reports, all get load and holdings."""
        spec, load, faults = simulated.spec, simulated.load, self._options.faults
        several = len(self.clusters) > 1
        for gateway in gateways:
            kv = tuple(batches)
            if kv and faults is not None:
                lost = self.agenda.now < faults.until_s and self._random.random() < faults.lost_kv_share
                self.unaware[gateway, spec.id] = lost
                kv = () if lost else kv
            report = NodeReported(
                spec.id,
                load,
                tuple([first for first in first_tokens if gateway_of(first.request) == gateway] if several else first_tokens),
                tuple([end for end in ended if gateway_of(end.request) == gateway] if several else ended),
                kv,
                tuple([end for end in prefetches if gateway_of(end.prefetch) == gateway]),
            )
            self._network.send(spec.id, gateway, self._on_report, gateway, report, spec.incarnation)

    def _moved(self, reader: NodeId, size: int) -> None:
        self.nodes[reader].use.fetched_bytes += size

    # --- faults -------------------------------------------------------------------------------------------------------

    def _plan_faults(self, faults: Faults) -> None:
        nodes = list(self.nodes)
        for _ in range(faults.crashes):
            self.agenda.at(self._random.uniform(0.0, faults.until_s), self._crash, self._random.choice(nodes), faults)
        for _ in range(faults.hangs):
            self.agenda.at(self._random.uniform(0.0, faults.until_s), self._hang, self._random.choice(nodes), faults)
        for _ in range(faults.gateway_hangs):
            gateway = self._random.choice(list(self.clusters))
            self.agenda.at(self._random.uniform(0.0, faults.until_s), self._hang_gateway, gateway, faults)
        for _ in range(faults.store_crashes if self.stores else 0):
            host = self._random.choice(list(self.stores))
            self.agenda.at(self._random.uniform(0.0, faults.until_s), self._crash_store, host, faults)
        for node in self._random.sample(nodes, min(faults.slow_nodes, len(nodes))):
            self._slowness[node] = faults.slowness
            self.nodes[node].set_slowness(faults.slowness)
            self.agenda.at(faults.until_s, self._recover, node)

    def _recover(self, node: NodeId) -> None:
        """Let a slow node be as fast as it should be, whether it was started again meanwhile or not."""
        del self._slowness[node]
        self.nodes[node].set_slowness(1.0)

    def _crash(self, node: NodeId, faults: Faults) -> None:
        """Stop a node dead, and those that step with it; gateways notice after a while, and they come back empty."""
        for one in self._group_of(node):
            if self._stop(one):
                self.transfers.drop(one)
                self.agenda.at(self.agenda.now + faults.restart_s, self._restart, self.nodes[one].spec)

    def _hang(self, node: NodeId, faults: Faults) -> None:
        """Let a node stand still, and those that step with it: their connections stay until they are killed, so that whoever
        waits for them must be told.
        """
        for one in self._group_of(node):
            if self._stop(one):
                killed_at = self.agenda.now + self._config.cluster.hung_s
                self.agenda.at(killed_at, self.transfers.drop, one)
                self.agenda.at(killed_at + faults.restart_s, self._restart, self.nodes[one].spec)

    def _group_of(self, node: NodeId) -> list[NodeId]:
        """Return the nodes that cannot go on without a node: those that share experts or a whole FFN half with it."""
        pool = self._pools[self.nodes[node].spec.pool]
        numbers, size = range(pool.nodes), pool.hardware.group_nodes if pool.hardware.chip else 1
        place = next(number for number in numbers if pool.node_id(number) == node)
        return [pool.node_id(number) for number in numbers if number // size == place // size]

    def _stop(self, node: NodeId) -> bool:
        """Let nothing happen to a node any more, and gateways notice after a while; False if it has stopped already."""
        simulated = self.nodes[node]
        if not simulated.alive:
            return False
        simulated.use.count(simulated.load)
        self._node_events += simulated.events
        simulated.events = 0
        simulated.crash()
        for request in simulated.answered:
            self._keep(simulated, request)
        self._incarnations[node] += 1
        self._timers.drop(node)
        lost_at = self.agenda.now + self._config.cluster.node_lost_s
        for gateway in self.clusters:
            self.agenda.at(lost_at, self._lose, gateway, node, self._incarnations[node])
        if simulated.spec.stores:
            self.stores[simulated.spec.host].detach(node)
        return True

    def _crash_store(self, host: str, faults: Faults) -> None:
        """Stop a store dead; gateways notice after a while, and it comes back with nothing but what is in `cmx`."""
        simulated = self.stores[host]
        if not simulated.alive:
            return
        simulated.crash()
        self._node_events += simulated.events
        simulated.events = 0
        lost_at = self.agenda.now + self._config.cluster.node_lost_s
        for gateway in self.clusters:
            self.agenda.at(lost_at, self._lose_store, gateway, simulated)
        self.agenda.at(self.agenda.now + faults.restart_s, self._restart_store, simulated.spec)

    def _lose_store(self, gateway: GatewayId, simulated: SimulatedStore) -> None:
        """Let a gateway give a store up, unless it is back by now."""
        if self.stores[simulated.spec.host] is simulated:
            self._tell_cluster(gateway, StoreLost(simulated.spec.id, "it stopped answering"))

    def _restart_store(self, spec: StoreSpec) -> None:
        self._start_store(replace(spec, incarnation=spec.incarnation + 1))

    def _hang_gateway(self, gateway: GatewayId, faults: Faults) -> None:
        """Let a gateway stand still until it is killed: nodes notice that nothing comes of it any more."""
        if gateway in self._hung:
            return
        self._hung[gateway] = None
        self._timers.drop(gateway)
        for node in self.nodes:
            heard = GatewayHeard(gateway, self._config.cluster.node_lost_s)
            self._network.send(gateway, node, self._tell_node, node, heard)
        killed_at = self.agenda.now + self._config.cluster.hung_s
        self.agenda.at(killed_at, self._kill_gateway, gateway)
        self.agenda.at(killed_at + faults.restart_s, self._restart_gateway, gateway)

    def _kill_gateway(self, gateway: GatewayId) -> None:
        """End the connections of a gateway's clients."""
        self._away[gateway] = None
        for request in [request for request, visit in self.visits.items() if visit.gateway == gateway]:
            self._end(request, "its gateway was lost")

    def _restart_gateway(self, gateway: GatewayId) -> None:
        """Start a gateway anew, which knows nothing; nodes end what they still have of the former one."""
        del self._hung[gateway], self._away[gateway]
        self.clusters[gateway] = Cluster(gateway, self._config)
        for node, simulated in self.nodes.items():
            self._network.send(gateway, node, self._tell_node, node, GatewayLost(gateway))
            if simulated.alive:
                self._tell_cluster(gateway, NodeJoined(simulated.spec))
        for store in self.stores.values():
            if store.alive:
                self._tell_cluster(gateway, StoreJoined(store.spec))

    def _lose(self, gateway: GatewayId, node: NodeId, incarnation: int) -> None:
        """Let a gateway give a node up, unless it is back by now."""
        if self._incarnations[node] == incarnation and not self.nodes[node].alive:
            self._tell_cluster(gateway, NodeLost(node, "it stopped answering"))

    def _restart(self, spec: NodeSpec) -> None:
        self._start_node(replace(spec, incarnation=spec.incarnation + 1))


#: Stands for the turn of a request that is over: a node which still works on it may stop after one token.
_NOBODY = TracedTurn(-1, "", "", 0.0, (), 0.0, 1, 1, 0, ())
