"""Turns whose nodes die after their first token go on elsewhere: the same tokens, and what else a client sees, as if none had."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from orchestrator.core.commands import Assign, Resume
from orchestrator.core.config import ClusterConfig
from orchestrator.core.types import CostProfile, FinishReason, NodeId, Role, Sampling, attempt_id
from orchestrator.live.driver import TurnStream
from orchestrator.live.turns import Delta, Turn
from orchestrator.wire import node_pb2
from tests.builders import some
from tests.live.serving import BLOCK_TOKENS, Cluster, cluster, finish, run, split, together, turn
from workers.engines.checkpoint import create_checkpoint

OUTPUT_TOKENS = 70
#: How tokens are chosen, in all ways that depend on what was generated before, or on a stream of numbers.
WAYS = {
    "greedy": Sampling(),
    "seeded": Sampling(temperature=1.0, seed=5, top_p=0.9, top_k=40),
    "penalties": Sampling(presence_penalty=0.7, frequency_penalty=0.6),
    "penalties, drawn": Sampling(temperature=0.8, seed=9, frequency_penalty=1.5, min_p=0.01),
    "logprobs": Sampling(logprobs=3),
    "bias": Sampling(temperature=0.5, seed=1, logit_bias={7: 2.0, 8: -100.0}),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    create_checkpoint(
        directory, "qwen3", seed=3, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128,
        context_tokens_max=1024, dtype="float32",
    )  # fmt: skip
    return directory


@dataclass
class Interrupted:
    """Kills nodes, and starts them again, at numbers of tokens of one stream."""

    served: Cluster
    #: Tokens read at which to act; what to kill then: the node that generates, or the one that computed the prompt.
    moments: list[tuple[int, Role]]
    lives: dict[NodeId, int] = field(default_factory=dict)

    async def read(self, stream: TurnStream) -> Delta:
        whole = Delta([], [])
        while whole.finish is None:
            delta = await asyncio.wait_for(stream.read(), 20)
            whole.tokens += delta.tokens
            whole.logprobs += delta.logprobs
            whole.finish, whole.cached_tokens = delta.finish, delta.cached_tokens
            if self.moments and len(whole.tokens) >= self.moments[0][0] and whole.finish is None:
                await self.kill(self.moments.pop(0)[1])
        assert not self.moments, f"{len(self.moments)} nodes were not killed"
        return whole

    async def kill(self, role: Role) -> None:
        """End the node that has, or had, this role in the last attempt, and let it have another life."""
        node = next(one.node for one in reversed(self.served.observed.seen(Assign)) if one.assignment.role is role)
        await self.served.kill_node(node)
        self.served.driver.mark_dead(node)
        self.lives[node] = self.lives.get(node, 1) + 1
        await self.served.start_node(node, self.lives[node])


async def undisturbed(config: ClusterConfig, model_dir: Path, turns: Sequence[Turn]) -> list[Delta]:
    async with cluster(config, model_dir) as served:
        return [await finish(served.driver.start(one)) for one in turns]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["aggregated", "apart"])
@pytest.mark.parametrize("way", WAYS)
def test_a_turn_goes_on_with_the_tokens_that_it_would_have_had(model_dir: Path, layout: str, way: str) -> None:
    config = together("eager", nodes=2) if layout == "aggregated" else split("eager", decode=2)
    source = random.Random(way)
    one = turn([source.randrange(256) for _ in range(75)], OUTPUT_TOKENS, WAYS[way])

    async def scenario() -> None:
        [expected] = await undisturbed(config, model_dir, [one])
        async with cluster(config, model_dir) as served:
            first = source.randrange(1, 30)
            moments = [(first, Role.GENERATE), (first + source.randrange(1, 30), Role.GENERATE)]
            found = await Interrupted(served, moments).read(served.driver.start(one))
            assert found.tokens == expected.tokens
            assert found.finish is expected.finish is FinishReason.LENGTH
            # what was found of the prompt counts once: it was computed when the client waited for the first token
            assert found.cached_tokens == expected.cached_tokens == 0
            assert len(found.logprobs) == len(expected.logprobs)
            for after, before in zip(found.logprobs, expected.logprobs, strict=True):
                assert [token for token, _ in after.top] == [token for token, _ in before.top]
                assert after.logprob == pytest.approx(before.logprob, abs=1e-4)
            assert len(served.observed.seen(Resume)) == 2
            await served.idle()

    run(scenario)


def test_turns_that_name_no_seed_keep_the_one_they_got(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seeds are drawn, but the same each time: one stream in some hundreds meets a number that lies, to the last digit, on the
    # edge of two tokens' shares, where either is right.
    monkeypatch.setattr(random, "getrandbits", random.Random(4).getrandbits)
    drawn = Sampling(temperature=1.0)
    turns = [turn(range(50), OUTPUT_TOKENS, drawn.for_choice(number)) for number in range(3)]

    async def scenario() -> None:
        async with cluster(together("eager", nodes=2), model_dir) as served:
            streams = [served.driver.start(one) for one in turns]
            seeds = [stream.seed for stream in streams]
            assert len(set(seeds)) == 3, "choices of one prompt draw the same numbers"
            watched = Interrupted(served, [(20, Role.GENERATE)])
            found = await asyncio.gather(watched.read(streams[0]), *[finish(stream) for stream in streams[1:]])
            assert served.observed.seen(Resume)
            again = [turn(range(50), OUTPUT_TOKENS, replace(drawn, seed=seed)) for seed in seeds]
            expected = [await finish(served.driver.start(one)) for one in again]
            assert [delta.tokens for delta in found] == [delta.tokens for delta in expected]
            assert len({tuple(delta.tokens) for delta in found}) == 3

    run(scenario)


def test_a_stop_token_ends_it_after_the_seam_and_the_limit_counts_from_its_beginning(model_dir: Path) -> None:
    async def scenario() -> None:
        [plain] = await undisturbed(together("eager"), model_dir, [turn(range(40), OUTPUT_TOKENS)])
        places = [place for place, token in enumerate(plain.tokens) if place > 10 and token not in plain.tokens[:place]]
        place = some(places)[-1]
        stopping = turn(range(40), OUTPUT_TOKENS, Sampling(stop_token_ids=(plain.tokens[place],)))
        async with cluster(together("eager", nodes=2), model_dir) as served:
            found = await Interrupted(served, [(5, Role.GENERATE)]).read(served.driver.start(stopping))
            assert found.tokens == plain.tokens[: place + 1]
            assert found.finish is FinishReason.STOP

    run(scenario)


@pytest.mark.parametrize("stops", [False, True])
def test_a_turn_is_complete_whose_last_token_came_and_whose_end_did_not(model_dir: Path, stops: bool) -> None:
    async def scenario() -> None:
        [plain] = await undisturbed(together(), model_dir, [turn(range(40), 8)])
        sampling = Sampling(stop_token_ids=(plain.tokens[7],)) if stops else Sampling()
        async with cluster(together(nodes=2), model_dir) as served:
            driver = served.driver
            deliver = driver.node_frame

            def without_ends(node: NodeId, frame: node_pb2.NodeFrame) -> None:
                ends = bool(frame.ended)
                del frame.ended[:]
                deliver(node, frame)
                if ends:
                    driver.mark_dead(node)

            driver.node_frame = without_ends  # type: ignore[method-assign]
            stream = driver.start(turn(range(40), 50 if stops else 8, sampling))
            delta = await finish(stream)
            assert delta.tokens == plain.tokens
            assert delta.finish is (FinishReason.STOP if stops else FinishReason.LENGTH)
            assert len(served.observed.seen(Resume)) == 1
            assert len(served.observed.seen(Assign)) == 1, "nothing was left to be generated"

    run(scenario)


def test_what_a_partitioned_node_still_sends_is_nobody_s(model_dir: Path) -> None:
    slow = CostProfile(step_s=0.002)

    async def scenario() -> None:
        [expected] = await undisturbed(together(), model_dir, [turn(range(40), 200)])
        async with cluster(together(profile=slow), model_dir) as served:
            driver, node = served.driver, NodeId("both-0")
            stream = driver.start(turn(range(40), 200))
            found = list((await stream.read()).tokens)
            # The gateway gives the node up that goes on working, then hears it again and has only that one.
            driver.mark_dead(node)
            assert stream.node is None
            driver.set_nodes(list(served.addresses.items()))
            await served.observed.until(lambda: len(served.observed.seen(Assign)) == 2)
            late = node_pb2.NodeFrame(requests=[stream.request], counts=[2], tokens=[1, 2])
            driver.node_frame(node, late)
            delta = await finish(stream)
            assert found + delta.tokens == expected.tokens
            assert served.observed.seen(Assign)[-1].assignment.request == attempt_id(stream.request, 1)
            await served.idle()

    run(scenario)


def test_blocks_of_what_was_generated_keep_their_names(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together("eager", nodes=2), model_dir) as served:
            prompt = list(range(40))
            found = await Interrupted(served, [(20, Role.GENERATE)]).read(served.driver.start(turn(prompt, OUTPUT_TOKENS)))
            # The next turn of an agent, which begins with all that was said: it is found where that was said last.
            after = await finish(served.driver.start(turn([*prompt, *found.tokens, *range(9)], 5)))
            assert after.cached_tokens == (len(prompt) + OUTPUT_TOKENS - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            [expected] = await undisturbed(together("eager"), model_dir, [turn([*prompt, *found.tokens, *range(9)], 5)])
            assert after.tokens == expected.tokens

    run(scenario)


def test_a_reader_that_goes_while_its_turn_waits_for_a_node_leaves_nothing(model_dir: Path) -> None:
    async def scenario() -> None:
        async with cluster(together(profile=CostProfile(step_s=0.002)), model_dir) as served:
            driver, node = served.driver, NodeId("both-0")
            stream = driver.start(turn(range(40), 500))
            await stream.read()
            await served.kill_node(node)
            driver.mark_dead(node)
            stream.cancel()
            await served.start_node(node, 2)
            await served.ready()
            assert len((await finish(driver.start(turn(range(40), 3)))).tokens) == 3
            await served.idle()

    run(scenario)
