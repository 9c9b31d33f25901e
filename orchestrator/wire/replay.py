"""Runs a journal through a fresh core and compares every command: equal, or the first event after which they part.

Both are compared as bytes, reasons (`why`) included. A difference means that the core's code has changed since, that the journal
is damaged, or that something besides events and their times has influenced a decision, which must not be.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.node.node import Node
from orchestrator.core.store.store import Store
from orchestrator.wire.journal import (
    ClusterHeader,
    Command,
    Event,
    Header,
    Journal,
    JournalError,
    Kind,
    NodeHeader,
    StoreHeader,
    as_written,
    kind_of,
)

_Handle: TypeAlias = Callable[[Any, float], Sequence[Command]]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first event that a fresh core answers otherwise than the recorded one did."""

    #: Counted from 1.
    number: int
    now: float
    event: Event
    expected: tuple[str, ...]
    got: tuple[str, ...]

    def __str__(self) -> str:
        place = next((i for i, (one, other) in enumerate(zip(self.expected, self.got, strict=False)) if one != other), None)
        shared = min(len(self.expected), len(self.got)) if place is None else place
        one, other = (commands[shared] if shared < len(commands) else "nothing more" for commands in (self.expected, self.got))
        return f"event {self.number} ({type(self.event).__name__}), command {shared + 1}: recorded {one}; got {other}"


def replay(journal: Journal, progress: Callable[[int], None] | None = None) -> Difference | None:
    """Feed a fresh core with the recorded events; return where it first answers otherwise, None if it never does.

    Args:
        journal: as `read_journal` returned it; its entries are used up.
        progress: told the number of each event.

    Raises:
        JournalError: the file is damaged in its middle, or no core can be made from its header.
    """
    try:
        handle = _fresh_core(journal.header)
    except (AssertionError, ArithmeticError, LookupError, ValueError) as error:
        raise JournalError(f"{journal.path}: its header makes no core: {type(error).__name__}: {error}") from None
    encoder, kind = msgspec.msgpack.Encoder(), kind_of(journal.header)
    for number, entry in enumerate(journal.entries, 1):
        if progress is not None:
            progress(number)
        try:
            got: Sequence[Command] | None = handle(entry.event, entry.now)
        except Exception as error:  # Whatever the core raises is an answer, to be compared with the recorded one.
            if entry.commands is not None:
                return Difference(
                    number, entry.now, entry.event, _shown(kind, entry.commands), (f"{type(error).__name__}: {error}",)
                )
            return None
        named = tuple([(name, encoder.encode(fields)) for name, fields in map(as_written, got)])
        if named != entry.commands:
            return Difference(number, entry.now, entry.event, _shown(kind, entry.commands), _shown(kind, named))
    return None


def _fresh_core(header: Header) -> _Handle:
    match header:
        case ClusterHeader(gateway, config):
            return Cluster(gateway, config).handle
        case NodeHeader(spec, scheduler):
            return Node(spec, scheduler).handle
        case StoreHeader(spec, config):
            return Store(spec, config).handle


def _shown(kind: Kind, commands: Sequence[tuple[str, bytes]] | None) -> tuple[str, ...]:
    """Return commands as text; those of a version with other fields as they came."""
    if commands is None:
        return ("an error",)
    return tuple(_text(kind, name, data) for name, data in commands)


def _text(kind: Kind, name: str, data: bytes) -> str:
    try:
        return repr(kind.commands[name](data))
    except (msgspec.DecodeError, ValueError):
        return f"{name} {msgspec.msgpack.decode(data)!r}"
