"""Tokens are those of `transformers` through real nodes, links and driver: cut up, cached, fetched, preempted, in any company.

All families, each in every way in which a cluster computes tokens: nodes that do both, prefill and decode apart, attention and
FFN apart in several ratios, with experts that move meanwhile, tokens that are looked up or drafted by a model, tokens on a beat.
"""

import asyncio
import random
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from bench.quoting import cut_checkpoint
from orchestrator.core.commands import Complete
from orchestrator.core.config import (
    ClusterConfig,
    PoolConfig,
    SchedulerConfig,
    SpeculationConfig,
    SpeculationMethod,
    SplitConfig,
)
from orchestrator.core.experts import ExpertBalancer
from orchestrator.core.node.draft_model import DraftModel
from orchestrator.core.node.speculation import Speculation
from orchestrator.core.types import CostProfile, PoolKind, ServiceClass
from tests.builders import some
from tests.live.serving import Cluster, cluster, finish, pool, run, split, together, turn
from tests.oracle import first_decided, oracle
from tests.workers.conductor import Guesses
from tests.workers.drafts.drafting import drafting, drafting_pool
from tests.workers.split.test_split_identity import ranks_of
from workers.engines import sequences
from workers.engines.base import SplitPlaces
from workers.engines.checkpoint import FAMILIES, create_checkpoint
from workers.engines.lookup import PromptLookup
from workers.engines.split.rank import FfnRank
from workers.ranks import added_up, balancer_of

pytestmark = pytest.mark.slow

#: Ordinary tokens of the checkpoints are below.
VOCABULARY = 512
PROMPTS = 20
TOKENS_MAX = 1500
OUTPUT_TOKENS = 72
#: Blocks of one node: hardly more than the longest prompt, so that sequences that decode run out of them.
BLOCKS = 112
#: Sequences that a node keeps on a beat, and tokens of each. The beat is many times as long as their step, which is measured at
#: start, while other programs may want the processor.
SLOTS, BEAT_S, BEAT_TOKENS = 4, 0.5, 24
#: Families whose FFNs have experts.
EXPERTS = ("qwen3_moe", "deepseek_v3")
#: Seconds that everything together, and one read, may take on a machine that has other things to do.
WAY_S, READ_S = 900, 240

Expected = dict[tuple[int, ...], list[int]]


@dataclass(frozen=True)
class Way:
    """How tokens are computed."""

    config: ClusterConfig
    #: Prompts under way at once.
    together: int = 8
    #: Tokens of each answer.
    tokens: int = OUTPUT_TOKENS
    #: FFN ranks beside the nodes, and slots of each for copies of experts, which then move while tokens are written.
    ffn: int = 0
    spare: int = 0
    service_class: ServiceClass = ServiceClass.STANDARD
    #: Whether tokens are drafted by a model of fewer layers, beside the model or in a pool of its own.
    draft_model: bool = False
    draft_pool: bool = False

    @property
    def pool(self) -> PoolConfig:
        """The pool that generates."""
        return self.config.pools[-1]


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


class Knowing(PromptLookup):
    """Drafts what will come, but for some tokens: what random weights write hardly ever repeats anything."""

    def __init__(self, expected: Expected) -> None:
        super().__init__()
        self._expected = expected
        self._guesses: Guesses | None = None

    def find(self, tokens: "array[int]", most: int) -> "array[int]":
        if self._guesses is None:
            known = next(prompt for prompt in self._expected if prompt == tuple(tokens[: len(prompt)]))
            self._guesses = Guesses([*known, *self._expected[known]], random.Random(len(tokens)))
        return self._guesses.find(tokens, most)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Expected]:
    """A checkpoint of each family, and what follows each prompt."""
    path = tmp_path_factory.mktemp("model") / request.param
    create_checkpoint(path, request.param, 11)
    cut_checkpoint(path, path.with_name("draft"), 3)
    return path, first_decided(oracle(path), prompts(), PROMPTS, OUTPUT_TOKENS)


def cramped(config: ClusterConfig) -> ClusterConfig:
    def less(pool: PoolConfig) -> PoolConfig:
        return replace(pool, engine=replace(pool.engine, blocks=BLOCKS), scheduler=replace(pool.scheduler, step_tokens_max=200))

    return replace(config, pools=tuple(less(pool) for pool in config.pools))


def apart(attention: int, ffn: int, spare: int = 0) -> Way:
    """Return a way with attention and FFN in a group of so many ranks."""
    shares = SplitConfig(attention=attention, ffn=ffn, spare_slots=spare, imbalance_max=0.01)
    return Way(cramped(together("eager", attention, split=shares)), ffn=ffn, spare=spare)


def looked_up() -> Way:
    config = cramped(together("eager"))
    [both] = config.pools
    lookup = SpeculationConfig(method=SpeculationMethod.PROMPT_LOOKUP)
    return Way(replace(config, pools=(replace(both, engine=replace(both.engine, speculation=lookup)),)))


def with_draft_model(config: ClusterConfig, draft_model: Path) -> ClusterConfig:
    """Return a configuration whose pools draft by a model, of which each sequence's window is smaller than most prompts."""
    method = SpeculationMethod.DRAFT_MODEL
    drafts = SpeculationConfig(method, draft_model=str(draft_model), draft_context_tokens_max=512, draft_sequences_max=6)
    pools = (replace(pool, engine=replace(pool.engine, speculation=drafts)) for pool in config.pools)
    return replace(config, pools=tuple(pools))


def with_draft_pool(config: ClusterConfig, draft_model: Path) -> ClusterConfig:
    """The same by a pool of its own, whose slots are fewer than the sequences."""
    drafts = SpeculationConfig(SpeculationMethod.DRAFT_MODEL, draft_pool="drafts")
    pools = (replace(pool, engine=replace(pool.engine, speculation=drafts)) for pool in config.pools)
    drafting = drafting_pool(draft_model, slots=6)
    return replace(config, pools=(drafting, *pools))


def beating(nodes: int = 1, ffn: int = 0) -> Way:
    """Return a way in which everybody is kept on a beat, as long as there is a slot; with FFN ranks their nodes are a group."""
    config = cramped(split("eager"))
    shares = SplitConfig(attention=nodes, ffn=ffn, microbatches=2, imbalance_max=0.0) if ffn else None
    lpx = pool("cadence", PoolKind.LPX, nodes, "eager", profile=CostProfile(beat_s=BEAT_S), split=shares)
    engine = replace(lpx.engine, blocks=2 * SLOTS * BLOCKS, context_tokens_max=TOKENS_MAX + OUTPUT_TOKENS)
    lpx = replace(lpx, engine=engine, scheduler=SchedulerConfig(sequences_max=SLOTS, step_tokens_max=64))
    everything = replace(config, pools=(*config.pools, lpx))
    return Way(everything, nodes * SLOTS, BEAT_TOKENS, ffn=ffn, service_class=ServiceClass.CADENCE)


WAYS = {
    "aggregated, one by one": Way(cramped(together("eager")), 1),
    "aggregated": Way(cramped(together("eager"))),
    "disaggregated, one by one": Way(cramped(split("eager")), 1),
    "disaggregated": Way(cramped(split("eager"))),
    "attention and FFN 1:1": apart(1, 1),
    "attention and FFN 2:1": apart(2, 1),
    "attention and FFN 1:2": apart(1, 2),
    "attention and FFN 2:2": apart(2, 2),
    "experts with copies that move": apart(2, 2, spare=2),
    "drafted": looked_up(),
    "drafted by a model": Way(cramped(together("eager")), draft_model=True),
    "drafted by a pool of its own": Way(cramped(together("eager")), draft_model=True, draft_pool=True),
    "on a beat": beating(),
    "on a beat, attention and FFN 2:2": beating(2, 2),
}


#: Families whose FFNs have no experts have none that move.
CASES = [(family, name) for family in FAMILIES for name, way in WAYS.items() if family in EXPERTS or not way.spare]


@pytest.mark.timeout(WAY_S + 60)
@pytest.mark.parametrize(("model", "name"), CASES, indirect=["model"])
def test_tokens_are_those_of_transformers(model: tuple[Path, Expected], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = model
    way = WAYS[name]
    if way.draft_model:
        with_drafts = with_draft_pool if way.draft_pool else with_draft_model
        way = replace(way, config=with_drafts(way.config, path.with_name("draft")))
        # It drafts whatever that brings and costs: here nothing is to be saved.
        monkeypatch.setattr(Speculation, "wish_for", lambda *_: 4)
        monkeypatch.setattr(DraftModel, "passes_for", lambda _, drafts, *more: 4 if drafts else 0)
    else:
        monkeypatch.setattr(sequences, "PromptLookup", lambda: Knowing(expected))
    torch.set_num_threads(1)
    with ExitStack() as stack:
        ranks = stack.enter_context(ranks_of(path, way.ffn, way.spare)) if way.ffn else []
        drafts = stack.enter_context(drafting(path, path.with_name("draft"), slots=6)) if way.draft_pool else None
        addresses = tuple(rank.address for rank in ranks)
        cut, nodes = way.pool.split.microbatches if way.pool.split is not None else 0, way.pool.nodes
        places = SplitPlaces(addresses, way.spare, cut, silent_s=READ_S, attention=nodes) if ranks else None

        async def scenario() -> None:
            async with cluster(way.config, path, places=places) as served:
                if drafts is not None:
                    for server in served.servers.values():
                        server.use_drafts(drafts.address)
                moving = asyncio.create_task(move_experts(served, way, ranks)) if way.spare else None
                done = await write(served, way, expected)
                moves = await moving if moving is not None else 0
                pairs = zip(expected.items(), done, strict=True)
                differing = [len(prompt) for (prompt, after), (tokens, _) in pairs if tokens != after[: way.tokens]]
                assert differing == [], "prompts of these lengths differ"
                assert sum(cached for _, cached in done) > 0, "no prefix was found in a cache"
                await served.idle()
                check_way(name, way, served, moves)

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


def check_way(name: str, way: Way, served: Cluster, moves: int) -> None:
    """See that tokens were computed in the way that is meant."""
    loads = served.observed.loads
    last = loads[way.pool.node_id(0)]
    if way.service_class is ServiceClass.CADENCE:
        beats = sum(loads[way.pool.node_id(number)].beats for number in range(way.pool.nodes))
        assert beats >= PROMPTS * way.tokens / SLOTS / 2, f"{beats} beats"
    if way.ffn:
        halves = [loads[way.pool.node_id(number)].split for number in range(way.pool.nodes)]
        assert all(half is not None and half.attention_s > 0 and half.ffn_s > 0 for half in some(halves)), halves
        assert (moves > 0) == (way.spare > 0), f"{moves} moves"
    elif name.startswith("drafted"):
        assert last.drafted_tokens > last.accepted_tokens > 0, "nothing was drafted"
    elif way.service_class is not ServiceClass.CADENCE:
        assert (len(served.observed.moves) > 0) == name.startswith("disaggregated")
        preempted = sum(load.preemptions for load in loads.values())
        assert (preempted > 0) == (way.together > 1), f"{preempted} preemptions"
