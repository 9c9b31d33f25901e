"""Moves KV blocks between nodes: the source says in a `Fetch` stream where they lie, the peer copies them and acknowledges.

What goes when is the source core's decision (`SendBlocks`), what is wanted the target core's (`Fetch`); `transports.py` has the
ways. Rules for editors. 1: a block is read or written only between the events that bracket it; `ExportClosed` and `FetchEnded`
are sent after the last copy, also when a task is cancelled. 2: everything in flight counts against a `ByteBudget`.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio

from orchestrator.core.blocks import pack_hashes
from orchestrator.core.commands import Fetch, SendBlocks
from orchestrator.core.events import BlocksSent, ExportClosed, ExportOpened, FetchEnded, FetchProgressed, NodeEvent
from orchestrator.core.types import BlockId, ExportId, RequestId
from orchestrator.wire import codec, node_pb2, node_pb2_grpc
from orchestrator.wire.trust import Caller, Trust
from workers.memory import ByteBudget, PeerMemory, PeerUnmappable, TransferFailed, TransferLimits
from workers.transports import SHM, Offered, Transport, nothing

#: Seconds that the end of a call waits for its last write.
SETTLE_S_MAX = 1.0


class Channels:
    """Connections to peers by address, least recently used first."""

    def __init__(self, channels_max: int, trust: Trust) -> None:
        self.trust = trust
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._users: dict[str, int] = {}
        self._channels_max = channels_max

    def take(self, address: str) -> grpc.aio.Channel:
        """Return a connection; give it back with `release`."""
        channel = self._channels.pop(address, None)
        if channel is None:
            channel = self.trust.open_channel(address)
        self._channels[address] = channel
        self._users[address] = self._users.get(address, 0) + 1
        return channel

    async def release(self, address: str) -> None:
        """Say that a call is over; closes the longest unused connection if there are too many."""
        self._users[address] -= 1
        idle = [known for known in self._channels if not self._users.get(known)]
        if len(self._channels) > self._channels_max and idle:
            self._users.pop(idle[0], None)
            await self._channels.pop(idle[0]).close(None)

    async def close(self) -> None:
        """Close all."""
        while self._channels:
            await self._channels.popitem()[1].close(None)


@dataclass(slots=True)
class _Flight:
    """A frame on its way."""

    size: int
    release: Callable[[], None]
    #: The blocks of the whole command, on its last frame.
    sent: tuple[BlockId, ...] | None


class Stream(Protocol):
    """The source's end of a Fetch call."""

    async def read(self) -> object: ...

    async def write(self, message: node_pb2.BlocksFrame) -> None: ...


class WholeWrites:
    """A call's end whose writes are never broken off: one that a cancelled writer leaves goes on, and the next waits for it.

    While a write is broken off, gRPC neither writes again nor ends a call in form: the peer would wait for ever.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._writing: asyncio.Future[None] | None = None

    async def read(self) -> object:
        """Return the peer's next frame."""
        return await self._stream.read()

    async def write(self, message: node_pb2.BlocksFrame) -> None:
        """Send a frame."""
        await self.settle()
        self._writing = asyncio.ensure_future(self._stream.write(message))
        self._writing.add_done_callback(_seen)
        await asyncio.shield(self._writing)

    async def settle(self) -> None:
        """Wait for a write that was left; not for long, as the peer may read no more."""
        if self._writing is not None and not self._writing.done():
            await asyncio.wait((self._writing,), timeout=SETTLE_S_MAX)


def _seen(writing: "asyncio.Future[None]") -> None:
    """Know of a write's error, which its writer may not wait for any more."""
    if not writing.cancelled():
        writing.exception()


class Export:
    """The source's end of one fetch."""

    def __init__(
        self,
        id: ExportId,
        request: node_pb2.FetchRequest,
        stream: Stream,
        transport: Transport,
        block_tokens: int,
        handle: Callable[[NodeEvent], None],
        limits: TransferLimits,
    ) -> None:
        self._id = id
        self._stream = stream
        self._transport = transport
        self._block_bytes = request.block_bytes
        self._block_tokens = block_tokens
        self._blocks_frame_max = max(1, limits.frame_bytes_max // max(1, request.block_bytes))
        self._handle = handle
        self._idle_s_max = limits.idle_s_max
        self._next_block = request.first_block
        self._budget = ByteBudget(limits.fetch_bytes_max)
        self._commands: deque[SendBlocks] = deque()
        self._wake = asyncio.Event()
        self._flights: deque[_Flight] = deque()
        self._watchdog: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._final_sent = False

    def send(self, command: SendBlocks) -> None:
        """Queue blocks; the core bounds them by the prompt."""
        self._commands.append(command)
        self._wake.set()

    async def run(self) -> None:
        """Serve until the peer has all or is gone, then release what is left."""
        self._task = asyncio.current_task()
        writer = asyncio.ensure_future(self._write())
        try:
            while isinstance(frame := await self._stream.read(), node_pb2.FetchFrame):
                for _ in range(frame.frames_copied):
                    self._acknowledged()
        finally:
            writer.cancel()
            await asyncio.wait((writer,))
            for flight in self._flights:
                flight.release()
            self._watch(False)
        if not writer.cancelled() and writer.exception() is not None:
            raise writer.exception() or AssertionError

    def stop(self) -> None:
        """End the call."""
        if self._task is not None:
            self._task.cancel()

    def _acknowledged(self) -> None:
        if not self._flights:
            raise TransferFailed("the peer acknowledged a frame that was not sent")
        flight = self._flights.popleft()
        flight.release()
        self._budget.release(flight.size)
        if flight.sent is not None:
            self._handle(BlocksSent(self._id, flight.sent))
        self._watch(bool(self._flights) or self._final_sent)

    def _watch(self, on: bool) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        assert self._task is not None
        self._watchdog = asyncio.get_running_loop().call_later(self._idle_s_max, self._task.cancel) if on else None

    async def _write(self) -> None:
        try:
            while not self._final_sent:
                while not self._commands:
                    self._wake.clear()
                    await self._wake.wait()
                command = self._commands.popleft()
                self._final_sent = command.final
                await self._send(command)
        except TransferFailed as error:
            await self._stream.write(node_pb2.BlocksFrame(final=True, failure=str(error)))

    async def _send(self, command: SendBlocks) -> None:
        blocks, step = command.blocks, self._blocks_frame_max
        cuts = range(0, len(blocks), step) if blocks else (0,)
        for cut in cuts:
            part = blocks[cut : cut + step]
            last = cut + step >= len(blocks)
            self._next_block += len(part)
            size = len(part) * self._block_bytes
            await self._budget.acquire(size)
            offered = await self._transport.offer(part) if part else Offered(node_pb2.BlocksFrame(), nothing)
            self._flights.append(_Flight(size, offered.release, blocks if last else None))
            frame = offered.frame
            frame.blocks = len(part)
            frame.tokens = command.tokens if last else self._next_block * self._block_tokens
            if last and command.final:
                frame.final = True
                frame.computed_tokens = command.computed_tokens
            self._watch(True)
            await self._stream.write(frame)


class Exports:
    """What peers read from this node."""

    def __init__(
        self,
        transports: dict[str, Transport],
        block_bytes: int,
        block_tokens: int,
        handle: Callable[[NodeEvent], None],
        limits: TransferLimits,
    ) -> None:
        self._transports = transports
        self._block_bytes = block_bytes
        self._block_tokens = block_tokens
        self._handle = handle
        self._limits = limits
        self._open: dict[ExportId, Export] = {}
        self._last = 0

    def send(self, command: SendBlocks) -> None:
        """Execute `SendBlocks`; one for an export that has just closed is already answered by that."""
        export = self._open.get(command.export)
        if export is not None:
            export.send(command)

    def close(self) -> None:
        """End all calls."""
        for export in self._open.values():
            export.stop()

    async def serve(self, stream: Stream) -> None:
        """Serve one Fetch call from its first frame on."""
        first = await stream.read()
        if not isinstance(first, node_pb2.FetchFrame) or not first.HasField("request"):
            return
        request = first.request
        name = next((name for name in request.transports if name in self._transports), None)
        if name is None or request.block_bytes != self._block_bytes:
            failure = f"none of the transports {list(request.transports)} is known here"
            if name is not None:
                failure = f"blocks here have {self._block_bytes} bytes, not {request.block_bytes}"
            await stream.write(node_pb2.BlocksFrame(final=True, failure=failure))
            return
        self._last += 1
        id = ExportId(self._last)
        hashes = codec.hashes_from(request.hashes)
        opened = ExportOpened(
            id,
            RequestId(request.request),
            hashes,
            request.first_block,
            request.tokens,
            request.pending,
            request.incarnation if request.HasField("incarnation") else None,
        )
        export = Export(id, request, stream, self._transports[name], self._block_tokens, self._handle, self._limits)
        self._open[id] = export
        self._handle(opened)
        try:
            await export.run()
        finally:
            del self._open[id]
            self._handle(ExportClosed(id))


class Fetches:
    """What this node reads from peers.

    Args:
        transports: by name, those this node has.
        choose: names of transports to offer a source on the given host, best first.
        handle: takes events to the core.
        moved: is told, once a fetch that brought something: request, bytes, the seconds that copying them took, and how many
            seconds ago the first of them came.
    """

    def __init__(
        self,
        transports: dict[str, Transport],
        choose: Callable[[str], list[str]],
        block_bytes: int,
        block_tokens: int,
        channels: Channels,
        peers: PeerMemory,
        handle: Callable[[NodeEvent], None],
        moved: Callable[[RequestId, int, float, float], None],
    ) -> None:
        self._transports = transports
        self._choose = choose
        self._block_bytes = block_bytes
        self._block_tokens = block_tokens
        self._channels = channels
        self._peers = peers
        self._handle = handle
        self._moved = moved
        #: Hosts that promised shared memory and did not keep it; as many as there are hosts.
        self._unmappable: set[str] = set()
        self._running: dict[RequestId, asyncio.Task[None]] = {}

    def start(self, command: Fetch, address: str, host: str) -> None:
        """Execute `Fetch` from the source at `address`."""
        assert command.request not in self._running, f"request {command.request} fetches already"
        fetch = _FetchState(host, command.first_block * self._block_tokens)
        task = asyncio.ensure_future(self._run(command, address, fetch))
        self._running[command.request] = task
        # A callback, not code behind the read: a task cancelled before its first step runs none of its code.
        task.add_done_callback(lambda done: self._ended(command, fetch, done))

    def stop(self, request: RequestId) -> None:
        """Execute `StopFetch`."""
        task = self._running.get(request)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """Stop all and wait for the last copy."""
        tasks = tuple(self._running.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self, command: Fetch, address: str, fetch: "_FetchState") -> None:
        channel = self._channels.take(address)
        try:
            await self._read(command, channel, fetch)
        finally:
            await self._channels.release(address)

    def _ended(self, command: Fetch, fetch: "_FetchState", task: asyncio.Task[None]) -> None:
        del self._running[command.request]
        if task.cancelled():
            fetch.failure = "stopped"
        elif task.exception() is not None:
            fetch.failure = self._failure(command, fetch, task.exception())
        if fetch.bytes:
            self._moved(command.request, fetch.bytes, fetch.seconds, time.perf_counter() - fetch.began_s)
        self._handle(FetchEnded(command.request, fetch.tokens, fetch.computed_tokens, fetch.failure))

    def _failure(self, command: Fetch, fetch: "_FetchState", error: BaseException | None) -> str:
        match error:
            case TransferFailed():
                if isinstance(error, PeerUnmappable):
                    self._unmappable.add(fetch.host)
                return str(error)
            case grpc.aio.AioRpcError():
                self._peers.forget(fetch.path)
                return f"{command.source} is unreachable: {error.details()}"
            case _:
                asyncio.get_running_loop().call_exception_handler({"message": f"{command} failed", "exception": error})
                return f"fetch from {command.source} failed: {error!r}"

    async def _read(self, command: Fetch, channel: grpc.aio.Channel, fetch: "_FetchState") -> None:
        names = [name for name in self._choose(fetch.host) if name != SHM or fetch.host not in self._unmappable]
        if not names:
            raise TransferFailed(f"no transport reaches {command.source}")
        call = node_pb2_grpc.NodeStub(channel).Fetch(metadata=self._channels.trust.metadata(Caller.PEER, command.source))
        try:
            await call.write(node_pb2.FetchFrame(request=self._request(command, names)))
            while not fetch.final:
                frame = await call.read()
                if not isinstance(frame, node_pb2.BlocksFrame):
                    raise TransferFailed(f"{command.source} ended the fetch early")
                await self._take(command, frame, fetch)
                await call.write(node_pb2.FetchFrame(frames_copied=1))
                if not fetch.final:
                    self._handle(FetchProgressed(command.request, fetch.tokens))
            await call.done_writing()
        finally:
            if not fetch.final:
                call.cancel()

    def _request(self, command: Fetch, names: list[str]) -> node_pb2.FetchRequest:
        return node_pb2.FetchRequest(
            request=command.request,
            hashes=pack_hashes(command.hashes),
            first_block=command.first_block,
            tokens=command.tokens,
            pending=command.pending,
            block_bytes=self._block_bytes,
            transports=names,
            incarnation=command.incarnation,
        )

    async def _take(self, command: Fetch, frame: node_pb2.BlocksFrame, fetch: "_FetchState") -> None:
        if frame.failure:
            raise TransferFailed(frame.failure)
        targets = command.blocks[fetch.blocks : fetch.blocks + frame.blocks]
        if len(targets) < frame.blocks:
            raise TransferFailed(f"{command.source} sent more than the {len(command.blocks)} blocks asked for")
        if targets:
            fetch.path = frame.shm.path or fetch.path
            started = time.perf_counter()
            fetch.began_s = fetch.began_s or started
            transport = self._transports.get(frame.WhichOneof("payload") or "")
            if transport is None:
                raise TransferFailed(f"{command.source} sent {len(targets)} blocks in no way known here")
            fetch.bytes += await transport.take(frame, targets)
            fetch.seconds += time.perf_counter() - started
        fetch.blocks += len(targets)
        if targets:
            fetch.tokens = min(frame.tokens, command.tokens)
        if frame.final:
            fetch.final = True
            fetch.computed_tokens = frame.computed_tokens


@dataclass(slots=True)
class _FetchState:
    """How far a fetch is."""

    #: The source's host id.
    host: str
    #: Prompt tokens present without a hole.
    tokens: int
    blocks: int = 0
    bytes: int = 0
    seconds: float = 0.0
    #: When the first frame with blocks came, on the performance counter.
    began_s: float = 0.0
    computed_tokens: int = 0
    final: bool = False
    failure: str | None = None
    #: The source's memory, if it is mapped.
    path: str = ""
