"""Dynamo's request trace: what its frontend writes about every request that ended (schema `dynamo.request.trace.v1`).

Read of each `request_end` line, bare or inside `event`:

    request.request_id, model, output_tokens, request_received_ms, total_time_ms
    request.replay.trace_block_size, input_length, input_sequence_hashes
    agent_context.session_id, parent_session_id

What waited for what is not recorded; it follows from times. A request waits for the latest of its session that ended before it
came, for sub-agents' that ended since then, and a sub-agent's first one for its parent's latest. The pause is what lies between,
which tools and users took: the lines about tools say nothing more. https://docs.nvidia.com/dynamo/dev/agents/agent-tracing
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

import msgspec

from orchestrator.traces.lines import Lines, decoded
from orchestrator.traces.order import full_blocks
from orchestrator.traces.schema import Count, Milliseconds, Positive
from orchestrator.traces.turns import BlockNames, Runs, TracedTurn, TraceError

SCHEMA = "dynamo.request.trace."
REQUEST_END = "request_end"
#: Parents of parents that are followed; a longer line of them is taken for a circle.
ANCESTORS_MAX = 64


class Replay(msgspec.Struct):
    """What a request's prompt was, by its hashes."""

    trace_block_size: Positive
    input_length: Positive
    input_sequence_hashes: list[int | str]


class Request(msgspec.Struct):
    """One request's measurements."""

    request_id: str
    request_received_ms: Milliseconds
    model: str | None = None
    input_tokens: Positive | None = None
    output_tokens: Count | None = None
    total_time_ms: Milliseconds | None = None
    replay: Replay | None = None


class AgentContext(msgspec.Struct):
    """Whose request it was."""

    session_id: str | None = None
    parent_session_id: str | None = None


class Event(msgspec.Struct):
    """One line, or what is inside its `event`."""

    event_type: str = ""
    event_time_unix_ms: Milliseconds | None = None
    agent_context: AgentContext | None = None
    request: msgspec.Raw = msgspec.Raw(b"null")


class Wrapper(msgspec.Struct):
    """A line that has its event inside."""

    event: msgspec.Raw = msgspec.Raw(b"")


@dataclass(frozen=True, slots=True)
class _Ended:
    """One request, read."""

    number: int
    name: str
    session: str
    parent: str | None
    received_ms: float
    ended_ms: float
    model: str
    input_tokens: int
    output_tokens: int
    block_tokens: int
    runs: Runs


class DynamoReader:
    """Reads one file of such lines. They are in order of ends, so the whole file is read before its first turn is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names = BlockNames()
        self._wrapper = msgspec.json.Decoder(Wrapper)
        self._event = msgspec.json.Decoder(Event)
        self._request = msgspec.json.Decoder(Request)

    def turns(self, lines: Lines) -> Iterator[TracedTurn]:
        """Yield the file's turns in order of arrival. Raises `TraceError`."""
        ended: list[_Ended] = []
        known: dict[str, int] = {}
        for number, text in lines:
            where = f"{self._path}:{number}"
            one = self._ended(text, number, where)
            if one is None:
                continue
            if one.name in known:
                raise TraceError(f"{where}: request.request_id: {one.name!r} was on line {known[one.name]} before")
            if ended and one.block_tokens != ended[0].block_tokens:
                raise TraceError(
                    f"{where}: request.replay.trace_block_size: is {one.block_tokens}, line {ended[0].number} has "
                    f"{ended[0].block_tokens} (0 without replay)"
                )
            known[one.name] = number
            ended.append(one)
        ended.sort(key=lambda one: (one.received_ms, one.number))
        return _turns(ended)

    def _ended(self, text: bytes, number: int, where: str) -> _Ended | None:
        """Return a line's request; None if the line is about something else."""
        inner = decoded(self._wrapper, text, where).event
        event = decoded(self._event, bytes(inner) or text, where)
        if event.event_type != REQUEST_END:
            return None
        request = decoded(self._request, bytes(event.request), f"{where}: request")
        replay = request.replay
        tokens = replay.input_length if replay is not None else request.input_tokens
        if tokens is None:
            raise TraceError(
                f"{where}: request.replay: missing, and so is request.input_tokens; one must tell the prompt's length"
            )
        if request.output_tokens is None:
            raise TraceError(f"{where}: request.output_tokens: missing")
        context = event.agent_context or AgentContext()
        return _Ended(
            number=number,
            name=request.request_id,
            session=context.session_id or f"request {request.request_id}",
            parent=context.parent_session_id,
            received_ms=request.request_received_ms,
            ended_ms=self._end_ms(request, event, where),
            model=request.model or "",
            input_tokens=tokens,
            output_tokens=request.output_tokens,
            block_tokens=replay.trace_block_size if replay is not None else 0,
            runs=self._blocks(replay, where) if replay is not None else (),
        )

    def _end_ms(self, request: Request, event: Event, where: str) -> float:
        if request.total_time_ms is not None:
            return request.request_received_ms + request.total_time_ms
        if event.event_time_unix_ms is None:
            raise TraceError(f"{where}: request.total_time_ms: missing, and so is event_time_unix_ms; one must tell its end")
        return max(event.event_time_unix_ms, request.request_received_ms)

    def _blocks(self, replay: Replay, where: str) -> Runs:
        runs = self._names.runs(replay.input_sequence_hashes)
        field = "request.replay.input_sequence_hashes"
        return full_blocks(runs, replay.input_length, replay.trace_block_size, where, field)


class _Session:
    """What of a session has come so far."""

    __slots__ = ("_latest", "_running", "children", "parent")

    def __init__(self, parent: str | None) -> None:
        self.parent = parent
        self.children: list[str] = []
        #: (end, id) of its requests that had not ended when the latest was last asked for, the soonest end first; and that one.
        self._running: list[tuple[float, int]] = []
        self._latest: tuple[float, int] | None = None

    def add(self, end_ms: float, identity: int) -> None:
        """Take in a request."""
        heappush(self._running, (end_ms, identity))

    def latest(self, before_ms: float) -> tuple[float, int] | None:
        """Return the end and id of the request that ended last before a moment, which is never earlier than the one before."""
        while self._running and self._running[0][0] <= before_ms:
            one = heappop(self._running)
            self._latest = one if self._latest is None else max(self._latest, one)
        return self._latest


def _turns(ended: list[_Ended]) -> Iterator[TracedTurn]:
    sessions: dict[str, _Session] = {}
    for identity, one in enumerate(ended):
        if one.session not in sessions:
            sessions[one.session] = _Session(one.parent)
            if one.parent is not None and one.parent in sessions:
                sessions[one.parent].children.append(one.session)
        before = _before(one, sessions)
        root = _root(one.session, sessions)
        yield TracedTurn(
            id=identity,
            session=root,
            agent="main" if root == one.session else one.session,
            arrival_s=(one.received_ms - ended[0].received_ms) / 1e3,
            after=tuple(other for _, other in before),
            gap_s=(one.received_ms - max(end for end, _ in before)) / 1e3 if before else 0.0,
            input_tokens=one.input_tokens,
            output_tokens=one.output_tokens,
            block_tokens=one.block_tokens,
            block_runs=one.runs,
            model=one.model,
        )
        sessions[one.session].add(one.ended_ms, identity)


def _before(one: _Ended, sessions: Mapping[str, _Session]) -> list[tuple[float, int]]:
    """Return end and id of what a request must have waited for."""
    session = sessions[one.session]
    own = session.latest(one.received_ms)
    if own is None:
        parent = sessions.get(session.parent) if session.parent is not None else None
        spawned = parent.latest(one.received_ms) if parent is not None else None
        return [spawned] if spawned is not None else []
    joined = [sessions[child].latest(one.received_ms) for child in session.children]
    return [own, *(last for last in joined if last is not None and last[0] > own[0])]


def _root(session: str, sessions: Mapping[str, _Session]) -> str:
    """Return the session that a session came from in the end."""
    for _ in range(ANCESTORS_MAX):
        parent = sessions[session].parent if session in sessions else None
        if parent is None:
            return session
        session = parent
    return session
