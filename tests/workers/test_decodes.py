"""Every way of attending for decodes computes what the definition says, wherever in the pool a context's blocks lie."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from workers.engines import threads, tiles
from workers.engines.attention import accelerated_way
from workers.engines.decodes import DecodeSequence, DecodeWay
from workers.engines.gathered import GatheredWay
from workers.engines.kvpool import KvPool
from workers.engines.paged import PART_TOKENS, ROWS_MAX, SHARED_BYTES_MIN, PagedWay
from workers.engines.stored import Slab
from workers.engines.varlen import VarlenWay

CPU = torch.device("cpu")
LAYERS, LAYER = 3, 1


def varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, **how: Any
) -> Tensor:
    """Do what `torch.nn.attention.varlen.varlen_attn` is documented to do with block tables, sequence by sequence."""
    assert (how["window_size"], how["enable_gqa"], cu_seq_k) == ((-1, 0), True, None)
    tables, used = how["block_table"], how["seqused_k"]
    assert {cu_seq_q.dtype, tables.dtype, used.dtype} == {torch.int32}
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(used.max()))
    assert query.stride(2) == key.stride(3) == value.stride(3) == 1
    outputs: list[Tensor] = []
    for number, context in enumerate(used.tolist()):
        rows = query[cu_seq_q[number] : cu_seq_q[number + 1]].float()
        blocks = tables[number, : math.ceil(context / key.shape[1])].long()
        keys, values = (kept[blocks].flatten(0, 1)[:context].float() for kept in (key, value))
        seen = torch.ones(len(rows), context).tril(context - len(rows)).bool()
        heads = (part.transpose(0, 1).unsqueeze(0) for part in (rows, keys, values))
        found = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, scale=how["scale"], enable_gqa=True)
        outputs.append(found[0].transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


def gathering(pool: KvPool) -> DecodeWay:
    return GatheredWay(pool, getattr(torch, pool.slab.dtype), CPU)


WAYS: dict[str, Callable[[KvPool], DecodeWay]] = {
    "paged": lambda pool: PagedWay(pool, threads=2),
    "gathered": gathering,
    "varlen": lambda pool: VarlenWay(pool, CPU, varlen),
}


class Case:
    """A pool of noise, and sequences of (context, rows) whose blocks are anywhere in it."""

    def __init__(self, slab: Slab, wanted: Sequence[tuple[int, int]], shared: int = 2, value_dim: int | None = None) -> None:
        torch.manual_seed(len(wanted) + slab.block_tokens)
        counts = [math.ceil(context / slab.block_tokens) for context, _ in wanted]
        self.pool = KvPool(sum(counts) + 1, slab, CPU, None)
        self.stored = self.pool.slabs.view(getattr(torch, slab.dtype))
        self.stored.copy_(torch.randn(self.stored.shape))
        blocks = np.random.default_rng(len(wanted)).permutation(sum(counts) + 1)
        self.sequences: list[DecodeSequence] = []
        row = taken = 0
        for (context, rows), count in zip(wanted, counts, strict=True):
            self.sequences.append(DecodeSequence(row, rows, context - rows, blocks[taken : taken + count]))
            row, taken = row + rows, taken + count
        self.rows, self.heads, self.value_dim = row, shared * slab.kv_heads, value_dim or slab.head_dim
        # Keys and values of the rows stand behind the queries, as a layer's product has them.
        self.queries = torch.randn(row, self.heads * slab.head_dim + 7).to(self.stored.dtype)

    def attend(self, way: DecodeWay, sequences: Sequence[DecodeSequence] | None = None) -> Tensor:
        attended = torch.full((self.rows, self.heads, self.value_dim), 99, dtype=self.queries.dtype)
        way.plan(sequences or self.sequences).attend(self.queries, attended, LAYER, 0.3)
        return attended

    def expected(self) -> Tensor:
        """Attend by the definition, in float64."""
        slab, shared = self.pool.slab, self.heads // self.pool.slab.kv_heads
        pool = self.stored.double().view(-1, LAYERS, slab.layer_rows, slab.block_tokens, slab.head_dim)[:, LAYER]
        attended = torch.empty(self.rows, self.heads, self.value_dim, dtype=torch.float64)
        for sequence in self.sequences:
            kept = pool[torch.from_numpy(sequence.table)].transpose(0, 1).flatten(1, 2)
            for place in range(sequence.count):
                row, seen = sequence.first_row + place, sequence.start + place + 1
                for head in range(self.heads):
                    query = self.queries[row, head * slab.head_dim : (head + 1) * slab.head_dim].double()
                    keys, values = kept[head // shared, :seen], kept[head // shared - slab.kv_heads, :seen, : self.value_dim]
                    attended[row, head] = (0.3 * keys @ query).softmax(0) @ values
        return attended


def slab(heads: int, block_tokens: int, head_dim: int, dtype: str = "float32", latent: bool = False) -> Slab:
    return Slab(LAYERS, heads, block_tokens, head_dim, dtype, latent)


def close(found: Tensor, expected: Tensor) -> None:
    rounding = 2e-6 if found.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WAYS)
def test_each_way_computes_what_the_definition_says(name: str, dtype: str) -> None:
    case = Case(slab(2, 16, 32, dtype), [(70, 1), (33, 1), (32, 1), (1, 1)])
    close(case.attend(WAYS[name](case.pool)), case.expected())


@pytest.mark.parametrize("name", ["paged", "varlen"])
def test_several_rows_of_a_sequence_see_those_before_them(name: str) -> None:
    case = Case(slab(2, 4, 16), [(9, 1), (40, ROWS_MAX), (13, 2), (3, 3), (6, 5)])
    close(case.attend(WAYS[name](case.pool)), case.expected())


@pytest.mark.parametrize("shared", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("sizes", [(8, 10), (6, 16), (8, 48)])
def test_any_number_of_query_heads_shares_a_kv_head(shared: int, sizes: tuple[int, int]) -> None:
    case = Case(slab(3, *sizes), [(21, 1), (19, 2)], shared)
    close(case.attend(WAYS["paged"](case.pool)), case.expected())


@pytest.mark.parametrize("name", ["paged", "gathered"])
def test_latents_are_keys_and_the_first_dimensions_of_them_values(name: str) -> None:
    case = Case(slab(1, 8, 48, latent=True), [(30, 1), (11, 1)], shared=6, value_dim=32)
    close(case.attend(WAYS[name](case.pool)), case.expected())


@pytest.mark.parametrize("block_tokens", [64, 48, PART_TOKENS + 1])
def test_parts_of_long_contexts_add_up(block_tokens: int) -> None:
    case = Case(slab(2, block_tokens, 16), [(2 * PART_TOKENS + 50, 1), (PART_TOKENS + 1, 3), (PART_TOKENS, 1), (5, 1)])
    close(case.attend(WAYS["paged"](case.pool)), case.expected())


@pytest.mark.skipif(not tiles.usable(), reason="needs AMX")
@pytest.mark.parametrize("shared", [4, 7, 20])
@pytest.mark.parametrize("sizes", [(64, 32), (192, 64)])
def test_tiles_compute_what_the_definition_says(shared: int, sizes: tuple[int, int]) -> None:
    wanted = [(PART_TOKENS + 65, 3), (200, 1), (66, 3), (64, 1), (1, 1)]
    case = Case(slab(2, *sizes, "bfloat16"), wanted, shared)
    close(case.attend(PagedWay(case.pool, threads=2)), case.expected())


@pytest.mark.skipif(not tiles.usable(), reason="needs AMX")
def test_tiles_read_latents() -> None:
    case = Case(slab(1, 64, 96, "bfloat16", latent=True), [(300, 1), (11, 2)], shared=24, value_dim=64)
    close(case.attend(PagedWay(case.pool, threads=2)), case.expected())


def test_a_row_is_the_same_whoever_computes_it_and_whatever_is_beside_it() -> None:
    case = Case(slab(2, 64, 32), [(2 * PART_TOKENS + 50, 1), (700, 2), (PART_TOKENS + 9, 2), (600, 1)])
    assert 2 * 2 * 32 * 4 * (3 * PART_TOKENS + 1300) > SHARED_BYTES_MIN
    together = case.attend(PagedWay(case.pool, threads=3))
    assert torch.equal(case.attend(PagedWay(case.pool, threads=1)), together)
    for sequence in case.sequences:
        rows = slice(sequence.first_row, sequence.first_row + sequence.count)
        alone = case.attend(PagedWay(case.pool, threads=2), [sequence])
        assert torch.equal(alone[rows], together[rows])
        # The rows of others are left alone.
        assert (alone == 99).sum() == (case.rows - sequence.count) * case.heads * case.value_dim
    # A row that comes with others of its sequence is the one that would have come by itself.
    first = case.sequences[1]
    single = [DecodeSequence(first.first_row, 1, first.start, first.table)]
    assert torch.equal(case.attend(PagedWay(case.pool, threads=1), single)[first.first_row], together[first.first_row])


def test_layers_are_read_one_after_the_other_by_one_plan() -> None:
    case = Case(slab(2, 64, 32), [(2 * PART_TOKENS + 50, 1), (PART_TOKENS + 9, 1)])
    plan = PagedWay(case.pool, threads=2).plan(case.sequences)
    attended = torch.zeros(3, case.rows, case.heads, case.value_dim)
    for place, layer in enumerate((LAYER, 0, LAYER)):
        plan.attend(case.queries, attended[place], layer, 0.3)
    close(attended[0], case.expected())
    assert torch.equal(attended[0], attended[2])
    assert not torch.allclose(attended[0], attended[1])


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize(("dtype", "size", "shared"), [("float32", 16, 2), ("bfloat16", 16, 2), ("bfloat16", 64, 4)])
def test_a_context_that_is_not_a_number_shows_in_its_row_alone(dtype: str, size: int, shared: int, kind: str) -> None:
    case = Case(slab(2, size, size, dtype), [(70, 1), (33, 1)], shared)
    before = case.attend(PagedWay(case.pool, threads=1))
    stored = case.stored.view(-1, LAYERS, 2, 2, size, size)
    stored[case.sequences[0].table[1], LAYER, 0 if kind == "key" else 1, 1, 3, 2] = math.nan
    after = case.attend(PagedWay(case.pool, threads=1))
    assert after[0, shared:].isnan().any(-1).all()
    assert torch.equal(after[0, :shared], before[0, :shared])
    assert torch.equal(after[1], before[1])


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    case = Case(slab(1, 16, 8), [(50, 1)])
    case.queries *= 300
    close(case.attend(PagedWay(case.pool, threads=1)), case.expected())


def test_block_tables_are_chosen_where_flash_attention_reads_them_right() -> None:
    pool = KvPool(5, slab(2, 16, 32, "bfloat16"), CPU, None)

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")

    def misread(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
        return varlen(query, key, value.roll(1, dims=1), **how)

    for attend, chosen in ((varlen, VarlenWay), (refuse, GatheredWay), (misread, GatheredWay), (None, GatheredWay)):
        assert type(accelerated_way(pool, torch.bfloat16, CPU, attend)) is chosen
        assert not pool.slabs.any(), "what was tried is gone"


def test_where_nothing_can_be_written_a_kernel_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def compiler(_: Any, cache: bool = False, **__: Any) -> Callable[[object], str]:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda entry: SimpleNamespace(address=0)

    monkeypatch.setattr(threads, "cfunc", compiler)
    threads.compiled(print)
    assert asked == [True, False]


def test_latents_are_gathered_where_there_is_no_kernel() -> None:
    assert isinstance(
        accelerated_way(KvPool(5, slab(1, 16, 32, latent=True), CPU, None), torch.float32, CPU, varlen), GatheredWay
    )
