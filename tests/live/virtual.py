"""Live drivers in virtual time: an event loop whose clock jumps, calls between drivers that take a fixed time and no socket."""

import asyncio
import heapq
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

from orchestrator.core.types import NodeId
from orchestrator.wire import codec, node_pb2
from workers.driver import NodeDriver


class _JumpingSelector(selectors.DefaultSelector):
    """Returns at once where it would wait for a timer, and lets that much time have passed."""

    def __init__(self) -> None:
        super().__init__()
        self.loop: VirtualLoop | None = None

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:  # nothing but another thread can go on
            return super().select(5.0)
        ready = super().select(0)
        if timeout > 0 and not ready and self.loop is not None:
            self.loop.jump()
        return ready


class _Timer(asyncio.TimerHandle):
    """A timer that fires after those that were set before it for the same moment; asyncio's own have no order then."""

    __slots__ = ("serial",)

    def __lt__(self, other: Any) -> bool:
        return (self.when(), self.serial) < (other.when(), other.serial)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which waiting takes no time; its clock starts at 0."""

    def __init__(self) -> None:
        selector = _JumpingSelector()
        self._now = 0.0
        self._serial = 0
        super().__init__(selector)
        selector.loop = self

    def time(self) -> float:
        return self._now

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> _Timer:
        timer = _Timer(when, callback, args, self, context)
        self._serial += 1
        timer.serial = self._serial
        heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer

    def jump(self) -> None:
        """Let the time of the next timer come, to the last bit."""
        self._now = max(self._now, self._scheduled[0].when())  # type: ignore[attr-defined]


def run_virtually(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())  # type: ignore[arg-type]


class End:
    """One end of a call: what is written to the other arrives there after the latency, in order."""

    def __init__(self, latency_s: float) -> None:
        self._arrived: asyncio.Queue[object] = asyncio.Queue()
        self._latency_s = latency_s
        self.other: End = self
        #: What serves the far end; ended by `cancel`.
        self.task: asyncio.Task[None] | None = None

    async def read(self) -> object:
        return await self._arrived.get()

    async def write(self, message: Any) -> None:
        # Serialised and parsed as on a wire: what a driver goes on changing is not what arrives.
        self._send(type(message).FromString(message.SerializeToString()))

    async def done_writing(self) -> None:
        self._send(grpc.aio.EOF)

    def cancel(self) -> bool:
        if self.task is not None:
            self.task.cancel()
        return True

    def _send(self, message: object) -> None:
        # An acknowledged copy is known to both ends at once, as in the simulator.
        known = isinstance(message, node_pb2.FetchFrame) and message.frames_copied > 0
        latency_s = 0.0 if known else self._latency_s
        asyncio.get_running_loop().call_later(latency_s, self.other._arrived.put_nowait, message)


class Wires:
    """All calls between drivers; stands in for the generated stub.

    Args:
        hop_s: latency of a message between gateway and node.
        data_s: of one that carries blocks from node to node.
    """

    def __init__(self, hop_s: float, data_s: float) -> None:
        self._hop_s = hop_s
        self._data_s = data_s
        self.nodes: dict[NodeId, NodeDriver] = {}

    def __call__(self, channel: object) -> "Wires":
        return self

    def Connect(self, metadata: tuple[tuple[str, str]]) -> End:  # noqa: N802
        return self._call(self._node(metadata).serve_gateway, self._hop_s)

    def Fetch(self, metadata: tuple[tuple[str, str]]) -> End:  # noqa: N802
        return self._call(self._node(metadata).serve_peer, self._data_s)

    def _node(self, metadata: tuple[tuple[str, str]]) -> NodeDriver:
        return self.nodes[NodeId(dict(metadata)[codec.NODE_METADATA])]

    def _call(self, serve: Callable[[Any], Awaitable[None]], back_s: float) -> End:
        near, far = End(self._hop_s), End(back_s)
        near.other, far.other = far, near

        async def served() -> None:
            await serve(far)

        near.task = asyncio.ensure_future(served())
        return near


class NoChannel:
    """Stands in for a connection, of which `Wires` has no need."""

    async def close(self, grace: float | None = None) -> None:
        return None
