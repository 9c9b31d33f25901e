"""The live drivers on a virtual clock decide exactly as the simulator does: same nodes, sources and hits, at the same times.

Both are given the same latencies. Answers are too short to fill a block: the simulator names an answer's blocks when it ends, a
live node as they fill.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import inf
from types import SimpleNamespace

import grpc.aio
import pytest

import workers.runner
from orchestrator.core.commands import Assign, ClusterCommand, Complete
from orchestrator.core.config import ClusterConfig, EngineConfig, PoolConfig, RouterConfig, RouterPolicy, SchedulerConfig
from orchestrator.core.cost.costs import node_profile
from orchestrator.core.events import ClusterEvent, RequestArrived
from orchestrator.core.types import (
    BlockHash,
    CostProfile,
    GatewayId,
    ModelName,
    NodeId,
    NodeSpec,
    PoolKind,
    PoolName,
    RequestId,
    Sampling,
    SessionId,
    TenantId,
)
from orchestrator.live.driver import ClusterDriver
from orchestrator.live.turns import Prompt, Turn
from orchestrator.profiles.resolve import PoolHardware, Resolved
from orchestrator.sim.prompts import Prompts
from orchestrator.sim.world import World, WorldOptions
from orchestrator.traces import TracedTurn
from orchestrator.wire import node_pb2_grpc
from tests.builders import TRUST, some
from tests.live.virtual import NoChannel, Wires, run_virtually
from workers.driver import DriverLimits, NodeDriver
from workers.engines.checkpoint import default_model_path
from workers.engines.profiled import BLOCK_BYTES, ProfiledEngine
from workers.memory import Copier, PeerMemory, SharedArena, TransferLimits
from workers.transfer import Channels
from workers.transports import SHM, PacedTransport, SharedMemoryTransport

BLOCK_TOKENS = 16
#: Every time is a whole number of these: sums are exact, and two equal nodes are not told apart by the last bit of a clock.
TICK_S = 2.0**-20
HOP_S = 388 * TICK_S
#: When the first session starts: by then both clusters are up.
START_S = 1.0
GATEWAY = GatewayId(0)
#: Blocks take their latency and no more: simulated fetches share their nodes' links, the profiled engine's do not.
PROFILE = CostProfile(
    step_s=3251 * TICK_S,
    prefill_token_s=24 * TICK_S,
    prefill_token_context_s=TICK_S / 64,
    sequence_s=430 * TICK_S,
    context_token_s=TICK_S,
    fetch_bytes_per_s=inf,
    fetch_latency_s=1783 * TICK_S,
)


def sessions(seed: int, count: int = 5, turns: int = 6) -> list[TracedTurn]:
    """Return agents' sessions that share a system prompt and grow; answers are short enough to fill no block."""
    chance = random.Random(seed)
    made: list[TracedTurn] = []
    for session in range(count):
        blocks, start_s = 3, START_S + chance.randrange(200_000) * TICK_S
        for number in range(turns):
            blocks += chance.randrange(1, 30)
            made.append(
                TracedTurn(
                    id=len(made),
                    session=f"s{session}",
                    agent="main",
                    arrival_s=start_s,
                    after=(made[-1].id,) if number else (),
                    gap_s=chance.randrange(1000, 50_000) * TICK_S,
                    input_tokens=blocks * BLOCK_TOKENS + chance.randrange(1, 5),
                    output_tokens=chance.randrange(1, 11),
                    block_tokens=BLOCK_TOKENS,
                    block_runs=((1, 3), (1000 * (session + 1), blocks - 3)),
                )
            )
    return made


def pool(name: str, kind: PoolKind, nodes: int, blocks: int) -> PoolConfig:
    engine = EngineConfig("profiled", block_tokens=BLOCK_TOKENS, blocks=blocks, context_tokens_max=8192)
    scheduler = SchedulerConfig(step_tokens_max=128, sequences_max=8)
    return PoolConfig(name, kind, nodes=nodes, engine=engine, scheduler=scheduler, profile=PROFILE)


def together(policy: RouterPolicy) -> ClusterConfig:
    return ClusterConfig(router=RouterConfig(policy=policy), pools=(pool("both", PoolKind.AGGREGATED, 3, 300),))


def apart(policy: RouterPolicy) -> ClusterConfig:
    pools = (pool("prefill", PoolKind.PREFILL, 2, 400), pool("decode", PoolKind.DECODE, 2, 400))
    return ClusterConfig(router=RouterConfig(policy=policy), pools=pools)


@dataclass
class Decided:
    """What a gateway decided for each request, in the order of its arrival."""

    routes: dict[int, list[tuple[Assign, int]]] = field(default_factory=dict)
    arrived_s: dict[int, float] = field(default_factory=dict)
    ended_s: dict[int, float] = field(default_factory=dict)
    refused_calls: int = 0
    malformed_frames: int = 0

    def observe(self, now: float, event: ClusterEvent, commands: Sequence[ClusterCommand]) -> None:
        if isinstance(event, RequestArrived):
            self.arrived_s[event.request.id] = now
        for command in commands:
            if isinstance(command, Assign):
                assert command.why is not None
                self.routes.setdefault(command.assignment.request, []).append((command, command.why.hit_tokens))
            elif isinstance(command, Complete):
                self.ended_s[command.request] = now

    def routed(self, seconds: float) -> None:
        pass

    def refused(self, node: NodeId, calls: int) -> None:
        self.refused_calls = calls

    def follows(self, request: RequestId) -> bool:
        return False

    def computed(self, node: NodeId, request: RequestId, began_s_ago: float) -> None:
        raise AssertionError("nothing is followed")

    def fetched(self, node: NodeId, request: RequestId, began_s_ago: float) -> None: ...

    def malformed(self, node: NodeId) -> None:
        self.malformed_frames += 1

    def moved(self, node: NodeId, source: str, target: str, size_bytes: int, seconds: float) -> None:
        pass


class Heard:
    """A simulated gateway's core, and somebody who listens."""

    def __init__(self, core: object, decided: Decided) -> None:
        self._core = core
        self._decided = decided

    def handle(self, event: ClusterEvent, now: float) -> list[ClusterCommand]:
        commands = self._core.handle(event, now)  # type: ignore[attr-defined]
        self._decided.observe(now, event, [in_bytes(command) for command in commands])
        return commands


def in_bytes(command: ClusterCommand) -> ClusterCommand:
    """Return a simulated command as a live gateway gives it: with the bytes that stand for each block."""
    if not isinstance(command, Assign):
        return command
    given = command.assignment
    return replace(command, assignment=replace(given, hashes=tuple(map(hashed, given.hashes))))


def simulated(config: ClusterConfig, turns: Sequence[TracedTurn]) -> Decided:
    decided = Decided()
    hardware = PoolHardware({}, 0.0, 0.0, 0.0, block_bytes=BLOCK_BYTES, assumptions=())
    resolved = Resolved(config, {PoolName(one.name): hardware for one in config.pools})
    world = World(resolved, turns, WorldOptions(stepwise=True, hop_s=HOP_S))
    world.clusters[GATEWAY] = Heard(world.clusters[GATEWAY], decided)  # type: ignore[assignment]
    assert all(one.completed for one in some(world.run().served))
    return decided


def spec(node: NodeId, settings: PoolConfig) -> NodeSpec:
    return settings.node_spec(
        node,
        1,
        node_profile(settings),
        blocks=settings.engine.blocks,
        block_tokens=BLOCK_TOKENS,
        block_bytes=BLOCK_BYTES,
        context_tokens_max=settings.engine.context_tokens_max,
        address="virtual",
    )


def start_node(node: NodeId, settings: PoolConfig, fatal: list[BaseException]) -> NodeDriver:
    """Start a node that tells its gateways at once whatever it has to tell, as a simulated one does."""
    arenas: list[SharedArena] = []

    def allocate(size: int) -> memoryview:
        arenas.append(SharedArena(size))
        return arenas[-1].view

    engine = ProfiledEngine(default_model_path(), settings.engine, settings.profile, allocate)
    limits, peers = TransferLimits(), PeerMemory(8)
    shared = SharedMemoryTransport(engine, arenas[0], peers, Copier(ThreadPoolExecutor(1), limits.inline_bytes_max), limits)
    driver = NodeDriver(
        spec(node, settings),
        settings.scheduler,
        engine,
        {SHM: PacedTransport(shared, settings.profile)},
        lambda host: [SHM],
        Channels(8, TRUST),
        peers,
        fatal.append,
        DriverLimits(load_s=0.0, frame_s_min=0.0),
    )
    driver._timers._offset_s = 0.0
    return driver


async def live(config: ClusterConfig, turns: Sequence[TracedTurn], wires: Wires) -> Decided:
    """Serve the turns on live drivers in the running loop's time."""
    decided, failures = Decided(), list[BaseException]()
    for settings in config.pools:
        for number in range(settings.nodes):
            node = settings.node_id(number)
            wires.nodes[node] = start_node(node, settings, failures)
    driver = ClusterDriver(GATEWAY, config, TRUST, decided, failures.append)
    driver._timers._offset_s = 0.0
    driver.set_nodes([(node, "virtual") for node in wires.nodes])
    prompts, ended = Prompts(turns, BLOCK_TOKENS), {turn.id: asyncio.Event() for turn in turns}

    async def visit(turn: TracedTurn) -> None:
        for other in turn.after:
            await ended[other].wait()
        await asyncio.sleep(turn.gap_s if turn.after else turn.arrival_s)
        stream = driver.start(asked(turn, prompts))
        while (await stream.read()).finish is None:
            pass
        ended[turn.id].set()

    await asyncio.gather(*(visit(turn) for turn in turns))
    await driver.close()
    for one in wires.nodes.values():
        await one.close()
    assert not failures, failures
    return decided


def hashed(name: BlockHash) -> BlockHash:
    """Return the bytes that stand for a simulated block, whose name is a number."""
    return BlockHash(int(name).to_bytes(16, "little", signed=True))


def asked(turn: TracedTurn, prompts: Prompts) -> Turn:
    tokens = b"\x01\0\0\0" * turn.input_tokens
    return Turn(
        ModelName("default"),
        TenantId("default"),
        Prompt(tokens, turn.input_tokens, tuple(map(hashed, prompts.of(turn))), BlockHash(bytes(16))),
        Sampling(),
        output_tokens_max=turn.output_tokens,
        session=SessionId(f"{turn.session}/{turn.agent}"),
    )


def served(config: ClusterConfig, turns: Sequence[TracedTurn], monkeypatch: pytest.MonkeyPatch) -> Decided:
    wires, found = Wires(HOP_S, data_s=0.0), list[Decided]()
    monkeypatch.setattr(node_pb2_grpc, "NodeStub", wires)
    monkeypatch.setattr(grpc.aio, "insecure_channel", lambda address, options: NoChannel())

    async def scenario() -> None:
        clock = SimpleNamespace(perf_counter=asyncio.get_running_loop().time)
        monkeypatch.setattr(workers.runner, "time", clock)
        found.append(await live(config, turns, wires))

    run_virtually(scenario)
    return found[0]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("policy", [RouterPolicy.PREDICTED_TIME, RouterPolicy.LEAST_LOADED, RouterPolicy.POWER_OF_TWO])
@pytest.mark.parametrize("shape", [together, apart])
def test_live_and_simulated_clusters_decide_alike(
    shape: Callable[[RouterPolicy], ClusterConfig], policy: RouterPolicy, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, turns = shape(policy), sessions(seed)
    here, there = served(config, turns, monkeypatch), simulated(config, turns)
    assert list(here.arrived_s) == list(there.arrived_s)
    assert here.routes == there.routes
    assert here.ended_s == there.ended_s


def test_canary_one_millisecond_more_between_turns_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    config, turns = together(RouterPolicy.PREDICTED_TIME), sessions(0)
    here = served(config, turns, monkeypatch)
    there = simulated(config, [replace(turn, gap_s=turn.gap_s + 1024 * TICK_S) for turn in turns])
    assert here.ended_s != there.ended_s
