"""Writes down what a core was told and what it answered; `replay.py` runs it again.

A file (gzip) holds one core's life from its start. It is a row of records, each a little-endian u32 with its length and then
that many bytes of msgpack:

    first       ["weft-journal", 2, weft's version, kind of core, what the core was made from]
    then        [now, name of the event, event, [[name of the command, command], ...]]    null for commands: the core raised
    last        [now, "Closed", {"reason": ...}, []]                                      missing if the process was killed

Events and commands are the core's own, field by field, so that floats and hashes come back bit for bit; keys of timers are text.
A cluster's journal holds what clusters are told and answer, a node's what nodes are, a store's what stores are; anything else is
refused. No prompt, token,
key or secret is in a journal; session names, tenants, lengths and block hashes are.
"""

import gzip
import logging
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, Final, Generic, TypeAlias, TypeVar, cast, get_args, get_origin, overload

import msgspec

from orchestrator.core.commands import ClearTimer, ClusterCommand, NodeCommand, SetTimer, StoreCommand
from orchestrator.core.config import BLOCKS_MAX, ClusterConfig, GatewayConfig, SchedulerConfig, StoreConfig, shown
from orchestrator.core.events import ClusterEvent, NodeEvent, StoreEvent, TimerFired
from orchestrator.core.timers import Timer, cluster_timer, node_timer, store_timer
from orchestrator.core.types import GatewayId, NodeSpec, StoreSpec

log = logging.getLogger("weft.journal")

FORMAT: Final = "weft-journal"
FORMAT_VERSION: Final = 2
SUFFIX = ".journal.gz"
#: Bytes that wait before the writing thread gets them, and seconds they wait at most while events come.
CHUNK_BYTES = 64 * 1024
CHUNK_S = 1.0
#: Chunks that may wait for a slow disk. One more, and the journal ends there: serving never waits for it.
CHUNKS_MAX = 512
#: Bytes of a file, compressed, after which its journal ends.
FILE_BYTES_MAX = 4 * 1024**3
#: Longest record that is believed when reading.
RECORD_BYTES_MAX = 1 << 28

Event: TypeAlias = ClusterEvent | NodeEvent | StoreEvent
Command: TypeAlias = ClusterCommand | NodeCommand | StoreCommand

_LENGTH = struct.Struct("<I")
_CLOSED = "Closed"
#: What one kind of core is told, and what it answers.
OneEvent = TypeVar("OneEvent", ClusterEvent, NodeEvent, StoreEvent)
OneCommand = TypeVar("OneCommand", ClusterCommand, NodeCommand, StoreCommand)
#: Read what was written of one event or command.
Decode: TypeAlias = Callable[[bytes], Any]


class JournalError(ValueError):
    """A journal cannot be used; the message is one line that names the file."""


@dataclass(frozen=True, slots=True)
class ClusterHeader:
    """What a gateway's core was made from."""

    gateway: GatewayId
    config: ClusterConfig


@dataclass(frozen=True, slots=True)
class NodeHeader:
    """What a node's core was made from."""

    spec: NodeSpec
    scheduler: SchedulerConfig


@dataclass(frozen=True, slots=True)
class StoreHeader:
    """What a store's core was made from."""

    spec: StoreSpec
    config: StoreConfig


Header: TypeAlias = ClusterHeader | NodeHeader | StoreHeader


@dataclass(frozen=True, slots=True)
class Kind:
    """All that can be in the journals of one kind of core, by name."""

    name: str
    header: type
    events: Mapping[str, Decode]
    commands: Mapping[str, Decode]


def _kind(name: str, header: type, event: object, command: object, timer: Callable[[str], Timer]) -> Kind:
    return Kind(name, header, _decoders(event, timer), _decoders(command, timer))


def _decoders(union: object, timer: Callable[[str], Timer]) -> dict[str, Decode]:
    """Return how each member of a union is read; keys of timers are those of one machine."""
    decoders: dict[str, Decode] = {}
    for member in get_args(union):
        about_timers = get_origin(member) is not None
        decoders[member.__name__] = _timed(get_origin(member), timer) if about_timers else msgspec.msgpack.Decoder(member).decode
    return decoders


def _timed(member: Any, timer: Callable[[str], Timer]) -> Decode:
    decoder = msgspec.msgpack.Decoder(member[str])

    def decode(data: bytes) -> Any:
        found = decoder.decode(data)
        return replace(found, key=timer(found.key))

    return decode


CLUSTER: Final = _kind("cluster", ClusterHeader, ClusterEvent, ClusterCommand, cluster_timer)
NODE: Final = _kind("node", NodeHeader, NodeEvent, NodeCommand, node_timer)
STORE: Final = _kind("store", StoreHeader, StoreEvent, StoreCommand, store_timer)
_KINDS = {kind.name: kind for kind in (CLUSTER, NODE, STORE)}


def kind_of(header: Header) -> Kind:
    """Return what can be in a journal with this header."""
    match header:
        case ClusterHeader():
            return CLUSTER
        case NodeHeader():
            return NODE
        case StoreHeader():
            return STORE


def as_written(fact: Event | Command) -> tuple[str, object]:
    """Return an event or command as a journal holds it: its name, and its fields."""
    match fact:
        case TimerFired(key):
            written: object = TimerFired(str(key))
        case SetTimer(key, at):
            written = SetTimer(str(key), at)
        case ClearTimer(key):
            written = ClearTimer(str(key))
        case _:
            written = fact
    return type(fact).__name__, written


def cluster_header(gateway: GatewayId, config: ClusterConfig) -> ClusterHeader:
    """Return a gateway's header, without the secret, the API keys and the place of cmx, which no decision depends on."""
    tenants = tuple(replace(tenant, keys=()) for tenant in config.tenants)
    cluster = replace(config.cluster, secret="")
    store = _placeless(config.store) if config.store is not None else None
    gateways = GatewayConfig(count=config.gateway.count)
    return ClusterHeader(gateway, replace(config, cluster=cluster, gateway=gateways, tenants=tenants, store=store))


def store_header(spec: StoreSpec, config: StoreConfig) -> StoreHeader:
    """Return a store's header, without the place of its cmx, which no decision depends on."""
    return StoreHeader(spec, _placeless(config))


def _placeless(config: StoreConfig) -> StoreConfig:
    return replace(config, cmx="")


# --- writing ----------------------------------------------------------------------------------------------------------


@overload
def open_journal(folder: str, name: str, header: ClusterHeader) -> "ClusterJournalWriter | None": ...
@overload
def open_journal(folder: str, name: str, header: NodeHeader) -> "NodeJournalWriter | None": ...
@overload
def open_journal(folder: str, name: str, header: StoreHeader) -> "StoreJournalWriter | None": ...
def open_journal(
    folder: str, name: str, header: Header
) -> "ClusterJournalWriter | NodeJournalWriter | StoreJournalWriter | None":
    """Start a journal in a folder, which is made if need be; None without a folder. Raises `OSError`."""
    if not folder:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return JournalWriter(Path(folder) / f"{name}{SUFFIX}", header)


class JournalWriter(Generic[OneEvent, OneCommand]):
    """One core's journal. Encoding is done by whoever records, compressing and writing by a thread."""

    def __init__(self, path: Path, header: Header, file_bytes_max: int = FILE_BYTES_MAX) -> None:
        self.path = path
        self._encoder = msgspec.msgpack.Encoder()
        #: Whole records that the thread has not got yet.
        self._buffer = bytearray()
        self._due_s = 0.0
        self._now = 0.0
        #: Why nothing more is taken; empty while the journal is open.
        self._ended = ""
        self._file_bytes_max = file_bytes_max
        self._chunks: Queue[bytes | None] = Queue(CHUNKS_MAX)
        self._buffer += _framed(self._encoder, (FORMAT, FORMAT_VERSION, version("weft"), kind_of(header).name, header))
        self._file = path.open("xb")
        self._thread = Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def record(self, now: float, event: OneEvent, commands: Sequence[OneCommand] | None) -> None:
        """Take down one call of the core; None for commands says that it raised."""
        if self._ended:
            return
        named = None if commands is None else [as_written(command) for command in commands]
        self._buffer += _framed(self._encoder, (now, *as_written(event), named))
        self._now = now
        if len(self._buffer) >= CHUNK_BYTES or now >= self._due_s:
            self._due_s = now + CHUNK_S
            self._hand_over()

    def close(self) -> None:
        """Write what is left and close the file; waits for the disk. Harmless to repeat."""
        if not self._ended:
            self._ended = "stopped"
            self._chunks.put(bytes(self._buffer))
        if self._thread.is_alive():
            self._chunks.put(None)
            self._thread.join()

    def _hand_over(self) -> None:
        """Give the thread what has come together; a disk that is far behind ends the journal."""
        chunk = bytes(self._buffer)
        self._buffer.clear()
        try:
            self._chunks.put_nowait(chunk)
        except Full:
            self._give_up("the disk did not keep up")

    def _give_up(self, reason: str) -> None:
        log.warning("journal %s ends early: %s", self.path, reason)
        self._ended = reason

    def _work(self) -> None:
        """Write chunks until there are no more; afterwards take them and drop them, so that nobody waits."""
        chunk: bytes | None = b""
        try:
            with self._file, gzip.GzipFile(fileobj=self._file, mode="wb", compresslevel=1, mtime=0) as stream:
                while (chunk := self._chunks.get()) is not None and self._file.tell() < self._file_bytes_max:
                    stream.write(chunk)
                    # A killed process leaves all whole chunks readable.
                    stream.flush(zlib.Z_SYNC_FLUSH)
                    self._file.flush()
                if chunk is not None:
                    self._give_up(f"it has reached {self._file_bytes_max} bytes")
                stream.write(_framed(msgspec.msgpack.Encoder(), (self._now, _CLOSED, {"reason": self._ended}, ())))
        except OSError as error:
            self._give_up(error.strerror or str(error))
        while chunk is not None:
            chunk = self._chunks.get()


ClusterJournalWriter: TypeAlias = JournalWriter[ClusterEvent, ClusterCommand]
NodeJournalWriter: TypeAlias = JournalWriter[NodeEvent, NodeCommand]
StoreJournalWriter: TypeAlias = JournalWriter[StoreEvent, StoreCommand]


def recorded(
    journal: JournalWriter[OneEvent, OneCommand] | None,
    handle: Callable[[OneEvent, float], Sequence[OneCommand]],
    event: OneEvent,
    now: float,
) -> Sequence[OneCommand]:
    """Let a core handle an event; take down what it answers, or that it raised, if there is a journal."""
    try:
        commands = handle(event, now)
    except Exception:
        if journal is not None:
            journal.record(now, event, None)
        raise
    if journal is not None:
        journal.record(now, event, commands)
    return commands


def _framed(encoder: msgspec.msgpack.Encoder, record: object) -> bytearray:
    """Return a record behind its length."""
    framed = bytearray(_LENGTH.size)
    encoder.encode_into(record, framed, -1)
    _LENGTH.pack_into(framed, 0, len(framed) - _LENGTH.size)
    return framed


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One call of a core. Commands are still encoded, each with its name; None: the core raised."""

    now: float
    event: Event
    commands: tuple[tuple[str, bytes], ...] | None


@dataclass(slots=True)
class Journal:
    """A journal that is being read."""

    path: Path
    #: Version of Weft that wrote it.
    written_by: str
    header: Header
    entries: Iterator[Entry]
    #: Known once `entries` is used up: why it ends; empty if it ends in the middle: its process was killed, or the file cut off.
    ended: str = ""


def read_journal(path: Path) -> Journal:
    """Open a journal; its entries are read as they are asked for. Raises `JournalError`, also from the entries."""
    records = _records(path)
    try:
        first: Any = msgspec.msgpack.decode(next(records, b""))
        name, number, written_by, kind, _ = first
    except JournalError:
        raise
    except (msgspec.DecodeError, TypeError, ValueError, RecursionError):
        raise JournalError(f"{path}: is no journal of Weft's") from None
    if name != FORMAT or number != FORMAT_VERSION or kind not in list(_KINDS):
        found = ", ".join(map(shown, (name, number, kind)))
        raise JournalError(f"{path}: is no {FORMAT} of version {FORMAT_VERSION}: starts with {found}")
    try:
        header = cast(Header, msgspec.convert(first[4], _KINDS[kind].header))
    except (msgspec.ValidationError, ValueError) as error:
        raise JournalError(f"{path}: its header does not fit this version of Weft: {error}") from None
    if isinstance(header, NodeHeader) and not 0 < header.spec.blocks <= BLOCKS_MAX:
        raise JournalError(f"{path}: its header is of no node: it has {header.spec.blocks} blocks")
    if isinstance(header, StoreHeader):
        _check_store(path, header)
    journal = Journal(path, str(written_by), header, iter(()))
    journal.entries = _entries(journal, records)
    return journal


def _check_store(path: Path, header: StoreHeader) -> None:
    """Raise `JournalError` if no store is like that."""
    for model in header.spec.models:
        if not 0 <= model.slots <= BLOCKS_MAX:
            raise JournalError(f"{path}: its header is of no store: it has {model.slots} slots for {shown(model.model)}")
        for field, value in (("segment_blocks", model.segment_blocks), ("block_bytes", model.block_bytes)):
            if value < 1:
                raise JournalError(f"{path}: its header is of no store: {field} of {shown(model.model)} is {value}")


def _records(path: Path) -> Iterator[bytes]:
    """Yield the records; one that is cut off, or a damaged end, is where a killed process's journal ends."""
    try:
        with gzip.open(path, "rb") as stream:
            while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
                (size,) = _LENGTH.unpack(head)
                if size > RECORD_BYTES_MAX or len(record := stream.read(size)) < size:
                    return
                yield record
    except gzip.BadGzipFile:
        raise JournalError(f"{path}: is not gzip") from None
    except (EOFError, zlib.error):
        return
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from None


def _entries(journal: Journal, records: Iterator[bytes]) -> Iterator[Entry]:
    envelope = msgspec.msgpack.Decoder(tuple[float, str, msgspec.Raw, list[tuple[str, msgspec.Raw]] | None])
    kind = kind_of(journal.header)
    for number, record in enumerate(records, 1):
        try:
            now, name, event, commands = envelope.decode(record)
            if name == _CLOSED:
                journal.ended = msgspec.msgpack.decode(event, type=dict[str, str])["reason"]
                return
            if name not in kind.events:
                raise JournalError(f"{journal.path}: record {number + 1}: a {kind.name} knows no event {shown(name)}")
            for unknown in [command for command, _ in commands or () if command not in kind.commands]:
                raise JournalError(f"{journal.path}: record {number + 1}: a {kind.name} knows no command {shown(unknown)}")
            listed = None if commands is None else tuple((command, bytes(fields)) for command, fields in commands)
            yield Entry(now, kind.events[name](event), listed)
        except JournalError:
            raise
        except KeyError as error:
            raise JournalError(f"{journal.path}: record {number + 1}: knows no {error}") from None
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise JournalError(f"{journal.path}: record {number + 1}: {error}") from None
