"""Virtual time: what is to happen when. Nothing passes between two entries, so a quiet hour costs as much as a quiet second."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Agenda:
    """A heap of things to do; what is due at one moment happens in the order in which it was asked for."""

    __slots__ = ("_heap", "_serial", "now")

    def __init__(self) -> None:
        #: Seconds since the start.
        self.now = 0.0
        self._serial = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next_at(self) -> float | None:
        """When the next thing happens; None if nothing will."""
        return self._heap[0][0] if self._heap else None

    def at(self, when: float, action: Callable[..., None], *arguments: Any) -> None:
        """Do something at a time that has not passed."""
        assert when >= self.now, f"asked for at {when}, it is {self.now}"
        self._serial += 1
        heappush(self._heap, (when, self._serial, action, arguments))

    def step(self) -> None:
        """Let the next thing happen."""
        self.now, _, action, arguments = heappop(self._heap)
        action(*arguments)
