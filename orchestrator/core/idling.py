"""Measures how long blocks had been unused when they were forgotten for want of room: what has idled longer was kept by somebody.

Pools tell when blocks were used last by running numbers, not by times. So that no block needs a time, some of the numbers are
noted with theirs, ever fewer the longer ago they were:

    numbers   1 ........ 840 ..... 1200 . 1310 . 1402     1350 was given between the last two: at the earlier one's time, nearly
    times     0 s        9 s       12 s   12.8   13.0
"""

from bisect import bisect_right

#: Seconds between two numbers that are noted, at least; how many are before old ones are thinned out; and how exactly the time of
#: one of those stays known, as a share of its age: decades of notes are fewer than half as many then.
NOTE_S = 0.1
NOTED_MAX = 8192
EXACT_SHARE = 1 / 128
#: Blocks that weigh as much as all that were forgotten before them.
WEIGHT_BLOCKS = 256


class Idling:
    """What a pool has forgotten for want of room, and how long that had idled."""

    __slots__ = ("_numbers", "_times", "blocks", "idle_s")

    def __init__(self) -> None:
        self._numbers = [0]
        self._times = [0.0]
        #: Forgotten so far.
        self.blocks = 0
        #: Seconds since they were used last, smoothed over the newest; 0 until one was forgotten.
        self.idle_s = 0.0

    def note(self, number: int, now: float) -> None:
        """Note when a running number was given; most calls do nothing."""
        if now - self._times[-1] < NOTE_S:
            return
        self._numbers.append(number)
        self._times.append(now)
        if len(self._numbers) > NOTED_MAX:
            self._thin_out(now)

    def _thin_out(self, now: float) -> None:
        kept: list[int] = []
        after_s = now + NOTE_S
        for place in range(len(self._times) - 1, -1, -1):
            time = self._times[place]
            if after_s - time >= EXACT_SHARE * (now - time) or not place:
                kept.append(place)
                after_s = time
        kept.reverse()
        self._numbers = [self._numbers[place] for place in kept]
        self._times = [self._times[place] for place in kept]

    def forgotten(self, blocks: int, number: int, now: float) -> None:
        """Count blocks that were used last when a number was given; 0: they were dead, which says nothing of others."""
        self.blocks += blocks
        if not number:
            return
        idle_s = max(0.0, now - self._times[bisect_right(self._numbers, number) - 1])
        self.idle_s += (idle_s - self.idle_s) * (blocks / (blocks + WEIGHT_BLOCKS) if self.idle_s else 1.0)
