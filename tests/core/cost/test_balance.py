"""Skewed loads of experts: how uneven chips are without and with placement, and what a pass takes then."""

from dataclasses import replace

import pytest

from orchestrator.core.config import ConfigError, HardwareConfig
from orchestrator.core.cost.balance import balance_of, expert_loads
from orchestrator.core.cost.roofline import expert_seconds
from tests.core.cost.test_roofline import MACHINES


def test_loads_fall_by_a_power_law_in_an_order_of_their_seed() -> None:
    loads = expert_loads(8, 1.0, seed=3)
    assert sorted(loads, reverse=True) == [1 / rank for rank in range(1, 9)]
    assert loads == expert_loads(8, 1.0, seed=3)
    assert loads != expert_loads(8, 1.0, seed=4)
    assert set(expert_loads(8, 0.0, seed=3)) == {1.0}


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_hot_experts_even_out_what_spreading_by_number_does_not(seed: int) -> None:
    # DeepSeek-R1's 256 experts on 32 chips, as TensorRT-LLM measured them: 1.56 without balancing, 0.11 with a spare slot each.
    balance = balance_of(256, 32, spare_slots=1, skew=0.9, seed=seed)
    assert balance.spread > 1.0
    assert balance.placed < 0.15
    assert balance.placed <= balance_of(256, 32, spare_slots=0, skew=0.9, seed=seed).placed <= balance.spread


def test_a_chip_for_each_expert_is_as_uneven_as_they_are() -> None:
    assert balance_of(4, 100, 0, skew=1.0, seed=0).spread == pytest.approx(1 / ((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4) - 1)


def test_the_busiest_chip_decides_the_experts_time() -> None:
    plain = MACHINES["plain"]
    skewed = replace(plain, hardware=replace(plain.hardware, expert_skew=1.0))
    spread = replace(plain, hardware=replace(skewed.hardware, balanced=False))
    copied = replace(plain, hardware=replace(skewed.hardware, spare_slots=2))
    assert expert_seconds(copied, 1000) < expert_seconds(skewed, 1000) < expert_seconds(spread, 1000)
    balance = skewed.balance
    assert balance is not None
    assert expert_seconds(skewed, 1e6) / expert_seconds(spread, 1e6) == pytest.approx((1 + balance.placed) / (1 + balance.spread))
    # The copies have to be held: 2 on each of 8 chips, of 64 experts.
    assert (plain.expert_copies, copied.expert_copies) == (1.0, 1.25)
    assert plain.balance is None


def test_spare_slots_without_a_load_to_place_by_are_refused() -> None:
    for wrong in ({"spare_slots": 1}, {"spare_slots": 1, "expert_skew": 1.0, "balanced": False}):
        with pytest.raises(ConfigError, match="copies of hot experts need expert_skew, and balanced"):
            HardwareConfig(**wrong)
