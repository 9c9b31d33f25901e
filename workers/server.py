"""A node process: opens the engine, serves gateways and peers over gRPC, drains and stops.

Usually one node; several of a profiled pool may share a process, which then call metadata (`weft-node`) tells apart. Does not
know who starts it: everything comes in through the constructor.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from orchestrator.core.config import ModelConfig, PoolConfig
from orchestrator.core.cost.costs import node_profile
from orchestrator.core.experts import ExpertBalance, Placement
from orchestrator.core.types import Load, NodeId, NodeSpec, PoolKind
from orchestrator.wire import codec, node_pb2, node_pb2_grpc
from orchestrator.wire.journal import NodeHeader, open_journal
from orchestrator.wire.trust import Caller, Refused, Trust
from workers.driver import DriverLimits, NodeDriver
from workers.engines.base import DraftPlaces, Engine, ExpertRouting, SplitPlaces
from workers.memory import Copier, PeerMemory, SharedArena, TransferLimits, host_id
from workers.ranks import added_up
from workers.realtime import put_first
from workers.store.cmx import readers
from workers.tiers import StorePlace
from workers.transfer import Channels
from workers.transports import OBJECT, SHM, ObjectStore, ObjectTransport, PacedTransport, SharedMemoryTransport, Transport

#: Makes host memory that peers can map.
Share: TypeAlias = Callable[[int], SharedArena]
Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"

#: Threads that copy blocks; more would only share one memory bus. There are more if more may read a folder, which is work for a
#: processor too.
COPY_THREADS = 2
#: Seconds that calls have to end once nodes stop.
STOP_S = 0.5
#: The most seconds that nodes which share a process leave between two frames, however many they are.
FRAME_S_MOST = 0.004


def open_engine(
    pool: PoolConfig,
    model_dir: Path,
    share: Share,
    places: SplitPlaces | None = None,
    model: ModelConfig | None = None,
    trust: Trust | None = None,
) -> Engine:
    """Open the engine a pool asks for, in a group if it has FFN ranks, with its model's adapters; only that one is imported.

    `trust` is the cluster's, for an engine that a pool drafts for.
    """

    def allocate(size: int) -> memoryview:
        return share(size).view

    match pool.engine.name:
        case "profiled":
            from workers.engines.profiled import ProfiledEngine  # noqa: PLC0415

            return ProfiledEngine(model_dir, pool.engine, pool.profile, allocate)
        case _ if pool.kind is PoolKind.LPX:
            from workers.engines.beat.engine import BeatEngine  # noqa: PLC0415

            return BeatEngine(model_dir, pool, share, places)
        case _:
            from workers.engines.eager import EagerEngine  # noqa: PLC0415

            scheduler = pool.scheduler
            most = scheduler.sequences_max, scheduler.step_tokens_max
            return EagerEngine(model_dir, pool.engine, *most, allocate, places, model=model, trust=trust)


class NodeServer:
    """The nodes of one process.

    Args:
        pool: what the nodes are.
        nodes: their ids, at least one.
        incarnation: higher at each start of the same ids.
        model_dir: the checkpoint.
        trust: who may call.
        host: address to listen on and to be reached by; the port is chosen by the system.
        objects: a store that nodes on other hosts reach, if there is one.
        journal: folder in which each node writes down what it is told and what it decides; empty for none.
        stores: whether this host has, or is to have, a store (`set_store`).
        places: the FFN ranks of the nodes' group; None: they compute whole layers.
        model: the model's table in the cluster file, for its adapters; None: it has none.
    """

    def __init__(
        self,
        pool: PoolConfig,
        nodes: Sequence[NodeId],
        incarnation: int,
        model_dir: Path,
        trust: Trust,
        host: str = "127.0.0.1",
        objects: ObjectStore | None = None,
        limits: DriverLimits | None = None,
        journal: str = "",
        stores: bool = False,
        places: SplitPlaces | None = None,
        model: ModelConfig | None = None,
    ) -> None:
        assert nodes, "a process without nodes"
        # Before there are other threads: those of gRPC and the one that waits for the engine are as urgent as this one.
        put_first(max(pool.beat.realtime - 1, min(pool.beat.realtime, 1)))
        self._pool = pool
        self._nodes = tuple(nodes)
        self._incarnation = incarnation
        self._model_dir = model_dir
        self._host = host
        self._host_id = host_id()
        self._objects = objects
        self._journal = journal
        self._stores = stores
        self._places = replace(places, trust=trust) if places is not None else None
        self._model = model
        self._routings: list[ExpertRouting] = []
        self._drafts: list[DraftPlaces] = []
        given = limits or DriverLimits()
        # Nodes of one process share its time for frames.
        frame_s = min(given.frame_s_min * len(nodes), max(FRAME_S_MOST, given.frame_s_min))
        self._limits = replace(given, frame_s_min=frame_s)
        self._trust = trust
        self._channels = Channels(self._limits.transfer.peers_max, trust)
        self._peers = PeerMemory(self._limits.transfer.peers_max)
        self._copies = ThreadPoolExecutor(max(COPY_THREADS, readers()), thread_name_prefix="copy")
        self._server = grpc.aio.server(options=(*codec.CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)))
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._failure: asyncio.Future[BaseException] | None = None
        self._arenas: list[SharedArena] = []
        self.drivers: dict[NodeId, NodeDriver] = {}

    async def start(self) -> str:
        """Open the engines and listen. Returns the address."""
        self._failure = asyncio.get_running_loop().create_future()
        port = self._trust.listen(self._server, f"{self._host}:0")
        address = f"{self._host}:{port}"
        for node in self._nodes:
            self.drivers[node] = await self._open(node, address)
        node_pb2_grpc.add_NodeServicer_to_server(_Service(self.drivers, self._trust), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return address

    async def wait(self) -> NoReturn:
        """Wait for an error that leaves a node in an unknown state, and raise it; the process should end then."""
        assert self._failure is not None, "not started"
        raise await asyncio.shield(self._failure)

    async def set_store(self, place: StorePlace | None, wait_s: float = 0.0) -> None:
        """Have the nodes use another store of this host from now on, or none; wait until they do, for so long at most."""
        for driver in self.drivers.values():
            driver.use_store(place)
        if place is not None and wait_s:
            await asyncio.gather(*(driver.wait_attached(wait_s) for driver in self.drivers.values()))

    def use_drafts(self, address: str | None) -> None:
        """Have the nodes ask another process for drafts from now on, or none; any thread may call it."""
        for drafts in self._drafts:
            drafts.use(address)

    def take_picks(self) -> list[list[int]]:
        """Return how many rows of these attention ranks picked each expert, by layer, since the last call."""
        return added_up([routing.take_picks() for routing in self._routings])

    def use_experts(self, layer: int, version: int, placement: Placement) -> None:
        """Route a layer's rows by another placement, which all FFN ranks have prepared."""
        for routing in self._routings:
            routing.use(layer, version, placement)

    def tell_balance(self, balance: ExpertBalance | None) -> None:
        """Have the first of these nodes tell gateways how evenly its group's experts are spread; any thread may call it."""
        self.drivers[self._nodes[0]].experts = balance

    async def drain(self, seconds: float) -> bool:
        """Take nothing new and let what runs end. Returns False if some did not end in time."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        drains = [asyncio.ensure_future(driver.drain()) for driver in self.drivers.values()]
        _, late = await asyncio.wait(drains, timeout=seconds)
        for drain in late:
            drain.cancel()
        return not late

    async def stop(self) -> None:
        """Stop at once; what runs is lost. Gateways and peers see their streams end."""
        # No new calls from now on; those that run are ended by the drivers, the last ones by the grace.
        stopping = asyncio.ensure_future(self._server.stop(STOP_S))
        for driver in self.drivers.values():
            await driver.close()
        await stopping
        await self._channels.close()
        self._copies.shutdown()
        for arena in self._arenas:
            arena.close()

    @property
    def stats(self) -> dict[NodeId, Load]:
        """Each node's state now."""
        return {node: driver.load for node, driver in self.drivers.items()}

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", node_pb2.DESCRIPTOR.services_by_name["Node"].full_name):
            await self._health.set(service, status)

    async def _open(self, node: NodeId, address: str) -> NodeDriver:
        arenas: list[SharedArena] = []

        def share(size: int) -> SharedArena:
            arenas.append(SharedArena(size))
            return arenas[-1]

        engine = await asyncio.get_running_loop().run_in_executor(
            None, open_engine, self._pool, self._model_dir, share, self._places, self._model, self._trust
        )
        if engine.drafts is not None:
            self._drafts.append(engine.drafts)
        if engine.routing is not None:
            self._routings.append(engine.routing)
        self._arenas.extend(arenas)
        arena = arenas[0] if engine.pool is not None and arenas else None
        spec = self._spec(node, address, engine)
        name = f"node-{node}-{spec.incarnation}"
        return NodeDriver(
            spec=spec,
            scheduler=self._pool.scheduler,
            engine=engine,
            transports=self._transports(engine, arena, self._limits.transfer),
            choose=self._choose,
            channels=self._channels,
            peers=self._peers,
            fatal=self._on_fatal,
            limits=self._limits,
            journal=open_journal(self._journal, name, NodeHeader(spec, self._pool.scheduler)),
            copier=Copier(self._copies, self._limits.transfer.inline_bytes_max) if self._stores else None,
        )

    def _spec(self, node: NodeId, address: str, engine: Engine) -> NodeSpec:
        description = engine.description
        return self._pool.node_spec(
            node,
            self._incarnation,
            node_profile(self._pool),
            blocks=description.blocks,
            block_tokens=description.block_tokens,
            block_bytes=description.block_bytes,
            context_tokens_max=min(description.context_tokens_max, codec.prompt_tokens_max(description.block_tokens)),
            address=address,
            host=self._host_id,
            stores=self._stores,
        )

    def _transports(self, engine: Engine, arena: SharedArena | None, limits: TransferLimits) -> dict[str, Transport]:
        """Return the ways this engine's blocks can go."""
        copier = Copier(self._copies, limits.inline_bytes_max)
        transports: dict[str, Transport] = {SHM: SharedMemoryTransport(engine, arena, self._peers, copier, limits)}
        if self._objects is not None:
            transports[OBJECT] = ObjectTransport(engine, self._objects, copier, limits)
        if engine.description.computes:
            return transports
        return {name: PacedTransport(transport, self._pool.profile) for name, transport in transports.items()}

    def _choose(self, host: str) -> list[str]:
        """Return the transports for a source on `host`, best first."""
        wanted = self._pool.transport
        names = [SHM] if wanted != OBJECT and host == self._host_id else []
        return [*names, OBJECT] if wanted != SHM and self._objects is not None else names

    def _on_fatal(self, error: BaseException) -> None:
        if self._failure is not None and not self._failure.done():
            self._failure.set_result(error)


class _Service(node_pb2_grpc.NodeServicer):
    """Finds the node a call is for, and sees that the caller may call it."""

    def __init__(self, drivers: dict[NodeId, NodeDriver], trust: Trust) -> None:
        self._drivers = drivers
        self._trust = trust

    async def Connect(self, request_iterator: object, context: Context) -> None:  # noqa: N802
        driver = await self._driver(context, Caller.GATEWAY)
        await self._serve(driver, driver.serve_gateway(context), context)

    async def Fetch(self, request_iterator: object, context: Context) -> None:  # noqa: N802
        driver = await self._driver(context, Caller.PEER)
        await self._serve(driver, driver.serve_peer(context), context)

    async def _serve(self, driver: NodeDriver, call: Awaitable[None], context: Context) -> None:
        """Serve a call; one that says what means nothing ends, and nothing else does."""
        try:
            await call
        except (codec.MalformedMessage, DecodeError) as error:
            driver.refuse(Refused.MALFORMED, str(error), context.peer())
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def _driver(self, context: Context, caller: Caller) -> NodeDriver:
        metadata = tuple(context.invocation_metadata() or ())
        name = NodeId(str(dict(metadata).get(codec.NODE_METADATA)))
        driver = self._drivers.get(name)
        # Whoever has no token learns nothing, not even which nodes there are; a node that is asked for in vain counts for all.
        counted = driver or next(iter(self._drivers.values()))
        refused = self._trust.problem(caller, name, metadata)
        if refused is None and driver is None:
            refused = Refused.NODE, f"no node {name!r} here; there are: {', '.join(self._drivers)}"
        if refused is not None or driver is None:
            reason, problem = refused or (Refused.NODE, "no node")
            counted.refuse(reason, problem, context.peer())
            await context.abort(_STATUS[reason], problem)
            raise AssertionError("abort raises")
        return driver


_STATUS = {
    Refused.TOKEN: grpc.StatusCode.UNAUTHENTICATED,
    Refused.PROTOCOL: grpc.StatusCode.FAILED_PRECONDITION,
    Refused.NODE: grpc.StatusCode.NOT_FOUND,
    Refused.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
}
