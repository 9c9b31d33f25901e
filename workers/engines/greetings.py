"""How two of a cluster's processes meet on a connection that is no gRPC channel, and what bytes cross it from then on.

Who connects says who it is by a token of the cluster's secret, and what it is; the other side answers with a seal over a number
that was just drawn, so that either knows the other for its cluster's. With `[cluster.tls]` all is mutual TLS.

    hello, answer   length (uint32), so many bytes: JSON; a seal and the problem with the hello, empty if there is none
"""

import json
import os
import secrets
import socket
import ssl
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from orchestrator.core.types import RankName
from orchestrator.wire.trust import Caller, Trust
from workers.engines.inlet import CONNECTIONS_MAX, GREET_S, Answer, Door, Message, Peer

Known = TypeVar("Known")

#: Seconds that a process has to take a connection, others that it greets before included.
CONNECT_S = 10.0
#: Seconds of silence after which a connection is looked after, between two looks, and looks without an answer that end it.
KEEPALIVE_S, KEEPALIVE_EVERY_S, KEEPALIVES_MAX = 5, 2, 3
_HELLO_BYTES = 4096
_LENGTH = struct.Struct("<I")
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


def place_of(address: str) -> tuple[str, int]:
    """Return host and port of an address. Raises `ValueError`."""
    host, _, port = address.partition("@")[2].rpartition(":")
    return host, int(port)


def hello_of(address: str, caller: Caller, said: Mapping[str, Any], trust: Trust, nonce: str) -> dict[str, Any]:
    """Return all that a caller which is `said` says to the process at an address (NAME@HOST:PORT)."""
    metadata = trust.metadata(caller, RankName(address.partition("@")[0]))
    return {"metadata": metadata, "nonce": nonce, **said}


def framed(data: bytes) -> bytes:
    """Return a hello or its answer as it crosses."""
    return _LENGTH.pack(len(data)) + data


def connected(address: str, caller: Caller, said: Mapping[str, Any], trust: Trust) -> socket.socket:
    """Connect to a process, say who this is, and see who answers. Raises `OSError` or `ValueError`."""
    until = time.monotonic() + CONNECT_S
    host, port = place_of(address)
    connection = socket.create_connection((host, port), CONNECT_S)
    try:
        _settle(connection)
        connection = trust.secured(connection, host)
        nonce = secrets.token_hex(16)
        connection.sendall(framed(json.dumps(hello_of(address, caller, said, trust, nonce)).encode()))
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


def door_at(
    host: str,
    kind: str,
    caller: Caller,
    trust: Trust,
    agreed: Callable[[Mapping[str, Any]], Known],
    admitted: Callable[[socket.socket, Known], Peer[Message, Answer]],
) -> tuple[str, Door[Message, Answer]]:
    """Return the address (NAME@HOST:PORT) at which processes connect to this one, and the door there.

    Args:
        host: an address of this host; the system chooses the port.
        kind: what this process is, as part of its name.
        caller: who may call.
        trust: the cluster's.
        agreed: as in `greeted`.
        admitted: makes a peer of a connection that was greeted.

    Raises:
        OSError: it cannot listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=CONNECTIONS_MAX)
    name = RankName(f"weft-{kind}-{os.getpid()}-{secrets.token_hex(4)}")

    def greet(connection: socket.socket) -> Peer[Message, Answer]:
        secured = trust.secured(connection)
        try:
            return admitted(secured, greeted(secured, name, caller, agreed, trust))
        except BaseException:
            secured.close()
            raise

    return f"{name}@{host}:{listener.getsockname()[1]}", Door(listener, greet)


def greeted(
    connection: socket.socket, name: RankName, caller: Caller, agreed: Callable[[Mapping[str, Any]], Known], trust: Trust
) -> Known:
    """Hear who connects to the process of that name, and answer. Returns what is known of it then.

    Args:
        connection: the new connection.
        name: what this process is called in its address.
        caller: who may call.
        agreed: returns what the caller is by what it says; raises `ValueError` if it is not what may connect.
        trust: the cluster's.

    Raises:
        OSError, ValueError: it is none of the cluster's, or says nothing.
    """
    _settle(connection)
    said = _parsed(_heard(connection, time.monotonic() + GREET_S))
    metadata, nonce = _credentials(said)
    refused = trust.problem(caller, name, metadata)
    if refused is not None:
        raise ValueError(refused[1])  # whoever it is gets no answer
    problem = ""
    try:
        return agreed(said)
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


def _advance(views: list[memoryview], count: int) -> None:
    """Drop so many bytes from the front of pieces of memory, and pieces that are empty."""
    while views and count >= len(views[0]):
        count -= len(views.pop(0))
    if count:
        views[0] = views[0][count:]
