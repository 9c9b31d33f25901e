"""Lanes between hosts: each end has memory of its own, and what is filled of it crosses a TCP connection from one to the other.

Who connects says who it is by a token of the cluster's secret, and how its lanes are laid out; the FFN rank answers with a seal
over a number that was just drawn, so that either knows the other for its cluster's. With `[cluster.tls]` all is mutual TLS.

    hello, answer   length (uint32), so many bytes: JSON; a seal and the problem with the hello, empty if there is none
    message         Header, rows, weights, picks: so many rows of each as the header says
    its answer      Header, sums

Neither side waits for the other to read: an FFN rank sends what the connection takes and goes on (`inlet.py`), since an attention
rank that is sending its next message reads nothing meanwhile.
"""

import json
import os
import secrets
import socket
import ssl
import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.core.types import RankName
from orchestrator.wire.trust import Caller, Trust
from workers.engines.split.inlet import CONNECTIONS_MAX, GREET_S, Door
from workers.engines.split.lanes import Header, Lane, LaneLayout, RankLost

#: Seconds an FFN rank has to take a connection, others that it greets before included.
CONNECT_S = 10.0
#: Seconds of silence after which a connection is looked after, between two looks, and looks without an answer that end it.
KEEPALIVE_S, KEEPALIVE_EVERY_S, KEEPALIVES_MAX = 5, 2, 3
_HELLO_BYTES = 4096
_LENGTH = struct.Struct("<I")
_SECONDS = struct.Struct("ll")
#: What says that there is nothing yet, or no room: after the time that the socket has, or at once.
_LATER = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError, TimeoutError)


class Stream:
    """The bytes of a connection, plain or TLS, from and to memory that is there already."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._plain = not isinstance(connection, ssl.SSLSocket)

    @property
    def waits(self) -> bool:
        """Whether bytes were received that no event of the socket tells of any more."""
        return isinstance(self.connection, ssl.SSLSocket) and self.connection.pending() > 0

    def fill(self, views: list[memoryview]) -> bool:
        """Fill memory with what comes, dropping from the list what is full. False: not all has come. Raises `OSError`."""
        while views:
            try:
                if self._plain:
                    count, _, _, _ = self.connection.recvmsg_into(views, 0, socket.MSG_WAITALL)
                else:
                    count = self.connection.recv_into(views[0])
            except _LATER:
                return False
            if not count:
                raise ConnectionResetError("it has ended")
            _advance(views, count)
        return True

    def drain(self, views: list[memoryview]) -> bool:
        """Send memory, dropping from the list what is sent. False: not all could be. Raises `OSError`."""
        while views:
            try:
                count = self.connection.sendmsg(views) if self._plain else self.connection.send(views[0])
            except _LATER:
                return False
            _advance(views, count)
        return True


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
            self._stream = Stream(_connected(address, layout, trust))
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


def network_door(host: str, trust: Trust, expected: LaneLayout, device: torch.device) -> tuple[str, Door]:
    """Return the address at which attention ranks of other hosts connect, and the door there. Raises `OSError`."""
    listener = socket.create_server((host, 0), family=_family(host), backlog=CONNECTIONS_MAX)
    name = RankName(f"weft-ffn-{os.getpid()}-{secrets.token_hex(4)}")

    def greet(connection: socket.socket) -> NetworkPeer:
        secured = trust.secured(connection)
        try:
            return NetworkPeer(secured, _greeted(secured, name, expected, trust), device)
        except BaseException:
            secured.close()
            raise

    return f"{name}@{host}:{listener.getsockname()[1]}", Door(listener, greet)


def place_of(address: str) -> tuple[str, int]:
    """Return host and port of an address. Raises `ValueError`."""
    host, _, port = address.partition("@")[2].rpartition(":")
    return host, int(port)


def hello_of(address: str, layout: LaneLayout, trust: Trust, nonce: str) -> dict[str, Any]:
    """Return what an attention rank with such lanes says to the FFN rank at an address."""
    metadata = trust.metadata(Caller.RANK, RankName(address.partition("@")[0]))
    return {"metadata": metadata, "nonce": nonce, **layout.said}


def framed(data: bytes) -> bytes:
    """Return a hello or its answer as it crosses."""
    return _LENGTH.pack(len(data)) + data


def _connected(address: str, layout: LaneLayout, trust: Trust) -> socket.socket:
    """Connect to a rank, say who this is, and see who answers. Raises `OSError` or `ValueError`."""
    until = time.monotonic() + CONNECT_S
    host, port = place_of(address)
    connection = socket.create_connection((host, port), CONNECT_S)
    try:
        _settle(connection)
        connection = trust.secured(connection, host)
        nonce = secrets.token_hex(16)
        connection.sendall(framed(json.dumps(hello_of(address, layout, trust, nonce)).encode()))
        answer = trust.unsealed(_heard(connection, until))
        if answer is None or not answer.startswith(nonce.encode()):
            raise ValueError("it is none of this cluster's")
        problem = answer[len(nonce) :].decode(errors="replace")
        if problem:
            raise ValueError(f"refused: {problem}")
    except BaseException:
        connection.close()
        raise
    return connection


def _greeted(connection: socket.socket, name: RankName, expected: LaneLayout, trust: Trust) -> LaneLayout:
    """Hear who connects and answer. Returns its lanes. Raises `OSError` or `ValueError` if it is none of the group's."""
    _settle(connection)
    said = _parsed(_heard(connection, time.monotonic() + GREET_S))
    metadata, nonce = _credentials(said)
    refused = trust.problem(Caller.RANK, name, metadata)
    if refused is not None:
        raise ValueError(refused[1])  # whoever it is gets no answer
    problem = ""
    try:
        return expected.agreed(said)
    except ValueError as error:
        problem = str(error)
        raise
    finally:
        connection.sendall(framed(trust.sealed(nonce.encode() + problem.encode()[: _HELLO_BYTES // 2])))


def _parsed(hello: bytes) -> Any:
    try:
        return json.loads(hello)
    except RecursionError:
        raise ValueError("its hello is nested too deeply") from None


def _credentials(said: Any) -> tuple[list[tuple[str, str]], str]:
    """Return a hello's metadata and its number. Raises `ValueError` if it has none."""
    match said:
        case {"metadata": [*pairs], "nonce": str(nonce)} if len(nonce) <= 64:
            found = [(pair[0], pair[1]) for pair in pairs if isinstance(pair, list) and len(pair) == 2]
            return [(name, value) for name, value in found if isinstance(name, str) and isinstance(value, str)], nonce
        case _:
            raise ValueError("its hello says nothing of who it is")


def _heard(connection: socket.socket, until: float) -> bytes:
    """Return what the other side says, all of it by a time of the monotonic clock. Raises `OSError` or `ValueError`."""
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size, until))
    if length > _HELLO_BYTES:
        raise ValueError(f"a hello of {length} bytes: at most {_HELLO_BYTES} are heard")
    return _exactly(connection, length, until)


def _exactly(connection: socket.socket, size: int, until: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        connection.settimeout(max(until - time.monotonic(), 0.001))
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionResetError("it ended")
        data += piece
    return bytes(data)


def _settle(connection: socket.socket) -> None:
    """Have small messages leave at once, and notice a host that is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_EVERY_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVES_MAX)


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


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _advance(views: list[memoryview], count: int) -> None:
    """Drop so many bytes from the front of pieces of memory, and pieces that are empty."""
    while views and count >= len(views[0]):
        count -= len(views.pop(0))
    if count:
        views[0] = views[0][count:]
