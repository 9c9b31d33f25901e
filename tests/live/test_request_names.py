"""One name leads from a client's request through the logs and journals of the gateway, the prefill and the decode node."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.core.events import Assigned, RequestArrived
from orchestrator.wire.journal import read_journal
from orchestrator.wire.logs import REQUEST
from tests.live.serving import cluster, finish, run, split, turn
from workers.engines.checkpoint import default_model_path

NAME = "client-7f3a"


def test_a_requests_name_is_in_every_log_and_journal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = split()
    config = replace(config, cluster=replace(config.cluster, journal=str(tmp_path)))

    async def scenario() -> None:
        async with cluster(config, default_model_path()) as served:
            await finish(served.driver.start(replace(turn(range(200), 5), name=NAME)))
            await finish(served.driver.start(replace(turn(range(50), 2), name="another")))
            await served.idle()

    with caplog.at_level(logging.DEBUG, "weft"):
        run(scenario)
    about = [record for record in caplog.records if vars(record).get(REQUEST) == NAME]
    nodes = {vars(record).get("node") for record in about if record.name == "weft.node"}
    assert nodes == {"prefill-0", "decode-0"}
    assert [record.getMessage() for record in about if record.name == "weft.node"].count("ended: prefilled") == 1
    assert [record.getMessage() for record in about if record.name == "weft.driver"]

    found: dict[str, set[str]] = {}
    for path in sorted(tmp_path.glob("*.journal.gz")):
        for entry in read_journal(path).entries:
            match entry.event:
                case RequestArrived(request):
                    found.setdefault(path.name.rsplit("-", 1)[0], set()).add(request.name)
                case Assigned(assignment):
                    found.setdefault(path.name.rsplit("-", 1)[0], set()).add(assignment.name)
                case _:
                    pass
    assert {name: NAME in names for name, names in found.items()} == {
        "gateway": True,
        "node-prefill-0": True,
        "node-decode-0": True,
    }
