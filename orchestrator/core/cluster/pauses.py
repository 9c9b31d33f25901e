"""Learns how long contexts pause between their turns, by class: as they come, in a table of fixed size.

Ages fall into ranges that grow twofold. Of each range it is counted how many contexts have reached it and how many of those
came back within: the hazard. That counts the ones rightly that have not come back so far, and may never:

    age      0     1/4    1/2     1      2      4     ...
             |------|------|------|------|------|
    reached    9      7      7      4      3             of 9 that paused, 2 came back within 1/4 s, 3 between 1/2 s and 1 s, ..
    returned   2      0      3      1      0

What a class did counts before what is known of all.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

#: Ends of the ranges, seconds: a quarter of a second to some hours.
EDGES_S = tuple(0.25 * 2.0**power for power in range(16))
#: Hazard of every range until something is known: nothing depends on the age then, which makes it least recently used.
HAZARD = 0.3
#: The same of what a session has left: few come back to it.
HAZARD_LEFT = 0.1
#: Pauses after which a table halves what it counts, so that it follows what changes.
COUNTED_MAX = 4096.0

T = TypeVar("T")


class Hazards:
    """Pauses of one class."""

    __slots__ = ("reached", "returned")

    def __init__(self) -> None:
        #: Of each range.
        self.reached = [0.0] * len(EDGES_S)
        self.returned = [0.0] * len(EDGES_S)

    def reach(self, place: int) -> None:
        """Count one that pauses for so long that it reaches a range."""
        self.reached[place] += 1.0
        if self.reached[place] > COUNTED_MAX:
            self.reached = [count / 2 for count in self.reached]
            self.returned = [count / 2 for count in self.returned]

    def come_back(self, place: int) -> None:
        """Count one that came back within a range that it had reached."""
        self.returned[place] += 1.0

    def forget(self, place: int) -> None:
        """Count one no longer that has got as far as a range."""
        for earlier in range(place + 1):
            self.reached[earlier] = max(0.0, self.reached[earlier] - 1.0)

    def over(self, wider: Sequence[float], weight: float) -> list[float]:
        """Return the hazard of each range, by this table as far as it knows and else by those of a wider one."""
        return [
            (returned + weight * hazard) / (max(reached, returned) + weight)
            for reached, returned, hazard in zip(self.reached, self.returned, wider, strict=True)
        ]

    def return_chance(self, wider: Sequence[float], weight: float) -> float:
        """Return how likely one comes back at all, taking what is known of younger ages to tell of older ones.

        Few have reached those: by `over` they would be expected most of what never comes back. As many times as the wider table
        says as the next younger ones are, they hardly are then.
        """
        absent, times = 1.0, 1.0
        for reached, returned, hazard in zip(self.reached, self.returned, wider, strict=True):
            expected = (returned + weight * min(times * hazard, 1.0)) / (max(reached, returned) + weight)
            absent *= 1.0 - expected
            times = expected / hazard
        return 1.0 - absent


def range_of(age_s: float) -> int | None:
    """Return the range that an age is in; None beyond the last."""
    place = bisect_right(EDGES_S, age_s)
    return place if place < len(EDGES_S) else None


class Ages(Generic[T]):
    """Tells of everything that pauses when it gets from one range of ages into the next.

    What pauses no more is kept until then: at most twice as long as it paused.
    """

    __slots__ = ("_count", "_ranges")

    def __init__(self) -> None:
        #: By range, the one that paused first in front: (when, what).
        self._ranges: tuple[deque[tuple[float, T]], ...] = tuple(deque() for _ in EDGES_S)

    def pause(self, now: float, one: T) -> None:
        """Note that something begins to pause."""
        self._ranges[0].append((now, one))

    def pass_time(self, now: float, reach: Callable[[T, float, int], bool]) -> None:
        """Call `reach` with what gets into a next range, since when it pauses, and the range; it says whether it still does."""
        for place in range(len(EDGES_S) - 1, -1, -1):
            waiting, edge_s = self._ranges[place], EDGES_S[place]
            while waiting and now - waiting[0][0] >= edge_s:
                since_s, one = waiting.popleft()
                self._advance(now, since_s, one, place + 1, reach)

    def _advance(self, now: float, since_s: float, one: T, place: int, reach: Callable[[T, float, int], bool]) -> None:
        while place < len(EDGES_S) and reach(one, since_s, place):
            if now - since_s < EDGES_S[place]:
                self._ranges[place].append((since_s, one))
                return
            place += 1
