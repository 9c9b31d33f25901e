"""`weft journal replay` and `weft serve --journal`: exit codes and one line about what is wrong."""

import gzip
import json
from pathlib import Path

import pytest

from orchestrator.cli.cluster_file import LOCAL_CLUSTER
from orchestrator.cli.main import main
from orchestrator.core.config import SchedulerConfig
from orchestrator.core.events import DrainRequested
from orchestrator.wire.journal import JournalWriter, NodeHeader
from tests.builders import node_spec


def journal(path: Path, commands: tuple[()] | None) -> Path:
    """Write the journal of a node that was told to drain, which it answers with no commands."""
    writer = JournalWriter(path, NodeHeader(node_spec(), SchedulerConfig()))
    writer.record(1.0, DrainRequested(), commands)
    writer.close()
    return path


def test_replaying_tells_by_its_exit_code_whether_all_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same, other = journal(tmp_path / "same", ()), journal(tmp_path / "other", None)
    assert main(["journal", "replay", str(same)]) == 0
    assert capsys.readouterr().out == f"{same}: node n0: all 1 events replay identically\n"
    assert main(["journal", "replay", "--json", str(same), str(other)]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert (first["difference"], second["events"]) == ("", 1)
    assert "event 1 (DrainRequested), command 1: recorded an error; got nothing more" in second["difference"]


def test_a_journal_that_is_cut_off_replays_up_to_there_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = journal(tmp_path / "cut", ())
    cut.write_bytes(gzip.compress(gzip.decompress(cut.read_bytes())[:-10]))
    assert main(["journal", "replay", str(cut)]) == 0
    said = "all 1 events replay identically (it ends in the middle: its process was killed, or the file was cut off)"
    assert capsys.readouterr().out == f"{cut}: node n0: {said}\n"


def test_what_cannot_be_used_ends_with_two_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("text")
    assert main(["journal", "replay", str(tmp_path / "text")]) == 2
    assert main(["serve", "--cluster", str(LOCAL_CLUSTER), "--journal", str(tmp_path / "text" / "inside")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"weft: {tmp_path}/text: is not gzip",
        f"weft: --journal: {tmp_path}/text/inside: Not a directory",
    ]
