"""Notes when a node starts on a prompt, for requests that are being traced."""

import time
from collections.abc import Callable

from orchestrator.core.commands import RunStep
from orchestrator.core.types import RequestId


class Beginnings:
    """The first steps of timed requests, until they are told.

    Args:
        clock: seconds, monotonic.
    """

    __slots__ = ("_began_s", "_clock", "_unstepped")

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        #: Both have at most the requests that the node has: all of them end.
        self._began_s: dict[RequestId, float] = {}
        self._unstepped: set[RequestId] = set()

    def watch(self, request: RequestId) -> None:
        """Note when the request's first step comes."""
        self._unstepped.add(request)

    def stepped(self, step: RunStep) -> None:
        """Take in that a step begins."""
        if self._unstepped:
            for part in step.slices[step.decoding :]:
                if part.request in self._unstepped:
                    self._unstepped.discard(part.request)
                    self._began_s[part.request] = self._clock()

    def told(self, request: RequestId) -> float:
        """Return how many seconds ago the request's first step began, and forget it; 0 if it is not timed or had none."""
        began_s = self._began_s.pop(request, None)
        return 0.0 if began_s is None else self._clock() - began_s

    def ended(self, request: RequestId) -> float:
        """Return the same of a request that is over, of which nothing is kept."""
        self._unstepped.discard(request)
        return self.told(request)
