"""Stored forms of a KV block that take fewer bytes than its slab: FP8 and NVFP4, with a float32 scale for each head.

A *row* is what one head's keys, or values, of one layer are in a block: its tokens times the head dimension; of latent attention,
what the layer keeps of those tokens. A row's largest magnitude sets its scale: a head with outliers costs no other head its
digits, and a block can be read by itself. A block's bytes, rows in the slab's order ([layer] [keys, values] [KV head]):

    fp8     scale (float32) of each row | E4M3 of each value
    nvfp4   tensor scale (float32) of each row | scale (E4M3) of every 16 values | E2M1 of each value, two a byte

They do not depend on the pool's dtype: what a float32 pool stored, a bfloat16 pool reads. See also `fp8.py`, `nvfp4.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.core.config import ConfigError, KvFormat
from orchestrator.core.types import BlockId
from workers.engines import fp8, nvfp4
from workers.engines.stored import Slab, row_parts

#: Values that are converted at a time: on a CPU, what stays in its caches between the steps of a conversion and is still much
#: work for each; on a device, what bounds the memory for it.
_PIECE_VALUES_CPU = 1 << 16
_PIECE_VALUES_DEVICE = 1 << 24
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows of some blocks."""

    #: Places in the list of blocks.
    places: slice
    rows: slice


class KvCodec:
    """Between slabs and one stored form.

    Args:
        stored: fp8 or nvfp4.
        slab: what blocks are in the pool.
    """

    def __init__(self, stored: KvFormat, slab: Slab) -> None:
        self._rows = slab.rows
        #: Bytes of a row in each part of a block, and how they are made and read.
        self._parts = row_parts(stored, slab.row_values)
        self._encode: Callable[[Tensor], tuple[Tensor, ...]]
        self._decode: Callable[..., Tensor]
        match stored:
            case KvFormat.FP8:
                self._encode, self._decode = _encode_fp8, _decode_fp8
            case KvFormat.NVFP4:
                self._encode, self._decode = _encode_nvfp4, _decode_nvfp4
            case KvFormat.PLAIN:
                raise AssertionError("a slab is its own plain form")

    def encode(self, slabs: Tensor, blocks: Sequence[BlockId], into: Tensor) -> None:
        """Write blocks of `slabs` [blocks, rows, row values] into `into` (bytes [len(blocks), block_bytes]).

        Raises:
            NotEncodable: if there is a NaN or an infinity.
        """
        for piece in self._pieces(len(blocks), slabs):
            values = _chosen(slabs, blocks[piece.places])[:, piece.rows]
            for part, made in zip(self._places(into, piece), self._encode(values), strict=True):
                part.copy_(made)

    def decode(self, data: Tensor, slabs: Tensor, blocks: Sequence[BlockId]) -> None:
        """Fill blocks of `slabs` from `data` (bytes [len(blocks), block_bytes])."""
        for piece in self._pieces(len(blocks), slabs):
            values = self._decode(*self._places(data, piece))
            chosen = blocks[piece.places]
            if len(chosen) == 1 or slabs.device.type == "cpu":  # there one copy with an index takes longer than many without
                for block, rows in zip(chosen, values, strict=True):
                    slabs[block, piece.rows].copy_(rows)
            else:
                slabs.index_copy_(0, _index(chosen, slabs.device), values.to(slabs.dtype))

    def _pieces(self, blocks: int, slabs: Tensor) -> Iterator[_Piece]:
        """Cut blocks into pieces: rows of one block, or several whole blocks."""
        values = _PIECE_VALUES_CPU if slabs.device.type == "cpu" else _PIECE_VALUES_DEVICE
        most = max(1, values // slabs.shape[2])
        if most < self._rows:
            for place in range(blocks):
                for row in range(0, self._rows, most):
                    yield _Piece(slice(place, place + 1), slice(row, min(row + most, self._rows)))
        else:
            for place in range(0, blocks, most // self._rows):
                yield _Piece(slice(place, place + most // self._rows), slice(0, self._rows))

    def _places(self, data: Tensor, piece: _Piece) -> Iterator[Tensor]:
        """Return where the piece's rows are in each part: bytes [blocks, rows, bytes of a row]."""
        first = 0
        for size in self._parts:
            yield data[piece.places, first + piece.rows.start * size : first + piece.rows.stop * size].unflatten(1, (-1, size))
            first += self._rows * size


def check_format(stored: KvFormat, slab: Slab) -> None:
    """Raise `ConfigError` if a model's blocks have no such form."""
    if stored is KvFormat.NVFP4 and slab.head_dim % nvfp4.GROUP:
        width = "width of latents" if slab.latent else "head dimension"
        problem = f"nvfp4 needs a {width} that is a multiple of {nvfp4.GROUP}, the model's is {slab.head_dim}"
        raise ConfigError("engine.kv_format_stored", problem)


def _chosen(slabs: Tensor, blocks: Sequence[BlockId]) -> Tensor:
    return slabs[blocks[0]].unsqueeze(0) if len(blocks) == 1 else slabs.index_select(0, _index(blocks, slabs.device))


def _index(blocks: Sequence[BlockId], device: torch.device) -> Tensor:
    return torch.tensor(blocks, dtype=torch.int64, device=device)


def _encode_fp8(values: Tensor) -> tuple[Tensor, ...]:
    codes, scales = fp8.encode(values)
    return scales.view(torch.uint8), codes


def _decode_fp8(scales: Tensor, codes: Tensor) -> Tensor:
    return fp8.decode(codes, _floats(scales))


def _encode_nvfp4(values: Tensor) -> tuple[Tensor, ...]:
    codes, scales, tensor_scales = nvfp4.encode(values)
    return tensor_scales.view(torch.uint8), scales, codes


def _decode_nvfp4(tensor_scales: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    return nvfp4.decode(codes, scales, _floats(tensor_scales))


def _floats(data: Tensor) -> Tensor:
    """Return bytes as float32; copied, since they lie anywhere."""
    return data.clone(memory_format=torch.contiguous_format).view(torch.float32)
