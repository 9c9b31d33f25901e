"""Virtual time: what is to happen when. Nothing passes between two entries, so a quiet hour costs as much as a quiet second."""

from collections.abc import Callable, Hashable
from heapq import heappop, heappush
from typing import Any


class Agenda:
    """A heap of things to do; what is due at one moment happens in the order in which it was asked for."""

    __slots__ = ("_heap", "_serial", "_stopped", "now")

    def __init__(self) -> None:
        #: Seconds since the start.
        self.now = 0.0
        self._serial = 0
        self._stopped = False
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

    def run(self, until: float) -> None:
        """Let everything happen that is due by a time, unless `stop` is called meanwhile."""
        heap = self._heap
        self._stopped = False
        while heap and not self._stopped and heap[0][0] <= until:
            self.now, _, action, arguments = heappop(heap)
            action(*arguments)

    def stop(self) -> None:
        """Let nothing more happen in this `run`."""
        self._stopped = True

    def step(self) -> None:
        """Let the next thing happen."""
        self.now, _, action, arguments = heappop(self._heap)
        action(*arguments)


class Timers:
    """The nodes' timers in virtual time; each fires once, at its last setting. See also: `wire/clock.py`."""

    __slots__ = ("_agenda", "_due")

    def __init__(self, agenda: Agenda) -> None:
        self._agenda = agenda
        #: When each fires, by its owner and its key.
        self._due: dict[tuple[Hashable, Hashable], float] = {}

    def set(self, owner: Hashable, key: Hashable, at: float, action: Callable[..., None], *arguments: Any) -> None:
        """Execute `SetTimer`: do something at a time, at once if it has passed."""
        self._due[owner, key] = at
        self._agenda.at(max(at, self._agenda.now), self._fire, (owner, key), at, action, arguments)

    def clear(self, owner: Hashable, key: Hashable) -> None:
        """Execute `ClearTimer`."""
        self._due.pop((owner, key), None)

    def drop(self, owner: Hashable) -> None:
        """Forget all timers of a gateway or a node."""
        for name in [name for name in self._due if name[0] == owner]:
            del self._due[name]

    def _fire(self, name: tuple[Hashable, Hashable], at: float, action: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self._due.get(name) == at:
            del self._due[name]
            action(*arguments)
