"""Journals of real gateways and nodes: fresh cores decide the same again, and a changed event does not go unnoticed."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.core.events import Ended, NodeReported, StepFinished
from orchestrator.core.types import CostProfile, FinishReason
from orchestrator.wire.journal import Entry, read_journal
from orchestrator.wire.replay import replay
from tests.live.serving import cluster, finish, journalled, run, split, turn
from workers.engines.checkpoint import default_model_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the journals of a prefill and two decode nodes and their gateway that served a crowd, one turn of it cancelled."""
    directory = tmp_path_factory.mktemp("journals")

    async def scenario() -> None:
        config = journalled(split(decode=2, profile=CostProfile(step_s=0.0005)), directory)
        async with cluster(config, default_model_path()) as served:
            streams = [served.driver.start(turn([number % 5] * (20 + number), 40)) for number in range(40)]
            streams.pop().cancel()
            await asyncio.gather(*[finish(stream) for stream in streams])
            await served.idle()

    run(scenario)
    return directory


def test_every_core_decides_the_same_again(folder: Path) -> None:
    journals = {path.name: read_journal(path) for path in folder.iterdir()}
    assert sorted(name.partition(".")[0] for name in journals) == [
        "gateway-0",
        "node-decode-0-1",
        "node-decode-1-1",
        "node-prefill-0-1",
    ]
    for name, journal in journals.items():
        numbers: list[int] = []
        assert replay(journal, numbers.append) is None, name
        assert journal.ended == "stopped"
        assert len(numbers) > 40


@pytest.mark.parametrize(("name", "kind"), [("gateway-0", NodeReported), ("node-decode-0-1", StepFinished)])
def test_canary_one_changed_event_is_a_difference(folder: Path, name: str, kind: type) -> None:
    journal = read_journal(folder / f"{name}.journal.gz")

    def changed(entries: Iterator[Entry]) -> Iterator[Entry]:
        todo = True
        for entry in entries:
            match entry.event:
                case NodeReported(ended=(Ended(reason=FinishReason.LENGTH) as ended, *_)) as event if todo:
                    entry = replace(entry, event=replace(event, ended=(replace(ended, output_tokens=1),)))
                    todo = False
                case StepFinished(results=(first, *_)) if todo and kind is StepFinished:
                    first.stopped = True
                    todo = False
                case _:
                    pass
            yield entry

    journal.entries = changed(journal.entries)
    difference = replay(journal)
    assert difference is not None
    assert isinstance(difference.event, kind)
