"""What a trace's agents tell the cluster between their turns: that a tool runs, how long it will take, that a session is over.

none      nothing
learned   that a tool runs or sub-agents do, and when a session is over; how long they take is the cluster's to learn
oracle    how long each takes besides: what a harness says at best
"""

from collections.abc import Sequence
from enum import StrEnum

from orchestrator.traces import TracedTurn

#: What an agent waits for: a tool (or a user, which traces do not tell apart), or other agents.
TOOL, AGENTS = "tool", "agents"


class HintProgram(StrEnum):
    """How much agents tell."""

    NONE = "none"
    LEARNED = "learned"
    ORACLE = "oracle"


class Continuations:
    """Which turn each agent takes after which."""

    __slots__ = ("_next", "_previous")

    def __init__(self, turns: Sequence[TracedTurn]) -> None:
        latest: dict[tuple[str, str], TracedTurn] = {}
        self._next: dict[int, TracedTurn] = {}
        self._previous: dict[int, TracedTurn] = {}
        for turn in turns:
            before = latest.get((turn.session, turn.agent))
            if before is not None:
                self._next[before.id] = turn
                self._previous[turn.id] = before
            latest[turn.session, turn.agent] = turn

    def after(self, turn: TracedTurn) -> TracedTurn | None:
        """Return the same agent's next turn."""
        return self._next.get(turn.id)

    def continues(self, turn: TracedTurn) -> bool:
        """Tell whether an agent has had a turn before this one."""
        return turn.id in self._previous
