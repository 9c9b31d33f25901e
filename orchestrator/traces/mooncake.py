"""Mooncake's trace lines and what others have added to them.

    timestamp, input_length, output_length, hash_ids      one request; a block has 512 tokens, the last may be part filled
    + session_id, delay                                   turns of one session: each starts `delay` ms after the one before ended
    + request_id, wait_for, delay, tool_wait_ms           a graph: a request starts so many ms after all that it waits for ended

Also known are `created_time`, `delay_ms`, `input_tokens` and `output_tokens` as other names, `prefix_reset` for a rewritten
context, and the delta form, in which a session's later turns list only their new tokens: there no turn begins with the blocks of
the one before it. Times are milliseconds; where they could as well be seconds, the reader must be told. The fields' meaning
follows the replay in NVIDIA Dynamo that reads the same files:
https://docs.rs/dynamo-data-gen/1.4.0/dynamo_data_gen/mooncake/ (read in November 2026), https://github.com/kvcache-ai/Mooncake
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from orchestrator.traces.lines import Lines, decoded
from orchestrator.traces.order import Timeline, full_blocks, unmet
from orchestrator.traces.schema import Count, Milliseconds, Positive
from orchestrator.traces.times import TimeUnit, check_milliseconds, seconds
from orchestrator.traces.turns import DENSE_FIRST, BlockNames, Runs, TracedTurn, TraceError

#: Tokens of a block: first that of Mooncake's own traces (https://github.com/kvcache-ai/Mooncake, FAST25-release/traces).
BLOCK_TOKENS = (512, 16, 32, 64, 128, 256, 1024, 2048)
#: Names from here on are those of blocks that a delta trace does not name. Far above any that `BlockNames` gives.
UNNAMED_FIRST = DENSE_FIRST << 8


class MooncakeLine(msgspec.Struct):
    """One line, field by field."""

    timestamp: Milliseconds | None = None
    created_time: Milliseconds | None = None
    input_length: Positive | None = None
    input_tokens: Positive | None = None
    output_length: Count | None = None
    output_tokens: Count | None = None
    hash_ids: list[int | str] | None = None
    session_id: str | int | None = None
    request_id: str | int | None = None
    wait_for: list[str | int] | None = None
    delay: Milliseconds | None = None
    delay_ms: Milliseconds | None = None
    tool_wait_ms: Milliseconds | None = None
    prefix_reset: bool | None = None
    model: str | None = None

    @property
    def arrival(self) -> float | None:
        """When it came, in the file's unit."""
        return self.timestamp if self.timestamp is not None else self.created_time


@dataclass(frozen=True, slots=True)
class _Row:
    """A line with its aliases resolved and its block names as runs."""

    number: int
    line: MooncakeLine
    arrival_s: float | None
    delay_s: float | None
    input_tokens: int
    output_tokens: int
    blocks: int
    runs: Runs


class MooncakeReader:
    """Reads one file of such lines. The whole file is looked at before its first turn is known.

    Args:
        unit: of `timestamp`, `created_time` and `delay`; None for milliseconds, unless they look like seconds.
    """

    def __init__(self, path: Path, unit: TimeUnit | None = None) -> None:
        self._path = path
        self._told_unit = unit
        self._unit = unit or TimeUnit.MILLISECONDS
        self._names = BlockNames()
        self._rows: list[_Row] = []
        self._block_tokens = 0
        #: Set if no line has a time: then everything that waits for nothing starts at once.
        self._timeless = False

    def turns(self, lines: Lines) -> Iterator[TracedTurn]:
        """Yield the file's turns in order of arrival. Raises `TraceError`."""
        decoder = msgspec.json.Decoder(MooncakeLine)
        for number, text in lines:
            where = f"{self._path}:{number}"
            self._rows.append(self._row(decoded(decoder, text, where), number, where))
        if self._told_unit is None:
            times = [(row.number, row.line.arrival) for row in self._rows]
            check_milliseconds([(number, time) for number, time in times if time is not None], self._path)
        self._block_tokens = self._block_size()
        self._timeless = all(row.arrival_s is None for row in self._rows)
        if any(row.line.wait_for is not None for row in self._rows):
            return iter(sorted(self._graph(), key=lambda turn: turn.arrival_s))
        if any(row.line.session_id is not None for row in self._rows):
            turns = self._sessions()
            return iter(sorted(self._whole(turns) if _is_delta(turns) else turns, key=lambda turn: turn.arrival_s))
        return self._requests()

    def _row(self, line: MooncakeLine, number: int, where: str) -> _Row:
        names = line.hash_ids or ()
        runs = self._names.runs(names)
        line.hash_ids = None
        input_tokens = line.input_length if line.input_length is not None else line.input_tokens
        output_tokens = line.output_length if line.output_length is not None else line.output_tokens
        if input_tokens is None or output_tokens is None:
            raise TraceError(f"{where}: {'input_length' if input_tokens is None else 'output_length'}: missing")
        arrival_s = None if line.arrival is None else seconds(line.arrival, self._unit, where)
        return _Row(number, line, arrival_s, self._delay_s(line), input_tokens, output_tokens, len(names), runs)

    def _delay_s(self, line: MooncakeLine) -> float | None:
        """Return the pause before a request; the field with its unit in its name has that unit always."""
        if line.delay is not None:
            return line.delay / self._unit.per_second
        return None if line.delay_ms is None else line.delay_ms / 1e3

    def _block_size(self) -> int:
        """Return the tokens of a block that the line with the most names agrees with; 0 if no line has names."""
        row = max(self._rows, key=lambda row: row.blocks, default=None)
        if row is None or not row.blocks:
            return 0
        for size in BLOCK_TOKENS:
            if row.blocks in (row.input_tokens // size, -(-row.input_tokens // size)):
                return size
        raise TraceError(
            f"{self._path}:{row.number}: hash_ids: {row.blocks} names for {row.input_tokens} tokens; "
            f"a block must have {', '.join(str(size) for size in sorted(BLOCK_TOKENS))} tokens"
        )

    def _turn(self, number: int, row: _Row, arrival_s: float, after: tuple[int, ...], gap_s: float) -> TracedTurn:
        where, session = f"{self._path}:{row.number}", row.line.session_id
        size = self._block_tokens
        runs = full_blocks(row.runs, row.input_tokens, size, where, "hash_ids") if size else ()
        return TracedTurn(
            id=number,
            session=f"request {number}" if session is None else str(session),
            agent="main",
            arrival_s=arrival_s,
            after=after,
            gap_s=gap_s,
            input_tokens=row.input_tokens,
            output_tokens=row.output_tokens,
            block_tokens=size,
            block_runs=runs,
            model=row.line.model or "",
            seam=bool(row.line.prefix_reset),
        )

    def _start_s(self, row: _Row) -> float:
        """Return when a request starts that waits for none."""
        if row.arrival_s is None and not self._timeless:
            raise TraceError(f"{self._path}:{row.number}: timestamp: missing, and there is no other request to wait for")
        return row.arrival_s or 0.0

    # --- the three forms ----------------------------------------------------------------------------------------------

    def _requests(self) -> Iterator[TracedTurn]:
        """Yield requests that know nothing of each other."""
        timeline = Timeline(self._unit)
        for number, row in enumerate(self._rows):
            turn = self._turn(number, row, self._start_s(row), (), 0.0)
            timeline.add(turn, False, f"{self._path}:{row.number}")
            yield turn

    def _sessions(self) -> list[TracedTurn]:
        """Return turns that follow each other in sessions; without a delay, the time between two arrivals is taken for it."""
        latest: dict[str, TracedTurn] = {}
        turns: list[TracedTurn] = []
        for number, row in enumerate(self._rows):
            former = latest.get(str(row.line.session_id)) if row.line.session_id is not None else None
            if former is None:
                turn = self._turn(number, row, self._start_s(row) + (row.delay_s or 0.0), (), 0.0)
            else:
                gap_s = self._gap_s(row, former)
                turn = self._turn(number, row, former.arrival_s + gap_s, (former.id,), gap_s)
            latest[turn.session] = turn
            turns.append(turn)
        return turns

    def _gap_s(self, row: _Row, former: TracedTurn) -> float:
        if row.delay_s is not None:
            return row.delay_s
        where = f"{self._path}:{row.number}"
        if row.arrival_s is None:
            raise TraceError(f"{where}: delay: missing, and so is timestamp; one must say when this turn starts")
        if row.arrival_s < former.arrival_s:
            sooner, later = (time * self._unit.per_second for time in (row.arrival_s, former.arrival_s))
            raise TraceError(
                f"{where}: timestamp: {sooner:.12g} comes after {later:.12g} in session {former.session!r}; a session's lines "
                "must be sorted by time"
            )
        return row.arrival_s - former.arrival_s

    def _graph(self) -> Iterator[TracedTurn]:
        """Yield requests that wait for others by name."""
        by_name: dict[str, TracedTurn] = {}
        for number, row in enumerate(self._rows):
            where = f"{self._path}:{row.number}"
            if row.line.request_id is None:
                raise TraceError(f"{where}: request_id: missing; others wait for requests by it")
            name = str(row.line.request_id)
            if name in by_name:
                raise TraceError(f"{where}: request_id: {name!r} was used before; every request needs its own")
            waits = [str(other) for other in row.line.wait_for or ()]
            for other in waits:
                if other not in by_name:
                    raise TraceError(f"{where}: wait_for: {self._unmet(name, other)}")
            gap_s = (row.delay_s or 0.0) + (row.line.tool_wait_ms or 0.0) / 1e3
            if waits:
                arrival_s = max(by_name[other].arrival_s for other in waits) + gap_s
                turn = self._turn(number, row, arrival_s, tuple(by_name[other].id for other in waits), gap_s)
            else:
                turn = self._turn(number, row, self._start_s(row) + gap_s, (), 0.0)
            by_name[name] = turn
            yield turn

    def _unmet(self, name: str, other: str) -> str:
        waits: dict[str, tuple[int, Sequence[str]]] = {}
        for row in self._rows:
            waits.setdefault(str(row.line.request_id), (row.number, [str(one) for one in row.line.wait_for or ()]))
        return unmet(name, other, waits)

    def _whole(self, turns: Sequence[TracedTurn]) -> Iterator[TracedTurn]:
        """Yield a delta trace's turns with whole prompts: all that came before in the session, then what is new.

        The blocks beyond a session's first prompt get names of their own: they hold answers that no other session has.
        """
        latest: dict[str, TracedTurn] = {}
        unnamed = UNNAMED_FIRST
        for turn in turns:
            former = latest.get(turn.session)
            if former is not None:
                tokens = former.input_tokens + former.output_tokens + turn.input_tokens
                size = self._block_tokens
                fresh = tokens // size - former.input_tokens // size if size else 0
                runs = (*former.block_runs, (unnamed, fresh)) if fresh else former.block_runs
                unnamed += fresh + 1
                turn = replace(turn, input_tokens=tokens, block_runs=runs)
            latest[turn.session] = turn
            yield turn


def _is_delta(turns: Sequence[TracedTurn]) -> bool:
    """Tell whether sessions' later turns list only what is new in them: none could be a whole prompt after the one before it."""
    latest: dict[str, TracedTurn] = {}
    found = False
    for turn in turns:
        former = latest.get(turn.session)
        if former is not None:
            found = True
            if turn.block_runs and former.block_runs and turn.block_runs[0][0] == former.block_runs[0][0]:
                return False
            if not turn.block_tokens and turn.input_tokens >= former.input_tokens + former.output_tokens:
                return False
        latest[turn.session] = turn
    return found
