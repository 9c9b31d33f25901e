"""Decides that a peer is lost: it was silent, and we were not the ones asleep."""

#: Signs of life that are given in the time for which silence is borne, at least. One may come two intervals after the one before,
#: and the machine may be busy.
HEARTBEATS = 6
#: Looks that are taken in that time.
LOOKS = 3


class Silence:
    """Whether nothing was heard of somebody for `lost_s` seconds; found a third of them later at most.

    Who stood still itself must not take that for the other's silence: a look that comes late counts as a sign of life.
    """

    __slots__ = ("_heard", "_interval_s", "_silent_looks", "look_at")

    def __init__(self, lost_s: float, now: float) -> None:
        self._interval_s = lost_s / LOOKS
        self._silent_looks = 0
        #: Since the last look.
        self._heard = True
        #: When the next look is due.
        self.look_at = now + self._interval_s

    def heard(self) -> None:
        """Note a sign of life."""
        self._heard = True

    def look(self, now: float) -> bool:
        """Look, and say when to look again; True if it has been silent for too long."""
        late = now - self.look_at > self._interval_s
        self._silent_looks = 0 if self._heard or late else self._silent_looks + 1
        self._heard = False
        self.look_at = now + self._interval_s
        return self._silent_looks >= LOOKS
