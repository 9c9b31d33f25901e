"""How evenly a skewed load of experts falls on the chips that hold them: spread by number, and with copies placed by load."""

from dataclasses import dataclass
from functools import lru_cache
from random import Random

from orchestrator.core.experts import imbalance, place_experts


@dataclass(frozen=True, slots=True)
class Balance:
    """By how much the busiest chip has more to do than the mean, as a share of the mean."""

    #: With experts spread by their number, as where nothing was measured yet.
    spread: float
    #: With experts, and copies of hot ones in the spare slots, placed by their load.
    placed: float


def expert_loads(experts: int, skew: float, seed: int) -> tuple[float, ...]:
    """Return loads by a power law: the k-th hottest expert's is k to the power of -skew, and the seed draws which one that is.

    AIConfigurator draws its expert loads from a power law as well (https://github.com/ai-dynamo/aiconfigurator).
    """
    loads = [(rank + 1) ** -skew for rank in range(experts)]
    Random(seed).shuffle(loads)
    return tuple(loads)


@lru_cache(maxsize=256)
def balance_of(experts: int, chips: int, spare_slots: int, skew: float, seed: int) -> Balance:
    """Return the imbalance of such loads on so many chips; where there are more chips than experts, each expert has its own."""
    loads, ranks = expert_loads(experts, skew, seed), min(chips, experts)
    slots = -(-experts // ranks)
    spread = place_experts([0.0] * experts, ranks, slots)
    placed = place_experts(loads, ranks, slots + spare_slots)
    return Balance(imbalance(loads, spread), imbalance(loads, placed))
