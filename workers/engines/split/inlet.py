"""An FFN rank's end of all lanes: whoever of the group has connected, in whichever way, is served as its messages come.

Nobody can hold up the others: connections are greeted in threads of their own (`Door`), and of one that has sent half a message,
or does not read its answers, the rest is taken up once it comes or can go.
"""

import logging
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol

from workers.engines.split.lanes import Header, Lane, RankLost

log = logging.getLogger("weft.split")

#: Seconds in which who connects must have said what it is.
GREET_S = 5.0
#: Connections that are greeted at a time; others wait.
GREETINGS_MAX = 8
#: Attention ranks of one group at most.
CONNECTIONS_MAX = 64
#: Seconds until a door that cannot take connections, for want of descriptors for example, tries again.
RETRY_S = 1.0
#: Seconds between two lines about connections that were refused.
TELL_EVERY_S = 1.0
_END, _NEWCOMER = b"e", b"n"


class Peer(Protocol):
    """One attention rank that has connected."""

    connection: socket.socket

    @property
    def waits(self) -> bool:
        """Whether something was received that no event of the connection tells of any more."""
        ...

    def receive(self) -> tuple[Header, Lane] | None:
        """Return the next message if all of it is there. Raises `OSError` or `RankLost`."""
        ...

    def answer(self, header: Header) -> None:
        """Say that a lane's sums are there. Raises `OSError` or `RankLost`."""
        ...

    def flush(self) -> bool:
        """Send what could not be sent before; returns False if something is left. Raises `OSError`."""
        ...


#: Returns the peer that a connection is; raises `OSError`, `RuntimeError` or `ValueError` if it is none of the group's.
Greet = Callable[[socket.socket], Peer]


class Door:
    """Takes connections of one kind."""

    def __init__(self, listener: socket.socket, greet: Greet) -> None:
        """Take a socket that listens; it is closed with the door."""
        self._listener = listener
        self._greet = greet
        self._room = threading.BoundedSemaphore(GREETINGS_MAX)
        self._closed = threading.Event()
        self._told = -TELL_EVERY_S

    def open(self, admit: Callable[[Peer], None]) -> None:
        """Take connections from now on; `admit` is called by other threads."""
        threading.Thread(target=self._run, args=(admit,), name="door", daemon=True).start()

    def close(self) -> None:
        """Take no more."""
        self._closed.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _run(self, admit: Callable[[Peer], None]) -> None:
        while True:
            self._room.acquire()
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                self._room.release()
                if self._closed.wait(RETRY_S):
                    return
                log.warning("no connection can be taken: %s", error)
                continue
            threading.Thread(target=self._welcome, args=(connection, admit), name="greeting", daemon=True).start()

    def _welcome(self, connection: socket.socket, admit: Callable[[Peer], None]) -> None:
        try:
            connection.settimeout(GREET_S)
            admit(self._greet(connection))
        except (OSError, ValueError, RuntimeError, RankLost) as error:
            connection.close()
            self._tell(error)
        finally:
            self._room.release()

    def _tell(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._told >= TELL_EVERY_S:
            self._told = now
            log.warning("a connection is refused: %s", error)


class Inlet:
    """Messages of all attention ranks of a group, one after the other."""

    def __init__(self, doors: Sequence[Door]) -> None:
        self._doors = tuple(doors)
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._newcomers: queue.SimpleQueue[Peer] = queue.SimpleQueue()
        self._peers: set[Peer] = set()
        for door in self._doors:
            door.open(self._admit)

    def messages(self) -> Iterator[tuple[Peer, Header, Lane]]:
        """Yield messages until `close`, as they come: of each peer one, as long as others wait."""
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    if _END in self._waker.recv(64):
                        self._end()
                        return
                    self._take_newcomers()
                    continue
                again = True
                while again:
                    message = self._receive(key.data)
                    if message is not None:
                        yield key.data, *message
                    again = key.data in self._peers and message is not None and key.data.waits

    def answer(self, peer: Peer, header: Header) -> None:
        """Say that a lane's sums are there; a rank that is gone does not hear it."""
        if peer not in self._peers:
            return
        try:
            peer.answer(header)
            self._watch(peer, peer.flush())
        except (OSError, RankLost) as error:
            self.drop(peer, str(error))

    def drop(self, peer: Peer, problem: str) -> None:
        """Have no more to do with a rank."""
        if peer in self._peers:
            self._peers.discard(peer)
            self._selector.unregister(peer.connection)
            peer.connection.close()
            log.info("an attention rank is let go: %s", problem)

    def close(self) -> None:
        """Have `messages` end; may be called by another thread."""
        with suppress(OSError):  # it has ended already
            self._woken.send(_END)

    def _admit(self, peer: Peer) -> None:
        self._newcomers.put(peer)
        try:
            self._woken.send(_NEWCOMER)
        except OSError:  # the rank has ended
            peer.connection.close()

    def _take_newcomers(self) -> None:
        while not self._newcomers.empty():
            peer = self._newcomers.get()
            if len(self._peers) >= CONNECTIONS_MAX:
                peer.connection.close()
                log.warning("a connection is refused: there are %d", CONNECTIONS_MAX)
                continue
            self._peers.add(peer)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    def _receive(self, peer: Peer) -> tuple[Header, Lane] | None:
        if peer not in self._peers:  # let go since it was seen that something had come
            return None
        try:
            self._watch(peer, peer.flush())
            return peer.receive()
        except (OSError, RankLost) as error:
            self.drop(peer, str(error))
            return None

    def _watch(self, peer: Peer, all_sent: bool) -> None:
        events = selectors.EVENT_READ if all_sent else selectors.EVENT_READ | selectors.EVENT_WRITE
        if self._selector.get_key(peer.connection).events != events:
            self._selector.modify(peer.connection, events, peer)

    def _end(self) -> None:
        for door in self._doors:
            door.close()
        self._selector.unregister(self._waker)
        self._waker.close()
        self._woken.close()
        self._take_newcomers()
        for peer in tuple(self._peers):
            self.drop(peer, "the rank ends")
        self._selector.close()
