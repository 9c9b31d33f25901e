"""An FFN rank's end of the lanes between hosts, at which hostile messages and hostile hellos are thrown. See `frames.py`."""

import asyncio
import json
import random
import socket
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from bench.frames import ANSWER_S_MAX, TRUST, Victim
from orchestrator.wire.trust import Caller
from workers.engines.base import NetworkPlace
from workers.engines.device import dtype_of
from workers.engines.greetings import framed, hello_of, place_of
from workers.engines.shape import read_architecture
from workers.engines.split.ffn import ELSEWHERE
from workers.engines.split.lanes import Header, RankLost, layout_for
from workers.engines.split.network import NetworkLink
from workers.engines.split.rank import FfnRank

LANES, ROWS_MAX = 2, 8


class ConnectionVictim(Victim):
    """A process at an address of its own, thrown at over connections that it has greeted."""

    caller: Caller

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self._address = ""
        #: What an honest caller says of itself.
        self._said: Mapping[str, int | str] = {}
        self.good = (self._make,)

    async def take(self, frames: Sequence[bytes], answers: Counter[str]) -> None:
        for frame in frames:
            answers[await asyncio.to_thread(self._throw, frame)] += 1

    async def works(self) -> bool:
        return self._thread.is_alive() and await asyncio.to_thread(self._works)

    def _begin(self, address: str, serve: Callable[[], None]) -> None:
        """Serve in a thread."""
        self._address = address
        self._thread = threading.Thread(target=self._serve, args=(serve,), daemon=True)
        self._thread.start()

    def _serve(self, serve: Callable[[], None]) -> None:
        try:
            serve()
        except Exception as error:  # Whatever it is, no frame may bring it about.
            self.failures.append(repr(error))

    def _make(self, source: random.Random) -> bytes:
        raise NotImplementedError

    def _works(self) -> bool:
        raise NotImplementedError

    def _throw(self, frame: bytes) -> str:
        """Send a frame over a connection that ends with it; returns how the other side ended it."""
        with socket.create_connection(place_of(self._address), ANSWER_S_MAX) as connection:
            try:
                self._open(connection)
                connection.sendall(frame)
                connection.shutdown(socket.SHUT_WR)
                answered = b""
                while piece := connection.recv(1 << 16):
                    answered = piece
            except TimeoutError:
                self.failures.append(f"nothing came, and no end, after {frame[:300]!r}")
                return "silent"
            except OSError:
                return "ended"
        return "answered" if answered else "ended"

    def _open(self, connection: socket.socket) -> None:
        """Say who this is, and hear the answer: a seal and the number."""
        nonce = "00"
        connection.sendall(self._hello(nonce))
        wanted = len(framed(TRUST.sealed(nonce.encode())))
        while wanted and (piece := connection.recv(wanted)):
            wanted -= len(piece)

    def _hello(self, nonce: str, **changes: int) -> bytes:
        return framed(json.dumps(hello_of(self._address, self.caller, self._said, TRUST, nonce) | changes).encode())


class RankVictim(ConnectionVictim):
    """An FFN rank, thrown at by an attention rank of another host that it has greeted."""

    what = "messages of an attention rank to an FFN rank"
    caller = Caller.RANK

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self._shape = read_architecture(model)
        self._layout = layout_for(self._shape, dtype_of("float32", self._shape), LANES, ROWS_MAX)
        self._said = self._layout.said

    async def _start(self) -> None:
        self._rank = await asyncio.to_thread(
            FfnRank, self._model, "float32", "cpu", 0, 1, 0, network=NetworkPlace("127.0.0.1", TRUST)
        )
        self._begin(self._rank.network_address or "", self._rank.serve)

    async def _stop(self) -> None:
        self._rank.close()
        await asyncio.to_thread(self._thread.join, ANSWER_S_MAX)

    def _make(self, source: random.Random) -> bytes:
        lane, layer = source.choice((0, 0, 1, LANES)), source.choice((0, 0, self._shape.layers - 1, self._shape.layers))
        rows = source.choice((0, 1, ROWS_MAX, ROWS_MAX + 1))
        inputs, weights, picks, _ = (rows * width for _, width in self._layout.parts(0))
        slots = array("q", [source.choice((0, 1, 5, ELSEWHERE)) for _ in range(picks // 8)])
        header = Header(lane, layer, source.choice((0, 0, 0, 1)), rows).pack()
        return header + source.randbytes(inputs + weights) + slots.tobytes()

    def _works(self) -> bool:
        """Have two equal rows computed."""
        try:
            link = NetworkLink(self._address, self._layout, ANSWER_S_MAX, TRUST, torch.device("cpu"))
            number, lane = link.take()
            lane.rows[:2], lane.weights[:2], lane.picks[:2] = 1.0, 0.5, 0
            link.post(Header(number, 0, 0, 2))
            link.wait()
            link.close()
        except RankLost:
            return False
        return torch.equal(lane.sums[0], lane.sums[1]) and bool(lane.sums[0].any())


class DoorVictim(RankVictim):
    """An FFN rank's door, thrown at by whoever reaches its port."""

    what = "hellos to an FFN rank"

    def _make(self, source: random.Random) -> bytes:
        return self._hello("00", lanes=source.choice((1, LANES, 1 << 40)), rows_max=source.choice((1, ROWS_MAX, -1)))

    def _open(self, connection: socket.socket) -> None:
        del connection  # the frame is the hello
