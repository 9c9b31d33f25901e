"""Operators' commands where no cluster is: one clear line, and the exit code that says whose fault it is."""

import json
import os
from pathlib import Path

import pytest

from orchestrator.cli.main import main
from orchestrator.fleet.head import Head, find_head, heads
from orchestrator.fleet.vital import end_here, started_at


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "weft").mkdir()
    return tmp_path / "weft"


def note(folder: Path, name: str, pid: int, started: str) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"address": "a", "pid": pid, "started": started, "log": "", "token": ""}))


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["drain", "decode-0"], 1, "no cluster was started on this machine by weft up; --address finds one elsewhere"),
        (["down", "--name", "x"], 1, 'no cluster named "x" was started on this machine'),
        (["resize", "decode", "2", "--address", "127.0.0.1:1"], 2, "--address: needs --name"),
        (["restart"], 2, "weft restart: needs --pool NAME, --gateways or --all"),
        (["restart", "--all", "--gateways"], 2, "--all means every pool and all gateways"),
        (["status", "--address", "127.0.0.1:1", "--name", "x"], 1, "cannot reach Ray at 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    said = capsys.readouterr()
    assert told in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize("arguments", [["resize", "decode", "none"], ["resize", "decode", "0"], ["drain"], ["up", "--no-such"]])
def test_unusable_arguments_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_several_clusters_on_a_machine_must_be_told_apart(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        note(state, name, os.getpid(), started_at(os.getpid()))
    assert main(["drain", "decode-0"]) == 2
    assert "several clusters run on this machine (one, two)" in capsys.readouterr().err


def test_a_note_of_a_ray_that_is_gone_is_none(state: Path) -> None:
    note(state, "mine", os.getpid(), started_at(os.getpid()))
    assert find_head("mine") == Head("a", os.getpid(), started_at(os.getpid()), "", "")
    # The number belongs to another process now.
    note(state, "gone", os.getpid(), "1")
    (state / "broken.json").write_text("{")
    assert heads() == ["mine"]
    assert not (state / "gone.json").exists()


def test_a_signal_goes_only_to_the_process_that_was_meant() -> None:
    assert not end_here(os.getpid(), "1")
    assert started_at(1 << 30) == ""
