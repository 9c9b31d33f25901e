"""Grouped-query attention of one layer: queries, keys and values from normalised rows, turned, stored, attended."""

import torch
from torch import Tensor

from workers.engines.attention import attend
from workers.engines.batch import StepBatch
from workers.engines.kvpool import KvPool
from workers.engines.loader import Loader
from workers.engines.shape import NORMED_HEADS


class GroupedAttention:
    """Several query heads share a key and a value head."""

    def __init__(self, loader: Loader, prefix: str, gain: Tensor | None) -> None:
        """Load the projections named `prefix`; `gain` is what their inputs have to be multiplied by."""
        self._shape = shape = loader.shape
        self._queries_keys = shape.queries_width + shape.keys_width
        self._queries_keys_values = loader.queries_keys_values(prefix, gain)
        self._head_norm = loader.head_norm(prefix) if shape.family in NORMED_HEADS else None

    def attend(self, normed: Tensor, rotation: Tensor, batch: StepBatch, pool: KvPool, layer: int) -> Tensor:
        """Return [rows, heads x head dimension] of rows [rows, hidden]; their keys and values go into the pool."""
        shape = self._shape
        rows = self._queries_keys_values(normed, batch.adapted)
        # In float32 `turned` is a view, and rotating it in place is all there is to do.
        turned = rows[:, : self._queries_keys].float().view(batch.rows, -1, shape.head_dim)
        if self._head_norm is not None:
            self._head_norm(turned)
        torch.view_as_complex(turned.view(batch.rows, -1, shape.head_dim // 2, 2)).mul_(rotation)
        if rows.dtype != torch.float32:
            rows[:, : self._queries_keys] = turned.view(batch.rows, -1)
        keys_values = rows[: batch.tokens, shape.queries_width :].view(batch.tokens, 2 * shape.kv_heads, shape.head_dim)
        pool.write(layer, batch.write_index, keys_values)
        return attend(rows, batch, pool, layer, shape)
