"""One gateway's stream to one node: keeps it up, bundles what goes out, hands on what comes in.

    connecting ── Welcome ──> joined ── stream ends ──> away ── Welcome, resumed ──> joined
         ^                                                │
         └──────────── lost (reported once) <── too long away, frames lost, or given up

A node is reported lost when it was away for `lost_s`, when frames got lost with a stream (both ends count them), when nothing
came on a stream for `lost_s` (a process that hangs keeps its sockets), or at once when somebody who knows says so. Trying goes on
until `close`.
"""

import asyncio
import logging
import random
from typing import Any, Protocol, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from orchestrator.core.outlook import ContextId, Outlook
from orchestrator.core.silence import HEARTBEATS
from orchestrator.core.types import GatewayId, NodeId, NodeSpec, PrefetchId, RequestId
from orchestrator.live.listening import RETRY_S_MAX, RETRY_S_MIN, WELCOME_S_MAX, listen, report_breakdown
from orchestrator.wire import codec, node_pb2, node_pb2_grpc
from orchestrator.wire.leases import LeaseMessage, LeaseNews
from orchestrator.wire.trust import Caller, Trust

log = logging.getLogger("weft.links")

#: Hints about dead blocks that wait for a node that does not read.
ADVICE_MAX = 256
#: Contexts of which a node is to hear at once at most.
OUTLOOKS_MAX = 4096


class Call(Protocol):
    """The gateway's end of a Connect call."""

    async def read(self) -> object: ...

    async def write(self, message: node_pb2.GatewayFrame) -> None: ...

    def cancel(self) -> bool: ...


class NodeSink(Protocol):
    """Who hears what nodes say."""

    def node_joined(self, spec: NodeSpec, fingerprint: str) -> bool:
        """A node is there. Returns False if it must not be used."""
        ...

    def node_lost(self, node: NodeId, reason: str) -> None:
        """A node that had joined is gone with all it did."""
        ...

    def node_draining(self, node: NodeId) -> None:
        """A node that has joined takes nothing new."""
        ...

    def node_frame(self, node: NodeId, frame: node_pb2.NodeFrame) -> None:
        """A frame came from a node that has joined. Raises `MalformedMessage`."""
        ...

    def node_malformed(self, node: NodeId) -> None:
        """A frame came that means nothing."""
        ...


class NodeLink:
    """The stream to one node. Made on a running loop; `start` and `close` bracket its life."""

    def __init__(
        self, node: NodeId, address: str, gateway: GatewayId, incarnation: int, sink: NodeSink, lost_s: float, trust: Trust
    ) -> None:
        self.node = node
        self.address = address
        #: The node as it described itself; None until it has joined and after it was lost.
        self.spec: NodeSpec | None = None
        self._hello = node_pb2.Hello(gateway=gateway, incarnation=incarnation, heartbeat_s=lost_s / HEARTBEATS)
        self._sink = sink
        self._trust = trust
        self._lost_s = lost_s
        self._draining = False
        #: What goes out with the next frame; bounded by the requests the cluster lets in.
        self._submits: dict[RequestId, codec.Submission] = {}
        self._cancels: list[RequestId] = []
        self._lost_sources: list[node_pb2.LostSource] = []
        #: The newest of each context; bounded by `OUTLOOKS_MAX`.
        self._outlooks: dict[ContextId, node_pb2.Outlook] = {}
        self._resync: node_pb2.Resync | None = None
        #: What was decided last of each lease, and what is to become of blocks, oldest first.
        self._leases = LeaseNews()
        self._advice: list[node_pb2.Advice] = []
        #: As many as the cluster lets be under way.
        self._prefetches: list[node_pb2.Prefetch] = []
        self._cancelled_prefetches: list[PrefetchId] = []
        #: Frames that the node knows were read, and when it was last told anything.
        self._frames_told = 0
        self._told_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._away: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Connect, and keep connected."""
        self._task = asyncio.ensure_future(self._run())
        self._task.add_done_callback(report_breakdown)

    def submit(self, submission: codec.Submission) -> None:
        """Send an assignment with the loop's next frame."""
        self._submits[submission.assignment.request] = submission
        self._wake.set()

    def cancel(self, request: RequestId) -> None:
        """Send a cancel, or take back a submit that has not gone out."""
        if self._submits.pop(request, None) is None:
            self._cancels.append(request)
            self._wake.set()

    def source_lost(self, request: RequestId, source: NodeId) -> None:
        """Tell that a request's source is gone, or leave it out of a submit that has not gone out."""
        submit = self._submits.get(request)
        if submit is None:
            self._lost_sources.append(node_pb2.LostSource(request=request, source=source))
            self._wake.set()
        elif submit.assignment.source == source:
            submit.forget_source()

    def expect(self, outlook: Outlook) -> None:
        """Tell what is expected of a context by now; where too many wait to go out, the oldest never does: it is a hint."""
        self._outlooks.pop(outlook.context, None)
        self._outlooks[outlook.context] = codec.outlook_message(outlook)
        if len(self._outlooks) > OUTLOOKS_MAX:
            del self._outlooks[next(iter(self._outlooks))]
        self._wake.set()

    def resync(self, after: int | None) -> None:
        """Ask for the KV batches after a number, or for all."""
        self._resync = node_pb2.Resync(after=after)
        self._wake.set()

    def tell_lease(self, message: LeaseMessage) -> None:
        """Tell of a lease or of its end."""
        self._leases.add(message)
        self._wake.set()

    def advise(self, message: node_pb2.Advice) -> None:
        """Tell what is to become of some blocks; the oldest hint is forgotten where too many wait."""
        self._advice.append(message)
        del self._advice[:-ADVICE_MAX]
        self._wake.set()

    def prefetch(self, message: node_pb2.Prefetch) -> None:
        """Have blocks brought before a request asks for them."""
        self._prefetches.append(message)
        self._wake.set()

    def cancel_prefetch(self, prefetch: PrefetchId) -> None:
        """Tell that a prefetch is wanted no longer; it does not overtake that."""
        self._cancelled_prefetches.append(prefetch)
        self._wake.set()

    def give_up(self, reason: str) -> None:
        """Report the node lost at once, if it had joined."""
        if self._away is not None:
            self._away.cancel()
            self._away = None
        self._hello.frames_sent = self._hello.frames_received = 0
        self._submits.clear()
        self._cancels.clear()
        self._lost_sources.clear()
        self._leases.clear()
        self._advice.clear()
        self._prefetches.clear()
        self._cancelled_prefetches.clear()
        self._outlooks.clear()
        self._resync = None
        if self.spec is not None:
            self.spec = None
            self._sink.node_lost(self.node, reason)

    async def close(self) -> None:
        """End the stream and stop trying; nothing is reported any more."""
        self.spec = None
        if self._away is not None:
            self._away.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _run(self) -> None:
        channel = self._trust.open_channel(self.address)
        retry_s = RETRY_S_MIN
        try:
            while True:
                joined = self.spec
                reason = await self._try(channel)
                retry_s = RETRY_S_MIN if self.spec is not joined else min(retry_s * 2, RETRY_S_MAX)
                if self.spec is not None and self._away is None:
                    log.info("node %s: %s; reconnecting", self.node, reason)
                    self._away = asyncio.get_running_loop().call_later(self._lost_s, self.give_up, reason)
                await asyncio.sleep(retry_s * random.uniform(1.0, 1.1))
        finally:
            await channel.close(None)

    async def _try(self, channel: grpc.aio.Channel) -> str:
        """Hold one stream for as long as it lasts. Returns why it ended."""
        # The generated stub has no types.
        stub = cast(Any, node_pb2_grpc.NodeStub(channel))
        call = cast(Call, stub.Connect(metadata=self._trust.metadata(Caller.GATEWAY, self.node)))
        try:
            await call.write(node_pb2.GatewayFrame(hello=self._hello))
            async with asyncio.timeout(WELCOME_S_MAX):
                frame = await call.read()
            if not isinstance(frame, node_pb2.NodeFrame) or not frame.HasField("welcome"):
                return "no Welcome"
            if not self._welcomed(frame):
                return "unfit"
            writer = asyncio.ensure_future(self._write(call))
            try:
                return await self._read(call)
            finally:
                writer.cancel()
                await asyncio.wait((writer,))
        except grpc.aio.AioRpcError as error:
            return error.details() or str(error.code())
        except TimeoutError:
            return f"no Welcome within {WELCOME_S_MAX} s"
        except (codec.MalformedMessage, DecodeError) as error:
            log.warning("node %s sent what means nothing: %s", self.node, error)
            self._sink.node_malformed(self.node)
            self.give_up(str(error))
            return str(error)
        finally:
            call.cancel()

    async def _read(self, call: Call) -> str:
        """Take frames until the stream ends or says nothing for too long; returns which."""
        silent = await listen(call, node_pb2.NodeFrame, self._lost_s, self._take)
        if silent is not None:
            self.give_up(silent)
        return silent or "the node ended the stream"

    def _take(self, frame: node_pb2.NodeFrame) -> None:
        self._hello.frames_received += 1
        self._on_frame(frame)
        if self._must_tell:
            self._wake.set()

    def _welcomed(self, frame: node_pb2.NodeFrame) -> bool:
        """Take the node's Welcome. Returns False if the node is not to be used."""
        spec = codec.spec_from(frame.welcome)
        if not frame.welcome.resumed:
            self.give_up("frames were lost with the stream" if spec == self.spec else "the node started anew")
        if self._away is not None:
            self._away.cancel()
            self._away = None
        if self.spec is None:
            self._draining = False
            if not self._sink.node_joined(spec, frame.welcome.fingerprint):
                return False
            self.spec = spec
        self._on_frame(frame)
        return True

    def _on_frame(self, frame: node_pb2.NodeFrame) -> None:
        if self.spec is None:
            return
        if frame.draining and not self._draining:
            self._draining = True
            self._sink.node_draining(self.node)
        self._sink.node_frame(self.node, frame)

    @property
    def _says_something(self) -> bool:
        """Whether anything waits to go out; bounded by the requests the cluster lets in."""
        waits = self._submits or self._cancels or self._lost_sources or self._outlooks or self._resync is not None
        return bool(waits or self._hints)

    @property
    def _hints(self) -> bool:
        """Whether anything waits to go out that harnesses asked for."""
        return bool(self._leases or self._advice or self._prefetches or self._cancelled_prefetches)

    @property
    def _must_tell(self) -> bool:
        """Whether the node must hear that its frames were read, or it stops sending, or takes this gateway for hung.

        Else that goes along with the next frame.
        """
        unread = self._hello.frames_received - self._frames_told
        if unread >= codec.FRAMES_UNREAD_MAX // 2:
            return True
        return unread > 0 and self._loop.time() - self._told_s >= self._hello.heartbeat_s

    async def _write(self, call: Call) -> None:
        self._frames_told = self._hello.frames_received
        while True:
            await self._wake.wait()
            self._wake.clear()
            # A frame that only tells of others may get lost: it does not count.
            while (counts := self._says_something) or self._must_tell:
                read = self._frames_told = self._hello.frames_received
                frame = node_pb2.GatewayFrame(
                    cancels=self._cancels,
                    lost_sources=self._lost_sources,
                    outlooks=self._outlooks.values(),
                    resync=self._resync,
                    frames_received=read,
                )
                self._add_submits(frame)
                if self._hints:
                    self._add_hints(frame)
                self._cancels.clear()
                self._lost_sources.clear()
                self._outlooks.clear()
                self._resync = None
                self._hello.frames_sent += counts
                self._told_s = self._loop.time()
                await call.write(frame)

    def _add_hints(self, frame: node_pb2.GatewayFrame) -> None:
        """Put leases, prefetches and advice into a frame, oldest first, one at least, as far as it goes."""
        size = self._leases.add_to(frame, frame.ByteSize())
        while self._prefetches and not self._leases and size <= codec.FRAME_BYTES_MAX:
            size += self._prefetches[0].ByteSize()
            frame.prefetches.append(self._prefetches.pop(0))
        if self._leases or self._prefetches:
            return
        frame.cancelled_prefetches.extend(self._cancelled_prefetches)
        self._cancelled_prefetches.clear()
        while self._advice and size <= codec.FRAME_BYTES_MAX:
            size += self._advice[0].ByteSize()
            frame.advice.append(self._advice.pop(0))

    def _add_submits(self, frame: node_pb2.GatewayFrame) -> None:
        """Put the oldest submits into a frame, one at least, as far as it goes; they are written straight into it."""
        size = 0
        while self._submits and size <= codec.FRAME_BYTES_MAX:
            submission = self._submits.pop(next(iter(self._submits)))
            message = frame.submits.add()
            codec.write_submit(message, submission)
            size += message.ByteSize()
