"""Matrix products with fixed weights, each laid out once for the device at hand.

Measured on 2 AVX-512 cores: PyTorch's own bfloat16 product reads a 1024 x 4096 weight at 5 to 12 GB/s, oneDNN's with weights
reordered beforehand at 20 to 34. In float32 the reordered form wins from about a million weights on (2.6 times at 8 rows);
below, its call overhead of 15 microseconds is more than the product.
"""

from typing import Protocol

import torch
from torch import Tensor

#: float32 weights from which oneDNN's reordered form is faster than the plain product.
PACKED_WEIGHTS_MIN = 1 << 20
#: Rows that reordering assumes; the layout it picks is good from 1 to a few hundred.
PACKED_ROWS = 32
#: oneDNN's bfloat16 product of 1 row takes longer than that of 4, by half.
BFLOAT16_ROWS_MIN = 4


class Linear(Protocol):
    """y = x W^T + b for a fixed W."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Return [rows, out] for [rows, in]."""
        ...

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        """Return residual + y, which may be `residual` itself, changed."""
        ...


class PlainLinear:
    """PyTorch's own matrix product, weights transposed."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.t().contiguous()
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        if self._bias is None:
            return torch.mm(rows, self._weight)
        return torch.addmm(self._bias, rows, self._weight)

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        if self._bias is None and residual.dtype == rows.dtype:
            return torch.addmm(residual, rows, self._weight)
        return residual.add_(self(rows))


class PackedLinear:
    """oneDNN's product, weights reordered for the CPU at hand."""

    __slots__ = ("_bias", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        return residual.add_(self(rows))


def make_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Linear:
    """Return the fastest form of a float32 [out, in] weight for the device and dtype it will run in."""
    weight = weight.to(device, dtype)
    bias = None if bias is None else bias.to(device, dtype)
    if _packs(weight):
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


def rows_min(dtype: torch.dtype, device: torch.device) -> int:
    """Return the rows below which a batch is better filled up with unused ones."""
    return BFLOAT16_ROWS_MIN if device.type == "cpu" and dtype == torch.bfloat16 else 1


def _packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.numel() >= PACKED_WEIGHTS_MIN
