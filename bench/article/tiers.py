"""Fetching a long context back from CPU memory or context storage against computing it again, on the article's hardware."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.article.fronts import RUBIN, cluster
from bench.article.sources import STORE_RATES, RequestRates
from orchestrator.core.config import ConfigError, PoolConfig
from orchestrator.core.cost.costs import prompt_seconds
from orchestrator.core.cost.machines import Link, Machine
from orchestrator.core.cost.roofline import tier_load_seconds
from orchestrator.core.types import PoolKind
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import machine_of, resolve

CONTEXTS = tuple(sorted({rates.cached_tokens for rates in STORE_RATES}))


@dataclass(frozen=True, slots=True)
class Restoring:
    """One context's ways back into a prefill node's memory, in seconds, and how many of that length each tier keeps a GPU."""

    context_tokens: int
    size_bytes: float
    cpu_s: float
    cmx_s: float
    recompute_s: float
    cpu_contexts: int
    cmx_contexts: int

    @property
    def cmx_gain(self) -> float:
        """How many times sooner context storage is than computing."""
        return self.recompute_s / self.cmx_s

    @property
    def cmx_bytes_per_s_least(self) -> float:
        """The rate at which context storage is as slow as computing."""
        return self.size_bytes / self.recompute_s


@dataclass(frozen=True, slots=True)
class Spared:
    """What others' simulator spares by not computing a context again, and what ours does."""

    theirs: RequestRates
    #: The model that ours is of, since the shape of theirs may be unpublished.
    shape: str
    #: Seconds of a prefill node for the whole prompt, for its new tokens alone, and for fetching the rest from context storage.
    whole_s: float
    new_s: float
    cmx_s: float

    @property
    def stated(self) -> float:
        """How many times the requests of a GPU theirs has with the context loaded."""
        return self.theirs.loaded / self.theirs.computed

    @property
    def ours(self) -> float:
        """The same of a prefill GPU of ours, loading being free."""
        return self.whole_s / self.new_s

    @property
    def ours_waiting(self) -> float:
        """The same if the GPU waits for context storage instead."""
        return self.whole_s / (self.new_s + self.cmx_s)


@dataclass(frozen=True, slots=True)
class _Node:
    """A prefill node of VR NVL72."""

    pool: PoolConfig
    machine: Machine

    @property
    def host(self) -> Link:
        return _link(self.machine.chip.host, "host")

    @property
    def storage(self) -> Link:
        return _link(self.machine.chip.storage, "storage")

    def size_bytes(self, tokens: int) -> float:
        return tokens * self.machine.kv_token_bytes

    def load_s(self, link: Link, tokens: int) -> float:
        return tier_load_seconds(link, self.size_bytes(tokens), self.pool.hardware.chips)

    def prompt_s(self, tokens: int, context: int) -> float:
        return prompt_seconds(self.pool.profile, tokens, context, self.pool.scheduler.step_tokens_max)


def restoring(catalog: Catalog, contexts: Sequence[int] = CONTEXTS) -> list[Restoring]:
    """Return the times for the model of VR NVL72's cluster file."""
    node = _node(catalog)
    return [
        Restoring(
            context_tokens=tokens,
            size_bytes=node.size_bytes(tokens),
            cpu_s=node.load_s(node.host, tokens),
            cmx_s=node.load_s(node.storage, tokens),
            recompute_s=node.prompt_s(tokens, 0),
            cpu_contexts=int(node.host.capacity_bytes / node.size_bytes(tokens)),
            cmx_contexts=int(node.storage.capacity_bytes / node.size_bytes(tokens)),
        )
        for tokens in contexts
    ]


def spared(catalog: Catalog) -> list[Spared]:
    """Return ours for each of the published constants, for the model itself where its shape is known."""
    found: list[Spared] = []
    for rates in STORE_RATES:
        node = _node(catalog, rates.shape)
        whole_s, new_s = (
            node.prompt_s(rates.cached_tokens + rates.new_tokens, 0),
            node.prompt_s(rates.new_tokens, rates.cached_tokens),
        )
        cmx_s = node.load_s(node.storage, rates.cached_tokens)
        found.append(Spared(rates, node.machine.shape.name, whole_s, new_s, cmx_s))
    return found


def _node(catalog: Catalog, shape: str = "") -> _Node:
    config = cluster(RUBIN.file)
    if shape:
        config = replace(config, models={name: replace(model, shape=shape) for name, model in config.models.items()})
    config = resolve(config, catalog).config
    pool = next(pool for pool in config.pools if pool.kind is PoolKind.PREFILL)
    return _Node(pool, machine_of(config, pool, catalog))


def _link(link: Link | None, what: str) -> Link:
    if link is None:
        raise ConfigError("hardware.chip", f"the chip of {RUBIN.file} has no {what}")
    return link
