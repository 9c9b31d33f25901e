"""Attention of a step's rows over the paged KV pool: decodes together, in the device's way, chunks of prompts one by one."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.profiles.model_config import Architecture
from workers.engines.batch import PromptChunk, StepBatch
from workers.engines.decodes import DecodeSequence, DecodeWay
from workers.engines.gathered import GatheredWay
from workers.engines.kvpool import KvPool
from workers.engines.paged import PagedWay
from workers.engines.varlen import Attend, VarlenWay, varlen_attention

#: Entries of the mask of one piece of a prompt chunk: chunks after a long context are attended in pieces of so many rows.
MASK_ENTRIES_MAX = 1 << 24


def decode_way(pool: KvPool, dtype: torch.dtype, device: torch.device, threads: int) -> DecodeWay:
    """Return the fastest way of attending for decodes that the device has: in place wherever it can."""
    if device.type == "cpu":
        return PagedWay(pool, threads)
    return accelerated_way(pool, dtype, device, varlen_attention())


def accelerated_way(pool: KvPool, dtype: torch.dtype, device: torch.device, varlen: Attend | None) -> DecodeWay:
    """Return flash attention's way if it can do here what gathering does, else gathering."""
    gathered = GatheredWay(pool, dtype, device)
    if varlen is None or pool.slab.latent:
        return gathered
    way = VarlenWay(pool, device, varlen)
    return way if _agree(way, gathered, pool, dtype, device) else gathered


def _agree(way: DecodeWay, known: DecodeWay, pool: KvPool, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a way computes what another one does, tried on the first and last blocks of a pool that nothing is in yet."""
    slab, source = pool.slab, torch.Generator(device).manual_seed(0)
    blocks = sorted({0, len(pool.slabs) - 1})
    for block in blocks:
        slabs = pool.slabs[block].view(dtype)
        slabs.copy_(torch.randn(slabs.shape, generator=source, device=device))
    last = len(blocks) * slab.block_tokens - 1
    sequences = [DecodeSequence(0, 1, last, np.array(blocks)), DecodeSequence(1, 1, last // 2, np.array(blocks))]
    queries = torch.randn(2, 2 * slab.kv_heads * slab.head_dim, generator=source, device=device).to(dtype)
    results = [queries.new_empty(2, 2 * slab.kv_heads, slab.head_dim) for _ in range(2)]
    try:
        for one, result in zip((way, known), results, strict=True):
            one.plan(sequences).attend(queries, result, slab.layers - 1, slab.head_dim**-0.5)
        return torch.allclose(results[0].float(), results[1].float(), rtol=0.05, atol=0.05)
    except RuntimeError:  # what this device, this version or this size of blocks does not have
        return False
    finally:
        for block in blocks:
            pool.clear(block)


def attend(rows: Tensor, batch: StepBatch, pool: KvPool, layer: int, shape: Architecture) -> Tensor:
    """Return [rows, heads x head dimension]; `rows` holds queries, keys and values side by side, rotated and stored."""
    attended = rows.new_empty(batch.rows, shape.queries_width)
    attended[batch.tokens :] = 0
    if batch.decodes is not None:
        batch.decodes.attend(rows, attended.view(batch.rows, shape.heads, shape.head_dim), layer, shape.head_dim**-0.5)
    for chunk in batch.chunks:
        _attend_chunk(rows[chunk.first_row : chunk.first_row + chunk.count], chunk, pool, layer, shape, attended)
    return attended


def _attend_chunk(rows: Tensor, chunk: PromptChunk, pool: KvPool, layer: int, shape: Architecture, attended: Tensor) -> None:
    """Attend a run of one sequence's tokens; writes its part of `attended`."""
    heads = rows.view(chunk.count, -1, shape.head_dim).transpose(0, 1).unsqueeze(0)
    queries = heads[:, : shape.heads]
    target = attended[chunk.first_row : chunk.first_row + chunk.count].view(chunk.count, shape.heads, shape.head_dim)
    if chunk.index is None:
        keys, values = heads[:, shape.heads :].split(shape.kv_heads, dim=1)
        result = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        target.copy_(result[0].transpose(0, 1))
        return
    context = chunk.start + chunk.count
    stored = pool.read(layer, chunk.index, 1)[:, :, :context].unsqueeze(1)
    piece = max(1, MASK_ENTRIES_MAX // context)
    for first in range(0, chunk.count, piece):
        end = min(first + piece, chunk.count)
        seen = chunk.start + end
        mask = causal_mask(chunk.start + first, end - first, seen, rows)
        result = functional.scaled_dot_product_attention(
            queries[:, :, first:end], stored[0, :, :, :seen], stored[1, :, :, :seen], attn_mask=mask, enable_gqa=True
        )
        target[first:end] = result[0].transpose(0, 1)


def causal_mask(start: int, count: int, seen: int, like: Tensor) -> Tensor:
    """Return [count, seen]: 0 where the token at start + row may look, -inf after it."""
    mask = torch.full((count, seen), -torch.inf, dtype=like.dtype, device=like.device)
    return mask.triu_(start + 1)
