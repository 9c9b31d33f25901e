"""Gets the requests to simulate: from a recorded trace, or made up by its parameters; and says what there is to know of them."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from orchestrator.cli.cluster_file import UnusableInput
from orchestrator.cli.sweeps import copies
from orchestrator.sim.synthetic import PREFIX, parse_synthetic
from orchestrator.traces import TimeUnit, TracedTurn, interleaved, is_per_session_clock, read_trace

#: Seconds between the starts of sessions, in the mean, where a trace gives each its own clock.
SESSION_GAP_S = 20.0

#: Requests of a trace and its copies together.
REQUESTS_MAX = 10_000_000


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their recorded arrival, and what was noticed about them, one line each."""

    turns: Sequence[TracedTurn]
    notes: tuple[str, ...]


def add_trace(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Declare the options that name a trace and say how it is to be read."""
    parser.add_argument("--trace", required=required, metavar="FILE", help="recorded requests, or synthetic:sessions=100,seed=1")
    parser.add_argument(
        "--time-unit",
        type=TimeUnit,
        choices=list(TimeUnit),
        help="of a file's times (s for Bailian's, else ms; must be given where they could be either)",
    )


def read_workload(trace: str, limit: int | None, seed: int, load: int = 1, unit: TimeUnit | None = None) -> Workload:
    """Return a trace's first `limit` requests, or all, `load` times over. Raises `TraceError` and `UnusableInput`."""
    turns = _turns(trace, limit, unit)
    notes: list[str] = []
    if limit is not None and len(turns) == limit:
        notes.append(f"Only the trace's first {limit:,} requests are simulated.")
    if is_per_session_clock(turns):
        turns = interleaved(turns, SESSION_GAP_S, seed)
        notes.append(
            f"Every session of the trace has its own clock: they are started at random, {SESSION_GAP_S:g} s apart in the mean."
        )
    if load * len(turns) > REQUESTS_MAX:
        raise UnusableInput(f"--load {load}: would be {load * len(turns):,} requests; at most {REQUESTS_MAX:,} can be simulated")
    if load > 1:
        turns = copies(turns, load, seed)
        notes.append(f"The trace is there {load:,} times, copied sessions starting at random over its span.")
    if not any(turn.block_tokens for turn in turns):
        notes.append("The trace has lengths only: no prefixes are known, so nothing can be found in a cache.")
    return Workload(turns, tuple(notes))


def _turns(trace: str, limit: int | None, unit: TimeUnit | None) -> list[TracedTurn]:
    if trace.startswith(PREFIX):
        if unit is not None:
            raise UnusableInput(f"--time-unit {unit}: {trace} is made up and has no times to be read; leave it out")
        try:
            return parse_synthetic(trace)[:limit]
        except ValueError as error:
            raise UnusableInput(f"--trace {trace}: {error}") from None
    return list(islice(read_trace(Path(trace), unit), limit))
