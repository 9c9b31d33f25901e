"""The process of a node's engine that keeps a beat: it computes, waits for the next beat, and does nothing else.

The node's own process has the event loop, gRPC, the node's core and the copies of KV. It says over a socket what to do, one
message after the other, and gets each step's tokens back as soon as they are there; both map the memory of the KV blocks.

What must not vary from beat to beat does not: there is no event loop and no other thread that runs Python, the garbage collector
runs between beats alone and never looks at objects that stay, memory that a step gives back is kept for the next one, and a step
has as many rows as there are slots, however many are taken.

It ends when the other end of the socket does, or when an FFN rank is lost that it has.
"""

import gc
import sys
import time
from array import array
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from orchestrator.core.commands import Slice
from orchestrator.core.config import require
from orchestrator.core.types import RequestId
from orchestrator.wire import node_pb2
from workers.engines.base import EngineLost
from workers.engines.beat.messages import (
    Add,
    Forget,
    MemoryGiven,
    MemoryWanted,
    Opened,
    Opening,
    Step,
    Stepped,
    Unopened,
    Unstepped,
)
from workers.engines.beat.schedule import Beat, SystemClock
from workers.engines.beat.trial import longest_step_s
from workers.engines.eager import EagerEngine
from workers.memory import map_memory
from workers.realtime import bind, keep_memory, keep_objects, put_first

#: Share of a beat that its longest step may take: the rest is for the way to the node's core and back, and for what this machine
#: does besides.
WORK_SHARE_MAX = 0.8
#: Beats between two collections of the youngest garbage, and idle seconds after which there is time for all of it.
COLLECT_BEATS, COLLECT_IDLE_S = 256, 1.0


def open_engine(opening: Opening, link: "Connection[object, object]") -> tuple[EagerEngine, float]:
    """Return the engine, over memory that the other end gives, and the seconds of its longest step. Raises `ConfigError`."""
    bind(opening.beat.cores, "beat.cores")
    put_first(opening.beat.realtime)
    keep_memory()

    def allocate(size: int) -> memoryview:
        link.send(MemoryWanted(size))
        given = link.recv()
        assert isinstance(given, MemoryGiven), f"{given} is no memory"
        return map_memory(node_pb2.SharedMemory.FromString(given.place), writable=True)

    slots, places = opening.slots, opening.places
    engine = EagerEngine(opening.model_dir, opening.engine, slots, opening.step_tokens_max, allocate, places, rows=slots)
    worst_s = longest_step_s(engine, slots, opening.model_dir, places, time.monotonic)
    context, least_s = engine.description.context_tokens_max, worst_s / WORK_SHARE_MAX
    require(
        opening.beat_s >= least_s,
        "profile.beat_s",
        f"must be at least {least_s:.6f} s, is {opening.beat_s}: a step of {slots} sequences of {context} tokens takes "
        f"{worst_s:.6f} s here and may take {WORK_SHARE_MAX:.0%} of a beat (a smaller scheduler.sequences_max or "
        "engine.context_tokens_max makes it shorter)",
    )
    return engine, worst_s


class BeatLoop:
    """Does what it is told, steps on the beat."""

    def __init__(self, engine: EagerEngine, beat: Beat, link: "Connection[object, object]") -> None:
        self._engine = engine
        self._beat = beat
        self._link = link
        #: Requests of the last step.
        self._before: set[RequestId] = set()
        self._steps = 0

    def run(self) -> None:
        """Serve until the other end is gone: raises `EOFError` or an `OSError` then."""
        while True:
            self.obey(self._next())

    def obey(self, order: object) -> None:
        """Do one thing."""
        match order:
            case Add(request, tokens, sampling, generated):
                self._engine.add(request, array("I", tokens), sampling, generated)
            case Forget(request):
                self._engine.forget(request)
            case Step(slices):
                self._step(slices)
            case _:
                raise AssertionError(f"{order!r} is no order")

    def _step(self, slices: Sequence[Slice]) -> None:
        requests = {part.request for part in slices}
        self._beat.wait(not self._before.isdisjoint(requests))
        self._before = requests
        answer: Stepped | Unstepped
        try:
            outputs = self._engine.step(slices)
        except EngineLost:
            raise
        except Exception as error:  # An engine may fail in any way; that ends the step's sequences and not the node.
            answer = Unstepped(f"{type(error).__name__}: {error}")
        else:
            self._beat.done()
            answer = Stepped(outputs, self._beat.counts, self._engine.halves)
        self._link.send(answer)
        self._steps += 1
        if self._steps % COLLECT_BEATS == 0:
            gc.collect(0)

    def _next(self) -> object:
        if not self._link.poll(COLLECT_IDLE_S):
            gc.collect()
        return self._link.recv()


def serve(link: "Connection[object, object]") -> None:
    """Open an engine, say what it is or why it cannot be had, and keep its beat."""
    opening = link.recv()
    assert isinstance(opening, Opening), f"{opening!r} is no opening"
    try:
        engine, worst_s = open_engine(opening, link)
    except Exception as error:  # Whatever it is, the other end says it, and nothing runs here.
        link.send(Unopened.by(error, opening.pool))
        return
    keep_objects()
    gc.disable()
    link.send(Opened(engine.description, worst_s, engine.halves))
    BeatLoop(engine, Beat(opening.beat_s, worst_s, opening.beat.spin_s, SystemClock()), link).run()


def main() -> None:
    """Serve the other end of the socket whose descriptor is the argument."""
    with suppress(EOFError, OSError):
        serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
