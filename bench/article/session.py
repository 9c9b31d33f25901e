"""Runs the article's session through the simulator: how its contexts grow, what is found in the cache, how long it takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from orchestrator.cli.report.charts import Axes, Series, lines_chart
from orchestrator.cli.report.page import Figure
from orchestrator.profiles.resolve import Resolved
from orchestrator.sim.names import between
from orchestrator.sim.outcome import Served
from orchestrator.sim.world import World, WorldOptions
from orchestrator.traces import TracedTurn, read_trace

SEED_SESSION = Path(__file__).parent / "data" / "seed_session.jsonl.gz"
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
    def critical_s(self) -> float:
        """Seconds of answers on the session's critical path: back from the last to end, from each to what it waited for last."""
        by_id = {served.turn.id: served for served in self.served}
        one, waited_s = max(self.served, key=_ended), 0.0
        while one is not None:
            waited_s += _ended(one) - one.arrived_s
            before = [by_id[turn] for turn in one.turn.after if turn in by_id]
            one = max(before, key=_ended, default=None)
        return waited_s

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


def _ended(served: Served) -> float:
    return served.ended_s or 0.0


def input_tokens(served: Sequence[Served]) -> int:
    """Return the prompt tokens of some requests."""
    return sum(one.turn.input_tokens for one in served)


def hit_rate(served: Sequence[Served]) -> float:
    """Return the share of some requests' prompt tokens that were not computed."""
    return sum(one.cached_tokens for one in served) / input_tokens(served)


def read_session(path: Path = SEED_SESSION) -> list[TracedTurn]:
    """Return the turns of the session that stands for the article's."""
    return list(read_trace(path))


def one_shot(turns: Sequence[TracedTurn]) -> list[TracedTurn]:
    """Return the same turns with every sub-agent's request an agent of its own, as fresh as that sub-agent's first one was.

    Only what its first request shares with other agents, tools and system prompt, can then be found by another.
    """
    agents: dict[int, set[str]] = {}
    first: dict[str, TracedTurn] = {}
    for turn in turns:
        first.setdefault(turn.agent, turn)
        for block in turn.blocks:
            agents.setdefault(block, set()).add(turn.agent)
    fresh, found = max(agents, default=0) + 1, list[TracedTurn]()
    for turn in turns:
        start = first[turn.agent]
        if turn.agent == MAIN_AGENT:
            found.append(turn)
            continue
        blocks = start.blocks
        shared = len(list(takewhile(lambda block: len(agents[block]) > 1, blocks)))
        private = ((fresh, len(blocks) - shared),) if shared < len(blocks) else ()
        fresh += len(blocks) - shared
        runs = (*between(start.block_runs, 0, shared), *private)
        found.append(replace(turn, agent=f"{turn.agent} {turn.id}", input_tokens=start.input_tokens, block_runs=runs))
    return found


def run_session(resolved: Resolved, turns: Sequence[TracedTurn]) -> SessionRun:
    """Simulate the turns in closed loop, alone on the cluster. Every request completes or an assertion fails."""
    outcome = World(resolved, turns, WorldOptions()).run()
    for one in outcome.served:
        assert one.completed, f"request {one.turn.id} of the article's session: {one.failure or 'never ended'}"
    return SessionRun(tuple(sorted(outcome.served, key=lambda one: (one.arrived_s, one.turn.id))))


def growth_chart(run: SessionRun) -> Figure:
    """Return the prompt length of each agent's n-th request: the main agent's and those of its sub-agents."""
    series = [_growth("main agent", run.main)]
    for name in run.sub_agents:
        series.append(_growth(name, [served for served in run.delegated if served.turn.agent == name]))
    return lines_chart(series, Axes("request of the agent", "prompt tokens"))


def _growth(name: str, served: Sequence[Served]) -> Series:
    return Series(name, list(range(1, len(served) + 1)), [one.turn.input_tokens for one in served])
