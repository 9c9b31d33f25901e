"""Simulated pools that keep a beat, beside pools that do not: every token on the beat, whatever else goes on or wrong."""

from dataclasses import replace
from itertools import pairwise

import pytest

from orchestrator.cli.cluster_file import FOLDER, read_cluster
from orchestrator.core.config import PoolConfig, RouterPolicy, SchedulerConfig
from orchestrator.core.types import CostProfile, PoolKind, PoolName, ServiceClass
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import Resolved, resolve
from orchestrator.sim.faults import Faults
from orchestrator.sim.outcome import BeatUse, Outcome, Served
from orchestrator.sim.runs import figures
from orchestrator.sim.world import World, WorldOptions
from tests.builders import some
from tests.sim.worlds import AFFINE, agents, cluster

BEAT_S = 0.01
#: Of a beat each sequence takes a tenth, and each five thousand tokens of its context.
BEATING = replace(AFFINE, step_s=0.0, sequence_s=1e-3, context_token_s=2e-7, beat_s=BEAT_S)
LPX = PoolName("lpx")


def beside(slots: int, blocks: int = 2048, gateways: int = 1, policy: RouterPolicy = RouterPolicy.PREDICTED_TIME) -> Resolved:
    """Return prefill and decode pools, and a node that keeps a beat for all, whose requests are of class cadence."""
    made = cluster({PoolKind.PREFILL: 2, PoolKind.DECODE: 2}, blocks=1024, gateways=gateways, policy=policy)
    decode = made.config.pools[-1]
    scheduler = SchedulerConfig(step_tokens_max=512, sequences_max=slots)
    engine = replace(decode.engine, blocks=blocks)
    beating = PoolConfig("lpx", PoolKind.LPX, engine=engine, scheduler=scheduler, profile=BEATING)
    limits = replace(made.config.limits, service_class=ServiceClass.CADENCE)
    return Resolved(replace(made.config, pools=(*made.config.pools, beating), limits=limits), {})


def run(resolved: Resolved, count: int, turns: int, seed: int, faults: Faults | None = None) -> Outcome:
    checks = faults is not None
    return World(resolved, agents(count, turns, seed), WorldOptions(seed=seed, checks=checks, faults=faults)).run()


def beat_of(outcome: Outcome) -> BeatUse:
    use = outcome.pools[LPX].beat
    assert use is not None
    return use


def on_beat(outcome: Outcome) -> list[Served]:
    return [served for served in outcome.served if served.node == "lpx-0"]


def test_whoever_has_a_slot_gets_a_token_on_every_beat() -> None:
    outcome = run(beside(slots=8), count=3, turns=3, seed=1)
    assert all(served.completed for served in some(outcome.served))
    there = on_beat(outcome)
    assert len(there) == len(outcome.served)
    for served in some(there):
        assert served.first_token_s is not None
        assert served.ended_s is not None
        # One step is a beat; a report is a message away.
        assert served.ended_s - served.first_token_s == pytest.approx((served.output_tokens - 1) * BEAT_S, abs=1e-6)
    assert outcome.pools[LPX].prefill_tokens == len(outcome.served), "each prompt's last token, and no other"
    use = beat_of(outcome)
    assert use.beats > 0
    assert use.missed == 0


def test_more_than_fit_are_served_elsewhere_and_come_back_with_what_they_had() -> None:
    outcome = run(beside(slots=2), count=8, turns=4, seed=2)
    assert all(served.completed for served in some(outcome.served))
    there = {served.turn.id for served in on_beat(outcome)}
    assert 0 < len(there) < len(outcome.served)
    assert beat_of(outcome).missed == 0
    sessions: dict[str, list[Served]] = {}
    for served in outcome.served:
        sessions.setdefault(served.turn.session, []).append(served)
    moves = [
        (before, after)
        for turns in sessions.values()
        for before, after in pairwise(sorted(turns, key=lambda one: one.arrived_s))
        if (before.turn.id in there) != (after.turn.id in there)
    ]
    assert {after.turn.id in there for _, after in moves} == {True, False}, "sessions move in both directions"
    assert any(after.cached_tokens >= before.turn.input_tokens // 2 for before, after in some(moves)), "and take their KV along"


def test_nobody_of_another_class_gets_a_slot() -> None:
    made = beside(slots=8)
    limits = replace(made.config.limits, service_class=ServiceClass.INTERACTIVE)
    outcome = run(replace(made, config=replace(made.config, limits=limits)), count=3, turns=2, seed=1)
    assert not on_beat(outcome)
    assert all(served.completed for served in some(outcome.served))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [RouterPolicy.PREDICTED_TIME, RouterPolicy.ROUND_ROBIN])
def test_the_beat_holds_while_everything_goes_wrong(policy: RouterPolicy) -> None:
    faults = Faults(
        until_s=12.0, crashes=3, restart_s=2.0, late_share=0.05, lost_kv_share=0.1, broken_fetch_share=0.3, abandoned_share=0.05
    )  # fmt: skip
    outcome = run(beside(slots=4, gateways=2, policy=policy), count=6, turns=3, seed=5, faults=faults)
    assert all(served.ended_s is not None for served in some(outcome.served))
    assert some(on_beat(outcome))
    assert beat_of(outcome).missed == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_the_beat_holds_over_many_seeds(seed: int) -> None:
    faults = Faults(until_s=12.0, crashes=2, restart_s=2.0, late_share=0.1, broken_fetch_share=0.3, abandoned_share=0.1)
    outcome = run(beside(slots=1 + seed % 5, blocks=(300, 2048)[seed % 2]), count=5, turns=3, seed=seed, faults=faults)
    assert all(served.ended_s is not None for served in some(outcome.served))
    assert beat_of(outcome).missed == 0


def test_figures_tell_how_full_beats_were() -> None:
    outcome = run(beside(slots=8), count=2, turns=2, seed=1)
    beat = figures(outcome, {})["pools"]["lpx"]["beat"]
    assert (beat["beat_s"], beat["missed"]) == (BEAT_S, 0)
    assert 1 <= beat["slots"] <= 2
    assert 0 < beat["work"] < 1
    assert figures(outcome, {})["pools"]["decode"]["beat"] is None


def test_beats_that_took_longer_than_they_should_are_counted() -> None:
    use = BeatUse(BEAT_S)
    use.add(3, slots=2, work_s=0.5 * BEAT_S)
    use.add(2, slots=4, work_s=1.5 * BEAT_S)
    assert (use.beats, use.missed, use.slots) == (5, 2, 14)


def test_a_beat_is_kept_over_two_halves() -> None:
    made = resolve(read_cluster(FOLDER / "sim" / "vr-nvl72-lpx-afd-cadence.toml"), Catalog.load())
    outcome = World(made, agents(4, 2, seed=3), WorldOptions(seed=3)).run()
    assert all(served.completed and served.node.startswith("cadence") for served in some(outcome.served))
    use = outcome.pools[PoolName("cadence")]
    assert use.beat is not None
    assert (use.beat.beats > 0, use.beat.missed) == (True, 0)
    # LPUs compute the shorter half; the longer one fits into the beats.
    assert use.split is not None
    assert 0 < use.split.ffn_s < use.split.attention_s < use.beat.beats * use.beat.beat_s


def test_a_profile_without_a_beat_is_no_lpx_pools() -> None:
    with pytest.raises(ValueError, match="must be over 0 seconds in a pool of kind lpx"):
        PoolConfig("lpx", PoolKind.LPX, profile=CostProfile())
    with pytest.raises(ValueError, match=r"0 in any other, is .* in one of kind decode"):
        PoolConfig("decode", PoolKind.DECODE, profile=BEATING)
    with pytest.raises(ValueError, match="no pool of kind prefill computes prompts"):
        replace(beside(slots=1).config, pools=beside(slots=1).config.pools[1:])
