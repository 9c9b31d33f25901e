"""Attention of a step's rows over the paged KV pool: decodes in groups by batched products, prompt chunks one by one."""

import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.profiles.model_config import Architecture
from workers.engines.batch import DecodeGroup, PromptChunk, StepBatch
from workers.engines.kvpool import KvPool

#: Entries of the mask of one piece of a prompt chunk: chunks after a long context are attended in pieces of so many rows.
MASK_ENTRIES_MAX = 1 << 24


def attend(rows: Tensor, batch: StepBatch, pool: KvPool, layer: int, shape: Architecture) -> Tensor:
    """Return [rows, heads x head dimension]; `rows` holds queries, keys and values side by side, rotated and stored."""
    if len(batch.decodes) == 1 and batch.decodes[0].count == batch.rows:
        return _decode(rows, batch.decodes[0], pool, layer, shape)
    attended = rows.new_zeros(batch.rows, shape.queries_width)
    for group in batch.decodes:
        attended[group.first_row : group.first_row + group.count] = _decode(rows, group, pool, layer, shape)
    for chunk in batch.chunks:
        _attend_chunk(rows[chunk.first_row : chunk.first_row + chunk.count], chunk, pool, layer, shape, attended)
    return attended


def _decode(rows: Tensor, group: DecodeGroup, pool: KvPool, layer: int, shape: Architecture) -> Tensor:
    """Attend one query token of each sequence of a group: [count, heads x head dimension].

    The query heads that share a KV head are the rows of one small matrix, so keys and values are never repeated.
    """
    queries = rows[group.first_row : group.first_row + group.count, : shape.queries_width]
    queries = queries.reshape(group.count * shape.kv_heads, -1, shape.head_dim)
    keys, values = pool.read(layer, group.index, group.count)[:, :, : group.context]
    scale = shape.head_dim**-0.5
    if group.mask is None:
        scores = torch.bmm(queries * scale, keys.transpose(1, 2))
    else:
        scores = torch.baddbmm(group.mask, queries, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), values).view(group.count, -1)


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
