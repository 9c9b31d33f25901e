"""Turns plans into clusters that can be simulated, and simulated runs into what plans are chosen by."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

from orchestrator.core.config import ClusterConfig, ConfigError, DecodeMode, LimitsConfig, ModelConfig
from orchestrator.core.cost.machines import Machine
from orchestrator.core.cost.overlap import Halves
from orchestrator.core.cost.roofline import context_seconds, halves_at
from orchestrator.core.types import PoolKind, PoolName, ServiceClass
from orchestrator.plan.estimate import Sizing
from orchestrator.plan.goal import Price, Slo
from orchestrator.plan.space import Plan, PoolPlan, pool_config
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import Resolved, resolve
from orchestrator.sim.outcome import Outcome, Served

S_PER_H = 3600.0
#: Requests are held this long rather than refused: a plan is judged by how late its answers are.
PATIENT = LimitsConfig(waiting_max=8192, waiting_s_max=600.0, request_s_max=3600.0)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a simulated plan cost and reached."""

    plan: Plan
    price: Price
    #: At the asked percentile: of requests to the first token, of tokens to the next.
    ttft_s: float
    itl_s: float
    #: Share of requests that ended well with their first token and their mean time between tokens within the limits.
    goodput: float
    failed: int
    hit_rate: float
    output_tokens_per_usd: float
    tokens_per_s_per_gpu: float
    assumptions: tuple[str, ...]
    #: How busy attention's chips were over how busy those of FFNs were; None where decode is not split between them.
    balance: float | None = None
    #: Share of the tokens that came from the pool that keeps a beat; None where none does.
    beat_share: float | None = None


class Builder:
    """Builds plans for one model from the hardware profiles."""

    def __init__(self, catalog: Catalog, model: ModelConfig, block_tokens: int) -> None:
        self._catalog = catalog
        self._model = model
        self._block_tokens = block_tokens
        self._sizes: dict[PoolPlan, Sizing | None] = {}

    def cluster(self, plan: Plan) -> ClusterConfig:
        """Return a plan as a cluster file says it."""
        pools = tuple(pool_config(pool, self._block_tokens) for pool in plan.pools)
        # Requests of a trace name no class.
        beats = any(pool.kind is PoolKind.LPX for pool in plan.pools)
        limits = replace(PATIENT, service_class=ServiceClass.CADENCE) if beats else PATIENT
        return ClusterConfig(limits=limits, models={"default": self._model}, pools=pools)

    def resolved(self, plan: Plan) -> Resolved:
        """Return a plan ready to be simulated. Raises `ConfigError` if it cannot be built."""
        return resolve(self.cluster(plan), self._catalog)

    def size(self, pool: PoolPlan) -> Sizing | None:
        """Return what one node of a pool is, or None if it cannot be built; one group of it is looked at."""
        group = pool.sized(1)
        if group not in self._sizes:
            self._sizes[group] = self._resolve(group)
        return self._sizes[group]

    def _resolve(self, group: PoolPlan) -> Sizing | None:
        # A cluster needs a pool that generates; what a prefill node is does not depend on it.
        alone = PoolPlan(PoolKind.AGGREGATED, group.hardware, group.step_tokens_max, group.nodes)
        try:
            resolved = self.resolved(Plan((alone,)))
        except ConfigError:
            return None
        (pool,), hardware = resolved.config.pools, resolved.hardware[PoolName(alone.kind.value)]
        engine = pool.engine
        return Sizing(
            profile=pool.profile,
            kv_tokens=engine.blocks * engine.block_tokens,
            kv_token_bytes=hardware.block_bytes / engine.block_tokens,
            usd_per_hour=hardware.usd_per_hour,
            kw=hardware.kw,
            gpus=hardware.gpus,
            halves=_halves_of(hardware.machine),
        )


def _halves_of(machine: Machine | None) -> Callable[[int, float], Halves] | None:
    """Return what tells the halves of a node's passes; None if it does all on the same chips."""
    if machine is None or machine.hardware.mode is not DecodeMode.AFD:
        return None

    def halves(sequences: int, context_tokens: float) -> Halves:
        return halves_at(machine, sequences * machine.pass_tokens, context_seconds(machine, sequences, context_tokens))

    return halves


def measured(plan: Plan, resolved: Resolved, outcome: Outcome, slo: Slo) -> Measured:
    """Return what a simulated run of a plan amounts to."""
    nodes = {pool.name: pool.nodes for pool in resolved.config.pools}
    hardware = resolved.hardware
    price = Price(
        usd_per_hour=sum(hardware[PoolName(name)].usd_per_hour * count for name, count in nodes.items()),
        kw=sum(hardware[PoolName(name)].kw * count for name, count in nodes.items()),
        gpus=sum(hardware[PoolName(name)].gpus * count for name, count in nodes.items()),
    )
    ended = [request for request in outcome.served if request.completed]
    ttfts = sorted(request.ttft_s for request in ended if request.ttft_s is not None)
    outputs = sum(request.output_tokens for request in ended)
    inputs = sum(request.turn.input_tokens for request in ended)
    return Measured(
        plan=plan,
        price=price,
        ttft_s=_percentile(ttfts, slo.percentile),
        itl_s=outcome.itl_s.percentile(slo.percentile),
        goodput=sum(_within(request, slo) for request in ended) / max(len(outcome.served), 1),
        failed=len(outcome.served) - len(ended),
        hit_rate=sum(request.cached_tokens for request in ended) / max(inputs, 1),
        output_tokens_per_usd=outputs / max(outcome.duration_s / S_PER_H * price.usd_per_hour, 1e-9),
        tokens_per_s_per_gpu=outputs / max(outcome.duration_s * price.gpus, 1e-9),
        balance=_balance(plan, outcome),
        beat_share=_beat_share(plan, outcome),
        assumptions=tuple(sorted({name for pool in hardware.values() for name in pool.assumptions})),
    )


def _balance(plan: Plan, outcome: Outcome) -> float | None:
    use = outcome.pools.get(PoolName(plan.decode.kind.value))
    if use is None or use.split is None or use.split.ffn_s <= 0.0:
        return None
    return use.split.attention_s / use.split.ffn_s


def _beat_share(plan: Plan, outcome: Outcome) -> float | None:
    if plan.decode.kind is not PoolKind.LPX:
        return None
    tokens = {name: use.output_tokens for name, use in outcome.pools.items()}
    return tokens.get(PoolName(PoolKind.LPX.value), 0) / max(sum(tokens.values()), 1)


def _percentile(ordered: list[float], share: float) -> float:
    """Return the least value that at least `share` of the values do not exceed; 0.0 of nothing."""
    return ordered[max(ceil(share * len(ordered)), 1) - 1] if ordered else 0.0


def _within(request: Served, slo: Slo) -> bool:
    speed = request.tokens_per_s
    soon = request.ttft_s is not None and request.ttft_s <= slo.ttft_s
    return soon and (speed is None or speed * slo.itl_s >= 1.0)
