"""A node's end: asks a process of a pool for drafts, one question a step, and waits no longer than drafts can be worth.

With as many drafts as it asks for, all of them right, a step brings so many tokens more than one: waiting for as long as so many
steps take is never worth it. An answer that has not come by then is late. The step goes on without, and so do further ones until
it has come and is dropped. A process that ends leaves its nodes without drafts until another one, or the same one started again,
has taken a connection: a thread sees to that.
"""

import logging
import threading
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from orchestrator.core.types import PooledDrafts, RequestId
from orchestrator.wire.trust import Trust
from workers.engines.drafter import Asked, Drafted
from workers.engines.drafts.links import Link
from workers.engines.drafts.messages import (
    BEGINNING_TOKENS_MAX,
    Ask,
    DraftsLost,
    Told,
    tokens_of,
)
from workers.engines.sequences import TokenSequence

log = logging.getLogger("weft.drafts")

#: Steps of which the shortest counts, since those with prompts in them take longer; what one is taken for before there was any.
STEPS_COUNTED, FIRST_STEP_S = 8, 0.02
#: Steps after which a sequence that found no slot is asked for again.
SLOTLESS_STEPS = 8
#: Seconds between two tries to connect.
RETRY_S = 1.0


@dataclass(slots=True)
class _Reached:
    """Which process the connecting thread has reached, or is to reach."""

    wanted: str | None = None
    address: str | None = None
    #: A connection that was made, until who asks takes it.
    fresh: Link | None = None
    closed: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)


class PoolDrafter:
    """Drafts of a pool for one node. See `drafter.Drafts`; a thread of its own keeps the connection."""

    def __init__(self, vocabulary: int, trust: Trust) -> None:
        """Begin without a place to ask, for a model of such a vocabulary, in a cluster that is trusted so."""
        self._vocabulary = vocabulary
        self._trust = trust
        self._link: Link | None = None
        self._reached = _Reached()
        #: Steps with sequences to draft for.
        self._asked = 0
        self._steps: deque[float] = deque(maxlen=STEPS_COUNTED)
        #: What was done since the beginning; replaced as a whole, since others read it.
        self.load = PooledDrafts()
        threading.Thread(target=self._keep_connected, name="drafts", daemon=True).start()

    def use(self, address: str | None) -> None:
        """Ask the process there from now on; None: go on as it is, and to nobody else. May be called by any thread."""
        with self._reached.changed:
            self._reached.wanted = address
            self._reached.changed.notify_all()

    def reaches(self, seconds: float) -> bool:
        """Wait until the process that is to be asked can be; return whether it can within so long."""
        reached = self._reached
        with reached.changed:
            return reached.changed.wait_for(lambda: reached.address == reached.wanted, seconds)

    def draft(self, asked: Sequence[Asked]) -> list[Drafted | None]:
        """See `Drafts.draft`: None where nothing can be asked now, and for sequences that find no slot."""
        nothing: list[Drafted | None] = [None] * len(asked)
        self._asked += 1
        link = self._current()
        if link is None:
            self._count(unreached=1)
            return nothing
        began = time.perf_counter()
        try:
            if link.asked is not None and link.answer(0.0) is None:
                self._count(late=1)
                return nothing
            members, ask = self._ask(link, asked)
            if not members:
                return nothing
            link.send(ask)
            answer = link.answer(max(one.most for one in members) * min(self._steps, default=FIRST_STEP_S))
            seconds = time.perf_counter() - began
            if answer is None:
                self._count(late=1, wait_s=seconds)
                waited = {one.request for one in members}
                return [Drafted(0, seconds / len(members)) if one.request in waited else None for one in asked]
            drafts = [None if one is None else tokens_of(one, self._vocabulary) for one in answer.drafts]
        except (OSError, DraftsLost) as error:
            self._lose(link, error)
            return nothing
        self._count(answered=1, wait_s=seconds)
        self.load = replace(self.load, slots=link.welcome.slots, slots_taken=answer.taken)
        return self._taken(link, asked, members, drafts, seconds)

    def stepped(self, seconds: float) -> None:
        """See `Drafts.stepped`."""
        self._steps.append(seconds)

    def forget(self, request: RequestId) -> None:
        """See `Drafts.forget`."""
        link = self._link
        if link is None:
            return
        link.again.pop(request, None)
        if link.told.pop(request, None) is None:
            return
        link.forgotten.append(request)
        if link.asked is None:
            try:
                link.send(Ask([], _taken_out(link.forgotten)))
            except OSError as error:
                self._lose(link, error)

    def close(self) -> None:
        """See `Drafts.close`."""
        with self._reached.changed:
            self._reached.closed = True
            self._reached.changed.notify_all()
            links = [link for link in (self._link, self._reached.fresh) if link is not None]
            self._link = self._reached.fresh = None
        for link in links:
            link.close()

    def _current(self) -> Link | None:
        """Return the connection, a newer one if there is one."""
        with self._reached.changed:
            fresh, self._reached.fresh = self._reached.fresh, None
        if fresh is not None:
            if self._link is not None:
                self._link.close()
            self._link = fresh
            self.load = replace(self.load, slots=fresh.welcome.slots, slots_taken=0)
        return self._link

    def _ask(self, link: Link, asked: Sequence[Asked]) -> tuple[list[Asked], Ask]:
        """Return a question, and the sequences that it asks for."""
        told: list[Told] = []
        members: list[Asked] = []
        context, room = link.welcome.context_tokens, BEGINNING_TOKENS_MAX
        for one in asked:
            tokens, known = one.sequence.tokens, link.told.get(one.request)
            begins = known is None
            if known is None:
                # With half of what the process sees it has the other half to go on.
                size = min(len(tokens) if len(tokens) <= context else context // 2, BEGINNING_TOKENS_MAX)
                if size > room or link.again.get(one.request, 0) > self._asked:
                    continue
                known, room = len(tokens) - size, room - size
            told.append(Told(one.request, tokens[known:].tobytes(), one.most, begins))
            members.append(one)
            link.told[one.request] = len(tokens)
        return members, Ask(told, _taken_out(link.forgotten) if told else [])

    def _taken(
        self,
        link: Link,
        asked: Sequence[Asked],
        members: Sequence[Asked],
        drafts: "Sequence[array[int] | None]",
        seconds: float,
    ) -> list[Drafted | None]:
        """Add drafts that came to their sequences, and say what was done for each."""
        done: dict[RequestId, int] = {}
        for one, tokens in zip(members, drafts, strict=True):
            if tokens is None:
                link.again[one.request] = self._asked + SLOTLESS_STEPS
                self._count(slotless=1)
            else:
                link.again.pop(one.request, None)
                done[one.request] = _added(one.sequence, tokens[: one.most])
        total = sum(done.values())
        share = seconds / total if total else 0.0
        return [Drafted(done[one.request], share * done[one.request]) if one.request in done else None for one in asked]

    def _count(self, answered: int = 0, late: int = 0, unreached: int = 0, slotless: int = 0, wait_s: float = 0.0) -> None:
        load = self.load
        self.load = replace(
            load,
            answered=load.answered + answered,
            late=load.late + late,
            unreached=load.unreached + unreached,
            slotless=load.slotless + slotless,
            wait_s=load.wait_s + wait_s,
        )

    def _lose(self, link: Link, error: Exception) -> None:
        """Go on without a connection, which is made anew."""
        log.warning("drafts of %s are gone: %s", link.address, error)
        link.close()
        self._link = None
        self.load = replace(self.load, slots=0, slots_taken=0)
        with self._reached.changed:
            if self._reached.address == link.address:
                self._reached.address = None
            self._reached.changed.notify_all()

    def _keep_connected(self) -> None:
        reached, told = self._reached, None
        while True:
            with reached.changed:
                while not reached.closed and reached.wanted in (None, reached.address):
                    reached.changed.wait()
                if reached.closed:
                    return
                address = reached.wanted
            assert address is not None
            try:
                link = Link(address, self._trust)
            except (OSError, ValueError, DraftsLost) as error:
                if told != address:
                    log.warning("drafts of %s cannot be asked for: %s", address, error)
                told = address
                with reached.changed:
                    reached.changed.wait(RETRY_S)
                continue
            told = None
            log.info("drafts are asked of %s", address)
            with reached.changed:
                spare, reached.fresh, reached.address = reached.fresh, link, address
                if reached.closed:
                    spare, reached.fresh = link, None
                reached.changed.notify_all()
            if spare is not None:
                spare.close()


def _added(sequence: TokenSequence, drafts: "array[int]") -> int:
    """Add to a sequence what of these drafts may come; return how many."""
    for place, token in enumerate(drafts):
        if token in sequence.ending:
            drafts = drafts[: place + 1]
            break
    if sequence.walk is not None:
        drafts = drafts[: sequence.walk.passable(sequence.tokens, drafts)]
    sequence.tokens.extend(drafts)
    sequence.drafted = len(drafts)
    return sequence.drafted


def _taken_out(requests: list[RequestId]) -> list[int]:
    """Empty a list and return what was in it."""
    taken = [int(request) for request in requests]
    requests.clear()
    return taken
