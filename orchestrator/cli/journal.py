"""Journals on the command line: `weft serve --journal` asks for them, `weft journal replay` runs them through fresh cores."""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

from rich.console import Console

from orchestrator.cli.cluster_file import UnusableInput
from orchestrator.core.config import ClusterConfig
from orchestrator.wire.journal import ClusterHeader, Header, Journal, JournalError, read_journal
from orchestrator.wire.replay import replay

#: Events between two words of progress.
PROGRESS_EVERY = 1000


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


def _result(journal: Journal, events: int, difference: str) -> Replayed:
    return Replayed(str(journal.path), _core(journal.header), journal.written_by, events, journal.ended, difference)


def _core(header: Header) -> str:
    return f"gateway {header.gateway}" if isinstance(header, ClusterHeader) else f"node {header.spec.id}"


def _verdict(one: Replayed) -> str:
    if one.difference:
        return f"{one.core}, written by weft {one.written_by}: differs at {one.difference}"
    early = f"early: {one.ended}" if one.ended else "in the middle: its process was killed, or the file was cut off"
    end = "" if one.ended == "stopped" else f" (it ends {early})"
    return f"{one.core}: all {one.events} events replay identically{end}"
