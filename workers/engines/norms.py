"""Root-mean-square normalisation, of rows and of the heads in them.

Normalisation is x / hypot(|x|, sqrt(n eps)), with sqrt(n) and the learnt gain in the weights that follow (float32) or in one
product (bfloat16). That is x / sqrt(mean(x^2) + eps) in fewer passes.
"""

import math

import torch
from torch import Tensor


class Norm:
    """Root-mean-square normalisation, with or without its gain."""

    __slots__ = ("_dtype", "_floor", "_gain")

    def __init__(self, width: int, epsilon: float, gain: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        self._floor = torch.tensor([math.sqrt(width * epsilon)], device=device)
        self._gain = gain
        self._dtype = dtype

    def __call__(self, rows: Tensor) -> Tensor:
        normed = rows / torch.linalg.vector_norm(rows, 2, -1, True).hypot_(self._floor)
        if self._gain is None:
            return normed
        return normed.mul_(self._gain).to(self._dtype)


class HeadNorm:
    """Normalises each query and key head in place."""

    __slots__ = ("_floor", "_gain")

    def __init__(self, gain: Tensor, floor: float) -> None:
        self._gain = gain
        self._floor = torch.tensor([floor], device=gain.device)

    def __call__(self, heads: Tensor) -> None:
        heads.div_(torch.linalg.vector_norm(heads, 2, -1, True).hypot_(self._floor)).mul_(self._gain)
