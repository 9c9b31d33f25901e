"""What many connect to and one serves: whoever has connected, in whichever way, is served as its messages come.

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
from typing import Generic, Protocol, TypeVar

from workers.engines.base import EngineLost

log = logging.getLogger("weft.inlet")

Message = TypeVar("Message")
Answer = TypeVar("Answer")
Message_co = TypeVar("Message_co", covariant=True)
Answer_contra = TypeVar("Answer_contra", contravariant=True)

#: Seconds in which who connects must have said what it is.
GREET_S = 5.0
#: Connections that are greeted at a time; others wait.
GREETINGS_MAX = 8
#: Peers of one process at most.
CONNECTIONS_MAX = 64
#: Seconds until a door that cannot take connections, for want of descriptors for example, tries again.
RETRY_S = 1.0
#: Seconds between two lines about connections that were refused.
TELL_EVERY_S = 1.0
_END, _NEWCOMER = b"e", b"n"


class Peer(Protocol[Message_co, Answer_contra]):
    """One process that has connected."""

    connection: socket.socket

    @property
    def waits(self) -> bool:
        """Whether something was received that no event of the connection tells of any more."""
        ...

    def receive(self) -> Message_co | None:
        """Return the next message if all of it is there. Raises `OSError` or `EngineLost`."""
        ...

    def answer(self, answer: Answer_contra, /) -> None:
        """Answer a message. Raises `OSError` or `EngineLost`."""
        ...

    def flush(self) -> bool:
        """Send what could not be sent before; returns False if something is left. Raises `OSError`."""
        ...


class Door(Generic[Message, Answer]):
    """Takes connections of one kind."""

    def __init__(self, listener: socket.socket, greet: Callable[[socket.socket], Peer[Message, Answer]]) -> None:
        """Take a socket that listens; it is closed with the door.

        `greet` returns the peer that a connection is; it raises `OSError`, `RuntimeError` or `ValueError` if it is none.
        """
        self._listener = listener
        self._greet = greet
        self._room = threading.BoundedSemaphore(GREETINGS_MAX)
        self._closed = threading.Event()
        self._told = -TELL_EVERY_S

    def open(self, admit: Callable[[Peer[Message, Answer]], None]) -> None:
        """Take connections from now on; `admit` is called by other threads."""
        threading.Thread(target=self._run, args=(admit,), name="door", daemon=True).start()

    def close(self) -> None:
        """Take no more."""
        self._closed.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _run(self, admit: Callable[[Peer[Message, Answer]], None]) -> None:
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

    def _welcome(self, connection: socket.socket, admit: Callable[[Peer[Message, Answer]], None]) -> None:
        try:
            connection.settimeout(GREET_S)
            admit(self._greet(connection))
        except (OSError, ValueError, RuntimeError, EngineLost) as error:
            connection.close()
            self._tell(error)
        finally:
            self._room.release()

    def _tell(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._told >= TELL_EVERY_S:
            self._told = now
            log.warning("a connection is refused: %s", error)


class Inlet(Generic[Message, Answer]):
    """Messages of all that have connected, one after the other."""

    def __init__(
        self,
        doors: Sequence[Door[Message, Answer]],
        gone: Callable[[Peer[Message, Answer]], None] = lambda _: None,
        between: Callable[[], bool] | None = None,
    ) -> None:
        """Open the doors.

        Args:
            doors: where peers come in.
            gone: told of each peer that there is no more to do with.
            between: does a piece of work while no message waits; returns whether there is more of it.
        """
        self._doors = tuple(doors)
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._gone = gone
        self._between = between
        self._newcomers: queue.SimpleQueue[Peer[Message, Answer]] = queue.SimpleQueue()
        self._peers: set[Peer[Message, Answer]] = set()
        for door in self._doors:
            door.open(self._admit)

    def messages(self) -> Iterator[tuple[Peer[Message, Answer], Message]]:
        """Yield messages until `close`, as they come: of each peer one, as long as others wait."""
        while True:
            for key in self._ready():
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
                        yield key.data, message
                    again = key.data in self._peers and message is not None and key.data.waits

    def _ready(self) -> list[selectors.SelectorKey]:
        """Wait until something has come, with what is to be done meanwhile."""
        ready: list[tuple[selectors.SelectorKey, int]] = []
        while self._between is not None and not (ready := self._selector.select(0)) and self._between():
            pass
        return [key for key, _ in ready or self._selector.select()]

    def answer(self, peer: Peer[Message, Answer], answer: Answer) -> None:
        """Answer a peer's message; one that is gone does not hear it."""
        if peer not in self._peers:
            return
        try:
            peer.answer(answer)
            self._watch(peer, peer.flush())
        except (OSError, EngineLost) as error:
            self.drop(peer, str(error))

    def drop(self, peer: Peer[Message, Answer], problem: str) -> None:
        """Have no more to do with a peer."""
        if peer in self._peers:
            self._peers.discard(peer)
            self._selector.unregister(peer.connection)
            peer.connection.close()
            self._gone(peer)
            log.info("a connection is let go: %s", problem)

    def close(self) -> None:
        """Have `messages` end; may be called by another thread."""
        with suppress(OSError):  # it has ended already
            self._woken.send(_END)

    def _admit(self, peer: Peer[Message, Answer]) -> None:
        self._newcomers.put(peer)
        try:
            self._woken.send(_NEWCOMER)
        except OSError:  # it has ended
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

    def _receive(self, peer: Peer[Message, Answer]) -> Message | None:
        if peer not in self._peers:  # let go since it was seen that something had come
            return None
        try:
            self._watch(peer, peer.flush())
            return peer.receive()
        except (OSError, EngineLost) as error:
            self.drop(peer, str(error))
            return None

    def _watch(self, peer: Peer[Message, Answer], all_sent: bool) -> None:
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
            self.drop(peer, "this process ends")
        self._selector.close()
