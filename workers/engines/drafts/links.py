"""A connection to a process that drafts: what was told there, and what is asked and not answered yet. No torch."""

import math
import select
import socket
import time

from orchestrator.core.types import RequestId
from orchestrator.wire.trust import Caller, Trust
from workers.engines.drafts.messages import SAID, Answer, Ask, DraftsLost, Incoming, Told, Welcome, packed, unpacked
from workers.engines.greetings import CONNECT_S, Stream, connected


class Link:
    """One connection. Used by one thread at a time."""

    def __init__(self, address: str, trust: Trust) -> None:
        """Connect to the process at an address and hear what it is. Raises `OSError`, `ValueError` or `DraftsLost`."""
        self.address = address
        self._connection: socket.socket = connected(address, Caller.DRAFTED, SAID, trust)
        self._connection.setblocking(False)
        self._stream = Stream(self._connection)
        self._incoming = Incoming(self._stream)
        self._sending: list[memoryview] = []
        #: By request: tokens of it that were told; and the step from which on one without a slot is told of again.
        self.told: dict[RequestId, int] = {}
        self.again: dict[RequestId, int] = {}
        #: Told of, and to be forgotten there.
        self.forgotten: list[RequestId] = []
        #: The requests of the question that is not answered yet.
        self.asked: list[RequestId] | None = None
        try:
            self.welcome = self._welcome()
        except BaseException:
            self._connection.close()
            raise

    def send(self, ask: Ask) -> None:
        """Ask. Raises `OSError`."""
        self.asked = [RequestId(told.request) for told in ask.sequences] or None
        self._sending.append(memoryview(packed(ask)))
        self._stream.drain(self._sending)

    def answer(self, seconds: float) -> Answer | None:
        """Return the answer to what was asked last, None if it does not come within so long. Raises `OSError` or `DraftsLost`."""
        assert self.asked is not None, "nothing was asked"
        data = self._received(seconds)
        if data is None:
            return None
        answer = unpacked(data, Answer)
        if len(answer.drafts) != len(self.asked):
            raise DraftsLost(f"drafts came for {len(answer.drafts)} sequences, {len(self.asked)} were asked for")
        for request, drafts in zip(self.asked, answer.drafts, strict=True):
            if drafts is None:
                self.told.pop(request, None)
        self.asked = None
        return answer

    def check(self, seconds: float) -> None:
        """See that questions are answered within so long. Raises `OSError` or `DraftsLost`."""
        self.send(Ask([Told(0, b"", 1)], []))  # of a sequence that is not known there
        if self.answer(seconds) is None:
            raise DraftsLost(f"it has not answered for {seconds:g} s")

    def rest(self, seconds: float) -> None:
        """Ask nothing for so long. Raises `OSError` as soon as the other side ends, `DraftsLost` if it says something."""
        if self._received(seconds) is not None:
            raise DraftsLost("it says something that was not asked")

    def close(self) -> None:
        """Let go of it."""
        self._connection.close()

    def _welcome(self) -> Welcome:
        data = self._received(CONNECT_S)
        if data is None:
            raise DraftsLost(f"nothing was said within {CONNECT_S:g} s")
        return unpacked(data, Welcome)

    def _received(self, seconds: float) -> bytes | None:
        until = time.monotonic() + seconds
        poll = select.poll()
        while True:
            self._stream.drain(self._sending)
            data = self._incoming.next()
            left_s = until - time.monotonic()
            if data is not None or left_s <= 0:
                return data
            poll.register(self._connection, select.POLLIN | (select.POLLOUT if self._sending else 0))
            poll.poll(math.ceil(left_s * 1000))
