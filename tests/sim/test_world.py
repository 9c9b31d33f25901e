"""The simulated world: its closed form is what single steps add up to, it is deterministic, it recovers, its checks can fail."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from orchestrator.core.commands import ReportEnded
from orchestrator.core.config import CachePolicy, HardwareConfig, ModelConfig, RouterPolicy, SpeculationConfig, SpeculationMethod
from orchestrator.core.types import GatewayId, NodeId, PoolKind, PoolName
from orchestrator.profiles.resolve import Resolved
from orchestrator.sim.agenda import Timers
from orchestrator.sim.checks import Stuck
from orchestrator.sim.faults import Faults
from orchestrator.sim.outcome import Outcome
from orchestrator.sim.runs import figures
from orchestrator.sim.simulated import SimulatedNode
from orchestrator.sim.world import World, WorldOptions
from orchestrator.traces import TracedTurn
from tests.builders import some
from tests.sim.worlds import AFFINE, CURVED, OVERLAPPING, SPECULATING, agents, cluster

TOGETHER = {PoolKind.AGGREGATED: 3}
APART = {PoolKind.PREFILL: 2, PoolKind.DECODE: 2}
PROFILES = {"affine": AFFINE, "curved": CURVED, "overlapping": OVERLAPPING, "speculating": SPECULATING}


def times(outcome: Outcome) -> dict[int, tuple[float, float]]:
    """Return first token and end of every turn."""
    return {served.turn.id: (served.first_token_s or 0.0, served.ended_s or 0.0) for served in outcome.served}


def assert_equal_times(layout: dict[PoolKind, int], profile: str, blocks: int, seed: int, count: int = 8, turns: int = 4) -> None:
    resolved = cluster(layout, PROFILES[profile], blocks, gateways=1 + seed % 2, cache=CachePolicy.LRU)
    trace = agents(count, turns, seed)
    closed = World(resolved, trace, WorldOptions()).run()
    single = World(resolved, trace, WorldOptions(stepwise=True)).run()
    assert all(served.completed for served in some(closed.served))
    assert closed.events < single.events
    for turn, (first, end) in times(single).items():
        assert times(closed)[turn] == (pytest.approx(first, rel=1e-9), pytest.approx(end, rel=1e-9)), f"turn {turn}"
    assert [served.cached_tokens for served in closed.served] == [served.cached_tokens for served in single.served]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("layout", [TOGETHER, APART], ids=["together", "apart"])
def test_many_steps_at_once_end_when_single_steps_do(layout: dict[PoolKind, int], profile: str) -> None:
    assert_equal_times(layout, profile, blocks=512, seed=1, count=5, turns=3)


def test_many_steps_at_once_end_when_single_steps_do_where_memory_is_short() -> None:
    resolved = cluster({PoolKind.AGGREGATED: 1}, blocks=120, cache=CachePolicy.LRU)
    trace = agents(24, 2, seed=3, context_tokens=500)
    worlds = [World(resolved, trace, WorldOptions(stepwise=stepwise)) for stepwise in (False, True)]
    closed, single = (world.run() for world in worlds)
    preemptions = [sum(use.preemptions for use in outcome.pools.values()) for outcome in (closed, single)]
    assert preemptions[0] == preemptions[1] > 0
    assert times(closed) == {turn: pytest.approx(pair, rel=1e-9) for turn, pair in times(single).items()}


@pytest.mark.parametrize("seed", [0, 35, 177, 214, 244])
def test_many_steps_at_once_end_when_single_steps_do_where_hardly_anything_fits(seed: int) -> None:
    # A sequence that gives way in the planning of a step finds room again after that step, not after all that could follow.
    resolved = cluster({PoolKind.AGGREGATED: 1}, blocks=(90, 120)[seed % 2], cache=CachePolicy.LRU)
    trace = agents(20, 3, seed, context_tokens=500)
    closed, single = (World(resolved, trace, WorldOptions(stepwise=stepwise)).run() for stepwise in (False, True))
    assert sum(use.preemptions for use in single.pools.values()) > 0
    assert times(closed) == {turn: pytest.approx(pair, rel=1e-9) for turn, pair in times(single).items()}


def drafting(acceptance: float, load: int = 1) -> Outcome:
    """Run agents on a node that drafts up to four tokens of which so many are right, several of them at once or one at a time."""
    speculation = SpeculationConfig(SpeculationMethod.PROMPT_LOOKUP, 4, acceptance)
    resolved = cluster({PoolKind.AGGREGATED: 1}, AFFINE, blocks=2048, speculation=speculation)
    return World(resolved, agents(load, 12, seed=4, context_tokens=300), WorldOptions(checks=True)).run()


def test_drafts_that_are_right_make_answers_sooner_and_those_that_are_not_hardly_later() -> None:
    resolved = cluster({PoolKind.AGGREGATED: 1}, AFFINE, blocks=2048)
    plain = World(resolved, agents(1, 12, seed=4, context_tokens=300)).run()
    good, bad = drafting(0.8), drafting(0.0)
    use = good.pools[PoolName("aggregated")]
    assert use.output_tokens == plain.pools[PoolName("aggregated")].output_tokens > 200
    assert 0.4 < use.accepted_tokens / use.drafted_tokens < 0.9  # of four those after a wrong one are not right
    assert good.pools[PoolName("aggregated")].busy_s < 0.6 * plain.pools[PoolName("aggregated")].busy_s
    assert bad.pools[PoolName("aggregated")].busy_s < 1.03 * plain.pools[PoolName("aggregated")].busy_s


@pytest.mark.parametrize(("draft_step_s", "least", "most"), [(0.0001, 0.0, 0.5), (0.02, 0.99, 1.03)])
def test_a_draft_model_saves_steps_where_its_own_time_leaves_something(draft_step_s: float, least: float, most: float) -> None:
    speculation = SpeculationConfig(SpeculationMethod.DRAFT_MODEL, 4, 0.8)
    profile = replace(AFFINE, draft_step_s=draft_step_s)
    plain = World(cluster({PoolKind.AGGREGATED: 1}, AFFINE, blocks=2048), agents(4, 12, seed=4, context_tokens=300)).run()
    resolved = cluster({PoolKind.AGGREGATED: 1}, profile, blocks=2048, speculation=speculation)
    drafted = World(resolved, agents(4, 12, seed=4, context_tokens=300), WorldOptions(checks=True)).run()
    before, after = (outcome.pools[PoolName("aggregated")] for outcome in (plain, drafted))
    assert after.output_tokens == before.output_tokens
    assert after.drafted_tokens > after.accepted_tokens > 0
    assert least < after.busy_s / before.busy_s < most


def test_a_run_with_drafts_can_be_had_again() -> None:
    first, second = drafting(0.6, load=6), drafting(0.6, load=6)
    assert times(first) == times(second)
    assert first.pools[PoolName("aggregated")].drafted_tokens == second.pools[PoolName("aggregated")].drafted_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_many_steps_at_once_end_when_single_steps_do_for_longer(seed: int) -> None:
    layout = (TOGETHER, APART, {PoolKind.AGGREGATED: 1})[seed % 3]
    assert_equal_times(layout, tuple(PROFILES)[seed % 4], blocks=(512, 900)[seed % 2], seed=seed)


def test_a_turn_starts_its_pause_after_the_end_of_the_one_before() -> None:
    trace = agents(1, 3, seed=2)
    served = World(cluster(TOGETHER), trace, WorldOptions(request_s=0.01, reply_s=0.02)).run().served
    for before, after in pairwise(served):
        assert before.ended_s is not None
        assert after.arrived_s == pytest.approx(before.ended_s + after.turn.gap_s)
        assert after.cached_tokens > 0 or after.turn.seam


def test_what_an_answer_fills_is_found_by_the_next_turn_unless_answers_do_not_return() -> None:
    trace = agents(6, 6, seed=4, seams=0.0)
    cached = [
        sum(served.cached_tokens for served in World(cluster(TOGETHER), trace, WorldOptions(answers_return=returns)).run().served)
        for returns in (True, False)
    ]
    assert cached[0] > cached[1]


@pytest.mark.parametrize("policy", list(RouterPolicy))
def test_every_policy_serves_everything(policy: RouterPolicy) -> None:
    outcome = World(cluster(APART, policy=policy), agents(4, 3, seed=5), WorldOptions(checks=True)).run()
    assert all(served.completed for served in some(outcome.served))


def test_knowing_the_future_keeps_more_than_the_past_tells() -> None:
    trace = agents(14, 6, seed=6, context_tokens=1200)
    resolved = cluster({PoolKind.AGGREGATED: 1}, blocks=2000)

    def cached(options: WorldOptions, cache: CachePolicy) -> int:
        pools = tuple(replace(pool, scheduler=replace(pool.scheduler, cache=cache)) for pool in resolved.config.pools)
        world = World(replace(resolved, config=replace(resolved.config, pools=pools)), trace, options)
        return sum(served.cached_tokens for served in world.run().served)

    value, lru = cached(WorldOptions(), CachePolicy.VALUE), cached(WorldOptions(), CachePolicy.LRU)
    came = [served.turn.id for served in World(resolved, trace, WorldOptions()).run().served]
    optimal = cached(WorldOptions(optimal_cache=True, order=came, checks=True), CachePolicy.LRU)
    assert optimal > max(value, lru, cached(WorldOptions(frequency_cache=True, checks=True), CachePolicy.LRU))
    assert value >= lru


def test_what_models_wait_for_tells_contexts_that_come_back_from_those_that_do_not() -> None:
    turns: list[TracedTurn] = []
    for number in range(60):
        calls = 3 * number, f"calls {number}", 2.0 * number
        for id, session, at, after, calling in (
            (calls[0], calls[1], calls[2], (), True),
            (calls[0] + 1, f"is done {number}", calls[2] + 1.0, (), False),
            (calls[0] + 2, calls[1], 0.0, (calls[0],), False),
        ):
            turns.append(TracedTurn(id, session, "main", at, after, 10.0 if after else 0.0, 640, 1, 64, (), calls=calling))
    named = [replace(turn, block_runs=((1000 * (turn.id - (2 if turn.after else 0)) + 1, 10),)) for turn in turns]
    resolved = cluster({PoolKind.AGGREGATED: 1}, blocks=8 * 640 // 16)

    def cached(trace: list[TracedTurn]) -> int:
        return sum(served.cached_tokens for served in World(resolved, trace, WorldOptions(checks=True)).run().served)

    assert cached(named) > 2 * cached([replace(turn, calls=None) for turn in named])


# --- faults -----------------------------------------------------------------------------------------------------------


def faulty(seed: int, layout: dict[PoolKind, int], count: int, turns: int) -> Outcome:
    faults = Faults(
        until_s=12.0, crashes=3, restart_s=4.0, late_share=0.05, lost_kv_share=0.1, broken_fetch_share=0.2, abandoned_share=0.05,
        slow_nodes=1,
    )  # fmt: skip
    trace = agents(count, turns, seed)
    return World(cluster(layout, gateways=2), trace, WorldOptions(seed=seed, checks=True, faults=faults)).run()


@pytest.mark.parametrize("layout", [TOGETHER, APART], ids=["together", "apart"])
def test_with_everything_going_wrong_every_turn_ends_and_nothing_is_left(layout: dict[PoolKind, int]) -> None:
    outcome = faulty(7, layout, count=4, turns=3)
    assert all(served.ended_s is not None for served in some(outcome.served))
    assert any(served.completed for served in outcome.served)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_with_everything_going_wrong_for_longer(seed: int) -> None:
    outcome = faulty(seed, (TOGETHER, APART)[seed % 2], count=8, turns=4)
    assert all(served.ended_s is not None for served in some(outcome.served))


def crashing(layout: dict[PoolKind, int], seed: int, stepwise: bool = False, resumes_max: int = 8) -> Outcome:
    resolved = cluster(layout)
    limits = replace(resolved.config.limits, resumes_max=resumes_max)
    resolved = replace(resolved, config=replace(resolved.config, limits=limits))
    faults = Faults(until_s=8.0, crashes=4, hangs=1, restart_s=1.0)
    options = WorldOptions(seed=seed, checks=not stepwise, faults=faults, stepwise=stepwise)
    return World(resolved, agents(6, 2, seed), options).run()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [TOGETHER, APART], ids=["together", "apart"])
def test_what_crashed_nodes_had_begun_goes_on_elsewhere_to_its_end(layout: dict[PoolKind, int]) -> None:
    outcomes = [crashing(layout, seed=3, stepwise=stepwise) for stepwise in (False, True)]
    for outcome in outcomes:
        assert [served.failure for served in outcome.served if not served.completed] == []
        assert all(served.output_tokens == served.turn.output_tokens for served in some(outcome.served))
        assert sum(served.resumes for served in outcome.served) > 0
        figured = figures(outcome, {})
        assert figured["resumed"] == sum(served.resumes for served in outcome.served)
        assert figured["replayed_tokens"] > figured["resumed"] > 0
    # tokens that a node made before it crashed are not made again, however many steps were taken at once
    assert times(outcomes[0]).keys() == times(outcomes[1]).keys()
    for turn, ends in times(outcomes[1]).items():
        assert times(outcomes[0])[turn] == pytest.approx(ends, rel=1e-9), f"turn {turn}"
    replayed = [[served.replayed_tokens for served in outcome.served] for outcome in outcomes]
    assert replayed[0] == replayed[1]


def test_where_nothing_is_to_go_on_it_ends_with_one_error() -> None:
    outcome = crashing(TOGETHER, seed=3, resumes_max=0)
    failures = {served.failure for served in outcome.served if not served.completed}
    assert all(failure is not None and failure.startswith("502 node_lost") for failure in some(failures))


#: Seconds that the work itself and the queue before it take at most, in the worlds below.
WORK_S = 12.0


def assert_nothing_outlives_its_faults(seed: int, layout: dict[PoolKind, int]) -> None:
    """Every turn ends as soon after the faults as nodes are found lost, started again and catch up."""
    random = Random(seed)
    faults = Faults(
        until_s=10.0, crashes=random.randint(0, 5), hangs=random.randint(1, 3), restart_s=random.choice((0.5, 2.0, 8.0)),
        slow_nodes=random.randint(0, 2),
        late_share=random.choice((0.0, 0.1)), slowness=6.0, gateway_hangs=random.choice((0, 0, 1, 2)),
    )  # fmt: skip
    resolved = cluster(layout, gateways=random.randint(1, 2), blocks=random.choice((300, 512)))
    outcome = World(resolved, agents(5, 3, seed), WorldOptions(seed=seed, checks=True, faults=faults)).run()
    settings = resolved.config.cluster
    own_s = max(settings.node_lost_s, settings.hung_s) + faults.restart_s + faults.late_s_max + WORK_S
    for served in some(outcome.served):
        assert served.ended_s is not None
        late_s = served.ended_s - max(served.arrived_s, faults.until_s)
        assert late_s < own_s, f"turn {served.turn.id} ended {late_s:.1f} s after the faults: {served.failure}"


def test_a_group_is_lost_as_a_whole() -> None:
    made = cluster({PoolKind.AGGREGATED: 4})
    grouped = replace(made.config.pools[0], hardware=HardwareConfig(chip="any", group_nodes=2))
    faults = Faults(until_s=5.0, crashes=1, restart_s=1.0)
    world = World(
        Resolved(replace(made.config, pools=(grouped,)), {}), agents(4, 2, seed=1), WorldOptions(checks=True, faults=faults)
    )
    world.run()
    starts = [world.nodes[grouped.node_id(number)].spec.incarnation for number in range(4)]
    assert sorted((starts[:2], starts[2:])) == [[1, 1], [2, 2]]


@pytest.mark.parametrize("seed", range(3))
def test_nothing_outlives_the_faults(seed: int) -> None:
    assert_nothing_outlives_its_faults(seed, APART)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 203))
def test_nothing_outlives_the_faults_over_many_seeds(seed: int) -> None:
    assert_nothing_outlives_its_faults(seed, (APART, TOGETHER)[seed % 4 == 0])


def test_nodes_end_what_they_compute_for_a_gateway_that_hangs() -> None:
    # One answer takes a minute; its gateway stands still meanwhile, and is killed and back long before that.
    turn = TracedTurn(0, "s0", "main", 1.0, (), 0.0, 64, 12_000, 16, ((0, 4),))
    resolved = cluster({PoolKind.AGGREGATED: 1}, blocks=2000)
    world = World(resolved, [turn], WorldOptions(checks=True, faults=Faults(until_s=0.0)))
    hung_at, lost_s = 2.0, resolved.config.cluster.node_lost_s
    busy: list[bool] = []
    [simulated] = world.nodes.values()
    world.agenda.at(hung_at, world._hang_gateway, GatewayId(0), Faults(until_s=0.0, restart_s=30.0))
    for after_s in (lost_s - 0.1, lost_s * 4 / 3 + 0.1):
        world.agenda.at(hung_at + after_s, lambda: busy.append(simulated.node.load().running > 0))
    served = world.run().served[0]
    assert busy == [True, False]
    assert served.failure == "its gateway was lost"
    assert served.ended_s == hung_at + resolved.config.cluster.hung_s


def test_clients_of_a_gateway_that_was_killed_go_to_another_and_come_back() -> None:
    trace = agents(6, 4, seed=4)
    world = World(cluster(TOGETHER, gateways=2), trace, WorldOptions(checks=True, faults=Faults(until_s=0.0)))
    world.agenda.at(3.0, world._hang_gateway, GatewayId(0), Faults(until_s=0.0, restart_s=5.0))
    outcome = world.run()
    failed = [served for served in outcome.served if not served.completed]
    assert {served.failure for served in failed} == {"its gateway was lost"}
    assert any(served.completed for served in outcome.served if served.arrived_s > 8.0)


def test_a_fetch_towards_a_node_that_stopped_before_it_was_asked_ends_when_that_is_lost() -> None:
    resolved = cluster({PoolKind.PREFILL: 2, PoolKind.DECODE: 1})
    turn = TracedTurn(0, "s0", "main", 1.0, (), 0.0, 1600, 20, 16, ((0, 100),))
    world = World(resolved, [turn], WorldOptions(checks=True, faults=Faults(until_s=0.0)))
    crashed = Faults(until_s=0.0, restart_s=300.0)
    for number in range(2):  # they stop a moment before the turn comes; the gateway does not know
        world.agenda.at(0.5, world._crash, NodeId(f"prefill-{number}"), crashed)
    served = world.run().served[0]
    assert served.completed
    assert served.ended_s is not None
    assert served.ended_s < 0.5 + resolved.config.cluster.node_lost_s + 1.0


@pytest.mark.parametrize("restarts", [False, True])
def test_a_slow_node_is_slow_until_it_is_said_to_be_and_not_longer(restarts: bool) -> None:
    def turn(number: int, arrival_s: float) -> TracedTurn:
        return TracedTurn(number, f"s{number}", "main", arrival_s, (), 0.0, 64, 101, 16, ((1000 * number, 4),))

    trace = [turn(1, 2.0), turn(2, 30.0)]
    # The node dies at some moment of the first two seconds and is back at once; it is no faster for that.
    faults = Faults(until_s=2.5, crashes=int(restarts), restart_s=0.0, slow_nodes=1, slowness=10.0)
    served = World(cluster({PoolKind.AGGREGATED: 1}), trace, WorldOptions(seed=5, faults=faults)).run().served
    slow, quick = (one.tokens_per_s or 0.0 for one in served)
    # Half a second at a tenth of the speed, then the rest of the answer at full speed.
    assert 0.3 < slow / quick < 0.8
    plain = World(cluster({PoolKind.AGGREGATED: 1}), [turn(2, 30.0)], WorldOptions()).run().served[0]
    assert quick == pytest.approx(plain.tokens_per_s)


def test_models_may_differ_in_their_blocks() -> None:
    one = cluster({PoolKind.AGGREGATED: 1}).config
    small = replace(one.pools[0], name="small", model="small", engine=replace(one.pools[0].engine, block_tokens=8, blocks=1024))
    models = {"large": ModelConfig(), "small": ModelConfig()}
    both = replace(one, models=models, pools=(replace(one.pools[0], model="large"), small))
    runs = ((100, 4),)
    trace = [
        TracedTurn(number, f"s{number}", "main", float(number), (), 0.0, 64, 2, 16, runs, model=model)
        for number, model in enumerate(("large", "small", "large", "small"))
    ]
    for optimal in (False, True):
        served = World(Resolved(both, {}), trace, WorldOptions(optimal_cache=optimal)).run().served
        # All but the last block of each, whose last token is always computed.
        assert [request.cached_tokens for request in served] == [0, 0, 48, 56]


def test_a_prompt_that_no_node_takes_is_refused_without_being_named() -> None:
    trace = [TracedTurn(1, "s", "main", 0.0, (), 0.0, 1 << 32, 1, 16, ((1, 1 << 28),))]
    served = World(cluster(TOGETHER), trace, WorldOptions(optimal_cache=True)).run().served[0]
    assert (served.failure or "").startswith("400 context_length_exceeded")


# --- determinism and canaries -----------------------------------------------------------------------------------------


def run_digest() -> str:
    """Return the digest of a fixed run with faults."""
    options = WorldOptions(seed=3, digest=True, faults=Faults(until_s=10.0, crashes=1, late_share=0.1))
    return World(cluster(APART), agents(6, 3, seed=8), options).run().digest


def test_the_same_seed_gives_the_same_commands_whatever_the_hash_seed() -> None:
    command = [sys.executable, "-c", "from tests.sim.test_world import run_digest; print(run_digest())"]
    digests = [
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert digests[0] == digests[1] == run_digest()
    assert len(digests[0]) == 32


def test_canary_a_lost_end_is_noticed() -> None:
    world = World(cluster(TOGETHER), agents(2, 2, seed=9), WorldOptions())
    for simulated in world.nodes.values():
        tell = simulated.node.handle
        simulated.node.handle = lambda event, now, tell=tell: [  # type: ignore[method-assign]
            command for command in tell(event, now) if not isinstance(command, ReportEnded)
        ]
    outcome = world.run()
    assert not any(served.completed for served in some(outcome.served))  # each gateway's deadline ended them
    assert all(served.failure and "deadline" in served.failure for served in some(outcome.served))


def test_canary_a_world_in_which_nothing_is_left_to_happen_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(cluster(TOGETHER), agents(2, 2, seed=9), WorldOptions())
    monkeypatch.setattr(SimulatedNode, "start", lambda self, command, now: None)
    monkeypatch.setattr(Timers, "set", lambda self, simulated, key, at, action, *arguments: None)
    with pytest.raises(Stuck, match="nothing is left to happen and 4 turns are unfinished"):
        world.run()


def test_canary_the_checks_notice_a_block_that_leaks_and_a_belief_that_is_wrong() -> None:
    leaking = World(cluster(TOGETHER), agents(2, 2, seed=9), WorldOptions(checks=True))
    next(iter(leaking.nodes.values())).node._pool.allocate(1)
    with pytest.raises(AssertionError, match="are not the 512 blocks"):
        leaking.run()
    lying = World(cluster(TOGETHER), agents(2, 2, seed=9), WorldOptions(checks=True))
    send = lying._report
    lying._report = lambda simulated, gateways, firsts, ended, batches, *others: send(  # type: ignore[method-assign]
        simulated, gateways, firsts, ended, [replace(batch, stored=()) for batch in batches], *others
    )
    with pytest.raises(AssertionError, match="believes that"):
        lying.run()
