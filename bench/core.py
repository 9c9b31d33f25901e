"""Measures the decision core alone: one cluster and its nodes in virtual time, no sockets, no asyncio, no engine.

    python -m bench.core [--quick] [--digest] [--json FILE]

Agents' turns run through `Cluster` and `Node` as they would live; an event is one call of `handle` on either. Besides, the time
of a routing decision (the whole handling of an arriving request) at three prompt lengths over 64 nodes. `--digest` prints a hash
of every command of a fixed run instead: it must not depend on the process, its hash seed or the machine. Times are CPU times of
this process, which has one thread, so that what else runs on the machine disturbs them little.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.commands import (
    Assign,
    Cancel,
    ClearTimer,
    ClusterCommand,
    Complete,
    Expect,
    Fetch,
    Forget,
    NodeCommand,
    PublishKv,
    ReportEnded,
    ReportFirstToken,
    RequestResync,
    RunStep,
    SendBlocks,
    SetTimer,
    StopFetch,
)
from orchestrator.core.config import ClusterConfig, PoolConfig, RouterConfig, RouterPolicy, SchedulerConfig
from orchestrator.core.cost.costs import step_seconds
from orchestrator.core.events import (
    Assigned,
    BlocksSent,
    Cancelled,
    ClusterEvent,
    Ended,
    Expected,
    ExportClosed,
    ExportOpened,
    FetchEnded,
    FetchProgressed,
    FirstToken,
    NodeEvent,
    NodeJoined,
    NodeReported,
    RequestArrived,
    ResyncRequested,
    SliceResult,
    StepFinished,
    TimerFired,
)
from orchestrator.core.node.node import Node
from orchestrator.core.timers import ClusterTimer, NodeTimer
from orchestrator.core.types import (
    BlockHash,
    CostProfile,
    ExportId,
    FinishReason,
    GatewayId,
    KvBatch,
    Load,
    ModelName,
    NodeId,
    NodeSpec,
    PoolKind,
    PoolName,
    Request,
    RequestId,
    Role,
    SessionId,
    StoredRun,
    TenantId,
    request_id,
)

BLOCK_TOKENS = 64
SYSTEM_BLOCKS = 32
#: Seconds from gateway to node and from node to node.
HOP_S = 0.0002
#: About one H200 with a model of eight billion parameters; only the order of magnitude matters here.
PROFILE = CostProfile(
    step_s=0.005,
    prefill_token_s=2e-5,
    prefill_token_context_s=2e-10,
    sequence_s=2e-5,
    context_token_s=2e-8,
    fetch_bytes_per_s=2e10,
)
MODEL = ModelName("default")
GATEWAY = GatewayId(0)


def node_spec(kind: PoolKind, number: int) -> NodeSpec:
    """Return a node of the measured cluster."""
    return NodeSpec(
        id=NodeId(f"{kind.value}-{number}"),
        model=MODEL,
        pool=PoolName(kind.value),
        kind=kind,
        incarnation=1,
        blocks=8192,
        block_tokens=BLOCK_TOKENS,
        block_bytes=8 << 20,
        sequences_max=256,
        step_tokens_max=2048,
        context_tokens_max=500_000,
        profile=PROFILE,
    )


def cluster_config(nodes: dict[PoolKind, int], policy: RouterPolicy = RouterPolicy.PREDICTED_TIME) -> ClusterConfig:
    """Return a cluster file's content with one pool of each kind."""
    pools = tuple(PoolConfig(name=kind.value, kind=kind, nodes=count) for kind, count in nodes.items())
    return ClusterConfig(pools=pools, router=RouterConfig(policy=policy))


def block_name(session: int, index: int) -> BlockHash:
    """Return the name of a session's block; the first ones, the system prompt, are everybody's."""
    owner = 0 if index < SYSTEM_BLOCKS else session
    return BlockHash(owner.to_bytes(8, "little") + index.to_bytes(8, "little"))


@dataclass(slots=True)
class Agent:
    """One session: its context grows by what it generates and by what its tools return."""

    number: int
    turns: int
    context_tokens: int = SYSTEM_BLOCKS * BLOCK_TOKENS
    names: list[BlockHash] = field(default_factory=list)

    def hashes(self, tokens: int) -> tuple[BlockHash, ...]:
        """Return the names of the context's full blocks."""
        for index in range(len(self.names), tokens // BLOCK_TOKENS):
            self.names.append(block_name(self.number, index))
        return tuple(self.names[: tokens // BLOCK_TOKENS])


@dataclass(slots=True)
class Turn:
    """A turn under way, as an engine sees it."""

    agent: Agent
    prompt_tokens: int
    output_tokens: int
    generated: int = 0


@dataclass(slots=True)
class Transfer:
    """Blocks on their way from node to node."""

    reader: NodeId
    source: NodeId
    request: RequestId


@dataclass(slots=True)
class Totals:
    """What a run amounted to."""

    cluster_events: int = 0
    node_events: int = 0
    completed: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class World:
    """One cluster and its nodes, wired back to back in virtual time."""

    def __init__(self, nodes: dict[PoolKind, int], agents: int, turns: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.totals = Totals()
        self.now = 0.0
        self.digest = blake2b(digest_size=16)
        self.digests = False
        #: Every event with who took it and when, None for the cluster; None while nothing is recorded.
        self.record: list[tuple[NodeId | None, Any, float]] | None = None
        self.cluster = Cluster(GATEWAY, cluster_config(nodes))
        specs = [node_spec(kind, number) for kind, count in nodes.items() for number in range(count)]
        self.nodes = {spec.id: Node(spec, SchedulerConfig()) for spec in specs}
        self.turns: dict[RequestId, Turn] = {}
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0
        self._requests = 0
        self._exports = 0
        self._transfers: dict[ExportId, Transfer] = {}
        self._timers: dict[tuple[NodeId | None, ClusterTimer | NodeTimer], int] = {}
        for spec in specs:
            self.later(0.0, self.tell_cluster, NodeJoined(spec))
        for number in range(1, agents + 1):
            self.later(self.random.uniform(0.01, 2.0), self.start_turn, Agent(number, turns))

    def later(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Do something after a while; what is due at one moment happens in the order it was asked for."""
        self._serial += 1
        heappush(self._heap, (self.now + delay_s, self._serial, action, arguments))

    def run(self) -> None:
        """Go on until all agents are done."""
        heap = self._heap
        while heap:
            self.now, _, action, arguments = heappop(heap)
            action(*arguments)
        assert not self.turns, f"{len(self.turns)} turns never ended"

    # --- agents -------------------------------------------------------------------------------------------------------

    def start_turn(self, agent: Agent) -> None:
        agent.context_tokens += self.random.randrange(50, 2000)
        prompt = agent.context_tokens
        self._requests += 1
        request = request_id(GATEWAY, self._requests)
        self.turns[request] = Turn(agent, prompt, self.random.randrange(20, 200))
        session, tenant = SessionId(str(agent.number)), TenantId("bench")
        self.tell_cluster(RequestArrived(Request(request, MODEL, tenant, prompt, agent.hashes(prompt), 256, session)))

    def end_turn(self, command: Complete) -> None:
        turn = self.turns.pop(command.request)
        totals = self.totals
        totals.completed += 1
        totals.prompt_tokens += turn.prompt_tokens
        totals.cached_tokens += command.cached_tokens
        turn.agent.context_tokens += turn.generated
        turn.agent.turns -= 1
        if turn.agent.turns:
            self.later(self.random.uniform(0.05, 2.0), self.start_turn, turn.agent)

    # --- the cluster --------------------------------------------------------------------------------------------------

    def tell_cluster(self, event: ClusterEvent) -> None:
        self.totals.cluster_events += 1
        if self.record is not None:
            self.record.append((None, event, self.now))
        commands = self.cluster.handle(event, self.now)
        if self.digests:
            self.digest.update(repr(commands).encode())
        for command in commands:
            self._execute(command)

    def _execute(self, command: ClusterCommand) -> None:
        match command:
            case SetTimer():
                self._set_timer(None, command.key, command.at, self.tell_cluster, TimerFired(command.key))
            case ClearTimer():
                self._timers.pop((None, command.key), None)
            case Assign():
                self.later(HOP_S, self.tell_node, command.node, Assigned(command.assignment))
            case Complete():
                self.end_turn(command)
            case Cancel():
                self.later(HOP_S, self.tell_node, command.node, Cancelled(command.request))
            case Expect():
                self.later(HOP_S, self.tell_node, command.node, Expected(command.outlook))
            case RequestResync():
                self.later(HOP_S, self.tell_node, command.node, ResyncRequested(GATEWAY, command.after))
            case _:
                raise AssertionError(f"this run has no place for {command}")

    # --- nodes --------------------------------------------------------------------------------------------------------

    def tell_node(self, node: NodeId, event: NodeEvent) -> None:
        self.totals.node_events += 1
        if self.record is not None:
            self.record.append((node, event, self.now))
        state = self.nodes[node]
        commands = state.handle(event, self.now)
        if self.digests:
            self.digest.update(repr(commands).encode())
        first_tokens: list[FirstToken] = []
        ended: list[Ended] = []
        kv: list[KvBatch] = []
        for command in commands:
            match command:
                case ReportFirstToken():
                    first_tokens.append(command.report)
                case ReportEnded():
                    ended.append(command.report)
                case PublishKv():
                    kv += command.batches
                case _:
                    self._obey(node, command)
        if first_tokens or ended or kv or type(event) is StepFinished:
            report = NodeReported(node, state.load(), tuple(first_tokens), tuple(ended), tuple(kv))
            self.later(HOP_S, self.tell_cluster, report)

    def _obey(self, node: NodeId, command: NodeCommand) -> None:
        match command:
            case RunStep():
                self._run_step(node, command)
            case SetTimer():
                self._set_timer(node, command.key, command.at, self.tell_node, node, TimerFired(command.key))
            case ClearTimer():
                self._timers.pop((node, command.key), None)
            case Forget():
                pass
            case Fetch():
                self._open(node, command)
            case SendBlocks():
                self.later(HOP_S, self._deliver, command)
            case StopFetch():
                raise AssertionError("this run cancels nothing that fetches")
            case _:
                raise AssertionError(f"a report came this far: {command}")

    def _run_step(self, node: NodeId, command: RunStep) -> None:
        results: list[SliceResult] = []
        prefills: list[tuple[int, int]] = []
        sequences = context = 0
        for part in command.slices:
            if part.count == 1:
                sequences += 1
                context += part.start
            else:
                prefills.append((part.count, part.start))
            if not part.sample:
                results.append(SliceResult(part.request))
                continue
            turn = self.turns[part.request]
            turn.generated += 1
            end = part.start + part.count
            named = (block_name(turn.agent.number, end // BLOCK_TOKENS - 1),) if end % BLOCK_TOKENS == 0 else ()
            if end <= turn.prompt_tokens:
                named = ()
            results.append(SliceResult(part.request, 1, named, turn.generated >= turn.output_tokens))
        self.totals.tokens += len(results)
        seconds = step_seconds(PROFILE, prefills, sequences, context)
        self.later(seconds, self.tell_node, node, StepFinished(command.step, tuple(results), seconds))

    def _open(self, node: NodeId, fetch: Fetch) -> None:
        self._exports += 1
        export = ExportId(self._exports)
        self._transfers[export] = Transfer(node, fetch.source, fetch.request)
        opened = ExportOpened(
            export, fetch.request, fetch.hashes, fetch.first_block, fetch.tokens, fetch.pending, fetch.incarnation
        )
        self.later(HOP_S, self.tell_node, fetch.source, opened)

    def _deliver(self, command: SendBlocks) -> None:
        transfer = self._transfers[command.export]
        self.tell_node(transfer.source, BlocksSent(command.export, command.blocks))
        if not command.final:
            self.tell_node(transfer.reader, FetchProgressed(transfer.request, command.tokens))
            return
        del self._transfers[command.export]
        self.later(HOP_S, self.tell_node, transfer.source, ExportClosed(command.export))
        self.tell_node(transfer.reader, FetchEnded(transfer.request, command.tokens, command.computed_tokens))

    # --- timers -------------------------------------------------------------------------------------------------------

    def _set_timer(
        self, owner: NodeId | None, key: ClusterTimer | NodeTimer, at: float, action: Callable[..., None], *arguments: Any
    ) -> None:
        self.later(at - self.now, self._fire, (owner, key), self._serial + 1, action, arguments)
        self._timers[owner, key] = self._serial

    def _fire(
        self,
        name: tuple[NodeId | None, ClusterTimer | NodeTimer],
        serial: int,
        action: Callable[..., None],
        arguments: tuple[Any, ...],
    ) -> None:
        if self._timers.get(name) == serial:
            del self._timers[name]
            action(*arguments)


LAYOUTS: dict[str, dict[PoolKind, int]] = {
    "aggregated": {PoolKind.AGGREGATED: 8},
    "apart": {PoolKind.PREFILL: 4, PoolKind.DECODE: 8},
}


def measure_events(agents: int, turns: int, repetitions: int) -> list[dict[str, Any]]:
    """Run agents' turns through each layout: with the driver's own time, and the same events again without a driver."""
    rows: list[dict[str, Any]] = []
    for name, layout in LAYOUTS.items():
        driven: list[float] = []
        alone: list[float] = []
        totals = Totals()
        for _ in range(repetitions):
            world = World(layout, agents, turns, seed=1)
            start = time.process_time()
            world.run()
            seconds = time.process_time() - start
            totals = world.totals
            events = totals.cluster_events + totals.node_events
            driven.append(events / seconds)
            alone.append(events / _replay_seconds(layout, agents, turns))
        row = {"layout": name, "nodes": sum(layout.values()), "turns": totals.completed}
        row |= {"events": totals.cluster_events + totals.node_events}
        row |= {"events_per_s": statistics.median(driven), "core_events_per_s": statistics.median(alone)}
        rows.append(row | {"cached_share": totals.cached_tokens / totals.prompt_tokens})
    return rows


def _replay_seconds(layout: dict[PoolKind, int], agents: int, turns: int) -> float:
    """Record a run's events, then give them to a fresh cluster and fresh nodes and time only that."""
    recorded, fresh = World(layout, agents, turns, seed=1), World(layout, agents, turns, seed=1)
    recorded.record = []
    recorded.run()
    machines: dict[NodeId | None, Cluster | Node] = {None: fresh.cluster, **fresh.nodes}
    steps = [(machines[who].handle, event, now) for who, event, now in recorded.record]
    gc.collect()
    start = time.process_time()
    for handle, event, now in steps:
        handle(event, now)
    return time.process_time() - start


ROUTE_TOKENS = (1_024, 32_768, 400_000)
ROUTE_BLOCK_TOKENS = 16


def measure_routes(decisions: int) -> list[dict[str, Any]]:
    """Time arriving requests of a known session: all nodes hold a tenth of its context, one holds nearly all."""
    rows: list[dict[str, Any]] = []
    layouts = {"aggregated": {PoolKind.AGGREGATED: 64}, "apart": {PoolKind.PREFILL: 32, PoolKind.DECODE: 32}}
    for name, layout in layouts.items():
        for tokens in ROUTE_TOKENS:
            times = _route_times(layout, tokens, decisions)
            row = {"layout": name, "nodes": 64, "tokens": tokens, "p50_us": statistics.median(times)}
            rows.append(row | {"p99_us": statistics.quantiles(times, n=100)[-1]})
    return rows


def _route_times(layout: dict[PoolKind, int], tokens: int, decisions: int) -> list[float]:
    cluster = Cluster(GATEWAY, cluster_config(layout))
    generator = random.Random(tokens)
    context = [BlockHash(generator.randbytes(16)) for _ in range(tokens // ROUTE_BLOCK_TOKENS)]
    specs = [node_spec(kind, number) for kind, count in layout.items() for number in range(count)]
    idle = Load(blocks_free=200_000)
    for number, spec in enumerate(specs):
        cluster.handle(NodeJoined(replace(spec, block_tokens=ROUTE_BLOCK_TOKENS, blocks=200_000)), 0.0)
        held = context if number == len(specs) - 1 else context[: len(context) // 10]
        batch = KvBatch(0, stored=(StoredRun(None, tuple(held)),), cleared=True)
        cluster.handle(NodeReported(spec.id, idle, kv=(batch,)), 0.0)
    times: list[float] = []
    for serial in range(1, decisions + 1):
        new = [BlockHash(generator.randbytes(16)) for _ in range(8)]
        hashes = (*context, *new)
        prompt = len(hashes) * ROUTE_BLOCK_TOKENS + 3
        request = Request(request_id(GATEWAY, serial), MODEL, TenantId("t"), prompt, hashes, 256, SessionId("s"))
        arrived = RequestArrived(request)
        start = time.process_time()
        commands = cluster.handle(arrived, float(serial))
        times.append((time.process_time() - start) * 1e6)
        _end_parts(cluster, commands, idle, float(serial))
        commands.clear()  # frees the hashes now, not while the next decision is timed
    return times


def _end_parts(cluster: Cluster, commands: Sequence[ClusterCommand], idle: Load, now: float) -> None:
    for command in commands:
        if isinstance(command, Assign):
            generates = command.assignment.role is Role.GENERATE
            reason = FinishReason.STOP if generates else FinishReason.PREFILLED
            ended = Ended(command.assignment.request, reason, 10, 100)
            cluster.handle(NodeReported(command.node, idle, ended=(ended,)), now + 0.5)


def run_digest() -> str:
    """Return a hash of every command of a fixed run over both layouts."""
    digests: list[str] = []
    for layout in LAYOUTS.values():
        world = World(layout, agents=12, turns=4, seed=7)
        world.digests = True
        world.run()
        world.cluster.validate()
        for node in world.nodes.values():
            node.validate()
        digests.append(world.digest.hexdigest())
    return "-".join(digests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a small run that shows that it works")
    parser.add_argument("--digest", action="store_true", help="print only the digest of a fixed run's commands")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    if arguments.digest:
        print(run_digest())
        return
    agents, turns, repetitions, decisions = (8, 3, 1, 50) if arguments.quick else (24, 20, 3, 1000)
    events = measure_events(agents, turns, repetitions)
    for row in events:
        print(
            f"{row['layout']:<11} {row['nodes']:>3} nodes {row['turns']:>6} turns {row['events']:>9,} events: "
            f"{row['core_events_per_s']:,.0f}/s, with the driver {row['events_per_s']:,.0f}/s; {row['cached_share']:.1%} cached"
        )
    routes = measure_routes(decisions)
    for row in routes:
        print(
            f"{row['layout']:<11} {row['nodes']:>3} nodes {row['tokens']:>9,} tokens: "
            f"arrival handled in {row['p50_us']:.0f} us p50, {row['p99_us']:.0f} us p99"
        )
    digest = run_digest()
    print(f"digest {digest}")
    if arguments.json:
        figures = {"python": sys.version, "events": events, "routes": routes, "digest": digest}
        Path(arguments.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
