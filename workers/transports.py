"""The ways by which KV blocks get from one node to another; each object here knows both ends of its way.

shm     both on one host: the slabs lie in a memfd that the peer maps by /proc/PID/fd/N, and are copied straight from the
        source's pool (or from a staging arena, if the pool is not in host memory). A killed process leaves nothing behind.
ray     elsewhere: the blocks, in their stored form, become one object in a store both reach (`ObjectStore`; Ray's in
        `ray_transport.py`)
none    the engine keeps no bytes: the target waits as long as its profile says
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from orchestrator.core.cost.costs import fetch_seconds
from orchestrator.core.types import BlockId, CostProfile
from orchestrator.wire import node_pb2
from workers.engines.base import Engine, NotEncodable
from workers.memory import ByteBudget, Copier, PeerMemory, SharedArena, TransferFailed, TransferLimits, copy_bytes

SHM, OBJECT = "shm", "ray"


class ObjectStore(Protocol):
    """A store that source and target both reach; calls block and may come from any thread."""

    def put(self, data: memoryview) -> tuple[object, bytes]:
        """Store bytes. Returns what keeps them alive and the reference a peer needs. Raises `TransferFailed`."""
        ...

    def get(self, reference: bytes, timeout_s: float) -> memoryview:
        """Return the bytes behind a peer's reference. Raises `TransferFailed`."""
        ...


def runs(blocks: Sequence[int], others: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (first block, first other, count) of the runs that are consecutive on both sides."""
    found: list[tuple[int, int, int]] = []
    for block, other in zip(blocks, others, strict=True):
        if found:
            first, first_other, count = found[-1]
            if block == first + count and other == first_other + count:
                found[-1] = (first, first_other, count + 1)
                continue
        found.append((block, other, 1))
    return found


@dataclass(frozen=True, slots=True)
class Offered:
    """One frame's blocks, readable by the peer until `release` is called."""

    frame: node_pb2.BlocksFrame
    release: Callable[[], None]


class Transport(Protocol):
    """One way of bringing blocks across; both ends."""

    async def offer(self, blocks: Sequence[BlockId]) -> Offered:
        """Make blocks readable for a peer. Raises `TransferFailed`."""
        ...

    async def take(self, frame: node_pb2.BlocksFrame, targets: Sequence[BlockId]) -> int:
        """Copy a frame's blocks into this node's; returns the bytes that came. Raises `TransferFailed`."""
        ...


def nothing() -> None:
    """Release nothing: the pool itself was offered."""


class SharedMemoryTransport:
    """Blocks are copied by the peer out of this process' memory."""

    def __init__(
        self, engine: Engine, pool: SharedArena | None, peers: PeerMemory, copier: Copier, limits: TransferLimits
    ) -> None:
        self._engine = engine
        self._block_bytes = engine.description.block_bytes
        self._pool = pool
        self._peers = peers
        self._copier = copier
        self._slots = 0 if pool else max(1, max(limits.staged_bytes_max, limits.frame_bytes_max) // self._block_bytes)
        self._budget = ByteBudget(self._slots)
        self._free = list(range(self._slots))
        self._staging: SharedArena | None = None

    async def offer(self, blocks: Sequence[BlockId]) -> Offered:
        if self._pool is not None:
            return Offered(node_pb2.BlocksFrame(shm=self._pool.place(blocks)), nothing)
        return await self._stage(blocks)

    async def _stage(self, blocks: Sequence[BlockId]) -> Offered:
        if self._staging is None:
            self._staging = SharedArena(self._slots * self._block_bytes)
        arena, size = self._staging, self._block_bytes
        await self._budget.acquire(len(blocks))
        slots = [self._free.pop() for _ in blocks]

        def release() -> None:
            self._free.extend(slots)
            self._budget.release(len(slots))

        def read() -> None:
            for block, slot, count in runs(blocks, slots):
                self._engine.read_blocks(range_of(block, count), arena.view[slot * size : (slot + count) * size])

        try:
            await self._copier.run(len(blocks) * size, read)
        except BaseException:
            release()
            raise
        return Offered(node_pb2.BlocksFrame(shm=arena.place(slots)), release)

    async def take(self, frame: node_pb2.BlocksFrame, targets: Sequence[BlockId]) -> int:
        memory, size = frame.shm, self._block_bytes
        source = self._peers.view(memory)
        if memory.size % size or (memory.blocks and (max(memory.blocks) + 1) * size > memory.size):
            raise TransferFailed(f"the peer's slabs are not of {size} bytes")
        pool = self._pool

        def copy() -> None:
            for block, target, count in runs(memory.blocks, targets):
                slabs = source[block * size : (block + count) * size]
                if pool is None:
                    self._engine.write_blocks(range_of(target, count), slabs)
                else:
                    copy_bytes(pool.view[target * size : (target + count) * size], slabs)

        await self._copier.run(len(targets) * size, copy)
        return len(targets) * size

    def close(self) -> None:
        """Give the staging memory back."""
        if self._staging is not None:
            self._staging.close()


def range_of(block: int, count: int) -> list[BlockId]:
    """Return `count` consecutive block ids."""
    return [BlockId(number) for number in range(block, block + count)]


class ObjectTransport:
    """Blocks become one object of a store that both ends reach, in their stored form, which may have fewer bytes."""

    def __init__(self, engine: Engine, store: ObjectStore, copier: Copier, limits: TransferLimits) -> None:
        self._engine = engine
        self._stored_bytes = engine.description.stored_bytes
        self._store = store
        self._copier = copier
        self._budget = ByteBudget(limits.staged_bytes_max)
        self._idle_s_max = limits.idle_s_max

    async def offer(self, blocks: Sequence[BlockId]) -> Offered:
        size = len(blocks) * self._stored_bytes
        await self._budget.acquire(size)

        def put() -> tuple[object, bytes]:
            data = np.empty(size, dtype=np.uint8).data
            try:
                self._engine.encode_blocks(blocks, data)
            except NotEncodable as error:
                raise TransferFailed(f"blocks cannot be sent as {self._engine.description.stored_layout}: {error}") from error
            return self._store.put(data)

        try:
            kept, reference = await self._copier.run_blocking(put)
        except BaseException:
            self._budget.release(size)
            raise
        held = [kept]

        def release() -> None:
            held.clear()
            self._budget.release(size)

        return Offered(node_pb2.BlocksFrame(ray=node_pb2.RayObject(reference=reference)), release)

    async def take(self, frame: node_pb2.BlocksFrame, targets: Sequence[BlockId]) -> int:
        size = len(targets) * self._stored_bytes

        def get() -> None:
            data = self._store.get(frame.ray.reference, self._idle_s_max)
            if len(data) != size:
                raise TransferFailed(f"the peer's object has {len(data)} bytes, not {size}")
            self._engine.decode_blocks(targets, data)

        await self._copier.run_blocking(get)
        return size


class PacedTransport:
    """Another transport, for engines that only pass time: taking lasts as long as the profile says."""

    def __init__(self, inner: Transport, profile: CostProfile) -> None:
        self._inner = inner
        self._profile = profile

    async def offer(self, blocks: Sequence[BlockId]) -> Offered:
        return await self._inner.offer(blocks)

    async def take(self, frame: node_pb2.BlocksFrame, targets: Sequence[BlockId]) -> int:
        size = await self._inner.take(frame, targets)
        await asyncio.sleep(fetch_seconds(self._profile, size))
        return size
