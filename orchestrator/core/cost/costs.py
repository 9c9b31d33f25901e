"""How long steps and fetches take: predicted from a node's profile, corrected by what its steps really took.

The router predicts with it, the node keeps its scale, the profiled engine and the simulator take exactly this time, so that a
prediction error is always an error of the profile and never of a second formula.

Between two events a batch only decodes: its contexts grow by a token a step and step i takes d + i * g seconds, so that any
number of steps has a closed form. Where attention and the rest overlap (`CostProfile.overlap`) the longer of the two counts, and
the form has one bend, at the step in which attention becomes the longer one.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from orchestrator.core.config import PoolConfig
from orchestrator.core.types import CostProfile, PoolKind

#: Weight of the newest step in the smoothed scale: about the last 20 steps count.
SCALE_WEIGHT = 0.05
#: A single step may be off by this factor at most before it is clipped (a page fault, a compile, a suspended machine).
SCALE_CLIP = 8.0


def step_seconds(profile: CostProfile, prefills: Sequence[tuple[int, int]], sequences: int, context_tokens: int) -> float:
    """Return the seconds of one step, in which every decoding sequence gets one token.

    A pass that also verifies drafted tokens brings several; the time of a step that only decodes is its pass's, divided by
    those.

    Args:
        profile: the node's coefficients.
        prefills: (tokens computed, context tokens before them) of each prompt chunk.
        sequences: sequences that decode a token.
        context_tokens: the context of all of those together.
    """
    if not prefills or profile.beat_s:
        return decode_seconds(profile, sequences, context_tokens)
    attention_s = sequences * profile.sequence_s + context_tokens * profile.context_token_s
    tokens = 0
    for count, context in prefills:
        attention_s += count * profile.prefill_token_context_s * (context + count / 2)
        tokens += count
    rest_s = tokens * profile.prefill_token_s + batch_seconds(profile, tokens + sequences * profile.pass_tokens)
    return profile.step_s + _joined(profile.overlap, attention_s, rest_s)


def draft_seconds(profile: CostProfile, drafts: Sequence[int]) -> float:
    """Return the seconds in which a draft model drafts so many tokens for sequences, a token for all of them in a pass."""
    return profile.draft_step_s * max(drafts, default=0)


def decode_seconds(profile: CostProfile, sequences: int, context_tokens: int, steps: int = 1) -> float:
    """Return the seconds of consecutive steps that only decode; `context_tokens` is the context before the first of them."""
    if profile.beat_s:
        return steps * profile.beat_s / profile.tokens_per_pass
    if steps == 1:
        return work_seconds(profile, sequences, context_tokens) / profile.tokens_per_pass
    rest_s = batch_seconds(profile, sequences * profile.pass_tokens)
    first_s = sequences * profile.sequence_s + context_tokens * profile.context_token_s
    growth_s = sequences * profile.context_token_s
    attention_s = _sum(first_s, growth_s, 0, steps)
    total_s = steps * profile.step_s + (1.0 - profile.overlap) * (attention_s + steps * rest_s)
    if profile.overlap:
        bend = min(steps, ceil((rest_s - first_s) / growth_s)) if first_s < rest_s and growth_s else 0
        bend = steps if first_s < rest_s and not growth_s else bend
        total_s += profile.overlap * (bend * rest_s + _sum(first_s, growth_s, bend, steps))
    return total_s / profile.tokens_per_pass


def work_seconds(profile: CostProfile, sequences: int, context_tokens: int) -> float:
    """Return the seconds of work in one pass that only decodes, on whatever beat."""
    rest_s = batch_seconds(profile, sequences * profile.pass_tokens) if profile.batch_tokens else 0.0
    attention_s = sequences * profile.sequence_s + context_tokens * profile.context_token_s
    return profile.step_s + _joined(profile.overlap, attention_s, rest_s)


def keeps_beat(profile: CostProfile, sequences: int, context_tokens: int) -> bool:
    """Return whether a pass over so many sequences with so much context together is done within the profile's beat."""
    return work_seconds(profile, sequences, context_tokens) <= profile.beat_s


def steps_within(profile: CostProfile, sequences: int, context_tokens: int, steps_max: int, seconds: float) -> int:
    """Return how many of at most `steps_max` consecutive decode steps end within `seconds`; no step is shorter than the last."""
    first_s = decode_seconds(profile, sequences, context_tokens)
    if first_s <= 0.0:
        return steps_max
    low, high = 0, min(steps_max, int(seconds / first_s) + 1)
    return low + bisect_right(
        range(low + 1, high + 1), seconds, key=lambda steps: decode_seconds(profile, sequences, context_tokens, steps)
    )


def batch_seconds(profile: CostProfile, tokens: int) -> float:
    """Return the profile's curve at so many tokens in a step."""
    points = profile.batch_tokens
    if not points:
        return 0.0
    if tokens <= points[0]:
        return profile.batch_s[0]
    place = min(bisect_right(points, tokens), len(points) - 1)
    if place == 0:
        return profile.batch_s[0]
    before, after = profile.batch_s[place - 1], profile.batch_s[place]
    return before + (after - before) * (tokens - points[place - 1]) / (points[place] - points[place - 1])


def node_profile(pool: PoolConfig) -> CostProfile:
    """Return what the steps of a pool's nodes cost: what its file says.

    FFN ranks that keep a beat are counted with every slot taken: they compute as many rows whoever is there, and slots of other
    nodes of the group may be taken at any time.
    """
    profile = pool.profile
    if pool.split is None or pool.kind is not PoolKind.LPX or not profile.batch_tokens:
        return profile
    tokens = pool.scheduler.sequences_max * profile.pass_tokens
    return replace(profile, batch_tokens=(tokens,), batch_s=(batch_seconds(profile, tokens),))


def token_seconds(profile: CostProfile, step_tokens_max: int) -> float:
    """Return the seconds of one prompt token without context in a full step, the step's base not counted."""
    return profile.prefill_token_s + batch_seconds(profile, step_tokens_max) / step_tokens_max


def prompt_seconds(profile: CostProfile, tokens: int, context: int, step_tokens_max: int) -> float:
    """Return the seconds for a whole uncached run of a prompt, cut into as many steps as it needs.

    Each token attends to the context and to the tokens before it, half of them on average.
    """
    if tokens <= 0:
        return 0.0
    full, last = divmod(tokens, step_tokens_max)
    steps = full + (last > 0)
    attention_s = tokens * profile.prefill_token_context_s * (context + tokens / 2)
    rest_s = tokens * profile.prefill_token_s
    if profile.batch_tokens:
        rest_s += full * batch_seconds(profile, step_tokens_max) + (batch_seconds(profile, last) if last else 0.0)
    return steps * profile.step_s + _joined(profile.overlap, attention_s, rest_s)


def fetch_seconds(profile: CostProfile, size_bytes: int) -> float:
    """Return the seconds until `size_bytes` of blocks have come from another node."""
    if size_bytes <= 0:
        return 0.0
    return profile.fetch_latency_s + size_bytes / profile.fetch_bytes_per_s


def smoothed(average: float, newest: float, steps: int = 1) -> float:
    """Return an exponential average after `steps` more steps of a value."""
    return newest + (average - newest) * (1.0 - SCALE_WEIGHT) ** steps


def smoothed_scale(scale: float, predicted_s: float, measured_s: float, steps: int = 1) -> float:
    """Return the scale after more steps: an exponential average of measured over predicted time."""
    if predicted_s <= 0.0:
        return scale
    return smoothed(scale, min(max(measured_s / predicted_s, scale / SCALE_CLIP), scale * SCALE_CLIP), steps)


def _joined(overlap: float, attention_s: float, rest_s: float) -> float:
    return (1.0 - overlap) * (attention_s + rest_s) + overlap * max(attention_s, rest_s)


def _sum(first: float, growth: float, start: int, end: int) -> float:
    """Return the sum of first + i * growth for i in [start, end)."""
    return (end - start) * (first + growth * (start + end - 1) / 2)
