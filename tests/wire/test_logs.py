"""Lines of a log: for people or as JSON, in a file of each process, with the request they are about, and never too many."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.config import LogConfig, LogFormat
from orchestrator.wire.logs import LINES_S_MAX, REQUEST, ROOT, open_log

log = logging.getLogger(f"{ROOT}.tests")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger(ROOT)
    before = root.handlers[:], root.level, root.propagate
    yield
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    root.handlers[:], root.level, root.propagate = before


def written(folder: Path) -> list[str]:
    return (folder / "node-0.log").read_text().splitlines()


def test_a_line_of_json_says_when_who_what_and_about_which_request(tmp_path: Path) -> None:
    open_log("node-0", LogConfig("debug", LogFormat.JSON, str(tmp_path)))
    log.debug("%s taken", "prefill", extra={REQUEST: "abc", "tokens": 5})
    [line] = map(json.loads, written(tmp_path))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "debug", "process": "node-0", "logger": "weft.tests", "message": "prefill taken", "request": "abc", "tokens": 5,
    }  # fmt: skip


def test_what_libraries_add_to_all_records_is_not_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*arguments: Any) -> logging.LogRecord:
        record = logging.LogRecord(*arguments)
        record.__dict__["_library_timestamp_ns"] = 5
        return record

    monkeypatch.setattr(logging, "_logRecordFactory", make)
    open_log("node-0", LogConfig("info", LogFormat.JSON, str(tmp_path)))
    log.info("up")
    assert set(json.loads(written(tmp_path)[0])) == {"time", "level", "process", "logger", "message"}


def test_a_line_for_people_and_a_trace_of_what_was_raised(tmp_path: Path) -> None:
    open_log("node-0", LogConfig("info", LogFormat.HUMAN, str(tmp_path)))
    log.debug("not written")
    try:
        raise ZeroDivisionError("a fault")
    except ZeroDivisionError:
        log.exception("broken", extra={REQUEST: "abc"})
    first, *trace = written(tmp_path)
    assert first[13:] == "error   node-0: broken request=abc"
    assert trace[-1] == "ZeroDivisionError: a fault"


def test_what_comes_again_and_again_is_kept_back_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = [1000.0]
    monkeypatch.setattr("time.time", lambda: second[0])
    monkeypatch.setattr("time.time_ns", lambda: int(second[0] * 1e9))
    open_log("node-0", LogConfig("debug", LogFormat.JSON, str(tmp_path)))
    for number in range(LINES_S_MAX + 7):
        log.warning("refused %d", number)
        log.debug("a request")  # these are as many as there are requests
    second[0] += 1
    log.warning("refused %d", 99)
    lines = [json.loads(line) for line in written(tmp_path)]
    assert sum(line["level"] == "debug" for line in lines) == LINES_S_MAX + 7
    warnings = [line for line in lines if line["level"] == "warning"]
    assert len(warnings) == LINES_S_MAX + 1
    assert warnings[-1]["kept_back"] == 7


def test_opening_again_leaves_one_line_a_happening(tmp_path: Path) -> None:
    for _ in range(2):
        open_log("node-0", LogConfig("info", LogFormat.JSON, str(tmp_path)))
    log.info("once")
    assert len(written(tmp_path)) == 1
