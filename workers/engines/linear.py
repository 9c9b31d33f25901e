"""Matrix products with fixed weights, each laid out once for the device at hand.

Measured on 2 AVX-512 cores: PyTorch's own bfloat16 product reads a 1024 x 4096 weight at 5 to 12 GB/s, oneDNN's with weights
reordered beforehand at 20 to 34. In float32 the reordered form wins from about a million weights on (2.6 times at 8 rows);
below, its call overhead of 15 microseconds is more than the product. Where a processor has AMX, bfloat16 goes there (`tiled.py`).

Quantised weights are multiplied by compiled kernels where there are some (`kernels.py`), and else decoded piece by piece. On one
core, in NVFP4, a product of 1 row takes 0.28 of the time of bfloat16's, of 4 rows half, of 8 0.6; of 16 and more it is slower.
"""

import functools
import threading
import timeit
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from orchestrator.core.config import WeightFormat
from workers.engines.kernels import ROW_SCALES, UNIT, Kernels, Tiled, kernels_for, tile
from workers.engines.quantised import Matrix, QuantisedMatrix, encode
from workers.engines.tiled import TiledLinear, fits

#: float32 weights from which oneDNN's reordered form is faster than the plain product.
PACKED_WEIGHTS_MIN = 1 << 20
#: Rows that reordering assumes; the layout it picks is good from 1 to a few hundred.
PACKED_ROWS = 32
#: oneDNN's bfloat16 product of 1 row takes longer than that of 4, by half.
BFLOAT16_ROWS_MIN = 4
#: Values of a quantised weight that are decoded at a time: what stays in a core's cache; what bounds a device's memory for it.
PIECE_VALUES_CPU = 1 << 18
PIECE_VALUES_DEVICE = 1 << 24
#: Bytes of a quantised weight's decoded piece on a CPU: half of a core's second cache.
PIECE_BYTES_CPU = 1 << 20
#: What kernels are measured with to find out how many rows they are faster for: a weight, rows, and how often each.
_MEASURED = (256, 2048)
_MEASURED_ROWS = (16, 32, 64, 128, 256, 512)
_MEASURED_TIMES = 5
_OWN = threading.local()


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


class CompiledLinear:
    """The product with a quantised weight by compiled kernels: few rows meet the codes themselves, many a decoded piece."""

    __slots__ = ("_bias", "_direct_rows_max", "_dtype", "_kernels", "_outputs", "_tiles", "_weight")

    def __init__(self, weight: QuantisedMatrix, bias: Tensor | None, dtype: torch.dtype, kernels: Kernels) -> None:
        self._weight = tile(weight, kernels.lanes)
        self._outputs = weight.shape[0]
        self._bias = bias
        self._dtype = dtype
        self._kernels = kernels
        self._tiles = _tiles_decoded(self._weight, dtype, kernels)
        self._direct_rows_max = direct_rows_max(weight.format, dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        result = self._product(rows).to(self._dtype)
        return result if self._bias is None else result.add_(self._bias)

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        residual = residual.add_(self._product(rows))
        return residual if self._bias is None else residual.add_(self._bias)

    def _product(self, rows: Tensor) -> Tensor:
        """Return the product without its bias: float32, or the model's dtype."""
        if len(rows) <= self._direct_rows_max:
            return self._kernels.multiply(self._weight, rows)
        return decoded_product(self._kernels, self._weight, rows, self._tiles)


def decoded_product(kernels: Kernels, weight: Tiled, rows: Tensor, tiles: int) -> Tensor:
    """Return rows times a weight in the rows' dtype, of which so many tiles are decoded at a time."""
    result = rows.new_empty(len(rows), weight.tiles * kernels.lanes)
    for first in range(0, weight.tiles, tiles):
        count = min(tiles, weight.tiles - first)
        piece = _piece(weight.units * UNIT, count * kernels.lanes, rows.dtype)
        kernels.decode(weight, first, count, piece)
        place = slice(first * kernels.lanes, (first + count) * kernels.lanes)
        result[:, place] = torch.mm(rows, piece[: weight.shape[1]])
    return result.mul_(weight.row_scales.view(-1) / ROW_SCALES)[:, : weight.shape[0]]


@functools.cache
def direct_rows_max(weight_format: WeightFormat, dtype: torch.dtype) -> int:
    """Return the rows up to which a product with the codes themselves is the faster one: measured once, in some 0.05 s."""
    kernels = kernels_for(weight_format)
    assert kernels is not None, "there are none for this processor"
    source = torch.Generator().manual_seed(0)
    weight = tile(encode(torch.randn(*_MEASURED, generator=source), weight_format), kernels.lanes)
    tiles = _tiles_decoded(weight, dtype, kernels)
    for count in _MEASURED_ROWS:
        rows = torch.randn(count, _MEASURED[1], generator=source).to(dtype)
        ways = (partial(kernels.multiply, weight, rows), partial(decoded_product, kernels, weight, rows, tiles))
        direct_s, decoded_s = (min(timeit.repeat(way, number=1, repeat=_MEASURED_TIMES)) for way in ways)
        if decoded_s < direct_s:
            return count // 2
    return _MEASURED_ROWS[-1]


def _piece(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return memory for a decoded piece: the same every time, a thread's own, so that it stays in its core's cache."""
    size = rows * columns * dtype.itemsize
    if getattr(_OWN, "memory", None) is None or len(_OWN.memory) < size:
        _OWN.memory = torch.empty(max(size, PIECE_BYTES_CPU), dtype=torch.uint8)
    return _OWN.memory[:size].view(dtype).view(rows, columns)


def _tiles_decoded(weight: Tiled, dtype: torch.dtype, kernels: Kernels) -> int:
    return max(1, PIECE_BYTES_CPU // (dtype.itemsize * kernels.lanes * weight.units * UNIT))


def make_linear(weight: Matrix, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Linear:
    """Return the fastest form of an [out, in] weight, float32 or quantised, for the device and dtype it will run in."""
    bias = None if bias is None else bias.to(device, dtype)
    if isinstance(weight, QuantisedMatrix):
        kernels = kernels_for(weight.format) if device.type == "cpu" else None
        if kernels is not None:
            return CompiledLinear(weight, bias, dtype, kernels)
        return DecodingLinear(weight.to(device), bias, dtype)
    weight = weight.to(device, dtype)
    if fits(weight):
        return TiledLinear(weight, bias)
    if _packs(weight):
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


def rows_min(dtype: torch.dtype, device: torch.device, quantised: bool = False) -> int:
    """Return the rows below which a batch is better filled up with unused ones."""
    return BFLOAT16_ROWS_MIN if device.type == "cpu" and dtype == torch.bfloat16 and not quantised else 1


def _packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.numel() >= PACKED_WEIGHTS_MIN
