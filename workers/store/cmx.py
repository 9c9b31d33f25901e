"""Segments of KV blocks as objects of a folder or a bucket: written whole or not at all, checked on every read.

    object:  v1/MODEL/HH/SEGMENT    MODEL and SEGMENT in hexadecimal, HH the first two digits of SEGMENT
             header (96 bytes)      what the rest is, and a checksum over all of it
             payload                the segment's blocks, one slab after the other

A segment is named by the hash of its last block, which names everything before it too, so that two writers of one name write the
same bytes. A model's name covers all that the meaning of its bytes depends on (`model_key`). What an object claims is compared
with what is asked for before a byte of it is copied, and its checksum before anybody is told that it came: memory that a failed
read was given holds anything.

Nothing in here is durable by promise: whatever is missing or damaged is a `CmxFailed` with a reason to count. What is there is
learned by listing names, not from a manifest: see "Why" in `workers/README.md`. All calls block and may come from any thread.
"""

import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import NewType

import numpy as np
import obstore
import xxhash
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore

from orchestrator.core.blocks import HASH_BYTES, hash_bytes
from orchestrator.core.types import BlockHash, MoveFailure
from orchestrator.wire import store_pb2
from orchestrator.wire.buckets import Bucket, first_line

#: Names one model's bytes; 16 of them.
ModelKey = NewType("ModelKey", bytes)

_VERSION = "v1"
_MAGIC = b"weft-kv1"
#: Magic, model, segment, blocks, bytes of a block, bytes of the payload, nothing; then the checksum.
_CLAIM = struct.Struct(f"<8s{HASH_BYTES}s{HASH_BYTES}sQQQ16x")
_CHECKSUM_BYTES = 16
HEADER_BYTES = _CLAIM.size + _CHECKSUM_BYTES
#: Bytes asked for at once: more of them would be read into new memory that is slower to get than the bytes (measured: half the
#: speed at 64 MiB), fewer cost round trips.
PIECE_BYTES = 8 * 1024 * 1024
#: Of a folder's file: what is still in the processor's cache when its checksum is taken (measured: a tenth less time than 2 MiB).
FILE_PIECE_BYTES = 512 * 1024
#: Names that a listing brings at a time, and folders listed at once.
PAGE_NAMES, LISTINGS = 1000, 16
#: Files that a writer which was killed left behind are removed after so many seconds.
_LEFT_S = 3600.0
#: File systems of this machine itself. A read of another may never end, and nothing that it reads into can be used for anything
#: else meanwhile, nor given up: with the store, a few of its slots are lost then; a node would lose what requests wait for.
_LOCAL = frozenset(("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"))
#: How Linux writes a space in the name of a place where something is mounted.
_ESCAPED = re.compile(r"\\([0-7]{3})")
#: Threads that read a folder at once, at most.
_READERS_MAX = 8
#: What operating systems say when there is no room: no space, no quota, too large.
_NO_ROOM = ("os error 28", "os error 122", "os error 27")


class Damage(StrEnum):
    """Why a segment could not be read or written; the labels of a metric."""

    MISSING = "missing"
    TRUNCATED = "truncated"  # shorter or longer than its header says
    CORRUPT = "corrupt"  # the checksum is another
    FOREIGN = "foreign"  # no segment, another one, another model's, or of another size
    UNREACHABLE = "unreachable"
    DENIED = "denied"
    FULL = "full"
    LATE = "late"  # not done in time
    STOPPED = "stopped"  # nobody wants it any more


#: What each of them means to the core.
FAILURES = {
    Damage.MISSING: MoveFailure.MISSING,
    Damage.TRUNCATED: MoveFailure.DAMAGED,
    Damage.CORRUPT: MoveFailure.DAMAGED,
    Damage.FOREIGN: MoveFailure.DAMAGED,
    Damage.UNREACHABLE: MoveFailure.UNAVAILABLE,
    Damage.DENIED: MoveFailure.UNAVAILABLE,
    Damage.LATE: MoveFailure.UNAVAILABLE,
    Damage.FULL: MoveFailure.FULL,
    Damage.STOPPED: MoveFailure.CANCELLED,
}


class CmxFailed(Exception):
    """A segment did not come or go; `reason` is for counting, the message for people."""

    def __init__(self, reason: Damage, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Found:
    """A segment that is there by its name; whether its bytes are right shows on reading."""

    segment: BlockHash
    size: int
    #: Seconds since it was written.
    age_s: float


def model_key(fingerprint: str, kv_format: str, block_tokens: int, block_bytes: int, segment_blocks: int) -> ModelKey:
    """Return the name of a model's bytes: of its weights, of how numbers are kept, and of how blocks are cut.

    Args:
        fingerprint: names weights and tokenizer, as nodes name them.
        kv_format: how an engine keeps keys and values, for example `float32`; the same size may mean other numbers.
    """
    parts = (fingerprint, kv_format, str(block_tokens), str(block_bytes), str(segment_blocks))
    return ModelKey(blake2b("\0".join(parts).encode(), digest_size=HASH_BYTES).digest())


def readers() -> int:
    """Return how many threads are to read a folder at once.

    No more than there are processors: a thread that copies would only take the processor from one that holds the interpreter's
    lock, for which everything else waits.
    """
    return min(_READERS_MAX, max(2, len(os.sched_getaffinity(0))))


def open_folder(place: store_pb2.Folder, fingerprint: str, kv_format: str, block_tokens: int, block_bytes: int) -> "Cmx | None":
    """Return a store's folder for a node that is to read segments by itself.

    None if it is another folder here, cannot be read, or is on no file system of this machine itself.
    """
    try:
        if not _is_same(place) or _file_system(place.path) not in _LOCAL:
            return None
        bucket = LocalStore(place.path)
    except (BaseError, OSError, ValueError):
        return None
    key = model_key(fingerprint, kv_format, block_tokens, block_bytes, place.segment_blocks)
    return Cmx(bucket, key, block_bytes, place.segment_blocks, place.move_s_max)


def _is_same(place: store_pb2.Folder) -> bool:
    """Tell whether a folder can be read here, and is the one that is meant: another process may see other file systems."""
    folder = os.open(place.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.fstat(folder)
    finally:
        os.close(folder)
    same = (found.st_dev, found.st_ino) == (place.device, place.inode) and os.access(place.path, os.R_OK | os.X_OK)
    return same and place.segment_blocks > 0 and place.move_s_max > 0


def _file_system(path: str) -> str:
    """Return the kind of file system that a folder is on, as Linux calls it."""
    real, where, kind = os.path.realpath(path), "", ""
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        mount, _, mounted = line.partition(" - ")
        point = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), mount.split(" ")[4])
        # Of several at one place the last one is seen.
        if os.path.commonpath((real, point)) == point and len(point) >= len(where):
            where, kind = point, mounted.split(" ")[0]
    return kind


class Cmx:
    """One model's segments in a bucket.

    Args:
        bucket: where they are.
        model: their model's name.
        block_bytes, segment_blocks: the size of a block, and blocks in each segment.
        move_s_max: seconds after which a read or a listing is given up.
    """

    def __init__(self, bucket: Bucket, model: ModelKey, block_bytes: int, segment_blocks: int, move_s_max: float) -> None:
        self._bucket = bucket
        self._model = model
        self._block_bytes = block_bytes
        self._segment_blocks = segment_blocks
        self._move_s_max = move_s_max
        self._folder = f"{_VERSION}/{model.hex()}"
        #: Of a folder: files are read straight into the memory that they are for, and there is less of it to be done.
        self._root = Path(bucket.prefix) if isinstance(bucket, LocalStore) and bucket.prefix is not None else None

    @property
    def folder(self) -> bool:
        """Whether it is a folder of this host."""
        return self._root is not None

    @property
    def segment_blocks(self) -> int:
        """Blocks of a segment."""
        return self._segment_blocks

    def place(self) -> store_pb2.Folder | None:
        """Return where it is, for nodes of this host that read from it by themselves; None for a bucket."""
        if self._root is None:
            return None
        try:
            found = self._root.stat()
        except OSError:
            return None
        return store_pb2.Folder(
            path=str(self._root), device=found.st_dev, inode=found.st_ino, segment_blocks=self._segment_blocks,
            move_s_max=self._move_s_max,
        )  # fmt: skip

    @property
    def segment_bytes(self) -> int:
        """Bytes of an object."""
        return HEADER_BYTES + self._segment_blocks * self._block_bytes

    def write(self, segment: BlockHash, slabs: Sequence[memoryview]) -> None:
        """Write a segment's blocks, which lie in `slabs` one after the other. Raises `CmxFailed`; nothing is left then."""
        size = sum(len(slab) for slab in slabs)
        assert size == self._segment_blocks * self._block_bytes, f"{size} bytes are no segment of {self._segment_blocks}"
        whole = np.empty(HEADER_BYTES + size, dtype=np.uint8)
        place = HEADER_BYTES
        for slab in slabs:
            np.copyto(whole[place : place + len(slab)], np.frombuffer(slab, dtype=np.uint8))
            place += len(slab)
        claim = self._claim(segment)
        digest = xxhash.xxh3_128(claim)
        digest.update(whole[HEADER_BYTES:].data)
        whole[:HEADER_BYTES] = np.frombuffer(claim + digest.digest(), dtype=np.uint8)
        try:
            obstore.put(self._bucket, self._path(segment), whole.data, use_multipart=False)
        except (BaseError, OSError) as error:
            raise _failure(error) from None

    def read(self, segment: BlockHash, slabs: Sequence[memoryview], stopped: Callable[[], bool]) -> None:
        """Read a segment's blocks into `slabs`, one after the other, and check them.

        Args:
            segment: which.
            slabs: memory of a segment's size together, in as many parts as it has; it holds anything if this fails.
            stopped: asked between pieces: whether to give up.

        Raises:
            CmxFailed: they did not come, or are not what was asked for.
        """
        assert sum(len(slab) for slab in slabs) == self._segment_blocks * self._block_bytes
        path, claim = self._path(segment), self._claim(segment)
        until = time.monotonic() + self._move_s_max

        def go_on() -> None:
            if stopped():
                raise CmxFailed(Damage.STOPPED, f"{path} is not wanted any more")
            if time.monotonic() > until:
                raise CmxFailed(Damage.LATE, f"{path} did not come in {self._move_s_max:g} s")

        digest = xxhash.xxh3_128(claim)
        read = self._read_object if self._root is None else self._read_file
        checksum = read(path, claim, slabs, digest.update, go_on)
        if digest.digest() != checksum:
            raise CmxFailed(Damage.CORRUPT, f"{path} is damaged: its checksum is another")

    def _read_object(
        self, path: str, claim: bytes, slabs: Sequence[memoryview], seen: Callable[[memoryview], None], go_on: Callable[[], None]
    ) -> bytes:
        """Copy a bucket's object into slabs, piece by piece. Returns the checksum that it says."""
        head, size = self._piece(path, 0, HEADER_BYTES + min(PIECE_BYTES, self.segment_bytes - HEADER_BYTES))
        self._check(path, bytes(head[: len(claim)]), claim, size)
        target = _Target(slabs)
        piece, place = head[HEADER_BYTES:], len(head)
        while True:
            seen(piece)
            target.take(piece)
            if place == size:
                return bytes(head[len(claim) : HEADER_BYTES])
            go_on()
            piece, _ = self._piece(path, place, min(place + PIECE_BYTES, size))
            place += len(piece)

    def _read_file(
        self, path: str, claim: bytes, slabs: Sequence[memoryview], seen: Callable[[memoryview], None], go_on: Callable[[], None]
    ) -> bytes:
        """Read a folder's file into slabs, piece by piece, without a copy between. Returns the checksum that it says."""
        assert self._root is not None
        try:
            with (self._root / path).open("rb", buffering=0) as file:
                head = file.read(HEADER_BYTES)
                if len(head) < HEADER_BYTES:
                    raise CmxFailed(Damage.TRUNCATED, f"{path} ends in its header")
                self._check(path, head[: len(claim)], claim, os.fstat(file.fileno()).st_size)
                for slab in slabs:
                    for start in range(0, len(slab), FILE_PIECE_BYTES):
                        piece = slab[start : start + FILE_PIECE_BYTES]
                        if file.readinto(piece) != len(piece):
                            raise CmxFailed(Damage.TRUNCATED, f"{path} ends while it is read")
                        seen(piece)
                        go_on()
        except OSError as error:
            raise _failure(error) from None
        return head[len(claim) :]

    def _check(self, path: str, found: bytes, claim: bytes, size: int) -> None:
        if found != claim:
            raise CmxFailed(Damage.FOREIGN, f"{path} is not what it is called")
        if size != self.segment_bytes:
            raise CmxFailed(Damage.TRUNCATED, f"{path} has {size} bytes, not {self.segment_bytes}")

    def delete(self, segments: Sequence[BlockHash]) -> None:
        """Remove segments; those that are not there are removed. Raises `CmxFailed`; some may be left then."""
        for segment in segments:
            try:
                obstore.delete(self._bucket, self._path(segment))
            except FileNotFoundError:
                continue
            except (BaseError, OSError) as error:
                raise _failure(error) from None

    def found(self) -> Iterator[list[Found]]:
        """List what is there by name and size, some at a time; what has another size than it must have is left out.

        Raises:
            CmxFailed: the bucket cannot be listed to its end; what was brought before is there.
        """
        until = time.monotonic() + self._move_s_max * LISTINGS
        with ThreadPoolExecutor(LISTINGS, thread_name_prefix="cmx-list") as threads:
            for first in range(0, 256, LISTINGS):
                for pages in threads.map(self._listed, range(first, first + LISTINGS)):
                    yield from pages
                if time.monotonic() > until:
                    raise CmxFailed(Damage.LATE, f"{self._folder} is not listed in {self._move_s_max * LISTINGS:g} s")

    def sweep(self) -> int:
        """Remove what writers which were killed left half written in a folder; a bucket has none of it. Returns how many."""
        if self._root is None:
            return 0
        left = 0
        for path in (self._root / self._folder).glob("*/*#*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _LEFT_S:
                    os.unlink(path)
                    left += 1
        return left

    def _listed(self, number: int) -> list[list[Found]]:
        pages: list[list[Found]] = []
        now = time.time()
        try:
            for page in obstore.list(self._bucket, f"{self._folder}/{number:02x}", chunk_size=PAGE_NAMES):
                pages.append([])
                for meta in page:
                    segment = _segment_of(meta["path"])
                    if segment is not None and meta["size"] == self.segment_bytes:
                        pages[-1].append(Found(segment, meta["size"], max(0.0, now - meta["last_modified"].timestamp())))
        except FileNotFoundError:  # A folder of which nothing was written yet.
            return pages
        except (BaseError, OSError) as error:
            raise _failure(error) from None
        return pages

    def _piece(self, path: str, start: int, end: int) -> tuple[memoryview, int]:
        """Return bytes [start, end) of an object, all of them, and the whole object's size."""
        try:
            answer = obstore.get(self._bucket, path, options={"range": (start, end)})
            size = answer.meta["size"]
            piece = memoryview(answer.bytes())
        except (BaseError, OSError) as error:
            raise _failure(error) from None
        if len(piece) != end - start:
            raise CmxFailed(Damage.TRUNCATED, f"{path} ends at {start + len(piece)} of {end} bytes")
        return piece, size

    def _claim(self, segment: BlockHash) -> bytes:
        count, each = self._segment_blocks, self._block_bytes
        return _CLAIM.pack(_MAGIC, self._model, segment, count, each, count * each)

    def _path(self, segment: BlockHash) -> str:
        name = hash_bytes(segment).hex()
        return f"{self._folder}/{name[:2]}/{name}"


class _Target:
    """Memory in parts that is filled from its beginning."""

    def __init__(self, slabs: Sequence[memoryview]) -> None:
        self._slabs = slabs
        self._ends = np.cumsum([0, *(len(slab) for slab in slabs)]).tolist()
        self._filled = 0

    def take(self, piece: memoryview) -> None:
        """Copy what comes next, with the interpreter lock released."""
        source = np.frombuffer(piece, dtype=np.uint8)
        first, last = self._filled, self._filled + len(source)
        for slab, (start, end) in zip(self._slabs, pairwise(self._ends), strict=True):
            low, high = max(first, start), min(last, end)
            if low < high:
                np.copyto(np.frombuffer(slab, dtype=np.uint8)[low - start : high - start], source[low - first : high - first])
        self._filled = last


def _segment_of(path: str) -> BlockHash | None:
    """Return the segment that an object's path names, None for what is none of ours."""
    name = path.rpartition("/")[2]
    try:
        segment = bytes.fromhex(name)
    except ValueError:
        return None
    return BlockHash(segment) if len(segment) == HASH_BYTES and segment.hex() == name else None


def _failure(error: Exception) -> CmxFailed:
    """Return what a bucket's error means."""
    text = str(error)
    match error:
        case FileNotFoundError():
            reason = Damage.MISSING
        case PermissionDeniedError() | UnauthenticatedError() | PermissionError():
            reason = Damage.DENIED
        case _ if any(sign in text for sign in _NO_ROOM):
            reason = Damage.FULL
        case _ if "Requested range was invalid" in text or "InvalidRange" in text:
            reason = Damage.TRUNCATED
        case _:
            reason = Damage.UNREACHABLE
    return CmxFailed(reason, first_line(error))
