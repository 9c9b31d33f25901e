"""`weft serve`: starts a cluster, says where it serves and what happens to it, drains it on SIGTERM or SIGINT."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from rich.console import Console

from orchestrator.core.config import ClusterConfig
from orchestrator.fleet.fleet import Fleet, News

#: Seconds between two looks at the cluster's news.
LOOK_EVERY_S = 1.0


def serve(config: ClusterConfig, address: str | None, attach: bool) -> bool:
    """Serve until a signal comes; True if everything that ran had ended by then. Raises `FleetFailed`."""
    out, err = Console(file=sys.stdout, highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
    stop = threading.Event()
    with quiet_output(), Fleet(config, address, attach) as fleet, _until_signal(stop):
        urls = start_fleet(fleet, config, err, stop)
        if not urls:
            return True
        out.print(f"weft: serving {', '.join(config.models)} at {', '.join(urls)}")
        while not stop.wait(LOOK_EVERY_S):
            for line in fleet.news().lines:
                err.print(f"weft: {line}")
        return drain_fleet(fleet, config, err)


def start_fleet(fleet: Fleet, config: ClusterConfig, err: Console, stop: threading.Event) -> tuple[str, ...]:
    """Start a cluster with progress on a terminal. Returns its gateways' URLs, none if `stop` was set meanwhile."""
    title = f"starting cluster {config.cluster.name}"
    with err.status(title) if err.is_terminal else contextlib.nullcontext() as status:

        def progress(news: News) -> None:
            if status is not None:
                status.update(f"{title}: {news.up} of {news.members} processes are up")

        return fleet.start(progress, stop.is_set)


def drain_fleet(fleet: Fleet, config: ClusterConfig, err: Console) -> bool:
    """End a cluster; False if some requests did not end in the time they had."""
    limit_s = config.cluster.drain_s
    with err.status(f"draining, {limit_s:g} s at most") if err.is_terminal else contextlib.nullcontext():
        drained = fleet.stop(limit_s)
    if not drained:
        err.print(f"weft: some requests did not end within {limit_s:g} s")
    return drained


@contextlib.contextmanager
def quiet_output() -> Iterator[None]:
    """Keep Ray's own words, which it prints to standard output, out of ours. Consoles made before are not affected."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def _until_signal(stop: threading.Event) -> Iterator[None]:
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
