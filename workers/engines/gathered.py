"""Decode attention by batched products over gathered contexts, for devices and dtypes that no kernel with block tables is for.

Every layer copies the contexts of a group of sequences out of the pool, and pads them to the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.engines.decodes import DecodeSequence
from workers.engines.kvpool import KvPool

#: Bytes of padding a group may read before another group is opened: about what one group's calls cost in time.
PADDING_BYTES_MAX = 512 * 1024
#: Bytes of keys and values that one group gathers at most; a single sequence may be longer.
GATHER_BYTES_MAX = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences that attend together, one row each."""

    first_row: int
    count: int
    #: Tokens of the longest.
    context: int
    index: Tensor
    #: 0 or -inf for each [sequence x KV head, 1, context]; None if all are `context` long.
    mask: Tensor | None


class GatheredDecodes:
    """A step's decodes in groups."""

    __slots__ = ("_pool", "groups")

    def __init__(self, pool: KvPool, groups: tuple[DecodeGroup, ...]) -> None:
        self._pool = pool
        self.groups = groups

    def attend(self, queries: Tensor, attended: Tensor, layer: int, scale: float) -> None:
        """See `Decodes.attend`."""
        for group in self.groups:
            rows = slice(group.first_row, group.first_row + group.count)
            self._attend_group(queries[rows], attended[rows], group, layer, scale)

    def _attend_group(self, queries: Tensor, attended: Tensor, group: DecodeGroup, layer: int, scale: float) -> None:
        """Attend for a group: the query heads that share a KV head are the rows of one small matrix, keys are not repeated."""
        slab, (count, heads, value_dim) = self._pool.slab, attended.shape
        queries = queries[:, : heads * slab.head_dim].reshape(count * slab.kv_heads, -1, slab.head_dim)
        stored = self._pool.read(layer, group.index, count)[:, :, : group.context]
        keys, values = stored[0], stored[-1, :, :, :value_dim]
        if group.mask is None:
            scores = torch.bmm(queries * scale, keys.transpose(1, 2))
        else:
            scores = torch.baddbmm(group.mask, queries, keys.transpose(1, 2), alpha=scale)
        attended.copy_(torch.bmm(scores.softmax(-1), values).view(attended.shape))


class GatheredWay:
    """Groups decodes so that little is padded."""

    rows_max = 1

    def __init__(self, pool: KvPool, dtype: torch.dtype, device: torch.device) -> None:
        self._pool = pool
        self._dtype = dtype
        self._device = device
        #: Bytes of one block in one layer.
        self._layer_block_bytes = pool.block_bytes // pool.slab.layers

    def plan(self, sequences: Sequence[DecodeSequence]) -> GatheredDecodes:
        """See `DecodeWay.plan`."""
        counts = [-(-sequence.context // self._pool.block_tokens) for sequence in sequences]
        groups: list[DecodeGroup] = []
        first = 0
        while first < len(sequences):
            longest, padding, end = counts[first], 0, first + 1
            while end < len(sequences):
                padding += (longest - counts[end]) * self._layer_block_bytes
                gathered = (end + 1 - first) * longest * self._layer_block_bytes
                if padding > PADDING_BYTES_MAX or gathered > GATHER_BYTES_MAX:
                    break
                end += 1
            groups.append(self._group(sequences[first:end], counts[first:end]))
            first = end
        return GatheredDecodes(self._pool, tuple(groups))

    def _group(self, members: Sequence[DecodeSequence], counts: Sequence[int]) -> DecodeGroup:
        tables = np.zeros((len(members), counts[0]), dtype=np.int64)
        for row, (member, count) in enumerate(zip(members, counts, strict=True)):
            tables[row, :count] = member.table[:count]
        lengths = np.array([member.context for member in members])
        context = int(lengths[0])
        mask = None
        if lengths[-1] < context:
            void = np.where(np.arange(context) < lengths[:, None], np.float32(0), np.float32(-np.inf))
            mask = self._to_device(np.repeat(void, self._pool.slab.kv_heads, axis=0)[:, None, :]).to(self._dtype)
        return DecodeGroup(members[0].first_row, len(members), context, self._to_device(self._pool.read_index(tables)), mask)

    def _to_device(self, values: NDArray[np.int64] | NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)
