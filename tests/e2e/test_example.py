"""The example of an agent that programs its cache, run as is documented: against a served cluster with three tiers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cli.cluster_file import FOLDER
from orchestrator.harness.example import Script
from tests.e2e.served import ROOT, Served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_the_example_runs_against_a_cluster_with_tiers(serve: Callable[..., Served], tmp_path: Path) -> None:
    cluster = tmp_path / "tiers.toml"
    text = (FOLDER / "tiers.toml").read_text()
    cluster.write_text(text.replace("file:///tmp/weft-cmx", f"file://{tmp_path / 'cmx'}"))
    assert cluster.read_text() != text
    served = serve(cluster)
    served.until(lambda status: status["ready"] and bool(status["stores"]), within_s=60)
    address = served.status()["grpc_address"]
    command = [sys.executable, "-m", "orchestrator.harness.example", "--url", served.url, "--grpc", address, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    usual = Script()
    assert len(report["turns"]) == usual.turns + usual.helpers * usual.helper_turns
    # A new seed: nothing of it was there before, and each later turn goes on from one before it.
    cached = [turn["cached_tokens"] for turn in report["turns"]]
    assert cached[0] == 0
    assert min(cached[1:]) > 0
    outcomes = {verb: result["outcome"] for verb, result in report["results"]}
    done_verbs = ("fork", "tool_started", "tool_finished", "supersede", "evict", "end_session", "unpin")
    assert {outcomes[verb] for verb in done_verbs} == {"applied"}
    assert outcomes["pin"] in ("applied", "deferred")
    pinned = next(effect for effect in report["effects"] if effect["verb"] == "pin")
    assert pinned["found_tokens"] > 0
    assert served.stop() == 0
    assert served.log.read_text() == ""
