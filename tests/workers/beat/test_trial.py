"""The longest step is tried with every slot taken at the longest context, and one disturbed round does not decide."""

from array import array
from collections.abc import Sequence
from itertools import count

from orchestrator.core.commands import Slice
from orchestrator.core.types import RequestId, Sampling
from workers.engines.base import EngineDescription, SliceOutput
from workers.engines.beat.trial import ROUNDS, STEPS, WARM_STEPS, worst_step_s

BLOCKS, BLOCK_TOKENS, CONTEXT, SLOTS = 10, 4, 30, 3


class TriedEngine:
    """Takes the seconds that a step of that number is to take."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.description = EngineDescription(BLOCKS, BLOCK_TOKENS, 64, 64, "plain", 100, CONTEXT, "weights", "cpu", True)
        self.seconds = seconds
        self.time = 0.0
        self.steps: list[Sequence[Slice]] = []
        self.requests: dict[RequestId, int] = {}
        self._numbers = count()

    def add(self, request: RequestId, tokens: "array[int]", sampling: Sampling, generated: int = 0) -> None:
        self.requests[request] = len(tokens)

    def forget(self, request: RequestId) -> None:
        del self.requests[request]

    def step(self, slices: Sequence[Slice]) -> list[SliceOutput]:
        assert {part.request: part.start + 1 for part in slices} == self.requests
        self.steps.append(slices)
        self.time += self.seconds.get(next(self._numbers), 0.010)
        return [SliceOutput((1,)) for _ in slices]


def trial(seconds: dict[int, float]) -> tuple[float, TriedEngine]:
    engine = TriedEngine(seconds)
    return worst_step_s(engine, SLOTS, lambda: engine.time), engine  # type: ignore[arg-type]


def test_all_slots_are_taken_with_the_longest_contexts_over_the_whole_pool() -> None:
    _, engine = trial({})
    assert len(engine.steps) == WARM_STEPS + ROUNDS * STEPS
    [step] = {tuple(map(repr, one)) for one in engine.steps}
    assert len(step) == SLOTS
    tables = [part.blocks for part in engine.steps[0]]
    assert [len(table) for table in tables] == [8] * SLOTS
    assert {block for table in tables for block in table} == set(range(BLOCKS))
    assert not engine.requests


def test_the_longest_step_of_the_best_round_counts_and_the_first_ones_do_not() -> None:
    disturbed = {WARM_STEPS + number * STEPS: 0.4 for number in range(ROUNDS)}
    best = WARM_STEPS + 2 * STEPS
    seconds, _ = trial(disturbed | {0: 9.0, best: 0.010, best + 3: 0.020})
    assert round(seconds, 6) == 0.020
