"""The ways in which a cluster computes tokens, each served whole: who computes what, how many at once, what is drafted."""

import random
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import pytest

from orchestrator.core.config import (
    ClusterConfig,
    PoolConfig,
    SchedulerConfig,
    SpeculationConfig,
    SpeculationMethod,
    SplitConfig,
)
from orchestrator.core.node.draft_model import DraftModel
from orchestrator.core.node.speculation import Speculation
from orchestrator.core.types import CostProfile, PoolKind, ServiceClass
from tests.live.serving import Cluster, cluster, pool, split, together
from tests.workers.conductor import Guesses
from tests.workers.drafts.drafting import drafting, drafting_pool
from tests.workers.split.test_split_identity import ranks_of
from workers.engines import sequences
from workers.engines.base import SplitPlaces
from workers.engines.lookup import PromptLookup
from workers.engines.split.rank import FfnRank

TOKENS_MAX = 1500
OUTPUT_TOKENS = 72
#: Blocks of one node: hardly more than the longest prompt, so that sequences that decode run out of them.
BLOCKS = 112
#: Sequences that a node keeps on a beat, and tokens of each. The beat is many times as long as their step, which is measured at
#: start, while other programs may want the processor.
SLOTS, BEAT_S, BEAT_TOKENS = 4, 0.5, 24
#: Seconds that everything together, and one read, may take on a machine that has other things to do.
WAY_S, READ_S = 900, 240

#: Sequences that a draft model has room for, fewer than there are, and tokens that it sees of each, fewer than most prompts have.
DRAFTED, DRAFT_CONTEXT = 6, 512

#: What follows each prompt.
Expected = Mapping[tuple[int, ...], Sequence[int]]


class Drafts(Enum):
    """What drafts tokens, where they are generated."""

    NONE = "nothing"
    LOOKED_UP = "looked up"
    MODEL = "a model beside the model"
    POOL = "a model in a pool of its own"


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
    drafts: Drafts = Drafts.NONE

    @property
    def pool(self) -> PoolConfig:
        """The pool that generates."""
        return self.config.pools[-1]

    def drafted(self, drafts: Drafts) -> "Way":
        """Return the same with drafts."""
        return replace(self, drafts=drafts)

    def with_blocks(self, blocks: int) -> "Way":
        """Return the same with so many blocks of each node that may take one from another."""

        def changed(one: PoolConfig) -> PoolConfig:
            return one if one.kind is PoolKind.LPX else replace(one, engine=replace(one.engine, blocks=blocks))

        return replace(self, config=replace(self.config, pools=tuple(map(changed, self.config.pools))))

    def config_with(self, draft_model: Path) -> ClusterConfig:
        """Return the whole configuration."""
        method, first = SpeculationMethod.DRAFT_MODEL, tuple[PoolConfig, ...]()
        match self.drafts:
            case Drafts.NONE:
                return self.config
            case Drafts.LOOKED_UP:
                speculation = SpeculationConfig(SpeculationMethod.PROMPT_LOOKUP)
            case Drafts.MODEL:
                window = {"draft_context_tokens_max": DRAFT_CONTEXT, "draft_sequences_max": DRAFTED}
                speculation = SpeculationConfig(method, draft_model=str(draft_model), **window)
            case Drafts.POOL:
                speculation = SpeculationConfig(method, draft_pool="drafts")
                first = (drafting_pool(draft_model, DRAFTED, DRAFT_CONTEXT),)

        def changed(one: PoolConfig) -> PoolConfig:
            return replace(one, engine=replace(one.engine, speculation=speculation)) if one.kind.generates else one

        return replace(self.config, pools=(*first, *map(changed, self.config.pools)))


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


def draft_always(way: Way, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a way draft whatever that brings and costs: here nothing is to be saved."""
    if way.drafts is Drafts.LOOKED_UP:
        monkeypatch.setattr(sequences, "PromptLookup", lambda: Knowing(expected))
        monkeypatch.setattr(Speculation, "looked_up_for", lambda *_: 4)
    elif way.drafts is not Drafts.NONE:
        monkeypatch.setattr(Speculation, "looked_up_for", lambda *_: 0)
        monkeypatch.setattr(Speculation, "wish_for", lambda *_: 4)
        monkeypatch.setattr(DraftModel, "passes_for", lambda _, drafts, *more: 4 if drafts else 0)


@asynccontextmanager
async def serving(way: Way, path: Path, draft_model: Path) -> AsyncIterator[tuple[Cluster, list[FfnRank]]]:
    """Serve a model in a way; yield the cluster and its FFN ranks."""
    with ExitStack() as stack:
        ranks = stack.enter_context(ranks_of(path, way.ffn, way.spare)) if way.ffn else []
        drafts: str | None = None
        if way.drafts is Drafts.POOL:
            drafts = stack.enter_context(drafting(path, draft_model, DRAFTED, DRAFT_CONTEXT)).address
        addresses = tuple(rank.address for rank in ranks)
        cut, nodes = way.pool.split.microbatches if way.pool.split is not None else 0, way.pool.nodes
        places = SplitPlaces(addresses, way.spare, cut, silent_s=READ_S, attention=nodes) if ranks else None
        async with cluster(way.config_with(draft_model), path, places=places) as served:
            for server in served.servers.values():
                server.use_drafts(drafts)
            yield served, ranks


def cramped(config: ClusterConfig) -> ClusterConfig:
    def less(pool: PoolConfig) -> PoolConfig:
        return replace(pool, engine=replace(pool.engine, blocks=BLOCKS), scheduler=replace(pool.scheduler, step_tokens_max=200))

    return replace(config, pools=tuple(less(pool) for pool in config.pools))


def apart(attention: int, ffn: int, spare: int = 0, prefill: bool = False) -> Way:
    """Return a way with attention and FFN in a group of so many ranks; others compute prompts if `prefill`."""
    config = cramped(split("eager", attention) if prefill else together("eager", attention))
    shares = SplitConfig(attention=attention, ffn=ffn, spare_slots=spare, imbalance_max=0.01)
    *others, last = config.pools
    return Way(replace(config, pools=(*others, replace(last, split=shares))), ffn=ffn, spare=spare)


def beating(nodes: int = 1, ffn: int = 0) -> Way:
    """Return a way in which everybody is kept on a beat, as long as there is a slot; with FFN ranks their nodes are a group."""
    config = cramped(split("eager"))
    shares = SplitConfig(attention=nodes, ffn=ffn, microbatches=2, imbalance_max=0.0) if ffn else None
    lpx = pool("cadence", PoolKind.LPX, nodes, "eager", profile=CostProfile(beat_s=BEAT_S), split=shares)
    engine = replace(lpx.engine, blocks=2 * SLOTS * BLOCKS, context_tokens_max=TOKENS_MAX + OUTPUT_TOKENS)
    lpx = replace(lpx, engine=engine, scheduler=SchedulerConfig(sequences_max=SLOTS, step_tokens_max=64))
    everything = replace(config, pools=(*config.pools, lpx))
    return Way(everything, nodes * SLOTS, BEAT_TOKENS, ffn=ffn, service_class=ServiceClass.CADENCE)


AGGREGATED = Way(cramped(together("eager")))
DISAGGREGATED = Way(cramped(split("eager")))
WAYS = {
    "aggregated, one by one": replace(AGGREGATED, together=1),
    "aggregated": AGGREGATED,
    "disaggregated, one by one": replace(DISAGGREGATED, together=1),
    "disaggregated": DISAGGREGATED,
    "attention and FFN 1:1": apart(1, 1),
    "attention and FFN 2:1": apart(2, 1),
    "attention and FFN 1:2": apart(1, 2),
    "attention and FFN 2:2": apart(2, 2),
    "disaggregated, attention and FFN 2:2": apart(2, 2, prefill=True),
    "experts with copies that move": apart(2, 2, spare=2),
    "drafted": AGGREGATED.drafted(Drafts.LOOKED_UP),
    "drafted, disaggregated": DISAGGREGATED.drafted(Drafts.LOOKED_UP),
    "drafted, attention and FFN 2:2": apart(2, 2).drafted(Drafts.LOOKED_UP),
    "drafted by a model": AGGREGATED.drafted(Drafts.MODEL),
    "drafted by a model, disaggregated": DISAGGREGATED.drafted(Drafts.MODEL),
    "drafted by a model, attention and FFN 2:2": apart(2, 2).drafted(Drafts.MODEL),
    "drafted by a model, experts with copies that move": apart(2, 2, spare=2).drafted(Drafts.MODEL),
    "drafted by a pool of its own": AGGREGATED.drafted(Drafts.POOL),
    "drafted by a pool of its own, disaggregated, attention and FFN 2:2": apart(2, 2, prefill=True).drafted(Drafts.POOL),
    "on a beat": beating(),
    "on a beat, attention and FFN 2:2": beating(2, 2),
}
