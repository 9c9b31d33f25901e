"""Recorded requests: who asked for how many tokens, when or after what, sharing which prefix. No text is in them.

`read_trace` reads four families of JSON lines, gzip or not, and finds out by the first line's fields which one a file is of:

    Weft's own      `schema.py`     sessions, agents, dependencies, pauses; also what `weft serve --record` writes
    Mooncake's      `mooncake.py`   arrivals, lengths and block hashes; with sessions and delays; or with a graph of dependencies
    Bailian's       `bailian.py`    conversations, in seconds
    Dynamo's        `dynamo.py`     what its frontend writes about every request (`dynamo.request.trace.v1`)

Whatever cannot be used ends in one `TraceError` that names file, line and field.
"""

from orchestrator.traces.clocks import interleaved, is_per_session_clock
from orchestrator.traces.reader import read_trace
from orchestrator.traces.times import TimeUnit
from orchestrator.traces.turns import TracedTurn, TraceError

__all__ = ["TimeUnit", "TraceError", "TracedTurn", "interleaved", "is_per_session_clock", "read_trace"]
