"""Plans of split decode, whose chips for FFNs follow from how busy either half is; and plans whose tokens come on a beat."""

from dataclasses import replace
from math import log

import pytest

from orchestrator.core.config import DecodeMode, HardwareConfig, ModelConfig, Precision
from orchestrator.core.types import PoolKind, ServiceClass
from orchestrator.plan.estimate import Decoding, Estimator, Reason, Sizing, price_of
from orchestrator.plan.goal import Budget, Slo
from orchestrator.plan.measure import Builder
from orchestrator.plan.space import HALVES, Choices, Plan, PoolPlan
from orchestrator.plan.steps import neighbours, rebalanced
from orchestrator.plan.sweep import Sweep, Swept
from orchestrator.profiles.catalog import Catalog
from tests.builders import some
from tests.plan.plans import DEMAND, NODE, SMALL

CATALOG = Catalog.load()
PREFILL, DECODE, LPX = PoolKind.PREFILL, PoolKind.DECODE, PoolKind.LPX
LONG = replace(DEMAND, context_tokens=60_000.0, context_tokens_max=200_000)
SPLIT = HardwareConfig(
    "gb300",
    group_nodes=32,
    weights=Precision.NVFP4,
    activations=Precision.NVFP4,
    mode=DecodeMode.AFD,
    ffn_chip="gb300",
    ffn_chips=8,
    ffn_weights=Precision.NVFP4,
)
#: A node keeps a beat of 12 ms, with as many slots as there are.
BEATING = Slo(ttft_s=1.0, itl_s=0.02, percentile=0.9, beat_s=0.012)
CHOICES = Choices(chips=("small",), halves=(), domains=(("small", 2),), weights=(Precision.FP8,), kv=(Precision.FP8,))


def split(ffn_chips: int, **made: object) -> Plan:
    return Plan((PoolPlan(DECODE, replace(SPLIT, ffn_chips=ffn_chips, **made), 512, 32),))  # type: ignore[arg-type]


def sizer(pool: PoolPlan) -> Sizing | None:
    return None if pool.hardware.mode is not DecodeMode.PLAIN else NODE


def swept(slo: Slo, asked: object = DEMAND) -> Swept:
    return Sweep(asked, sizer, slo, Budget(), CHOICES).run()  # type: ignore[arg-type]


# The two halves.


@pytest.mark.parametrize(("balance", "chips"), [(0.5, 16), (2.0, 4), (0.9, 9), (100.0, 1), (0.01, 32)])
def test_the_busier_half_gets_chips_of_the_other_within_a_group(balance: float, chips: int) -> None:
    [other] = rebalanced(split(8), balance)
    assert other == split(chips)


def test_what_is_even_or_not_split_stays_as_it_is() -> None:
    assert rebalanced(split(8), 1.02) == []
    assert rebalanced(split(8), None) == []
    assert rebalanced(Plan((PoolPlan(DECODE, SMALL, 512),)), 2.0) == []


def test_racks_of_another_chip_come_whole() -> None:
    [other] = rebalanced(split(512, chip="vr200", ffn_chip="lp30"), 0.6)
    assert other.decode.hardware.ffn_chips == 768
    assert 768 in HALVES


@pytest.mark.parametrize("ffn_chips", [4, 8, 16, 24])
@pytest.mark.parametrize("sequences", [4, 16, 64])
def test_real_halves_come_nearer_to_each_other(ffn_chips: int, sequences: int) -> None:
    builder = Builder(CATALOG, ModelConfig(shape="kimi-k2"), block_tokens=64)
    estimator, decoding = Estimator(LONG, builder.size, 0.9), Decoding(0.01, sequences)

    def balance(plan: Plan) -> float:
        size = builder.size(plan.decode)
        found = estimator.balance(size, decoding) if size is not None else None
        assert found is not None
        return found

    before = balance(split(ffn_chips))
    for other in rebalanced(split(ffn_chips), before):
        assert abs(log(balance(other))) < abs(log(before))


def test_a_sweep_proposes_ratios_that_no_share_has() -> None:
    """The shares that are tried of 32 chips are 10, 4 and 2 for FFNs."""
    builder = Builder(CATALOG, ModelConfig(shape="kimi-k2"), block_tokens=64)
    choices = Choices(("gb300",), (), (("gb300", 32),), (Precision.NVFP4,), (Precision.FP8,))
    found = Sweep(LONG, builder.size, Slo(5.0, 0.05, 0.9), Budget(), choices)
    found.run()
    proposed = {kind.hardware.ffn_chips for kind in found._balanced if kind.hardware.group_nodes * kind.hardware.chips == 32}
    assert proposed - {10, 4, 2}


def test_halves_of_one_chip_are_improved_chip_by_chip() -> None:
    choices = Choices(("gb300",), (), (("gb300", 72),), (Precision.NVFP4,), (Precision.FP8,))
    assert {split(7), split(9)} <= set(neighbours(split(8), choices))


# The beat.


def test_with_a_beat_a_pool_keeps_it_and_a_third_serves_who_finds_no_slot() -> None:
    found = swept(BEATING)
    for estimate in some(found.kept):
        prefill, rest, beating = estimate.plan.pools
        assert [pool.kind for pool in (prefill, rest, beating)] == [PREFILL, DECODE, LPX]
        assert (beating.beat_s, estimate.itl_s) == (0.012, 0.012)
        assert (rest.hardware, rest.groups) == (prefill.hardware, 1)
        assert estimate.price == price_of(estimate.plan, sizer)


def test_a_beat_is_asked_of_as_many_nodes_as_have_slots_for_a_busy_moment() -> None:
    # 20,000 tokens a second at a token every 12 ms are 240 sequences; a node holds 100, of which 80 leave some for a busy moment.
    found = swept(BEATING, replace(DEMAND, output_tokens_per_s=20_000.0))
    nodes = {estimate.plan.decode.nodes for estimate in some(found.kept)}
    assert min(nodes) == 3
    assert found.pruned[Reason.MEMORY] > 0


def test_a_beat_that_no_pass_keeps_falls_out() -> None:
    found = swept(replace(BEATING, beat_s=0.009))
    assert (found.kept, found.pruned[Reason.ITL] > 0) == ([], True)


def test_a_plan_with_a_beat_is_a_cluster_whose_requests_ask_for_it() -> None:
    builder = Builder(CATALOG, ModelConfig(shape="gpt-oss-120b"), block_tokens=64)
    made = HardwareConfig("h200")
    plan = Plan.paired(PoolPlan(PREFILL, made, 8192), PoolPlan(LPX, made, 256, 1, 0.01))
    config = builder.resolved(plan).config
    assert config.limits.service_class is ServiceClass.CADENCE
    assert [(pool.kind, pool.profile.beat_s) for pool in config.pools] == [(PREFILL, 0.0), (DECODE, 0.0), (LPX, 0.01)]
    assert "a beat of 10 ms" in str(plan)
    # Steps in any dimension keep its three pools, and the beat.
    for other in some(neighbours(plan, Choices(("h200",), (), (("h200", 8),)))):
        assert [pool.kind for pool in other.pools] == [PREFILL, DECODE, LPX]
        assert other.decode.beat_s == 0.01
        assert other.pools[1].hardware == other.prefill.hardware
