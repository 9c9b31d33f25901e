"""The longest step is tried with every slot taken at the longest context, and one disturbed round does not decide."""

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.core.commands import Slice
from orchestrator.core.types import RequestId, Sampling
from workers.engines.base import EngineDescription, SliceOutput, SplitPlaces
from workers.engines.beat.trial import ROUNDS, STEPS, WARM_STEPS, dearest_routings, longest_step_s, worst_step_s
from workers.engines.checkpoint import create_checkpoint
from workers.engines.split.ffn import HalvesTimes

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


class TriedHalves(TriedEngine):
    """Takes so many seconds by the number of micro-batches and the experts that are tried; a tenth of them is FFN ranks'."""

    def __init__(self, cut_s: dict[int, float], experts_s: dict[int, float]) -> None:
        super().__init__({})
        self.cut_s = cut_s
        self.experts_s = experts_s
        self.count = 1
        self.experts = 0
        self.split = SimpleNamespace(times=HalvesTimes())

    def cut(self, rows: int, microbatches: int) -> None:
        assert rows == SLOTS
        self.count = microbatches

    @contextmanager
    def routed(self, experts: Sequence[int]) -> Iterator[None]:
        self.experts = len(experts)
        yield

    def step(self, slices: Sequence[Slice]) -> list[SliceOutput]:
        seconds = self.cut_s[self.count] + self.experts_s.get(self.experts, 0.0)
        self.time += seconds
        self.split.times.ffn_s += seconds / 10
        return [SliceOutput((1,)) for _ in slices]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    create_checkpoint(path, "qwen3_moe", 7, layers=1)
    return path


def longest(engine: TriedHalves, model_dir: Path, places: SplitPlaces) -> float:
    return longest_step_s(engine, SLOTS, model_dir, places, lambda: engine.time)  # type: ignore[arg-type]


def test_steps_are_cut_as_suits_the_longest_of_them(model_dir: Path) -> None:
    engine = TriedHalves({1: 0.030, 2: 0.020, 3: 0.020}, {})
    assert longest(engine, model_dir, SplitPlaces(("a", "b"))) == pytest.approx(0.020)
    assert engine.count == 2
    assert longest(engine, model_dir, SplitPlaces(("a", "b"), microbatches=3)) == pytest.approx(0.020)
    assert engine.count == 3
    # More than there are slots are not asked for; what was tried is not told as what either half did.
    engine = TriedHalves({SLOTS: 0.020}, {})
    assert longest(engine, model_dir, SplitPlaces(("a",), microbatches=4)) == pytest.approx(0.020)
    assert engine.split.times == HalvesTimes()


def test_the_dearest_picks_count_and_what_other_nodes_of_the_group_may_ask_for_first(model_dir: Path) -> None:
    # Eight experts; two ranks have four each.
    engine = TriedHalves({1: 0.020}, {4: 0.010, 8: 0.005})
    places = SplitPlaces(("a", "b"), microbatches=1, attention=3)
    assert longest(engine, model_dir, places) == pytest.approx(0.030 + 2 * 0.003)
    places = SplitPlaces(("a",), microbatches=1)
    assert longest(engine, model_dir, places) == pytest.approx(0.025)
    assert [len(experts) for experts in dearest_routings(model_dir, 3)] == [8, 3]


def test_a_model_without_experts_is_tried_once(tmp_path: Path) -> None:
    create_checkpoint(tmp_path, "llama", 7, layers=1)
    assert [tuple(experts) for experts in dearest_routings(tmp_path, 2)] == [()]
