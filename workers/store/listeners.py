"""What a store has to tell one gateway: holdings, loads and moves that gathered since the frame before.

A gateway that reads slowly gets fewer, larger frames; one that reads nothing is let go, and asks for everything when it is back.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from orchestrator.core.types import GatewayId
from orchestrator.wire import codec, node_pb2, store_pb2
from workers.store.moves import Carried

#: Bytes that may wait for a gateway which does not read.
UNSENT_BYTES_MAX = 256 * 1024 * 1024
#: Moves told one by one in a frame; more are told as one with another of their way.
MOVES_MAX = 256


class Stream(Protocol):
    """The store's end of a call."""

    async def write(self, message: object) -> None: ...


class Listener:
    """One gateway's call."""

    def __init__(self, gateway: GatewayId) -> None:
        self.gateway = gateway
        self.frames_sent = 0
        #: Of those, the ones that the gateway is known to have read.
        self.frames_read = 0
        self._serving = asyncio.current_task()
        self._holdings: deque[store_pb2.Holdings] = deque()
        self._bytes = 0
        self._loads: Sequence[store_pb2.ModelLoad] = ()
        self._refused_calls = 0
        self._moves: list[node_pb2.Move] = []
        self._said = asyncio.Event()

    def add_holdings(self, messages: Sequence[store_pb2.Holdings]) -> None:
        """Tell changes of holdings, in order."""
        self._holdings += messages
        self._bytes += sum(message.ByteSize() for message in messages)
        if self._bytes > UNSENT_BYTES_MAX:
            self.end()
        self._said.set()

    def add_move(self, carried: Carried) -> None:
        """Tell of a move between the host's memory and `cmx`."""
        same = [one for one in self._moves if one.source == carried.source] if len(self._moves) >= MOVES_MAX else []
        move = same[0] if same else node_pb2.Move(source=carried.source, target=carried.target)
        if not same:
            self._moves.append(move)
        move.bytes += carried.bytes
        move.seconds += carried.seconds
        self._said.set()

    def set_loads(self, loads: Sequence[store_pb2.ModelLoad], refused_calls: int) -> None:
        """Tell how the store is; only the last counts."""
        self._loads, self._refused_calls = loads, refused_calls
        self._said.set()

    def wake(self) -> None:
        """See whether something may go out."""
        self._said.set()

    def end(self) -> None:
        """End the call."""
        if self._serving is not None:
            self._serving.cancel()

    async def write_all(self, stream: Stream) -> None:
        """Write what there is to say, whenever there is something and the gateway keeps up."""
        while True:
            await self._said.wait()
            self._said.clear()
            while self._pending and self.frames_sent - self.frames_read < codec.FRAMES_UNREAD_MAX:
                self.frames_sent += 1
                await stream.write(self._frame())

    @property
    def _pending(self) -> bool:
        return bool(self._holdings or self._loads or self._moves)

    def _frame(self) -> store_pb2.FromStore:
        frame = store_pb2.FromStore(loads=self._loads, moves=self._moves, refused_calls=self._refused_calls)
        self._loads, self._moves = (), []
        size = 0
        while self._holdings and size < codec.FRAME_BYTES_MAX:
            message = self._holdings.popleft()
            size += message.ByteSize()
            frame.holdings.append(message)
        self._bytes -= size
        return frame
