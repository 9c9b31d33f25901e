"""Whether all that was missed of somebody's holdings has been asked for, and how long to wait before it is asked for again."""

#: Seconds until a resync that did not come is asked for again, doubled each time up to the most.
RESYNC_S = 0.5
RESYNC_S_MAX = 30.0
#: Resyncs asked for in vain after which nothing is believed any more.
RESYNCS_MAX = 5


class Resync:
    """What was asked of one node, or of one store about one model."""

    __slots__ = ("asked", "wait_s")

    def __init__(self) -> None:
        #: Times it was asked for in vain so far; None while none is awaited.
        self.asked: int | None = None
        #: Seconds until it is asked for again.
        self.wait_s = RESYNC_S

    @property
    def awaited(self) -> bool:
        return self.asked is not None

    @property
    def vain(self) -> bool:
        """True once it was asked for so often that nothing is to be believed any more."""
        return self.asked is not None and self.asked >= RESYNCS_MAX

    def ask(self) -> None:
        """Note that it is asked for, perhaps again."""
        self.asked = 0 if self.asked is None else self.asked + 1
        self.wait_s = RESYNC_S if self.asked == 0 else min(2 * self.wait_s, RESYNC_S_MAX)

    def end(self) -> None:
        """Note that all has come."""
        self.asked = None
