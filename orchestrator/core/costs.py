"""How long steps and fetches take: predicted from a node's profile, corrected by what its steps really took.

The router predicts with it, the node keeps its scale, and the profiled engine takes exactly this time, so that a prediction
error is always an error of the profile and never of a second formula.
"""

from collections.abc import Iterable

from orchestrator.core.types import CostProfile

#: Weight of the newest step in the smoothed scale: about the last 20 steps count.
SCALE_WEIGHT = 0.05
#: A single step may be off by this factor at most before it is clipped (a page fault, a compile, a suspended machine).
SCALE_CLIP = 8.0


def step_seconds(profile: CostProfile, prefills: Iterable[tuple[int, int]], sequences: int, context_tokens: int) -> float:
    """Return the seconds of one step.

    Args:
        profile: the node's coefficients.
        prefills: (tokens computed, context tokens before them) of each prompt chunk.
        sequences: sequences that decode a token.
        context_tokens: the context of all of those together.
    """
    total = profile.step_s + sequences * profile.sequence_s + context_tokens * profile.context_token_s
    for tokens, context in prefills:
        total += prefill_seconds(profile, tokens, context)
    return total


def prefill_seconds(profile: CostProfile, tokens: int, context: int) -> float:
    """Return the seconds for computing `tokens` of a prompt after `context` tokens, without the step's base.

    Each token attends to the context and to the tokens before it, half of them on average.
    """
    return tokens * (profile.prefill_token_s + profile.prefill_token_context_s * (context + tokens / 2))


def prompt_seconds(profile: CostProfile, tokens: int, context: int, step_tokens_max: int) -> float:
    """Return the seconds for a whole uncached run of a prompt, cut into as many steps as it needs."""
    if tokens <= 0:
        return 0.0
    steps = -(-tokens // step_tokens_max)
    return steps * profile.step_s + prefill_seconds(profile, tokens, context)


def fetch_seconds(profile: CostProfile, size_bytes: int) -> float:
    """Return the seconds until `size_bytes` of blocks have come from another node."""
    if size_bytes <= 0:
        return 0.0
    return profile.fetch_latency_s + size_bytes / profile.fetch_bytes_per_s


def smoothed_scale(scale: float, predicted_s: float, measured_s: float) -> float:
    """Return the scale after one more step: an exponential average of measured over predicted time."""
    if predicted_s <= 0.0:
        return scale
    ratio = min(max(measured_s / predicted_s, scale / SCALE_CLIP), scale * SCALE_CLIP)
    return scale + SCALE_WEIGHT * (ratio - scale)
