"""What both halves of a group must agree in: where its FFN ranks are, where experts are at first, how large lanes are."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from orchestrator.core.experts import Placement, place_experts
from orchestrator.profiles.model_config import Architecture
from workers.engines.split.lanes import LaneLayout


@dataclass(frozen=True, slots=True)
class SplitPlaces:
    """What an attention rank is told of its group."""

    #: Of the FFN ranks, in their order.
    addresses: tuple[str, ...]
    spare_slots: int = 0
    #: 0: by measurement.
    microbatches: int = 0
    #: Seconds without an answer after which a rank is lost.
    silent_s: float = 10.0


def first_placements(shape: Architecture, ranks: int, spare_slots: int) -> Mapping[int, Placement]:
    """Return where experts are before anything was measured: spread evenly over the ranks, by layer."""
    if shape.experts is None:
        return {}
    slots = slots_of(shape.experts.count, ranks, spare_slots)
    return {layer: place_experts([0.0] * shape.experts.count, ranks, slots) for layer in shape.experts.layers}


def slots_of(experts: int, ranks: int, spare_slots: int) -> int:
    """Return the slots of a rank: what it needs, and some for copies of hot experts."""
    return -(-experts // ranks) + spare_slots


def layout_for(shape: Architecture, dtype: torch.dtype, lanes: int, rows_max: int) -> LaneLayout:
    """Return the lanes that a model's activations need."""
    picks = shape.experts.per_token if shape.experts is not None else 0
    return LaneLayout(lanes, rows_max, shape.hidden, picks, dtype)
