"""The article's claims beside what the simulator, the cost model and public numbers say; every verdict is computed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from deploy.figures.sources import Source


class Verdict(StrEnum):
    """How a claim stands."""

    GIVEN = "put in, not found out"  # the session was made to have it
    REPRODUCED = "reproduced"
    ASSUMING = "reproduced with assumptions"  # if something holds that the article or its sources do not say
    NOT_SUPPORTED = "not supported by public numbers"


@dataclass(frozen=True, slots=True)
class Claim:
    """One of the article's numbers and ours."""

    id: str
    text: str
    #: The number as the article has it.
    stated: str
    #: Ours, for people; `numbers` are the same for programs.
    ours: str
    numbers: Mapping[str, float | None]
    #: The formula or the run that gave it.
    how: str
    verdict: Verdict
    #: Why the verdict, by what factor, and what would have to be true.
    reason: str
    support: tuple[Source, ...] = ()
    #: Names of the assumptions in it.
    assumptions: tuple[str, ...] = field(default=())


def judged(value: float, low: float, high: float, what: str) -> tuple[Verdict, str]:
    """Return whether a value lies in the band that the article states, and by what factor it misses it."""
    if low <= value <= high:
        return Verdict.REPRODUCED, f"The {what} lies in the stated range"
    edge, side = (low, "below") if value < low else (high, "above")
    factor = max(value, edge) / min(value, edge)
    return Verdict.NOT_SUPPORTED, f"The {what} lies {side} the stated range by a factor of {factor:.2f}"
