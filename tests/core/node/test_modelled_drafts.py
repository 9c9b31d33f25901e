"""Drafts of a model: where nothing is found, with a price and a chance of their own, and no reading that does not pay."""

from random import Random

import pytest

from orchestrator.core.events import SliceResult
from orchestrator.core.node.draft_model import PURSE_TOKENS, READING_SHARE
from orchestrator.core.node.speculation import READ_FOR_TOKENS, accepted_drafts
from orchestrator.core.types import RequestId
from tests.core.node.test_speculation import CHEAP, Bench


class ModelBench(Bench):
    """A node with a draft model: each pass of it takes `pass_s`, and it reads a sequence in `pieces` steps of `piece_s`."""

    def __init__(self, chance: float = 0.9, pass_s: float = 0.001, pieces: int = 0, piece_s: float = 0.002, **more) -> None:
        super().__init__(chance, **{"draft_model": True, "blocks": 8192, "sequences_max": 64, **more})
        self.pass_s, self.pieces, self.piece_s = pass_s, pieces, piece_s
        #: How often something is found, and how often that is right.
        self.finds, self.found_chance = 0.0, 0.0
        #: Pieces read of each sequence.
        self.read: dict[RequestId, int] = {}
        self.reading_s = self.seconds = 0.0
        self.tokens = 0
        #: Tokens that the model drafted in each step.
        self.modelled: list[int] = []

    def step(self) -> list[int]:
        plan = self.plan()
        found = {part.request for part in plan.slices if part.draft_max and self.random.random() < self.finds}
        asks = [part for part in plan.slices if part.model_draft_max and part.request not in found]
        drafts = {part.request: part.model_draft_max for part in asks if self.read.get(part.request, 0) >= self.pieces}
        drafting_s = self.pass_s * max(drafts.values(), default=0)
        results: list[SliceResult] = []
        for part in plan.slices:
            drafted, chance, taken_s = 0, 0.0, None
            if part.request in found:
                drafted, chance = part.draft_max, self.found_chance
            elif part.request in drafts:
                drafted, chance = part.model_draft_max, self.chance
                taken_s = drafting_s * drafted / sum(drafts.values())
            elif part in asks:
                taken_s = self.piece_s
                self.read[part.request] = self.read.get(part.request, 0) + 1
                self.reading_s += taken_s
            accepted = accepted_drafts(chance, drafted, self.random.random())
            results.append(SliceResult(part.request, part.sample + accepted, drafted_tokens=drafted, drafting_s=taken_s))
        self.drafted.append(sum(result.drafted_tokens for result in results))
        self.modelled.append(sum(drafts.values()))
        work_s = plan.predicted_s + self.row_s * self.drafted[-1]
        seconds = work_s + sum(result.drafting_s or 0.0 for result in results)
        if not plan.prefilling:
            self.seconds += seconds
            self.tokens += sum(result.output_tokens for result in results)
        for sequence, _, _ in self.scheduler.finish_step(tuple(results), seconds).ended:
            self.scheduler.remove(sequence)
        return [part.model_draft_max for part in plan.slices]


def test_a_model_drafts_where_nothing_is_found() -> None:
    bench = ModelBench()
    bench.start()
    assert bench.step() == [0]  # the step to compare others with
    assert bench.run(200) > 3
    assert sum(bench.modelled) == sum(bench.drafted)


def test_what_is_looked_up_has_a_chance_of_its_own() -> None:
    bench = ModelBench(chance=0.95)
    bench.start(count=2)
    bench.finds = 1.0
    bench.run(300)
    later = sum(bench.modelled[-100:])
    # What is found is never right, and is asked for no more; the model's drafts are, and go on.
    assert later > 0.9 * sum(bench.drafted[-100:]) > 100


def test_a_pass_is_not_taken_for_the_few_for_which_nothing_is_found() -> None:
    # Of eight sequences a pass takes a third of a step: for all of them that pays, and for one of them it does not.
    mostly, never = (ModelBench(chance=0.8, pass_s=0.005, row_s=0.0001) for _ in range(2))
    mostly.finds, mostly.found_chance = 0.9, 0.8
    for bench in (mostly, never):
        bench.start(count=8)
        bench.run(300)
    assert sum(never.modelled[-100:]) > 8 * 100
    assert sum(mostly.modelled[-100:]) < 100


def test_what_is_found_keeps_its_precedence_while_it_is_right() -> None:
    bench = ModelBench(chance=0.95)
    bench.finds, bench.found_chance = 1.0, 0.95
    bench.start(count=2)
    assert bench.run(200) > 6
    assert sum(bench.modelled) == 0


@pytest.mark.parametrize(("pass_s", "least", "most"), [(0.0005, 3.5, 4.0), (0.003, 2.4, 3.6), (0.02, 0.0, 0.3)])
def test_how_many_are_drafted_goes_with_what_a_pass_of_the_model_costs(pass_s: float, least: float, most: float) -> None:
    bench = ModelBench(chance=0.8, pass_s=pass_s)
    bench.start()
    assert least <= bench.run(600) <= most


def test_a_pass_is_the_cheaper_for_each_the_more_it_drafts_for() -> None:
    alone, together = (ModelBench(chance=0.7, pass_s=0.008, row_s=0.0001) for _ in range(2))
    alone.start()
    together.start(count=8)
    # Alone a step takes 9 ms without drafts, and of eight 16: a pass is nearly as dear as the one, and half as dear as the other.
    assert alone.run(500) < 0.5
    assert together.run(500) / 8 > 0.5


def test_a_model_that_is_never_right_costs_hardly_anything() -> None:
    bench = ModelBench(chance=0.0, pieces=4)
    bench.start(count=4)
    bench.run(2000)
    plain_s = CHEAP.step_s + 4 * CHEAP.sequence_s
    lost = bench.seconds / plain_s * 4 - bench.tokens
    assert lost < 0.02 * bench.tokens + PURSE_TOKENS


def test_for_a_model_that_was_never_right_hardly_anything_is_read() -> None:
    bench = ModelBench(chance=0.0, pieces=8, piece_s=0.004)
    for _ in range(80):
        bench.start(count=4, output_tokens_max=100)
        while bench.scheduler.running:
            bench.step()
    assert 5 <= len(bench.read) < 32  # of 320
    assert set(bench.read.values()) == {8}  # whoever begins is read to the end, and drafted for
    assert bench.reading_s < 1.2 * READING_SHARE * bench.seconds
    bench.chance = 1.0 - 1e-9
    bench.start(count=4, output_tokens_max=3000)
    bench.run(900)
    assert sum(bench.modelled[-100:]) > 1200  # it was noticed that now they are right


def test_reading_is_paid_for_out_of_a_purse() -> None:
    # What is read brings nothing: no sequence lives long enough to be read.
    bench = ModelBench(pieces=1000, piece_s=0.008)
    for _ in range(60):
        bench.start(count=4, output_tokens_max=40)
        while bench.scheduler.running:
            bench.step()
    plain_s = CHEAP.step_s + 4 * CHEAP.sequence_s
    spent = bench.reading_s / plain_s * 4
    assert PURSE_TOKENS < spent < 1.1 * (PURSE_TOKENS + READING_SHARE * bench.tokens)


def test_what_drafts_bring_pays_for_reading() -> None:
    bench = ModelBench(chance=0.95, pieces=4, piece_s=0.008)
    for _ in range(60):
        bench.start(count=4, output_tokens_max=200)
        while bench.scheduler.running:
            bench.step()
    assert set(bench.read.values()) == {4}
    assert bench.tokens > 1.5 * 4 * bench.seconds / (CHEAP.step_s + 4 * CHEAP.sequence_s)


def test_nothing_is_read_for_the_last_tokens() -> None:
    bench = ModelBench(pieces=1)
    bench.start(output_tokens_max=READ_FOR_TOKENS)
    while bench.scheduler.running:
        bench.step()
    assert bench.reading_s == 0
    bench.start(output_tokens_max=READ_FOR_TOKENS + 2)
    while bench.scheduler.running:
        bench.step()
    assert bench.reading_s > 0


def test_what_a_model_takes_is_no_error_of_the_profile() -> None:
    bench = ModelBench(pieces=10)
    bench.row_s = 0.0
    bench.start(count=2)
    scales: list[float] = []
    for _ in range(50):
        bench.step()
        scales.append(bench.scheduler.cost_scale)
    assert max(scales) == pytest.approx(1.0)
    assert bench.scheduler.step_s > CHEAP.step_s + 2 * CHEAP.sequence_s


def test_drafts_of_both_kinds_find_room_or_are_fewer() -> None:
    source = Random(2)
    bench = ModelBench(chance=0.9, pieces=2, blocks=40, draft_tokens_max=7)
    bench.finds, bench.found_chance = 0.5, 0.6
    for _ in range(30):
        bench.start(count=source.randint(1, 4), output_tokens_max=source.randint(2, 60))
        for _ in range(source.randint(1, 40)):
            if bench.scheduler.running:
                bench.step()
    assert bench.scheduler.preemptions > 0
    assert 0 < bench.scheduler.accepted_tokens < bench.scheduler.drafted_tokens
