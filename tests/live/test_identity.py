"""Tokens are those of `transformers` through real nodes, links and driver: cut up, cached, fetched, preempted, in any company.

All families, each in every way in which a cluster computes tokens: nodes that do both, prefill and decode apart, attention and
FFN apart in several ratios, with experts that move meanwhile, tokens that are looked up or drafted by a model, tokens on a beat.
"""

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.quoting import cut_checkpoint
from orchestrator.core.commands import Complete
from orchestrator.core.experts import ExpertBalancer
from orchestrator.core.types import ServiceClass
from tests.builders import some
from tests.live.serving import Cluster, finish, run, turn
from tests.live.ways import OUTPUT_TOKENS, READ_S, SLOTS, TOKENS_MAX, WAY_S, WAYS, Drafts, Way, draft_always, serving
from tests.oracle import first_decided, oracle
from workers.engines.checkpoint import FAMILIES, create_checkpoint
from workers.engines.split.rank import FfnRank
from workers.ranks import added_up, balancer_of

pytestmark = pytest.mark.slow

#: Ordinary tokens of the checkpoints are below.
VOCABULARY = 512
PROMPTS = 20
#: Families whose FFNs have experts.
EXPERTS = ("qwen3_moe", "deepseek_v3")

Expected = dict[tuple[int, ...], list[int]]


def prompts() -> Iterator[list[int]]:
    """Yield prompts of 1 to 1,500 tokens; every third begins like the one before it."""
    source = random.Random(3)
    last: list[int] = []
    number = 0
    while True:
        length = source.randint(1, TOKENS_MAX)
        shared = last[: source.randint(0, length)] if number % 3 == 2 else []
        last = shared + [source.randrange(VOCABULARY) for _ in range(length - len(shared))]
        yield last
        number += 1


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Expected]:
    """A checkpoint of each family, and what follows each prompt."""
    path = tmp_path_factory.mktemp("model") / request.param
    create_checkpoint(path, request.param, 11)
    cut_checkpoint(path, path.with_name("draft"), 3)
    return path, first_decided(oracle(path), prompts(), PROMPTS, OUTPUT_TOKENS)


#: Families whose FFNs have no experts have none that move.
CASES = [(family, name) for family in FAMILIES for name, way in WAYS.items() if family in EXPERTS or not way.spare]


@pytest.mark.timeout(WAY_S + 60)
@pytest.mark.parametrize(("model", "name"), CASES, indirect=["model"])
def test_tokens_are_those_of_transformers(model: tuple[Path, Expected], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = model
    way = WAYS[name]
    draft_always(way, expected, monkeypatch)
    torch.set_num_threads(1)

    async def scenario() -> None:
        async with serving(way, path, path.with_name("draft")) as (served, ranks):
            moving = asyncio.create_task(move_experts(served, way, ranks)) if way.spare else None
            done = await write(served, way, expected)
            moves = await moving if moving is not None else 0
            pairs = zip(expected.items(), done, strict=True)
            differing = [len(prompt) for (prompt, after), (tokens, _) in pairs if tokens != after[: way.tokens]]
            assert differing == [], "prompts of these lengths differ"
            assert sum(cached for _, cached in done) > 0, "no prefix was found in a cache"
            await served.idle()
            check_way(way, served, moves)

    run(scenario, WAY_S)


async def write(served: Cluster, way: Way, expected: Expected) -> list[tuple[list[int], int]]:
    """Ask for all prompts, so many at a time; return each one's tokens, and how many of its own were cached."""
    places = asyncio.Semaphore(way.together)

    async def one(prompt: tuple[int, ...]) -> tuple[list[int], int]:
        async with places:
            asked = replace(turn(prompt, way.tokens), service_class=way.service_class)
            delta = await finish(served.driver.start(asked), READ_S)
        return delta.tokens, delta.cached_tokens

    return await asyncio.gather(*[one(prompt) for prompt in expected])


async def move_experts(served: Cluster, way: Way, ranks: Sequence[FfnRank]) -> int:
    """Place experts by what they had to do, again and again, while tokens are written; return how many layers moved."""
    balancer = balancer_of(way.pool, served.model_dir)
    assert balancer is not None, "the model has no experts"
    ended = 0
    while ended < PROMPTS:
        await served.observed.until(lambda seen=ended: len(served.observed.seen(Complete)) > seen)
        ended = len(served.observed.seen(Complete))
        balancer.observe(added_up([server.take_picks() for server in served.servers.values()]))
        await asyncio.to_thread(move_all, balancer, ranks, served)
    assert balancer.balance is not None, "too little was written to know any load"
    return balancer.balance.moves


def move_all(balancer: ExpertBalancer, ranks: Sequence[FfnRank], served: Cluster) -> None:
    while (move := balancer.next_move()) is not None:
        for rank in ranks:
            rank.prepare(move.layer, move.version, move.placement)
        for server in served.servers.values():
            server.use_experts(move.layer, move.version, move.placement)
        balancer.moved(move)


def check_way(way: Way, served: Cluster, moves: int) -> None:
    """See that tokens were computed in the way that is meant."""
    loads = [served.observed.loads[way.pool.node_id(number)] for number in range(way.pool.nodes)]
    assert (len(served.observed.moves) > 0) == (len(way.config.pools) > 1)
    if way.service_class is ServiceClass.CADENCE:
        beats = sum(load.beats for load in loads)
        assert beats >= PROMPTS * way.tokens / SLOTS / 2, f"{beats} beats"
    if way.ffn:
        halves = [load.split for load in loads]
        assert all(half is not None and half.attention_s > 0 and half.ffn_s > 0 for half in some(halves)), halves
        assert (moves > 0) == (way.spare > 0), f"{moves} moves"
    if way.drafts is not Drafts.NONE:
        drafted, accepted = sum(load.drafted_tokens for load in loads), sum(load.accepted_tokens for load in loads)
        assert drafted > accepted > 0, f"{drafted} tokens were drafted, {accepted} were right"
    elif not way.ffn and way.service_class is not ServiceClass.CADENCE:
        preempted = sum(load.preemptions for load in served.observed.loads.values())
        assert (preempted > 0) == (way.together > 1), f"{preempted} preemptions"
