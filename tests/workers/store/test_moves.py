"""Moves between the arena and cmx: how reads are shared out among threads, and that each ends whatever the others do."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import cast

import pytest

from orchestrator.core.commands import ReadCmx
from orchestrator.core.events import CmxRead, StoreEvent
from orchestrator.core.types import BlockHash, ModelName, MoveFailure, MoveId, SlotId
from workers.store import moves
from workers.store.arena import Arena, Part
from workers.store.cmx import Cmx, CmxFailed, Damage
from workers.store.moves import Carried, Moves

MODEL, BLOCK_BYTES, BLOCKS = ModelName("m"), 512, 4
SEGMENT_BYTES = BLOCKS * BLOCK_BYTES
WAIT_S = 10.0


class Folder:
    """Segments that come as a test says."""

    folder = True
    segment_bytes = SEGMENT_BYTES

    def __init__(self, bad: dict[int, Exception]) -> None:
        self.bad = bad
        #: Which segments each thread has begun to read.
        self.begun: dict[int, list[int]] = {}
        self.changed = threading.Condition()
        self.go_on = threading.Event()

    def read(self, segment: BlockHash, slabs: Sequence[memoryview], stopped: Callable[[], bool]) -> None:
        number = segment[0]
        with self.changed:
            self.begun.setdefault(threading.get_ident(), []).append(number)
            self.changed.notify_all()
        assert self.go_on.wait(WAIT_S)
        if number in self.bad:
            raise self.bad[number]
        slabs[0][:1] = bytes((number,))

    def wait_begun(self, threads: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.begun) == threads, WAIT_S)


class Reads:
    """Moves of so many reads on a machine with two processors."""

    def __init__(self, folder: Folder, count: int) -> None:
        self.folder = folder
        self.arena = Arena({MODEL: Part(0, BLOCK_BYTES, count * BLOCKS)})
        self.events: dict[int, MoveFailure | None] = {}
        self.all_ended = asyncio.Event()
        self.carried: list[Carried] = []
        self.count = count
        self.moves = Moves(self.arena, {MODEL: cast(Cmx, folder)}, self._on_event, self.carried.append)
        for number in range(count):
            slots = tuple(SlotId(number * BLOCKS + block) for block in range(BLOCKS))
            self.moves.read(ReadCmx(MoveId(number), MODEL, BlockHash(bytes((number,)) * 16), slots))

    def _on_event(self, event: StoreEvent) -> None:
        assert isinstance(event, CmxRead)
        assert event.move not in self.events, f"move {event.move} ends twice"
        self.events[event.move] = event.failure
        if len(self.events) == self.count:
            self.all_ended.set()

    async def finish(self) -> None:
        self.folder.go_on.set()
        await asyncio.wait_for(self.all_ended.wait(), WAIT_S)
        await self.moves.close()
        self.arena.close()


@pytest.fixture(autouse=True)
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})


@pytest.mark.parametrize(
    ("count", "batch", "seconds", "shares"),
    [
        (1, 4, 60.0, [1]),
        (2, 4, 60.0, [1, 1]),
        (5, 4, 60.0, [2, 3]),
        (8, 4, 60.0, [4, 4]),
        (11, 3, 60.0, None),
        (11, 3, 0.0, None),  # as if each took too long: the rest of a batch waits again
    ],
)
def test_reads_that_wait_are_shared_out_and_none_is_read_twice(
    count: int, batch: int, seconds: float, shares: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "BATCH_READS", batch)
    monkeypatch.setattr(moves, "BATCH_S", seconds)

    async def scenario() -> None:
        reads = Reads(folder := Folder({}), count)
        await asyncio.to_thread(folder.wait_begun, min(count, 2))  # no more threads than processors
        await reads.finish()
        assert sorted(number for numbers in folder.begun.values() for number in numbers) == list(range(count))
        assert reads.events == dict.fromkeys(range(count))
        assert [one.bytes for one in reads.carried] == [SEGMENT_BYTES] * count
        firsts = [bytes(reads.arena.slabs(MODEL, [SlotId(number * BLOCKS)])[0])[0] for number in range(count)]
        assert firsts == list(range(count))
        if shares is not None:
            assert sorted(map(len, folder.begun.values())) == shares

    asyncio.run(scenario())


def test_what_fails_or_is_given_up_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "BATCH_S", 60.0)

    async def scenario() -> None:
        bad = {1: CmxFailed(Damage.CORRUPT, "it is damaged"), 2: RuntimeError("nobody thought of this")}
        reads = Reads(folder := Folder(bad), 8)
        await asyncio.to_thread(folder.wait_begun, 2)
        reads.moves.cancel(MoveId(3))  # its turn has not come in the thread that has it
        await reads.finish()
        failed = {1: MoveFailure.DAMAGED, 2: MoveFailure.UNAVAILABLE, 3: MoveFailure.CANCELLED}
        assert reads.events == {number: failed.get(number) for number in range(8)}
        assert 3 not in {number for numbers in folder.begun.values() for number in numbers}
        assert reads.moves.damages == {Damage.CORRUPT: 1, Damage.STOPPED: 1}

    asyncio.run(scenario())


def test_a_batch_that_is_given_up_keeps_nobody_from_closing() -> None:
    async def scenario() -> None:
        reads = Reads(folder := Folder({}), 8)
        await asyncio.to_thread(folder.wait_begun, 2)
        closing = asyncio.ensure_future(reads.moves.close())
        await asyncio.sleep(0)  # it has said so to all that run
        folder.go_on.set()
        await asyncio.wait_for(closing, WAIT_S)
        reads.arena.close()
        assert sorted(number for numbers in folder.begun.values() for number in numbers) == [0, 4]

    asyncio.run(scenario())
