"""The article's claims beside what the simulator, the cost model and public numbers say; every verdict follows from numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from bench.article.sources import Source
from orchestrator.cli.report.page import Section, Tone

#: What is "about" a number is within this factor of it, either way: a tenth for one who rounds, as much again for another model.
ABOUT = 1.2


class Verdict(StrEnum):
    """How a claim stands."""

    GIVEN = "put in, not found out"
    REPRODUCED = "reproduced"
    ASSUMING = "reproduced with assumptions"
    NOT_REPRODUCED = "not reproduced"
    NOT_SUPPORTED = "not supported by public numbers"


#: How a verdict looks at a glance.
TONES: Mapping[Verdict, Tone] = {
    Verdict.GIVEN: Tone.NEUTRAL,
    Verdict.REPRODUCED: Tone.GOOD,
    Verdict.ASSUMING: Tone.MIDDLING,
    Verdict.NOT_REPRODUCED: Tone.BAD,
    Verdict.NOT_SUPPORTED: Tone.BAD,
}
#: What the page says of each.
MEANINGS: Mapping[Verdict, str] = {
    Verdict.GIVEN: "the session is ours, made to the article's totals; checked is only that it has them",
    Verdict.REPRODUCED: "our number lies where the claim has it",
    Verdict.ASSUMING: "it does by assumptions, or by some public numbers and not by others",
    Verdict.NOT_REPRODUCED: "ours comes out otherwise, which says as much about our model or session as about the claim",
    Verdict.NOT_SUPPORTED: "from public numbers, and our assumptions where there are none, the claim does not follow",
}


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


@dataclass(frozen=True, slots=True)
class Finding:
    """What one file of `claims/` has found: its claims, the page's sections behind them, and their numbers for programs."""

    claims: tuple[Claim, ...]
    sections: tuple[Section, ...] = ()
    #: As they stand in the JSON file.
    numbers: Mapping[str, Any] = field(default_factory=dict[str, Any])


def judged(value: float, low: float, high: float, what: str, missed: Verdict = Verdict.NOT_SUPPORTED) -> tuple[Verdict, str]:
    """Return whether a value lies in the band that the article states, and by what factor it misses it."""
    if low <= value <= high:
        return Verdict.REPRODUCED, f"The {what} lies in the stated range"
    edge, side = (low, "below") if value < low else (high, "above")
    factor = max(value, edge) / min(value, edge)
    return missed, f"The {what} lies {side} the stated range by a factor of {factor:.2f}"


def about(stated: float) -> tuple[float, float]:
    """Return the band of what is about a stated number."""
    return stated / ABOUT, stated * ABOUT


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to take or to measure what is claimed, and the range that it gives."""

    what: str
    low: float
    high: float

    def within(self, low: float, high: float) -> bool:
        """Tell whether all of the range lies in a band."""
        return low <= self.low and self.high <= high


def agreement(readings: Sequence[Reading], low: float, high: float) -> tuple[Verdict, list[Reading], list[Reading]]:
    """Return the verdict on a claim that has several readings, those that lie in its band, and those that do not.

    All of them reproduce it, some of them do on the assumption that theirs is the right one, none leaves it without support.
    """
    inside = [one for one in readings if one.within(low, high)]
    outside = [one for one in readings if not one.within(low, high)]
    if not outside and inside:
        return Verdict.REPRODUCED, inside, outside
    return (Verdict.ASSUMING if inside else Verdict.NOT_SUPPORTED), inside, outside


def put_in(*found: tuple[float | None, float, float]) -> tuple[Verdict, str]:
    """Judge what the session was made to have, as (ours, low, high): given if it has all of it, not reproduced otherwise."""
    missed = [value for value, low, high in found if value is None or not low <= value <= high]
    if not missed:
        return Verdict.GIVEN, "The session was made to these numbers, so it only shows that they go together"
    shown = ", ".join("nothing" if value is None else f"{value:,.0f}" for value in missed)
    return Verdict.NOT_REPRODUCED, f"The session does not have what it was made to have: {shown}"
