"""The ends of a cluster's inner wires that hostile frames are thrown at: a node by gateways and peers, a gateway by nodes.

All in this process, over real gRPC, with calls that carry the right token: what is looked at is what a trusted but broken or
compromised process can do.
"""

import asyncio
import os
import random
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from orchestrator.core.blocks import extend_hashes, hash_bytes, hash_root, pack_hashes
from orchestrator.core.config import ClusterConfig, EngineConfig, PoolConfig
from orchestrator.core.types import (
    CostProfile,
    GatewayId,
    ModelName,
    NodeId,
    NodeSpec,
    PoolKind,
    PoolName,
    TenantId,
    prefetch_id,
    request_id,
)
from orchestrator.live import links
from orchestrator.live.asked import Sampling
from orchestrator.live.driver import ClusterDriver
from orchestrator.live.turns import Prompt, Turn
from orchestrator.wire import codec, node_pb2
from orchestrator.wire.trust import Caller, Metadata, Trust
from workers.server import NodeServer

NODE = NodeId("all-0")
BLOCK_TOKENS, BLOCKS = 16, 512
ROOT = hash_root(b"secret", "model", "tenant")
TRUST = Trust(b"the fuzzer's")
ANSWER_S_MAX = 10.0
#: Seconds between two frames of an honest node that has nothing to say.
BEAT_S = 0.25
#: Frames that are written before the first of them is known to be read. gRPC keeps a few hundred bytes for good of each call that
#: ends with messages unread, whoever serves it; with 8 that made a quarter of this process's memory in 100,000 frames.
WINDOW = 1
CONNECT, FETCH = "/weft.node.v1.Node/Connect", "/weft.node.v1.Node/Fetch"

Maker = Callable[[random.Random], bytes]


def _raw(data: bytes) -> bytes:
    return data


def _submit(source: random.Random) -> node_pb2.Submit:
    tokens = array("I", [source.randrange(500) for _ in range(source.choice((1, 20, 40, 200)))]).tobytes()
    return node_pb2.Submit(
        request=request_id(GatewayId(1), source.randrange(64)),
        role=source.choice((node_pb2.ROLE_GENERATE, node_pb2.ROLE_PREFILL)),
        tokens=tokens,
        hashes=pack_hashes(extend_hashes(ROOT, tokens, BLOCK_TOKENS)),
        hash_root=hash_bytes(ROOT),
        output_tokens_max=source.choice((1, 3, 1 << 31)),
        priority=source.randrange(-3, 3),
        sampling=node_pb2.Sampling(temperature=source.choice((0.0, 1.0)), top_p=1.0, stop_token_ids=[7]),
    )


def _prefetch(source: random.Random) -> node_pb2.Prefetch:
    blocks = source.choice((1, 2, 40))
    return node_pb2.Prefetch(
        id=prefetch_id(GatewayId(1), source.randrange(64)),
        hashes=pack_hashes(extend_hashes(ROOT, bytes(4 * BLOCK_TOKENS * blocks), BLOCK_TOKENS)),
        keep_s=source.choice((0.01, 60.0)),
        stored_blocks=source.choice((0, blocks)),
        source=source.choice(("", "all-1")),
        source_address="127.0.0.1:1",
        source_blocks=source.choice((0, 1, blocks)),
    )


def _to_node(source: random.Random) -> bytes:
    cancels = [request_id(GatewayId(1), source.randrange(64)) for _ in range(source.choice((0, 1, 3)))]
    return node_pb2.GatewayFrame(
        submits=[_submit(source) for _ in range(source.choice((0, 1, 2)))],
        cancels=cancels,
        prefetches=[_prefetch(source) for _ in range(source.choice((0, 0, 1)))],
        cancelled_prefetches=[prefetch_id(GatewayId(1), source.randrange(64)) for _ in range(source.choice((0, 0, 1)))],
        frames_received=source.randrange(1000),
    ).SerializeToString()


def _to_gateway(source: random.Random) -> bytes:
    requests = [request_id(GatewayId(0), source.randrange(1, 9)) for _ in range(source.choice((0, 1, 4)))]
    hashes = source.randbytes(16 * source.choice((0, 1, 5)))
    return node_pb2.NodeFrame(
        requests=requests,
        counts=[1] * len(requests),
        tokens=[source.randrange(500) for _ in requests],
        first_tokens=[node_pb2.FirstToken(request=request, computed_tokens=5) for request in requests[:1]],
        ended=[node_pb2.Ended(request=request, reason="length", output_tokens=3) for request in requests[:1]],
        kv=[
            node_pb2.KvBatch(
                sequence=source.randrange(5), stored=[node_pb2.StoredRun(hashes=hashes)], cleared=source.random() < 0.3
            )
        ],
        ended_prefetches=[
            node_pb2.PrefetchEnded(
                id=prefetch_id(GatewayId(0), source.randrange(1, 9)), reason="used", end_block=source.randrange(9)
            )
        ],
        load=node_pb2.Load(running=source.randrange(9), blocks_free=source.randrange(BLOCKS), cost_scale=1.0),
    ).SerializeToString()


def _fetch(source: random.Random) -> bytes:
    if source.random() < 0.5:
        return node_pb2.FetchFrame(frames_copied=source.choice((0, 1, 1 << 20))).SerializeToString()
    request = node_pb2.FetchRequest(
        request=source.randrange(99), hashes=source.randbytes(64), first_block=source.randrange(4), tokens=source.randrange(200),
        pending=source.random() < 0.5, block_bytes=64, transports=["shm"], incarnation=source.choice((1, 1, 2)),
    )  # fmt: skip
    return node_pb2.FetchFrame(request=request).SerializeToString()


async def comes(call: Any, awaited: Callable[[bytes], bool]) -> bool:
    """Tell whether a message that is waited for comes over a call, which is over then."""
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            while isinstance(data := await call.read(), bytes):
                if awaited(data):
                    return True
    except (TimeoutError, grpc.aio.AioRpcError):
        return False
    finally:
        call.cancel()
    return False


class Victim:
    """One end of a wire at work in this process. An async context.

    Args:
        model: checkpoint directory whose vocabulary the node has.
    """

    #: Make good frames, from which hostile ones are made.
    good: Sequence[Maker] = ()
    what = ""

    def __init__(self, model: Path) -> None:
        self._model = model
        self.failures: list[str] = []
        #: The process whose memory is looked at.
        self.pid = os.getpid()

    async def __aenter__(self) -> "Victim":
        await self._start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stop()

    async def take(self, frames: Sequence[bytes], answers: Counter[str]) -> None:
        """Get all frames, over as many streams as that takes; counts how streams end."""
        raise NotImplementedError

    async def works(self) -> bool:
        """Tell whether it still does what it is there for."""
        raise NotImplementedError

    async def _start(self) -> None:
        raise NotImplementedError

    async def _stop(self) -> None:
        raise NotImplementedError


class NodeVictim(Victim):
    """A node, thrown at by a gateway."""

    good = (_to_node,)
    what = "frames of a gateway to a node"
    _method = CONNECT
    _metadata: Metadata = TRUST.metadata(Caller.GATEWAY, NODE)
    #: What of a node's driver serves the calls of this method, and the frames of a stream before those that are thrown.
    _serves, _opening = "serve_gateway", 1

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self._progress = _Progress()

    async def _start(self) -> None:
        engine = EngineConfig(name="profiled", blocks=BLOCKS, block_tokens=BLOCK_TOKENS)
        pool = PoolConfig("all", PoolKind.AGGREGATED, engine=engine, profile=CostProfile())
        self._server = NodeServer(pool, [NODE], 1, self._model, TRUST)
        self._channel = TRUST.open_channel(await self._server.start())
        driver = self._server.drivers[NODE]
        serve = getattr(driver, self._serves)
        setattr(driver, self._serves, lambda stream: serve(self._counted(stream)))

    def _counted(self, stream: Any) -> "_Counted":
        """Return a server's end of a stream of which is noted how far it was read."""
        return _Counted(stream, self._progress)

    async def _stop(self) -> None:
        await self._channel.close(None)
        await self._server.stop()

    def _call(self, method: str, metadata: Metadata) -> Any:
        return cast(Any, self._channel.stream_stream(method, _raw, _raw))(metadata=metadata)

    async def take(self, frames: Sequence[bytes], answers: Counter[str]) -> None:
        taken = 0
        while taken < len(frames):
            self._progress.read = -self._opening
            call = self._call(self._method, self._metadata)
            reader = asyncio.ensure_future(_drain(call))
            reader.add_done_callback(self._progress.end)
            try:
                await self._open(call)
                await self._throw(call, frames[taken:], reader)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass
            call.cancel()
            answers[await reader] += 1
            if self._progress.read <= 0:
                self.failures.append(f"a stream ended before anything of it was read, at {frames[taken][:300]!r}")
            # What was written after a frame that ended the stream is thrown again, at the next one.
            taken += max(1, self._progress.read)

    async def _throw(self, call: Any, frames: Sequence[bytes], reader: "asyncio.Future[str]") -> None:
        """Write frames, few of them ahead of what is read, until all are read or the stream ends."""
        for sent, frame in enumerate(frames):
            await self._progress.until(sent - WINDOW, reader)
            if reader.done():
                return
            await call.write(frame)
        await self._progress.until(len(frames), reader)

    async def _open(self, call: Any) -> None:
        await call.write(node_pb2.GatewayFrame(hello=node_pb2.Hello(gateway=1, incarnation=7)).SerializeToString())

    async def works(self) -> bool:
        call = self._call(CONNECT, TRUST.metadata(Caller.GATEWAY, NODE))
        await call.write(node_pb2.GatewayFrame(hello=node_pb2.Hello(gateway=2, incarnation=1)).SerializeToString())
        tokens = array("I", range(40)).tobytes()
        request = request_id(GatewayId(2), 1)
        hashes = pack_hashes(extend_hashes(ROOT, tokens, BLOCK_TOKENS))
        submit = node_pb2.Submit(
            request=request,
            role=node_pb2.ROLE_GENERATE,
            tokens=tokens,
            hashes=hashes,
            hash_root=hash_bytes(ROOT),
            output_tokens_max=3,
        )
        await call.write(node_pb2.GatewayFrame(submits=[submit]).SerializeToString())

        def ends(data: bytes) -> bool:
            ended = node_pb2.NodeFrame.FromString(data).ended
            return any(one.request == request and one.reason == "length" for one in ended)

        return await comes(call, ends)


class SourceVictim(NodeVictim):
    """A node, thrown at by a peer that fetches from it."""

    good = (_fetch,)
    what = "frames of a peer to a node"
    _method = FETCH
    _metadata = TRUST.metadata(Caller.PEER, NODE)
    _serves, _opening = "serve_peer", 0

    async def _open(self, call: Any) -> None:
        del call


class GatewayVictim(Victim):
    """A gateway, thrown at by its node."""

    good = (_to_gateway,)
    what = "frames of a node to a gateway"

    async def _start(self) -> None:
        # The link waits before it connects anew; a hundred thousand times that is longer than anybody would wait here.
        links.RETRY_S_MIN = 0.001
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue(64)
        self._honest = False
        self._streams: Counter[str] = Counter()
        self._server = grpc.aio.server(options=codec.CHANNEL_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._serve, _raw, _raw)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("weft.node.v1.Node", {"Connect": handler}),))
        address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        config = ClusterConfig(pools=(PoolConfig("all", PoolKind.AGGREGATED),))
        self._driver = ClusterDriver(
            GatewayId(0), config, TRUST, cast(Any, _Unobserved()), lambda error: self.failures.append(repr(error))
        )
        self._driver.set_nodes([(NODE, address)])

    async def _stop(self) -> None:
        await self._driver.close()
        await self._server.stop(0)

    async def _serve(self, requests: object, context: Any) -> None:
        """Be a node: welcome the gateway, then send what there is to send until it has enough."""
        del requests
        await context.read()
        spec = NodeSpec(
            NODE,
            ModelName("default"),
            PoolName("all"),
            PoolKind.AGGREGATED,
            1,
            BLOCKS,
            BLOCK_TOKENS,
            64,
            8,
            512,
            4096,
            CostProfile(),
        )
        await context.write(node_pb2.NodeFrame(welcome=codec.welcome_message(spec, "f", resumed=False)).SerializeToString())
        self._streams["streams"] += 1
        while not self._honest:
            frame = await self._frames.get()
            if frame is None:
                return
            await context.write(frame)
            # The gateway reads before more is sent, so that a stream it ends loses no more than one frame.
            await asyncio.sleep(0)
        while True:  # an honest node is never silent for long
            await context.write(node_pb2.NodeFrame().SerializeToString())
            await asyncio.sleep(BEAT_S)

    async def take(self, frames: Sequence[bytes], answers: Counter[str]) -> None:
        before = self._streams["streams"]
        turns = [self._driver.start(_turn()) for _ in range(8)]
        for frame in frames:
            await asyncio.wait_for(self._frames.put(frame), ANSWER_S_MAX)
        for turn in turns:
            turn.cancel()
        answers["streams"] += self._streams["streams"] - before

    async def works(self) -> bool:
        self._honest = True
        while not self._frames.empty():
            self._frames.get_nowait()
        self._frames.put_nowait(None)
        for _ in range(int(ANSWER_S_MAX / 0.05)):
            if self._driver.ready:
                return not self.failures
            await asyncio.sleep(0.05)
        return False


class _Progress:
    """How many frames of a stream were read."""

    def __init__(self) -> None:
        self.read = 0
        self._changed = asyncio.Event()

    def add(self) -> None:
        """Count a frame."""
        self.read += 1
        self._changed.set()

    def end(self, reader: object) -> None:
        """The stream has ended: nothing more is read."""
        self._changed.set()

    async def until(self, count: int, reader: "asyncio.Future[str]") -> None:
        """Wait until so many are read or the stream has ended. Raises `TimeoutError`."""
        while self.read < count and not reader.done():
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), ANSWER_S_MAX)


class _Counted:
    """A node's end of a stream, which counts what is read, frames that cannot be parsed included."""

    def __init__(self, stream: Any, progress: _Progress) -> None:
        self._stream = stream
        self._progress = progress
        self.write = stream.write

    async def read(self) -> object:
        try:
            frame = await self._stream.read()
        except DecodeError:
            self._progress.add()
            raise
        if isinstance(frame, Message):
            self._progress.add()
        return frame


class _Unobserved:
    """Looks away, and follows no request."""

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *arguments: False


def _turn() -> Turn:
    tokens = array("I", range(64)).tobytes()
    prompt = Prompt(tokens, 64, tuple(extend_hashes(ROOT, tokens, BLOCK_TOKENS)), ROOT)
    return Turn(ModelName("default"), TenantId("t"), prompt, Sampling(), output_tokens_max=64)


async def _drain(call: Any) -> str:
    """Read a stream to its end; return how it ended."""
    try:
        while isinstance(await call.read(), bytes):
            pass
        return str((await call.code()).name)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    except asyncio.CancelledError:
        return "CANCELLED"
