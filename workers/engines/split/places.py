"""Where a group's experts are at first, as both halves must have it. No torch."""

from collections.abc import Mapping

from orchestrator.core.experts import Placement, place_experts
from orchestrator.profiles.model_config import Architecture


def first_placements(shape: Architecture, ranks: int, spare_slots: int) -> Mapping[int, Placement]:
    """Return where experts are before anything was measured: spread evenly over the ranks, by layer."""
    if shape.experts is None:
        return {}
    slots = slots_of(shape.experts.count, ranks, spare_slots)
    return {layer: place_experts([0.0] * shape.experts.count, ranks, slots) for layer in shape.experts.layers}


def slots_of(experts: int, ranks: int, spare_slots: int) -> int:
    """Return the slots of a rank: what it needs, and some for copies of hot experts."""
    return -(-experts // ranks) + spare_slots
