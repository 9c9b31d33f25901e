"""Lanes in memory that two processes of one host share, with a Unix socket as the bell: nobody spins, and an end is seen at once.

The attention rank owns the memory and connects; the FFN rank listens on an abstract address and takes connections of its own user
alone. What crosses the socket is one `Header` a message.
"""

import json
import os
import secrets
import selectors
import socket
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from orchestrator.wire import node_pb2
from workers.engines.split.lanes import Header, Lane, LaneLayout, RankLost
from workers.memory import PeerUnmappable, SharedArena, map_memory

#: Seconds an FFN rank has to take a connection.
CONNECT_S = 10.0
#: Attention ranks of one group at most.
CONNECTIONS_MAX = 64
_HELLO_BYTES = 4096
_CREDENTIALS = struct.Struct("3i")


class SharedLink:
    """An attention rank's end: lanes to one FFN rank of the same host."""

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
        hello = {
            "path": place.path,
            "size": place.size,
            "cookie": place.cookie.hex(),
            "lanes": layout.lanes,
            "rows_max": layout.rows_max,
            **layout.row,
        }
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
        """Return a lane that is free, to be filled: at most as many are under way as there are."""
        number = self._free.popleft()
        return number, self._lanes[number]

    def post(self, header: Header) -> None:
        """Say that a lane is filled. Raises `RankLost`."""
        try:
            self._socket.sendall(header.pack())
        except OSError as error:
            raise RankLost(f"FFN rank {self._name} is gone: {error}") from error

    def wait(self) -> tuple[Header, Lane]:
        """Wait for the answer to the oldest message; its lane is good until `give`. Raises `RankLost`."""
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
        """Have a lane back."""
        self._free.append(number)

    def close(self) -> None:
        """Let go of the connection and the memory."""
        self._socket.close()
        self._lanes.clear()
        self._arena.close()


@dataclass(slots=True)
class _Peer:
    """One attention rank that has connected."""

    layout: LaneLayout
    lanes: list[Lane]


class SharedInlet:
    """An FFN rank's end: whoever of the group connects."""

    def __init__(self) -> None:
        self.address = f"weft-ffn-{os.getpid()}-{secrets.token_hex(4)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("\0" + self.address)
        self._listener.listen(CONNECTIONS_MAX)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._waker, self._woken = os.pipe()
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._peers: dict[socket.socket, _Peer] = {}

    def messages(self, expected: LaneLayout) -> Iterator[tuple[socket.socket, Header, Lane]]:
        """Yield messages until `close`, as they come; ranks whose rows are laid out otherwise are refused."""
        while True:
            for key, _ in self._selector.select():
                if key.fd == self._waker:
                    self._end()
                    return
                if key.fileobj is self._listener:
                    self._accept(expected)
                    continue
                assert isinstance(key.fileobj, socket.socket)
                message = self._receive(key.fileobj)
                if message is not None:
                    yield key.fileobj, *message

    def answer(self, peer: socket.socket, header: Header) -> None:
        """Say that a lane's sums are there; a rank that is gone does not hear it."""
        try:
            peer.sendall(header.pack())
        except OSError:
            self._drop(peer)

    def close(self) -> None:
        """Have `messages` end; may be called by another thread."""
        os.write(self._woken, b"x")

    def _end(self) -> None:
        for peer in tuple(self._peers):
            self._drop(peer)
        self._selector.close()
        self._listener.close()
        os.close(self._waker)
        os.close(self._woken)

    def _accept(self, expected: LaneLayout) -> None:
        peer, _ = self._listener.accept()
        peer.settimeout(CONNECT_S)
        try:
            problem = self._greet(peer, expected)
            peer.sendall((problem or "ok").encode())
        except (OSError, ValueError, KeyError, TypeError, PeerUnmappable) as error:
            problem = str(error)
        if problem is not None:
            self._peers.pop(peer, None)
            peer.close()
            return
        self._selector.register(peer, selectors.EVENT_READ)

    def _greet(self, peer: socket.socket, expected: LaneLayout) -> str | None:
        """Map a new rank's lanes. Returns the problem, if it is none of the group's."""
        _, user, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if user != os.geteuid():
            return "it is another user's"
        said = json.loads(peer.recv(_HELLO_BYTES))
        ours = expected.row
        theirs = {name: said[name] for name in ours}
        if theirs != ours:
            return f"its rows are {theirs}, here they are {ours}"
        layout = LaneLayout(int(said["lanes"]), int(said["rows_max"]), expected.hidden, expected.picks, expected.dtype)
        if layout.size != said["size"]:
            return f"its memory has {said['size']} bytes, its lanes take {layout.size}"
        place = node_pb2.SharedMemory(path=said["path"], size=said["size"], cookie=bytes.fromhex(said["cookie"]))
        memory = map_memory(place, writable=True)
        self._peers[peer] = _Peer(layout, [layout.lane(memory, number) for number in range(layout.lanes)])
        return None

    def _receive(self, peer: socket.socket) -> tuple[Header, Lane] | None:
        known = self._peers[peer]
        try:
            header = Header.unpack(peer.recv(Header.LAYOUT.size + 1))
        except (OSError, RankLost):
            self._drop(peer)
            return None
        if header.lane >= len(known.lanes) or header.rows > known.layout.rows_max:
            self._drop(peer)
            return None
        return header, known.lanes[header.lane]

    def _drop(self, peer: socket.socket) -> None:
        if self._peers.pop(peer, None) is not None:
            self._selector.unregister(peer)
            peer.close()
