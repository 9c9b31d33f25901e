"""The paged KV memory of one engine: blocks, and where in them a token's keys and values lie.

A block's slab, smallest stride last:

    [layer] [keys, values] [KV head] [token in block] [head dimension]
    [layer] [token in block] [latent, rotated key]                       latent attention

so that a slab is one contiguous copy, and all of a head's keys in a block are one contiguous matrix: gathering a sequence's
blocks gives [KV head, token, dimension] matrices that batched products read without another copy.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.core.config import KvFormat
from orchestrator.core.types import BlockId
from workers.engines.kvformats import KvCodec, check_format
from workers.engines.pages import own_memory
from workers.engines.stored import Slab, form_of


class KvPool:
    """`blocks` slabs on one device; raises `ConfigError` if they have no such stored form."""

    def __init__(
        self,
        blocks: int,
        slab: Slab,
        device: torch.device,
        allocate: Callable[[int], memoryview] | None,
        stored: KvFormat = KvFormat.PLAIN,
    ) -> None:
        check_format(stored, slab)
        self.slab = slab
        self.block_tokens = slab.block_tokens
        self.block_bytes = slab.bytes
        #: The pool's bytes where they are in host memory.
        self.memory: memoryview | None = None
        size = blocks * self.block_bytes
        if device.type == "cpu":
            self.memory = (allocate or own_memory)(size).cast("B")
            self.slabs = torch.frombuffer(self.memory, dtype=torch.uint8)[:size].view(blocks, self.block_bytes)
        else:
            self.slabs = torch.zeros(blocks, self.block_bytes, dtype=torch.uint8, device=device)
        typed = self.slabs.view(getattr(torch, slab.dtype))
        token_rows, head_rows = typed.view(-1, slab.head_dim), typed.view(-1, slab.row_values)
        # One view a layer, shifted by the layer's place in a slab, so that one step's indexes serve all layers.
        self._token_rows = [token_rows[layer * slab.layer_rows * slab.block_tokens :] for layer in range(slab.layers)]
        self._head_rows = [head_rows[layer * slab.layer_rows :] for layer in range(slab.layers)]
        self._kinds = slab.layer_rows // slab.kv_heads
        heads = np.arange(slab.layer_rows, dtype=np.int64)
        self._token_offsets = heads * slab.block_tokens
        self._head_offsets = heads.reshape(self._kinds, 1, slab.kv_heads, 1)
        #: A slab's rows: what one head's keys or values of one layer are in it.
        self._rows = typed.view(blocks, slab.rows, slab.row_values)
        self._codec = None if stored is KvFormat.PLAIN else KvCodec(stored, slab)
        form = form_of(stored, slab)
        self.stored_bytes, self.stored_layout = form.block_bytes, form.layout

    def write_index(self, blocks: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index for `write` [tokens, rows of a layer]: token i goes to place `offsets[i]` of block `blocks[i]`."""
        first = blocks * (self.slab.rows * self.block_tokens) + offsets
        return first[:, None] + self._token_offsets

    def read_index(self, tables: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index for `read` of sequences' block tables [sequences, blocks each]. Flat."""
        return (tables[None, :, None, :] * self.slab.rows + self._head_offsets).reshape(-1)

    def write(self, layer: int, index: Tensor, kept: Tensor) -> None:
        """Store tokens' keys and values, or latents: [tokens, rows of a layer, head dimension]."""
        self._token_rows[layer].index_put_((index,), kept)

    def read(self, layer: int, index: Tensor, sequences: int) -> Tensor:
        """Return keys and values [2, sequences x KV heads, tokens of whole blocks, head dimension], or latents [1, ...]."""
        found = torch.index_select(self._head_rows[layer], 0, index)
        return found.view(self._kinds, sequences * self.slab.kv_heads, -1, self.slab.head_dim)

    def in_place(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return views of all keys and of all values of a layer [blocks, tokens, KV heads, head dimension]; latents twice."""
        slab = self.slab
        first = layer * slab.layer_rows
        rows = self._rows[:, first : first + slab.layer_rows].unflatten(2, (slab.block_tokens, slab.head_dim)).transpose(1, 2)
        return rows[:, :, : slab.kv_heads], rows[:, :, -slab.kv_heads :]

    def clear(self, block: int) -> None:
        """Zero a block that is about to be filled in part, so that what lies behind its last token is finite."""
        self.slabs[block].zero_()

    def read_slabs(self, blocks: Sequence[BlockId], into: memoryview) -> None:
        """Copy whole slabs, one after the other, into host memory."""
        target = torch.frombuffer(into, dtype=torch.uint8).view(len(blocks), self.block_bytes)
        index = torch.tensor(blocks, dtype=torch.int64, device=self.slabs.device)
        if self.slabs.device.type == "cpu":
            torch.index_select(self.slabs, 0, index, out=target)
            return
        _to_host(self.slabs[index], target)

    def write_slabs(self, blocks: Sequence[BlockId], data: memoryview) -> None:
        """Copy whole slabs from host memory; `data` may be read-only."""
        source = _readable(data).view(len(blocks), self.block_bytes)
        if self.slabs.device.type == "cpu":  # there one copy with an index takes five times as long as many without
            for block, slab in zip(blocks, source, strict=True):
                self.slabs[block].copy_(slab)
            return
        index = torch.tensor(blocks, dtype=torch.int64, device=self.slabs.device)
        self.slabs.index_copy_(0, index, _to_device(source, self.slabs.device))

    def encode(self, blocks: Sequence[BlockId], into: memoryview) -> None:
        """Write blocks in their stored form, one after the other, into host memory. Raises `NotEncodable`."""
        if self._codec is None:
            self.read_slabs(blocks, into)
            return
        target = torch.frombuffer(into, dtype=torch.uint8).view(len(blocks), self.stored_bytes)
        if self.slabs.device.type == "cpu":
            with _one_thread():
                self._codec.encode(self._rows, blocks, target)
            return
        made = torch.empty(target.shape, dtype=torch.uint8, device=self.slabs.device)
        self._codec.encode(self._rows, blocks, made)
        _to_host(made, target)

    def decode(self, blocks: Sequence[BlockId], data: memoryview) -> None:
        """Fill blocks from their stored form in host memory; `data` may be read-only."""
        if self._codec is None:
            self.write_slabs(blocks, data)
            return
        source = _readable(data).view(len(blocks), self.stored_bytes)
        with _one_thread():
            self._codec.decode(_to_device(source, self.slabs.device), self._rows, blocks)


class PooledBlocks:
    """The part of `base.Engine` that copies blocks, for engines whose KV lies in a `KvPool`."""

    _pool: KvPool

    @property
    def pool(self) -> memoryview | None:
        return self._pool.memory

    @torch.inference_mode()
    def read_blocks(self, blocks: Sequence[BlockId], into: memoryview) -> None:
        self._pool.read_slabs(blocks, into)

    @torch.inference_mode()
    def write_blocks(self, blocks: Sequence[BlockId], data: memoryview) -> None:
        self._pool.write_slabs(blocks, data)

    @torch.inference_mode()
    def encode_blocks(self, blocks: Sequence[BlockId], into: memoryview) -> None:
        self._pool.encode(blocks, into)

    @torch.inference_mode()
    def decode_blocks(self, blocks: Sequence[BlockId], data: memoryview) -> None:
        self._pool.decode(blocks, data)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch compute in this thread alone: blocks are moved beside steps, which need the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _readable(data: memoryview) -> Tensor:
    """Return host memory as a tensor of bytes that is only read: no copy, though `data` may not be written to."""
    flat = np.frombuffer(data, dtype=np.uint8)
    if not data.readonly:
        return torch.from_numpy(flat)
    # torch knows no memory that is only read, and warns of it. The tensor goes before `data` does: it never leaves this file.
    return torch.frombuffer((ctypes.c_ubyte * flat.nbytes).from_address(flat.ctypes.data), dtype=torch.uint8)


def _to_device(data: Tensor, device: torch.device) -> Tensor:
    return data if device.type == "cpu" else data.pin_memory().to(device)


def _to_host(data: Tensor, target: Tensor) -> None:
    staging = torch.empty(target.shape, dtype=torch.uint8, pin_memory=True)
    target.copy_(staging.copy_(data))
