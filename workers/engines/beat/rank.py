"""The process of an FFN rank of a group that keeps a beat: it computes what attention ranks send it, and does nothing else.

It is to answer as soon as it is asked, every time. So it has cores and a priority of its own (`beat.ffn_cores`, `beat.realtime`),
its other threads sleep until somebody connects, or the end, garbage collection sees only what is young, and memory that a
message's work gives back is kept for the next one. Messages have as many rows as a micro-batch, but those for experts: who picked
none here is not sent.

It ends when the other end of the socket does.
"""

import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection

from workers.engines.beat.messages import RankOpened, RankOpening, Unopened
from workers.engines.split.rank import FfnRank
from workers.realtime import bind, keep_memory, keep_objects, put_first


def open_rank(opening: RankOpening) -> FfnRank:
    """Return the rank, loaded. Raises `ConfigError`."""
    pool = opening.pool
    beat, engine, split = pool.beat, pool.engine, pool.split
    assert split is not None, f"pool {pool.name} has no FFN ranks"
    bind(beat.ffn_cores, "beat.ffn_cores")
    put_first(beat.realtime)
    keep_memory()
    threads = split.threads or len(beat.ffn_cores)
    rank, ranks, spare = opening.rank, split.ffn, split.spare_slots
    return FfnRank(opening.model_dir, engine.dtype, "cpu", rank, ranks, spare, threads, engine.weights, opening.network)


def serve(link: "Connection[object, object]") -> None:
    """Open a rank, say where it is or why it cannot be had, and serve until the other end is gone."""
    opening = link.recv()
    assert isinstance(opening, RankOpening), f"{opening!r} is no opening"
    try:
        rank = open_rank(opening)
    except Exception as error:  # Whatever it is, the other end says it, and nothing runs here.
        link.send(Unopened.by(error, opening.pool.name))
        return
    keep_objects()
    link.send(RankOpened(rank.address, rank.network_address))
    threading.Thread(target=_close_with, args=(link, rank), name="end", daemon=True).start()
    rank.serve()


def _close_with(link: "Connection[object, object]", rank: FfnRank) -> None:
    """Wait for the other end's end, and have the rank's `serve` end then."""
    with suppress(EOFError, OSError):
        link.recv()
    rank.close()


def main() -> None:
    """Serve the other end of the socket whose descriptor is the argument."""
    with suppress(EOFError, OSError):
        serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
