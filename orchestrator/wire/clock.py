"""The clock of a machine that runs in real time, and its timers: what both drivers do with `SetTimer` and `ClearTimer`.

See also: `sim/agenda.py`, which does the same in virtual time.
"""

import asyncio
import random
from collections.abc import Callable
from typing import Generic

from orchestrator.core.events import TimerFired
from orchestrator.core.timers import TimerKey


class Timers(Generic[TimerKey]):
    """One machine's clock and timers. Made on a running loop.

    Args:
        fired: takes the event to the machine; each timer fires once, at its last setting.
    """

    __slots__ = ("_fired", "_handles", "_loop", "_offset_s")

    def __init__(self, fired: Callable[[TimerFired[TimerKey]], None]) -> None:
        self._fired = fired
        self._loop = asyncio.get_running_loop()
        # Readings of this clock and of any other differ by hours, so that mixing them up shows at once.
        self._offset_s = random.uniform(1e5, 1e6)
        self._handles: dict[TimerKey, asyncio.TimerHandle] = {}

    @property
    def now(self) -> float:
        """Seconds on the machine's clock."""
        return self._loop.time() + self._offset_s

    def set(self, key: TimerKey, at: float) -> None:
        """Execute `SetTimer`."""
        handle = self._handles.get(key)
        if handle is not None:
            handle.cancel()
        self._handles[key] = self._loop.call_at(at - self._offset_s, self._fire, key)

    def clear(self, key: TimerKey) -> None:
        """Execute `ClearTimer`."""
        handle = self._handles.pop(key, None)
        if handle is not None:
            handle.cancel()

    def close(self) -> None:
        """Let none fire any more."""
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()

    def _fire(self, key: TimerKey) -> None:
        del self._handles[key]
        self._fired(TimerFired(key))
