"""Memory that nodes of one host share, and bounds on what is in flight in it."""

import asyncio
import ctypes
import errno
import fcntl
import mmap
import os
import re
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from orchestrator.core.config import shown
from orchestrator.wire import node_pb2

COOKIE_BYTES = 16
#: What memory of ours is called, and where a peer's is found: nothing else of this host is ever opened.
NAME = "weft-kv"
_PLACE = re.compile(r"/proc/([1-9][0-9]{0,9})/fd/(0|[1-9][0-9]{0,9})")
_SHOWN = f"/memfd:{NAME} (deleted)"
#: It can neither shrink nor grow, nor be made to again.
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
#: Linux 5.14 and later; Python does not name it.
_MADV_POPULATE_WRITE = 23
_LIBC = ctypes.CDLL(None, use_errno=True)

Result = TypeVar("Result")


class TransferFailed(Exception):
    """Blocks cannot be brought across; the message says why.

    TransferFailed
        PeerUnmappable   shared memory was promised and cannot be opened; another transport may do
    """


class PeerUnmappable(TransferFailed):
    """A peer's memory cannot be opened from here."""


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """Bounds of what is under way."""

    #: Bytes of one frame: the grain of progress.
    frame_bytes_max: int = 16 * 1024 * 1024
    #: Bytes sent and not acknowledged, of one fetch and of all that are staged or stored.
    fetch_bytes_max: int = 64 * 1024 * 1024
    staged_bytes_max: int = 256 * 1024 * 1024
    #: Copies up to this many bytes are made on the loop: a thread's wake-up takes longer.
    inline_bytes_max: int = 256 * 1024
    #: Seconds an export may wait for an acknowledgement, or a copy for the object store. How long a fetch waits for its source is
    #: the core's to say (`fetch_silent_s_max`).
    idle_s_max: float = 120.0
    #: Connections to peers kept open, and peers' memories kept mapped.
    peers_max: int = 256


def host_id() -> str:
    """Return what is equal for processes that can open each other's memory: machine boot, process namespace and user."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}/{os.geteuid()}"


class SharedArena:
    """Anonymous memory that a peer on this host can map by its path; gone with the process, however that ends."""

    __slots__ = ("_descriptor", "_map", "cookie", "path", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.cookie = secrets.token_bytes(COOKIE_BYTES)
        self._descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._descriptor, size + COOKIE_BYTES)
        # Whoever maps it can rely on its size: reading what was cut off would kill the reader.
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, SEALS)
        self._map = mmap.mmap(self._descriptor, size + COOKIE_BYTES)
        with suppress(OSError):  # A kernel built without huge pages refuses the advice; nothing else changes.
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._map[size:] = self.cookie
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @property
    def view(self) -> memoryview:
        return memoryview(self._map)[: self.size]

    def place(self, blocks: Sequence[int]) -> node_pb2.SharedMemory:
        """Return where these slabs lie."""
        return node_pb2.SharedMemory(path=self.path, size=self.size, blocks=blocks, cookie=self.cookie)

    def populate(self, start: int, size: int) -> bool:
        """Take the memory of a part now, not when it is first written to. Returns False if this kernel cannot."""
        return populate(self.view[start : start + size])

    def close(self) -> None:
        """Give the memory up; it goes when the last map of it does."""
        os.close(self._descriptor)


class PeerMemory:
    """Maps of other processes' arenas, least recently used first."""

    def __init__(self, maps_max: int) -> None:
        self._maps: dict[tuple[str, bytes], memoryview] = {}
        self._maps_max = maps_max

    def view(self, memory: node_pb2.SharedMemory) -> memoryview:
        """Return a peer's slabs, read-only. Raises `PeerUnmappable` if the path does not lead to them."""
        key = (memory.path, memory.cookie)
        view = self._maps.pop(key, None)
        if view is None:
            view = map_memory(memory)
        self._maps[key] = view
        if len(self._maps) > self._maps_max:
            del self._maps[next(iter(self._maps))]
        return view

    def forget(self, path: str) -> None:
        """Drop the map of a process that is gone, so that its memory can be freed."""
        for key in [key for key in self._maps if key[0] == path]:
            del self._maps[key]


def map_memory(memory: node_pb2.SharedMemory, writable: bool = False) -> memoryview:
    """Map another process's arena. Raises `PeerUnmappable` if the path does not lead to it."""
    size = memory.size + COOKIE_BYTES
    if _PLACE.fullmatch(memory.path) is None:
        raise PeerUnmappable(f"{shown(memory.path)} is no place where nodes keep blocks")
    try:
        if os.readlink(memory.path) != _SHOWN:
            raise PeerUnmappable(f"{memory.path} is not a node's memory")
        descriptor = os.open(memory.path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if found.st_uid != os.geteuid():
                raise PeerUnmappable(f"{memory.path} is another user's")
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
                raise PeerUnmappable(f"{memory.path} is not sealed: it could shrink while it is read")
            if found.st_size != size:
                raise PeerUnmappable(f"{memory.path} does not have {size} bytes")
            mapped = mmap.mmap(descriptor, size, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
            view = memoryview(mapped)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise PeerUnmappable(f"cannot map {memory.path}: {error.strerror}") from error
    if bytes(view[memory.size :]) != memory.cookie:
        raise PeerUnmappable(f"{memory.path} is not the memory it was said to be")
    return view[: memory.size]


def populate(view: memoryview) -> bool:
    """Map writable memory into this process now, not page by page when it is first touched, and take it if nobody has.

    Returns False if this kernel cannot. Raises `OSError` if there is no such memory.
    """
    pages = np.frombuffer(view, dtype=np.uint8)
    first = pages.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    size = pages.ctypes.data + len(pages) - first
    # Not by `mmap.madvise`, which holds the interpreter's lock meanwhile.
    if _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_POPULATE_WRITE) == 0:
        return True
    error = ctypes.get_errno()
    if error not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(error, os.strerror(error))
    return False


class ByteBudget:
    """A bound on bytes in flight, first come, first served."""

    __slots__ = ("_free", "_limit", "_waiting")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free = limit
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def acquire(self, size: int) -> None:
        """Wait for room. `size` may be over the whole limit: it then goes alone."""
        if not self._waiting and self._fits(size):
            self._free -= size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(size)
            raise

    def release(self, size: int) -> None:
        """Give room back and let in who waits for it."""
        self._free += size
        assert self._free <= self._limit, f"free {self._free} > limit {self._limit}"
        while self._waiting and (self._waiting[0][1].done() or self._fits(self._waiting[0][0])):
            size, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= size
                turn.set_result(None)

    def _fits(self, size: int) -> bool:
        return size <= self._free or self._free == self._limit


class Copier:
    """Runs copies off the loop; a cancelled one is waited for, since nothing can stop a copy."""

    def __init__(self, executor: Executor, inline_bytes_max: int) -> None:
        self._executor = executor
        self._inline_bytes_max = inline_bytes_max

    async def run(self, size: int, function: Callable[[], Result]) -> Result:
        """Call `function`, here if it copies little, and return what it returns."""
        if size <= self._inline_bytes_max:
            return function()
        return await self.run_blocking(function)

    async def run_blocking(self, function: Callable[[], Result]) -> Result:
        """Call `function` in a thread, whatever its size."""
        copy = asyncio.get_running_loop().run_in_executor(self._executor, function)
        try:
            return await asyncio.shield(copy)
        except asyncio.CancelledError:
            await through((copy,))
            raise


async def through(futures: Sequence["asyncio.Future[Any]"]) -> None:
    """Wait until all are done, whatever becomes of the one who waits: it is cancelled only then."""
    cancelled: asyncio.CancelledError | None = None
    while not all(future.done() for future in futures):
        try:
            await asyncio.wait(futures)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy with the interpreter lock released: a plain slice assignment would stop the loop for as long."""
    np.copyto(np.frombuffer(target, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))
