"""`weft journal replay` and `weft serve --journal`: exit codes and one line about what is wrong."""

import gzip
import json
from pathlib import Path

import pytest

from orchestrator.cli.cluster_file import LOCAL_CLUSTER, read_cluster
from orchestrator.cli.main import main
from orchestrator.core.commands import Assign, RunStep, Scores, Slice
from orchestrator.core.config import SchedulerConfig
from orchestrator.core.events import Assigned, DrainRequested, RequestArrived, Resumed, SliceResult, StepFinished
from orchestrator.core.types import BlockId, GatewayId, ModelName, NodeId, Request, RequestId, StepId, TenantId, attempt_id
from orchestrator.wire.journal import JournalWriter, NodeHeader, cluster_header
from tests.builders import assignment, node_spec


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


def test_one_request_is_shown_with_what_was_decided_for_it_and_without_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, step = tmp_path / "two", StepId(1)
    slices = tuple(Slice(RequestId(number), 0, 9, 0, (BlockId(0),), True) for number in (1, 2))
    writer = JournalWriter(path, NodeHeader(node_spec(), SchedulerConfig()))
    writer.record(1.0, Assigned(assignment(1, name="other")), ())
    writer.record(2.0, Assigned(assignment(2, name="mine")), (RunStep(step, slices),))
    writer.record(3.0, StepFinished(step, tuple(SliceResult(RequestId(number), 1) for number in (1, 2)), 0.5), None)
    writer.record(4.0, StepFinished(step, (SliceResult(RequestId(1), 1),), 0.5), ())
    writer.close()
    assert main(["journal", "show", str(path), "--request", "mine"]) == 0
    assigned, ran, finished = capsys.readouterr().out.splitlines()
    assert assigned.startswith('2.000000 Assigned {"assignment": {"request": 2, ')
    sliced = '{"request": 2, "start": 0, "count": 9, "first_block": 0, "sample": true, "draft_max": 0, "model_draft_max": 0}'
    assert ran == f'    RunStep {{"step": 1, "decoding": 0, "steps_max": 1, "slices": [{sliced}]}}'
    result = '{"request": 2, "output_tokens": 1, "stopped": false, "failure": null, "drafted_tokens": 0, "drafting_s": null}'
    assert finished == (
        f'3.000000 StepFinished {{"step": 1, "seconds": 0.5, "steps": 1, "results": [{result}]}} (the core raised)'
    )
    routed = tmp_path / "routed"
    gateway = JournalWriter(routed, cluster_header(GatewayId(0), read_cluster(LOCAL_CLUSTER)))
    scores = Scores("predicted-time", hit_tokens=4, predicted_ttft_s=0.25)
    request = Request(RequestId(2), ModelName("m"), TenantId("t"), 9, (), 8, name="mine")
    gateway.record(1.0, RequestArrived(request), (Assign(NodeId("n"), assignment(2), scores),))
    # it goes on elsewhere, where it is called otherwise
    again = assignment(attempt_id(RequestId(2), 1), generated_tokens=3)
    gateway.record(2.0, Resumed(RequestId(2), 3, ()), (Assign(NodeId("m"), again, scores),))
    gateway.close()
    assert main(["journal", "show", str(routed), "--request", "mine"]) == 0
    shown = capsys.readouterr().out
    assert '"predicted_ttft_s": 0.25' in shown
    assert '"generated_tokens": 3' in shown
    assert main(["journal", "show", str(path), "--request", "nobody"]) == 2
    assert capsys.readouterr().err == f"weft: {path}: no request in it is called 'nobody'\n"


def test_what_cannot_be_used_ends_with_two_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("text")
    assert main(["journal", "replay", str(tmp_path / "text")]) == 2
    assert main(["serve", "--cluster", str(LOCAL_CLUSTER), "--journal", str(tmp_path / "text" / "inside")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"weft: {tmp_path}/text: is not gzip",
        f"weft: --journal: {tmp_path}/text/inside: Not a directory",
    ]
