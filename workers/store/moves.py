"""Carries blocks between a host's memory and `cmx`: what a prompt waits for first, a few at a time, in threads of their own.

What moves, and how much of it at once, is the core's decision (`ReadCmx`, `WriteCmx`, `CancelMove`, `DeleteCmx`); every move ends
in exactly one event. A segment is not written while it is being removed.
"""

import asyncio
import heapq
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from orchestrator.core.commands import DeleteCmx, ReadCmx, WriteCmx
from orchestrator.core.events import CmxFound, CmxRead, CmxWritten, StoreEvent
from orchestrator.core.types import BlockHash, ModelName, MoveFailure, MoveId
from workers.store.arena import Arena
from workers.store.cmx import FAILURES, Cmx, CmxFailed, Damage, readers

#: Moves at once to and from a bucket: enough to have several requests under way.
THREADS = 8
#: Reads that a thread does one after the other before the loop hears of them, for so many seconds at most: to hear of each by
#: itself costs as much as reading half a megabyte of a folder that is in memory.
BATCH_READS, BATCH_S = 8, 0.003
#: Segments told of at a time, and seconds after which a listing that failed is tried again.
PAGE_SEGMENTS, LIST_AGAIN_S = 4096, 60.0
#: Seconds between two lines in the log about moves that failed.
FAILURE_LOG_S = 1.0
_Segment = tuple[ModelName, BlockHash]
log = logging.getLogger("weft.store")


@dataclass(frozen=True, slots=True)
class Carried:
    """A move that went well: which way, how many bytes, how long it took."""

    source: str
    target: str
    bytes: int
    seconds: float


@dataclass(slots=True, order=True)
class _Job:
    """A move that waits or runs: reads before writes before removals, then first come, first served."""

    urgency: int
    serial: int
    command: ReadCmx | WriteCmx | DeleteCmx = field(compare=False)
    stopped: bool = field(default=False, compare=False)


class Moves:
    """All moves of one store.

    Args:
        arena: the host's memory.
        cmx: by model, where its segments are.
        handle: takes events to the core; never called from within the methods here.
        carried: is told of every move that went well.

    Made on a running loop.
    """

    def __init__(
        self,
        arena: Arena,
        cmx: Mapping[ModelName, Cmx],
        handle: Callable[[StoreEvent], None],
        carried: Callable[[Carried], None],
    ) -> None:
        self._arena = arena
        self._cmx = cmx
        self._handle = handle
        self._carried = carried
        self._loop = asyncio.get_running_loop()
        folders = all(one.folder for one in cmx.values())
        self._moves_max = readers() if folders else THREADS
        # One thread for each model's listing, which must not keep a move from its own.
        self._threads = ThreadPoolExecutor(self._moves_max + len(cmx), thread_name_prefix="cmx")
        self._serial = 0
        self._waiting: list[_Job] = []
        self._running: set[asyncio.Future[None]] = set()
        self._moves: dict[MoveId, _Job] = {}
        #: Segments that are to be removed; True once that is under way.
        self._removing: dict[_Segment, bool] = {}
        #: Writes of segments that are being removed.
        self._held: dict[_Segment, _Job] = {}
        self._finding: list[asyncio.Task[None]] = []
        self._closed = False
        #: What went wrong, by reason.
        self.damages: Counter[Damage] = Counter()
        self._failure_told_s = 0.0

    def find(self) -> None:
        """Begin to tell the core what is there."""
        self._finding = [asyncio.ensure_future(self._find(model, cmx)) for model, cmx in self._cmx.items()]

    def read(self, command: ReadCmx) -> None:
        """Execute `ReadCmx`."""
        self._moves[command.move] = self._add(0, command)

    def write(self, command: WriteCmx) -> None:
        """Execute `WriteCmx`."""
        segment = (command.model, command.segment)
        under_way = self._removing.pop(segment, None)
        if under_way:  # it goes on when that is over; one that only waits is not needed any more
            self._removing[segment] = True
            self._serial += 1
            self._held[segment] = self._moves[command.move] = _Job(1, self._serial, command)
            return
        self._moves[command.move] = self._add(1, command)

    def cancel(self, move: MoveId) -> None:
        """Execute `CancelMove`."""
        job = self._moves.get(move)
        if job is not None:
            job.stopped = True

    def delete(self, command: DeleteCmx) -> None:
        """Execute `DeleteCmx`."""
        for segment in command.segments:
            self._removing.setdefault((command.model, segment), False)
        self._add(2, command)

    async def close(self) -> None:
        """Stop at once; what is being copied is waited for."""
        self._closed = True
        for task in self._finding:
            task.cancel()
        for job in self._moves.values():
            job.stopped = True
        self._waiting.clear()
        if self._running:
            await asyncio.wait(self._running)
        self._threads.shutdown(wait=False)

    def _add(self, urgency: int, command: ReadCmx | WriteCmx | DeleteCmx) -> _Job:
        self._serial += 1
        job = _Job(urgency, self._serial, command)
        heapq.heappush(self._waiting, job)
        self._loop.call_soon(self._start)
        return job

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._moves_max and not self._closed:
            future = asyncio.ensure_future(self._run(self._next()))
            self._running.add(future)
            future.add_done_callback(self._ended)

    def _ended(self, future: "asyncio.Future[None]") -> None:
        self._running.discard(future)
        self._start()

    def _next(self) -> list[_Job]:
        """Take what one thread is to do next: several reads, if more of them wait than there are threads."""
        jobs = [heapq.heappop(self._waiting)]
        first = jobs[0].command
        if isinstance(first, ReadCmx):
            share = -(-(1 + len(self._waiting)) // (self._moves_max - len(self._running)))
            while len(jobs) < min(share, BATCH_READS) and self._waiting and isinstance(self._waiting[0].command, ReadCmx):
                jobs.append(heapq.heappop(self._waiting))
        return jobs

    async def _run(self, jobs: list[_Job]) -> None:
        command = jobs[0].command
        if isinstance(command, DeleteCmx):
            await self._remove(command)
            return
        ends = await self._loop.run_in_executor(self._threads, self._move_all, jobs)
        for job in jobs[len(ends) :]:
            heapq.heappush(self._waiting, job)
        for job, end in zip(jobs, ends, strict=False):
            assert not isinstance(job.command, DeleteCmx)
            self._moved(job.command, end)

    def _moved(self, command: ReadCmx | WriteCmx, end: float | Exception) -> None:
        """Tell how a move ended: after so many seconds, or by an error."""
        del self._moves[command.move]
        failure: MoveFailure | None = None
        if isinstance(end, CmxFailed):
            failure = FAILURES[end.reason]
            self.count(end)
        elif isinstance(end, Exception):
            failure = MoveFailure.UNAVAILABLE
            log.error("%s failed", command, exc_info=end)
        else:
            way = ("cmx", "cpu") if isinstance(command, ReadCmx) else ("cpu", "cmx")
            self._carried(Carried(*way, self._cmx[command.model].segment_bytes, end))
        self._handle(CmxRead(command.move, failure) if isinstance(command, ReadCmx) else CmxWritten(command.move, failure))

    def _move_all(self, jobs: list[_Job]) -> list[float | Exception]:
        """Carry out moves, one after the other. Returns for each that had its turn the seconds it took, or why it failed."""
        ends: list[float | Exception] = []
        began = started = time.perf_counter()
        for job in jobs:
            try:
                self._move(job)
                end: float | Exception = time.perf_counter() - started
            except Exception as error:  # Whatever it was: a move that never ended would keep its slots for ever.
                end = error
            ends.append(end)
            started = time.perf_counter()
            if started - began > BATCH_S:
                break
        return ends

    def _move(self, job: _Job) -> None:
        command = job.command
        assert not isinstance(command, DeleteCmx)
        if job.stopped:
            raise CmxFailed(Damage.STOPPED, "it was given up before it began")
        cmx, slabs = self._cmx[command.model], self._arena.slabs(command.model, command.slots)
        if isinstance(command, ReadCmx):
            cmx.read(command.segment, slabs, lambda: job.stopped)
        else:
            cmx.write(command.segment, slabs)

    async def _remove(self, command: DeleteCmx) -> None:
        wanted = [segment for segment in command.segments if self._removing.get((command.model, segment)) is False]
        for segment in wanted:
            self._removing[command.model, segment] = True
        try:
            await self._loop.run_in_executor(self._threads, self._cmx[command.model].delete, wanted)
        except CmxFailed as error:
            self.count(error)
        for segment in wanted:
            del self._removing[command.model, segment]
            held = self._held.pop((command.model, segment), None)
            if held is not None:
                heapq.heappush(self._waiting, held)

    def count(self, error: CmxFailed) -> None:
        """Count what went wrong, here or at a node that reads by itself, and tell people of it now and then."""
        self.damages[error.reason] += 1
        if error.reason is not Damage.STOPPED and self._loop.time() - self._failure_told_s >= FAILURE_LOG_S:
            self._failure_told_s = self._loop.time()
            log.warning("cmx: %s (%s; so far %s)", error, error.reason, dict(self.damages))

    async def _find(self, model: ModelName, cmx: Cmx) -> None:
        """Tell what is there, the oldest first; a bucket that cannot be listed is tried again."""
        while True:
            try:
                found = await self._loop.run_in_executor(self._threads, _listed, cmx)
                break
            except CmxFailed as error:
                self.count(error)
            await asyncio.sleep(LIST_AGAIN_S)
        log.info("cmx holds %d segments of model %s", len(found), model)
        for first in range(0, len(found), PAGE_SEGMENTS):
            self._handle(CmxFound(model, tuple(found[first : first + PAGE_SEGMENTS])))
            await asyncio.sleep(0)  # others have their turn between two pages


def _listed(cmx: Cmx) -> list[BlockHash]:
    cmx.sweep()
    found = [one for page in cmx.found() for one in page]
    found.sort(key=lambda one: -one.age_s)
    return [one.segment for one in found]
