"""Reads a trace file's lines and decodes them; every way in which that can fail is one clear error."""

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import msgspec

from orchestrator.core.config import shown
from orchestrator.traces.turns import TraceError

Line = TypeVar("Line")
#: The number and bytes of each line.
Lines: TypeAlias = Iterator[tuple[int, bytes]]

GZIP_START = b"\x1f\x8b"
UTF8_MARK = b"\xef\xbb\xbf"
#: A line that is longer is none: one of a prompt of ten million tokens has some 10 MB.
LINE_BYTES_MAX = 1 << 28
NESTED = "lists or objects are nested too deeply"
#: How msgspec ends a message that concerns a field.
_AT_FIELD = re.compile(r"^(?P<wanted>.*) - at `\$\.?(?P<field>.*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`(?: - at `\$\.?(?P<parent>.*)`)?$")


def read_lines(path: Path) -> Lines:
    """Yield the number and bytes of every line that is not blank. Raises `TraceError`; gzip is told by the file's beginning."""
    number = 0
    try:
        with path.open("rb") as file:
            start = file.peek(len(GZIP_START))[: len(GZIP_START)]
            if path.suffix == ".gz" and start != GZIP_START:
                raise TraceError(f"{path}: is named .gz but holds no gzip data; rename it or compress it")
            with gzip.GzipFile(fileobj=file) if start == GZIP_START else nullcontext(file) as lines:
                for number, line in enumerate(iter(lambda: lines.readline(LINE_BYTES_MAX + 1), b""), 1):
                    if len(line) > LINE_BYTES_MAX:
                        raise TraceError(f"{path}:{number}: is longer than {LINE_BYTES_MAX} bytes; a line holds one request")
                    if number == 1:
                        line = line.removeprefix(UTF8_MARK)
                    if not line.isspace():
                        yield number, line
    except EOFError:
        raise TraceError(f"{path}:{number + 1}: the gzip data ends in the middle; the file was cut off") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"{path}:{number + 1}: the gzip data is damaged: {error}") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from None


def decoded(decoder: msgspec.json.Decoder[Line], line: bytes, where: str) -> Line:
    """Return a line as the decoder's type. Raises `TraceError`."""
    try:
        return decoder.decode(line)
    except RecursionError:
        problem = NESTED
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        try:
            return msgspec.convert(_integral(msgspec.json.decode(line)), decoder.type)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            problem = _problem(str(error), line)
    raise TraceError(f"{where}: {problem}")


def _integral(value: Any) -> Any:
    """Return a decoded value in which numbers such as 130.0 are whole ones: some writers know no others."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_integral(one) for one in cast(list[Any], value)]
    if isinstance(value, dict):
        return {name: _integral(one) for name, one in cast(dict[str, Any], value).items()}
    return value


def _problem(message: str, line: bytes) -> str:
    """Say what is wrong with a line that could not be decoded, beginning with the field where it is one."""
    try:
        line.decode()
        record: Any = msgspec.json.decode(line)
    except UnicodeDecodeError as error:
        return f"not UTF-8 text from byte {error.start} on"
    except msgspec.DecodeError as error:
        return f"not JSON: {error}"
    except RecursionError:
        return NESTED
    if not isinstance(record, dict):
        return f"must be a JSON object, is {line[:40].decode(errors='replace').strip()!r}"
    missing = _MISSING.match(message)
    if missing is not None:
        return f"{'.'.join(part for part in (missing['parent'], missing['field']) if part)}: missing"
    wrong = _AT_FIELD.match(message)
    if wrong is None:
        return message
    wanted, _, got = wrong["wanted"].partition(", got ")
    value = _value(cast(dict[str, Any], record), wrong["field"]) or got
    return f"{wrong['field']}: {wanted[:1].lower()}{wanted[1:]}" + (f", is {value}" if value else "")


def _value(record: dict[str, Any], field: str) -> str:
    """Return what a dotted field holds, shortened; empty for what lies inside a list."""
    value: Any = record
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            return ""
        value = cast(dict[str, Any], value)[part]
    return shown(value)
