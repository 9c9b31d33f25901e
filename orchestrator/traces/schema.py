"""Weft's own trace lines, the form that `weft serve --record` writes and that keeps most of what agents do.

    id              number, unique; without any ids, requests are numbered from 0 in the file's order
    timestamp       arrival, ms                 deps             ids of requests that must have ended first
    gap_ms          tool or user time between the end of the last dependency and this arrival
    input_length    prompt tokens               output_length    generated tokens
    block_size      tokens of a block, 0 where there are lengths only
    hash_ranges     [[first, count], ...] of block names; or hash_ids: [name, ...]
    session, agent  whose reasoning this is (agent "main" or a sub-agent's name); model, tenant; seam: true where it was rewritten
    stop            "tool_use": the model waits for a tool at the end; "end_turn": it has said all it has to say; else unknown

A block's name stands for the whole prefix up to and including that block. Other fields are for other readers.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from orchestrator.traces.lines import Lines, decoded
from orchestrator.traces.order import Timeline, full_blocks, unmet
from orchestrator.traces.turns import DENSE_FIRST, BlockNames, Runs, TracedTurn, TraceError, merged

#: More tokens than any context or answer has, and more milliseconds than any clock shows: beyond them a number is a mistake.
TOKENS_MAX = 1 << 32
MILLISECONDS_MAX = 1e15
Count = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=MILLISECONDS_MAX)]
Identity = Annotated[int, msgspec.Meta(ge=0)]
#: Ids from here on, such as dates, are replaced by numbers that lie together, from here on too: others count with them.
NUMBERED_FIRST = 1 << 24
#: Names beyond are those of blocks that a file names otherwise.
BlockName = Annotated[int, msgspec.Meta(ge=0, le=DENSE_FIRST - 1)]


class SchemaLine(msgspec.Struct):
    """One line, field by field."""

    timestamp: Milliseconds
    input_length: Positive
    output_length: Count
    block_size: Count
    id: Identity | None = None
    session: str | int | None = None
    agent: str | None = None
    deps: list[int] | None = None
    gap_ms: Milliseconds | None = None
    hash_ids: list[int | str] | None = None
    hash_ranges: list[tuple[BlockName, Positive]] | None = None
    model: str | None = None
    tenant: str | None = None
    seam: bool | None = None
    stop: str | None = None


#: `stop` of a turn whose model waits for a tool, and of one whose model has said all it has to say.
TOOL_USE, END_TURN = "tool_use", "end_turn"


def _calls(stop: str | None) -> bool | None:
    return None if stop not in (TOOL_USE, END_TURN) else stop == TOOL_USE


class _Waits(msgspec.Struct):
    """What a line waits for, read on to explain a wrong dependency; lenient, as the line may have other faults."""

    id: int | None = None
    deps: list[int] | None = None


class SchemaReader:
    """Reads one file of such lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._decoder = msgspec.json.Decoder(SchemaLine)
        self._names = BlockNames()
        self._timeline = Timeline()
        self._lines: Lines = iter(())
        #: Of the requests so far, by the ids that the file gives them: their ids from here on, and line and dependencies.
        self._numbers: dict[int, int] = {}
        self._waits: dict[int, tuple[int, Sequence[int]]] = {}
        self._block_tokens: int | None = None
        self._numbered = False

    def turns(self, lines: Lines) -> Iterator[TracedTurn]:
        """Yield the file's turns. Raises `TraceError`."""
        self._lines = lines
        for number, text in lines:
            where = f"{self._path}:{number}"
            line = decoded(self._decoder, text, where)
            turn = self._turn(line, number, where)
            self._timeline.add(turn, line.session is not None, where)
            yield turn

    def _turn(self, line: SchemaLine, number: int, where: str) -> TracedTurn:
        identity = self._identity(line, number, where)
        return TracedTurn(
            id=self._numbers[identity],
            session=f"request {identity}" if line.session is None else str(line.session),
            agent=line.agent or "main",
            arrival_s=line.timestamp / 1e3,
            after=tuple(self._numbers[other] for other in line.deps or ()),
            gap_s=(line.gap_ms or 0.0) / 1e3,
            input_tokens=line.input_length,
            output_tokens=line.output_length,
            block_tokens=line.block_size,
            block_runs=self._blocks(line, where),
            model=line.model or "",
            tenant=line.tenant or "",
            seam=bool(line.seam),
            calls=_calls(line.stop),
        )

    def _identity(self, line: SchemaLine, number: int, where: str) -> int:
        """Return a request's id in the file, which is known from here on. Raises `TraceError`."""
        if not self._numbers:
            self._numbered = line.id is None
        elif self._numbered is not (line.id is None):
            problem = "missing, but earlier lines have one" if line.id is None else "earlier lines have none"
            raise TraceError(f"{where}: id: {problem}")
        identity = len(self._numbers) if line.id is None else line.id
        if identity in self._numbers:
            raise TraceError(f"{where}: id: {identity} was used before; every request needs its own")
        waits = (number, line.deps or ())
        for other in waits[1]:
            if other not in self._numbers:
                raise TraceError(f"{where}: deps: {unmet(identity, other, self._all_waits(identity, waits))}")
        self._numbers[identity] = identity if identity < NUMBERED_FIRST else NUMBERED_FIRST + len(self._numbers)
        self._waits[identity] = waits
        return identity

    def _all_waits(self, identity: int, waits: tuple[int, Sequence[int]]) -> Mapping[int, tuple[int, Sequence[int]]]:
        """Return line and dependencies of a request, of all before it and, reading on, of all that follow."""
        found = {**self._waits, identity: waits}
        decoder = msgspec.json.Decoder(_Waits)
        for number, text in self._lines:
            line = decoded(decoder, text, f"{self._path}:{number}")
            found.setdefault(len(found) if line.id is None else line.id, (number, line.deps or ()))
        return found

    def _blocks(self, line: SchemaLine, where: str) -> Runs:
        if self._block_tokens is None:
            self._block_tokens = line.block_size
        elif line.block_size != self._block_tokens:
            raise TraceError(f"{where}: block_size: is {line.block_size}, but earlier lines have {self._block_tokens}")
        field = "hash_ids" if line.hash_ranges is None else "hash_ranges"
        runs = self._names.runs(line.hash_ids or ()) if line.hash_ranges is None else merged(line.hash_ranges)
        if line.block_size:
            return full_blocks(runs, line.input_length, line.block_size, where, field)
        if runs:
            raise TraceError(f"{where}: block_size: is 0, but {field} names blocks; say how many tokens a block has")
        return ()
