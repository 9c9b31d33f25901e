"""Products of bfloat16 rows with fixed weights by AMX: weights are read from memory once, one after the other, as they lie.

A weight lies in *groups* of 64 outputs, of which a thread computes one at a time. Of a group there are, for every 32 inputs, four
tiles of [pairs of inputs, 16 outputs, 2]. Up to 16 rows meet four tiles at a time, more rows two, 32 of them at a time.

Measured on one core of a busy machine, 9,728 x 896 weights, not in caches: 1 to 32 rows in 0.8 to 0.6 of the time of oneDNN's
product with weights reordered beforehand, 128 and 512 in 0.87.
"""

import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types  # pyright: ignore[reportPrivateImportUsage]
from numba.extending import overload
from torch import Tensor
from torch.nn import functional

from workers.engines import threads, tiles
from workers.engines.pages import own_memory
from workers.engines.threads import Kernel, compiled, pointer, take
from workers.engines.tiles import to_bfloat16

#: Outputs of a group.
GROUP = 64
_TILES = GROUP // tiles.ROWS
#: Bytes of a group for 32 inputs.
_STEP_BYTES = _TILES * tiles.TILE_BYTES
#: Bytes of weights that are asked for before they are needed.
AHEAD = 8192
#: What a kernel is told: addresses and numbers; first the counter of groups that are taken.
RECORD = np.dtype([(name, np.int64) for name in ("next", "rows", "count", "weights", "groups", "depths", "result")])


class TiledLinear:
    """See `linear.Linear`."""

    __slots__ = ("_bias", "_shape", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Lay out a bfloat16 [out, in] weight that `fits`."""
        self._shape = outputs, inputs = weight.shape
        places = weight.view(outputs // GROUP, _TILES, tiles.ROWS, inputs // tiles.DEPTH, tiles.DEPTH // 2, 2)
        self._weight = torch.frombuffer(own_memory(weight.numel() * weight.itemsize), dtype=torch.bfloat16)
        self._weight.view(outputs // GROUP, inputs // tiles.DEPTH, _TILES, tiles.DEPTH // 2, tiles.ROWS, 2).copy_(
            places.permute(0, 3, 1, 4, 2, 5)
        )
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        result = rows.new_empty(len(rows), self._shape[0])
        self._run(rows, result)
        return result if self._bias is None else result.add_(self._bias)

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        if residual.dtype != torch.float32 or not residual.is_contiguous():
            return residual.add_(self(rows))
        self._run(rows, residual)
        return residual if self._bias is None else residual.add_(self._bias)

    def _run(self, rows: Tensor, result: Tensor) -> None:
        """Write products without their bias into bfloat16 rows, or add them to float32 ones."""
        outputs, inputs = self._shape
        filled = functional.pad(rows, (0, 0, 0, -len(rows) % tiles.ROWS)).contiguous()
        pointers = filled.data_ptr(), len(rows), self._weight.data_ptr()
        record = np.array([(0, *pointers, outputs // GROUP, inputs // tiles.DEPTH, result.data_ptr())], dtype=RECORD)
        _kernel(result.dtype == torch.float32).run(record, min(torch.get_num_threads(), outputs // GROUP))


def fits(weight: Tensor) -> bool:
    """Whether a weight can be laid out so, and multiplied with here."""
    outputs, inputs = weight.shape
    sizes = outputs % GROUP == 0 and inputs % tiles.DEPTH == 0
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and sizes and tiles.usable()


@cache
def _kernel(adding: bool) -> Kernel:
    sources = zlib.crc32(b"".join(Path(str(module.__file__)).read_bytes() for module in (threads, tiles)))
    return compiled(_entry(np.float32 if adding else np.uint16, sources))


def _entry(dtype: Any, sources: int) -> Callable[[int], None]:
    """Return what is compiled. Numba's cache sees when this file changes; of others it sees what the function closes over."""

    def entry(address: int) -> None:
        _work(address, dtype, sources)

    return entry


@njit(error_model="numpy")
def _work(address, dtype, _sources):
    """Take groups until there are none."""
    known = carray(pointer(address), 1, RECORD)[0]  # pyright: ignore[reportCallIssue]
    result = carray(pointer(known.result), (known.count, known.groups, GROUP), dtype)
    products = np.empty((2 * tiles.ROWS, GROUP), np.float32)
    depths, stride, into = known.depths, known.depths * tiles.ROW_BYTES, products.ctypes.data
    tiles.begin()
    while True:
        group = take(address)
        if group >= known.groups:
            break
        weights = known.weights + group * depths * _STEP_BYTES
        for row in range(0, known.count, 2 * tiles.ROWS):
            rows, right = known.rows + row * stride, weights + 2 * tiles.TILE_BYTES
            if row + tiles.ROWS >= known.count and row == 0:
                tiles.multiply(1, 4, AHEAD, rows, stride, weights, _STEP_BYTES, depths, into)
            elif row + tiles.ROWS >= known.count:
                tiles.multiply(1, 4, 0, rows, stride, weights, _STEP_BYTES, depths, into)
            else:
                if row == 0:
                    tiles.multiply(2, 2, AHEAD, rows, stride, weights, _STEP_BYTES, depths, into)
                else:
                    tiles.multiply(2, 2, 0, rows, stride, weights, _STEP_BYTES, depths, into)
                tiles.multiply(2, 2, 0, rows, stride, right, _STEP_BYTES, depths, into + 2 * tiles.ROW_BYTES)
            for place in range(min(2 * tiles.ROWS, known.count - row)):
                _finish(products[place], result[row + place, group])
    tiles.end()


def _finish(products, result):
    """Add products to float32 results, or make bfloat16 ones of them."""


@overload(_finish)
def _finish_of(products, result):
    if result.dtype == types.uint16:
        return _finish_narrow
    return _finish_wide


def _finish_narrow(products, result):
    for place in range(GROUP):
        result[place] = to_bfloat16(products[place])


def _finish_wide(products, result):
    for place in range(GROUP):
        result[place] += products[place]
