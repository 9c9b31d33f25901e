"""Fills a cluster file's pools that name their hardware: profile, KV blocks, context limit; and says what a node costs.

A pool without hardware stays as it is, and has no price. Where there are stores, whoever asks says how large its blocks are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from orchestrator.core.config import (
    ClusterConfig,
    ConfigError,
    DecodeMode,
    HardwareConfig,
    KvFormat,
    PoolConfig,
    Precision,
    SpeculationMethod,
    StoreConfig,
    require,
)
from orchestrator.core.cost.costs import keeps_beat, work_seconds
from orchestrator.core.cost.machines import Chip, Coupling, Link, Machine
from orchestrator.core.cost.roofline import cost_profile, with_microbatches
from orchestrator.core.types import PoolKind, PoolName
from orchestrator.profiles.catalog import Catalog, CatalogError, acceptance_name
from orchestrator.profiles.memory import block_bytes, kv_blocks, stored_block_bytes
from orchestrator.profiles.positions import limited

_T = TypeVar("_T")
#: Endings of the names of numbers that a pool may leave unused although it is made of what they describe.
_SOMETIMES = (
    "_flops",
    "matmul_efficiency",
    "expert_efficiency",
    ".domain_chips",
    ".acceptance",
    ".draft_parameters",
    ".draft_layers",
)


@dataclass(frozen=True, slots=True)
class Below:
    """What is below the memory of a pool's nodes: their hosts' memory, and the storage that hosts share.

    The links are one node's to its host's memory, and one host's to the storage, in one direction.
    """

    #: Nodes of one host; None: all nodes of such pools are on one, as where `weft serve` starts them.
    host_nodes: int | None
    cpu_bytes_per_s: float
    cpu_latency_s: float
    cmx_bytes_per_s: float
    cmx_latency_s: float
    #: Of a block there, which may be fewer than in the nodes' memory; and of one in their memory.
    block_bytes: int
    pool_block_bytes: int
    #: Whether a node reads what is in the storage alone by itself, without a copy in its host's memory between.
    direct: bool = False


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
    #: What the formulas take, for whoever looks into a pass; None: nobody may.
    machine: Machine | None = None


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """Bytes of a block of a pool's: in its nodes' memory, and in a store."""

    pool: int
    stored: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """A cluster whose pools are complete."""

    config: ClusterConfig
    hardware: Mapping[PoolName, PoolHardware]
    #: Of every pool, in a cluster that has stores; empty in another.
    below: Mapping[PoolName, Below] = field(default_factory=lambda: {})


def resolve(config: ClusterConfig, catalog: Catalog, blocks: Mapping[PoolName, BlockBytes] | None = None) -> Resolved:
    """Return the cluster with every pool that names its hardware filled in; `blocks` are those of pools that do not.

    Raises `ConfigError` naming the field.
    """
    pools: list[PoolConfig] = []
    hardware: dict[PoolName, PoolHardware] = {}
    below: dict[PoolName, Below] = {}
    for index, pool in enumerate(config.pools):
        name = PoolName(pool.name)
        if pool.drafter is not None:  # what it takes is `profile.draft_step_s` of those that it drafts for
            pools.append(pool)
            continue
        if not pool.hardware.chip:
            pools.append(pool)
            if config.store is not None:
                known = (blocks or {}).get(name)
                problem = f"cannot be planned beside pools[{index}], which has no hardware: nobody knows the bytes of its blocks"
                require(known is not None, "store", problem)
                assert known is not None
                below[name] = _below_profile(config.store, pool, known)
            continue
        try:
            machine = machine_of(config, pool, catalog)
            pools.append(_filled(config, pool, machine))
        except ConfigError as error:
            where = error.where if error.where.startswith(("models.", "store.")) else f"pools[{index}].{error.where}"
            raise ConfigError(where, error.problem) from None
        hardware[name] = _node_hardware(config, pool, machine, catalog)
        if config.store is not None:
            below[name] = _below(config.store, pool, machine)
    return Resolved(replace(config, pools=tuple(pools)), hardware, below)


def machine_of(config: ClusterConfig, pool: PoolConfig, catalog: Catalog) -> Machine:
    """Return what a pool's nodes are, ready for the formulas. Raises `ConfigError` naming the pool's field, or a model's."""
    hardware, model = pool.hardware, config.models[pool.model]
    named = model.shape or model.path
    require(bool(named), "model", f"models.{pool.model} needs a shape (or a path) because this pool has hardware")
    halves = hardware.mode is not DecodeMode.PLAIN
    group, others = hardware.chips * hardware.group_nodes, hardware.ffn_chips
    chip = _found("hardware.chip", lambda name: catalog.chip(name, group), hardware.chip)
    other = _found("hardware.ffn_chip", lambda name: catalog.chip(name, others), hardware.ffn_chip) if halves else None
    shape = _found(f"models.{pool.model}.{'shape' if model.shape else 'path'}", catalog.shape, named)
    if hardware.mode is not DecodeMode.WHOLE:
        _check_precision(chip, "weights", hardware.weights)
        _check_precision(chip, "activations", hardware.activations)
    attends = other if hardware.mode is DecodeMode.WHOLE and other is not None else chip
    if hardware.kv is not Precision.NVFP4:
        _check_precision(attends, "kv", hardware.kv)
    if other is not None:
        _check_precision(other, "ffn_weights", hardware.ffn_weights)
    coupling = _coupling(chip, other, catalog) if halves else None
    machine = Machine(shape, hardware, chip, catalog.practice, other, coupling, acceptance_of(hardware, catalog))
    return _split(pool, machine)


def _split(pool: PoolConfig, machine: Machine) -> Machine:
    """Return the machine with as many micro-batches as suit a full node, unless the pool says how many."""
    if machine.hardware.microbatches:
        return machine
    sequences, engine = pool.scheduler.sequences_max, pool.engine
    fits = kv_blocks(machine, engine.block_tokens, sequences, engine.memory_fraction) * engine.block_tokens
    return with_microbatches(machine, sequences, min(fits, sequences * machine.shape.context_tokens_max))


def acceptance_of(hardware: HardwareConfig, catalog: Catalog) -> float:
    """Return the chance that a drafted token is accepted: the pool's own, else the catalog's. Raises `ConfigError`."""
    if not hardware.draft_tokens:
        return 0.0
    chance = catalog.number(acceptance_name(hardware.mode)) if hardware.acceptance is None else hardware.acceptance
    require(chance < 1, "hardware.acceptance", f"must be in [0, 1), is {chance}")
    return chance


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
    context = limited(machine.shape.context_tokens_max, engine.context_tokens_max)
    profile = cost_profile(machine, scheduler.sequences_max, scheduler.step_tokens_max, _fetch_link(config, pool, machine))
    profile = replace(profile, beat_s=pool.profile.beat_s, draft_step_s=pool.profile.draft_step_s)
    drafts = engine.speculation.method is SpeculationMethod.DRAFT_MODEL
    problem = "must be over 0: with hardware a draft model's time has to be given"
    require(profile.draft_step_s > 0 or not drafts, "profile.draft_step_s", problem)
    if pool.kind is PoolKind.LPX:
        alone_s = work_seconds(profile, 1, 1)
        problem = f"must be at least {alone_s:.6f} s, what a pass of one short sequence takes, is {profile.beat_s}"
        require(keeps_beat(profile, 1, 1), "profile.beat_s", problem)
    filled = replace(engine, blocks=engine.blocks or fits, context_tokens_max=context)
    return replace(pool, profile=profile, engine=filled, hardware=machine.hardware)


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
        machine=machine,
    )


def _below_profile(store: StoreConfig, pool: PoolConfig, known: BlockBytes) -> Below:
    """Return what is below nodes of which the profile alone is known: the cluster file says how fast that is.

    They are taken to compute on their host's processors, unless the cluster file names another device.
    """
    engine = pool.engine
    return Below(
        host_nodes=None,
        cpu_bytes_per_s=store.cpu_bytes_per_s,
        cpu_latency_s=pool.profile.fetch_latency_s,
        cmx_bytes_per_s=store.cmx_bytes_per_s,
        cmx_latency_s=store.cmx_latency_s,
        block_bytes=known.stored,
        pool_block_bytes=known.pool,
        direct=store.cmx.startswith("file:") and engine.kv_format_stored is KvFormat.PLAIN and engine.device != "cuda",
    )


def _below(store: StoreConfig, pool: PoolConfig, machine: Machine) -> Below:
    """Return what is below a pool's nodes: the chip's own host and storage, or what the cluster file says of stores' rates."""
    chip, hardware = machine.chip, pool.hardware
    host_nodes = max(1, hardware.host_chips // hardware.chips)
    chips = host_nodes * hardware.chips
    if chip.host is not None and chip.host.capacity_bytes:
        most = int(chip.host.capacity_bytes * chips)
        require(store.cpu_bytes <= most, "store.cpu_bytes", f"a host of {chips} {chip.name} has {most}, is {store.cpu_bytes}")
    return Below(
        host_nodes=host_nodes,
        cpu_bytes_per_s=chip.host.rate * hardware.chips if chip.host is not None else store.cpu_bytes_per_s,
        cpu_latency_s=chip.host.latency_s if chip.host is not None else 0.0,
        cmx_bytes_per_s=chip.storage.rate * chips if chip.storage is not None else store.cmx_bytes_per_s,
        cmx_latency_s=chip.storage.latency_s if chip.storage is not None else store.cmx_latency_s,
        block_bytes=stored_block_bytes(machine, pool.engine.block_tokens, pool.engine.kv_format_stored),
        pool_block_bytes=block_bytes(machine, pool.engine.block_tokens),
    )


def _assumptions(config: ClusterConfig, pool: PoolConfig, machine: Machine, catalog: Catalog) -> tuple[str, ...]:
    """Return the assumptions in the profiles that a pool's time, memory, price and power are computed from."""
    hardware, other = pool.hardware, machine.ffn_chip
    files = {"economics", "practice", _fetch_link(config, pool, machine).name}
    if hardware.mode is not DecodeMode.WHOLE:
        files |= {machine.chip.name} | ({machine.group_link.name} if hardware.chips * hardware.group_nodes > 1 else set())
    files |= {other.name} if other is not None else set()
    if config.store is not None:
        below = (machine.chip.host, machine.chip.storage if config.store.cmx else None)
        files |= {link.name for link in below if link is not None}
    files |= {"lpx"} if hardware.mode is DecodeMode.DRAFTER else set()
    used = _used(machine, catalog)
    return tuple(name for name in catalog.assumptions_in(frozenset(files)) if name in used or not name.endswith(_SOMETIMES))


def _used(machine: Machine, catalog: Catalog) -> set[str]:
    """Return which of the numbers that only some machines need this one does."""
    hardware, attention, routed = machine.hardware, machine.attention, machine.routed
    sides = (attention, machine.ffn)
    used = {catalog.efficiency_name(side.chip.name, side.activations, "matmul") for side in sides}
    used |= {f"{side.chip.name}.{side.activations.value}_flops" for side in sides}
    # Only a node's own chips decide by which network they are joined.
    used |= {f"{attention.chip.name}.{hardware.kv.value}_flops", f"{machine.chip.name}.domain_chips"}
    if machine.shape.experts:
        used.add(catalog.efficiency_name(routed.chip.name, routed.activations, "expert"))
    if hardware.draft_tokens and hardware.acceptance is None:
        used.add(acceptance_name(hardware.mode))
    return used | ({"lpx.draft_parameters", "lpx.draft_layers"} if hardware.mode is DecodeMode.DRAFTER else set())
