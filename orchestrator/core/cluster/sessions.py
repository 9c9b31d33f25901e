"""Remembers agents' sessions: where their last turn ran, and how much of their last prompt a new turn repeats.

The router uses it to break ties in favour of the nodes that served a session before; metrics use it to say why prompt tokens
were computed again. Bounded: the session that was quiet for longest is forgotten first.

Where there are several gateways each session belongs to one, so that what is known of it is in one place (`owner_of`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b

from orchestrator.core.cluster.contexts import Context, Marks
from orchestrator.core.cluster.expectations import Expectations, Line, Told
from orchestrator.core.events import Answered, SessionEnded, ToolFinished, ToolStarted
from orchestrator.core.making import quickly_made
from orchestrator.core.outlook import Outlook
from orchestrator.core.types import GatewayId, ModelName, NodeId, Request, SessionId, TenantId


def owner_of(session: SessionId, gateways: Iterable[GatewayId]) -> GatewayId:
    """Return which of the gateways that take requests a session belongs to: the same everywhere, by rendezvous hashing.

    While a gateway is away only its own sessions belong to others.
    """
    return max(gateways, key=lambda gateway: blake2b(f"{gateway}:{session}".encode(), digest_size=8).digest())


class ReprefillReason(StrEnum):
    """Why prompt tokens had to be computed."""

    NEW = "new"  # never seen in this session
    REWRITTEN = "rewritten"  # the harness changed the context before them
    EVICTED = "evicted"  # computed before on the same nodes, which forgot them not long ago
    NOT_STORED = (
        "not_stored"  # computed before on the same nodes, which did not keep them, or lost them long ago or with a restart
    )
    MOVED = "moved"  # computed before, on other nodes
    SCORED = "scored"  # computed before, and again because the prompt's log probabilities were wanted


class Session:
    """One agent's reasoning chain on one model."""

    __slots__ = ("children", "generated_on", "line", "marks", "parent", "prefilled_on")

    def __init__(self) -> None:
        #: Node that generated the last turn's tokens, and the one that computed its prompt if that was another.
        self.generated_on: NodeId | None = None
        self.prefilled_on: NodeId | None = None
        #: Of the last prompt that was served to the end.
        self.marks = Marks()
        #: Its contexts.
        self.line = Line()
        #: The session that it forked from, and those that forked from it and have not ended.
        self.parent: SessionId | None = None
        self.children: set[SessionId] = set()

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Where the last turn ran."""
        return tuple([node for node in (self.generated_on, self.prefilled_on) if node is not None])


@quickly_made
@dataclass(frozen=True, slots=True)
class Started:
    """A turn that runs: its context, and what is expected after it."""

    context: Context | None
    outlook: Outlook | None
    #: What other nodes have to hear.
    told: Sequence[Told]


_NOTHING_EXPECTED = Started(None, None, ())


class Sessions:
    """The sessions heard of lately, at most `sessions_max`."""

    __slots__ = ("_expectations", "_reprefilled", "_sessions", "_sessions_max")

    def __init__(self, sessions_max: int) -> None:
        self._sessions_max = sessions_max
        #: Longest quiet first.
        self._sessions: dict[tuple[ModelName, TenantId, SessionId], Session] = {}
        self._reprefilled = dict.fromkeys(ReprefillReason, 0)
        self._expectations = Expectations()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def reprefilled_tokens(self) -> Mapping[ReprefillReason, int]:
        """Prompt tokens computed so far, by why they had to be."""
        return self._reprefilled

    def of(self, request: Request) -> Session | None:
        """Return what is known of a request's session; None if it names none or is new."""
        if request.session is None:
            return None
        return self._sessions.get((request.model, request.tenant, request.session))

    def started(self, request: Request, generate: NodeId, prefill: NodeId | None, again: bool, now: float) -> Started:
        """Note where a turn runs, perhaps after it ran elsewhere; return what is expected after it."""
        if request.session is None:
            outlook = self._expectations.outlook(None, request.id)
            return Started(None, outlook, ()) if outlook is not None else _NOTHING_EXPECTED
        key = request.model, request.tenant, request.session
        session = self._sessions.pop(key, None) or Session()
        self._sessions[key] = session
        session.generated_on, session.prefilled_on = generate, prefill
        self._forget_oldest()
        context, told = self._expectations.started(session.line, request.id, request.hashes, session.nodes, again, now)
        return Started(context, self._expectations.outlook(context, request.id), told)

    def paused(self, started: Started, now: float) -> list[Told]:
        """Note that a turn is over, well or not; return what nodes have to hear."""
        return self._expectations.paused(started.context, now) if started.context is not None else []

    def hinted(self, event: Answered | ToolStarted | ToolFinished | SessionEnded, now: float) -> list[Told]:
        """Take in what a session's harness or its answer says of it; return what nodes have to hear. Nothing of one not known."""
        key = event.model, event.tenant, event.session
        session = self._sessions.get(key)
        if session is None:
            return []
        match event:
            case Answered():
                return self._expectations.answered(session.line, event.request, event.tool, now)
            case ToolStarted():
                return self._expectations.tool_started(session.line, event.tool, event.expected_s, now)
            case ToolFinished():
                return self._expectations.tool_finished(session.line, now)
            case SessionEnded():
                del self._sessions[key]
                return self._expectations.ended(session.line) + self._joined(key, session, now)

    def _joined(self, key: tuple[ModelName, TenantId, SessionId], child: Session, now: float) -> list[Told]:
        """Note that a session has ended; the one that it forked from goes on once no other one is left that did."""
        parent = self._leave(key, child)
        return self._expectations.joined(parent.line, now) if parent is not None and not parent.children else []

    def _leave(self, key: tuple[ModelName, TenantId, SessionId], child: Session) -> Session | None:
        """Let a session be none of its parent's any more; return that one, None if there is none that waits for it."""
        model, tenant, name = key
        parent = self._sessions.get((model, tenant, child.parent)) if child.parent is not None else None
        if parent is None or name not in parent.children:
            return None
        parent.children.discard(name)
        return parent

    def fork(self, model: ModelName, tenant: TenantId, parent: SessionId, children: Iterable[SessionId]) -> bool:
        """Let new sessions begin where another one is, with its context; False if that one is not known."""
        origin = self._sessions.get((model, tenant, parent))
        if origin is None:
            return False
        for child in children:
            key = model, tenant, child
            if key not in self._sessions:
                session = self._sessions[key] = Session()
                session.generated_on, session.prefilled_on = origin.generated_on, origin.prefilled_on
                session.marks = origin.marks
                session.parent = parent
                origin.children.add(child)
        self._forget_oldest()
        return True

    def _forget_oldest(self) -> None:
        while len(self._sessions) > self._sessions_max:
            key = next(iter(self._sessions))
            session = self._sessions.pop(key)
            session.line.forget()
            self._leave(key, session)

    def knows(self, model: ModelName, tenant: TenantId, session: SessionId) -> bool:
        """Return whether anything is known of a session."""
        return (model, tenant, session) in self._sessions

    def ended(self, request: Request, computed_tokens: int, stayed: bool, block_tokens: int, regretted_tokens: int = 0) -> None:
        """Note that a turn went well, and why it computed what it did.

        Args:
            request: the turn.
            computed_tokens: prompt tokens that were computed for it: its last ones.
            stayed: whether it was computed where the session's turn before ran.
            block_tokens: tokens in a block.
            regretted_tokens: those of them that the nodes which computed them had held and forgot.

        What was computed falls into three parts:

            [0, repeated)            was computed for the last turn     moved, or else evicted or not stored
            [repeated, last)         differs from the last turn         rewritten
            [last, end)              has no block in the last turn      new
        """
        session = self.of(request)
        if session is None:
            self._reprefilled[ReprefillReason.NEW] += computed_tokens
            return
        before = session.marks
        end, start = request.prompt_tokens, request.prompt_tokens - computed_tokens
        last = min(before.blocks * block_tokens, end)
        repeated = min(before.repeated_blocks(request.hashes) * block_tokens, last)
        lost_tokens = max(0, repeated - start)
        evicted_tokens = min(lost_tokens, regretted_tokens) if stayed and not request.scored else 0
        self._reprefilled[ReprefillReason.NEW] += end - max(start, last)
        self._reprefilled[ReprefillReason.REWRITTEN] += max(0, last - max(start, repeated))
        self._reprefilled[ReprefillReason.EVICTED] += evicted_tokens
        unkept = ReprefillReason.NOT_STORED if stayed else ReprefillReason.MOVED
        self._reprefilled[ReprefillReason.SCORED if request.scored else unkept] += lost_tokens - evicted_tokens
        session.marks = Marks.of(request.hashes)
