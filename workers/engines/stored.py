"""What a model's KV blocks are outside of pools, told by its checkpoint's config and the cluster file alone. No torch.

A host's store takes its memory before any engine is there; an engine's own description says the same (`EngineDescription`), or it
is not attached.
"""

from dataclasses import dataclass

from orchestrator.core.config import EngineConfig, KvFormat
from orchestrator.profiles.model_config import Architecture

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: What is computed with, and kept in the pool, for a dtype that is asked for or that a checkpoint has.
POOL_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}
#: NVFP4 has a scale for every so many values.
NVFP4_GROUP = 16
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Slab:
    """What a block is in a pool: rows of values, one for each layer, head, and keys or values.

    Latent attention keeps one vector of a token in a layer, for the keys and values of all heads: one row a layer.
    """

    layers: int
    kv_heads: int
    block_tokens: int
    head_dim: int
    #: float32, bfloat16 or float16.
    dtype: str
    #: One vector is both keys and values; it is `head_dim` wide, and there is one head.
    latent: bool = False

    @property
    def layer_rows(self) -> int:
        """Rows of a layer: vectors that it keeps of a token."""
        return self.kv_heads if self.latent else 2 * self.kv_heads

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.layers * self.layer_rows

    @property
    def row_values(self) -> int:
        """Values of a row."""
        return self.block_tokens * self.head_dim

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return self.rows * self.row_values * ITEM_BYTES[self.dtype]

    @property
    def sizes(self) -> str:
        """What tells this block's rows from those of another, its dtype aside."""
        if self.latent:
            return f"{self.layers} layers, {self.block_tokens} tokens, latents of {self.head_dim} dimensions"
        return f"{self.layers} layers, {self.kv_heads} KV heads, {self.block_tokens} tokens, {self.head_dim} dimensions"


def pool_dtype(name: str, shape: Architecture) -> str:
    """Return what a pool keeps for `engine.dtype`: auto is the checkpoint's."""
    return POOL_DTYPES[shape.dtype if name == "auto" else name]


def engine_slab(shape: Architecture, engine: EngineConfig) -> Slab:
    """Return what a block is in the pool of an engine that computes."""
    return slab_of(shape, engine.block_tokens, pool_dtype(engine.dtype, shape))


def slab_of(shape: Architecture, block_tokens: int, dtype: str) -> Slab:
    """Return what a model's blocks are in a pool of a dtype (float32, bfloat16, float16)."""
    latent = shape.latent
    if latent is None:
        return Slab(shape.layers, shape.kv_heads, block_tokens, shape.head_dim, dtype)
    return Slab(shape.layers, 1, block_tokens, latent.kv_rank + latent.rope_dim, dtype, latent=True)


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
    if stored is KvFormat.PLAIN:
        return StoredForm(slab.bytes, f"{stored} {slab.dtype} of {slab.sizes}")
    return StoredForm(slab.rows * sum(row_parts(stored, slab.row_values)), f"{stored} of {slab.sizes}")
