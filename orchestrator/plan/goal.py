"""What a plan must reach and may cost: the service level objective and the budget, and how far a plan is from them."""

from dataclasses import dataclass
from math import inf

from orchestrator.core.types import ServiceClass

#: Share of requests (TTFT) and of tokens (ITL) that must be within the limits, unless it is said: batch work looks at the middle,
#: cadence at the tail, because its promise is steadiness.
PERCENTILES = {
    ServiceClass.BATCH: 0.5,
    ServiceClass.STANDARD: 0.9,
    ServiceClass.INTERACTIVE: 0.9,
    ServiceClass.CADENCE: 0.99,
}


@dataclass(frozen=True, slots=True)
class Price:
    """What a plan takes, of everything that a budget may limit."""

    usd_per_hour: float
    kw: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Slo:
    """How soon first tokens and further tokens must come."""

    ttft_s: float
    itl_s: float
    percentile: float
    #: Seconds of the beat that tokens come on; 0: none is asked for.
    beat_s: float = 0.0

    def excess(self, ttft_s: float, itl_s: float) -> float:
        """Return the share of its limit that the worse of the two takes: 1 or less is within."""
        return max(ttft_s / self.ttft_s, itl_s / self.itl_s)

    def binding(self, ttft_s: float, itl_s: float) -> str:
        """Return the name of the limit that is the nearer one."""
        return "TTFT" if ttft_s / self.ttft_s > itl_s / self.itl_s else "ITL"


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that may be spent; infinite where nothing is said."""

    usd_per_hour: float = inf
    kw: float = inf
    gpus: float = inf

    def allows(self, price: Price) -> bool:
        """Tell whether a price is within every limit."""
        return price.usd_per_hour <= self.usd_per_hour and price.kw <= self.kw and price.gpus <= self.gpus

    def excess(self, price: Price) -> float:
        """Return the largest share of a limit that a price takes."""
        return max(price.usd_per_hour / self.usd_per_hour, price.kw / self.kw, price.gpus / self.gpus)
