"""Fetching a long context back from CPU memory or context storage against computing it again, on the article's hardware."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from bench.article.claim import Finding
from bench.article.sources import Source
from bench.article.study import Study
from orchestrator.cli.fronts import RUBIN, cluster, model_of
from orchestrator.cli.report.page import Section, Table
from orchestrator.core.config import ConfigError, PoolConfig
from orchestrator.core.cost.costs import prompt_seconds
from orchestrator.core.cost.machines import Link, Machine
from orchestrator.core.cost.roofline import tier_load_seconds
from orchestrator.core.types import PoolKind
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import machine_of, resolve

CMX_PORT = Source(
    "BlueField-4 has a port of 800 Gb/s; what one GPU gets of context memory storage is not published",
    "https://developer.nvidia.com/blog/inside-the-nvidia-rubin-platform-six-new-chips-one-ai-supercomputer/",
)


@dataclass(frozen=True, slots=True)
class RequestRates:
    """Requests a second that one GPU computes with their context loaded, and with it computed again."""

    model: str
    #: Built-in shape of that model; empty if its shape is not published.
    shape: str
    cached_tokens: int
    new_tokens: int
    output_tokens: int
    loaded: float
    computed: float


STORE_SIMULATOR = Source(
    "constants in a public KV-store simulator: requests a second of one GPU with the cached context loaded and with it computed "
    "again; GPU and method are not stated there",
    "a GitHub repository named storage-sim, read in 2026; its address was not kept",
)
STORE_RATES = (
    RequestRates("DeepSeek-V3", "deepseek-v3", 131_072, 2_048, 1_000, 1.6988, 0.0956),
    RequestRates("Kimi-K2", "kimi-k2", 131_072, 2_048, 1_000, 3.1607, 0.3558),
    RequestRates("Kimi-K2", "kimi-k2", 204_800, 4_096, 200, 3.2222, 0.1711),
    RequestRates("GPT-OSS-2T", "", 409_600, 4_096, 200, 2.4520, 0.0596),
    RequestRates("Kimi-K2", "kimi-k2", 1_048_576, 4_096, 200, 0.6678, 0.0074),
)

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


def find(study: Study) -> Finding:
    """Return both tables; the article states no number of them."""
    brought, saved = restoring(study.catalog), spared(study.catalog)
    numbers = {
        "restoring": [{**asdict(one), "cmx_gain": one.cmx_gain} for one in brought],
        "spared": [{**asdict(one), "stated": one.stated, "ours": one.ours} for one in saved],
    }
    return Finding((), (_restoring_section(brought), _spared_section(saved)), numbers)


def _restoring_section(found: Sequence[Restoring]) -> Section:
    headers = (
        "context",
        "KV, GB",
        "from CPU memory, s",
        "from CMX, s",
        "computed again, s",
        "CMX sooner by",
        "CMX must give, GB/s",
        "fit in CPU memory",
        "fit in CMX",
    )
    rows = [
        (
            f"{one.context_tokens:,} tokens",
            f"{one.size_bytes / 1e9:.1f}",
            f"{one.cpu_s:.3f}",
            f"{one.cmx_s:.2f}",
            f"{one.recompute_s:.2f}",
            f"{one.cmx_gain:.0f} times",
            f"{one.cmx_bytes_per_s_least / 1e9:.2f}",
            f"{one.cpu_contexts:,}",
            f"{one.cmx_contexts:,}",
        )
        for one in found
    ]
    text = (
        f"{model_of(RUBIN)} with an FP8 cache on one prefill GPU of {RUBIN.name}, nothing else running. What CMX must give is "
        "the rate at which fetching takes as long as computing: anything faster wins. The last columns count contexts of that "
        "length in one GPU's part of either tier.",
        f"{CMX_PORT.text} ({CMX_PORT.url}); the rate used is the assumption cmx.bytes_per_s.",
    )
    return Section("Fetching a context back or computing it again", text, table=Table(headers, rows), folded=True)


def _spared_section(found: Sequence[Spared]) -> Section:
    """Return how much work a loaded context spares a GPU in another simulator and here."""
    headers = (
        "model, cached + new tokens",
        "theirs, loaded over computed",
        "ours, loading free",
        "ours, waiting for CMX",
        "ours is of",
    )
    rows = [
        (
            f"{one.theirs.model}, {one.theirs.cached_tokens:,} + {one.theirs.new_tokens:,}",
            f"{one.stated:.1f}",
            f"{one.ours:.1f}",
            f"{one.ours_waiting:.1f}",
            one.shape,
        )
        for one in found
    ]
    answers = [one.theirs.output_tokens for one in found]
    text = (
        f"How many times the requests a GPU computes if it need not compute the cached context. Theirs: {STORE_SIMULATOR.text} "
        f"({STORE_SIMULATOR.url}); their answers of {min(answers):,} to {max(answers):,} tokens may be in it. Ours: seconds of "
        "a prefill GPU for the whole prompt over those for its new tokens alone, and over those with the GPU idle until CMX "
        "has delivered; answers are not in it.",
    )
    return Section("What a loaded context spares, beside another simulator", text, table=Table(headers, rows), folded=True)
