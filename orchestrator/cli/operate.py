"""`weft up`, `down`, `drain`, `resize` and `restart`: a cluster that outlives the command, and what operators do to it.

Without an address a cluster is looked for on this machine, where `weft up` starts Ray for it and notes where (`fleet/head.py`).
"""

import argparse
import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console

from orchestrator.cli.cluster_file import LOCAL_CLUSTER, UnusableInput
from orchestrator.cli.options import count
from orchestrator.cli.serve import attach_or_start, end_fleet, progress_of, quiet_output, until_signal
from orchestrator.core.config import GATEWAYS, ClusterConfig
from orchestrator.fleet.fleet import Fleet, FleetFailed, local_cpus
from orchestrator.fleet.head import carry_token, carry_token_to, end_head, find_head, heads, start_head
from orchestrator.fleet.keeper import Wish
from orchestrator.fleet.words import DrainAsked, ResizeAsked, RestartAsked, ReturnAsked

DONE, FAILED = 0, 1
#: argparse does not name the type that its own method returns.
Commands: TypeAlias = "argparse._SubParsersAction[Any]"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a cluster is: its name, and the address of its Ray."""

    name: str
    address: str


def add_place(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which cluster is meant."""
    parser.add_argument("--name", help="the cluster's name (the one that weft up started on this machine)")
    parser.add_argument("--address", help="the Ray cluster it is on, ray://HOST:PORT or HOST:PORT (this machine's)")


def place_of(options: argparse.Namespace) -> Place:
    """Return which cluster is meant. Raises `UnusableInput`, or `FleetFailed` if none is here."""
    if options.address is not None:
        if options.name is None:
            raise UnusableInput("--address: needs --name, the name in the cluster file")
        carry_token_to(options.address)
        return Place(options.name, options.address)
    here = heads()
    if options.name is None and len(here) > 1:
        raise UnusableInput(f"--name: several clusters run on this machine ({', '.join(here)})")
    name = options.name or (here[0] if here else None)
    head = find_head(name) if name is not None else None
    if name is None or head is None:
        what = "no cluster" if name is None else f'no cluster named "{name}"'
        raise FleetFailed(f"{what} was started on this machine by weft up; --address finds one elsewhere")
    carry_token(head)
    return Place(name, head.address)


@contextlib.contextmanager
def attached(place: Place) -> Iterator[Fleet]:
    """Hold a running cluster. Raises `FleetFailed`."""
    with quiet_output(), Fleet(place.name, place.address) as fleet:
        fleet.attach()
        yield fleet


def up(config: ClusterConfig, address: str | None, restart: bool, as_json: bool) -> int:
    """Start a cluster that stays, or have the one that runs become as its file says; print where. Returns the exit code."""
    out, err = _consoles()
    name, stop = config.cluster.name, threading.Event()
    started_here = None
    if address is None:
        head = find_head(name)
        if head is None:
            head = started_here = start_head(name, local_cpus(config))
        carry_token(head)
        address = head.address
    else:
        carry_token_to(address)
    try:
        with quiet_output(), Fleet(name, address) as fleet, until_signal(stop):
            urls, ran = attach_or_start(fleet, config, err, stop, restart)
    except FleetFailed:
        if started_here is not None:
            end_head(name, started_here)
        raise
    if not urls:
        if started_here is not None:
            end_head(name, started_here)
        err.print("weft: given up; nothing runs")
        return FAILED
    if as_json:
        out.print(json.dumps({"cluster": name, "address": address, "urls": list(urls), "ran": ran}), markup=False)
    else:
        out.print(f"weft: serving {', '.join(config.models)} at {', '.join(urls)}")
    return DONE


def _down(options: argparse.Namespace) -> int:
    _, err = _consoles()
    place = place_of(options)
    ended = True
    with quiet_output(), Fleet(place.name, place.address) as fleet:
        if fleet.runs:
            fleet.attach()
            ended = end_fleet(fleet, 0.0 if options.now else fleet.drain_s(), err) or options.now
        elif options.address is not None:
            raise FleetFailed(f'no cluster named "{place.name}" runs there')
    head = find_head(place.name)
    if head is not None and head.address == place.address:
        end_head(place.name, head)
    return DONE if ended else FAILED


def _ask(options: argparse.Namespace, wish: Wish, title: str) -> int:
    """Have a cluster do something; print what came of it. Returns the exit code."""
    out, err = _consoles()
    with attached(place_of(options)) as fleet:
        with progress_of(title, err) as progress:
            fleet.ask(wish, progress)
        status = fleet.status()
    if options.json:
        out.print(json.dumps(status), markup=False)
    return DONE


def _drain(options: argparse.Namespace) -> int:
    if options.undo:
        return _ask(options, ReturnAsked(0, options.target), f"returning {options.target}")
    return _ask(options, DrainAsked(0, options.target, options.force), f"draining {options.target}")


def _resize(options: argparse.Namespace) -> int:
    return _ask(options, ResizeAsked(0, options.pool, options.count), f"resizing {options.pool} to {options.count}")


def _restart(options: argparse.Namespace) -> int:
    groups = (*options.pool, *((GATEWAYS,) if options.gateways else ()))
    if not groups and not options.all:
        raise UnusableInput("weft restart: needs --pool NAME, --gateways or --all")
    if groups and options.all:
        raise UnusableInput("weft restart: --all means every pool and all gateways; name none of them")
    if options.all:
        # A controller of the new version first: it starts the others as that version means it.
        with attached(place_of(options)) as fleet:
            fleet.restart_controller()
    return _ask(options, RestartAsked(0, groups), "restarting")


def add_operations(commands: Commands, read: Any) -> None:
    """Add the commands of operators.

    Args:
        commands: where they are added.
        read: returns the configuration that the options of `weft up` name.
    """
    parser = commands.add_parser("up", help="start a cluster that stays, or apply a changed cluster file to it")
    parser.add_argument("--cluster", type=Path, default=LOCAL_CLUSTER, metavar="FILE", help="cluster file (%(default)s)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint directory of the cluster's only model")
    parser.add_argument("--http-port", type=int, metavar="N", help="the first gateway's; 0: any free port")
    parser.add_argument("--grpc-port", type=int, metavar="N", help="the first gateway's; 0: any free port")
    parser.add_argument("--address", help="a running Ray cluster, ray://HOST:PORT or HOST:PORT; without it one is started here")
    parser.add_argument("--restart", action="store_true", help="apply changes that take restarts, one process after the other")
    parser.add_argument("--json", action="store_true", help="print where it serves as JSON")
    parser.set_defaults(
        journal=None, record=None, run=lambda options: up(read(options), options.address, options.restart, options.json)
    )
    parser = commands.add_parser("down", help="let what runs end, then end a cluster that weft up started")
    add_place(parser)
    parser.add_argument("--now", action="store_true", help="do not wait for running requests")
    parser.set_defaults(run=_down)
    parser = commands.add_parser("drain", help="let a node or gateway finish what runs there, end it and keep it out")
    parser.add_argument("target", metavar="NODE", help="a node such as decode-0, or gateway-N")
    parser.add_argument("--undo", action="store_true", help="start it again")
    parser.add_argument("--force", action="store_true", help="even if requests find no other")
    _add_common(parser, _drain)
    parser = commands.add_parser("resize", help="change the number of a pool's nodes, or of gateways")
    parser.add_argument("pool", metavar="POOL", help=f'a pool of the cluster file, or "{GATEWAYS}"')
    parser.add_argument("count", type=count, metavar="N", help="how many there are to be")
    _add_common(parser, _resize)
    parser = commands.add_parser("restart", help="start processes anew, one after the other, each after a drain")
    parser.add_argument("--pool", action="append", default=[], metavar="NAME", help="this pool's nodes; may be given again")
    parser.add_argument("--gateways", action="store_true", help="the gateways")
    parser.add_argument("--all", action="store_true", help="everything, the controller too: what is installed now will run")
    _add_common(parser, _restart)


def _add_common(parser: argparse.ArgumentParser, run: Any) -> None:
    add_place(parser)
    parser.add_argument("--json", action="store_true", help="print how the cluster is then, as JSON")
    parser.set_defaults(run=run)


def _consoles() -> tuple[Console, Console]:
    """Return consoles that Ray's own output does not go through."""
    out = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    return out, Console(stderr=True, highlight=False, soft_wrap=True)
