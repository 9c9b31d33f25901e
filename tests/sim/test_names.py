"""Tests of how the blocks that an answer fills are named."""

from orchestrator.sim.names import PRIVATE_NAMES, generated_runs, successors
from orchestrator.traces import TracedTurn


def turn(number: int, tokens: int, output: int, *runs: tuple[int, int], agent: str = "main", block: int = 4) -> TracedTurn:
    return TracedTurn(number, "s", agent, 0.0, (), 0.0, tokens, output, block, runs)


def test_successor_names_the_answers_full_blocks() -> None:
    first, second = turn(0, 10, 7, (1, 2)), turn(1, 24, 1, (1, 3), (7, 3))
    assert successors([first, second]) == {0: second}
    # 16 tokens have KV: blocks 2 and 3; the prompt has filled 0 and 1.
    assert generated_runs(first, second) == ((3, 1), (7, 1))


def test_an_answer_that_completes_no_block_names_none() -> None:
    first, second = turn(0, 10, 2, (1, 2)), turn(1, 24, 1, (1, 6))
    assert generated_runs(first, second) == ()


def test_only_a_prompt_that_holds_prompt_and_answer_continues_a_turn() -> None:
    first = turn(0, 8, 8, (1, 2))
    for other in (
        turn(1, 15, 1, (1, 3)),  # shorter than both together
        turn(1, 16, 1, (1, 1), (9, 3)),  # rewritten
        turn(1, 16, 1, (1, 4), agent="sub"),
        turn(1, 16, 1, (1, 2), block=8),
    ):
        assert successors([first, other]) == {}
    between = turn(1, 16, 1, (50, 4))
    assert successors([first, between, turn(2, 16, 1, (1, 4))]) == {}, "only the very next turn of an agent may continue it"


def test_answers_that_nothing_continues_have_names_of_their_own() -> None:
    one, two = generated_runs(turn(0, 8, 9, (1, 2)), None), generated_runs(turn(1, 8, 9, (1, 2)), None)
    assert one == ((-PRIVATE_NAMES, 2),)
    assert two == ((-2 * PRIVATE_NAMES, 2),)


def test_turns_without_blocks_have_neither() -> None:
    first, second = turn(0, 8, 8, block=0), turn(1, 16, 8, block=0)
    assert successors([first, second]) == {}
    assert generated_runs(first, None) == ()
