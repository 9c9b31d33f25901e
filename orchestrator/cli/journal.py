"""Journals on the command line: `weft serve --journal` asks for them, `weft journal` replays them or shows one request's part."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, cast

import msgspec
from rich.console import Console

from orchestrator.cli.cluster_file import UnusableInput
from orchestrator.core.config import ClusterConfig
from orchestrator.core.events import Assigned, RequestArrived
from orchestrator.core.types import RequestId, request_of
from orchestrator.wire.journal import (
    ClusterHeader,
    Entry,
    Header,
    Journal,
    JournalError,
    NodeHeader,
    StoreHeader,
    as_written,
    read_journal,
)
from orchestrator.wire.replay import replay

#: Events between two words of progress.
PROGRESS_EVERY = 1000
#: Fields that say nothing to people and fill a screen.
_UNREADABLE = frozenset({"hashes", "blocks", "ages_s", "chances"})


@dataclass(frozen=True, slots=True)
class Replayed:
    """One journal's replay."""

    file: str
    core: str
    #: Version of Weft that wrote it.
    written_by: str
    events: int
    #: Why the journal ends; empty if it ends in the middle.
    ended: str
    #: Where the fresh core first decided otherwise; empty if it never did.
    difference: str


def add_journal(parser: argparse.ArgumentParser) -> None:
    """Add the words behind `weft journal`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    again = commands.add_parser("replay", help="run journals through fresh cores; exit code 1 if one decides otherwise")
    again.add_argument("files", type=Path, nargs="+", metavar="FILE", help="written by `weft serve --journal DIR`")
    again.add_argument("--json", action="store_true", help="print the results as JSON")
    again.set_defaults(run=_replay)
    show = commands.add_parser("show", help="print what a core was told of one request and what it decided, timers left out")
    show.add_argument("file", type=Path, metavar="FILE", help="written by `weft serve --journal DIR`")
    show.add_argument("--request", required=True, metavar="ID", help="its x-request-id")
    show.set_defaults(run=_show)


def with_journal(config: ClusterConfig, folder: Path) -> ClusterConfig:
    """Return the configuration with journals in a folder. Raises `UnusableInput` if none can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UnusableInput(f"--journal: {folder}: {error.strerror}") from None
    return replace(config, cluster=replace(config.cluster, journal=str(folder.resolve())))


def _replay(options: argparse.Namespace) -> int:
    """Return 0 if every journal replays identically, 1 if not. Raises `UnusableInput`."""
    results = [_replayed(path) for path in options.files]
    if options.json:
        print(json.dumps([asdict(one) for one in results], indent=2))
    else:
        for one in results:
            print(f"{one.file}: {_verdict(one)}")
    return 1 if any(one.difference for one in results) else 0


def _replayed(path: Path) -> Replayed:
    err = Console(file=sys.stderr, highlight=False)
    events = 0
    try:
        journal = read_journal(path)
        with err.status(f"replaying {path}") as status:

            def progress(number: int) -> None:
                nonlocal events
                events = number
                if err.is_terminal and number % PROGRESS_EVERY == 0:
                    status.update(f"replaying {path}: event {number}")

            difference = replay(journal, progress)
    except JournalError as problem:
        raise UnusableInput(str(problem)) from None
    return _result(journal, events, str(difference or ""))


def _show(options: argparse.Namespace) -> int:
    """Print one request's part of a journal. Raises `UnusableInput`, also if the journal knows no such request."""
    found = False
    try:
        for line in request_lines(read_journal(options.file), options.request):
            found = True
            print(line)
    except JournalError as problem:
        raise UnusableInput(str(problem)) from None
    if not found:
        raise UnusableInput(f"{options.file}: no request in it is called {options.request!r}")
    return 0


def request_lines(journal: Journal, name: str) -> Iterator[str]:
    """Yield what happened to the requests of one name, a line each: seconds of the core's clock, an event; below it commands."""
    ids: set[RequestId] = set()
    for entry in journal.entries:
        if (request := _begun(entry, name)) is not None:
            ids.add(request)
        if not ids:
            continue
        kind, event = as_written(entry.event)
        told = _part(msgspec.msgpack.decode(msgspec.msgpack.encode(event)), ids)
        decided = [(command, _part(msgspec.msgpack.decode(fields), ids)) for command, fields in entry.commands or ()]
        if told is not None or any(part is not None for _, part in decided):
            raised = " (the core raised)" if entry.commands is None else ""
            yield f"{entry.now:.6f} {kind} {_shown(told)}".rstrip() + raised
            yield from (f"    {command} {_shown(part)}" for command, part in decided if part is not None)


def _begun(entry: Entry, name: str) -> RequestId | None:
    match entry.event:
        case RequestArrived(request) if request.name == name:
            return request.id
        case Assigned(assignment) if assignment.name == name:
            return request_of(assignment.request)
        case _:
            return None


def _part(value: object, ids: Set[RequestId]) -> object:
    """Return what of an event or command is about some requests, None if nothing is."""
    if isinstance(value, list):
        parts = [part for one in cast("list[object]", value) if (part := _part(one, ids)) is not None]
        return parts or None
    if not isinstance(value, dict):
        return None
    fields = cast("dict[str, Any]", value)
    # An assignment goes with the scores that led to it; a frame's lists are cut down to what is about the request.
    if any(_names(one, ids) for one in (fields, *fields.values())):
        return fields
    parts = {name: part for name, one in fields.items() if (part := _part(one, ids)) is not None}
    return {**{name: one for name, one in fields.items() if not isinstance(one, list | dict)}, **parts} if parts else None


def _names(value: object, ids: Set[RequestId]) -> bool:
    if not isinstance(value, dict):
        return False
    fields = cast("dict[str, object]", value)
    return any(isinstance(one := fields.get(name), int) and request_of(RequestId(one)) in ids for name in ("request", "id"))


def _shown(part: object) -> str:
    return "" if part is None else json.dumps(_readable(part))


def _readable(part: object) -> object:
    if isinstance(part, Mapping):
        fields = cast("Mapping[str, object]", part)
        return {name: _readable(one) for name, one in fields.items() if name not in _UNREADABLE}
    return [_readable(one) for one in cast("list[object]", part)] if isinstance(part, list) else part


def _result(journal: Journal, events: int, difference: str) -> Replayed:
    return Replayed(str(journal.path), _core(journal.header), journal.written_by, events, journal.ended, difference)


def _core(header: Header) -> str:
    match header:
        case ClusterHeader():
            return f"gateway {header.gateway}"
        case NodeHeader():
            return f"node {header.spec.id}"
        case StoreHeader():
            return f"store {header.spec.id}"


def _verdict(one: Replayed) -> str:
    if one.difference:
        return f"{one.core}, written by weft {one.written_by}: differs at {one.difference}"
    early = f"early: {one.ended}" if one.ended else "in the middle: its process was killed, or the file was cut off"
    end = "" if one.ended == "stopped" else f" (it ends {early})"
    return f"{one.core}: all {one.events} events replay identically{end}"
