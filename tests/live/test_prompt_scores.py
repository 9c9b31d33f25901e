"""Log probabilities of prompts on their way from nodes to whoever reads the answer: all of them, before its first token."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from orchestrator.core.config import ClusterConfig
from orchestrator.core.types import NodeId, RequestId, Sampling
from orchestrator.live.driver import ClusterDriver, TurnStream
from orchestrator.live.turns import Delta, PromptScores, TurnFailed
from orchestrator.wire import codec, node_pb2
from tests.live.serving import BLOCK_TOKENS, Cluster, cluster, finish, run, split, together, turn
from workers.engines.checkpoint import default_model_path

WANTED = Sampling(prompt_logprobs=2)


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return default_model_path()


async def read_whole(stream: TurnStream) -> tuple[PromptScores, Delta]:
    """Return what a scored turn tells of its prompt, with its first tokens, and all of its tokens."""
    first = await asyncio.wait_for(stream.read(), 20)
    assert first.prompt_scores is not None
    assert first.prompt_scores.complete
    assert first.tokens
    rest = await finish(stream) if first.finish is None else first
    assert rest is first or rest.prompt_scores is None
    return first.prompt_scores, rest


@pytest.mark.parametrize("config", [together, split], ids=["together", "apart"])
def test_a_prompt_is_scored_whole_whatever_is_cached_and_cached_for_others(
    model_dir: Path, config: Callable[[], ClusterConfig]
) -> None:
    async def scenario() -> None:
        async with cluster(config(), model_dir) as served:
            tokens = list(range(300))  # several steps
            await finish(served.driver.start(turn(tokens, 3)))
            for _ in range(2):
                scores, last = await read_whole(served.driver.start(turn(tokens, 3, WANTED)))
                assert [scores.at(place) for place in (1, 299)] == [(0.0, 1, [(place, 0.0), (0, -100.0)]) for place in (1, 299)]
                assert last.cached_tokens == 0
            longer = await finish(served.driver.start(turn([*tokens, *tokens], 3)))
            assert longer.cached_tokens == 300 // BLOCK_TOKENS * BLOCK_TOKENS

    run(scenario)


def test_what_two_nodes_compute_is_scored_by_the_first(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(split("eager"), model_dir) as apart, cluster(together("eager"), model_dir) as alone:
            tokens = [number * 7 % 500 for number in range(150)]
            scores, _ = await read_whole(apart.driver.start(turn(tokens, 3, WANTED)))
            expected, _ = await read_whole(alone.driver.start(turn(tokens, 3, WANTED)))
            for place in range(1, 150):
                assert scores.at(place)[0] == pytest.approx(expected.at(place)[0], abs=1e-4)

    run(scenario)


def test_a_prompt_of_one_token_has_none(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(), model_dir) as served:
            scores, _ = await read_whole(served.driver.start(turn([5], 3, WANTED)))
            assert len(scores) == 1

    run(scenario)


def test_many_log_probabilities_come_in_frames_of_bounded_size(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "FRAME_BYTES_MAX", 5000)
    monkeypatch.setattr("workers.driver.SCORES_MAX", 16)

    async def scenario() -> None:
        async with cluster(together(), model_dir) as served:
            sizes = watched(served)
            scores, _ = await read_whole(
                served.driver.start(turn([place % 500 for place in range(1000)], 3, Sampling(prompt_logprobs=20)))
            )
            assert len(scores) == 1000
            assert len(sizes) > 20
            assert max(sizes) < 3 * 5000

    run(scenario)


def watched(served: Cluster) -> list[int]:
    """Return where the sizes of frames that bring log probabilities gather."""
    sizes: list[int] = []
    taken = served.driver.node_frame

    def take(node: NodeId, frame: node_pb2.NodeFrame) -> None:
        if frame.prompt_scores:
            sizes.append(frame.ByteSize())
        taken(node, frame)

    served.driver.node_frame = take  # type: ignore[method-assign]
    return sizes


def test_a_node_that_is_lost_before_it_told_all_costs_the_prompt_again(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(nodes=2), model_dir) as served:
            stream = served.driver.start(turn([place % 500 for place in range(1000)], 3, WANTED))
            first = stream.node
            assert first is not None
            assert stream.scorer == first
            served.driver.mark_dead(first)
            await read_whole(stream)

    run(scenario)


def stream_of(count: int) -> TurnStream:
    class Loop:
        def create_future(self) -> "asyncio.Future[None]":
            return asyncio.get_running_loop().create_future()

    class Driver:
        loop = Loop()

        def abandon(self, stream: object) -> None:
            """Nobody waits for it."""

    return TurnStream(cast(ClusterDriver, Driver()), RequestId(1), turn(range(count), 3, Sampling(prompt_logprobs=0)))


def told(stream: TurnStream, first: int, count: int) -> None:
    assert stream.scores is not None
    stream.scores.add(first, [-1.0] * count, [1] * count, [], [])
    if stream.scores.complete:
        stream.wake()


def test_tokens_that_overtake_their_prompts_log_probabilities_wait_for_them() -> None:
    async def scenario() -> None:
        stream = stream_of(9)
        stream.scorer = NodeId("prefill-0")
        stream.tokens.append(7)
        told(stream, 1, 4)
        reading = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0)
        stream.wake()
        await asyncio.sleep(0)
        assert not reading.done()
        told(stream, 3, 6)
        delta = await reading
        assert (delta.tokens, delta.prompt_scores is not None) == ([7], True)
        assert [cast(Any, delta.prompt_scores).at(place)[0] for place in range(1, 9)] == [-1.0] * 8

    asyncio.run(scenario())


def test_tokens_whose_prompts_log_probabilities_are_lost_are_an_error() -> None:
    async def scenario() -> None:
        stream = stream_of(9)
        stream.scorer = NodeId("prefill-0")
        stream.tokens.append(7)
        told(stream, 1, 4)
        reading = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0)
        stream.scorer = None
        stream.wake()
        with pytest.raises(TurnFailed) as failed:
            await reading
        assert (failed.value.status, failed.value.code) == (502, "scores_lost")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("first", "logprobs", "ranks", "tops", "values"),
    [
        (0, [-1.0], [1], [5], [-1.0]),  # a first token has none
        (9, [-1.0], [1], [5], [-1.0]),
        (8, [-1.0] * 2, [1] * 2, [5] * 2, [-1.0] * 2),
        (1, [], [], [], []),
        (1, [-1.0], [1, 1], [5], [-1.0]),
        (1, [-1.0], [1], [], []),
        (1, [-1.0], [1], [5, 6], [-1.0, -2.0]),
    ],
)
def test_what_is_not_of_the_prompt_is_refused(
    first: int, logprobs: list[float], ranks: list[int], tops: list[int], values: list[float]
) -> None:
    scores = PromptScores(9, 1)
    with pytest.raises(ValueError, match="for a prompt of 9 with 1 beside each"):
        scores.add(first, logprobs, ranks, tops, values)
    assert not scores.complete


@pytest.mark.parametrize(
    "told",
    [
        node_pb2.PromptScores(request=1, first=0, logprobs=[0.0], ranks=[1]),
        node_pb2.PromptScores(request=1, first=1),
        node_pb2.PromptScores(request=1, first=1, logprobs=[0.0], ranks=[1, 2]),
        node_pb2.PromptScores(request=1, first=1, logprobs=[0.0] * 2, ranks=[1] * 2, top_tokens=[1], top_logprobs=[0.0]),
        node_pb2.PromptScores(request=1, first=1, logprobs=[0.0], ranks=[1], top_tokens=[1], top_logprobs=[]),
    ],
)
def test_a_frame_whose_lists_do_not_belong_together_means_nothing(told: node_pb2.PromptScores) -> None:
    with pytest.raises(codec.MalformedMessage):
        codec.check_frame(node_pb2.NodeFrame(prompt_scores=[told]))
    codec.check_frame(node_pb2.NodeFrame(prompt_scores=[node_pb2.PromptScores(request=1, first=1, logprobs=[0.0], ranks=[1])]))
