"""When the steps of a node that keeps a beat begin: the beats are fixed once for all, and nothing that is late moves them.

    beats      |<------- beat_s ------->|<------- beat_s ------->|<------- beat_s ------->|
    steps      |=== work ===|           |  late |=== work ===|   |  too late: missed      |=== work ===|

A step that comes late begins at once if it will still be done before the next beat; else it waits for that, and the beat is
missed. So is one whose step is not done when the next one begins. While nobody waits for a token beats just pass.

Beats are multiples of `beat_s` on the machine's clock, so that nodes which share FFN ranks have theirs together: from one beat to
the next each of them asks these ranks for one step's rows.
"""

import time
from math import ceil, floor
from typing import Protocol

from workers.engines.base import BeatCounts


class Clock(Protocol):
    """What tells the time and lets it pass, in seconds."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Beat:
    """One node's beats.

    Args:
        beat_s: seconds from one to the next.
        work_s: seconds that a step takes at most.
        spin_s: seconds before a beat at which sleeping ends and looking at the clock begins: a sleeper is woken late.
    """

    def __init__(self, beat_s: float, work_s: float, spin_s: float, clock: Clock) -> None:
        assert work_s <= beat_s, f"a step of {work_s} s does not fit into a beat of {beat_s} s"
        self._beat_s = beat_s
        #: So late a step may begin and still be done before the next beat.
        self._slack_s = beat_s - work_s
        self._spin_s = spin_s
        self._clock = clock
        #: The beat that the next step begins on.
        self._due = floor(clock.now() / beat_s) * beat_s
        self._beats = self._missed = 0
        self._late_s = 0.0

    @property
    def counts(self) -> BeatCounts:
        return BeatCounts(self._beats, self._missed, self._late_s)

    def wait(self, goes_on: bool) -> None:
        """Wait until the next step may begin; it continues sequences of the one before if it `goes_on`."""
        late_s = self._clock.now() - self._due
        if late_s > self._slack_s:
            passed = ceil((late_s - self._slack_s) / self._beat_s)
            self._due += passed * self._beat_s
            self._missed += passed if goes_on else 0
        self._wait_until(self._due)
        self._late_s = self._clock.now() - self._due if goes_on else 0.0
        self._beats += 1
        self._due += self._beat_s

    def done(self) -> None:
        """Note that the step is done, on time or not."""
        self._missed += self._clock.now() > self._due

    def _wait_until(self, due: float) -> None:
        pause_s = due - self._spin_s - self._clock.now()
        if pause_s > 0.0:
            self._clock.sleep(pause_s)
        while self._clock.now() < due:
            pass
