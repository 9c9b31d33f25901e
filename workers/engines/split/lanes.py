"""What crosses between an attention rank and an FFN rank: lanes of rows and picks one way, of sums the other.

A lane is memory for one message and its answer. An attention rank has some for each FFN rank, one for each micro-batch that can
be under way. Layout of a lane, each part from a multiple of 64 bytes on:

    rows      [rows, hidden]   the model's dtype: normalised inputs
    weights   [rows, picks]    float32
    picks     [rows, picks]    int64: slots of the rank's experts; too high a number is another rank's pick
    sums      [rows, hidden]   float32: what the rank's part of the FFN makes of the rows
"""

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.profiles.model_config import Architecture
from workers.engines.base import EngineLost

ALIGNMENT = 64


class RankLost(EngineLost):
    """A rank of the group does not answer any more: the group cannot go on."""


@dataclass(frozen=True, slots=True)
class Header:
    """What is said of a lane: which, for which layer and version of its placement, how many rows; then, how long it took."""

    lane: int
    layer: int
    version: int
    rows: int
    #: Nanoseconds that the FFN rank computed for.
    busy_ns: int = 0

    LAYOUT = struct.Struct("<IIIIQ")

    def pack(self) -> bytes:
        """Return it as bytes."""
        return self.LAYOUT.pack(self.lane, self.layer, self.version, self.rows, self.busy_ns)

    @classmethod
    def unpack(cls, data: bytes) -> "Header":
        """Return what `pack` packed. Raises `RankLost` for anything else."""
        if len(data) != cls.LAYOUT.size:
            raise RankLost(f"a message of {len(data)} bytes came instead of one of {cls.LAYOUT.size}")
        return cls(*cls.LAYOUT.unpack(data))


@dataclass(frozen=True, slots=True)
class Lane:
    """One lane's memory as tensors."""

    rows: Tensor
    weights: Tensor
    picks: Tensor
    sums: Tensor


@dataclass(frozen=True, slots=True)
class LaneLayout:
    """How large lanes are."""

    lanes: int
    rows_max: int
    hidden: int
    #: Experts a token picks; 0 for a model without any.
    picks: int
    dtype: torch.dtype

    @property
    def row(self) -> dict[str, int | str]:
        """What both ranks must agree in."""
        return {"hidden": self.hidden, "picks": self.picks, "dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def lane_bytes(self) -> int:
        """Bytes of one lane."""
        return sum(_aligned(size) for size in self._sizes())

    @property
    def size(self) -> int:
        """Bytes of all lanes."""
        return self.lanes * self.lane_bytes

    def lane(self, memory: memoryview, number: int) -> Lane:
        """Return a lane that lies in memory of `size` bytes."""
        shapes = ((self.hidden, self.dtype), (self.picks, torch.float32), (self.picks, torch.int64), (self.hidden, torch.float32))
        parts: list[Tensor] = []
        start = number * self.lane_bytes
        for (width, dtype), size in zip(shapes, self._sizes(), strict=True):
            if size:
                flat = torch.frombuffer(memory, dtype=dtype, count=self.rows_max * width, offset=start)
            else:
                flat = torch.empty(0, dtype=dtype)
            parts.append(flat.view(self.rows_max, width))
            start += _aligned(size)
        return Lane(*parts)

    def _sizes(self) -> tuple[int, int, int, int]:
        rows = self.rows_max
        return rows * self.hidden * self.dtype.itemsize, rows * self.picks * 4, rows * self.picks * 8, rows * self.hidden * 4


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def layout_for(shape: Architecture, dtype: torch.dtype, lanes: int, rows_max: int) -> LaneLayout:
    """Return the lanes that a model's activations need."""
    picks = shape.experts.per_token if shape.experts is not None else 0
    return LaneLayout(lanes, rows_max, shape.hidden, picks, dtype)
