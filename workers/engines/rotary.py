"""Rotary position embedding: by how much each pair of a head's dimensions is turned at each position."""

import math

import torch
from torch import Tensor

from orchestrator.profiles.positions import Llama3Rope, Rope, YarnRope

#: Positions whose rotations are computed at first; doubled whenever a longer context comes.
ROTATIONS_MIN = 4096


class Rotations:
    """cos + i sin of every position's angles, computed once for as many positions as were needed so far."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self._frequencies = _frequencies(rope, head_dim).to(device)
        self._amplitude = rope.way.amplitude if isinstance(rope.way, YarnRope) else 1.0
        self._table = torch.empty(0, head_dim // 2, dtype=torch.complex64, device=device)

    def at(self, positions: Tensor, highest: int) -> Tensor:
        """Return [rows, 1, head_dim / 2] complex."""
        if highest >= len(self._table):
            count = max(ROTATIONS_MIN, 1 << highest.bit_length())
            angles = torch.arange(count, dtype=torch.float32, device=positions.device)[:, None] * self._frequencies
            self._table = torch.complex(angles.cos(), angles.sin()) * self._amplitude
        return self._table.index_select(0, positions).unsqueeze(1)


def _frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Return the angle per position of each pair of dimensions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (rope.theta**exponents)
    match rope.way:
        case None:
            return plain / rope.factor
        case YarnRope():
            low, high = _mixed_dimensions(rope.way, rope.theta, head_dim)
            pairs = torch.arange(head_dim // 2, dtype=torch.float32)
            share = ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)
            return plain / rope.factor * share + plain * (1 - share)
        case Llama3Rope(low, high, original):
            wavelengths = 2 * math.pi / plain
            smooth = (original / wavelengths - low) / (high - low)
            blended = (1 - smooth) * plain / rope.factor + smooth * plain
            stretched = torch.where(wavelengths > original / low, plain / rope.factor, plain)
            between = (wavelengths <= original / low) & (wavelengths >= original / high)
            return torch.where(between, blended, stretched)


def _mixed_dimensions(way: YarnRope, theta: float, head_dim: int) -> tuple[float, float]:
    """Return the pairs of dimensions between which YaRN mixes stretched and plain frequencies, as `transformers` has it."""

    def turning(rotations: float) -> float:
        """The pair that turns so many times over the original context."""
        return head_dim * math.log(way.original_tokens / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turning(way.beta_fast), turning(way.beta_slow)
    if way.whole:
        low, high = float(math.floor(low)), float(math.ceil(high))
    return max(low, 0.0), min(high, float(head_dim - 1))
