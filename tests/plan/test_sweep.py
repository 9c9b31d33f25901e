"""What plans are predicted to do and which of them are kept: demand, estimates, the sweep, its shortlist and neighbours."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from math import inf
from typing import Any

import pytest

from orchestrator.core.config import DecodeMode, HardwareConfig, ModelConfig, Precision
from orchestrator.core.types import PoolKind
from orchestrator.plan.demand import KEEPS_S, Demand, Held, Prompt, demand_of
from orchestrator.plan.estimate import Estimate, Estimator, Reason, Sizer, Sizing, price_of
from orchestrator.plan.goal import Budget, Price, Slo
from orchestrator.plan.measure import Builder, measured
from orchestrator.plan.space import Choices, Plan, PoolPlan, aggregated_kinds, decode_kinds, prefill_kinds
from orchestrator.plan.steps import neighbours
from orchestrator.plan.sweep import MARGIN, SIZES_KEPT, Sweep, Swept, shortlist
from orchestrator.profiles.catalog import Catalog
from orchestrator.sim.names import generated_runs, successors
from orchestrator.sim.outcome import Distribution, Outcome
from orchestrator.traces import TracedTurn
from tests.builders import some
from tests.plan.plans import DEMAND, NODE, SMALL
from tests.sim.worlds import agents

BLOCK_TOKENS = 10
#: One chip, four of which share a network; nobody drafts tokens.
CHOICES = Choices(chips=("small",), halves=(), domains=(("small", 4),), weights=(Precision.FP8,), kv=(Precision.FP8,))
PREFILL, DECODE, AGGREGATED = PoolKind.PREFILL, PoolKind.DECODE, PoolKind.AGGREGATED


def turn(number: int, at_s: float, blocks: int = 10, first: int | None = None, **changes: Any) -> TracedTurn:
    """Return a first turn of so many blocks of ten tokens, by default its own, that is answered with one token."""
    fields: dict[str, Any] = {
        "id": number, "session": f"s{number}", "agent": "main", "arrival_s": at_s, "after": (), "gap_s": 0.0,
        "input_tokens": blocks * BLOCK_TOKENS, "output_tokens": 1, "block_tokens": BLOCK_TOKENS,
        "block_runs": ((1000 * number if first is None else first, blocks),),
    }  # fmt: skip
    return TracedTurn(**{**fields, **changes})


def held_for(demand: Demand, keep_s: float) -> Held:
    return next(held for held in demand.held if held.keep_s == keep_s)


# The objective and the budget.


def test_a_plan_is_as_far_from_the_objective_as_the_worse_of_its_times() -> None:
    slo = Slo(ttft_s=2.0, itl_s=0.1, percentile=0.9)
    assert slo.excess(2.0, 0.05) == 1.0
    assert slo.excess(0.5, 0.15) == pytest.approx(1.5)
    assert (slo.binding(1.0, 0.01), slo.binding(1.0, 0.09)) == ("TTFT", "ITL")


def test_a_budget_limits_what_it_names_and_nothing_else() -> None:
    price = Price(usd_per_hour=10.0, kw=3.0, gpus=4.0)
    assert Budget().allows(price)
    assert Budget(gpus=4.0).allows(price)
    assert not Budget(usd_per_hour=100.0, gpus=3.9).allows(price)
    assert not Budget(kw=2.9).allows(price)
    assert Budget(usd_per_hour=5.0, gpus=16.0).excess(price) == 2.0
    assert Budget().excess(price) == 0.0


# What a trace asks.


def test_a_steady_trace_asks_at_a_busy_moment_what_it_asks_in_the_mean() -> None:
    demand = demand_of([turn(number, float(number), output_tokens=7) for number in range(1200)])
    assert demand.requests_per_s == pytest.approx(1.0, rel=0.01)
    assert demand.output_tokens_per_s == pytest.approx(7.0, rel=0.01)
    assert (demand.requests, demand.duration_s, demand.arrival_scv) == (1200, 1199.0, 0.0)


def test_a_trace_with_bursts_asks_for_the_rate_of_its_bursts() -> None:
    # A request a second for 600 seconds, then four a second for 200: a quarter of the time is busy.
    times = [*range(600), *(600 + number / 4 for number in range(800))]
    demand = demand_of([turn(number, time_s, output_tokens=5) for number, time_s in enumerate(times)])
    assert demand.requests_per_s == pytest.approx(4.0, rel=0.05)
    assert demand.output_tokens_per_s == pytest.approx(20.0, rel=0.05)


def test_arrivals_are_as_variable_as_the_time_between_them() -> None:
    def variability(times: Sequence[float]) -> float:
        return demand_of([turn(number, time_s) for number, time_s in enumerate(times)]).arrival_scv

    # Pairs: between two requests is nothing or two seconds, one in the mean.
    assert variability([float(number // 2 * 2) for number in range(100)]) == pytest.approx(1.0, rel=0.05)
    chance = random.Random(1)
    assert variability(list(accumulate(chance.expovariate(1.0) for _ in range(2000)))) == pytest.approx(1.0, rel=0.1)
    # Nothing is known of one request, nor of requests at one moment.
    assert (variability([5.0]), variability([5.0, 5.0])) == (1.0, 1.0)


def test_long_answers_weigh_as_many_tokens_as_they_have() -> None:
    demand = demand_of([turn(1, 0.0, blocks=10, output_tokens=10), turn(2, 9.0, blocks=100, output_tokens=90)])
    # Ten tokens with 105 before them in the mean, ninety with 1,045.
    assert demand.context_tokens == pytest.approx(0.1 * 105 + 0.9 * 1045)
    assert demand.context_tokens_max == 1090


def test_what_is_held_is_what_arrives_while_it_is_kept() -> None:
    # A hundred fresh tokens a second, kept for 30 seconds; for ever, most of the trace's tokens at a busy moment.
    demand = demand_of([turn(number, float(number)) for number in range(1200)])
    assert held_for(demand, 0.0).tokens == 0.0
    assert held_for(demand, 30.0).tokens == pytest.approx(3000, rel=0.05)
    assert held_for(demand, inf).tokens == pytest.approx(0.9 * 120_000, rel=0.05)
    assert {held.hit_rate for held in demand.held} == {0.0}


def test_what_is_used_again_is_found_if_it_is_kept_so_long_and_held_once() -> None:
    # The same ten blocks every 20 seconds.
    demand = demand_of([turn(number, 20.0 * number, first=1) for number in range(500)])
    assert held_for(demand, 15.0).hit_rate == 0.0
    # All but the first time; the last token of a prompt is always computed.
    assert held_for(demand, 30.0).hit_rate == pytest.approx(499 / 500 * 99 / 100)
    assert held_for(demand, 30.0).tokens == held_for(demand, inf).tokens == 100.0
    assert {prompt.uncached_tokens for prompt in held_for(demand, 30.0).prompts[:-1]} == {1.0}


def test_an_answer_is_found_by_the_turn_that_goes_on_with_it() -> None:
    # 95 tokens are asked and 26 answered: of the twelve full blocks that the next turn begins with, three hold the answer.
    first = turn(1, 0.0, blocks=9, first=1, input_tokens=95, output_tokens=26, session="s")
    second = turn(2, 3.0, blocks=14, first=1, session="s")
    found = held_for(demand_of([first, second]), 5.0)
    assert found.hit_rate == pytest.approx(120 / (95 + 140))
    # The same prompt from somebody else finds only what was asked before.
    other = replace(second, session="t")
    assert held_for(demand_of([first, other]), 5.0).hit_rate == pytest.approx(90 / (95 + 140))


def test_without_blocks_nothing_is_found_or_held() -> None:
    demand = demand_of([replace(turn(number, float(number)), block_tokens=0, block_runs=()) for number in range(10)])
    assert {(held.tokens, held.hit_rate) for held in demand.held} == {(0.0, 0.0)}
    assert {prompt for held in demand.held for prompt in held.prompts} == {Prompt(100.0, 0.0)}


def hit_tokens(turns: Sequence[TracedTurn], keep_s: float) -> int:
    """Return the prompt tokens that a cache finds which forgets a block so many seconds after its last use; block by block."""
    after, latest, total = successors(turns), dict[int, float](), 0
    for one in turns:
        answer = [name for first, count in generated_runs(one, after.get(one.id)) for name in range(first, first + count)]
        found = [name for name in one.blocks if name in latest and one.arrival_s - latest[name] <= keep_s]
        total += min(len(found) * one.block_tokens, one.input_tokens - 1)
        latest |= dict.fromkeys([*one.blocks, *answer], one.arrival_s)
    return total


@pytest.mark.parametrize("seed", range(6))
def test_hits_are_those_of_a_plain_cache_and_keeping_longer_never_hurts(seed: int) -> None:
    turns = sorted(agents(count=4, turns=7, seed=seed, context_tokens=800), key=lambda one: one.arrival_s)
    # The agents' turns have no times of their own; a few seconds apart, some are found again and some are not.
    turns = [replace(one, arrival_s=3.0 * place) for place, one in enumerate(turns)]
    demand = demand_of(turns)
    inputs = sum(one.input_tokens for one in turns)
    assert [held.hit_rate * inputs for held in demand.held] == pytest.approx([hit_tokens(turns, keep) for keep in KEEPS_S])
    for shorter, longer in pairwise(demand.held):
        assert shorter.hit_rate <= longer.hit_rate
        assert shorter.tokens <= longer.tokens
    assert demand.held[0].hit_rate < demand.held[-1].hit_rate


def test_a_sample_of_prompts_stands_for_all_of_them() -> None:
    chance = random.Random(3)
    turns = [turn(number, float(number), blocks=chance.randrange(1, 100)) for number in range(500)]
    prompts = demand_of(turns).held[0].prompts
    assert sum(prompt.uncached_tokens for prompt in prompts) / len(prompts) == pytest.approx(
        sum(one.input_tokens for one in turns) / 500
    )
    assert [prompt.uncached_tokens for prompt in prompts] == sorted(prompt.uncached_tokens for prompt in prompts)
    assert max(prompt.uncached_tokens for prompt in prompts) > 950


def test_memory_keeps_blocks_for_as_long_as_it_has_room() -> None:
    held = tuple(Held(keep_s, tokens, 0.0, (Prompt(1.0, 0.0),)) for keep_s, tokens in ((0.0, 5.0), (60.0, 100.0), (inf, 900.0)))
    asked = replace(DEMAND, held=held)
    assert [asked.with_memory(tokens).keep_s for tokens in (0.0, 99.0, 100.0, 899.0, 1e9)] == [0.0, 0.0, 60.0, 60.0, inf]


# Predictions.


def sizer(pool: PoolPlan) -> Sizing | None:
    """Return a node of so many chips, as many times as fast and as large; it cannot draft tokens."""
    if pool.hardware.draft_tokens:
        return None
    chips = pool.hardware.chips
    profile = replace(NODE.profile, step_s=0.01 / chips, prefill_token_s=1e-4 / chips)
    return Sizing(profile, 100_000 * chips, 100.0, 2.0 * chips, 1.0 * chips, 1.0 * chips)


def pool(kind: PoolKind = AGGREGATED, nodes: int = 1, step: int = 2048, **hardware: Any) -> PoolPlan:
    return PoolPlan(kind, replace(SMALL, **hardware), step, nodes)


def whole(nodes: int = 1, step: int = 2048, **hardware: Any) -> Plan:
    return Plan((pool(AGGREGATED, nodes, step, **hardware),))


def pair(prefill: int = 1, decode: int = 1) -> Plan:
    return Plan((pool(PREFILL, prefill, 8192), pool(DECODE, decode, 512)))


def prediction(plan: Plan, asked: Demand = DEMAND, percentile: float = 0.9, size: Sizer = sizer) -> Estimate:
    found = Estimator(asked, size, percentile).estimate(plan)
    assert isinstance(found, Estimate), found
    return found


def objection(plan: Plan, asked: Demand = DEMAND, size: Sizer = sizer) -> Reason:
    found = Estimator(asked, size, 0.9).estimate(plan)
    assert isinstance(found, Reason), found
    return found


def test_a_plan_costs_all_its_nodes_and_cannot_be_priced_if_one_cannot_be_built() -> None:
    assert price_of(Plan((pool(PREFILL, 3), pool(DECODE, 2, chips=4))), sizer) == Price(22.0, 11.0, 11.0)
    assert price_of(Plan((pool(PREFILL, 3), pool(DECODE, draft_tokens=1))), sizer) is None


def test_what_cannot_be_built_or_hold_the_longest_context_is_not_cured_by_more_of_it() -> None:
    long = replace(DEMAND, context_tokens_max=100_001)
    for nodes in (1, 512):
        assert objection(whole(nodes, draft_tokens=3)) is Reason.BUILD
        assert objection(whole(nodes), long) is Reason.CONTEXT
    # Either half of a plan must hold it.
    for large in (0, 1):
        pools = [pool(PREFILL), pool(DECODE)]
        pools[large] = pool(pools[large].kind, chips=2)
        assert objection(Plan(tuple(pools)), long) is Reason.CONTEXT
    assert prediction(whole(chips=2), long).kv_tokens == 200_000


@pytest.mark.parametrize(
    ("changes", "reason", "enough"),
    [
        # 15,000 tokens a second in steps of 10 ms: 150 sequences at once, of which a node holds a hundred.
        ({"output_tokens_per_s": 15_000.0}, Reason.MEMORY, 2),
        # 300 at once, with contexts so short that memory holds them, but a node runs 256.
        ({"output_tokens_per_s": 30_000.0, "context_tokens": 100.0}, Reason.DECODE, 2),
        # 20 prompts a second of 100 ms each: two nodes would do nothing else.
        ({"requests_per_s": 20.0}, Reason.PREFILL, 3),
    ],
)
def test_what_is_too_much_for_one_node_is_named_and_cured_by_more_nodes(
    changes: dict[str, Any], reason: Reason, enough: int
) -> None:
    asked = replace(DEMAND, **changes)
    assert objection(pair(1, 1), asked) is reason
    assert prediction(pair(enough, enough), asked).plan == pair(enough, enough)


def test_prompts_that_leave_no_time_for_tokens_are_too_much_for_nodes_that_do_both() -> None:
    assert objection(whole(1), replace(DEMAND, requests_per_s=20.0)) is Reason.PREFILL
    assert prediction(whole(4), replace(DEMAND, requests_per_s=20.0)).prefill_utilisation < 0.95


def test_as_many_sequences_run_as_tokens_a_second_times_their_time() -> None:
    # Steps of 10 ms and 6,000 tokens a second: 60 sequences, 20 on each of three nodes.
    found = prediction(pair(1, 3), replace(DEMAND, output_tokens_per_s=6000.0))
    assert (found.sequences, found.itl_s) == (pytest.approx(20.0), pytest.approx(0.01))


def test_a_trace_without_answers_asks_for_no_sequences() -> None:
    silent = demand_of([turn(number, float(number), output_tokens=0) for number in range(20)])
    assert prediction(pair(), silent).sequences == 0.0
    assert prediction(whole(), silent).ttft_s > 0.0


def test_more_nodes_are_never_slower_and_a_higher_percentile_is_never_sooner() -> None:
    loaded = replace(DEMAND, requests_per_s=5.0, output_tokens_per_s=1000.0)
    growing = replace(NODE, profile=replace(NODE.profile, sequence_s=2e-4, context_token_s=2e-8))
    for form in (whole, lambda count: pair(count, count)):
        by_count = [prediction(form(count), loaded, size=lambda _: growing) for count in (1, 2, 4, 8)]
        assert all(more.itl_s <= fewer.itl_s and more.ttft_s <= fewer.ttft_s for fewer, more in some(pairwise(by_count)))
        assert by_count[-1].ttft_s < by_count[0].ttft_s
        by_share = [prediction(form(2), loaded, share, lambda _: growing) for share in (0.5, 0.9, 0.99)]
        assert all(low.itl_s <= high.itl_s and low.ttft_s <= high.ttft_s for low, high in some(pairwise(by_share)))
        # Now and then more sequences run together than in the mean.
        assert by_share[0].itl_s < by_share[-1].itl_s


def test_the_time_between_tokens_at_a_percentile_is_that_of_the_step_it_falls_in() -> None:
    # A second on one node: ten short prompts of 11 ms, ten long ones of 50 ms, and 39 steps of 10 ms without any.
    prompts = (*[Prompt(10.0, 0.0)] * 5, *[Prompt(400.0, 0.0)] * 5)
    asked = replace(DEMAND, requests_per_s=20.0, output_tokens_per_s=1.0, held=(Held(0.0, 0.0, 0.0, prompts),))
    # So two in three steps have no prompt, and five in six no long one.
    shares = (0.6, 0.75, 0.8, 0.9)
    assert [prediction(whole(), asked, share).itl_s for share in shares] == pytest.approx([0.010, 0.011, 0.011, 0.050])


def test_prompts_are_computed_beside_sequences_only_where_nodes_do_both() -> None:
    busy = replace(DEMAND, output_tokens_per_s=1000.0)
    assert prediction(pair(), busy).itl_s == pytest.approx(0.01)
    # A prompt of 900 tokens in one step of 100 ms, or in four that are shorter.
    steps = [prediction(whole(1, step), busy, 0.99).itl_s for step in (2048, 256)]
    assert steps == pytest.approx([0.1, 0.01 + 225 * 1e-4])


def test_sequences_delay_the_prompts_beside_them() -> None:
    growing = replace(NODE, profile=replace(NODE.profile, sequence_s=2e-4))
    quiet, busy = (
        prediction(whole(), replace(DEMAND, output_tokens_per_s=rate), size=lambda _: growing) for rate in (1.0, 1500.0)
    )
    # Every sequence takes its part of the step that a prompt is computed in: more than it adds to the wait for the first step.
    assert busy.ttft_s - busy.itl_s >= quiet.ttft_s - quiet.itl_s + busy.sequences * 2e-4


def test_memory_that_holds_more_saves_prompts() -> None:
    held = (Held(0.0, 0.0, 0.0, (Prompt(900.0, 0.0),)), Held(60.0, 150_000.0, 0.8, (Prompt(100.0, 800.0),)))
    asked = replace(DEMAND, held=held)
    # One node has room for 100,000 tokens, two hold all that was used in the last minute.
    one, two = prediction(pair(1, 1), asked), prediction(pair(1, 2), asked)
    assert (one.hit_rate, two.hit_rate) == (0.0, 0.8)
    assert two.ttft_s < one.ttft_s / 3


def queued(nodes: int, load: float, service_s: float, percentile: float) -> float:
    """Return by when so many of 40,000 independent arrivals at a first-come queue are done."""
    chance = random.Random(7)
    free, now, late = [0.0] * nodes, 0.0, list[float]()
    for _ in range(40_000):
        now += chance.expovariate(load * nodes / service_s)
        first = min(range(nodes), key=lambda node: free[node])
        free[first] = max(free[first], now) + service_s
        late.append(free[first] - now)
    return sorted(late)[int(percentile * len(late))]


@pytest.mark.parametrize(("nodes", "load"), [(1, 0.5), (1, 0.8), (4, 0.8), (8, 0.5), (16, 0.9)])
def test_first_tokens_wait_as_they_do_in_a_queue(nodes: int, load: float) -> None:
    # A prompt of 900 tokens takes 100 ms; fetching costs nothing here.
    size = replace(NODE, kv_token_bytes=0.0)
    asked = replace(DEMAND, requests_per_s=load * nodes / 0.1)
    plan = pair(nodes, 1)
    found = prediction(plan, asked, size=lambda _: size)
    assert found.prefill_utilisation == pytest.approx(load)
    assert found.ttft_s - found.itl_s == pytest.approx(queued(nodes, load, 0.1, 0.9), rel=0.15)


def test_blocks_take_their_time_to_come_and_go_where_others_generate() -> None:
    held = (Held(0.0, 0.0, 0.5, (Prompt(900.0, 1000.0),)),)
    idle = replace(DEMAND, requests_per_s=1e-6, held=held)
    slow = replace(NODE, profile=replace(NODE.profile, fetch_bytes_per_s=1e6, fetch_latency_s=0.001))
    # 100 ms of computing and a step; on the way are 1,000 tokens of 100 bytes, then 900.
    apart = prediction(pair(), idle, size=lambda _: slow).ttft_s
    assert apart == pytest.approx(0.1 + 0.01 + 0.101 + 0.091, rel=0.01)
    assert prediction(whole(), idle, size=lambda _: slow).ttft_s < 0.2


# The sweep.

SLO = Slo(ttft_s=1.0, itl_s=0.02, percentile=0.9)


def swept(slo: Slo = SLO, budget: Budget = Budget(), asked: Demand = DEMAND, size: Sizer = sizer) -> Swept:  # noqa: B008
    return Sweep(asked, size, slo, budget, CHOICES).run()


def kinds_that(drafts: bool) -> list[int]:
    """Return how many aggregated, decode and prefill kinds there are that draft tokens, or do not."""
    return [
        sum(bool(kind.hardware.draft_tokens) is drafts for kind in kinds(CHOICES))
        for kinds in (aggregated_kinds, decode_kinds, prefill_kinds)
    ]


def test_kinds_that_cannot_be_built_or_hold_the_longest_context_fall_out_once_with_all_their_sizes() -> None:
    drafting, plain = sum(kinds_that(True)), sum(kinds_that(False))
    assert swept(size=lambda _: None) == Swept([], Counter({Reason.BUILD: drafting + plain}))
    # Four chips hold 400,000 tokens.
    found = swept(asked=replace(DEMAND, context_tokens_max=400_001))
    assert found == Swept([], Counter({Reason.BUILD: drafting, Reason.CONTEXT: plain}))
    assert found.considered == drafting + plain


def test_a_kind_that_is_too_slow_for_one_alone_falls_out_whole() -> None:
    # Four chips take 2.5 ms a token and no number of nodes takes less; prefill pools are not judged by that.
    found = swept(replace(SLO, itl_s=0.002))
    aggregated, decode, _ = kinds_that(False)
    assert found.kept == []
    assert found.pruned[Reason.ITL] == aggregated + decode
    assert Reason.TTFT not in found.pruned


def test_everything_kept_is_within_the_budget_and_nearly_within_the_limits() -> None:
    asked = replace(DEMAND, requests_per_s=30.0, output_tokens_per_s=20_000.0)
    budget = Budget(gpus=9.0)
    found = swept(Slo(0.3, 0.012, 0.9), budget, asked)
    assert found.kept
    for estimate in found.kept:
        assert budget.allows(estimate.price)
        assert estimate.price == price_of(estimate.plan, sizer)
        assert estimate.ttft_s <= MARGIN * 0.3
        assert estimate.itl_s <= MARGIN * 0.012
    assert {Reason.BUDGET, Reason.PREFILL, Reason.MEMORY, Reason.ITL} <= set(found.pruned)
    assert found.considered == len(found.kept) + sum(found.pruned.values())


def test_the_smallest_sizes_that_are_good_enough_are_kept_of_a_kind() -> None:
    # 30 prompts a second are 2.7 nodes of work: three of them do it, and then come four and five.
    asked = replace(DEMAND, requests_per_s=30.0)
    found = swept(asked=asked)
    kind = pool(AGGREGATED, step=8192)
    sizes = [one.plan.decode.nodes for one in found.kept if one.plan.decode.sized(1) == kind]
    first = next(count for count in range(1, 100) if good_enough(Plan((kind.sized(count),)), asked))
    assert first > 1
    assert sizes == [first, first + 1, first + 2][:SIZES_KEPT]


def good_enough(plan: Plan, asked: Demand) -> bool:
    found = Estimator(asked, sizer, SLO.percentile).estimate(plan)
    return isinstance(found, Estimate) and SLO.excess(found.ttft_s, found.itl_s) <= MARGIN


def test_a_budget_ends_the_growth_of_a_kind() -> None:
    assert {one.plan.decode.nodes * one.plan.decode.hardware.chips for one in swept(budget=Budget(gpus=1.0)).kept} == {1}
    found = swept(budget=Budget(gpus=0.5))
    # Each kind that could be built is too dear at its smallest size already; prefill pools found no partner to be priced with.
    aggregated, decode, _ = kinds_that(False)
    assert found == Swept([], Counter({Reason.BUILD: sum(kinds_that(True)), Reason.BUDGET: aggregated + decode}))


def test_halves_are_paired_only_with_halves_of_their_chip_and_precisions() -> None:
    choices = Choices(
        chips=("small", "large"),
        halves=(),
        domains=(("small", 1), ("large", 1)),
        weights=(Precision.NVFP4, Precision.FP8),
        kv=(Precision.FP8, Precision.BF16),
    )
    found = Sweep(DEMAND, sizer, SLO, Budget(), choices).run()
    pairs = [one.plan for one in found.kept if len(one.plan.pools) == 2]
    made = [[(half.hardware.chip, half.hardware.weights, half.hardware.kv) for half in plan.pools] for plan in pairs]
    assert all(prefill == decode for prefill, decode in some(made))
    assert len({tuple(halves) for halves in made}) == 2 * 2 * 2


def test_no_decode_pool_is_paired_that_another_beats_in_price_speed_and_memory() -> None:
    # Two small nodes and one of two chips cost and hold the same, but the larger one is twice as fast.
    decodes = {one.plan.decode for one in swept().kept if len(one.plan.pools) == 2}
    assert pool(DECODE, 1, 512, chips=2) in decodes
    assert pool(DECODE, 2, 512) not in decodes
    # Three small ones are slower than that, but hold more, and cost less than what holds as much.
    assert pool(DECODE, 3, 512) in decodes
    assert swept().pruned[Reason.DOMINATED] > 0


# What is simulated of it.


def estimate(plan: Plan, usd_per_hour: float, itl_s: float = 0.01, ttft_s: float = 0.1) -> Estimate:
    return Estimate(plan, Price(usd_per_hour, 1.0, 1.0), ttft_s, itl_s, 0.0, 1000, 0.5, 1.0)


def test_the_cheapest_of_each_family_is_simulated_then_what_nothing_dominates() -> None:
    small = [estimate(whole(count), 2.0 * count, itl_s=0.02 / count) for count in (1, 2, 3)]
    slower = estimate(whole(4), 7.0, itl_s=0.02)
    large = estimate(whole(1, chip="large"), 9.0, itl_s=0.02)
    split = estimate(pair(), 8.0, itl_s=0.019)
    found = [slower, large, *reversed(small), split]
    # Families: small chips together, small chips apart, large chips. The front: faster for more money.
    assert shortlist(found, SLO, 5) == [small[0], split, large, small[1], small[2]]
    # Half of the places are for families, the cheapest first.
    assert shortlist(found, SLO, 3) == [small[0], split, small[1]]
    assert shortlist(found, SLO, 100) == [small[0], split, large, small[1], small[2], slower]
    assert shortlist([], SLO, 5) == []


def test_plans_that_miss_by_prediction_come_last_but_for_families_that_have_no_other() -> None:
    misses, meets = estimate(whole(1), 2.0, itl_s=0.021), estimate(whole(2), 4.0)
    only = estimate(whole(1, chip="large"), 1.0, itl_s=0.023)
    assert shortlist([misses, meets, only], SLO, 3) == [meets, only, misses]
    # At the limit is within it.
    exact = estimate(whole(3), 1.0, itl_s=SLO.itl_s)
    assert shortlist([meets, exact], SLO, 1) == [exact]


def test_a_little_sooner_is_no_reason_to_simulate_a_dearer_plan() -> None:
    cheap = estimate(whole(1), 2.0, ttft_s=0.1)
    barely, clearly = estimate(whole(2), 4.0, ttft_s=0.095), estimate(whole(3), 6.0, ttft_s=0.05)
    assert shortlist([cheap, barely, clearly], SLO, 2) == [cheap, clearly]


# Neighbours.


def described(plans: Sequence[Plan]) -> list[str]:
    return [str(plan) for plan in plans]


def test_neighbours_differ_by_one_step_in_one_dimension() -> None:
    choices = replace(CHOICES, weights=(Precision.NVFP4, Precision.FP8), kv=(Precision.FP8, Precision.BF16))
    kept = ", fp8 weights, fp8 KV"
    assert described(neighbours(whole(8, chips=2, draft_tokens=1), choices)) == [
        # Fewer and more nodes: up the ladder of sizes, which goes on by two here.
        f"aggregated 7 x 2 small{kept}, 1 drafted, steps of 2048",
        f"aggregated 10 x 2 small{kept}, 1 drafted, steps of 2048",
        f"aggregated 8 x 2 small{kept}, 1 drafted, steps of 1024",
        f"aggregated 8 x 2 small{kept}, 1 drafted, steps of 4096",
        # As many chips in nodes of one, of four; in groups of two, so that four chips share a network.
        f"aggregated 16 x 1 small{kept}, 1 drafted, steps of 2048",
        f"aggregated 4 x 4 small{kept}, 1 drafted, steps of 2048",
        f"aggregated 8 x 2 small, groups of 2{kept}, 1 drafted, steps of 2048",
        f"aggregated 8 x 2 small{kept}, steps of 2048",
        f"aggregated 8 x 2 small{kept}, 2 drafted, steps of 2048",
        # Precisions are those of the whole cluster.
        "aggregated 8 x 2 small, fp8 weights, bf16 KV, 1 drafted, steps of 2048",
        "aggregated 8 x 2 small, nvfp4 weights, fp8 KV, 1 drafted, steps of 2048",
    ]


def test_neighbours_keep_the_precision_of_handed_over_blocks_and_of_weights_alike_in_both_pools() -> None:
    choices = replace(CHOICES, weights=(Precision.NVFP4, Precision.FP8), kv=(Precision.FP8, Precision.NVFP4))
    found = neighbours(pair(2, 2), choices)
    assert len(set(found)) == len(found)
    assert pair(2, 2) not in found
    for plan in found:
        assert len({half.hardware.kv for half in plan.pools}) == 1
        assert len({half.hardware.weights for half in plan.pools}) == 1
        assert [half.kind for half in plan.pools] == [PREFILL, DECODE]
        # A pool that computes prompts has nothing to draft.
        assert not plan.prefill.hardware.draft_tokens


def test_no_neighbour_is_spread_over_more_chips_than_share_a_network() -> None:
    for plan in (whole(4, chips=4), whole(4, chips=1, group_nodes=4), whole(6, chips=2, group_nodes=2)):
        for neighbour in neighbours(plan, CHOICES):
            made = neighbour.decode.hardware
            assert made.chips * made.group_nodes <= 4
            assert neighbour.decode.nodes % made.group_nodes == 0
    # Six chips in threes of two do not fit into nodes of four: two of those are the next larger number.
    assert "aggregated 2 x 4 small, fp8 weights, fp8 KV, steps of 2048" in described(neighbours(whole(3, chips=2), CHOICES))


def test_the_smallest_plan_has_only_larger_neighbours() -> None:
    found = neighbours(whole(1, step=512), replace(CHOICES, domains=(("small", 1),)))
    assert described(found) == [
        "aggregated 2 x 1 small, fp8 weights, fp8 KV, steps of 512",
        "aggregated 1 x 1 small, fp8 weights, fp8 KV, steps of 1024",
        "aggregated 1 x 1 small, fp8 weights, fp8 KV, 1 drafted, steps of 512",
    ]


# Real chips.

CATALOG = Catalog.load()


def real(*chips: str, halves: tuple[str, ...] = ()) -> Choices:
    return Choices(chips, halves, tuple((name, CATALOG.chip(name).domain_chips) for name in (*chips, *halves)))


def test_chips_that_only_serve_as_a_half_hold_no_pool_and_stand_beside_their_partner() -> None:
    choices = real("gb200", "vr200", halves=("lp30",))
    kinds = [*prefill_kinds(choices), *aggregated_kinds(choices), *decode_kinds(choices)]
    assert {kind.hardware.chip for kind in kinds} == {"gb200", "vr200"}
    assert {kind.hardware.chip for kind in kinds if kind.hardware.ffn_chip == "lp30"} == {"vr200"}
    modes = {kind.hardware.mode for kind in kinds if kind.hardware.ffn_chip == "lp30"}
    assert modes == {DecodeMode.AFD, DecodeMode.WHOLE, DecodeMode.DRAFTER}
    assert {kind.hardware.mode for kind in kinds if kind.kind is not DECODE} == {DecodeMode.PLAIN}
    assert all(kind.hardware.chips * kind.hardware.group_nodes <= 72 for kind in some(kinds))
    assert len(set(kinds)) == len(kinds)


def test_a_plan_costs_as_much_by_prediction_as_when_it_was_simulated() -> None:
    builder = Builder(CATALOG, ModelConfig(shape="kimi-k2"), block_tokens=64)
    made = HardwareConfig("vr200", group_nodes=8, weights=Precision.NVFP4, activations=Precision.NVFP4)
    racks = replace(made, mode=DecodeMode.AFD, ffn_chip="lp30", ffn_chips=2304)
    plan = Plan((PoolPlan(PREFILL, made, 8192, 24), PoolPlan(DECODE, racks, 512, 16)))
    reached = measured(plan, builder.resolved(plan), Outcome([], {}, Distribution()), SLO)
    assert price_of(plan, builder.size) == reached.price
    assert reached.price.gpus == 40.0


def test_what_does_not_fit_or_cannot_be_computed_has_no_size() -> None:
    builder = Builder(CATALOG, ModelConfig(shape="kimi-k2"), block_tokens=64)
    # A trillion parameters do not fit one chip, and Hopper has no 4-bit numbers.
    assert builder.size(PoolPlan(AGGREGATED, HardwareConfig("vr200"), 2048)) is None
    four_bits = HardwareConfig("h200", 8, 4, weights=Precision.NVFP4, activations=Precision.NVFP4)
    assert builder.size(PoolPlan(AGGREGATED, four_bits, 2048)) is None
    eight_bits = replace(four_bits, weights=Precision.FP8, activations=Precision.FP8)
    size = builder.size(PoolPlan(PREFILL, eight_bits, 8192, 64))
    assert size is not None
    # It is that of one node, whatever the pool's size.
    assert size.gpus == 8.0
    assert size == builder.size(PoolPlan(PREFILL, eight_bits, 8192, 4))


@pytest.mark.slow
def test_a_sweep_of_real_chips_keeps_only_what_can_be_simulated() -> None:
    builder = Builder(CATALOG, ModelConfig(shape="kimi-k2"), block_tokens=64)
    asked = replace(DEMAND, context_tokens=60_000.0, context_tokens_max=200_000)
    found = Sweep(asked, builder.size, Slo(5.0, 0.05, 0.9), Budget(), real("gb300", "vr200", halves=("lp30",))).run()
    families = {estimate.plan.family: estimate for estimate in found.kept}
    assert {mode for _, mode, _ in families} == {mode.value for mode in DecodeMode}
    for estimate in families.values():
        resolved = builder.resolved(estimate.plan)
        assert all(one.engine.blocks * 64 >= 200_000 for one in some(resolved.config.pools))
