"""Lanes in memory that two processes of one host share, with a Unix socket as the bell: nobody spins, and an end is seen at once.

The attention rank owns the memory and connects; the FFN rank listens on an abstract address and takes connections of its own user
alone. What crosses the socket is one `Header` a message.
"""

import json
import os
import secrets
import socket
import struct
from collections import deque
from collections.abc import Mapping

from orchestrator.wire import node_pb2
from workers.engines.inlet import CONNECTIONS_MAX, Door
from workers.engines.split.lanes import Header, Lane, LaneLayout, RankLost
from workers.memory import PeerUnmappable, SharedArena, map_memory

#: Seconds an FFN rank has to take a connection.
CONNECT_S = 10.0
_HELLO_BYTES = 4096
_CREDENTIALS = struct.Struct("3i")


class SharedLink:
    """An attention rank's end: lanes to one FFN rank of the same host. See `Link`."""

    crosses_network = False

    def __init__(self, address: str, layout: LaneLayout, silent_s: float) -> None:
        """Connect to a rank that listens at `address`. Raises `RankLost` if it does not take the connection."""
        self._silent_s = silent_s
        self._name = address
        self._arena = SharedArena(layout.size)
        self._lanes = [layout.lane(self._arena.view, number) for number in range(layout.lanes)]
        self._free = deque(range(layout.lanes))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(CONNECT_S)
        place = self._arena.place(())
        hello = {"path": place.path, "size": place.size, "cookie": place.cookie.hex(), **layout.said}
        try:
            problem = self._greet(hello)
        except OSError as error:
            self.close()
            raise RankLost(f"FFN rank {address} does not take a connection: {error}") from error
        if problem is not None:
            self.close()
            raise RankLost(f"FFN rank {address} refuses the connection: {problem}")
        self._socket.settimeout(silent_s)

    def _greet(self, hello: Mapping[str, str | int]) -> str | None:
        """Connect and say where the lanes are. Returns the problem that the rank has with them."""
        self._socket.connect("\0" + self._name)
        self._socket.sendall(json.dumps(hello).encode())
        answer = self._socket.recv(_HELLO_BYTES).decode()
        return None if answer == "ok" else answer or "it ended"

    def take(self) -> tuple[int, Lane]:
        """See `Link.take`."""
        number = self._free.popleft()
        return number, self._lanes[number]

    def post(self, header: Header) -> None:
        """See `Link.post`."""
        try:
            self._socket.sendall(header.pack())
        except OSError as error:
            raise RankLost(f"FFN rank {self._name} is gone: {error}") from error

    def wait(self) -> tuple[Header, Lane]:
        """See `Link.wait`."""
        try:
            data = self._socket.recv(Header.LAYOUT.size + 1)
        except TimeoutError:
            raise RankLost(f"FFN rank {self._name} has not answered for {self._silent_s:g} s") from None
        except OSError as error:
            raise RankLost(f"FFN rank {self._name} is gone: {error}") from error
        if not data:
            raise RankLost(f"FFN rank {self._name} has ended")
        header = Header.unpack(data)
        return header, self._lanes[header.lane]

    def give(self, number: int) -> None:
        """See `Link.give`."""
        self._free.append(number)

    def close(self) -> None:
        """See `Link.close`."""
        self._socket.close()
        self._lanes.clear()
        self._arena.close()


class SharedPeer:
    """An FFN rank's end of the lanes of one attention rank. See `inlet.Peer`."""

    waits = False

    def __init__(self, connection: socket.socket, expected: LaneLayout) -> None:
        """Greet who connects and map its lanes. Raises `OSError` or `ValueError` if it is none of the group's."""
        self.connection = connection
        try:
            self._lanes = _mapped(connection, expected)
        except (ValueError, KeyError, TypeError, AttributeError, PeerUnmappable) as error:
            connection.sendall(str(error).encode()[:_HELLO_BYTES])
            raise ValueError(str(error)) from error
        connection.sendall(b"ok")

    def receive(self) -> tuple[Header, Lane] | None:
        """See `Peer.receive`."""
        header = Header.unpack(self.connection.recv(Header.LAYOUT.size + 1))
        if header.lane >= len(self._lanes) or header.rows > len(self._lanes[header.lane].rows):
            raise RankLost(f"a message speaks of lane {header.lane} and {header.rows} rows")
        return header, self._lanes[header.lane]

    def answer(self, header: Header) -> None:
        """See `Peer.answer`."""
        self.connection.sendall(header.pack())

    def flush(self) -> bool:
        """See `Peer.flush`: nothing is ever left."""
        return True


def shared_door(expected: LaneLayout) -> tuple[str, Door[tuple[Header, Lane], Header]]:
    """Return the address at which attention ranks of this host connect, and the door there."""
    address = f"weft-ffn-{os.getpid()}-{secrets.token_hex(4)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("\0" + address)
    listener.listen(CONNECTIONS_MAX)
    return address, Door(listener, lambda connection: SharedPeer(connection, expected))


def _mapped(connection: socket.socket, expected: LaneLayout) -> list[Lane]:
    """Map a new rank's lanes. Raises `ValueError` and others if it is none of the group's."""
    _, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if user != os.geteuid():
        raise ValueError("it is another user's")
    said = json.loads(connection.recv(_HELLO_BYTES))
    layout = expected.agreed(said)
    if layout.size != said["size"]:
        raise ValueError(f"its memory has {said['size']} bytes, its lanes take {layout.size}")
    place = node_pb2.SharedMemory(path=said["path"], size=said["size"], cookie=bytes.fromhex(said["cookie"]))
    memory = map_memory(place, writable=True)
    return [layout.lane(memory, number) for number in range(layout.lanes)]
