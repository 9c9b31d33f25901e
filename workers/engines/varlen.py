"""Decode attention on CUDA devices by PyTorch's flash attention, which reads the KV pool in place through block tables.

What it takes (dtypes, head dimensions, tokens of a block) depends on the device and on PyTorch's version, so it is asked once, at
start, with a few made-up sequences whose answer is known.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.engines.decodes import DecodeSequence
from workers.engines.kvpool import KvPool

#: Rows of one sequence in a step up to which this is for it.
ROWS_MAX = 16
#: `torch.nn.attention.varlen.varlen_attn`, or what does the same.
Attend = Callable[..., Tensor]


def varlen_attention() -> Attend | None:
    """Return PyTorch's, if it is new enough to take block tables."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    return module.varlen_attn if "block_table" in module.varlen_attn.__doc__ else None


class VarlenDecodes:
    """A step's decodes as one batch of sequences of unequal lengths."""

    __slots__ = ("_arguments", "_attend", "_pool", "_rows")

    def __init__(self, pool: KvPool, attend: Attend, rows: int, arguments: dict[str, Any]) -> None:
        self._pool = pool
        self._attend = attend
        self._rows = rows
        self._arguments = arguments

    def attend(self, queries: Tensor, attended: Tensor, layer: int, scale: float) -> None:
        """See `Decodes.attend`."""
        heads, head_dim = attended.shape[1], self._pool.slab.head_dim
        mine = queries[: self._rows, : heads * head_dim].view(self._rows, heads, head_dim)
        keys, values = self._pool.in_place(layer)
        attended[: self._rows] = self._attend(mine, keys, values, scale=scale, **self._arguments)


class VarlenWay:
    """Block tables for PyTorch's flash attention."""

    rows_max = ROWS_MAX

    def __init__(self, pool: KvPool, device: torch.device, attend: Attend) -> None:
        self._pool = pool
        self._device = device
        self._attend = attend

    def plan(self, sequences: Sequence[DecodeSequence]) -> VarlenDecodes:
        """See `DecodeWay.plan`."""
        size = self._pool.block_tokens
        counts = [-(-sequence.context // size) for sequence in sequences]
        tables = np.zeros((len(sequences), max(counts)), dtype=np.int32)
        for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            tables[row, :count] = sequence.table[:count]
        ends = np.cumsum([0, *(sequence.count for sequence in sequences)])
        contexts = [sequence.context for sequence in sequences]
        arguments = {
            "cu_seq_q": self._to_device(ends),
            "cu_seq_k": None,
            "max_q": max(sequence.count for sequence in sequences),
            "max_k": max(contexts),
            "seqused_k": self._to_device(np.array(contexts)),
            "block_table": self._to_device(tables),
            # Each row sees what is before it, the last row all: the mask's lower right corner is the last token.
            "window_size": (-1, 0),
            "enable_gqa": True,
        }
        return VarlenDecodes(self._pool, self._attend, int(ends[-1]), arguments)

    def _to_device(self, values: "np.ndarray[Any, Any]") -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(self._device, non_blocking=True)
