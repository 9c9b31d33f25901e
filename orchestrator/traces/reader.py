"""The one way into a trace file: looks at its first line and lets the reader of that form do the rest."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import msgspec

from orchestrator.core.config import shown
from orchestrator.traces.bailian import FIELDS as BAILIAN_FIELDS
from orchestrator.traces.bailian import BailianReader
from orchestrator.traces.dynamo import SCHEMA, DynamoReader
from orchestrator.traces.lines import decoded, read_lines
from orchestrator.traces.mooncake import MooncakeReader
from orchestrator.traces.schema import SchemaReader
from orchestrator.traces.times import TimeUnit
from orchestrator.traces.turns import TracedTurn, TraceError

#: Fields that tell Mooncake's lines and their supersets.
MOONCAKE_FIELDS = frozenset({"input_length", "input_tokens"})
#: A first arrival that late is a date, in seconds since 1970 (this is in 2001).
DATES_FROM_S = 1e9
FIRST_LINE = msgspec.json.Decoder(dict[str, Any])


def read_trace(path: Path, unit: TimeUnit | None = None) -> Iterator[TracedTurn]:
    """Yield a trace's turns in order of arrival, or of the file. Raises `TraceError` at the first line that cannot be used.

    Times are seconds since the recording began; where they are dates, since the first arrival. `unit` is that of the file's times
    where its form does not say it.
    """
    began_s: float | None = None
    for turn in _turns(path, unit):
        if began_s is None:
            began_s = turn.arrival_s if turn.arrival_s >= DATES_FROM_S else 0.0
        yield replace(turn, arrival_s=turn.arrival_s - began_s) if began_s else turn
    if began_s is None:
        raise TraceError(f"{path}: holds no requests")


def _turns(path: Path, unit: TimeUnit | None) -> Iterator[TracedTurn]:
    """Return what the reader of a file's form reads. The file is opened once: it may be a pipe."""
    lines = read_lines(path)
    first = next(lines, None)
    if first is None:
        raise TraceError(f"{path}: holds no requests")
    number, text = first
    fields = decoded(FIRST_LINE, text, f"{path}:{number}")
    lines = chain([first], lines)
    if BAILIAN_FIELDS & fields.keys() and "schema" not in fields:
        return BailianReader(path, unit or TimeUnit.SECONDS).turns(lines)
    if "block_size" in fields and "schema" not in fields:
        _check_unit(unit, path, "Weft's own lines")
        return SchemaReader(path).turns(lines)
    if _is_dynamo(fields):
        _check_unit(unit, path, "dynamo.request.trace")
        return DynamoReader(path).turns(lines)
    if MOONCAKE_FIELDS & fields.keys() and "schema" not in fields:
        return MooncakeReader(path, unit).turns(lines)
    if "schema" in fields:
        raise TraceError(
            f"{path}:{number}: schema: {shown(fields['schema'])} with version {shown(fields.get('version'))} is not read; Weft's "
            "own, Mooncake's, Bailian's and dynamo.request.trace.v1 are"
        )
    raise TraceError(
        f"{path}:{number}: input_length: missing; a line must have timestamp, input_length and output_length, or be an event of "
        "dynamo.request.trace.v1"
    )


def _check_unit(unit: TimeUnit | None, path: Path, whose: str) -> None:
    """Raise `TraceError` if a form that has milliseconds is to be read as seconds."""
    if unit is TimeUnit.SECONDS:
        raise TraceError(f"{path}: times of {whose} are milliseconds by definition; leave --time-unit out")


def _is_dynamo(fields: dict[str, Any]) -> bool:
    event = fields.get("event")
    inner = cast(dict[str, Any], event) if isinstance(event, dict) else fields
    return str(inner.get("schema", "")).startswith(SCHEMA) or ("event_type" in inner and "block_size" not in inner)
