"""`weft serve`: starts a cluster or attaches to it, says where it serves and what happens to it; drains it when told to end."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from rich.console import Console

from orchestrator.core.config import ClusterConfig
from orchestrator.fleet.fleet import Fleet
from orchestrator.fleet.head import carry_token_to
from orchestrator.fleet.keeper import News
from orchestrator.fleet.words import ConfigGiven

#: Seconds between two looks at the cluster's news.
LOOK_EVERY_S = 1.0


def serve(config: ClusterConfig, address: str | None, attach: bool) -> bool:
    """Serve until a signal comes; True if everything that ran had ended by then. Raises `FleetFailed`.

    Args:
        config: the cluster's.
        address: a running Ray cluster; None starts one here for as long as this lasts.
        attach: start the cluster only if it does not run there, and leave it running at the end.
    """
    out, err = Console(file=sys.stdout, highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
    stop = threading.Event()
    if address is not None:
        carry_token_to(address)
    fleet = Fleet.local(config) if address is None else Fleet(config.cluster.name, address, ends=not attach)
    with quiet_output(), fleet, until_signal(stop):
        urls = attach_or_start(fleet, config, err, stop)[0] if attach else start_fleet(fleet, config, err, stop)
        if not urls:
            return True
        out.print(f"weft: serving {', '.join(config.models)} at {', '.join(urls)}")
        while not stop.wait(LOOK_EVERY_S):
            tell_news(fleet.news(), err)
        return attach or end_fleet(fleet, config.cluster.drain_s, err)


def attach_or_start(
    fleet: Fleet, config: ClusterConfig, err: Console, stop: threading.Event, restart: bool = False
) -> tuple[tuple[str, ...], bool]:
    """Have a cluster run as its file says: start it, or apply to the one that runs what differs.

    Args:
        fleet: connected.
        config: what the file says.
        err: for progress and news.
        stop: gives a start up.
        restart: also apply what takes restarts.

    Returns:
        The gateways' URLs, none if `stop` was set meanwhile; whether the cluster ran already.

    Raises:
        FleetFailed: it cannot be started, or runs and differs in what is not applied.
    """
    if not fleet.runs:
        return start_fleet(fleet, config, err, stop), False
    fleet.attach()
    with progress_of("comparing with the running cluster", err) as progress:
        fleet.ask(ConfigGiven(0, config, restart), progress)
    return fleet.attach(), True


def start_fleet(fleet: Fleet, config: ClusterConfig, err: Console, stop: threading.Event) -> tuple[str, ...]:
    """Start a cluster with progress on a terminal. Returns its gateways' URLs, none if `stop` was set meanwhile."""
    with progress_of(f"starting cluster {config.cluster.name}", err) as progress:
        return fleet.start(config, progress, stop.is_set)


def end_fleet(fleet: Fleet, drain_s: float, err: Console) -> bool:
    """End a cluster; False if some requests did not end in the time they had."""
    with err.status(f"draining, {drain_s:g} s at most") if err.is_terminal else contextlib.nullcontext():
        problem = fleet.end(drain_s)
    if problem is not None:
        err.print(f"weft: {problem}")
    return problem is None


@contextlib.contextmanager
def progress_of(title: str, err: Console) -> Iterator[Callable[[News], None]]:
    """Show on a terminal how many processes are up; print news as it comes."""
    with err.status(title) if err.is_terminal else contextlib.nullcontext() as status:

        def progress(news: News) -> None:
            tell_news(news, err)
            if status is not None and news.processes:
                status.update(f"{title}: {news.up} of {news.processes} processes are up")

        yield progress


def tell_news(news: News, err: Console) -> None:
    """Print the lines since the last look."""
    for line in news.lines:
        err.print(f"weft: {line}")


@contextlib.contextmanager
def quiet_output() -> Iterator[None]:
    """Keep Ray's own words, which it prints to standard output, out of ours. Consoles made before are not affected."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def until_signal(stop: threading.Event) -> Iterator[None]:
    """Set `stop` on SIGTERM or SIGINT. Comes after Ray's start, which sets handlers of its own."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.set()

    former = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
