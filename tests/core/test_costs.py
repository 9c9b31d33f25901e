"""The cost formulas, by hand."""

import pytest

from orchestrator.core.costs import SCALE_WEIGHT, fetch_seconds, prefill_seconds, prompt_seconds, smoothed_scale, step_seconds
from orchestrator.core.types import CostProfile

PROFILE = CostProfile(
    step_s=1.0,
    prefill_token_s=0.1,
    prefill_token_context_s=0.001,
    sequence_s=0.01,
    context_token_s=0.0001,
    fetch_bytes_per_s=1000.0,
    fetch_latency_s=0.5,
)


def test_a_step_is_its_base_its_chunks_and_its_decodes() -> None:
    # 1 + 2 sequences * 0.01 + 300 context * 0.0001 + 10 tokens * (0.1 + 0.001 * (20 + 5))
    assert step_seconds(PROFILE, [(10, 20)], sequences=2, context_tokens=300) == pytest.approx(1 + 0.02 + 0.03 + 1.25)


def test_two_chunks_cost_what_the_whole_costs() -> None:
    whole = prefill_seconds(PROFILE, 100, 50)
    assert prefill_seconds(PROFILE, 40, 50) + prefill_seconds(PROFILE, 60, 90) == pytest.approx(whole)


def test_a_prompt_takes_as_many_steps_as_it_has_chunks() -> None:
    assert prompt_seconds(PROFILE, 100, 0, step_tokens_max=40) == pytest.approx(3 * 1.0 + prefill_seconds(PROFILE, 100, 0))
    assert prompt_seconds(PROFILE, 0, 100, step_tokens_max=40) == 0.0


def test_a_fetch_is_latency_and_bytes() -> None:
    assert fetch_seconds(PROFILE, 2000) == pytest.approx(2.5)
    assert fetch_seconds(PROFILE, 0) == 0.0


def test_the_scale_follows_measurements_and_one_wild_step_moves_it_little() -> None:
    assert smoothed_scale(1.0, predicted_s=1.0, measured_s=2.0) == pytest.approx(1.0 + SCALE_WEIGHT)
    assert smoothed_scale(1.0, predicted_s=1.0, measured_s=1e9) == pytest.approx(1.0 + SCALE_WEIGHT * 7.0)
    assert smoothed_scale(1.5, predicted_s=0.0, measured_s=1.0) == 1.5
    scale = 1.0
    for _ in range(200):
        scale = smoothed_scale(scale, 1.0, 3.0)
    assert scale == pytest.approx(3.0, rel=0.01)
