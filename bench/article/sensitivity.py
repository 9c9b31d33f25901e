"""Which unpublished numbers a result hangs on: the result at both ends of each one's range, and the value that a target takes."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import inf, sqrt

from orchestrator.profiles.catalog import Assumption, Catalog

#: A value is sought this far beyond either end of an assumption's range.
REACH = 20.0
BISECTIONS = 40
#: Units of what cannot be more than all of something.
PARTS, WHOLE = ("share", "chance"), 0.999

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

    @property
    def best_end(self) -> float:
        """The end at which the result is larger."""
        low, high = (-inf if end is None else end for end in (self.result_low, self.result_high))
        return self.high if high > low else self.low

    @property
    def result_at_best(self) -> float | None:
        """The result at that end; None if there is none at either."""
        return self.result_high if self.best_end == self.high else self.result_low

    def holds(self, value: float | None) -> bool:
        """Tell whether a value is in the assumption's range."""
        return value is not None and self.low <= value <= self.high


def sensitivities(names: Collection[str], catalog: Catalog, result: Result) -> tuple[Sensitivity, ...]:
    """Return the named assumptions' effects on a result, the largest first; those without any are left out."""
    chosen = [assumption for assumption in catalog.assumptions if assumption.name in names]
    effects = [_sensitivity(assumption, catalog, result) for assumption in chosen]
    return tuple(sorted((effect for effect in effects if effect.swing), key=lambda effect: (-effect.swing, effect.name)))


def _sensitivity(assumption: Assumption, catalog: Catalog, result: Result) -> Sensitivity:
    ends = [result(_with(catalog, assumption.name, end)) for end in (assumption.low, assumption.high)]
    value, low, high = assumption.value, assumption.low, assumption.high
    return Sensitivity(assumption.name, value, low, high, assumption.unit, ends[0], ends[1])


def _with(catalog: Catalog, name: str, value: float) -> Catalog:
    """Return the catalog with one number replaced; the same if it has that value already, as many ends of ranges do."""
    return catalog if catalog.number(name) == value else catalog.overridden({name: value})


def leading(effects: Sequence[Sensitivity]) -> Sensitivity | None:
    """Return the largest effect that leaves a result at both ends, or else the largest."""
    return next((effect for effect in effects if effect.swing < inf), effects[0] if effects else None)


def value_for(effect: Sensitivity, catalog: Catalog, result: Result, target: float) -> float | None:
    """Return the value of one assumption at which a result is `target`; None if no value within reach gives it."""
    if effect.low <= 0:
        return None

    def at(value: float) -> float | None:
        return result(catalog.overridden({effect.name: value}))

    highest = effect.high * REACH
    if effect.unit in PARTS:
        highest = max(effect.high, min(highest, WHOLE))
    wide = crossing(at, effect.low / REACH, highest, target)
    return crossing(at, effect.low, effect.high, target) if wide is None else wide


@dataclass(frozen=True, slots=True)
class Reach:
    """What it would take for a result, which is a ratio, to be as large as stated."""

    target: float
    #: The assumptions that move the result, the largest effect first.
    effects: tuple[Sensitivity, ...]
    #: The one that raises it most, and the value of it that gives the target; None if none does.
    leading: Sensitivity | None
    deciding_value: float | None
    #: The result with one assumption after the other, the largest effect first, set to whichever end raises it.
    at_best: float | None

    @property
    def within_range(self) -> bool:
        """Tell whether that one gives the target within its stated range."""
        return self.leading is not None and self.leading.holds(self.deciding_value)

    def __str__(self) -> str:
        first = self.leading
        if first is None:
            return "no assumption raises it"
        text = f"{first.name} raises it most, from {first.value:g} {first.unit}"
        if first.result_at_best is not None:
            text += f" ({first.result_at_best:.2f}x at {first.best_end:g})"
        if self.deciding_value is not None:
            where = "in" if first.holds(self.deciding_value) else "out of"
            text += f", {self.target:g}x at {self.deciding_value:.3g} ({where} its range)"
        return text if self.at_best is None else f"{text}; with all assumptions at their better ends {self.at_best:.2f}x"


def reach(names: Collection[str], catalog: Catalog, result: Result, target: float) -> Reach:
    """Return what moves a result, and what it would take for it to be `target`."""
    effects = sensitivities(names, catalog, result)
    raising = max(effects, key=lambda effect: effect.result_at_best or -inf, default=None)
    deciding = None if raising is None else value_for(raising, catalog, result, target)
    return Reach(target, effects, raising, deciding, _raised(effects, catalog, result))


def _raised(effects: Collection[Sensitivity], catalog: Catalog, result: Result) -> float | None:
    best = result(catalog)
    for effect in effects:
        for end in (effect.low, effect.high):
            changed = _with(catalog, effect.name, end)
            value = result(changed)
            if value is not None and (best is None or value > best):
                best, catalog = value, changed
    return best


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
