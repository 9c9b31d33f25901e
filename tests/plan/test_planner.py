"""The search for a plan: what is simulated, what is picked of it, and what is said when nothing reaches all that is asked."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.core.config import ClusterConfig, Precision
from orchestrator.core.types import CostProfile, PoolKind, PoolName
from orchestrator.plan.demand import Held, Prompt
from orchestrator.plan.estimate import Reason, Sizing, price_of
from orchestrator.plan.goal import Budget, Price, Slo
from orchestrator.plan.measure import Measured, measured
from orchestrator.plan.planner import Answer, Effort, Planner, Question, front_of
from orchestrator.plan.space import Choices, Plan, PoolPlan
from orchestrator.profiles.resolve import PoolHardware, Resolved
from orchestrator.sim.outcome import Distribution, Outcome, Served
from orchestrator.traces import TracedTurn
from tests.plan import plans
from tests.plan.plans import SMALL

#: One chip of a kind that shares its network with no other: a plan is a number of nodes and the tokens of their steps.
CHOICES = Choices(chips=("small",), halves=(), domains=(("small", 1),), weights=(Precision.FP8,), kv=(Precision.FP8,))
NODE = replace(plans.NODE, profile=CostProfile(step_s=0.01, prefill_token_s=1e-5, sequence_s=5e-4))
#: A second brings 1,000 tokens and two prompts of 1,000 tokens, nothing of which is ever found in a cache: one node is enough.
DEMAND = replace(plans.DEMAND, output_tokens_per_s=1000.0, held=(Held(0.0, 0.0, 0.0, (Prompt(1000.0, 0.0),)),))
SLO = Slo(ttft_s=1.0, itl_s=0.03, percentile=0.9)


def sizer(pool: PoolPlan) -> Sizing | None:
    """Return the one kind of node there is; it cannot draft tokens."""
    return None if pool.hardware.draft_tokens else NODE


def aggregated(nodes: int = 1, step: int = 2048) -> Plan:
    return Plan((PoolPlan(PoolKind.AGGREGATED, SMALL, step, nodes),))


def nodes_of(plan: Plan) -> int:
    return sum(pool.nodes for pool in plan.pools)


def result(plan: Plan, **changes: Any) -> Measured:
    """Return what a plan reached that keeps every limit by far."""
    price = price_of(plan, sizer)
    assert price is not None
    fields: dict[str, Any] = {
        "plan": plan, "price": price, "ttft_s": 0.1, "itl_s": 0.01, "goodput": 1.0, "failed": 0, "hit_rate": 0.0,
        "output_tokens_per_usd": 1.0, "tokens_per_s_per_gpu": 1.0, "assumptions": (),
    }  # fmt: skip
    return Measured(**{**fields, **changes})


class World:
    """Stands for the simulator: a plan reaches what a function of it says, and every plan that is simulated is noted."""

    def __init__(self, reached: Callable[[Plan], dict[str, Any]]) -> None:
        self._reached = reached
        self.simulated: list[Plan] = []

    def measure(self, plans: Sequence[Plan]) -> list[Measured]:
        self.simulated.extend(plans)
        return [result(plan, **self._reached(plan)) for plan in plans]


def search(world: World, slo: Slo = SLO, budget: Budget = Budget(), effort: Effort = Effort()) -> Answer:  # noqa: B008
    return Planner(Question(slo, budget, CHOICES), DEMAND, sizer, world.measure, effort).search()


def needing(nodes: int) -> World:
    """Return a world in which so many nodes keep the limit between tokens and one less does not."""
    return World(lambda plan: {"itl_s": 0.03 * nodes / nodes_of(plan)})


def test_the_pick_is_the_cheapest_that_reaches_all_beside_the_next_price_and_what_falls_short() -> None:
    answer = search(needing(2))
    assert answer.pick is not None
    assert answer.runner_up is not None
    assert answer.near_miss is not None
    assert (nodes_of(answer.pick.plan), answer.pick.price) == (2, Price(4.0, 2.0, 2.0))
    # Other plans of two nodes reach as much for the same money: the runner-up is the next dearer one.
    assert nodes_of(answer.runner_up.plan) == 3
    assert nodes_of(answer.near_miss.plan) == 1
    # What is told in place of a pick is not looked for.
    assert (answer.closest, answer.affordable_at) == (None, None)


def test_without_a_dearer_or_a_cheaper_plan_nothing_stands_beside_the_pick() -> None:
    answer = search(needing(1), budget=Budget(gpus=1.0))
    assert answer.pick is not None
    assert (answer.runner_up, answer.near_miss) == (None, None)


@pytest.mark.parametrize("budget", [Budget(usd_per_hour=4.0), Budget(kw=2.0), Budget(gpus=2.0)])
def test_what_costs_exactly_the_budget_is_within_it_and_dearer_plans_are_not_even_simulated(budget: Budget) -> None:
    world = needing(2)
    answer = search(world, budget=budget)
    assert answer.pick is not None
    assert {nodes_of(plan) for plan in world.simulated} == {1, 2}
    assert answer.swept.pruned[Reason.BUDGET] > 0


def test_a_step_that_no_sweep_tried_is_found_beside_the_best_plan() -> None:
    # The sweep tries steps of 512, 2048 and 8192 tokens.
    world = World(lambda plan: {"itl_s": 0.01 if plan.decode.step_tokens_max == 1024 else 0.02})
    answer = search(world)
    assert answer.pick is not None
    assert answer.pick.plan == aggregated(1, 1024)
    assert answer.pick.plan not in [estimate.plan for estimate in answer.swept.kept]


def test_improving_goes_on_for_as_long_as_a_neighbour_is_better() -> None:
    # The sweep keeps the three smallest sizes, by a prediction that is far too good: six nodes are three steps away from those.
    world = World(lambda plan: {"itl_s": 0.03 * 6 / plan.decode.nodes})
    one_round, all_rounds = (search(world, effort=Effort(rounds=rounds)) for rounds in (1, 4))
    assert one_round.pick is None
    assert all_rounds.pick is not None
    assert all_rounds.pick.plan.decode.nodes == 6


def test_the_fastest_neighbours_are_tried_first_while_the_best_plan_falls_short() -> None:
    # Steps of 1024 and of 4096 tokens cost no more, but are as slow: what little may be simulated goes to the larger pool.
    world = World(lambda plan: {"itl_s": 0.03 * 4 / plan.decode.nodes})
    answer = search(world, effort=Effort(shortlist=6, rounds=1, neighbours=2))
    assert answer.pick is not None
    assert answer.pick.plan.decode.nodes == 4


def test_no_more_is_simulated_than_the_effort_allows_and_nothing_twice() -> None:
    world = World(lambda plan: {"itl_s": 0.02 / nodes_of(plan) / plan.decode.step_tokens_max})
    search(world, effort=Effort(shortlist=3, rounds=2, neighbours=2))
    assert 3 < len(world.simulated) <= 3 + 2 * 2
    assert len(set(world.simulated)) == len(world.simulated)


def test_improving_ends_where_no_neighbour_is_better() -> None:
    # Steps between those of the sweep are no good, and the first of them to be tried shows it.
    world = World(lambda plan: {"itl_s": 0.02 if plan.decode.step_tokens_max in (512, 2048, 8192) else 0.025})
    search(world, effort=Effort(shortlist=3, rounds=9, neighbours=1))
    assert len(world.simulated) == 3 + 1


def test_no_neighbour_over_the_budget_is_simulated() -> None:
    # Larger pools would help too, but there is no money for them.
    world = World(lambda plan: {"itl_s": 0.02 if plan.decode.step_tokens_max == 1024 else 0.05 / nodes_of(plan)})
    answer = search(world, budget=Budget(gpus=1.0))
    assert answer.pick is not None
    assert {nodes_of(plan) for plan in world.simulated} == {1}


def test_a_plan_that_loses_requests_is_never_picked_however_fast_it_is() -> None:
    answer = search(World(lambda plan: {"failed": int(nodes_of(plan) < 2), "itl_s": 0.001}))
    assert answer.pick is not None
    assert answer.runner_up is not None
    assert nodes_of(answer.pick.plan) == 2
    assert answer.runner_up.failed == 0


def test_of_cheaper_plans_that_fall_short_alike_the_cheapest_is_told() -> None:
    # Ten times the tokens take 8 nodes or more by prediction; of those, fewer than 12 lose requests.
    busy = replace(DEMAND, output_tokens_per_s=10_000.0)
    world = World(lambda plan: {"failed": int(nodes_of(plan) < 12)})
    answer = Planner(Question(SLO, Budget(), CHOICES), busy, sizer, world.measure, Effort()).search()
    assert answer.near_miss is not None
    assert nodes_of(answer.near_miss.plan) == min(map(nodes_of, world.simulated)) == 8


def test_without_a_plan_within_the_budget_the_nearest_one_and_the_least_budget_are_told() -> None:
    answer = search(needing(3), budget=Budget(gpus=2.0))
    assert answer.pick is None
    assert answer.closest is not None
    assert answer.affordable_at is not None
    assert nodes_of(answer.closest.plan) == 2
    # Many plans within the budget are as promising by prediction, but have been found to fall short.
    assert nodes_of(answer.affordable_at.plan) == 3


def test_the_least_budget_counts_the_limit_that_is_exceeded_most() -> None:
    # Of all plans that reach it, the one with the fewest nodes is nearest to both limits.
    answer = search(needing(2), budget=Budget(usd_per_hour=1.0, kw=0.9))
    assert answer.affordable_at is not None
    assert answer.affordable_at.price == Price(4.0, 2.0, 2.0)


def test_a_budget_that_nothing_fits_has_no_nearest_plan_but_a_least_budget() -> None:
    answer = search(needing(1), budget=Budget(gpus=0.5))
    assert (answer.pick, answer.closest) == (None, None)
    assert answer.affordable_at is not None
    assert nodes_of(answer.affordable_at.plan) == 1


def test_no_budget_helps_where_no_number_of_nodes_is_fast_enough() -> None:
    slow = World(lambda plan: {"itl_s": 0.05})
    assert search(slow, budget=Budget(gpus=2.0)).affordable_at is None
    # Without a budget there is none to raise.
    assert search(slow).affordable_at is None


def test_limits_are_loosened_until_there_is_a_plan_to_tell_of() -> None:
    # A node alone takes 10 ms a token: no plan can be expected to keep a tenth of that.
    answer = search(needing(1), slo=replace(SLO, itl_s=0.001))
    assert answer.swept.kept == []
    assert answer.pick is None
    assert answer.closest is not None
    assert answer.closest.itl_s == min(one.itl_s for one in answer.measured)


def test_a_model_that_fits_nowhere_has_no_answer_at_all() -> None:
    world = needing(1)
    question = Question(SLO, Budget(gpus=4.0), CHOICES)
    answer = Planner(question, DEMAND, lambda pool: None, world.measure, Effort()).search()
    assert (answer.pick, answer.closest, answer.affordable_at, answer.front) == (None, None, None, ())
    assert world.simulated == []
    assert set(answer.swept.pruned) == {Reason.BUILD}


def test_the_same_question_has_the_same_answer() -> None:
    first, second = needing(2), needing(2)
    assert search(first) == search(second)
    assert first.simulated == second.simulated


@pytest.mark.parametrize("seed", range(20))
def test_an_answer_is_true_of_what_was_simulated_whatever_plans_reach(seed: int) -> None:
    chance = random.Random(seed)
    world = World(lambda plan: {"itl_s": chance.uniform(0.01, 0.06), "failed": int(chance.random() < 0.1)})
    budget = Budget(gpus=chance.choice((2.0, 4.0, 1000.0)))
    answer = search(world, budget=budget)
    assert [one.plan for one in answer.measured] == world.simulated
    affordable = [one for one in answer.measured if budget.allows(one.price)]
    reaching = [one for one in affordable if not one.failed and one.itl_s <= SLO.itl_s]
    if answer.pick is None:
        assert reaching == []
        assert answer.closest in affordable
        if answer.affordable_at is not None:
            assert not budget.allows(answer.affordable_at.price)
            assert answer.affordable_at.itl_s <= SLO.itl_s
            assert answer.affordable_at.failed == 0
        return
    assert answer.pick in reaching
    assert answer.pick.price.usd_per_hour == min(one.price.usd_per_hour for one in reaching)
    dearer = [one.price.usd_per_hour for one in reaching if one.price != answer.pick.price]
    assert (answer.runner_up.price.usd_per_hour if answer.runner_up else None) == min(dearer, default=None)
    if answer.near_miss is not None:
        assert answer.near_miss not in reaching
        assert answer.near_miss.price.usd_per_hour < answer.pick.price.usd_per_hour


def test_the_front_is_what_nothing_beats_in_price_times_and_goodput_together() -> None:
    cheap, fast = result(aggregated(1), itl_s=0.03), result(aggregated(3), itl_s=0.01)
    # Dearer than one and slower than the other, but more of its requests are on time.
    steady = result(aggregated(4), itl_s=0.02, goodput=1.5)
    beaten = result(aggregated(2), itl_s=0.03)
    # As good in everything: neither beats the other.
    twin = result(aggregated(1, 4096), itl_s=0.03)
    assert front_of([fast, beaten, steady, twin, cheap]) == (cheap, twin, fast, steady)
    assert front_of([]) == ()


TURN = TracedTurn(1, "s", "main", 0.0, (), 0.0, input_tokens=100, output_tokens=11, block_tokens=16, block_runs=((1, 6),))
HARDWARE = {
    PoolName("a"): PoolHardware({"c": 2.0}, 2.0, usd_per_hour=3.0, kw=0.5, block_bytes=1, assumptions=("z", "b")),
    PoolName("b"): PoolHardware({"c": 1.0}, 1.0, usd_per_hour=1.0, kw=0.25, block_bytes=1, assumptions=("b",)),
}
RESOLVED = Resolved(
    ClusterConfig.from_mapping({"pools": [{"name": "a", "kind": "prefill"}, {"name": "b", "kind": "decode", "nodes": 4}]}),
    HARDWARE,
)


def test_a_beat_that_too_few_tokens_come_on_is_not_reached() -> None:
    # Of ninety in a hundred tokens that must be within the limits, fewer than those come on the beat with fewer than five nodes.
    world = World(lambda plan: {"beat_share": min(0.88 + 0.005 * nodes_of(plan), 1.0)})
    answer = search(world)
    assert answer.pick is not None
    assert answer.pick.beat_share is not None
    assert answer.pick.beat_share >= SLO.percentile
    assert any(one.beat_share is not None and one.beat_share < SLO.percentile for one in answer.measured)


def served(ttft_s: float, itl_s: float = 0.01, **changes: Any) -> Served:
    """Return a request with a first token and ten more."""
    ended_s = ttft_s + 10 * itl_s
    return replace(Served(TURN, 0.0, ttft_s, ended_s, cached_tokens=25, output_tokens=11), **changes)


def summed_up(*requests: Served, percentile: float = 0.9) -> Measured:
    outcome = Outcome(list(requests), {}, Distribution(), duration_s=1800.0)
    return measured(aggregated(), RESOLVED, outcome, Slo(1.0, 0.02, percentile))


def test_a_plan_costs_what_all_nodes_of_all_pools_cost() -> None:
    found = summed_up(served(0.5), served(0.5))
    # One node of the first pool, four of the second.
    assert found.price == Price(usd_per_hour=7.0, kw=1.5, gpus=6.0)
    # 22 tokens in half an hour.
    assert found.output_tokens_per_usd == pytest.approx(22 / 3.5)
    assert found.tokens_per_s_per_gpu == pytest.approx(22 / 1800 / 6)
    assert found.assumptions == ("b", "z")
    assert found.hit_rate == 0.25


def test_goodput_counts_requests_that_end_well_and_keep_both_limits() -> None:
    found = summed_up(
        served(0.5), served(1.0, 0.02), served(1.1), served(0.5, 0.021),
        # Lost: it counts among all requests, and its times do not.
        served(9.0, failure="503"), served(9.0, ended_s=None),
        # A single token has no time to a next one.
        served(0.5, output_tokens=1),
    )  # fmt: skip
    assert found.goodput == pytest.approx(3 / 7)
    assert found.failed == 2
    assert found.ttft_s == 1.1


@pytest.mark.parametrize(("percentile", "ttft_s"), [(0.5, 5.0), (0.9, 9.0), (0.91, 10.0), (0.99, 10.0), (0.05, 1.0)])
def test_a_percentile_is_the_least_time_that_so_many_requests_keep(percentile: float, ttft_s: float) -> None:
    # Nine of ten requests have their first token within nine seconds, so nine seconds are kept by 90 % of them.
    assert summed_up(*(served(float(second)) for second in range(10, 0, -1)), percentile=percentile).ttft_s == ttft_s


def test_a_run_in_which_nothing_ended_well_reached_nothing() -> None:
    found = summed_up(served(0.5, failure="503"))
    assert (found.failed, found.goodput, found.output_tokens_per_usd) == (1, 0.0, 0.0)
