"""What a trace's agents tell the cluster between their turns: that a tool runs, how long it will take, that a session is over.

none      nothing
learned   that a tool runs or sub-agents do, and when a session is over; how long they take is the cluster's to learn
oracle    how long each takes besides: what a harness says at best
prefetch  and by the cache API, where it is known with its context: that is brought back into nodes' memory before it returns
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

#: What an agent waits for: a tool (or a user, which traces do not tell apart), or other agents.
TOOL, AGENTS = "tool", "agents"


class HintProgram(StrEnum):
    """How much agents tell."""

    NONE = "none"
    LEARNED = "learned"
    ORACLE = "oracle"
    PREFETCH = "prefetch"

    @property
    def knows(self) -> bool:
        """Whether agents tell how long their tools take."""
        return self in (HintProgram.ORACLE, HintProgram.PREFETCH)


class AgentTurn(Protocol):
    """What must be known of a turn: it comes `gap_s` after the last of those it waits for, or at `arrival_s`."""

    @property
    def id(self) -> int: ...
    @property
    def session(self) -> str: ...
    @property
    def agent(self) -> str: ...
    @property
    def after(self) -> tuple[int, ...]: ...
    @property
    def gap_s(self) -> float: ...
    @property
    def arrival_s(self) -> float: ...


Turn = TypeVar("Turn", bound=AgentTurn)


@dataclass(frozen=True, slots=True)
class Pause(Generic[Turn]):
    """An agent waits for something, after which its next turn comes."""

    turn: Turn
    tool: str
    #: Seconds that it will take, over 0; None: not told.
    expected_s: float | None


@dataclass(frozen=True, slots=True)
class Over(Generic[Turn]):
    """An agent has taken its last turn."""

    turn: Turn


class Agents(Generic[Turn]):
    """The agents of a trace whose turns really end: which turns come then, and what is told of the pauses before them."""

    __slots__ = ("_awaited", "_begun", "_followers", "_next", "_program")

    def __init__(self, turns: Sequence[Turn], program: HintProgram) -> None:
        self._program = program
        #: How many turns each still waits for, and who waits for each.
        self._awaited: dict[int, int] = {}
        self._followers: dict[int, list[Turn]] = {}
        #: The same agent's next turn; turns that are one.
        self._next: dict[int, Turn] = {}
        self._begun: set[int] = set()
        latest: dict[tuple[str, str], Turn] = {}
        for turn in turns:
            before = latest.get((turn.session, turn.agent))
            if before is not None:
                self._next[before.id] = turn
                self._begun.add(turn.id)
            latest[turn.session, turn.agent] = turn
            if turn.after:
                self._awaited[turn.id] = len(turn.after)
            for other in turn.after:
                self._followers.setdefault(other, []).append(turn)

    def end(self, turn: Turn) -> list[Turn]:
        """Note that a turn is over; return those that waited for it alone: each comes after its gap."""
        coming: list[Turn] = []
        for other in self._followers.pop(turn.id, ()):
            self._awaited[other.id] -= 1
            if not self._awaited[other.id]:
                del self._awaited[other.id]
                coming.append(other)
        return coming

    def told(self, turn: Turn, coming: Sequence[Turn], now: float) -> Iterator[Pause[Turn] | Over[Turn]]:
        """Yield what agents tell at the end of a turn, `now` seconds after the trace began, that lets others come."""
        if self._program is HintProgram.NONE:
            return
        for other in coming:
            if other.id in self._begun:
                yield self._pause(other, TOOL, other.gap_s)
        following = self._next.get(turn.id)
        if following is None:
            yield Over(turn)
        elif following.id in self._awaited:
            yield self._pause(following, AGENTS, None)
        elif not following.after:
            yield self._pause(following, TOOL, following.arrival_s - now)

    def _pause(self, turn: Turn, tool: str, expected_s: float | None) -> Pause[Turn]:
        known = self._program.knows and expected_s is not None and expected_s > 0.0
        return Pause(turn, tool, expected_s if known else None)
