"""One gateway's stream to one host's store: keeps it up, says what the gateway asks for, hands on what comes in.

A store whose stream ends is lost at once and joins anew with the next stream: what it holds is told again then, and a wrong
belief meanwhile costs a recompute. One on which nothing came for `lost_s` hangs; a store that has nothing to say tells its load.
"""

import asyncio
import logging
import random
from collections import deque
from typing import Any, Protocol, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from orchestrator.core.events import EvictAsked, PrefetchAsked
from orchestrator.core.types import GatewayId, ModelName, StoreId, StoreSpec
from orchestrator.live.listening import RETRY_S_MAX, RETRY_S_MIN, WELCOME_S_MAX, listen, report_breakdown
from orchestrator.wire import codec, store_codec, store_pb2, store_pb2_grpc
from orchestrator.wire.leases import LeaseMessage, LeaseNews
from orchestrator.wire.trust import Caller, Trust

log = logging.getLogger("weft.links")
#: Advice that waits for a store that does not read.
ADVICE_MAX = 256


class Call(Protocol):
    """The gateway's end of a Connect call."""

    async def read(self) -> object: ...

    async def write(self, message: store_pb2.ToStore) -> None: ...

    def cancel(self) -> bool: ...


class StoreSink(Protocol):
    """Who hears what stores say."""

    def store_joined(self, spec: StoreSpec) -> None:
        """A store is there."""
        ...

    def store_lost(self, store: StoreId, reason: str) -> None:
        """A store that had joined is gone."""
        ...

    def store_frame(self, store: StoreId, frame: store_pb2.FromStore) -> None:
        """A frame came from a store that has joined. Raises `MalformedMessage`."""
        ...


class StoreLink:
    """The stream to one store. Made on a running loop; `start` and `close` bracket its life."""

    def __init__(self, store: StoreId, address: str, gateway: GatewayId, sink: StoreSink, lost_s: float, trust: Trust) -> None:
        self.store = store
        self.address = address
        #: The store as it described itself; None while there is no stream.
        self.spec: StoreSpec | None = None
        self._gateway = gateway
        self._sink = sink
        self._lost_s = lost_s
        self._trust = trust
        #: What goes out with the next frame; by model, so that it is bounded by them.
        self._resyncs: dict[ModelName, store_pb2.Resync] = {}
        self._leases = LeaseNews()
        #: Oldest first.
        self._advice: deque[PrefetchAsked | EvictAsked] = deque(maxlen=ADVICE_MAX)
        self._frames_received = 0
        self._frames_told = 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Connect, and keep connected."""
        self._task = asyncio.ensure_future(self._run())
        self._task.add_done_callback(report_breakdown)

    def resync(self, model: ModelName, after: int | None) -> None:
        """Ask for a model's batches after a number, or for all."""
        self._resyncs[model] = store_pb2.Resync(model=model, after=after)
        self._wake.set()

    def tell_lease(self, message: LeaseMessage) -> None:
        """Tell of a lease or of its end."""
        self._leases.add(message)
        self._wake.set()

    def advise(self, advice: PrefetchAsked | EvictAsked) -> None:
        """Tell what somebody expects; the oldest advice is forgotten where too much waits."""
        self._advice.append(advice)
        self._wake.set()

    async def close(self) -> None:
        """End the stream and stop trying; nothing is reported any more."""
        self.spec = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    def give_up(self, reason: str) -> None:
        """Report the store lost, if it had joined."""
        if self.spec is not None:
            self.spec = None
            self._sink.store_lost(self.store, reason)

    async def _run(self) -> None:
        channel = self._trust.open_channel(self.address)
        retry_s = RETRY_S_MIN
        try:
            while True:
                reason, joined = await self._try(channel)
                self.give_up(reason)
                retry_s = RETRY_S_MIN if joined else min(retry_s * 2, RETRY_S_MAX)
                await asyncio.sleep(retry_s * random.uniform(1.0, 1.1))
        finally:
            await channel.close(None)

    async def _try(self, channel: grpc.aio.Channel) -> tuple[str, bool]:
        """Hold one stream for as long as it lasts. Returns why it ended, and whether the store had joined."""
        stub = cast(Any, store_pb2_grpc.StoreStub(channel))  # The generated stub has no types.
        call = cast(Call, stub.Connect(metadata=self._trust.metadata(Caller.STORE_GATEWAY, self.store)))
        writer: asyncio.Task[None] | None = None
        try:
            await call.write(store_pb2.ToStore(hello=store_pb2.GatewayHello(gateway=self._gateway)))
            async with asyncio.timeout(WELCOME_S_MAX):
                frame = await call.read()
            if not isinstance(frame, store_pb2.FromStore) or not frame.HasField("welcome"):
                return "no Welcome", False
            self._frames_received = self._frames_told = 0
            self._resyncs.clear()
            self._leases.clear()
            self._advice.clear()
            self.spec = store_codec.spec_from(frame.welcome)
            self._sink.store_joined(self.spec)
            self._sink.store_frame(self.store, frame)
            writer = asyncio.ensure_future(self._write(call))
            return await self._read(call), True
        except grpc.aio.AioRpcError as error:
            return error.details() or str(error.code()), self.spec is not None
        except TimeoutError:
            return f"no Welcome within {WELCOME_S_MAX} s", False
        except (codec.MalformedMessage, DecodeError) as error:
            log.warning("store %s sent what means nothing: %s", self.store, error)
            return str(error), False
        finally:
            call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.wait((writer,))

    async def _read(self, call: Call) -> str:
        """Take frames until the stream ends or says nothing for too long; returns which."""
        return await listen(call, store_pb2.FromStore, self._lost_s, self._take) or "the store ended the stream"

    def _take(self, frame: store_pb2.FromStore) -> None:
        self._frames_received += 1
        self._sink.store_frame(self.store, frame)
        if self._must_tell:
            self._wake.set()

    @property
    def _must_tell(self) -> bool:
        """Whether the store must hear that its frames were read, or it stops sending."""
        return self._frames_received - self._frames_told >= codec.FRAMES_UNREAD_MAX // 2

    async def _write(self, call: Call) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._frames_told = self._frames_received
            frame = store_pb2.ToStore(resyncs=self._resyncs.values(), frames_received=self._frames_received)
            self._resyncs.clear()
            self._add_hints(frame)
            await call.write(frame)

    def _add_hints(self, frame: store_pb2.ToStore) -> None:
        """Put leases and advice into a frame, oldest first, one at least; a next frame brings what is left."""
        size = self._leases.add_to(frame, 0)
        while self._advice and not self._leases and size <= codec.FRAME_BYTES_MAX:
            advice = self._advice.popleft()
            if isinstance(advice, PrefetchAsked):
                frame.prefetches.append(store_codec.prefetch_message(advice))
                size += frame.prefetches[-1].ByteSize()
            else:
                frame.evictions.append(store_codec.evict_message(advice))
                size += frame.evictions[-1].ByteSize()
        if self._leases or self._advice:
            self._wake.set()
