"""Recording what a gateway serves: a trace that can be read, in order, whose prefixes and dependencies are those served."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest

from orchestrator.cli.cluster_file import LOCAL_CLUSTER
from orchestrator.cli.main import main
from orchestrator.core.config import ClusterConfig, ClusterSettings
from orchestrator.core.types import BlockHash, FinishReason, GatewayId, ModelName, NodeId, PoolName, RequestId, SessionId
from orchestrator.live import recorder
from orchestrator.live.front import Front, Membership, NodePlace
from orchestrator.live.recorder import BlockNamer, Recorder, open_recorder
from orchestrator.live.turns import Turn
from orchestrator.sim.names import starts_with
from orchestrator.traces import TracedTurn, read_trace
from orchestrator.traces.turns import Runs
from tests.builders import SECRET
from tests.live.serving import BLOCK_TOKENS, cluster, run, together, turn
from workers.engines.checkpoint import default_model_path, fingerprint

MODEL = ModelName("default")


class Ignored:
    """A watch that is told things."""

    def assigned(self, request: RequestId) -> None: ...
    def delivered(self, tokens: int) -> None: ...
    def ended(self, reason: FinishReason, wanted: str | None = None) -> None: ...


@dataclass
class Recorded:
    """A recorder on a clock that the test sets."""

    path: Path
    now: float = 100.0
    made: Recorder = field(init=False)

    def __post_init__(self) -> None:
        self.made = Recorder(self.path, {MODEL: BLOCK_TOKENS}, lambda: self.now)

    def begin(self, tokens: Sequence[int], session: str | None = None) -> recorder.TurnWatch:
        self.now += 1.0
        asked: Turn = replace(turn(tokens, 8), session=SessionId(session) if session else None)
        return self.made.watch(asked, Ignored())

    def end(self, watch: recorder.TurnWatch, tokens: int = 4) -> None:
        self.now += 0.5
        watch.delivered(tokens)
        self.now += 0.25
        watch.ended(FinishReason.LENGTH)

    def turns(self) -> list[TracedTurn]:
        self.made.close()
        return list(read_trace(self.path))


# --- a gateway --------------------------------------------------------------------------------------------------------


async def converse(url: str) -> None:
    """Hold two sessions of three turns with a gateway, and ask one thing outside of any."""

    async def session(client: httpx.AsyncClient, name: str) -> None:
        messages = [{"role": "user", "content": f"Tell me a long story about {name}."}]
        for _ in range(3):
            body = {"model": "default", "messages": messages, "max_tokens": 20, "ignore_eos": True}
            answer = (await client.post("/v1/chat/completions", json=body, headers={"x-session-id": name})).raise_for_status()
            messages.append(answer.json()["choices"][0]["message"])
            messages.append({"role": "user", "content": "Go on, please, and leave nothing out."})

    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
        await asyncio.gather(session(client, "foxes"), session(client, "owls"))
        await client.post("/v1/completions", json={"model": "default", "prompt": "Once", "max_tokens": 3, "stream": True})


@pytest.mark.slow
def test_what_a_real_gateway_served_can_be_read_and_says_what_was_served(tmp_path: Path) -> None:
    file = tmp_path / "served.jsonl"

    async def scenario() -> None:
        folder = default_model_path()
        config = together()
        config = replace(config, cluster=ClusterSettings(secret=SECRET, record=str(file)))
        config = replace(config, gateway=replace(config.gateway, http_port=0, grpc_port=0))
        async with cluster(config, folder) as served:
            node = next(iter(served.servers))
            names = {"default": fingerprint(folder)}
            pools = {NodeId(node): PoolName("both")}
            front = Front(config, GatewayId(1), "127.0.0.1", 0, {"default": folder}, names, pools, served.failures.append)
            address = await front.start()
            places = tuple(NodePlace(node, PoolName("both"), address) for node, address in served.addresses.items())
            await front.set_members(Membership(1, places))
            async with httpx.AsyncClient(base_url=address.url, trust_env=False) as client:
                while (await client.get("/health")).status_code != httpx.codes.OK:
                    pass
            await converse(address.url)
            await front.stop()

    run(scenario)
    turns = list(read_trace(tmp_path / "served.jsonl.1"))
    assert len(turns) == 7
    assert {one.block_tokens for one in turns} == {BLOCK_TOKENS}
    for name in ("foxes", "owls"):
        first, second, third = (one for one in turns if one.session == name)
        assert [one.output_tokens for one in (first, second, third)] == [20] * 3
        assert [one.after for one in (first, second, third)] == [(), (first.id,), (second.id,)]
        assert starts_with(second.block_runs, first.block_runs)
        assert starts_with(third.block_runs, second.block_runs)
        assert second.input_tokens >= first.input_tokens + first.output_tokens
    text = (tmp_path / "served.jsonl.1").read_text()
    assert "story" not in text
    assert "Once" not in text


# --- order ------------------------------------------------------------------------------------------------------------


def test_lines_are_in_order_of_arrival_and_wait_for_what_had_ended(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path / "trace")
    long = recorded.begin([1] * 40, "a")
    first = recorded.begin([2] * 40, "b")
    recorded.end(first)
    second = recorded.begin([2] * 60, "b")
    side = recorded.begin([2] * 60, "b")
    recorded.end(second)
    recorded.end(side)
    recorded.end(long, tokens=9)
    turns = recorded.turns()
    assert [(one.session, one.arrival_s, one.after, one.gap_s, one.output_tokens) for one in turns] == [
        ("t/a", 1.0, (), 0.0, 9),
        ("t/b", 2.0, (), 0.0, 4),
        ("t/b", 3.75, (1,), 1.0, 4),
        ("t/b", 4.75, (1,), 2.0, 4),
    ]
    assert turns[1].block_runs == ((turns[1].blocks[0], 2),)
    assert turns[2].blocks[:2] == turns[1].blocks
    assert turns[2].block_runs == turns[3].block_runs
    line = json.loads((tmp_path / "trace").read_text().splitlines()[1])
    assert (line["ttft_ms"], line["api_ms"], line["model"], line["tenant"], line["stop"]) == (500, 750, "default", "t", "length")


def test_what_models_wait_for_is_recorded(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path / "trace")
    for wanted in ("bash", "", None):
        watch = recorded.begin([1] * 40, "a")
        watch.delivered(4)
        watch.ended(FinishReason.STOP, wanted)
    assert [one.calls for one in recorded.turns()] == [True, False, None]
    assert "bash" not in (tmp_path / "trace").read_text()


def test_what_brought_no_token_or_never_ended_is_left_out(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path / "trace")
    open_end, refused = recorded.begin([1] * 40, "a"), recorded.begin([1] * 40, "a")
    recorded.end(refused, tokens=0)
    good = recorded.begin([1] * 40, "a")
    recorded.end(good)
    assert [(one.id, one.after) for one in recorded.turns()] == [(2, ())]
    open_end.ended(FinishReason.CANCELLED)
    recorded.made.close()


def test_a_request_that_holds_up_too_many_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "KEPT_MAX", 3)
    recorded = Recorded(tmp_path / "trace")
    long = recorded.begin([1] * 40, "long")
    for _ in range(5):
        recorded.end(recorded.begin([2] * 40))
    recorded.end(long)
    recorded.end(recorded.begin([1] * 60, "long"))
    assert [(one.id, one.after) for one in recorded.turns()] == [*((number, ()) for number in range(1, 7))]


def test_a_thread_that_is_behind_costs_lines_and_not_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "QUEUED_MAX", 0)
    recorded = Recorded(tmp_path / "trace")
    recorded.end(recorded.begin([2] * 40, "s"))
    monkeypatch.undo()
    recorded.end(recorded.begin([2] * 60, "s"))
    assert [(one.id, one.after) for one in recorded.turns()] == [(1, ())]


def test_a_gateway_that_starts_again_writes_a_file_of_its_own(tmp_path: Path) -> None:
    config = ClusterConfig(cluster=ClusterSettings(record=str(tmp_path / "trace")), pools=together().pools)
    for _ in range(3):
        made = open_recorder(config, GatewayId(0))
        assert made is not None
        made.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace", "trace.again1", "trace.again2"]
    assert open_recorder(together(), GatewayId(0)) is None


# --- names ------------------------------------------------------------------------------------------------------------


def chain(*blocks: str) -> list[BlockHash]:
    """Return hashes of a chain: each names all before it."""
    return [BlockHash("/".join(blocks[: place + 1]).encode()) for place in range(len(blocks))]


def test_equal_prefixes_have_equal_names() -> None:
    names = BlockNamer()
    assert names.runs(None, chain("a", "b", "c")) == ((1, 3),)
    assert names.runs(None, chain("a", "b", "d")) == ((1, 2), (4, 1))
    assert names.runs(None, chain("a", "b", "c", "e")) == ((1, 3), (5, 1))
    assert names.runs(None, []) == ()


def test_names_that_were_forgotten_never_stand_for_two_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "NAMES_MAX", 3)
    names = BlockNamer()
    made: list[Runs] = []
    key = (turn([1], 1).tenant, SessionId("s"))
    for length in range(1, 7):
        made.append(names.runs(key, chain(*"abcdef"[:length])))
        made.append(names.runs(None, chain(*"abcdef"[:length])))
        made.append(names.runs(None, chain("x", str(length))))
    before: dict[int, int] = {}
    for runs in made:
        former = 0
        for block in (block for first, count in runs for block in range(first, first + count)):
            assert before.setdefault(block, former) == former
            former = block
    assert made[-3] == ((1, 1), *made[-3][1:]), "a session goes on with the names that it has"


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_ends_with_two_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").write_text("")
    for name in ("there", "none/inside", "packed.gz"):
        assert main(["serve", "--cluster", str(LOCAL_CLUSTER), "--record", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"weft: --record: {tmp_path}/there: is there already; name a new file",
        f"weft: --record: {tmp_path}/none/inside: No such file or directory",
        f"weft: --record: {tmp_path}/packed.gz: recordings are not compressed; name a file without .gz",
    ]
