"""Runs the article's session through the simulator: how its contexts grow, what is found in the cache, how long it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go

from deploy.charts import Axes, Series, lines_chart
from orchestrator.profiles.resolve import Resolved
from orchestrator.sim.outcome import Served
from orchestrator.sim.world import World, WorldOptions
from orchestrator.wire.traces import TracedTurn, read_trace

SEED_SESSION = Path(__file__).parents[1] / "data" / "seed_session.jsonl.gz"
MAIN_AGENT = "main"
#: A context that shrinks to less than this share of the one before was compacted.
COMPACTED_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class SessionRun:
    """The whole simulated session, in order of arrival."""

    served: tuple[Served, ...]

    @property
    def main(self) -> tuple[Served, ...]:
        """The main agent's requests."""
        return tuple(served for served in self.served if served.turn.agent == MAIN_AGENT)

    @property
    def delegated(self) -> tuple[Served, ...]:
        """The sub-agents' requests."""
        return tuple(served for served in self.served if served.turn.agent != MAIN_AGENT)

    @property
    def sub_agents(self) -> tuple[str, ...]:
        """Their names in order of appearance."""
        return tuple(dict.fromkeys(served.turn.agent for served in self.delegated))

    @property
    def duration_s(self) -> float:
        return max(served.ended_s or 0.0 for served in self.served)

    @property
    def served_s(self) -> float:
        """Seconds in which the main agent waited for its own answers."""
        return sum((served.ended_s or 0.0) - served.arrived_s for served in self.main)

    @property
    def compaction(self) -> int:
        """Index of the main agent's first turn after a compaction, or the number of its turns if there was none."""
        sizes = [served.turn.input_tokens for served in self.main]
        shrunk = (turn for turn in range(1, len(sizes)) if sizes[turn] < COMPACTED_SHARE * sizes[turn - 1])
        return next(shrunk, len(sizes))


def input_tokens(served: Sequence[Served]) -> int:
    """Return the prompt tokens of some requests."""
    return sum(one.turn.input_tokens for one in served)


def hit_rate(served: Sequence[Served]) -> float:
    """Return the share of some requests' prompt tokens that were not computed."""
    return sum(one.cached_tokens for one in served) / input_tokens(served)


def read_session(path: Path = SEED_SESSION) -> list[TracedTurn]:
    """Return the turns of the session that stands for the article's."""
    return list(read_trace(path))


def run_session(resolved: Resolved, turns: Sequence[TracedTurn]) -> SessionRun:
    """Simulate the turns in closed loop, alone on the cluster. Every request completes or an assertion fails."""
    outcome = World(resolved, turns, WorldOptions()).run()
    for one in outcome.served:
        assert one.completed, f"request {one.turn.id} of the article's session: {one.failure or 'never ended'}"
    return SessionRun(tuple(sorted(outcome.served, key=lambda one: (one.arrived_s, one.turn.id))))


def growth_chart(run: SessionRun) -> go.Figure:
    """Return the prompt length of each agent's n-th request: the main agent's and those of its sub-agents."""
    series = [_growth("main agent", run.main)]
    for name in run.sub_agents:
        series.append(_growth(name, [served for served in run.delegated if served.turn.agent == name]))
    return lines_chart(series, Axes("request of the agent", "prompt tokens"))


def _growth(name: str, served: Sequence[Served]) -> Series:
    return Series(name, list(range(1, len(served) + 1)), [one.turn.input_tokens for one in served])
