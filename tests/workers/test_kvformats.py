"""A KV pool's blocks in their stored forms: which bytes they are, and what comes back of them."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from orchestrator.core.config import ConfigError, KvFormat
from orchestrator.core.types import BlockId
from workers.engines import fp8, nvfp4
from workers.engines.base import NotEncodable
from workers.engines.kvpool import KvPool
from workers.engines.stored import Slab

LAYERS, KV_HEADS, BLOCK_TOKENS = 3, 2, 8
ROWS = LAYERS * 2 * KV_HEADS
COMPRESSED = [KvFormat.FP8, KvFormat.NVFP4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def heads(dtype: torch.dtype, head_dim: int, tokens: int) -> Slab:
    return Slab(LAYERS, KV_HEADS, tokens, head_dim, str(dtype).removeprefix("torch."))


def latents(dtype: torch.dtype, width: int, tokens: int) -> Slab:
    return replace(heads(dtype, width, tokens), kv_heads=1, latent=True)


def make_pool(
    stored: KvFormat,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 32,
    blocks: int = 12,
    tokens: int = 8,
    slab_of: Callable[[torch.dtype, int, int], Slab] = heads,
) -> KvPool:
    """Return a pool filled with numbers of which each row has its own size."""
    slab = slab_of(dtype, head_dim, tokens)
    pool = KvPool(blocks, slab, torch.device("cpu"), None, stored)
    source = torch.Generator().manual_seed(head_dim)
    sizes = torch.exp(2 * torch.randn(blocks, slab.rows, 1, generator=source))
    rows_of(pool).copy_(torch.randn(blocks, slab.rows, tokens * head_dim, generator=source) * sizes)
    return pool


def rows_of(pool: KvPool) -> torch.Tensor:
    return pool._rows


def encoded(pool: KvPool, blocks: Sequence[int]) -> bytes:
    data = bytearray(len(blocks) * pool.stored_bytes)
    pool.encode([BlockId(block) for block in blocks], memoryview(data))
    return bytes(data)


def decoded(pool: KvPool, data: bytes, blocks: Sequence[int]) -> torch.Tensor:
    pool.decode([BlockId(block) for block in blocks], memoryview(data))
    return rows_of(pool)[list(blocks)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_form_is_the_slab(dtype: torch.dtype) -> None:
    pool = make_pool(KvFormat.PLAIN, dtype)
    assert pool.stored_bytes == pool.block_bytes
    assert encoded(pool, (5, 2)) == bytes(pool.slabs[[5, 2]].flatten().tolist())
    other = make_pool(KvFormat.PLAIN, dtype, blocks=4)
    assert torch.equal(decoded(other, encoded(pool, (5, 2)), (3, 0)), rows_of(pool)[[5, 2]])


def test_bytes_of_a_block() -> None:
    values = ROWS * BLOCK_TOKENS * 32
    assert make_pool(KvFormat.FP8).stored_bytes == values + 4 * ROWS
    assert make_pool(KvFormat.NVFP4).stored_bytes == values // 2 + values // 16 + 4 * ROWS
    one_row_a_layer = [make_pool(stored, slab_of=latents).stored_bytes for stored in KvFormat]
    values = LAYERS * BLOCK_TOKENS * 32
    assert one_row_a_layer == [2 * values, values + 4 * LAYERS, values // 2 + values // 16 + 4 * LAYERS]


def test_the_bytes_are_where_the_layout_says() -> None:
    pool = make_pool(KvFormat.NVFP4, torch.float32)
    data = encoded(pool, (7,))
    row, row_values = 5, BLOCK_TOKENS * 32
    codes, scales, tensor_scales = nvfp4.encode(rows_of(pool)[7])
    assert struct.unpack_from("<f", data, 4 * row)[0] == tensor_scales[row].item()
    first_scale = 4 * ROWS + row * row_values // 16
    assert data[first_scale : first_scale + row_values // 16] == bytes(scales[row].tolist())
    first_code = 4 * ROWS + ROWS * row_values // 16 + row * row_values // 2
    assert data[first_code : first_code + row_values // 2] == bytes(codes[row].tolist())


@pytest.mark.parametrize("slab_of", [heads, latents])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", COMPRESSED)
def test_each_row_comes_back_as_its_format_makes_it(
    stored: KvFormat, dtype: torch.dtype, slab_of: Callable[[torch.dtype, int, int], Slab]
) -> None:
    source, target = make_pool(stored, dtype, slab_of=slab_of), make_pool(stored, dtype, blocks=5, slab_of=slab_of)
    kept = rows_of(target)[[0, 2]].clone()
    rows = rows_of(source)[[11, 0, 6]]
    found = decoded(target, encoded(source, (11, 0, 6)), (4, 1, 3))
    expected = fp8.decode(*fp8.encode(rows)) if stored is KvFormat.FP8 else nvfp4.decode(*nvfp4.encode(rows))
    assert torch.equal(found, expected.to(dtype))
    assert torch.equal(rows_of(target)[[0, 2]], kept)


@pytest.mark.parametrize("stored", COMPRESSED)
def test_a_block_larger_than_a_piece_is_the_same_as_in_one(stored: KvFormat) -> None:
    # 12 rows of 32,768 values: two of them are a piece, the last is one too.
    source, target = (make_pool(stored, torch.bfloat16, 128, 2, 256) for _ in range(2))
    rows = rows_of(source)[[1]]
    found = decoded(target, encoded(source, (1,)), (0,))
    expected = fp8.decode(*fp8.encode(rows)) if stored is KvFormat.FP8 else nvfp4.decode(*nvfp4.encode(rows))
    assert torch.equal(found, expected.to(torch.bfloat16))


@pytest.mark.parametrize("stored", COMPRESSED)
def test_what_a_float32_pool_stored_a_bfloat16_pool_reads(stored: KvFormat) -> None:
    source, target = make_pool(stored, torch.float32), make_pool(stored, torch.bfloat16)
    assert source.stored_layout == target.stored_layout
    data = encoded(source, (3, 8))
    again = make_pool(stored, torch.float32)
    assert torch.equal(decoded(target, data, (0, 1)), decoded(again, data, (0, 1)).to(torch.bfloat16))


def test_layouts_differ_where_bytes_would_be_misread() -> None:
    pools = [make_pool(KvFormat.PLAIN, dtype) for dtype in DTYPES]
    pools += [make_pool(stored) for stored in COMPRESSED]
    pools += [make_pool(KvFormat.FP8, head_dim=64, tokens=4), make_pool(KvFormat.FP8, tokens=4)]
    pools += [make_pool(stored, slab_of=latents) for stored in KvFormat]
    pools += [make_pool(KvFormat.FP8, head_dim=64, tokens=4, slab_of=latents), make_pool(KvFormat.FP8, tokens=4, slab_of=latents)]
    assert len({pool.stored_layout for pool in pools}) == len(pools)


@pytest.mark.parametrize("stored", COMPRESSED)
def test_a_block_with_nan_is_not_encoded(stored: KvFormat) -> None:
    pool = make_pool(stored)
    rows_of(pool)[4, 3, 17] = torch.nan
    assert encoded(pool, (3, 5))
    with pytest.raises(NotEncodable, match="have a NaN or an infinity"):
        encoded(pool, (3, 4, 5))


def test_a_head_that_is_no_multiple_of_a_group_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        make_pool(KvFormat.NVFP4, head_dim=24)
    problem = "nvfp4 needs a head dimension that is a multiple of 16, the model's is 24"
    assert str(refused.value) == f"engine.kv_format_stored: {problem}"
    assert make_pool(KvFormat.FP8, head_dim=24).stored_bytes
    with pytest.raises(ConfigError, match=r"nvfp4 needs a width of latents that is a multiple of 16, the model's is 40"):
        make_pool(KvFormat.NVFP4, head_dim=40, slab_of=latents)


@pytest.mark.parametrize("stored", list(KvFormat))
def test_blocks_are_moved_in_one_thread_and_the_others_are_given_back(stored: KvFormat) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pool = make_pool(stored)
        decoded(pool, encoded(pool, (0,)), (1,))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stored", list(KvFormat))
def test_a_cuda_pool_writes_the_same_bytes_and_reads_them(stored: KvFormat) -> None:
    here = make_pool(stored)
    there = KvPool(12, heads(torch.bfloat16, 32, BLOCK_TOKENS), torch.device("cuda"), None, stored)
    rows_of(there).copy_(rows_of(here))
    data = encoded(here, (5, 0, 9))
    assert encoded(there, (5, 0, 9)) == data
    assert torch.equal(decoded(there, data, (1, 2, 3)).cpu(), decoded(here, data, (1, 2, 3)))
