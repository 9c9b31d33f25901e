"""Turns through real nodes, links and driver: tokens, prefix hits, hand-over of KV, cancels, deaths, lost events."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.core.commands import Assign, RequestResync, Restart
from orchestrator.core.config import ClusterConfig, LimitsConfig
from orchestrator.core.events import NodeJoined, NodeLost
from orchestrator.core.types import CostProfile, FinishReason, NodeId, PoolKind, Role, Sampling
from orchestrator.live.turns import TurnFailed
from orchestrator.wire import node_pb2
from tests.builders import some
from tests.live.serving import BLOCK_TOKENS, cluster, finish, patient, pool, run, split, together, turn
from workers.engines.checkpoint import create_checkpoint

VOCABULARY = 512


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    create_checkpoint(
        directory, "qwen3", seed=3, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128,
        context_tokens_max=1024, dtype="float32",
    )  # fmt: skip
    return directory


def prompts(count: int, shared: int = 0, tokens_max: int = 200) -> list[list[int]]:
    """Return prompts that begin with `shared` equal tokens."""
    source = random.Random(7)
    start = [source.randrange(256) for _ in range(shared)]
    lengths = [source.randrange(shared + 1, tokens_max) for _ in range(count)]
    return [start + [source.randrange(256) for _ in range(length - shared)] for length in lengths]


async def generate(config: ClusterConfig, model_dir: Path, work: list[list[int]], at_once: bool) -> list[list[int]]:
    """Serve prompts, all at once or one after the other, and see that no block stays in use."""
    async with cluster(config, model_dir) as served:
        if at_once:
            streams = [served.driver.start(turn(prompt, 12)) for prompt in work]
            deltas = await asyncio.gather(*[finish(stream) for stream in streams])
        else:
            deltas = [await finish(served.driver.start(turn(prompt, 12))) for prompt in work]
        assert all(len(delta.tokens) == 12 for delta in some(deltas))
        assert all(delta.finish is FinishReason.LENGTH for delta in some(deltas))
        await served.idle()
        return [delta.tokens for delta in deltas]


@pytest.mark.parametrize("concurrent", [False, True])
def test_prefill_and_decode_apart_give_the_tokens_of_one_node(model_dir: Path, concurrent: bool) -> None:
    async def scenario() -> None:
        work = prompts(8, shared=40)
        one = await generate(together("eager"), model_dir, work, concurrent)
        apart = await generate(split("eager", decode=2), model_dir, work, concurrent)
        assert apart == one

    run(scenario)


def test_blocks_cross_between_nodes_and_are_counted(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(split("eager"), model_dir) as served:
            prompt = prompts(1, tokens_max=100)[0] + list(range(100))
            delta = await finish(served.driver.start(turn(prompt, 4)))
            assert len(delta.tokens) == 4
            roles = [(command.node, command.assignment.role) for command in served.observed.seen(Assign)]
            assert set(roles) == {(NodeId("prefill-0"), Role.PREFILL), (NodeId("decode-0"), Role.GENERATE)}
            spec = served.observed.seen(NodeJoined)[0].node
            blocks = -(-len(prompt) // BLOCK_TOKENS)
            await served.observed.until(lambda: bool(served.observed.moves))
            assert served.observed.moves == [(NodeId("decode-0"), blocks * spec.block_bytes)]
            await served.idle()

    run(scenario)


@pytest.mark.parametrize("following", [True, False])
def test_nodes_tell_when_they_began_what_they_did_for_requests_that_are_followed(model_dir: Path, following: bool) -> None:
    async def scenario() -> None:
        async with cluster(split("eager"), model_dir) as served:
            served.observed.following = following
            stream = served.driver.start(turn(range(200), 4))
            await finish(stream)
            began = served.observed.began
            await served.observed.until(lambda: len(began) == (3 if following else 1))
            await served.idle()
            computed = [("computed", NodeId("decode-0")), ("computed", NodeId("prefill-0"))] if following else []
            assert sorted((what, node) for what, node, _, _ in began) == [*computed, ("fetched", NodeId("decode-0"))]
            assert all(request == stream.request and began_s_ago > 0.0 for _, _, request, began_s_ago in some(began))

    run(scenario)


def test_a_repeated_prompt_is_served_from_the_cache(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together("eager"), model_dir) as served:
            prompt = list(range(70))
            cold = await finish(served.driver.start(turn(prompt, 5)))
            warm = await finish(served.driver.start(turn(prompt, 5)))
            assert warm.tokens == cold.tokens
            assert (cold.cached_tokens, warm.cached_tokens) == (0, 64)
            # The next turn of an agent: all that was said before, and more.
            longer = await finish(served.driver.start(turn([*prompt, *cold.tokens, *range(20)], 5)))
            assert longer.cached_tokens == 64
            await served.idle()

    run(scenario)


def test_stop_tokens_and_logprobs_come_through(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together("eager"), model_dir) as served:
            plain = await finish(served.driver.start(turn(range(30), 8)))
            stop = plain.tokens[3]
            sampling = Sampling(stop_token_ids=(stop,), logprobs=2)
            delta = await finish(served.driver.start(turn(range(30), 8, sampling)))
            assert delta.finish is FinishReason.STOP
            assert delta.tokens == plain.tokens[: plain.tokens.index(stop) + 1]
            assert len(delta.logprobs) == len(delta.tokens)
            for token, entry in zip(delta.tokens, delta.logprobs, strict=True):
                assert entry.top[0] == (token, entry.logprob)
                assert len(entry.top) == 2

    run(scenario)


@pytest.mark.parametrize("apart", [False, True])
def test_cancels_leave_every_block_free(model_dir: Path, apart: bool) -> None:
    slow = CostProfile(step_s=0.002, fetch_latency_s=0.001)

    async def scenario() -> None:
        config = split(decode=2, profile=slow) if apart else together(nodes=2, profile=slow)
        async with cluster(config, model_dir) as served:
            streams = [served.driver.start(turn(prompt, 100)) for prompt in prompts(60, shared=20)]
            for index, stream in enumerate(streams):
                if index % 3 == 0:
                    stream.cancel()
            readers = [asyncio.ensure_future(stream.read()) for stream in streams[1::3]]
            await readers[0]
            for stream in streams:
                stream.cancel()
            results = await asyncio.gather(*readers, return_exceptions=True)
            assert all(not isinstance(result, BaseException) or isinstance(result, TurnFailed) for result in some(results))
            await served.idle()

    run(scenario)


def test_a_node_that_dies_before_the_first_token_is_replaced(model_dir: Path) -> None:
    stuck = CostProfile(step_s=30.0)

    async def scenario() -> None:
        config = patient(
            ClusterConfig(pools=(pool("both", PoolKind.AGGREGATED, 1, profile=stuck), pool("more", PoolKind.AGGREGATED))), 0.3
        )
        async with cluster(config, model_dir) as served:
            observed = served.observed
            first = NodeId("both-0")
            streams = []
            while not any(command.node == first for command in observed.seen(Assign)):
                streams.append(served.driver.start(turn([len(streams)] * 40, 5)))
            await served.kill_node(first)
            deltas = [await finish(stream) for stream in streams]
            assert all(len(delta.tokens) == 5 for delta in some(deltas))
            assert [event.node for event in observed.seen(NodeLost)] == [first]
            assert observed.seen(Restart)
            await served.idle()

    run(scenario)


def test_where_nothing_is_to_go_on_a_node_that_dies_after_the_first_token_ends_the_turn_with_an_error(model_dir: Path) -> None:
    slow = CostProfile(step_s=0.005)

    async def scenario() -> None:
        config = replace(together(profile=slow), limits=LimitsConfig(resumes_max=0))
        async with cluster(config, model_dir) as served:
            stream = served.driver.start(turn(range(40), 500))
            first = await stream.read()
            assert first.tokens
            node = NodeId("both-0")
            await served.kill_node(node)
            served.driver.mark_dead(node)
            with pytest.raises(TurnFailed) as failed:
                await finish(stream)
            assert (failed.value.status, failed.value.code) == (502, "node_lost")
            assert not served.driver.ready
            # Its next life is taken in, and serves.
            await served.start_node(node, 2)
            await served.ready()
            assert len((await finish(served.driver.start(turn(range(40), 3)))).tokens) == 3
            await served.idle()

    run(scenario)


def test_a_dead_prefill_node_costs_time_only(model_dir: Path) -> None:
    stuck = CostProfile(step_s=30.0)

    async def scenario() -> None:
        base = split()
        prefill = pool("prefill", PoolKind.PREFILL, profile=stuck)
        config = patient(ClusterConfig(pools=(prefill, base.pools[1]), router=base.router), 0.3)
        async with cluster(config, model_dir) as served:
            stream = served.driver.start(turn(range(200), 5))
            await served.observed.until(lambda: any(a.assignment.role is Role.PREFILL for a in served.observed.seen(Assign)))
            await served.kill_node(NodeId("prefill-0"))
            assert len((await finish(stream)).tokens) == 5
            await served.idle()

    run(scenario)


def test_a_gap_in_what_a_node_tells_of_its_blocks_is_mended(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(), model_dir) as served:
            driver, observed = served.driver, served.observed
            deliver = driver.node_frame
            dropped: list[int] = []

            def lossy(node: NodeId, frame: node_pb2.NodeFrame) -> None:
                if frame.kv and not dropped:
                    dropped.extend(batch.sequence for batch in frame.kv)
                    del frame.kv[:]
                deliver(node, frame)

            await finish(driver.start(turn(range(200, 240), 2)))
            driver.node_frame = lossy  # type: ignore[method-assign]
            await finish(driver.start(turn(range(40), 2)))
            assert dropped
            asked = len(observed.seen(RequestResync))
            await finish(driver.start(turn(range(100, 140), 2)))
            await observed.until(lambda: len(observed.seen(RequestResync)) > asked)
            assert observed.seen(RequestResync)[-1].after == dropped[0] - 1
            # What the lost batch told of is known again: the first prompt counts as a hit when it is routed.
            await observed.until(lambda: _predicted_hit(served, range(40)) == 32)

    run(scenario)


def _predicted_hit(served: object, tokens: range) -> int:
    """Start a turn and return the hit its route was chosen for."""
    driver, observed = served.driver, served.observed  # type: ignore[attr-defined]
    stream = driver.start(turn(tokens, 1))
    why = observed.seen(Assign)[-1].why
    stream.cancel()
    return why.hit_tokens if why is not None else -1
