"""Tokens are those of `transformers` through real nodes, links and driver: cut up, cached, fetched, preempted, in any company."""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.core.config import ClusterConfig, PoolConfig
from tests.live.serving import cluster, finish, run, split, together, turn
from tests.oracle import first_decided, oracle
from workers.engines.checkpoint import FAMILIES, create_checkpoint

#: Ordinary tokens of the checkpoints are below.
VOCABULARY = 512
PROMPTS = 30
TOKENS_MAX = 1500
OUTPUT_TOKENS = 72
#: Blocks of one node: hardly more than the longest prompt, so that sequences that decode run out of them.
BLOCKS = 144

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


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Expected]:
    """A checkpoint of each family, and what follows each prompt."""
    path = tmp_path_factory.mktemp("model") / request.param
    create_checkpoint(path, request.param, 11)
    return path, first_decided(oracle(path), prompts(), PROMPTS, OUTPUT_TOKENS)


def cramped(config: ClusterConfig) -> ClusterConfig:
    def less(pool: PoolConfig) -> PoolConfig:
        return replace(pool, engine=replace(pool.engine, blocks=BLOCKS), scheduler=replace(pool.scheduler, step_tokens_max=200))

    return replace(config, pools=tuple(less(pool) for pool in config.pools))


@pytest.mark.slow
@pytest.mark.parametrize("together_max", [1, 8])
@pytest.mark.parametrize("layout", ["aggregated", "disaggregated"])
def test_tokens_are_those_of_transformers(model: tuple[Path, Expected], layout: str, together_max: int) -> None:
    path, expected = model
    config = cramped(together("eager") if layout == "aggregated" else split("eager"))

    async def scenario() -> None:
        async with cluster(config, path) as served:
            places = asyncio.Semaphore(together_max)

            async def one(prompt: tuple[int, ...]) -> tuple[list[int], int]:
                async with places:
                    delta = await finish(served.driver.start(turn(prompt, OUTPUT_TOKENS)))
                return delta.tokens, delta.cached_tokens

            done = await asyncio.gather(*[one(prompt) for prompt in expected])
            differing = [len(prompt) for prompt, (tokens, _) in zip(expected, done, strict=True) if tokens != expected[prompt]]
            assert differing == [], "prompts of these lengths differ"
            assert sum(cached for _, cached in done) > 0, "no prefix was found in a cache"
            assert (len(served.observed.moves) > 0) == (layout == "disaggregated")
            await served.idle()
            preempted = sum(load.preemptions for load in served.observed.loads.values())
            assert (preempted > 0) == (together_max > 1), f"{preempted} preemptions"

    run(scenario, 600)
