"""How much may be drafted: never more than there is room for, none where it does not pay, and tried again seldom."""

from itertools import pairwise
from random import Random

import pytest

from orchestrator.core.config import SchedulerConfig
from orchestrator.core.events import SliceResult
from orchestrator.core.kvpool import BlockPool
from orchestrator.core.node.drafting import RETRY_AFTER_MAX, RETRY_TOKENS
from orchestrator.core.node.scheduler import Scheduler, StepPlan
from orchestrator.core.node.sequences import Sequence
from orchestrator.core.node.speculation import PLAIN_EVERY, accepted_drafts
from orchestrator.core.types import CostProfile, RequestId
from tests.builders import assignment, node_spec, some

#: A row costs a tenth of what a token of one sequence takes without drafts.
CHEAP = CostProfile(step_s=0.008, sequence_s=0.001, prefill_token_s=0.001, batch_tokens=(1, 101), batch_s=(0.0, 0.0))


class Bench:
    """A scheduler of a node that drafts, and how its steps go."""

    def __init__(self, chance: float = 0.5, row_s: float = 0.001, **spec) -> None:
        fields = {"blocks": 512, "context_tokens_max": 4000, "draft_tokens_max": 4, "profile": CHEAP, **spec}
        self.spec = node_spec(**fields)
        self.pool = BlockPool(self.spec.blocks)
        self.scheduler = Scheduler(self.spec, SchedulerConfig(), self.pool)
        self.chance, self.row_s = chance, row_s
        self.random = Random(3)
        self.sequences: list[Sequence] = []
        #: Tokens drafted in each step.
        self.drafted: list[int] = []

    def start(self, count: int = 1, output_tokens_max: int = 3000, prompt: int = 3) -> None:
        """Let sequences come, and compute their prompts."""
        for _ in range(count):
            made = assignment(len(self.sequences) + 1, "", tail=prompt, output_tokens_max=output_tokens_max)
            self.sequences.append(self.scheduler.enqueue(made))
        while self.scheduler.waiting:
            self.scheduler.admit()
            self.step()

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan_step()
        assert plan is not None
        self.scheduler.validate()
        return plan

    def step(self) -> list[int]:
        """Run a step in which each draft is right with the bench's chance; returns the drafts of each slice."""
        plan = self.plan()
        results: list[SliceResult] = []
        for part in plan.slices:
            accepted = accepted_drafts(self.chance, part.draft_max, self.random.random())
            results.append(SliceResult(part.request, part.sample + accepted, drafted_tokens=part.draft_max))
        drafts = [part.draft_max for part in plan.slices]
        self.drafted.append(sum(drafts))
        seconds = plan.predicted_s + self.row_s * sum(drafts)
        for sequence, _, _ in self.scheduler.finish_step(tuple(results), seconds).ended:
            self.scheduler.remove(sequence)
        return drafts

    def run(self, steps: int) -> float:
        """Run so many steps; returns the tokens drafted a step in the later half of them."""
        for _ in range(steps):
            self.step()
        return sum(self.drafted[-steps // 2 :]) / (steps // 2)


def test_the_first_step_is_taken_without_drafts_to_compare_others_with() -> None:
    bench = Bench()
    bench.start()
    assert bench.step() == [0]
    assert bench.step() == [4]  # cheap rows: all that are allowed


def test_a_node_that_does_not_speculate_drafts_nothing() -> None:
    bench = Bench(draft_tokens_max=0)
    bench.start()
    assert bench.run(20) == 0
    assert bench.scheduler.drafted_tokens == 0


def test_blocks_for_drafts_are_taken_with_the_step() -> None:
    bench = Bench(chance=0.0)
    bench.start(prompt=6)
    bench.step()
    plan = bench.plan()  # 7 tokens are present; a next one and 4 drafts go into blocks of 4
    [part] = plan.slices
    assert (part.start, part.count, part.draft_max, part.first_block, len(part.blocks)) == (7, 1, 4, 2, 1)
    bench.scheduler.finish_step((SliceResult(RequestId(1), 1, drafted_tokens=4),), 0.01)
    assert (bench.sequences[0].computed, bench.sequences[0].capacity) == (8, 12)


def test_drafts_take_no_blocks_that_others_may_need_for_their_tokens() -> None:
    bench = Bench(chance=0.0, blocks=5)
    bench.start(count=2, prompt=5, output_tokens_max=8)
    bench.step()
    assert bench.pool.available_blocks == 1
    # Six tokens are in two blocks of four each: there is room for the next one, and for one more.
    assert [part.draft_max for part in bench.plan().slices] == [1, 1]
    assert bench.pool.available_blocks == 1


def test_nothing_is_drafted_beyond_the_last_token_of_an_output() -> None:
    bench = Bench(chance=0.999)
    bench.start(output_tokens_max=5)
    bench.step()  # two tokens are there
    [part] = bench.plan().slices
    assert part.draft_max == 2
    outcome = bench.scheduler.finish_step((SliceResult(part.request, 3, drafted_tokens=2),), 0.01)
    assert [(sequence.output_tokens, reason) for sequence, reason, _ in outcome.ended] == [(5, "length")]


def test_drafts_and_prompts_share_the_tokens_of_a_step() -> None:
    bench = Bench(chance=0.999, step_tokens_max=16, sequences_max=4)
    bench.start(count=3)
    bench.run(2)
    bench.sequences.append(bench.scheduler.enqueue(assignment(9, "", tail=3, output_tokens_max=4)))
    bench.scheduler.admit()
    plan = bench.plan()
    # 16 tokens: 3 decode; of the other 13 drafts have half at most, the prompt what is left.
    assert sum(part.draft_max for part in plan.slices) == 6
    assert plan.slices[-1].count == 3


@pytest.mark.parametrize(("chance", "price", "most"), [(0.9, 0.1, 4), (0.7, 0.3, 3), (0.5, 0.1, 3)])
def test_as_many_are_drafted_as_are_likely_to_bring_more_than_they_cost(chance: float, price: float, most: int) -> None:
    bench = Bench(chance, row_s=0.009 * price)
    bench.start()
    mean = bench.run(400)
    assert most - 0.6 < mean <= most + 0.6


def test_what_is_never_right_is_tried_less_and_less_often() -> None:
    bench = Bench(chance=0.0, blocks=1024)
    bench.start()
    bench.run(2500)
    tried = [step for step, drafted in enumerate(bench.drafted) if drafted]
    assert len(tried) < 20
    assert all(bench.drafted[step] <= RETRY_TOKENS for step in some(tried[4:]))
    gaps = [after - before for before, after in pairwise(tried)]
    assert RETRY_AFTER_MAX <= max(gaps) <= RETRY_AFTER_MAX + 2


def test_a_text_that_begins_to_repeat_is_noticed() -> None:
    bench = Bench(chance=0.0)
    bench.start()
    bench.run(200)
    bench.chance = 1.0 - 1e-9
    assert bench.run(200) > 3


def test_where_rows_cost_as_much_as_tokens_nothing_is_drafted_and_less_load_brings_it_back() -> None:
    bench = Bench(chance=0.7, row_s=0.001 * 18 / 8)  # eight sequences: a token takes 2 ms, a row 2.25
    bench.start(count=8)
    assert bench.run(600) < 1
    for sequence in bench.sequences[1:]:
        bench.scheduler.remove(sequence)
    assert bench.run(100) > 1  # alone a token takes 9 ms


def test_steps_that_take_ten_times_as_long_for_their_drafts_are_given_up_soon() -> None:
    bench = Bench(chance=0.95, row_s=0.005)  # eight sequences: a token takes 2 ms, and all drafts together ten times a step
    bench.start(count=8)
    bench.run(60)
    assert 8 <= sum(bench.drafted[:20]) < 64  # two steps' worth of what is allowed at most
    assert sum(bench.drafted[-30:]) < 30


def test_a_step_without_drafts_is_taken_now_and_then() -> None:
    bench = Bench(chance=0.99)
    bench.start()
    bench.run(3 * PLAIN_EVERY + 5)
    assert 3 <= bench.drafted.count(0) <= 6


def test_steps_without_drafts_are_run_as_one_until_something_is_tried_again() -> None:
    bench = Bench(chance=0.0, blocks=4096, context_tokens_max=16000)
    bench.start()
    bench.run(200)
    while (plan := bench.plan()).slices[0].draft_max:
        bench.scheduler.finish_step((SliceResult(RequestId(1), 1, drafted_tokens=plan.slices[0].draft_max),), 0.01)
    steps = plan.steps_max
    assert steps > 20
    bench.scheduler.finish_step((SliceResult(RequestId(1), steps),), 0.009 * steps, steps)
    assert bench.plan().slices[0].draft_max > 0


def test_drafts_are_predicted_like_parts_of_prompts() -> None:
    bench = Bench(chance=0.0)
    bench.start()
    bench.step()
    for _ in range(60):
        plan = bench.plan()
        drafts = plan.slices[0].draft_max
        # One decoding sequence takes 9 ms, a token of a prompt 1 ms.
        bench.scheduler.finish_step((SliceResult(RequestId(1), 1, drafted_tokens=drafts),), 0.009 + 0.001 * drafts)
    assert bench.scheduler.cost_scale == pytest.approx(1.0)


def test_drafts_are_accepted_as_often_as_the_chance_says() -> None:
    random = Random(5)
    found = [accepted_drafts(0.6, 3, random.random()) for _ in range(20_000)]
    for count, share in enumerate((0.4, 0.24, 0.144, 0.216)):
        assert abs(found.count(count) / len(found) - share) < 0.015
    assert accepted_drafts(0.6, 0, 0.0) == 0
