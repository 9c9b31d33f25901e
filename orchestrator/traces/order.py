"""Checks a trace across its lines: ids used twice, dependencies that cannot be met, times that run backwards."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from orchestrator.traces.times import TimeUnit
from orchestrator.traces.turns import Runs, TracedTurn, TraceError, cut, repeated

Key = TypeVar("Key", bound=Hashable)

#: Requests of a cycle that a message names at most.
CYCLE_SHOWN_MAX = 6


class Timeline:
    """Lets times only go forward, on one clock or on a clock of each session's own that starts where the first one did."""

    __slots__ = ("_first_s", "_latest_s", "_restarted", "_session", "_sessions", "_unit")

    def __init__(self, unit: TimeUnit = TimeUnit.MILLISECONDS) -> None:
        #: Of the file's times, in which they are told.
        self._unit = unit
        self._first_s = 0.0
        self._latest_s = 0.0
        self._session: str | None = None
        self._sessions: set[str] = set()
        self._restarted = False

    def add(self, turn: TracedTurn, named: bool, where: str) -> None:
        """Take the next line's turn; `named` if its session is the file's. Raises `TraceError`."""
        new = turn.session not in self._sessions
        if not self._sessions:
            self._first_s = turn.arrival_s
        elif turn.arrival_s < self._latest_s:
            if not (new and named and turn.arrival_s == self._first_s):
                later, sooner = (time * self._unit.per_second for time in (self._latest_s, turn.arrival_s))
                raise TraceError(
                    f"{where}: timestamp: {sooner:.12g} comes after {later:.12g}; lines must be sorted by time, or every "
                    "session's clock must start where the first one's does"
                )
            self._restarted = True
        if self._restarted and not new and turn.session != self._session:
            raise TraceError(f"{where}: session: {turn.session!r} came before; sessions with clocks of their own must not mix")
        self._latest_s = turn.arrival_s
        self._session = turn.session
        self._sessions.add(turn.session)


def full_blocks(runs: Runs, input_tokens: int, block_tokens: int, where: str, field: str) -> Runs:
    """Return the names of a prompt's full blocks; one for the last, part-filled block is dropped. Raises `TraceError`."""
    count = sum(size for _, size in runs)
    full = input_tokens // block_tokens
    if count not in (full, -(-input_tokens // block_tokens)):
        raise TraceError(
            f"{where}: {field}: names {count} blocks, but {input_tokens} tokens fill {full} blocks of {block_tokens} tokens"
        )
    twice = repeated(runs)
    if twice is not None:
        raise TraceError(f"{where}: {field}: names block {twice} twice; a name stands for one prefix and so for one place")
    return runs if count == full else cut(runs, full)


def unmet(request: Key, missing: Key, waits: Mapping[Key, tuple[int, Sequence[Key]]]) -> str:
    """Say why a request cannot wait for one that no earlier line has.

    Args:
        waits: of all the file's requests, their line and what they wait for.
    """
    if missing not in waits:
        return f"{missing!r} is no request of this file"
    path = _path(missing, request, waits)
    if path is None:
        return f"{missing!r} is not an earlier request, but that of line {waits[missing][0]}"
    shown = [repr(one) for one in (request, *path)]
    if len(shown) > CYCLE_SHOWN_MAX:
        shown = [*shown[: CYCLE_SHOWN_MAX - 1], "...", shown[-1]]
    return f"a cycle: {' waits for '.join(shown)}"


def _path(start: Key, goal: Key, waits: Mapping[Key, tuple[int, Sequence[Key]]]) -> list[Key] | None:
    """Return the requests from `start` to `goal`, each waiting for the next; None if there is no such way."""
    came_from: dict[Key, Key | None] = {start: None}
    open_ends = [start]
    while open_ends:
        request = open_ends.pop()
        if request == goal:
            path = [request]
            while (former := came_from[path[-1]]) is not None:
                path.append(former)
            return path[::-1]
        for other in waits[request][1] if request in waits else ():
            if other not in came_from:
                came_from[other] = request
                open_ends.append(other)
    return None
