"""Lanes between hosts: each end has memory of its own, and what is filled of it crosses a TCP connection from one to the other.

Who connects is greeted (`greetings.py`) and says how its lanes are laid out. Then there are

    messages       Header, rows, weights, picks: so many rows of each as the header says
    their answers  Header, sums

Neither side waits for the other to read: an FFN rank sends what the connection takes and goes on (`inlet.py`), since an attention
rank that is sending its next message reads nothing meanwhile.
"""

import socket
import ssl
import struct
from collections import deque
from dataclasses import dataclass

import torch

from orchestrator.wire.trust import Caller, Trust
from workers.engines.greetings import Stream, connected, door_at
from workers.engines.inlet import Door
from workers.engines.split.lanes import Header, Lane, LaneLayout, RankLost

_SECONDS = struct.Struct("ll")


class LaneBytes:
    """One lane's memory as it crosses: the first rows of each of its parts."""

    __slots__ = ("_inputs", "_sums", "lane")

    def __init__(self, layout: LaneLayout, memory: memoryview, number: int) -> None:
        parts = [(memory[start : start + layout.rows_max * width], width) for start, width in layout.parts(number)]
        *self._inputs, self._sums = parts
        self._inputs = [(part, width) for part, width in self._inputs if width]
        self.lane = layout.lane(memory, number)

    def message(self, rows: int) -> list[memoryview]:
        """Return what goes to the FFN rank."""
        return [part[: rows * width] for part, width in self._inputs]

    def sums(self, rows: int) -> memoryview:
        """Return what comes back."""
        part, width = self._sums
        return part[: rows * width]


class NetworkLink:
    """An attention rank's end: lanes to one FFN rank of another host. See `Link`."""

    crosses_network = True

    def __init__(self, address: str, layout: LaneLayout, silent_s: float, trust: Trust, device: torch.device) -> None:
        """Connect to a rank at `address` (NAME@HOST:PORT). Raises `RankLost` if it does not take the connection."""
        self._silent_s = silent_s
        self._name = address
        memory = lane_memory(layout, device)
        self._lanes = [LaneBytes(layout, memory, number) for number in range(layout.lanes)]
        self._free = deque(range(layout.lanes))
        self._sent: deque[Header] = deque()
        self._head = bytearray(Header.LAYOUT.size)
        try:
            self._stream = Stream(connected(address, Caller.RANK, layout.said, trust))
        except (OSError, ValueError) as error:
            raise RankLost(f"FFN rank {address} does not take a connection: {error}") from error
        _wait_for(self._stream.connection, silent_s)

    def take(self) -> tuple[int, Lane]:
        """See `Link.take`."""
        number = self._free.popleft()
        return number, self._lanes[number].lane

    def post(self, header: Header) -> None:
        """See `Link.post`."""
        self._sent.append(header)
        views = [memoryview(header.pack()), *self._lanes[header.lane].message(header.rows)]
        try:
            if not self._stream.drain(views):
                raise RankLost(f"FFN rank {self._name} has taken nothing for {self._silent_s:g} s")
        except OSError as error:
            raise RankLost(f"FFN rank {self._name} is gone: {error}") from error

    def wait(self) -> tuple[Header, Lane]:
        """See `Link.wait`."""
        asked = self._sent.popleft()
        asked_of = self._lanes[asked.lane]
        views = [memoryview(self._head), asked_of.sums(asked.rows)]
        try:
            if not self._stream.fill(views):
                raise RankLost(f"FFN rank {self._name} has not answered for {self._silent_s:g} s")
        except OSError as error:
            raise RankLost(f"FFN rank {self._name} is gone: {error}") from error
        header = Header.unpack(bytes(self._head))
        if header != asked.done(header.busy_ns):
            raise RankLost(f"FFN rank {self._name} has answered {header}, asked was {asked}")
        return header, asked_of.lane

    def give(self, number: int) -> None:
        """See `Link.give`."""
        self._free.append(number)

    def close(self) -> None:
        """See `Link.close`."""
        self._stream.connection.close()
        self._lanes.clear()


@dataclass(slots=True)
class _Coming:
    """A message of which some has come."""

    views: list[memoryview]
    #: None until all of it is there.
    header: Header | None = None


class NetworkPeer:
    """An FFN rank's end of the lanes of one attention rank. See `inlet.Peer`."""

    def __init__(self, connection: socket.socket, layout: LaneLayout, device: torch.device) -> None:
        """Take a connection that was greeted."""
        self.connection = connection
        connection.setblocking(False)
        self._stream = Stream(connection)
        memory = lane_memory(layout, device)
        self._lanes = [LaneBytes(layout, memory, number) for number in range(layout.lanes)]
        self._rows_max = layout.rows_max
        #: Lanes whose answers are not sent yet.
        self._busy: set[int] = set()
        self._leaving: deque[tuple[int, list[memoryview]]] = deque()
        self._head = bytearray(Header.LAYOUT.size)
        self._coming = _Coming([memoryview(self._head)])

    @property
    def waits(self) -> bool:
        """See `Peer.waits`."""
        return self._stream.waits

    def receive(self) -> tuple[Header, Lane] | None:
        """See `Peer.receive`."""
        coming = self._coming
        if not self._stream.fill(coming.views):
            return None
        if coming.header is None:
            coming.header = self._checked(Header.unpack(bytes(self._head)))
            coming.views = self._lanes[coming.header.lane].message(coming.header.rows)
            if not self._stream.fill(coming.views):
                return None
        header, lane = coming.header, self._lanes[coming.header.lane].lane
        picks = lane.picks[: header.rows]
        if picks.numel() and int(picks.min()) < 0:
            raise RankLost("a message picks slots below 0")
        self._busy.add(header.lane)
        self._coming = _Coming([memoryview(self._head)])
        return header, lane

    def answer(self, header: Header) -> None:
        """See `Peer.answer`."""
        self._leaving.append((header.lane, [memoryview(header.pack()), self._lanes[header.lane].sums(header.rows)]))

    def flush(self) -> bool:
        """See `Peer.flush`."""
        while self._leaving:
            lane, views = self._leaving[0]
            if not self._stream.drain(views):
                return False
            self._leaving.popleft()
            self._busy.discard(lane)
        return True

    def _checked(self, header: Header) -> Header:
        """Return a message's header. Raises `RankLost` if there can be no such message now."""
        if header.lane >= len(self._lanes) or not 1 <= header.rows <= self._rows_max:
            raise RankLost(f"a message speaks of lane {header.lane} and {header.rows} rows")
        if header.lane in self._busy:
            raise RankLost(f"a message comes in lane {header.lane}, which has not been answered")
        return header


def lane_memory(layout: LaneLayout, device: torch.device) -> memoryview:
    """Return memory for lanes that no other process sees, all zeros; a GPU reads and writes it by itself."""
    return torch.zeros(layout.size, dtype=torch.uint8, pin_memory=device.type == "cuda").numpy().data


def network_door(
    host: str, trust: Trust, expected: LaneLayout, device: torch.device
) -> tuple[str, Door[tuple[Header, Lane], Header]]:
    """Return the address at which attention ranks of other hosts connect, and the door there. Raises `OSError`."""

    def admitted(connection: socket.socket, layout: LaneLayout) -> NetworkPeer:
        return NetworkPeer(connection, layout, device)

    return door_at(host, "ffn", Caller.RANK, trust, expected.agreed, admitted)


def _wait_for(connection: socket.socket, seconds: float) -> None:
    """Have every receive and send wait so long at most.

    A plain socket waits in the kernel, so that a whole answer is one call; a timeout of Python's makes two for each piece of it.
    """
    if isinstance(connection, ssl.SSLSocket):
        connection.settimeout(seconds)
        return
    connection.settimeout(None)
    whole = int(seconds)
    limit = _SECONDS.pack(whole, int((seconds - whole) * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
