"""Fetching a long context back from CPU memory or context storage against computing it again, on the article's hardware."""

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.figures.fronts import RUBIN, cluster
from orchestrator.core.config import ConfigError, PoolConfig
from orchestrator.core.costs import prompt_seconds
from orchestrator.core.machines import Link
from orchestrator.core.roofline import tier_load_seconds
from orchestrator.core.types import PoolKind
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import machine_of, resolve

CONTEXTS = (131_072, 204_800, 409_600, 1_000_000)


@dataclass(frozen=True, slots=True)
class Restoring:
    """One context's ways back into a prefill node's memory, in seconds."""

    context_tokens: int
    size_bytes: float
    cpu_s: float
    cmx_s: float
    recompute_s: float

    @property
    def cmx_gain(self) -> float:
        """How many times sooner context storage is than computing."""
        return self.recompute_s / self.cmx_s

    @property
    def cmx_bytes_per_s_least(self) -> float:
        """The rate at which context storage is as slow as computing."""
        return self.size_bytes / self.recompute_s


def restoring(catalog: Catalog, contexts: Sequence[int] = CONTEXTS) -> list[Restoring]:
    """Return the times for Kimi-K2 on a prefill node of VR NVL72."""
    config = resolve(cluster(RUBIN.file), catalog).config
    pool = next(pool for pool in config.pools if pool.kind is PoolKind.PREFILL)
    machine = machine_of(config, pool, catalog)
    host, storage = _link(machine.chip.host, "host"), _link(machine.chip.storage, "storage")
    found: list[Restoring] = []
    for tokens in contexts:
        size = tokens * machine.kv_token_bytes
        cpu_s = tier_load_seconds(host, size, pool.hardware.chips)
        cmx_s = tier_load_seconds(storage, size, pool.hardware.chips)
        found.append(Restoring(tokens, size, cpu_s, cmx_s, _recompute_s(pool, tokens)))
    return found


def _recompute_s(pool: PoolConfig, tokens: int) -> float:
    return prompt_seconds(pool.profile, tokens, 0, pool.scheduler.step_tokens_max)


def _link(link: Link | None, what: str) -> Link:
    if link is None:
        raise ConfigError("hardware.chip", f"the chip of {RUBIN.file} has no {what}")
    return link
