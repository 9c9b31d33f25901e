"""How much of a node's memory the weights take, and how many KV blocks fit into the rest."""

from math import ceil

from orchestrator.core.config import DecodeMode, KvFormat, Precision, require
from orchestrator.core.cost.machines import BYTES, Chip, Machine


def block_bytes(machine: Machine, block_tokens: int) -> int:
    """Return the bytes of one block's KV, held once."""
    return round(machine.kv_token_bytes * block_tokens)


def stored_block_bytes(machine: Machine, block_tokens: int, stored: KvFormat) -> int:
    """Return the bytes of one block's KV in a host's store: never more than in a node's memory."""
    each = BYTES[machine.hardware.kv]
    share = 1.0 if stored is KvFormat.PLAIN else min(1.0, BYTES[Precision(stored.value)] / each)
    return round(machine.kv_token_bytes * block_tokens * share)


def kv_blocks(machine: Machine, block_tokens: int, sequences_max: int, memory_fraction: float) -> int:
    """Return how many blocks a node holds. Raises `ConfigError` if the weights leave no room, saying how much is missing."""
    whole = machine.hardware.mode is DecodeMode.WHOLE
    if machine.hardware.mode in (DecodeMode.AFD, DecodeMode.WHOLE):
        _check_other_half(machine, memory_fraction)
    # In whole decode a node's share of the other half's chips holds its KV; elsewhere each of its own chips does.
    chip = machine.attention.chip
    shards = machine.kv_shards
    chips = shards if whole else 1
    weights = _other_half_bytes(machine) / machine.hardware.group_nodes if whole else chip_weights_bytes(machine)
    reserve = 0.0 if whole else machine.practice.reserve_bytes
    shape = machine.shape
    window_bytes = shape.windowed_layers * shape.window_tokens * shape.layer_kv_elements * BYTES[machine.hardware.kv]
    windows = sequences_max * window_bytes / (1 if whole else shards)
    free = chips * chip.memory_bytes * memory_fraction - weights - reserve - windows
    size = block_bytes(machine, block_tokens) / (1 if whole else shards)
    problem = f"{shape.name} leaves no room for KV on {chip.name}: {_gb(size - free)} too much for each {_unit(whole)}"
    require(free >= size, "hardware.group_nodes", f"{problem}; {_advice(machine, chip, memory_fraction, whole)}")
    return int(free / size)


def chip_weights_bytes(machine: Machine) -> float:
    """Return the bytes of weights on one of a node's own chips: its part of the node's copy and of the group's experts."""
    shape, hardware = machine.shape, machine.hardware
    each = BYTES[hardware.weights]
    copied = shape.layers * shape.attention_parameters * each
    if hardware.mode is not DecodeMode.AFD:
        copied += (shape.dense_layers * shape.dense_parameters + shape.expert_layers * shape.shared_parameters) * each
    copied += shape.head_parameters * (1 if shape.tied_embeddings else 2) * BYTES[Precision.BF16]
    spread = 0.0
    if hardware.mode is not DecodeMode.AFD:
        spread = shape.expert_layers * shape.experts * machine.expert_copies * shape.expert_parameters * each
    return copied / hardware.chips + spread / (hardware.chips * hardware.group_nodes)


def _other_half_bytes(machine: Machine) -> float:
    """Return the bytes of weights on all chips of the other half together."""
    shape, each = machine.shape, BYTES[machine.hardware.ffn_weights]
    ffn = shape.dense_layers * shape.dense_parameters + shape.expert_layers * shape.shared_parameters
    ffn += shape.expert_layers * shape.experts * machine.expert_copies * shape.expert_parameters
    if machine.hardware.mode is DecodeMode.AFD:
        return ffn * each
    head = shape.head_parameters * (1 if shape.tied_embeddings else 2) * BYTES[Precision.BF16]
    return (ffn + shape.layers * shape.attention_parameters) * each + head


def _check_other_half(machine: Machine, memory_fraction: float) -> None:
    """Raise `ConfigError` unless the weights that the other half holds fit there."""
    chip, chips = machine.ffn.chip, machine.hardware.ffn_chips
    needed, usable = _other_half_bytes(machine), chips * chip.memory_bytes * memory_fraction
    enough = ceil(needed / (chip.memory_bytes * memory_fraction))
    problem = f"{chips} {chip.name} hold {_gb(usable)} of {machine.shape.name}'s {_gb(needed)}; {enough} would"
    require(needed <= usable, "hardware.ffn_chips", problem)


def _advice(machine: Machine, chip: Chip, memory_fraction: float, whole: bool) -> str:
    """Return what would fit: more nodes that share the experts, or more chips for each node."""
    shape, hardware = machine.shape, machine.hardware
    if whole:
        return "more ffn_chips or fewer group_nodes would fit"
    usable = chip.memory_bytes * memory_fraction - machine.practice.reserve_bytes
    experts = shape.expert_layers * shape.experts * shape.expert_parameters * BYTES[hardware.weights]
    copied = chip_weights_bytes(machine) - experts / (hardware.chips * hardware.group_nodes)
    if hardware.mode is DecodeMode.AFD or copied >= usable or not experts:
        return f"{max(hardware.chips + 1, ceil(chip_weights_bytes(machine) * hardware.chips / usable))} chips a node would fit"
    nodes = int(experts / ((usable - copied) * hardware.chips)) + 1
    return f"{max(hardware.group_nodes + 1, nodes)} group_nodes would fit"


def _unit(whole: bool) -> str:
    return "node" if whole else "chip"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
