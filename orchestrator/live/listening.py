"""What a gateway's links to nodes and to stores have in common: they listen, notice who is silent, and try again.

See also: `links.py` and `stores.py`.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

from orchestrator.core.silence import Silence

#: Seconds between two tries: doubled from the first to the last, a random tenth added.
RETRY_S_MIN = 0.05
RETRY_S_MAX = 1.0
#: Seconds that the other end has to answer Hello.
WELCOME_S_MAX = 5.0

Frame = TypeVar("Frame")


class Stream(Protocol):
    """A call that is read from."""

    async def read(self) -> object: ...


class _Watch:
    """Ends the reading of a stream on which nothing has come for `lost_s`, a third of it later at most."""

    def __init__(self, reading: asyncio.Timeout, lost_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._reading = reading
        self.silence = Silence(lost_s, self._loop.time())
        self._timer = self._loop.call_at(self.silence.look_at, self._look)

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        if self.silence.look(now):
            self._reading.reschedule(now)
        else:
            self._timer = self._loop.call_at(self.silence.look_at, self._look)


async def listen(stream: Stream, kind: type[Frame], lost_s: float, take: Callable[[Frame], None]) -> str | None:
    """Take frames until the stream ends; return None then, and what is wrong if nothing has come for `lost_s`."""
    try:
        async with asyncio.timeout(None) as reading:
            watch = _Watch(reading, lost_s)
            try:
                while isinstance(frame := await stream.read(), kind):
                    watch.silence.heard()
                    take(frame)
            finally:
                watch.close()
    except TimeoutError:
        return f"nothing came from it for {lost_s:g} s"
    return None


def report_breakdown(task: asyncio.Task[None]) -> None:
    """Show an error that ended a link at once, not when the task is collected."""
    if not task.cancelled() and (error := task.exception()) is not None:
        task.get_loop().call_exception_handler({"message": "a link broke down", "exception": error})
