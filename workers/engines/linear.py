"""Matrix products with fixed weights, each laid out once for the device at hand.

Measured on 2 AVX-512 cores: PyTorch's own bfloat16 product reads a 1024 x 4096 weight at 5 to 12 GB/s, oneDNN's with weights
reordered beforehand at 20 to 34. In float32 the reordered form wins from about a million weights on (2.6 times at 8 rows);
below, its call overhead of 15 microseconds is more than the product.
"""

from typing import Protocol

import torch
from torch import Tensor

from workers.engines.quantised import Matrix, QuantisedMatrix

#: float32 weights from which oneDNN's reordered form is faster than the plain product.
PACKED_WEIGHTS_MIN = 1 << 20
#: Rows that reordering assumes; the layout it picks is good from 1 to a few hundred.
PACKED_ROWS = 32
#: oneDNN's bfloat16 product of 1 row takes longer than that of 4, by half.
BFLOAT16_ROWS_MIN = 4
#: Values of a quantised weight that are decoded at a time: what stays in a core's cache; what bounds a device's memory for it.
PIECE_VALUES_CPU = 1 << 18
PIECE_VALUES_DEVICE = 1 << 24


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


class DecodingLinear:
    """The product with a quantised weight that is decoded for each call, a piece that caches hold at a time."""

    __slots__ = ("_bias", "_dtype", "_outputs", "_pieces")

    def __init__(self, weight: QuantisedMatrix, bias: Tensor | None, dtype: torch.dtype) -> None:
        values = PIECE_VALUES_CPU if weight.codes.device.type == "cpu" else PIECE_VALUES_DEVICE
        self._outputs, columns = weight.shape
        rows = max(1, values // columns)
        self._pieces = [(first, weight[first : first + rows]) for first in range(0, self._outputs, rows)]
        self._bias = bias
        self._dtype = dtype

    def __call__(self, rows: Tensor) -> Tensor:
        result = rows.new_empty(len(rows), self._outputs)
        for first, piece in self._pieces:
            result[:, first : first + piece.shape[0]] = torch.mm(rows, piece.decode().to(self._dtype).t())
        return result if self._bias is None else result.add_(self._bias)

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        return residual.add_(self(rows))


def make_linear(weight: Matrix, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Linear:
    """Return the fastest form of an [out, in] weight, float32 or quantised, for the device and dtype it will run in."""
    bias = None if bias is None else bias.to(device, dtype)
    if isinstance(weight, QuantisedMatrix):
        return DecodingLinear(weight.to(device), bias, dtype)
    weight = weight.to(device, dtype)
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
