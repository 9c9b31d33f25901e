"""When a context will be wanted again, as far as anybody can tell: what gateways predict and block pools forget by.

An outlook is a curve: by each age of a context, counted from the end of its last turn, how likely its next turn has come. What
the context is worth follows from it at any moment: the best rate at which keeping it from now on, until some later age and no
longer, brings a next turn.

    probability   1 |                       _________  some never come back
                    |            __________/
                    |       ____/          the steepest line from where we are to any later point, over the time that the context
                    | _____/               is kept on average until then
                  0 +-----+----+----------+--------->  age
                         now
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log
from typing import NewType

#: Names a context in the cluster: the number of the first request that had it.
ContextId = NewType("ContextId", int)
#: Points of a curve at most.
KNOTS_MAX = 24


@dataclass(frozen=True, slots=True)
class Outlook:
    """When one context will be wanted again."""

    context: ContextId
    #: Ages in seconds, ascending, and how likely the next turn has come by each: 0 at age 0, straight on a logarithmic scale in
    #: between, no further rise after the last. Empty: it never comes.
    ages_s: tuple[float, ...] = ()
    chances: tuple[float, ...] = ()

    @staticmethod
    def problem(ages_s: Sequence[float], chances: Sequence[float]) -> str | None:
        """Return why ages and chances are no outlook, None if they are."""
        if len(ages_s) != len(chances) or len(ages_s) > KNOTS_MAX:
            return f"{len(ages_s)} ages and {len(chances)} chances: must be as many, {KNOTS_MAX} at most"
        last_s = last = 0.0
        for age_s, chance in zip(ages_s, chances, strict=True):
            if not (last_s < age_s < inf and last <= chance <= 1.0):
                return f"chance {chance} by age {age_s} after {last} by {last_s}: both must ascend"
            last_s, last = age_s, chance
        return None

    def chance(self, age_s: float) -> float:
        """Return how likely the next turn has come by an age."""
        place = bisect_right(self.ages_s, age_s)
        if place == len(self.ages_s):
            return self.chances[-1] if self.chances else 0.0
        before_s, before = (self.ages_s[place - 1], self.chances[place - 1]) if place else (0.0, 0.0)
        after_s = self.ages_s[place]
        share = log(age_s / before_s) / log(after_s / before_s) if before_s else age_s / after_s
        return before + (self.chances[place] - before) * share

    def per_second(self, age_s: float) -> float:
        """Return what a second of keeping the context from an age on brings at best, in next turns; 0 once none is expected."""
        place = bisect_right(self.ages_s, age_s)
        if place == len(self.ages_s):
            return 0.0
        start = self.chance(age_s)
        rise = self.chances[-1] - start
        best = kept_s = 0.0
        before_s, before = age_s, start
        for end_s, chance in zip(self.ages_s[place:], self.chances[place:], strict=True):
            kept_s += (end_s - before_s) * (1.0 - (before + chance) / 2)
            if kept_s > 0.0:
                best = max(best, (chance - start) / kept_s)
                if rise / kept_s <= best:  # no later age can bring more
                    break
            before_s, before = end_s, chance
        return best


def risen(hazards: Sequence[float]) -> tuple[float, ...]:
    """Return how likely the next turn has come by the end of each range: by its hazard unless it came before."""
    chances: list[float] = []
    chance = 0.0
    for hazard in hazards:
        chance += (1.0 - chance) * hazard
        chances.append(chance)
    return tuple(chances)
