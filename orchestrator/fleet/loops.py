"""An event loop in a thread of its own: how a Ray actor, whose methods are called from Ray's threads, runs asyncio servers."""

import asyncio
import gc
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

Result = TypeVar("Result")

#: Allocations between two collections of the young, and collections of one generation between two of the next. Python's own
#: figures suit programs that keep little; a server that keeps indexes and caches would look through them all the time.
_COLLECT_AFTER = (50_000, 20, 50)
#: Seconds the thread gets to end once its loop was told to stop.
_JOIN_S = 5.0


def serve_long() -> None:
    """Tell the garbage collector that what exists now stays, and to look at what comes less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)


class LoopThread:
    """A running event loop; `run` may be called from any other thread."""

    def __init__(self, name: str) -> None:
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result], timeout_s: float | None = None) -> Result:
        """Run a coroutine on the loop and return its result; raises what it raises, or `TimeoutError`, which cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_JOIN_S)
        if not self._thread.is_alive():
            self._loop.close()
