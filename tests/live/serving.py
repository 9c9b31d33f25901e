"""Real node servers and a real driver on one loop, joined by gRPC over loopback."""

import asyncio
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchestrator.core.blocks import extend_hashes, hash_root
from orchestrator.core.commands import ClusterCommand
from orchestrator.core.config import ClusterConfig, ClusterSettings, EngineConfig, PoolConfig, RouterConfig, SchedulerConfig
from orchestrator.core.events import ClusterEvent, NodeReported
from orchestrator.core.types import GatewayId, Load, ModelName, NodeId, PoolKind, RequestId, Sampling, StoreId, TenantId
from orchestrator.live.driver import ClusterDriver, TurnStream
from orchestrator.live.turns import Delta, Prompt, Turn
from orchestrator.wire.journal import cluster_header, open_journal
from orchestrator.wire.trust import Trust
from tests.builders import TRUST
from workers.engines.base import SplitPlaces
from workers.server import NodeServer
from workers.store.models import model_blocks
from workers.store.server import StoreServer
from workers.tiers import StorePlace
from workers.transports import ObjectStore

BLOCK_TOKENS = 16
ROOT = hash_root(b"secret", "weights", "")
#: Seconds a node may take to find its host's store.
ATTACH_S = 10.0


def pool(name: str, kind: PoolKind, nodes: int = 1, engine: str = "profiled", **more: Any) -> PoolConfig:
    """Return a small pool; `more` are fields of the pool."""
    settings = EngineConfig(name=engine, device="cpu", dtype="float32", block_tokens=BLOCK_TOKENS, blocks=128, threads=1)
    scheduler = SchedulerConfig(step_tokens_max=64, sequences_max=16)
    return PoolConfig(**{"name": name, "kind": kind, "nodes": nodes, "engine": settings, "scheduler": scheduler, **more})


def split(engine: str = "profiled", decode: int = 1, **more: Any) -> ClusterConfig:
    """Return a cluster with prefill and decode apart, that always uses both."""
    pools = (pool("prefill", PoolKind.PREFILL, 1, engine, **more), pool("decode", PoolKind.DECODE, decode, engine, **more))
    return ClusterConfig(pools=pools, router=RouterConfig(disaggregation_tokens_min=0))


def together(engine: str = "profiled", nodes: int = 1, **more: Any) -> ClusterConfig:
    """Return a cluster of nodes that do both."""
    return ClusterConfig(pools=(pool("both", PoolKind.AGGREGATED, nodes, engine, **more),))


def journalled(config: ClusterConfig, folder: Path) -> ClusterConfig:
    """Return a cluster that writes down what its cores are told and decide."""
    return replace(config, cluster=replace(config.cluster, journal=str(folder)))


def patient(config: ClusterConfig, node_lost_s: float) -> ClusterConfig:
    return replace(config, cluster=ClusterSettings(node_lost_s=node_lost_s))


@dataclass
class Observed:
    """An observer that keeps what it is told, and wakes those who wait for it."""

    events: list[ClusterEvent] = field(default_factory=list)
    commands: list[ClusterCommand] = field(default_factory=list)
    moves: list[tuple[NodeId, int]] = field(default_factory=list)
    loads: dict[NodeId, Load] = field(default_factory=dict)
    routes: int = 0
    reports: int = 0
    #: Whether requests are followed, and what nodes told of those: what, who, of which, how many seconds ago it began.
    following: bool = False
    began: list[tuple[str, NodeId, RequestId, float]] = field(default_factory=list)
    refused_calls: int = 0
    malformed_frames: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def observe(self, now: float, event: ClusterEvent, commands: Sequence[ClusterCommand]) -> None:
        self.commands.extend(commands)
        if isinstance(event, NodeReported):
            self.loads[event.node] = event.load
            self.reports += 1
        else:
            self.events.append(event)
        self.changed.set()

    def routed(self, seconds: float) -> None:
        self.routes += 1

    def refused(self, node: NodeId, calls: int) -> None:
        self.refused_calls = calls

    def follows(self, request: RequestId) -> bool:
        return self.following

    def computed(self, node: NodeId, request: RequestId, began_s_ago: float) -> None:
        assert self.following, "nothing is followed"
        self.began.append(("computed", node, request, began_s_ago))

    def fetched(self, node: NodeId, request: RequestId, began_s_ago: float) -> None:
        self.began.append(("fetched", node, request, began_s_ago))

    def malformed(self, node: NodeId) -> None:
        self.malformed_frames += 1

    def moved(self, node: NodeId, source: str, target: str, size_bytes: int, seconds: float) -> None:
        self.moves.append((node, size_bytes))

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait for something that events bring about."""
        while not done():
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 10)

    def seen(self, kind: type) -> list[Any]:
        return [event for event in (*self.events, *self.commands) if isinstance(event, kind)]


@dataclass
class Cluster:
    """Servers, a driver, and what it saw."""

    driver: ClusterDriver
    servers: dict[NodeId, NodeServer]
    addresses: dict[NodeId, str]
    observed: Observed
    config: ClusterConfig
    model_dir: Path
    failures: list[BaseException]
    trust: Trust = TRUST
    #: The host's store and where it serves, if the cluster has them.
    store: StoreServer | None = None
    place: StorePlace | None = None
    #: The FFN ranks of pools of split decode.
    places: SplitPlaces | None = None

    async def ready(self) -> None:
        await self.observed.until(lambda: set(self.observed.loads) >= set(self.servers) and self.driver.ready)

    async def idle(self) -> None:
        """Wait until no node uses a block."""

        def unused(load: Load) -> bool:
            return load.running == load.waiting == load.blocks_used == 0

        await self.observed.until(lambda: all(unused(self.observed.loads[node]) for node in self.servers))

    async def start_node(self, node: NodeId, incarnation: int, objects: ObjectStore | None = None) -> None:
        name = str(node).rsplit("-", 1)[0]
        settings = next(entry for entry in self.config.pools if entry.name == name)
        journal = self.config.cluster.journal
        stores = self.place is not None
        more: dict[str, Any] = {"journal": journal, "stores": stores, "model": self.config.models[settings.model]}
        more["places"] = self.places if settings.split is not None else None
        server = self.servers[node] = NodeServer(
            settings,
            [node],
            incarnation,
            self.model_dir,
            self.trust,
            objects=objects,
            **more,
        )
        self.addresses[node] = await server.start()
        if stores:
            await server.set_store(self.place, ATTACH_S)
        self.driver.set_nodes(list(self.addresses.items()))

    async def start_store(self) -> None:
        """Start the host's store, which nodes that start later attach to."""
        assert self.config.store is not None, "the cluster has no store"
        models = [
            model_blocks(ModelName(name), self.config.pools_of(name)[0].engine, self.model_dir) for name in self.config.models
        ]
        store = StoreId("store-0")
        self.store = StoreServer(store, 1, self.config.store, models, self.trust, journal=self.config.cluster.journal)
        self.place = StorePlace(store, await self.store.start())
        self.driver.set_stores([(store, self.place.address)])

    async def kill_node(self, node: NodeId) -> None:
        """End a node's process, as far as the others can tell."""
        server = self.servers.pop(node)
        self.observed.loads.pop(node, None)
        await server.stop()


@asynccontextmanager
async def cluster(
    config: ClusterConfig,
    model_dir: Path,
    objects: ObjectStore | None = None,
    trust: Trust = TRUST,
    places: SplitPlaces | None = None,
) -> AsyncIterator[Cluster]:
    """Start a cluster; fails the test if a core or a driver broke its own rules."""
    observed = Observed()
    failures: list[BaseException] = []
    gateway = GatewayId(0)
    journal = open_journal(config.cluster.journal, "gateway-0", cluster_header(gateway, config))
    driver = ClusterDriver(gateway, config, trust, observed, failures.append, journal)
    started = Cluster(driver, {}, {}, observed, config, model_dir, failures, trust, places=places)
    try:
        if config.store is not None:
            await started.start_store()
        for settings in config.serving_pools:
            for index in range(settings.nodes):
                await started.start_node(settings.node_id(index), 1, objects)
        await started.ready()
        yield started
    finally:
        await driver.close()
        for server in started.servers.values():
            await server.stop()
        if started.store is not None:
            await started.store.stop()
    assert not failures, failures


def turn(tokens: Sequence[int], output_tokens: int, sampling: Sampling | None = None) -> Turn:
    """Return a turn; end-of-sequence tokens do not end it unless its sampling says so."""
    packed = array("I", tokens).tobytes()
    prompt = Prompt(packed, len(tokens), tuple(extend_hashes(ROOT, packed, BLOCK_TOKENS)), ROOT)
    return Turn(
        ModelName("default"),
        TenantId("t"),
        prompt,
        sampling or Sampling(),
        output_tokens_max=output_tokens,
    )


async def finish(stream: TurnStream, within_s: float = 20) -> Delta:
    """Read a turn to its end and return all of it as one delta; each read may take so long."""
    whole = Delta([], [])
    while whole.finish is None:
        delta = await asyncio.wait_for(stream.read(), within_s)
        whole.tokens += delta.tokens
        whole.logprobs += delta.logprobs
        whole.finish, whole.cached_tokens = delta.finish, delta.cached_tokens
    return whole


def run(scenario: Callable[[], Awaitable[None]], seconds: float = 60) -> None:
    asyncio.run(asyncio.wait_for(scenario(), seconds))  # type: ignore[arg-type]
