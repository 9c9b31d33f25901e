"""The end of a process that drafts: keeps what nodes tell of their sequences, and answers what they ask for.

Nodes are served one question at a time, as these come. After each, a piece of what is not read is read, and while nobody asks the
rest of it, and drafts are made ahead (`drafter.py`): who asks waits for a piece or a pass at most, and for who asked before. A
slot is a window of the draft model: a sequence that finds none free is not drafted for, and one that was not asked for in a while
loses its own.
"""

import socket
from array import array
from collections import deque
from collections.abc import Sequence

from orchestrator.core.types import RequestId, Sampling
from workers.engines.drafter import Asked, Drafter
from workers.engines.drafts.messages import Answer, Ask, DraftsLost, Incoming, Told, Welcome, packed, tokens_of, unpacked
from workers.engines.greetings import Stream
from workers.engines.inlet import Door, Inlet, Peer
from workers.engines.sequences import TokenSequence

#: How many times as many tokens are kept of a sequence as are seen, before it is begun anew with its last ones.
CONTEXTS_KEPT = 4


class DraftPeer:
    """One node that has connected. See `inlet.Peer`."""

    def __init__(self, connection: socket.socket, welcome: Welcome) -> None:
        """Take a connection that was greeted, and welcome who is there. Raises `OSError`."""
        self.connection = connection
        connection.sendall(packed(welcome))
        connection.setblocking(False)
        self._stream = Stream(connection)
        self._incoming = Incoming(self._stream)
        self._leaving: deque[list[memoryview]] = deque()

    @property
    def waits(self) -> bool:
        """See `Peer.waits`."""
        return self._stream.waits

    def receive(self) -> Ask | None:
        """See `Peer.receive`."""
        data = self._incoming.next()
        return None if data is None else unpacked(data, Ask)

    def answer(self, answer: Answer) -> None:
        """See `Peer.answer`."""
        self._leaving.append([memoryview(packed(answer))])

    def flush(self) -> bool:
        """See `Peer.flush`."""
        while self._leaving:
            if not self._stream.drain(self._leaving[0]):
                return False
            self._leaving.popleft()
        return True


class DraftServer:
    """Drafts for whoever asks."""

    def __init__(self, drafter: Drafter, vocabulary: int, doors: Sequence[Door[Ask, Answer]]) -> None:
        self._drafter = drafter
        self._vocabulary = vocabulary
        self._inlet = Inlet(doors, self._gone, drafter.work_ahead)
        #: What the drafter calls sequences: nodes' own names for them say nothing to others.
        self._named = 0
        #: By peer and by its name for a request; those without a window are dropped when there are more than windows.
        self._known: dict[Peer[Ask, Answer], dict[int, tuple[RequestId, TokenSequence]]] = {}

    def serve(self) -> None:
        """Answer what is asked until `close`."""
        for peer, ask in self._inlet.messages():
            try:
                answer = self._answered(peer, ask)
            except DraftsLost as problem:
                self._inlet.drop(peer, str(problem))
                continue
            if ask.sequences:
                self._inlet.answer(peer, answer)
                self._drafter.read_on()  # however often it is asked

    def close(self) -> None:
        """Have `serve` end; may be called by another thread."""
        self._inlet.close()

    def _answered(self, peer: Peer[Ask, Answer], ask: Ask) -> Answer:
        """Draft for a node's sequences. Raises `DraftsLost` for what means nothing."""
        known = self._known.setdefault(peer, {})
        for request in ask.forgotten:
            self._forget(known, request)
        followed = [self._followed(known, told) for told in ask.sequences]
        asked = [Asked(one[0], one[1], told.most) for told, one in zip(ask.sequences, followed, strict=True) if one is not None]
        done = iter(self._drafter.draft_what_is_read(asked) if asked else ())
        drafts: list[bytes | None] = []
        for told, one in zip(ask.sequences, followed, strict=True):
            if one is None or next(done) is None:
                self._forget(known, told.request)
                drafts.append(None)
            else:
                drafts.append(one[1].take_drafts().tobytes())
        return Answer(drafts, self._drafter.sequences)

    def _followed(self, known: dict[int, tuple[RequestId, TokenSequence]], told: Told) -> tuple[RequestId, TokenSequence] | None:
        """Return a sequence with its new tokens; None if nothing is known of what came before. Raises `DraftsLost`."""
        tokens, context = tokens_of(told.tokens, self._vocabulary), self._drafter.context_tokens
        if told.begins:
            self._forget_unseen(known)
            if not tokens:
                raise DraftsLost("a sequence begins without tokens")
            return self._begun(known, told.request, tokens[-context:])
        found = known.get(told.request)
        if found is None or not self._drafter.sees(found[0]):
            return None
        found[1].tokens.extend(tokens)
        if len(found[1].tokens) > CONTEXTS_KEPT * context:
            return self._begun(known, told.request, found[1].tokens[-(context // 2) :])
        return found

    def _begun(
        self, known: dict[int, tuple[RequestId, TokenSequence]], request: int, tokens: "array[int]"
    ) -> tuple[RequestId, TokenSequence]:
        self._forget(known, request)
        self._named += 1
        known[request] = RequestId(self._named), TokenSequence(tokens, Sampling(), self._vocabulary)
        return known[request]

    def _forget(self, known: dict[int, tuple[RequestId, TokenSequence]], request: int) -> None:
        found = known.pop(request, None)
        if found is not None:
            self._drafter.forget(found[0])

    def _forget_unseen(self, known: dict[int, tuple[RequestId, TokenSequence]]) -> None:
        """Drop what is known of sequences that have lost their windows, once there are many of those."""
        if len(known) >= 2 * self._drafter.sequences_max:
            for request in [request for request, (name, _) in known.items() if not self._drafter.sees(name)]:
                del known[request]

    def _gone(self, peer: Peer[Ask, Answer]) -> None:
        for name, _ in self._known.pop(peer, {}).values():
            self._drafter.forget(name)
