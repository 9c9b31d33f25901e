"""Runs an engine's steps beside the event loop: in a thread of its own if it computes, inline if it only passes time."""

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

from orchestrator.core.commands import RunStep
from orchestrator.core.types import RequestId, Sampling
from workers.engines.base import Engine, EngineLost, SliceOutput

#: A step ordered by the end of the one before continues its beat if that came no later than this, so that late wake-ups do not
#: add up.
BEAT_S = 0.002

#: Step, outputs and seconds; or step and why it failed.
Finished = Callable[[RunStep, Sequence[SliceOutput], float], None]
Failed = Callable[[RunStep, str], None]
#: Why no other step can be run.
Lost = Callable[[EngineLost], None]


class Runner(Protocol):
    """One engine, driven from the loop."""

    def add(self, request: RequestId, tokens: "array[int]", sampling: Sampling, generated: int = 0) -> None:
        """Give the engine a request before its first step."""
        ...

    def forget(self, request: RequestId) -> None:
        """Have the engine drop a request, after the step that runs now."""
        ...

    def run(self, command: RunStep) -> None:
        """Run a step; `finished` or `failed` is called on the loop, later."""
        ...

    def close(self) -> None:
        """Wait for the running step; nothing is called afterwards."""
        ...


def open_runner(engine: Engine, finished: Finished, failed: Failed, lost: Lost) -> Runner:
    """Return the runner that fits an engine. Called on the loop that is to be told."""
    return ThreadRunner(engine, finished, failed, lost) if engine.description.computes else InlineRunner(engine, finished, failed)


def failure_of(error: Exception) -> str:
    """Return an engine's error as the reason clients see."""
    return f"{type(error).__name__}: {error}"


class InlineRunner:
    """For engines that return at once: the step's time passes on the loop's clock."""

    def __init__(self, engine: Engine, finished: Finished, failed: Failed) -> None:
        self._engine = engine
        self._finished = finished
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.Handle | None = None
        self._due = 0.0
        #: True while the end of a step is told: what runs next had not to wait for anything.
        self._ending = False
        self.add = engine.add
        self.forget = engine.forget

    def run(self, command: RunStep) -> None:
        started = time.perf_counter()
        try:
            outputs = self._engine.step(command.slices)
        except Exception as error:  # An engine may fail in any way; that ends the step's sequences and not the node.
            self._handle = self._loop.call_soon(self._failed, command, failure_of(error))
            return
        pause = self._engine.pause_s(command.slices, command.decoding)
        if pause > 0.0:
            now = self._loop.time()
            self._due = (self._due if self._ending and now - self._due < BEAT_S else now) + pause
            self._handle = self._loop.call_at(self._due, self._end, command, outputs, started)
        else:
            # Not at once: frames must get out and new work in between two steps.
            self._handle = self._loop.call_soon(self._finished, command, outputs, time.perf_counter() - started)

    def _end(self, command: RunStep, outputs: Sequence[SliceOutput], started: float) -> None:
        self._ending = True
        self._finished(command, outputs, time.perf_counter() - started)
        self._ending = False

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()


class ThreadRunner:
    """For engines that compute: the only thread that calls `add`, `forget` and `step`."""

    def __init__(self, engine: Engine, finished: Finished, failed: Failed, lost: Lost) -> None:
        self._engine = engine
        self._finished = finished
        self._failed = failed
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        #: Adds and forgets that go along with the next step, in order; bounded by the node's requests.
        self._changes: list[Callable[[], None]] = []
        self._flush: asyncio.Handle | None = None
        self._running = False
        self._closed = False
        self._jobs: SimpleQueue[tuple[list[Callable[[], None]], RunStep | None] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def add(self, request: RequestId, tokens: "array[int]", sampling: Sampling, generated: int = 0) -> None:
        self._changes.append(lambda: self._engine.add(request, tokens, sampling, generated))

    def forget(self, request: RequestId) -> None:
        self._changes.append(lambda: self._engine.forget(request))
        if self._flush is None:
            self._flush = self._loop.call_soon(self._flush_changes)

    def run(self, command: RunStep) -> None:
        self._running = True
        self._submit(command)

    def close(self) -> None:
        self._closed = True
        if self._flush is not None:
            self._flush.cancel()
        self._jobs.put(None)
        self._thread.join()

    def _flush_changes(self) -> None:
        """Tell an idle engine what to drop; a busy one hears it with its next step."""
        self._flush = None
        if self._changes and not self._running:
            self._submit(None)

    def _submit(self, command: RunStep | None) -> None:
        changes, self._changes = self._changes, []
        self._jobs.put((changes, command))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            changes, command = job
            started = time.perf_counter()
            try:
                for change in changes:
                    change()
                outputs = self._engine.step(command.slices) if command is not None else ()
            except EngineLost as error:
                self._loop.call_soon_threadsafe(self._on_lost, error)
            except Exception as error:  # An engine may fail in any way; that ends the step's sequences and not the node.
                if command is None:
                    raise
                self._loop.call_soon_threadsafe(self._on_failed, command, failure_of(error))
            else:
                if command is not None:
                    seconds = time.perf_counter() - started
                    self._loop.call_soon_threadsafe(self._on_finished, command, outputs, seconds)

    def _on_finished(self, command: RunStep, outputs: Sequence[SliceOutput], seconds: float) -> None:
        self._running = False
        if not self._closed:
            self._finished(command, outputs, seconds)
            self._flush_changes()

    def _on_failed(self, command: RunStep, reason: str) -> None:
        self._running = False
        if not self._closed:
            self._failed(command, reason)
            self._flush_changes()

    def _on_lost(self, error: EngineLost) -> None:
        if not self._closed:
            self._lost(error)
