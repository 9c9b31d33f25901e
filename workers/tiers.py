"""A node's end of its host's store: offers what the node caches, loads what the node is told to, straight between two memories.

What is offered and loaded is the core's decision (`Offer`, `LoadBlocks`); where it lies in the host's memory, or in which segment
of a folder, is the store's. One copy each way, off the loop and never on the engine's thread, a piece at a time; loads before
offers. Without a store, or while there is none, offers and loads end at once and the node computes.

    slots      of the host's memory, which this node maps: copied to or from the pool, or converted by the engine
    segments   that are in `cmx` alone, if that is a folder that the node can read and the pool holds blocks as they are stored:
               read from their files into the pool's blocks, by several threads, and checked there before anybody is told of them

Rules for editors. 1: a block is read or written only between the command and the event that ends it. 2: slots that a call granted
are touched while that call lasts, or in the one piece that was being copied as it ended: the next call begins after that piece,
so that a store which hears a new hello knows that nothing of the former call goes on. 3: blocks that a segment was read into hold
anything until its checksum was compared, and for ever if it was another: they count as brought only then.
"""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, takewhile

import grpc
import grpc.aio

from orchestrator.core.blocks import pack_hashes
from orchestrator.core.commands import LoadBlocks, Offer
from orchestrator.core.config import KvFormat
from orchestrator.core.cost.costs import fetch_seconds
from orchestrator.core.events import FetchEnded, FetchProgressed, NodeEvent, OfferEnded
from orchestrator.core.types import (
    BlockHash,
    BlockId,
    CostProfile,
    MoveFailure,
    NodeSpec,
    OfferId,
    RequestId,
    StoreId,
    Tier,
    is_prefetch,
)
from orchestrator.wire import store_pb2, store_pb2_grpc
from orchestrator.wire.trust import Caller, Trust
from workers.engines.base import Engine, NotEncodable
from workers.memory import Copier, TransferFailed, TransferLimits, copy_bytes, map_memory, populate, through
from workers.store.cmx import FAILURES, Cmx, CmxFailed, Damage, open_folder, readers
from workers.transports import range_of, runs

#: Seconds between two tries to reach a store: doubled from the first to the second.
RETRY_S_MIN, RETRY_S_MAX = 0.05, 2.0
#: Segments are read in pieces so many times as large as others: threads that have read one wait for each other.
PIECE_FRAMES = 2
#: Bytes of a store's memory that are mapped at a time while there is nothing to copy.
TOUCHED_BYTES = 64 * 1024 * 1024
#: Seconds in which a store must answer a hello.
HELLO_S_MAX = 5.0
#: Seconds that the end of a call waits for its last word.
GOODBYE_S_MAX = 1.0
log = logging.getLogger("weft.node")


@dataclass(frozen=True, slots=True)
class StorePlace:
    """Where a store is."""

    id: StoreId
    address: str


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that were copied, for whom, and how long that took."""

    source: str
    target: str
    bytes: int
    seconds: float
    #: The request that they are for, and seconds since the first of them; None for an offer.
    request: RequestId | None = None
    began_s_ago: float = 0.0


@dataclass(slots=True)
class _Offer:
    """An offer that has not ended."""

    command: Offer
    #: Where its blocks go, from number `first` on; None until the store has answered.
    slots: tuple[int, ...] | None = None
    first: int = 0
    copied: int = 0
    seconds: float = 0.0
    stopped: bool = False


@dataclass(slots=True)
class _Way:
    """What of a load came from one tier."""

    blocks: int = 0
    seconds: float = 0.0
    began_s: float = 0.0

    def add(self, blocks: int, seconds: float) -> None:
        """Count blocks that have just come, and the seconds that it took."""
        self.began_s = self.began_s or time.perf_counter() - seconds
        self.seconds += seconds
        self.blocks += blocks


@dataclass(slots=True)
class _Load:
    """A load that has not ended."""

    command: LoadBlocks
    read: int
    #: Where it reads segments by itself, if it does.
    folder: Cmx | None
    answers: deque[store_pb2.Slots] = field(default_factory=deque[store_pb2.Slots])
    #: What came out of the host's memory, and what straight from `cmx`.
    cpu: _Way = field(default_factory=_Way)
    cmx: _Way = field(default_factory=_Way)
    #: Blocks that came from `cmx`, this way or that.
    cmx_blocks: int = 0
    #: Blocks of the first answer that are copied already.
    copied: int = 0
    stopped: bool = False
    #: Whether a segment failed: none after it is read.
    failed: bool = False

    @property
    def blocks(self) -> int:
        """Blocks that came."""
        return self.cpu.blocks + self.cmx.blocks


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is copied at a time."""

    blocks: list[BlockId]
    slots: list[int]


class _Reading:
    """Segments that are read at a time: each thread that runs this takes the next one, until one of them fails."""

    def __init__(self, folder: Cmx, segments: Sequence[tuple[BlockHash, list[memoryview]]], stopped: Callable[[], bool]) -> None:
        self._folder = folder
        self._segments = segments
        self._stopped = stopped
        #: Those that nobody has taken, and what went wrong with others, by place. Used by several threads at once.
        self._left = deque(range(len(segments)))
        self._failures: dict[int, CmxFailed] = {}

    def run(self) -> None:
        """Read segments until none is left. From any thread."""
        while True:
            try:
                place = self._left.popleft()
            except IndexError:
                return
            name, slabs = self._segments[place]
            try:
                self._folder.read(name, slabs, self._stopped)
            except CmxFailed as error:
                self._failures[place] = error
                self._left.clear()

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return len(self._segments) * self._folder.segment_bytes

    @property
    def came(self) -> int:
        """How many, the first ones, are there and right, once all threads are through."""
        # They are taken in order: whatever comes before one that failed was taken, and not by a thread that failed.
        return min(self._failures, default=len(self._segments))

    @property
    def failure(self) -> CmxFailed | None:
        """Why the one behind those is not there."""
        return self._failures.get(self.came)


class _Arena:
    """The model's part of a store's memory, mapped."""

    def __init__(self, placed: store_pb2.Arena, block_bytes: int) -> None:
        first, size = placed.first_byte, placed.slots * block_bytes
        if first + size > placed.memory.size:
            raise TransferFailed(f"{placed.slots} slots from byte {first} on are not within {placed.memory.size} bytes")
        self.slots = placed.slots
        self._block_bytes = block_bytes
        self._view = map_memory(placed.memory, writable=True)[first : first + size]
        self._touched = 0

    @property
    def fresh(self) -> bool:
        """Whether the first copies from or to some of it would wait for the kernel to map its pages: half of their time."""
        return self._touched < len(self._view)

    def touch(self) -> None:
        """Have the next part of it mapped. From any thread."""
        part = self._view[self._touched : self._touched + TOUCHED_BYTES]
        populate(part)
        self._touched += len(part)

    def slabs(self, slot: int, count: int) -> memoryview:
        """Return the bytes of neighbouring slots."""
        return self._view[slot * self._block_bytes : (slot + count) * self._block_bytes]


class Tiers:
    """One node's use of its host's store.

    Args:
        spec: the node.
        engine: whose blocks are copied.
        profile: what copies must appear to take, for engines that only pass time; None for others.
        copier: runs copies in threads.
        trust: of the cluster.
        limits: bounds of what is copied at a time.
        handle: takes events to the core; never called from within `offer`, `load` or `stop`.
        moved: is told what was copied.

    Made on a running loop.
    """

    def __init__(
        self,
        spec: NodeSpec,
        engine: Engine,
        profile: CostProfile | None,
        copier: Copier,
        trust: Trust,
        limits: TransferLimits,
        handle: Callable[[NodeEvent], None],
        moved: Callable[[Moved], None],
    ) -> None:
        self._spec = spec
        self._engine = engine
        known = engine.description
        #: The engine's blocks, where copying their bytes is all there is to do.
        self._pool = engine.pool if known.stored_layout.startswith(KvFormat.PLAIN) else None
        self._profile = profile
        self._copier = copier
        self._trust = trust
        self._handle = handle
        self._moved = moved
        self._loop = asyncio.get_running_loop()
        self._block_bytes = known.stored_bytes
        self._piece_blocks = max(1, limits.frame_bytes_max // self._block_bytes)
        self._place: StorePlace | None = None
        self._arena: _Arena | None = None
        #: The store's folder, while this node can read from it by itself.
        self._folder: Cmx | None = None
        #: Set while there is an arena.
        self._has_arena = asyncio.Event()
        #: Set while all of it is mapped.
        self._mapped = asyncio.Event()
        self._offers: dict[OfferId, _Offer] = {}
        #: Offers that ended before the store answered them: their grants are given back.
        self._unanswered: set[OfferId] = set()
        self._loads: dict[RequestId, _Load] = {}
        self._reads: dict[int, _Load] = {}
        self._reads_opened = 0
        self._frame = store_pb2.AttachFrame()
        self._said = asyncio.Event()
        #: Something may be copied.
        self._work = asyncio.Event()
        self._attaching: asyncio.Task[None] | None = None

    # --- told by the driver -------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether there is a store now."""
        return self._arena is not None

    async def wait_attached(self, seconds: float) -> bool:
        """Wait until there is a store, for so long at most. Returns whether there is one."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._has_arena.wait(), seconds)
        return self.attached

    async def wait_mapped(self, seconds: float) -> bool:
        """Wait until all of its memory is mapped, for which there is time while nothing is copied; returns whether it is."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._mapped.wait(), seconds)
        return self._mapped.is_set()

    def use(self, place: StorePlace | None) -> None:
        """Take another store from now on, or none."""
        if place == self._place:
            return
        self._place = place
        if self._attaching is not None:
            self._attaching.cancel()
        former, self._attaching = self._attaching, None
        if place is not None or former is not None:
            self._attaching = self._loop.create_task(self._attach(place, former))

    def offer(self, command: Offer) -> None:
        """Execute `Offer`."""
        if self._arena is None:
            self._loop.call_soon(self._handle, OfferEnded(command.offer, "there is no store"))
            return
        self._offers[command.offer] = _Offer(command)
        self._frame.offers.add(offer=command.offer, parent=command.parent or b"", hashes=pack_hashes(command.hashes))
        self._said.set()

    def stop_offer(self, offer: OfferId) -> None:
        """Execute `StopOffer`; what is being copied is copied to its end."""
        found = self._offers.get(offer)
        if found is not None:
            found.stopped = True
            self._work.set()

    def load(self, command: LoadBlocks) -> None:
        """Execute `LoadBlocks`."""
        if self._arena is None:
            tokens = command.first_block * self._spec.block_tokens
            self._loop.call_soon(self._handle, FetchEnded(command.request, tokens, failure="there is no store"))
            return
        self._reads_opened += 1
        load = _Load(command, self._reads_opened, self._folder)
        self._loads[command.request] = self._reads[load.read] = load
        hashes = pack_hashes(command.hashes)
        self._frame.reads.add(
            read=load.read,
            hashes=hashes,
            first_block=command.first_block,
            tokens=command.tokens,
            background=is_prefetch(command.request),
            direct=load.folder is not None,
        )
        self._said.set()

    def stop(self, request: RequestId) -> bool:
        """Execute `StopFetch`. Returns False if that request loads nothing."""
        load = self._loads.get(request)
        if load is not None:
            load.stopped = True
            self._work.set()
        return load is not None

    async def close(self) -> None:
        """Give the store up and wait for the last copy."""
        self.use(None)
        if self._attaching is not None:
            await asyncio.wait((self._attaching,))

    # --- the call -----------------------------------------------------------------------------------------------------

    async def _attach(self, place: StorePlace | None, former: asyncio.Task[None] | None) -> None:
        """Be attached to a store for as long as that is the one."""
        if former is not None:
            await asyncio.wait((former,))
        wait_s = RETRY_S_MIN
        # Not for ever by itself: what it waits for at the end of a call may hide that it was cancelled.
        while place is not None and self._attaching is asyncio.current_task():
            began = self._loop.time()
            try:
                await self._call(place)
            except (grpc.aio.AioRpcError, TransferFailed, TimeoutError) as error:
                text = (error.details() or "") if isinstance(error, grpc.aio.AioRpcError) else str(error)
                log.log(
                    logging.WARNING if wait_s == RETRY_S_MIN else logging.DEBUG,
                    "node %s is without its store %s: %s", self._spec.id, place.id, text or type(error).__name__,
                )  # fmt: skip
            wait_s = RETRY_S_MIN if self._loop.time() - began > RETRY_S_MAX else min(2 * wait_s, RETRY_S_MAX)
            await asyncio.sleep(wait_s)

    async def _call(self, place: StorePlace) -> None:
        """Make one call and serve it until it breaks; all offers and loads of it have ended then."""
        async with self._trust.open_channel(place.address) as channel:
            call = store_pb2_grpc.StoreStub(channel).Attach(metadata=self._trust.metadata(Caller.ATTACHED, place.id))
            tasks: list[asyncio.Task[None]] = []
            try:
                await call.write(store_pb2.AttachFrame(hello=self._hello()))
                first = await asyncio.wait_for(call.read(), HELLO_S_MAX)
                if not isinstance(first, store_pb2.ArenaFrame) or not first.HasField("arena"):
                    raise TransferFailed("it does not begin with its memory")
                self._folder = await asyncio.to_thread(self._open_folder, first.arena)
                self._arena = _Arena(first.arena, self._block_bytes)
                self._has_arena.set()
                log.info("node %s is attached to store %s", self._spec.id, place.id)
                work = (self._read_all(call), self._write_all(call), self._copy_all())
                tasks = [asyncio.ensure_future(one) for one in work]
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                self._arena = self._folder = None
                self._has_arena.clear()
                self._mapped.clear()
                try:
                    await _ended(tasks)
                finally:
                    self._lose_all(f"store {place.id} is gone")
                # Nothing is copied any more; a call that is broken cannot be told anything.
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
                    await asyncio.wait_for(call.write(store_pb2.AttachFrame(goodbye=True)), GOODBYE_S_MAX)
                    await asyncio.wait_for(call.done_writing(), GOODBYE_S_MAX)
                call.cancel()

    def _open_folder(self, placed: store_pb2.Arena) -> Cmx | None:
        """Return where this node can read segments by itself: into a pool that holds blocks as they are stored."""
        if self._pool is None or not placed.HasField("folder"):
            return None
        known = self._engine.description
        return open_folder(placed.folder, known.fingerprint, known.stored_layout, known.block_tokens, known.stored_bytes)

    def _hello(self) -> store_pb2.NodeHello:
        known = self._engine.description
        return store_pb2.NodeHello(
            node=self._spec.id,
            model=self._spec.model,
            fingerprint=known.fingerprint,
            layout=known.stored_layout,
            block_tokens=known.block_tokens,
            block_bytes=known.stored_bytes,
            process=os.getpid(),
            host=self._spec.host,
        )

    async def _read_all(self, call: grpc.aio.StreamStreamCall) -> None:
        while isinstance(frame := await call.read(), store_pb2.ArenaFrame):
            self._take(frame)
        raise TransferFailed("it has ended the call")

    async def _write_all(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            await self._said.wait()
            self._said.clear()
            frame, self._frame = self._frame, store_pb2.AttachFrame()
            await call.write(frame)

    def _take(self, frame: store_pb2.ArenaFrame) -> None:
        for grant in frame.grants:
            self._granted(grant)
        for answer in frame.slots:
            self._check_slots(answer.slots)
            load = self._reads.get(answer.read)
            if load is not None:
                load.answers.append(answer)
                self._work.set()

    def _granted(self, grant: store_pb2.Grant) -> None:
        offer = OfferId(grant.offer)
        self._check_slots(grant.slots)
        if offer in self._unanswered:
            self._unanswered.discard(offer)
            if grant.slots:
                self._say_written(offer, 0)
            return
        found = self._offers.get(offer)
        if found is None or found.slots is not None or grant.first + len(grant.slots) > len(found.command.blocks):
            raise TransferFailed(f"it grants {len(grant.slots)} slots for what was not offered")
        if not grant.slots:
            self._end_offer(found, "what comes before is not held" if grant.orphan else None)
            return
        found.first, found.slots = grant.first, tuple(grant.slots)
        self._work.set()

    def _check_slots(self, slots: Sequence[int]) -> None:
        arena = self._arena
        if arena is not None and slots and max(slots) >= arena.slots:
            raise TransferFailed(f"slot {max(slots)} is beyond the {arena.slots} that there are")

    # --- copies -------------------------------------------------------------------------------------------------------

    async def _copy_all(self) -> None:
        """Copy piece by piece: what a prompt waits for first."""
        while True:
            self._work.clear()
            if await self._copy_for_load() or await self._copy_for_offer():
                continue
            if self._arena is not None and self._arena.fresh:
                await self._copier.run_blocking(self._arena.touch)
            else:
                self._mapped.set()
                await self._work.wait()

    async def _copy_for_load(self) -> bool:
        """Copy the next piece of the load that has waited longest, prefetches' last. Returns False if there is none."""
        for load in sorted(self._loads.values(), key=lambda load: is_prefetch(load.command.request)):
            if load.stopped:
                self._end_load(load, "stopped")
            elif load.answers:
                await (self._read_piece(load) if load.answers[0].HasField("segment") else self._load_piece(load))
                return True
        return False

    async def _load_piece(self, load: _Load) -> None:
        """Copy what was answered and is not copied yet, a piece of it at most."""
        command, first, slots = load.command, load.blocks, self._next_slots(load)
        if first + len(slots) > len(command.blocks):
            raise TransferFailed(f"it serves more than the {len(command.blocks)} blocks asked for")
        seconds = await self._copied(_Piece(list(command.blocks[first : first + len(slots)]), slots), self._copy_in)
        if slots:
            load.cpu.add(len(slots), seconds)
        load.copied += len(slots)
        answers, final = 0, False
        while load.answers and not final and _copied_whole(load.answers[0], load.copied):
            answer = load.answers.popleft()
            load.copied -= len(answer.slots)
            load.cmx_blocks += answer.cmx_blocks
            answers, final = answers + 1, answer.final
        if not answers:
            return
        self._frame.copied.add(read=load.read, answers=answers)
        self._said.set()
        if final:
            self._end_load(load, None)
        elif slots:
            self._handle(FetchProgressed(command.request, self._tokens(load)))

    def _next_slots(self, load: _Load) -> list[int]:
        """Return the slots of the next piece: several answers' if they are small, each of which would wake a thread by itself."""
        slots: list[int] = []
        skipped = load.copied
        for answer in takewhile(lambda answer: not answer.HasField("segment"), load.answers):
            slots += answer.slots[skipped : skipped + self._piece_blocks - len(slots)]
            if answer.final or len(slots) == self._piece_blocks:
                break
            skipped = 0
        return slots

    async def _read_piece(self, load: _Load) -> None:
        """Read the next segments, as many as a piece has; those behind one that failed, or that were given up, are not read."""
        if load.failed or load.answers[-1].final:
            unread = len(tuple(takewhile(lambda answer: answer.HasField("segment"), load.answers)))
            self._pass_segments(load, unread)
            return
        reading, ends = self._next_segments(load)
        seconds = await self._read(reading, len(ends))
        came, failure = reading.came, reading.failure
        if came:
            blocks = ends[came - 1] - load.command.first_block - load.blocks
            load.cmx.add(blocks, seconds)
            load.cmx_blocks += blocks
        if failure is None or load.stopped:
            self._pass_segments(load, came)
        else:
            load.failed = True
            self._pass_segments(load, came + 1, failure.reason)
            self._on_failure(failure)
        if came:
            self._handle(FetchProgressed(load.command.request, self._tokens(load), direct=True))

    def _pass_segments(self, load: _Load, count: int, failure: Damage | None = None) -> None:
        """Be done with the next answers; the last of them failed for that reason, if any."""
        for _ in range(count):
            load.answers.popleft()
        if count:
            self._frame.copied.add(read=load.read, answers=count, failure=failure or "")
            self._said.set()

    def _next_segments(self, load: _Load) -> tuple[_Reading, list[int]]:
        """Return what is to be read next, and up to which block of the prompt each segment of it brings that."""
        folder, arena = load.folder, self._arena
        if folder is None:
            raise TransferFailed("it serves a segment to a node that does not read any")
        count = max(readers(), PIECE_FRAMES * self._piece_blocks // folder.segment_blocks)
        first, segments, ends = load.command.first_block + load.blocks, list[tuple[BlockHash, list[memoryview]]](), list[int]()
        for answer in islice(takewhile(lambda answer: answer.HasField("segment"), load.answers), count):
            end = answer.tokens // self._spec.block_tokens
            segments.append(self._segment(load.command, folder.segment_blocks, answer.segment, first, end))
            ends.append(end)
            first = end
        return _Reading(folder, segments, lambda: load.stopped or self._arena is not arena), ends

    def _segment(self, command: LoadBlocks, size: int, number: int, first: int, end: int) -> tuple[BlockHash, list[memoryview]]:
        """Return a segment's name, and where its blocks go of which those from `first` to `end` of the prompt are wanted.

        The others are read too, since the checksum is over all of them: one over the other, into memory that nobody uses.
        """
        assert self._pool is not None, "the engine's blocks cannot be read into"
        start, wanted = number * size, command.blocks[first - command.first_block : end - command.first_block]
        inside = start <= first < end <= start + size <= len(command.hashes)
        if not inside or len(wanted) != end - first:
            raise TransferFailed(f"it serves blocks {first} to {end} of a prompt in segment {number} of {size} blocks")
        nowhere = [memoryview(bytearray(self._block_bytes))] if end - first < size else []
        there = [self._slabs(self._pool, block, count) for block, _, count in runs(wanted, range(len(wanted)))]
        return command.hashes[start + size - 1], nowhere * (first - start) + there + nowhere * (start + size - end)

    async def _read(self, reading: _Reading, count: int) -> float:
        """Read segments in several threads, and return the seconds it took; all of them are through then, however it ends."""
        started = time.perf_counter()
        threads = (self._copier.run_blocking(reading.run) for _ in range(min(readers(), count)))
        for error in await asyncio.gather(*threads, return_exceptions=True):
            if error is not None:
                raise TransferFailed(f"segments cannot be read: {error!r}") from error
        if self._profile is not None:
            await asyncio.sleep(fetch_seconds(self._profile, reading.bytes))
        return time.perf_counter() - started

    def _on_failure(self, failure: CmxFailed) -> None:
        """Read nothing more by itself if the folder cannot be read from here: the store may still be able to."""
        if FAILURES[failure.reason] is MoveFailure.UNAVAILABLE and self._folder is not None:
            log.warning("node %s leaves reading %s to its store: %s", self._spec.id, Tier.CMX, failure)
            self._folder = None

    async def _copy_for_offer(self) -> bool:
        """Copy the next piece of the offer that has waited longest. Returns False if there is none."""
        for offer in tuple(self._offers.values()):
            if offer.stopped:
                self._end_offer(offer, "stopped")
            elif offer.slots is not None:
                await self._offer_piece(offer, offer.slots)
                return True
        return False

    async def _offer_piece(self, offer: _Offer, granted: tuple[int, ...]) -> None:
        slots = list(granted[offer.copied : offer.copied + self._piece_blocks])
        first = offer.first + offer.copied
        piece = _Piece(list(offer.command.blocks[first : first + len(slots)]), slots)
        try:
            offer.seconds += await self._copied(piece, self._copy_out)
        except NotEncodable as error:
            self._end_offer(offer, str(error))
            return
        offer.copied += len(slots)
        if offer.copied == len(granted):
            whole = offer.first + offer.copied == len(offer.command.blocks)
            self._end_offer(offer, None if whole else "there is no room for all of it")

    async def _copied(self, piece: _Piece, copy: Callable[[_Piece, _Arena], None]) -> float:
        """Copy a piece, off the loop, and return the seconds it took."""
        arena = self._arena
        assert arena is not None, "copying without a store"
        started = time.perf_counter()
        size = len(piece.blocks) * self._block_bytes
        # Small copies are made on the loop, which waits for them; for converting blocks it never does.
        run = self._copier.run_blocking if self._pool is None else partial(self._copier.run, size)
        try:
            await run(lambda: copy(piece, arena))
        except NotEncodable:
            raise
        except Exception as error:  # An engine may fail in any way; that ends the call and not the node.
            raise TransferFailed(f"{len(piece.blocks)} blocks cannot be copied: {error!r}") from error
        if self._profile is not None:
            await asyncio.sleep(fetch_seconds(self._profile, size))
        return time.perf_counter() - started

    def _copy_in(self, piece: _Piece, arena: _Arena) -> None:
        for block, slot, count in runs(piece.blocks, piece.slots):
            if self._pool is None:
                self._engine.decode_blocks(range_of(block, count), arena.slabs(slot, count))
            else:
                copy_bytes(self._slabs(self._pool, block, count), arena.slabs(slot, count))

    def _copy_out(self, piece: _Piece, arena: _Arena) -> None:
        for block, slot, count in runs(piece.blocks, piece.slots):
            if self._pool is None:
                self._engine.encode_blocks(range_of(block, count), arena.slabs(slot, count))
            else:
                copy_bytes(arena.slabs(slot, count), self._slabs(self._pool, block, count))

    def _slabs(self, pool: memoryview, block: int, count: int) -> memoryview:
        return pool[block * self._block_bytes : (block + count) * self._block_bytes]

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _tokens(self, load: _Load) -> int:
        """Return the prompt tokens that are there without a hole."""
        each = self._spec.block_tokens
        return max(load.command.first_block * each, min((load.command.first_block + load.blocks) * each, load.command.tokens))

    def _end_load(self, load: _Load, failure: str | None) -> None:
        request = load.command.request
        del self._loads[request], self._reads[load.read]
        if self._arena is not None:
            self._frame.closed.append(load.read)
            self._said.set()
        for tier, way in ((Tier.CPU, load.cpu), (Tier.CMX, load.cmx)):
            if way.blocks:
                ago = time.perf_counter() - way.began_s
                self._moved(Moved(tier, Tier.HBM, way.blocks * self._block_bytes, way.seconds, request, ago))
        cmx_tokens = load.cmx_blocks * self._spec.block_tokens
        direct = load.cmx.blocks > 0
        self._handle(FetchEnded(request, self._tokens(load), failure=failure, cmx_tokens=cmx_tokens, direct=direct))

    def _end_offer(self, offer: _Offer, failure: str | None) -> None:
        number = offer.command.offer
        del self._offers[number]
        if self._arena is not None:
            if offer.slots is not None:
                self._say_written(number, offer.copied)
            elif offer.stopped:
                self._unanswered.add(number)
        if offer.copied:
            self._moved(Moved(Tier.HBM, Tier.CPU, offer.copied * self._block_bytes, offer.seconds))
        self._handle(OfferEnded(number, failure))

    def _say_written(self, offer: OfferId, blocks: int) -> None:
        self._frame.written.add(offer=offer, blocks=blocks)
        self._said.set()

    def _lose_all(self, reason: str) -> None:
        """End what the call began: nothing is copied any more."""
        for load in tuple(self._loads.values()):
            self._end_load(load, reason)
        for offer in tuple(self._offers.values()):
            self._end_offer(offer, reason)
        self._unanswered.clear()
        self._frame = store_pb2.AttachFrame()
        self._said.clear()
        self._work.clear()


def _copied_whole(answer: store_pb2.Slots, copied: int) -> bool:
    """Tell whether an answer's slots are all copied, if it has any, after so many of them."""
    return not answer.HasField("segment") and copied >= len(answer.slots)


async def _ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait for them, even if cancelled meanwhile; what went wrong in them is known, or follows from that."""
    for task in tasks:
        task.cancel()
    await through(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()
