"""What a model's KV blocks are outside of pools, told by its checkpoint's config and the cluster file alone. No torch.

A host's store takes its memory before any engine is there; an engine's own description says the same (`EngineDescription`), or it
is not attached.
"""

from dataclasses import dataclass

from orchestrator.core.config import KvFormat

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: What is computed with, and kept in the pool, for a dtype that is asked for or that a checkpoint has.
POOL_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}
#: NVFP4 has a scale for every so many values.
NVFP4_GROUP = 16
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Slab:
    """What a block is in a pool: rows of values, one for each layer, head, and keys or values."""

    layers: int
    kv_heads: int
    block_tokens: int
    head_dim: int
    #: float32, bfloat16 or float16.
    dtype: str

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.layers * 2 * self.kv_heads

    @property
    def row_values(self) -> int:
        """Values of a row."""
        return self.block_tokens * self.head_dim

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return self.rows * self.row_values * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class StoredForm:
    """Bytes of a block outside of pools, and what they mean."""

    block_bytes: int
    layout: str


def row_parts(stored: KvFormat, row_values: int) -> tuple[int, ...]:
    """Return the bytes of a row in each part of a block in FP8 or NVFP4: scale of the row, scales within it, values."""
    if stored is KvFormat.FP8:
        return (_FLOAT32_BYTES, row_values)
    assert stored is KvFormat.NVFP4, "a slab is its own plain form"
    return (_FLOAT32_BYTES, row_values // NVFP4_GROUP, row_values // 2)


def form_of(stored: KvFormat, slab: Slab) -> StoredForm:
    """Return the stored form of a pool's blocks."""
    sizes = f"{slab.layers} layers, {slab.kv_heads} KV heads, {slab.block_tokens} tokens, {slab.head_dim} dimensions"
    if stored is KvFormat.PLAIN:
        return StoredForm(slab.bytes, f"{stored} {slab.dtype} of {sizes}")
    return StoredForm(slab.rows * sum(row_parts(stored, slab.row_values)), f"{stored} of {sizes}")
