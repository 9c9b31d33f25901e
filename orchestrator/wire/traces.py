"""Reads recorded agent sessions: who asked for how many tokens, after what, sharing which prefix. No text is in them.

A trace is JSON lines, gzip if its name ends in .gz. One object a request:

    id              unique number               session, agent   whose reasoning this is (agent "main" or a sub-agent)
    timestamp       arrival, ms                 deps             ids of requests that must have ended first
    gap_ms          tool or user time between the end of the last dependency and this arrival
    input_length    prompt tokens               output_length    generated tokens
    block_size      tokens of a block           hash_ranges      [[first, count], ...] of block ids, or hash_ids [id, ...]

A block id names the whole prefix up to and including its block, so that two requests with the same id share that prefix.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast


class TraceError(ValueError):
    """A trace cannot be used; the message names file, line and field."""


@dataclass(frozen=True, slots=True)
class TracedTurn:
    """One recorded request."""

    id: int
    session: str
    agent: str
    arrival_s: float
    #: Ids of turns that must have ended.
    after: tuple[int, ...]
    #: Seconds between the end of the last of those and this turn's start.
    gap_s: float
    input_tokens: int
    output_tokens: int
    block_tokens: int
    #: (first id, count) runs that name the prompt's full blocks in order.
    block_runs: tuple[tuple[int, int], ...]
    model: str = ""
    tenant: str = ""
    #: True where the agent's context was rewritten: compacted, edited or reset.
    seam: bool = False

    @property
    def blocks(self) -> list[int]:
        """Return the block ids one by one."""
        return [block for first, count in self.block_runs for block in range(first, first + count)]


def read_trace(path: Path) -> Iterator[TracedTurn]:
    """Yield a trace's turns in the file's order. Raises `TraceError` at the first line that cannot be used."""
    known: set[int] = set()
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _turn(line, f"{path}:{number}", known)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}:{number + 1}: cannot be read: {error}") from error
    if not known:
        raise TraceError(f"{path}: holds no requests")


def _turn(line: str, where: str, known: set[int]) -> TracedTurn:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise TraceError(f"{where}: must be an object, is {type(record).__name__}")
    fields = cast(dict[str, Any], record)
    identity = _count(fields, "id", where)
    if identity in known:
        raise TraceError(f"{where}: id: {identity} was used before")
    after = tuple(fields.get("deps", ()))
    missing = [other for other in after if other not in known]
    if missing:
        raise TraceError(f"{where}: deps: {missing[0]} is not an earlier request")
    known.add(identity)
    runs = fields["hash_ranges"] if "hash_ranges" in fields else _runs(fields.get("hash_ids", []))
    return TracedTurn(
        id=identity,
        session=str(fields.get("session") or identity),
        agent=str(fields.get("agent") or "main"),
        arrival_s=_count(fields, "timestamp", where) / 1e3,
        after=after,
        gap_s=max(0.0, float(fields.get("gap_ms") or 0.0)) / 1e3,
        input_tokens=_count(fields, "input_length", where),
        output_tokens=_count(fields, "output_length", where),
        block_tokens=_count(fields, "block_size", where),
        block_runs=tuple((int(first), int(count)) for first, count in runs),
    )


def _count(fields: dict[str, Any], name: str, where: str) -> int:
    value = fields.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
        raise TraceError(f"{where}: {name}: must be a number, 0 or more, is {value!r}")
    return int(value)


def _runs(blocks: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][0] + runs[-1][1] == block:
            runs[-1][1] += 1
        else:
            runs.append([block, 1])
    return runs
