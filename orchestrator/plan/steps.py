"""Says which plans differ from a plan by one step in one dimension, for improving it step by step."""

from collections.abc import Iterator
from dataclasses import replace

from orchestrator.core.config import DecodeMode, HardwareConfig, Precision
from orchestrator.core.types import PoolKind
from orchestrator.plan.space import (
    CHIPS,
    COUNTS,
    DRAFTER_DRAFTS,
    DRAFTERS,
    DRAFTS,
    GROUPS,
    HALVES,
    MICROBATCHES,
    MIXED_STEPS,
    PREFILL_STEPS,
    Choices,
    Plan,
    PoolPlan,
)


def neighbours(plan: Plan, choices: Choices) -> list[Plan]:
    """Return every plan that differs from this one by one step in one dimension; some of them may not fit."""
    found: dict[Plan, None] = {}
    domains = dict(choices.domains)
    for other in _pool_steps(plan.decode, domains):
        found.setdefault(Plan.paired(plan.prefill, other) if len(plan.pools) > 1 else Plan((other,)))
    if len(plan.pools) > 1:
        for other in _pool_steps(plan.prefill, domains):
            found.setdefault(Plan.paired(other, plan.decode))
    for kv in choices.kv:
        pools = tuple(replace(pool, hardware=replace(pool.hardware, kv=kv)) for pool in plan.pools)
        found.setdefault(Plan(pools))
    for weights in choices.weights:
        found.setdefault(Plan(tuple(_with_weights(pool, weights) for pool in plan.pools)))
    found.pop(plan, None)
    return list(found)


def rebalanced(plan: Plan, balance: float | None) -> list[Plan]:
    """Return the plan with as many chips for FFNs as keep them as busy as attention's, if those are others.

    `balance` is how busy attention was over how busy FFNs were, with the chips that the plan has; None where nothing is split.
    """
    pool = plan.decode
    if balance is None or balance <= 0.0 or pool.hardware.mode is not DecodeMode.AFD:
        return []
    wanted = pool.hardware.ffn_chips / balance
    count = min(half_counts(pool.hardware), key=lambda count: (abs(count - wanted), count))
    if count == pool.hardware.ffn_chips:
        return []
    other = replace(pool, hardware=replace(pool.hardware, ffn_chips=count))
    return [Plan.paired(plan.prefill, other) if len(plan.pools) > 1 else Plan((other,))]


def half_counts(made: HardwareConfig) -> tuple[int, ...]:
    """Return how many chips the other half may have: whole racks of its own kind, any number of the attention's."""
    return tuple(range(1, made.chips * made.group_nodes + 1)) if made.ffn_chip == made.chip else HALVES


def _with_weights(pool: PoolPlan, weights: Precision) -> PoolPlan:
    return replace(pool, hardware=replace(pool.hardware, weights=weights, activations=weights))


def _pool_steps(pool: PoolPlan, domains: dict[str, int]) -> Iterator[PoolPlan]:
    """Yield the pool with one step more or less in each of its own dimensions."""
    made = pool.hardware
    for groups in _beside(COUNTS, pool.groups):
        yield pool.sized(groups)
    if pool.kind is not PoolKind.LPX:
        for step in _beside(PREFILL_STEPS if pool.kind is PoolKind.PREFILL else MIXED_STEPS, pool.step_tokens_max):
            yield replace(pool, step_tokens_max=step)
    for chips in _beside(CHIPS, made.chips):
        yield from _respread(pool, replace(made, chips=chips), domains)
    for group in _beside(GROUPS, made.group_nodes):
        yield from _respread(pool, replace(made, group_nodes=group), domains)
    if pool.kind is PoolKind.PREFILL:
        return
    if made.mode is not DecodeMode.WHOLE and pool.kind is not PoolKind.LPX:
        yield from (
            replace(pool, hardware=replace(made, draft_tokens=count)) for count in _beside(_drafts(made), made.draft_tokens)
        )
    if made.mode is DecodeMode.AFD:
        yield from (
            replace(pool, hardware=replace(made, microbatches=count)) for count in _beside(MICROBATCHES, made.microbatches)
        )
    if made.mode is not DecodeMode.PLAIN:
        counts = DRAFTERS if made.mode is DecodeMode.DRAFTER else half_counts(made)
        yield from (replace(pool, hardware=replace(made, ffn_chips=count)) for count in _beside(counts, made.ffn_chips))


def _drafts(made: HardwareConfig) -> tuple[int, ...]:
    return DRAFTER_DRAFTS if made.mode is DecodeMode.DRAFTER else DRAFTS


def _respread(pool: PoolPlan, made: HardwareConfig, domains: dict[str, int]) -> Iterator[PoolPlan]:
    """Yield the pool with its chips grouped otherwise: as many chips as before, or the next larger number."""
    if made.chips * made.group_nodes > domains.get(made.chip, 1):
        return
    chips = pool.nodes * pool.hardware.chips
    groups = max(1, -(-chips // (made.chips * made.group_nodes)))
    yield replace(pool, hardware=made).sized(groups)


def _beside(ladder: tuple[int, ...], value: int) -> list[int]:
    """Return the steps next to a value: the last one below it and the first one above."""
    below = [step for step in ladder if step < value]
    above = [step for step in ladder if step > value]
    return below[-1:] + above[:1]
