"""The roofline's formulas by hand on tiny machines, what must hold for any machine, and the compiled profile against them."""

from dataclasses import replace
from math import isclose

import pytest

from orchestrator.core.config import DecodeMode, HardwareConfig, Precision
from orchestrator.core.cost.costs import batch_seconds, decode_seconds, step_seconds
from orchestrator.core.cost.machines import AllToAll, Chip, Coupling, Line, Link, Machine, Practice
from orchestrator.core.cost.roofline import (
    all_reduce_seconds,
    attention_layers_seconds,
    batch_points,
    context_token_seconds,
    cost_profile,
    exchange_seconds,
    expert_seconds,
    ffn_layers_seconds,
    hop_seconds,
    pass_seconds,
    prefill_pair_seconds,
    tier_load_seconds,
    window_seconds,
    with_microbatches,
)
from orchestrator.core.cost.shapes import Latent, ModelShape

NEAR = AllToAll(Line(2e-5, 1e-5, 5e11), Line(3e-5, 2e-5, 4e11))
WIDE = AllToAll(Line(4e-5, 3e-5, 3e11), Line(5e-5, 4e-5, 2e11))
LINK = Link("link", 1e12, 0.5, 1e-6, near=NEAR, wide=WIDE)
CHIP = Chip(
    name="chip",
    is_gpu=True,
    memory_bytes=1e11,
    memory_bytes_per_s=1e13,
    flops={Precision.NVFP4: 4e15, Precision.FP8: 2e15, Precision.BF16: 1e15},
    memory_efficiency=0.5,
    matmul_efficiency={Precision.NVFP4: 0.5, Precision.FP8: 0.5, Precision.BF16: 0.5},
    expert_efficiency={Precision.NVFP4: 0.25, Precision.FP8: 0.25, Precision.BF16: 0.25},
    attention_efficiency=0.5,
    attention_floor_s=2e-6,
    ffn_floor_s=1e-6,
    domain_chips=8,
    scale_up=LINK,
    scale_out=LINK,
    host=None,
    storage=None,
    kw=1.0,
    usd_per_hour=1.0,
)
FAST = replace(CHIP, name="fast", is_gpu=False, memory_bytes_per_s=1e15, attention_floor_s=5e-7, ffn_floor_s=5e-7)
PRACTICE = Practice(collective_s=5e-6, expert_imbalance=1.1, reserve_bytes=0.0)
COUPLING = Coupling(LINK, draft_parameters=1e9, draft_layers=4)
SHAPE = ModelShape(
    name="tiny",
    layers=10,
    hidden=4096,
    vocab=32000,
    heads=32,
    kv_heads=8,
    head_dim=128,
    context_tokens_max=1 << 20,
    windowed_layers=4,
    window_tokens=100,
    dense_layers=1,
    dense_intermediate=8192,
    experts=64,
    experts_per_token=4,
    expert_intermediate=2048,
    shared_intermediate=2048,
)
LATENT = replace(SHAPE, latent=Latent(query_rank=1024, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128))


def machine(shape: ModelShape = SHAPE, **fields: object) -> Machine:
    hardware = HardwareConfig(**{"chip": "chip", "group_nodes": 8, "ffn_chips": 0, **fields})  # pyright: ignore[reportArgumentType]
    other = FAST if hardware.ffn_chip else None
    return Machine(shape, hardware, CHIP, PRACTICE, other, COUPLING if other else None, acceptance=hardware.acceptance or 0.7)


def two_halves(mode: DecodeMode, **fields: object) -> Machine:
    return machine(mode=mode, ffn_chip="fast", ffn_chips=32, **fields)


MACHINES = {
    "plain": machine(),
    "latent": machine(LATENT),
    "one node": machine(group_nodes=1, chips=4),
    "drafting": machine(draft_tokens=3),
    "ping-pong": two_halves(DecodeMode.AFD),
    "three micro-batches": two_halves(DecodeMode.AFD, microbatches=3, draft_tokens=1),
    "serial": two_halves(DecodeMode.AFD, microbatches=1),
    "whole": two_halves(DecodeMode.WHOLE),
    "drafter": two_halves(DecodeMode.DRAFTER, draft_tokens=3),
}


def profile_of(node: Machine):
    return cost_profile(node, 64, 512, LINK)


# Phases, by hand


def test_the_weights_of_experts_that_are_hit_are_read_at_the_reached_rate() -> None:
    # 8 nodes of 1 token, each to 4 of 64 experts, miss 64 * (60/64)^8; 8 chips read the others, the busiest 1.1 times.
    hit = 64 * (1 - (60 / 64) ** 8)
    assert isclose(expert_seconds(machine(), 1), hit * 1.1 * 3 * 4096 * 2048 / (8 * 1e13 * 0.5))
    # One token hits 4 experts, but some chip reads a whole one while others wait.
    assert isclose(expert_seconds(machine(), 1 / 8), 8 * 3 * 4096 * 2048 / (8 * 1e13 * 0.5))


def test_many_tokens_are_bound_by_multiplying() -> None:
    flops = 2 * 4 * 1.1 * 3 * 4096 * 2048 * (8 * 100_000)
    assert isclose(expert_seconds(machine(), 100_000), flops / (8 * 2e15 * 0.25))
    # Twice the rate with half the bits.
    fp4 = machine(weights=Precision.NVFP4, activations=Precision.NVFP4)
    assert isclose(expert_seconds(fp4, 100_000) * 2, expert_seconds(machine(), 100_000))


def test_matrices_that_every_token_meets_are_multiplied_at_their_own_share() -> None:
    # One chip, FP8, half of its rate: attention's projections of ten layers, and two microseconds of kernels for each.
    flops = 2 * 4096 * 128 * 2 * (32 + 8) * 100_000
    assert isclose(attention_layers_seconds(machine(), 100_000), 10 * (flops / (2e15 * 0.5) + 2e-6))


def test_an_all_to_all_has_a_floor_and_then_a_straight_line() -> None:
    assert exchange_seconds(machine(), 1) == 2e-5 + 3e-5
    copies = 1000 * 4 * 4096
    assert isclose(exchange_seconds(machine(), 1000), 1e-5 + copies / 5e11 + 2e-5 + 2 * copies / 4e11)
    assert exchange_seconds(machine(group_nodes=1), 1000) == 0.0


def test_an_all_to_all_takes_longer_in_larger_groups_by_their_logarithm() -> None:
    floors = [exchange_seconds(machine(group_nodes=nodes), 1) for nodes in (2, 8, 16, 32, 64, 128)]
    # 50 us among 8 and fewer, 90 us among 64 and more, a third of the difference for each doubling between.
    assert [round(floor * 1e6, 3) for floor in floors] == [50, 50, 63.333, 76.667, 90, 90]


def test_activations_cross_to_the_other_half_once_or_to_each_expert_if_it_is_made_of_gpus() -> None:
    node = two_halves(DecodeMode.AFD)
    assert isclose(hop_seconds(node, 1000), 1e-6 + 1000 * 4096 * 1.5 / 5e11)
    # Eight GPUs that attend and 32 that hold the FFNs are a group of 40.
    assert isclose(hop_seconds(replace(node, ffn_chip=CHIP), 1000), exchange_seconds(machine(group_nodes=40), 1000) / 2)


def test_an_all_reduce_is_a_ring() -> None:
    size = 10 * 4096 * 2
    assert isclose(all_reduce_seconds(machine(chips=4), 10), 5e-6 + 6 * 1e-6 + 6 * size / 4 / 5e11)
    assert all_reduce_seconds(machine(), 10) == 0.0


def test_a_tier_load_waits_and_then_streams() -> None:
    assert tier_load_seconds(LINK, 5e11, chips=2) == 1e-6 + 0.5
    assert tier_load_seconds(LINK, 0) == 0.0


# Attention


def test_attention_reads_the_cache_and_8_bits_take_half_the_time_of_16() -> None:
    wide, narrow = machine(kv=Precision.BF16), machine(kv=Precision.FP8)
    assert isclose(context_token_seconds(narrow), 6 * 2 * 8 * 128 / (1e13 * 0.5))
    assert isclose(context_token_seconds(wide), 2 * context_token_seconds(narrow))


def test_heads_are_split_over_a_nodes_chips_and_a_latent_vector_is_not() -> None:
    assert isclose(context_token_seconds(machine(chips=4)) * 4, context_token_seconds(machine()))
    assert context_token_seconds(machine(LATENT, chips=2, kv=Precision.BF16)) >= 6 * 2 * 576 / (1e13 * 0.5)


def test_layers_with_a_window_cost_a_sequence_the_same_at_any_length() -> None:
    assert isclose(window_seconds(machine()), 4 * 100 * 2 * 8 * 128 / (1e13 * 0.5))
    assert isclose(profile_of(machine()).sequence_s, window_seconds(machine()))


def test_a_prompt_token_is_multiplied_with_every_token_before_it() -> None:
    profile, pair = profile_of(machine()), 4 * 32 * 128 / (2e15 * 0.5)
    assert isclose(prefill_pair_seconds(machine()), pair)
    # 100 tokens after 1,000, each with 50 of its own on average, in 6 full layers; and 100 in each of 4 windows.
    attending = step_seconds(profile, [(100, 1000)], 0, 0) - profile.step_s - batch_seconds(profile, 100)
    assert isclose(attending, 100 * pair * (6 * 1050 + 4 * 100))


# The whole pass, and its compiled form


@pytest.mark.parametrize("name", MACHINES)
def test_a_pass_never_gets_shorter_with_context_or_batch(name: str) -> None:
    node = MACHINES[name]
    by_context = [pass_seconds(node, 8, context) for context in (0, 10_000, 1_000_000)]
    by_batch = [pass_seconds(node, sequences, 100_000) for sequences in (1, 2, 8, 64)]
    assert by_context == sorted(by_context)
    assert by_batch == sorted(by_batch)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("sequences", [1, 2, 5, 11, 23, 64])
@pytest.mark.parametrize("context", [0, 3000, 300_000])
def test_the_compiled_profile_takes_the_formulas_time_at_and_between_its_points(name: str, sequences: int, context: int) -> None:
    node = MACHINES[name]
    profile = profile_of(node)
    compiled = decode_seconds(profile, sequences, sequences * context) * profile.tokens_per_pass
    assert isclose(compiled, pass_seconds(node, sequences, sequences * context), rel_tol=0.03)


def test_canary_the_comparison_would_notice_another_machine() -> None:
    profile = profile_of(machine())
    assert not isclose(decode_seconds(profile, 5, 5000), pass_seconds(machine(LATENT), 5, 5000), rel_tol=0.03)


def test_drafted_tokens_are_accepted_one_after_the_other() -> None:
    # 1 + 0.5 + 0.25 + 0.125 tokens a pass.
    profile = profile_of(machine(draft_tokens=3, acceptance=0.5))
    assert (profile.pass_tokens, profile.tokens_per_pass) == (4, 1.875)
    assert profile_of(machine()).tokens_per_pass == 1.0


def test_large_batches_hide_the_all_to_all_and_small_ones_are_not_split() -> None:
    split, unsplit = profile_of(machine(microbatches=2)), profile_of(machine(microbatches=1))
    assert split.batch_s[0] == unsplit.batch_s[0]
    assert (
        cost_profile(machine(microbatches=2), 64, 16384, LINK).batch_s[-1]
        < cost_profile(machine(microbatches=1), 64, 16384, LINK).batch_s[-1]
    )


def test_in_ping_pong_a_chunk_of_prompt_costs_at_least_what_both_halves_need() -> None:
    node = two_halves(DecodeMode.AFD)
    chunk = step_seconds(profile_of(node), [(512, 0)], 0, 0)
    longer = max(2 * attention_layers_seconds(node, 256), 2 * ffn_layers_seconds(node, 256))
    assert longer <= chunk <= 2 * pass_seconds(node, 512, 0)


def test_the_curve_is_sampled_more_densely_where_it_bends() -> None:
    assert batch_points(50) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 50)
    assert batch_points(1) == (1,)


def test_a_machine_that_leaves_its_micro_batches_open_gets_those_that_make_a_full_pass_shortest() -> None:
    opened = two_halves(DecodeMode.AFD, microbatches=0)
    for sequences, context in ((4, 400_000), (256, 1_000_000)):
        chosen = with_microbatches(opened, sequences, context)
        best_s = pass_seconds(chosen, sequences, context)
        for count in (1, 2, 3, 4):
            assert best_s <= 1.001 * pass_seconds(two_halves(DecodeMode.AFD, microbatches=count), sequences, context)
    assert with_microbatches(MACHINES["serial"], 4, 400_000) is MACHINES["serial"]
