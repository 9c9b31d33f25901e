"""What processes write down of their doings: one line a happening, for people or as JSON, with the request that it is about.

Neither texts of prompts and answers nor keys, tokens and secrets are logged; names of requests, tenants, models and nodes are.
Levels: debug is every request on every process it comes by, info what happens to the cluster, warning what somebody should see.
"""

import json
import logging
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.core.config import LogConfig, LogFormat

#: All of the product's loggers are below it.
ROOT = "weft"
#: Lines a second that one place in the code may write above debug: whoever knocks all the time must not fill the disk.
LINES_S_MAX = 20
#: Name of the attribute that says which request a line is about; `extra={REQUEST: ...}`.
REQUEST = "request"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def open_log(process: str, config: LogConfig) -> None:
    """Have this process's lines written as a cluster file says; harmless to repeat. Raises `OSError` for its file."""
    root = logging.getLogger(ROOT)
    root.setLevel(config.level.upper())
    root.propagate = False
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    handler = _file(process, config.folder) if config.folder else logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process) if config.format is LogFormat.JSON else _Human(process))
    handler.addFilter(_Limit())
    root.addHandler(handler)


def _file(process: str, folder: str) -> logging.Handler:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return logging.FileHandler(Path(folder) / f"{process}.log", encoding="utf-8", errors="backslashreplace")


class _Limit(logging.Filter):
    """Lets through so many lines a second from each place, and tells with the next one how many it kept back."""

    def __init__(self) -> None:
        super().__init__()
        #: By place: the second, lines in it, and lines kept back.
        self._places: dict[str, tuple[int, int, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            return True
        second = int(record.created)
        last, lines, kept = self._places.get(record.msg, (second, 0, 0))
        if last == second and lines >= LINES_S_MAX:
            self._places[record.msg] = (second, lines, kept + 1)
            return False
        if kept and last != second:
            record.kept_back, kept = kept, 0
        self._places[record.msg] = (second, lines + 1 if last == second else 1, kept)
        return True


class _Json(logging.Formatter):
    """One object a line."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname.lower(), "process": self._process, "logger": record.name}
        line |= {"message": record.getMessage(), **_fields(record)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Human(logging.Formatter):
    """Time, level, process, message, then what else there is."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = f"{clock}.{int(record.msecs):03} {record.levelname.lower():<7} {self._process}: {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Return what a line says besides its message (`extra`); what libraries such as Ray stamp records with begins with _."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD and not name.startswith("_")}
