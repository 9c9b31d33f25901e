"""What crosses between an attention rank and an FFN rank: lanes of rows and picks one way, of sums the other.

A lane is memory for one message and its answer. An attention rank has some for each FFN rank, one for each micro-batch that can
be under way. Ranks of one host share that memory (`shared.py`); between hosts each end has its own, and what is filled of it is
sent (`network.py`). Layout of a lane, each part from a multiple of 64 bytes on:

    rows      [rows, hidden]   the model's dtype: normalised inputs
    weights   [rows, picks]    float32
    picks     [rows, picks]    int64: slots of the rank's experts; too high a number is another rank's pick
    sums      [rows, hidden]   float32: what the rank's part of the FFN makes of the rows
"""

import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from orchestrator.core.config import MICROBATCHES_MAX
from orchestrator.profiles.model_config import Architecture
from workers.engines.base import EngineLost

ALIGNMENT = 64
#: Rows of one lane at most: no step of a node has as many.
ROWS_MAX = 1 << 16


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

    def done(self, busy_ns: int) -> "Header":
        """Return what is said of the lane once its sums are there."""
        return Header(self.lane, self.layer, self.version, self.rows, busy_ns)

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


class Link(Protocol):
    """An attention rank's end: lanes to one FFN rank, wherever that is. `post` and `wait` raise `RankLost`."""

    @property
    def crosses_network(self) -> bool:
        """Whether the rank is on another host."""
        ...

    def take(self) -> tuple[int, Lane]:
        """Return a lane that is free, to be filled: at most as many are under way as there are."""
        ...

    def post(self, header: Header) -> None:
        """Say that a lane is filled."""
        ...

    def wait(self) -> tuple[Header, Lane]:
        """Wait for the answer to the oldest message; its lane is good until `give`."""
        ...

    def give(self, number: int) -> None:
        """Have a lane back."""
        ...

    def close(self) -> None:
        """Let go of the connection and the memory."""
        ...


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
        name = str(self.dtype).removeprefix("torch.")
        return {"hidden": self.hidden, "picks": self.picks, "dtype": name, "bytes": sys.byteorder}

    @property
    def said(self) -> dict[str, int | str]:
        """What an attention rank says of its lanes when it connects."""
        return {"lanes": self.lanes, "rows_max": self.rows_max, **self.row}

    def agreed(self, said: Mapping[str, Any]) -> "LaneLayout":
        """Return the lanes of an attention rank that connects to a rank whose rows are laid out like these.

        Raises:
            ValueError: they are laid out otherwise, or there are too many, or none.
        """
        theirs = {name: said.get(name) for name in self.row}
        if theirs != self.row:
            raise ValueError(f"its rows are {theirs}, here they are {self.row}")
        lanes, rows_max = said.get("lanes"), said.get("rows_max")
        for name, given, most in (("lanes", lanes, MICROBATCHES_MAX), ("rows_max", rows_max, ROWS_MAX)):
            if type(given) is not int or not 1 <= given <= most:
                raise ValueError(f"{name} must be 1 to {most}")
        return LaneLayout(said["lanes"], said["rows_max"], self.hidden, self.picks, self.dtype)

    @property
    def lane_bytes(self) -> int:
        """Bytes of one lane."""
        return sum(_aligned(self.rows_max * width) for width in self._widths)

    @property
    def size(self) -> int:
        """Bytes of all lanes."""
        return self.lanes * self.lane_bytes

    def lane(self, memory: memoryview, number: int) -> Lane:
        """Return a lane that lies in memory of `size` bytes."""
        shapes = ((self.hidden, self.dtype), (self.picks, torch.float32), (self.picks, torch.int64), (self.hidden, torch.float32))
        parts: list[Tensor] = []
        for (width, dtype), (start, row_bytes) in zip(shapes, self.parts(number), strict=True):
            if row_bytes:
                flat = torch.frombuffer(memory, dtype=dtype, count=self.rows_max * width, offset=start)
            else:
                flat = torch.empty(0, dtype=dtype)
            parts.append(flat.view(self.rows_max, width))
        return Lane(*parts)

    def parts(self, number: int) -> list[tuple[int, int]]:
        """Return of each part of a lane where it begins and the bytes of one row; the last part is the sums."""
        found: list[tuple[int, int]] = []
        start = number * self.lane_bytes
        for width in self._widths:
            found.append((start, width))
            start += _aligned(self.rows_max * width)
        return found

    @property
    def _widths(self) -> tuple[int, int, int, int]:
        return self.hidden * self.dtype.itemsize, self.picks * 4, self.picks * 8, self.hidden * 4


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def layout_for(shape: Architecture, dtype: torch.dtype, lanes: int, rows_max: int) -> LaneLayout:
    """Return the lanes that a model's activations need."""
    picks = shape.experts.per_token if shape.experts is not None else 0
    return LaneLayout(lanes, rows_max, shape.hidden, picks, dtype)
