"""Which unpublished numbers a result hangs on: the result at both ends of each one's range, and the value that a target takes."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import inf, sqrt

from orchestrator.profiles.catalog import Assumption, Catalog

#: A value is sought this far beyond either end of an assumption's range.
REACH = 20.0
BISECTIONS = 40

#: A result of a catalog; None if the model does not fit or the result does not exist.
Result = Callable[[Catalog], float | None]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """One result with one assumption at its low and at its high end, all others as they are."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    result_low: float | None
    result_high: float | None

    @property
    def swing(self) -> float:
        """How far the result moves; a result that vanishes at one end moves without bound."""
        if self.result_low is None or self.result_high is None:
            return inf
        return abs(self.result_high - self.result_low)


def sensitivities(names: Collection[str], catalog: Catalog, result: Result) -> tuple[Sensitivity, ...]:
    """Return the named assumptions' effects on a result, the largest first; those without any are left out."""
    chosen = [assumption for assumption in catalog.assumptions if assumption.name in names]
    effects = [_sensitivity(assumption, catalog, result) for assumption in chosen]
    return tuple(sorted((effect for effect in effects if effect.swing), key=lambda effect: (-effect.swing, effect.name)))


def _sensitivity(assumption: Assumption, catalog: Catalog, result: Result) -> Sensitivity:
    ends = [result(catalog.overridden({assumption.name: end})) for end in (assumption.low, assumption.high)]
    value, low, high = assumption.value, assumption.low, assumption.high
    return Sensitivity(assumption.name, value, low, high, assumption.unit, ends[0], ends[1])


def value_for(effect: Sensitivity, catalog: Catalog, result: Result, target: float) -> float | None:
    """Return the value of one assumption at which a result is `target`; None if no value within reach gives it."""
    if effect.low <= 0:
        return None
    return crossing(
        lambda value: result(catalog.overridden({effect.name: value})), effect.low / REACH, effect.high * REACH, target
    )


def crossing(result: Callable[[float], float | None], low: float, high: float, target: float) -> float | None:
    """Return where between two positive numbers a monotonic result is `target`, by halving; None if it is nowhere."""
    at_low, at_high = result(low), result(high)
    if at_low is None or at_high is None or (at_low - target) * (at_high - target) > 0:
        return None
    for _ in range(BISECTIONS):
        middle = sqrt(low * high)
        at_middle = result(middle)
        if at_middle is None:
            return None
        if (at_middle - target) * (at_low - target) > 0:
            low = middle
        else:
            high = middle
    return sqrt(low * high)
