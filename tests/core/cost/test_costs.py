"""The cost formulas, by hand."""

from dataclasses import replace

import pytest

from orchestrator.core.cost.costs import (
    SCALE_WEIGHT,
    batch_seconds,
    decode_seconds,
    fetch_seconds,
    prompt_seconds,
    smoothed_scale,
    step_seconds,
    steps_within,
    token_seconds,
)
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
CURVED = CostProfile(0.5, 0.001, 1e-6, 0.0, 1e-5, batch_tokens=(8, 64), batch_s=(0.02, 0.04))
OVERLAPPING = replace(PROFILE, batch_tokens=(8, 64), batch_s=(0.02, 0.04), overlap=0.75)
SPECULATING = replace(OVERLAPPING, pass_tokens=4, tokens_per_pass=2.5)


def test_a_step_is_its_base_its_chunks_and_its_decodes() -> None:
    # 1 + 2 sequences * 0.01 + 300 context * 0.0001 + 10 tokens * (0.1 + 0.001 * (20 + 5))
    assert step_seconds(PROFILE, [(10, 20)], sequences=2, context_tokens=300) == pytest.approx(1 + 0.02 + 0.03 + 1.25)


def test_a_prompt_takes_as_many_steps_as_it_has_chunks() -> None:
    chunks = [step_seconds(PROFILE, [(count, context)], 0, 0) for count, context in ((40, 50), (40, 90), (20, 130))]
    assert prompt_seconds(PROFILE, 100, 50, step_tokens_max=40) == pytest.approx(sum(chunks))
    assert prompt_seconds(CURVED, 100, 50, step_tokens_max=40) == pytest.approx(
        sum(step_seconds(CURVED, [chunk], 0, 0) for chunk in ((40, 50), (40, 90), (20, 130)))
    )
    assert prompt_seconds(PROFILE, 0, 100, step_tokens_max=40) == 0.0


def test_the_curve_is_level_then_straight_between_its_points_and_after_them() -> None:
    # points (8, 0.02), (64, 0.04): a slope of 0.02 / 56
    assert [batch_seconds(CURVED, tokens) for tokens in (1, 8, 36, 64, 120)] == pytest.approx([0.02, 0.02, 0.03, 0.04, 0.06])
    assert token_seconds(CURVED, 64) == pytest.approx(0.001 + 0.04 / 64)


@pytest.mark.parametrize("profile", [PROFILE, "curved", "overlapping", "speculating"])
def test_decode_steps_in_closed_form_are_the_sum_of_the_steps(profile: CostProfile | str) -> None:
    if isinstance(profile, str):
        profile = {"curved": CURVED, "overlapping": OVERLAPPING, "speculating": SPECULATING}[profile]
    for sequences, context in ((1, 10), (7, 900), (16, 40_000)):
        one_by_one = sum(step_seconds(profile, (), sequences, context + step * sequences) for step in range(300))
        assert decode_seconds(profile, sequences, context, 300) == pytest.approx(one_by_one, rel=1e-12)


def test_overlapping_halves_take_the_longer_one_and_what_does_not_overlap() -> None:
    # attention 4 * 0.01 + 1000 * 0.0001 = 0.14; the rest is level at 0.02: 1 + 0.25 * 0.16 + 0.75 * 0.14
    assert step_seconds(OVERLAPPING, (), 4, 1000) == pytest.approx(1 + 0.04 + 0.105)


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.1, 7.77, 60.0, 1e6])
def test_the_steps_within_a_time_are_those_that_end_in_it(seconds: float) -> None:
    steps = steps_within(OVERLAPPING, 5, 300, 50, seconds)
    assert steps == 0 or decode_seconds(OVERLAPPING, 5, 300, steps) <= seconds
    assert steps == 50 or decode_seconds(OVERLAPPING, 5, 300, steps + 1) > seconds


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


def test_many_equal_steps_move_the_scale_as_one_by_one() -> None:
    scale = 1.0
    for _ in range(37):
        scale = smoothed_scale(scale, 1.0, 1.5)
    assert smoothed_scale(1.0, 37.0, 37 * 1.5, steps=37) == pytest.approx(scale)
