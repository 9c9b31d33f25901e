"""The gateway's driver: ends and failures of turns, readers that are slow or gone, who belongs to the cluster."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

import orchestrator.live.driver as live_driver
from orchestrator.core.commands import Cancel, Expect
from orchestrator.core.events import NodeDraining, NodeLost, RequestAbandoned
from orchestrator.core.types import CostProfile, FinishReason, NodeId, RequestId, SessionId
from orchestrator.live.turns import TurnFailed
from orchestrator.wire import node_pb2
from tests.live.serving import BLOCK_TOKENS, cluster, finish, run, split, together, turn
from workers.engines.checkpoint import default_model_path

NODE = NodeId("both-0")
SLOW = CostProfile(step_s=0.002)


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return default_model_path()


def test_a_turn_ends_with_its_reason_and_its_cached_tokens(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(), model_dir) as served:
            first = await finish(served.driver.start(turn(range(50), 7)))
            again = await finish(served.driver.start(turn(range(50), 7)))
            assert (first.finish, len(first.tokens), first.cached_tokens) == (FinishReason.LENGTH, 7, 0)
            assert (again.tokens, again.cached_tokens) == (first.tokens, 50 // BLOCK_TOKENS * BLOCK_TOKENS)
            assert served.observed.routes == 2

    run(scenario)


def test_a_refusal_comes_out_of_the_first_read(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(), model_dir) as served:
            stream = served.driver.start(turn(range(200_000), 7))
            with pytest.raises(TurnFailed) as failed:
                await stream.read()
            assert 400 <= failed.value.status < 500

    run(scenario)


def test_what_a_session_s_model_waits_for_is_told_to_its_node(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(), model_dir) as served:
            told: list[object] = []
            served.driver.listen(lambda event, commands: told.extend(one for one in commands if isinstance(one, Expect)))
            for session in (None, SessionId("one")):
                stream = served.driver.start(replace(turn(range(50), 7), session=session))
                await finish(stream)
                stream.answered("read")
            [expect] = told
            assert isinstance(expect, Expect)
            assert (expect.node, expect.outlook.context) == (NODE, stream.request)

    run(scenario)


def test_many_turns_at_once_each_get_their_own_tokens(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(nodes=2), model_dir) as served:
            prompts = [[number] * (number + 1) for number in range(64)]
            alone = [await finish(served.driver.start(turn(prompt, 9))) for prompt in prompts]
            streams = [served.driver.start(turn(prompt, 9)) for prompt in prompts]
            crowd = await asyncio.gather(*[finish(stream) for stream in streams])
            assert [delta.tokens for delta in crowd] == [delta.tokens for delta in alone]
            await served.idle()

    run(scenario)


def test_tokens_of_another_node_or_an_ended_turn_are_nobodys(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(nodes=2, profile=SLOW), model_dir) as served:
            stream = served.driver.start(turn(range(30), 20))
            assert stream.node is not None
            other = NodeId("both-1" if stream.node == NODE else NODE)
            late = node_pb2.NodeFrame(requests=[stream.request, RequestId(12345)], counts=[2, 1], tokens=[1, 1, 1])
            late.logprobs.add(request=stream.request, logprob=-1.0)
            served.driver.node_frame(other, late)
            assert (stream.tokens, stream.logprobs) == ([], [])
            assert len((await finish(stream)).tokens) == 20

    run(scenario)


def test_a_frame_of_tokens_alone_is_no_event(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with cluster(together(profile=SLOW), model_dir) as served:
            frames: list[node_pb2.NodeFrame] = []
            hand_on = served.driver.node_frame
            monkeypatch.setattr(served.driver, "node_frame", lambda node, frame: (frames.append(frame), hand_on(node, frame)))
            reports = served.observed.reports
            assert len((await finish(served.driver.start(turn(range(30), 40)))).tokens) == 40
            told = sum(frame.HasField("load") for frame in frames)
            assert served.observed.reports - reports == told < len(frames)

    run(scenario)


def test_a_client_that_does_not_read_is_cancelled(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_driver, "UNREAD_TOKENS_MAX", 30)

    async def scenario() -> None:
        async with cluster(together(), model_dir) as served:
            stream = served.driver.start(turn(range(30), 500))
            await served.observed.until(lambda: bool(served.observed.seen(RequestAbandoned)))
            with pytest.raises(TurnFailed) as failed:
                await stream.read()
            assert failed.value.code == "slow_client"
            await served.idle()

    run(scenario)


def test_cancelling_is_final_and_harmless_to_repeat(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(profile=SLOW), model_dir) as served:
            stream = served.driver.start(turn(range(30), 500))
            await stream.read()

            async def read_on() -> None:
                while True:
                    await stream.read()

            reading = asyncio.ensure_future(read_on())
            await asyncio.sleep(0)
            stream.cancel()
            stream.cancel()
            with pytest.raises(TurnFailed):
                await reading
            assert len(served.observed.seen(Cancel)) == 1
            await served.idle()
            ended = served.driver.start(turn(range(30), 2))
            await finish(ended)
            ended.cancel()

    run(scenario)


def test_a_node_that_leaves_the_list_is_lost(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(nodes=2), model_dir) as served:
            assert served.driver.ready
            del served.addresses[NODE]
            served.driver.set_nodes(list(served.addresses.items()))
            assert [(event.node, event.reason) for event in served.observed.seen(NodeLost)] == [(NODE, "it left the cluster")]
            assert served.driver.ready
            served.driver.mark_dead(NodeId("both-1"))
            served.driver.mark_dead(NodeId("both-1"))
            assert len(served.observed.seen(NodeLost)) == 2
            assert not served.driver.ready

    run(scenario)


def test_a_prefill_pool_alone_is_not_ready(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(split(), model_dir) as served:
            served.driver.mark_dead(NodeId("prefill-0"))
            assert served.driver.ready
            served.driver.mark_dead(NodeId("decode-0"))
            assert not served.driver.ready

    run(scenario)


def test_a_node_with_other_weights_is_not_taken_in(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(), model_dir) as served:
            spec = served.driver._known[NODE].spec
            assert not served.driver.node_joined(spec, "other weights")

    run(scenario)


def test_a_draining_node_gets_nothing_new(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(nodes=2), model_dir) as served:
            assert await served.servers[NODE].drain(5)
            await served.observed.until(lambda: bool(served.observed.seen(NodeDraining)))
            streams = [served.driver.start(turn([number] * 20, 3)) for number in range(8)]
            assert {stream.node for stream in streams} == {NodeId("both-1")}
            await asyncio.gather(*[finish(stream) for stream in streams])
            assert await served.servers[NodeId("both-1")].drain(5)
            await served.observed.until(lambda: not served.driver.ready)

    run(scenario)


def test_draining_lets_turns_end_and_starts_none(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(profile=SLOW), model_dir) as served:
            stream = served.driver.start(turn(range(30), 40))
            await stream.read()
            assert not await served.driver.drain(0.001)
            refused = served.driver.start(turn(range(30), 40))
            with pytest.raises(TurnFailed):
                await refused.read()
            reading = asyncio.ensure_future(finish(stream))
            assert await served.driver.drain(10)
            await reading

    run(scenario)


def test_closing_fails_what_runs(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(profile=SLOW), model_dir) as served:
            stream = served.driver.start(turn(range(30), 4000))
            await stream.read()
            await served.driver.close()
            with pytest.raises(TurnFailed) as failed:
                await finish(stream)
            assert failed.value.code == "shutting_down"

    run(scenario)


def test_an_observer_or_core_that_breaks_is_fatal(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(), model_dir) as served:
            broken = ZeroDivisionError("a bug")

            def observe(*arguments: object) -> None:
                raise broken

            served.observed.observe = observe  # type: ignore[method-assign]
            with pytest.raises(ZeroDivisionError):
                served.driver.start(turn(range(30), 5))
            assert served.failures == [broken]
            served.failures.clear()
            del served.observed.observe

    run(scenario)
