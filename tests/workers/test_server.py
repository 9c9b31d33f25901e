"""A node process: which node a call is for, health, drain, stop, and what breaks it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from orchestrator.core.config import EngineConfig, PoolConfig, SchedulerConfig
from orchestrator.core.events import StepFailed
from orchestrator.core.types import CostProfile, GatewayId, NodeId, PoolKind, StepId, request_id
from orchestrator.wire import codec, node_pb2, node_pb2_grpc
from orchestrator.wire.trust import Caller
from tests.builders import TRUST
from workers.engines.checkpoint import default_model_path
from workers.server import NodeServer

NODES = (NodeId("many-0"), NodeId("many-1"))
HELLO = node_pb2.GatewayFrame(hello=node_pb2.Hello(gateway=1, incarnation=5))


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return default_model_path()


@asynccontextmanager
async def serving(
    model_dir: Path, step_s: float = 0.0, scheduler: SchedulerConfig | None = None
) -> AsyncIterator[tuple[NodeServer, grpc.aio.Channel]]:
    engine = EngineConfig(name="profiled", blocks=64, block_tokens=16)
    profile = CostProfile(step_s=step_s)
    scheduler = scheduler or SchedulerConfig()
    pool = PoolConfig(
        "many", PoolKind.AGGREGATED, nodes=2, nodes_per_process=2, engine=engine, profile=profile, scheduler=scheduler
    )
    server = NodeServer(pool, NODES, 3, model_dir, TRUST)
    address = await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield server, channel
    finally:
        await server.stop()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))  # type: ignore[arg-type]


def connect(channel: grpc.aio.Channel, node: str) -> grpc.aio.StreamStreamCall:
    return node_pb2_grpc.NodeStub(channel).Connect(metadata=TRUST.metadata(Caller.GATEWAY, node))


def submit(output_tokens: int) -> node_pb2.GatewayFrame:
    request = request_id(GatewayId(1), 1)
    message = node_pb2.Submit(
        request=request, role=node_pb2.ROLE_GENERATE, tokens=bytes(40), hash_root=bytes(16), output_tokens_max=output_tokens
    )
    return node_pb2.GatewayFrame(submits=[message])


async def health(channel: grpc.aio.Channel) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service="weft.node.v1.Node"))).status


def test_nodes_of_one_process_are_told_apart(model_dir: Path) -> None:
    async def scenario() -> None:
        async with serving(model_dir) as (server, channel):
            for node in NODES:
                call = connect(channel, node)
                await call.write(HELLO)
                spec = codec.spec_from((await call.read()).welcome)
                assert (spec.id, spec.incarnation, spec.blocks, spec.block_tokens) == (node, 3, 64, 16)
                call.cancel()
            assert {load.blocks_free for load in server.stats.values()} == {64}

    run(scenario)


def test_an_unknown_node_is_not_found(model_dir: Path) -> None:
    async def scenario() -> None:
        async with serving(model_dir) as (_, channel):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await connect(channel, "few-0").read()
            assert error.value.code() is grpc.StatusCode.NOT_FOUND
            assert error.value.details() == "no node 'few-0' here; there are: many-0, many-1"

    run(scenario)


def test_who_reads_from_a_node_that_was_started_anew_is_told_at_once_that_nothing_is_there(model_dir: Path) -> None:
    async def scenario() -> None:
        # Whoever means this start would wait for the request that is to be computed here.
        async with serving(model_dir, scheduler=SchedulerConfig(fetch_wait_s_max=1000.0)) as (server, channel):
            size = server.drivers[NODES[0]].spec.block_bytes
            request = node_pb2.FetchRequest(
                request=1, hashes=bytes(16), tokens=16, pending=True, block_bytes=size, transports=["shm"], incarnation=2
            )
            call = node_pb2_grpc.NodeStub(channel).Fetch(metadata=TRUST.metadata(Caller.PEER, NODES[0]))
            await call.write(node_pb2.FetchFrame(request=request))
            assert await call.read() == node_pb2.BlocksFrame(final=True)
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF

    run(scenario)


@pytest.mark.parametrize("more", [(), (b"\xff\xff\xff",), (submit(9).SerializeToString(),)])
def test_a_call_ends_that_means_nothing_before_it_was_welcomed(model_dir: Path, more: Sequence[bytes]) -> None:
    async def scenario() -> None:
        async with serving(model_dir) as (_, channel):
            method = channel.stream_stream("/weft.node.v1.Node/Connect", bytes, bytes)
            call = method(metadata=TRUST.metadata(Caller.GATEWAY, NODES[0]))
            for frame in (HELLO.SerializeToString(), b"\xff\xff\xff", *more):
                await call.write(frame)
            assert node_pb2.NodeFrame.FromString(await call.read()).HasField("welcome")
            assert await asyncio.wait_for(call.code(), 5) is grpc.StatusCode.INVALID_ARGUMENT

    run(scenario)


def test_a_fetch_ends_that_means_nothing_while_it_is_being_answered(model_dir: Path) -> None:
    async def scenario() -> None:
        async with serving(model_dir) as (server, channel):
            size = server.drivers[NODES[0]].spec.block_bytes
            call = node_pb2_grpc.NodeStub(channel).Fetch(metadata=TRUST.metadata(Caller.PEER, NODES[0]))
            request = node_pb2.FetchRequest(
                request=1, hashes=bytes(16), tokens=16, block_bytes=size, transports=["shm"], incarnation=3
            )
            await call.write(node_pb2.FetchFrame(request=request))
            await call.write(node_pb2.FetchFrame(frames_copied=9))
            frames = []
            while isinstance(frame := await asyncio.wait_for(call.read(), 5), node_pb2.BlocksFrame):
                frames.append(frame)
            assert frames[-1].failure == "the peer acknowledged a frame that was not sent"
            assert await call.code() is grpc.StatusCode.OK

    run(scenario)


def test_draining_ends_health_and_waits_only_so_long(model_dir: Path) -> None:
    async def scenario() -> None:
        async with serving(model_dir, step_s=0.005) as (server, channel):
            assert await health(channel) == health_pb2.HealthCheckResponse.SERVING
            call = connect(channel, NODES[0])
            await call.write(HELLO)
            await call.write(submit(5000))
            while not (await call.read()).requests:
                pass
            assert not await server.drain(0.01)
            assert await health(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
            await call.write(node_pb2.GatewayFrame(cancels=[request_id(GatewayId(1), 1)]))
            assert await server.drain(10)
            call.cancel()

    run(scenario)


def test_a_core_that_broke_its_rules_ends_the_process(model_dir: Path) -> None:
    async def scenario() -> None:
        async with serving(model_dir) as (server, _):
            waiting = asyncio.ensure_future(server.wait())
            with pytest.raises(AssertionError, match="step 9 ended but none runs"):
                server.drivers[NODES[0]].handle(StepFailed(StepId(9), "why"))
            with pytest.raises(AssertionError, match="step 9 ended but none runs"):
                await waiting

    run(scenario)
