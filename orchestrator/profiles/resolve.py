"""Fills a cluster file's pools that name their hardware: profile, KV blocks, context limit; and says what a node costs.

A pool without hardware stays as it is, and has no price.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from orchestrator.core.config import ClusterConfig, ConfigError, DecodeMode, PoolConfig, Precision, require
from orchestrator.core.machines import Chip, Coupling, Link, Machine
from orchestrator.core.roofline import cost_profile
from orchestrator.core.types import PoolName
from orchestrator.profiles.catalog import Catalog, CatalogError
from orchestrator.profiles.memory import block_bytes, kv_blocks

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class PoolHardware:
    """What one node of a pool is made of, costs and draws, its share of the other half's chips included."""

    #: By chip; fractions where several nodes share the other half.
    chips: Mapping[str, float]
    #: Of those, the chips that are GPUs: what figures per GPU divide by.
    gpus: float
    usd_per_hour: float
    kw: float
    block_bytes: int
    #: Names of the assumptions that profile, price or power rest on.
    assumptions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Resolved:
    """A cluster whose pools are complete."""

    config: ClusterConfig
    hardware: Mapping[PoolName, PoolHardware]


def resolve(config: ClusterConfig, catalog: Catalog) -> Resolved:
    """Return the cluster with every pool that names its hardware filled in. Raises `ConfigError` naming the field."""
    pools: list[PoolConfig] = []
    hardware: dict[PoolName, PoolHardware] = {}
    for index, pool in enumerate(config.pools):
        if not pool.hardware.chip:
            pools.append(pool)
            continue
        try:
            machine = machine_of(config, pool, catalog)
            pools.append(_filled(config, pool, machine))
        except ConfigError as error:
            raise ConfigError(f"pools[{index}].{error.where}", error.problem) from None
        hardware[PoolName(pool.name)] = _node_hardware(config, pool, machine, catalog)
    return Resolved(replace(config, pools=tuple(pools)), hardware)


def machine_of(config: ClusterConfig, pool: PoolConfig, catalog: Catalog) -> Machine:
    """Return what a pool's nodes are, ready for the formulas. Raises `ConfigError` naming the field within the pool."""
    hardware, model = pool.hardware, config.models[pool.model]
    named = model.shape or model.path
    require(bool(named), "model", f"models.{pool.model} needs a shape (or a path) because this pool has hardware")
    halves = hardware.mode is not DecodeMode.PLAIN
    chip = _found("hardware.chip", catalog.chip, hardware.chip)
    other = _found("hardware.ffn_chip", catalog.chip, hardware.ffn_chip) if halves else None
    shape = _found("model", catalog.shape, named)
    if hardware.mode is not DecodeMode.WHOLE:
        _check_precision(chip, "weights", hardware.weights)
        _check_precision(chip, "activations", hardware.activations)
    attends = other if hardware.mode is DecodeMode.WHOLE and other is not None else chip
    if hardware.kv is not Precision.NVFP4:
        _check_precision(attends, "kv", hardware.kv)
    if other is not None:
        _check_precision(other, "ffn_weights", hardware.ffn_weights)
    return Machine(shape, hardware, chip, catalog.practice, other, _coupling(chip, other, catalog) if halves else None)


def _coupling(chip: Chip, other: Chip | None, catalog: Catalog) -> Coupling:
    """Return how the halves are joined: GPUs by their own network, an LPX rack by its link."""
    coupling = catalog.coupling
    return replace(coupling, link=chip.scale_up) if other is not None and other.is_gpu else coupling


def _found(field: str, look_up: Callable[[str], _T], name: str) -> _T:
    """Return what a catalog has under a name; what it lacks is the field's fault."""
    try:
        return look_up(name)
    except CatalogError as error:
        raise ConfigError(field, str(error)) from None


def _check_precision(chip: Chip, field: str, wanted: Precision) -> None:
    known = ", ".join(precision.value for precision in chip.flops)
    require(wanted in chip.flops, f"hardware.{field}", f"{chip.name} does not compute in {wanted.value}; it does in {known}")


def _filled(config: ClusterConfig, pool: PoolConfig, machine: Machine) -> PoolConfig:
    scheduler, engine = pool.scheduler, pool.engine
    fits = kv_blocks(machine, engine.block_tokens, scheduler.sequences_max, engine.memory_fraction)
    require(engine.blocks <= fits, "engine.blocks", f"at most {fits} fit into a node's memory, is {engine.blocks}")
    limit, own = machine.shape.context_tokens_max, engine.context_tokens_max
    require(own <= limit, "engine.context_tokens_max", f"{machine.shape.name} has {limit} positions, is {own}")
    profile = cost_profile(machine, scheduler.sequences_max, scheduler.step_tokens_max, _fetch_link(config, pool, machine))
    filled = replace(engine, blocks=engine.blocks or fits, context_tokens_max=own or limit)
    return replace(pool, profile=profile, engine=filled)


def _fetch_link(config: ClusterConfig, pool: PoolConfig, machine: Machine) -> Link:
    """Return what blocks come over: the scale-up network where all chips of the model fit into one domain, else the other."""
    if pool.hardware.mode is DecodeMode.WHOLE and machine.coupling is not None:
        return machine.coupling.link
    pools, chip = config.pools_of(pool.model), machine.chip
    total = sum(other.nodes * other.hardware.chips for other in pools)
    alike = all(other.hardware.chip == chip.name for other in pools)
    return chip.scale_up if alike and total <= chip.domain_chips else chip.scale_out


def _node_hardware(config: ClusterConfig, pool: PoolConfig, machine: Machine, catalog: Catalog) -> PoolHardware:
    hardware = pool.hardware
    counts: list[tuple[Chip, float]] = []
    if hardware.mode is not DecodeMode.WHOLE:
        counts.append((machine.chip, float(hardware.chips)))
    if machine.ffn_chip is not None:
        counts.append((machine.ffn_chip, hardware.ffn_chips / hardware.group_nodes))
    chips: dict[str, float] = {}
    for chip, count in counts:
        chips[chip.name] = chips.get(chip.name, 0.0) + count
    return PoolHardware(
        chips=chips,
        gpus=sum(count for chip, count in counts if chip.is_gpu),
        usd_per_hour=sum(chip.usd_per_hour * count for chip, count in counts),
        kw=sum(chip.kw * count for chip, count in counts),
        block_bytes=block_bytes(machine, pool.engine.block_tokens),
        assumptions=_assumptions(config, pool, machine, catalog),
    )


def _assumptions(config: ClusterConfig, pool: PoolConfig, machine: Machine, catalog: Catalog) -> tuple[str, ...]:
    """Return the assumptions in the profiles that a pool's time, memory, price and power are computed from."""
    hardware = pool.hardware
    files = {"economics", _fetch_link(config, pool, machine).name}
    files |= {machine.group_link.name} if hardware.chips * hardware.group_nodes > 1 else set()
    files |= {"lpx"} if hardware.mode is DecodeMode.DRAFTER else set()
    for chip in (machine.chip, machine.ffn_chip):
        if chip is not None:
            files |= {chip.name, "practice" if chip.is_gpu else "lpx"}
    named = catalog.assumptions_in(frozenset(files))
    multiplied = {machine.attention.activations, machine.ffn.activations, hardware.kv}
    idle = {f"{kind.value}_{what}" for kind in Precision if kind not in multiplied for what in ("flops", "matmul_efficiency")}
    idle |= set() if hardware.mode is DecodeMode.DRAFTER else {"draft_parameters", "draft_layers"}
    return tuple(name for name in named if name.partition(".")[2] not in idle)
