"""The process of a pool that drafts: it holds a draft model and its slots, and does nothing but draft for nodes that ask.

As in a process that keeps a beat nothing varies that need not: it has cores and a priority of its own (`beat.cores`,
`beat.realtime`), all memory from its start on, passes of as many rows as there are slots however many are taken, garbage
collection that never looks at what stays. It has no beat: it answers when it is asked.

It ends when the other end of the socket does.
"""

import sys
import threading
import time
from array import array
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from orchestrator.core.config import ConfigError, PoolConfig
from orchestrator.core.types import RequestId, Sampling
from orchestrator.wire.trust import Caller
from workers.engines.beat.messages import DraftsOpened, DraftsOpening, Unopened
from workers.engines.device import device_of
from workers.engines.drafter import Asked, Drafter, WindowsWanted
from workers.engines.drafts.answering import DraftPeer, DraftServer
from workers.engines.drafts.messages import SAID, Welcome
from workers.engines.eager import kv_bytes, use_threads
from workers.engines.greetings import door_at
from workers.engines.sequences import TokenSequence
from workers.engines.shape import read_architecture
from workers.realtime import bind, keep_memory, keep_objects, put_first

#: Passes after which what is compiled or laid out at first is, and that are measured then.
PASSES_FIRST, PASSES_MEASURED = 3, 8


def open_drafter(pool: PoolConfig, model_dir: Path) -> Drafter:
    """Return the draft model with all its slots. Raises `ConfigError`, or `CheckpointError`."""
    wanted, config = pool.drafter, pool.engine
    assert wanted is not None, f"pool {pool.name} does not draft"
    device = device_of(config.device)
    threads = config.threads or len(pool.beat.cores) or torch.get_num_threads()
    torch.set_num_threads(threads)
    windows = WindowsWanted(
        directory=Path(wanted.model),
        context_tokens=wanted.context_tokens_max,
        sequences=wanted.sequences_max,
        memory=lambda: kv_bytes(config, device, 0),
        within="drafter.",
        rows=wanted.sequences_max,
    )
    drafter = Drafter(windows, model_dir, read_architecture(model_dir), config, device, partial(use_threads, threads), None)
    if drafter.sequences_max < wanted.sequences_max:
        fit, size = drafter.sequences_max, drafter.context_tokens
        problem = f"must be at most {fit}, is {wanted.sequences_max}: there is no memory for more slots of {size} tokens"
        raise ConfigError("drafter.sequences_max", problem)
    return drafter


def pass_s(drafter: Drafter, vocabulary: int) -> float:
    """Return the seconds of a pass for all slots with windows as long as allowed; what is compiled at first is so afterwards."""
    context = drafter.context_tokens
    asked = [
        Asked(RequestId(-1 - slot), TokenSequence(array("I", [slot % vocabulary] * context), Sampling(), vocabulary), 1)
        for slot in range(drafter.sequences_max)
    ]
    shortest = float("inf")
    for number in range(PASSES_FIRST + PASSES_MEASURED):
        drafter.draft_what_is_read(asked)
        drafter.take_for_read()
        began = time.perf_counter()
        drafter.draft_what_is_read(asked)
        if number >= PASSES_FIRST:
            shortest = min(shortest, time.perf_counter() - began)
        for one in asked:
            assert one.sequence.take_drafts(), "nothing was drafted"
            drafter.forget(one.request)
    return shortest


def open_server(opening: DraftsOpening) -> tuple[DraftServer, DraftsOpened]:
    """Return what serves, and where. Raises `ConfigError`, or `OSError` if it cannot listen there."""
    pool, place = opening.pool, opening.place
    bind(pool.beat.cores, "beat.cores")
    put_first(pool.beat.realtime)
    keep_memory()
    with torch.inference_mode():
        drafter = open_drafter(pool, opening.model_dir)
        vocabulary = read_architecture(opening.model_dir).vocabulary
        measured_s = pass_s(drafter, vocabulary)
    welcome = Welcome(drafter.context_tokens, drafter.sequences_max)
    address, door = door_at(
        place.host, "drafter", Caller.DRAFTED, place.trust, _agreed, lambda connection, _: DraftPeer(connection, welcome)
    )
    return DraftServer(drafter, vocabulary, [door]), DraftsOpened(address, measured_s)


def _agreed(said: object) -> None:
    """Raise `ValueError` unless a node that connects speaks as this process does."""
    match said:
        case {"bytes": order, "drafts": version} if {"bytes": order, "drafts": version} == SAID:
            return
        case _:
            raise ValueError(f"it must speak as {SAID} says")


def serve(link: "Connection[object, object]") -> None:
    """Open the draft model, say where it is or why it cannot be had, and serve until the other end is gone."""
    opening = link.recv()
    assert isinstance(opening, DraftsOpening), f"{opening!r} is no opening"
    try:
        server, opened = open_server(opening)
    except Exception as error:  # Whatever it is, the other end says it, and nothing runs here.
        link.send(Unopened.by(error, opening.pool.name))
        return
    keep_objects()
    link.send(opened)
    threading.Thread(target=_close_with, args=(link, server), name="end", daemon=True).start()
    with torch.inference_mode():
        server.serve()


def _close_with(link: "Connection[object, object]", server: DraftServer) -> None:
    """Wait for the other end's end, and have `serve` end then."""
    with suppress(EOFError, OSError):
        link.recv()
    server.close()


def main() -> None:
    """Serve the other end of the socket whose descriptor is the argument."""
    with suppress(EOFError, OSError):
        serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
