"""Alibaba Cloud's traces of Qwen on Bailian: conversations, times in seconds, blocks of 16 tokens.

    chat_id, parent_chat_id            a request and the one whose conversation it continues; -1 for none
    timestamp                          arrival, seconds
    input_length, output_length        tokens
    hash_ids                           a block has 16 tokens, the last may be part filled
    type, turn                         text, search, image or file, and the request's place in its conversation: not needed

A request starts as long after the one it continues as it came after that one did; a parent outside the file is none. What a
block's hash covers is not published, so that here it names a block only together with all blocks before it: which is what it
would name already if it covered those. https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon (read in November 2026)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from orchestrator.traces.lines import Lines, decoded
from orchestrator.traces.order import full_blocks, unmet
from orchestrator.traces.schema import Count, Milliseconds, Positive
from orchestrator.traces.times import TimeUnit, seconds
from orchestrator.traces.turns import BlockNames, Runs, TracedTurn, TraceError

#: What tells this form from others.
FIELDS = frozenset({"chat_id", "parent_chat_id"})
BLOCK_TOKENS = 16
#: Whose child a conversation's first request is.
NO_PARENT = -1


class BailianLine(msgspec.Struct):
    """One line, field by field."""

    chat_id: int | str
    parent_chat_id: int | str
    timestamp: Milliseconds
    input_length: Positive
    output_length: Count
    hash_ids: list[int | str] | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    chat: int | str
    parent: int | str
    arrival_s: float
    input_tokens: int
    output_tokens: int
    #: None where the line has no names.
    runs: Runs | None


class BailianReader:
    """Reads one file of such lines. The whole file is looked at before its first turn is known: who continues whom shows then."""

    def __init__(self, path: Path, unit: TimeUnit = TimeUnit.SECONDS) -> None:
        self._path = path
        self._unit = unit
        self._names = BlockNames()
        #: Whether lines name their blocks; None before the first one.
        self._named: bool | None = None

    def turns(self, lines: Lines) -> Iterator[TracedTurn]:
        """Yield the file's turns in order of arrival. Raises `TraceError`."""
        decoder = msgspec.json.Decoder(BailianLine)
        rows: dict[int | str, _Row] = {}
        for number, text in lines:
            row = self._row(decoded(decoder, text, f"{self._path}:{number}"), number)
            if row.chat in rows:
                raise TraceError(f"{self._path}:{number}: chat_id: {row.chat!r} was on line {rows[row.chat].number} before")
            rows[row.chat] = row
        turns: dict[int | str, TracedTurn] = {}
        for row in rows.values():
            turns[row.chat] = self._turn(len(turns), row, self._former(row, rows, turns))
        return iter(sorted(turns.values(), key=lambda turn: turn.arrival_s))

    def _row(self, line: BailianLine, number: int) -> _Row:
        where = f"{self._path}:{number}"
        runs: Runs | None = None
        self._named = self._named if self._named is not None else line.hash_ids is not None
        if self._named is not (line.hash_ids is not None):
            raise TraceError(
                f"{where}: hash_ids: {'missing, but earlier lines have them' if self._named else 'earlier lines have none'}"
            )
        if line.hash_ids is not None:
            named = self._names.chained(line.hash_ids)
            runs = full_blocks(named, line.input_length, BLOCK_TOKENS, where, "hash_ids")
        arrival_s = seconds(line.timestamp, self._unit, where)
        return _Row(number, line.chat_id, line.parent_chat_id, arrival_s, line.input_length, line.output_length, runs)

    def _former(self, row: _Row, rows: dict[int | str, _Row], turns: dict[int | str, TracedTurn]) -> TracedTurn | None:
        """Return the request that one continues; None if there is none in this file."""
        if row.parent == NO_PARENT or row.parent not in rows:
            return None
        where = f"{self._path}:{row.number}"
        if row.parent not in turns:
            waits = {one.chat: (one.number, [one.parent]) for one in rows.values()}
            raise TraceError(f"{where}: parent_chat_id: {unmet(row.chat, row.parent, waits)}")
        former = turns[row.parent]
        if row.arrival_s < former.arrival_s:
            raise TraceError(
                f"{where}: timestamp: {row.arrival_s * self._unit.per_second:.15g} is before "
                f"{former.arrival_s * self._unit.per_second:.15g}, when the request came that this one continues"
            )
        return former

    def _turn(self, identity: int, row: _Row, former: TracedTurn | None) -> TracedTurn:
        return TracedTurn(
            id=identity,
            session=f"chat {row.chat}" if former is None else former.session,
            agent="main",
            arrival_s=row.arrival_s,
            after=() if former is None else (former.id,),
            gap_s=0.0 if former is None else row.arrival_s - former.arrival_s,
            input_tokens=row.input_tokens,
            output_tokens=row.output_tokens,
            block_tokens=0 if row.runs is None else BLOCK_TOKENS,
            block_runs=row.runs or (),
        )
