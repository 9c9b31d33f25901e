"""What a trace's agents tell between their turns, under each program."""

from collections.abc import Iterator

import pytest

from orchestrator.sim.hints import AGENTS, TOOL, Agents, HintProgram, Over, Pause
from orchestrator.traces import TracedTurn


def turn(number: int, agent: str = "main", after: tuple[int, ...] = (), gap_s: float = 1.5, arrival_s: float = 0.0) -> TracedTurn:
    return TracedTurn(number, "s", agent, arrival_s, after, gap_s, 16, 1, 16, ((0, 1),))


#: main 1 starts an agent of two turns, goes on when that is through, and comes once more by the clock.
FORK = (turn(1), turn(2, "sub", (1,)), turn(3, "sub", (2,)), turn(4, after=(1, 3)), turn(5, arrival_s=9.0))


def told(program: HintProgram, order: tuple[int, ...] = (1, 2, 3, 4, 5)) -> Iterator[list[tuple[int, str | None, float | None]]]:
    """Let turns end, one a second; yield what is told then: the turn meant, the tool and how long, or None for an end."""
    agents = Agents(FORK, program)
    for now, number in enumerate(order):
        ended = FORK[number - 1]
        found: list[tuple[int, str | None, float | None]] = []
        for one in agents.told(ended, agents.end(ended), float(now)):
            match one:
                case Pause(meant, tool, expected_s):
                    found.append((meant.id, tool, expected_s))
                case Over(meant):
                    found.append((meant.id, None, None))
        yield found


def test_harnesses_that_know_tell_how_long() -> None:
    assert list(told(HintProgram.ORACLE)) == [
        [(4, AGENTS, None)],  # nobody knows how long other agents take; the first turn of another is no pause
        [(3, TOOL, 1.5)],
        [(4, TOOL, 1.5), (3, None, None)],
        [(5, TOOL, 6.0)],  # it is three by then
        [(5, None, None)],
    ]


def test_others_tell_that_a_tool_runs_and_no_more() -> None:
    pauses = [one for moment in told(HintProgram.LEARNED) for one in moment]
    assert pauses == [(4, AGENTS, None), (3, TOOL, None), (4, TOOL, None), (3, None, None), (5, TOOL, None), (5, None, None)]


@pytest.mark.parametrize("order", [(1, 2, 3, 4, 5), (5, 1, 2, 3, 4)])
def test_some_tell_nothing(order: tuple[int, ...]) -> None:
    assert not any(told(HintProgram.NONE, order))


def test_a_turn_comes_once_all_have_ended_that_it_waits_for() -> None:
    agents = Agents(FORK, HintProgram.NONE)
    coming = [[other.id for other in agents.end(FORK[number - 1])] for number in (1, 5, 2, 3)]
    assert coming == [[2], [], [3], [4]]
