"""A step's slices as tensors: which row is whose, where its keys go, what it may look at, and how decodes are grouped."""

from array import array
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from orchestrator.core.commands import Slice
from orchestrator.core.types import BlockId, RequestId, Sampling
from workers.engines import gathered as gathered_file
from workers.engines.batch import BatchBuilder, StepBatch
from workers.engines.decodes import DecodeSequence
from workers.engines.gathered import DecodeGroup, GatheredDecodes, GatheredWay
from workers.engines.kvpool import KvPool
from workers.engines.sequences import TokenSequence
from workers.engines.stored import Slab

CPU = torch.device("cpu")
SIZE, KV_HEADS, HEAD_DIM, LAYERS, BLOCKS = 4, 2, 2, 3, 32
#: Bytes of a block in one layer.
LAYER_BLOCK_BYTES = 2 * KV_HEADS * SIZE * HEAD_DIM * 4


class Bench:
    """A pool, and sequences of 60 tokens: token i of sequence s is 100 s + i."""

    def __init__(self, rows_min: int = 1, block_tokens: int = SIZE, dtype: torch.dtype = torch.float32) -> None:
        self.pool = KvPool(BLOCKS, Slab(LAYERS, KV_HEADS, block_tokens, HEAD_DIM, str(dtype).removeprefix("torch.")), CPU, None)
        self.pool.slabs.fill_(1)
        self.builder = BatchBuilder(self.pool, rows_min, GatheredWay(self.pool, dtype, CPU), CPU)

    def build(self, *wanted: tuple[int, int, list[int]], sample: str = "", left_out: tuple[int, ...] = ()) -> StepBatch:
        """Build a step of (start, count, blocks) a sequence; `sample` has an x for those that sample, all do by default."""
        slices: list[Slice] = []
        sequences: list[TokenSequence] = []
        for number, (start, count, blocks) in enumerate(wanted):
            sequence = TokenSequence(array("I", range(100 * number, 100 * number + 60)), Sampling(), 1 << 20)
            sequence.place(0, [BlockId(block) for block in blocks])
            sequences.append(sequence)
            samples = not sample or sample[number] == "x"
            slices.append(Slice(RequestId(number), start, count, 0, (), samples))
        return self.builder.build(slices, sequences, [number for number in range(len(wanted)) if number not in left_out])

    def cleared(self) -> list[int]:
        """Return the blocks that were zeroed."""
        return [block for block in range(BLOCKS) if not self.pool.slabs[block].any()]

    def places(self, batch: StepBatch) -> list[tuple[int, int]]:
        """Return (block, token in block) that each row's keys go to, by writing there and looking."""
        self.pool.slabs.zero_()
        marks = torch.arange(1, batch.tokens + 1, dtype=torch.float32)
        self.pool.write(1, batch.write_index, marks[:, None, None].expand(-1, 2 * KV_HEADS, HEAD_DIM).contiguous())
        pool = self.pool.slabs.view(torch.float32).view(BLOCKS, LAYERS, 2, KV_HEADS, self.pool.block_tokens, HEAD_DIM)
        assert not pool[:, [0, 2]].any()
        found: list[tuple[int, int]] = []
        for mark in marks.tolist():
            hits = np.argwhere((pool[:, 1] == mark).numpy())
            assert len(hits) == 2 * KV_HEADS * HEAD_DIM
            [place] = {(int(hit[0]), int(hit[3])) for hit in hits}
            found.append(place)
        return found


def groups_of(batch: StepBatch) -> tuple[DecodeGroup, ...]:
    assert isinstance(batch.decodes, GatheredDecodes)
    return batch.decodes.groups


def test_one_decode_is_one_row() -> None:
    bench = Bench()
    batch = bench.build((5, 1, [7, 9]))
    assert (batch.rows, batch.tokens, batch.positions_max) == (1, 1, 5)
    assert (batch.token_ids.tolist(), batch.positions.tolist()) == ([5], [5])
    assert (batch.sampled_rows, batch.sampled_slices, batch.chunks) == (None, (0,), ())
    [group] = groups_of(batch)
    assert (group.first_row, group.count, group.context, group.mask) == (0, 1, 6, None)
    assert bench.places(batch) == [(9, 1)]


def test_decodes_come_first_longest_first_then_chunks_in_order() -> None:
    bench = Bench()
    batch = bench.build((0, 6, [1, 2]), (3, 1, [3]), (8, 1, [4, 5, 6]), (4, 3, [7, 8]))
    assert batch.token_ids.tolist() == [208, 103, *range(6), 304, 305, 306]
    assert batch.positions.tolist() == [8, 3, *range(6), 4, 5, 6]
    assert [(chunk.first_row, chunk.count, chunk.start, chunk.index is None) for chunk in batch.chunks] == [
        (2, 6, 0, True),
        (8, 3, 4, False),
    ]
    assert bench.places(batch) == [(6, 0), (3, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (8, 0), (8, 1), (8, 2)]
    # The last row of each slice, in the order of rows.
    assert batch.sampled_rows is not None
    assert (batch.sampled_rows.tolist(), batch.sampled_slices) == ([0, 1, 7, 10], (2, 1, 0, 3))


class Noted:
    """A way that takes up to three rows of a sequence and remembers what it was told."""

    rows_max = 3

    def __init__(self) -> None:
        self.told: list[DecodeSequence] = []

    def plan(self, sequences: Sequence[DecodeSequence]) -> "Noted":
        self.told = list(sequences)
        return self

    def attend(self, queries: torch.Tensor, attended: torch.Tensor, layer: int, scale: float) -> None:
        raise NotImplementedError


def test_short_chunks_after_a_context_are_attended_for_as_decodes_and_stand_behind_them() -> None:
    bench, way = Bench(), Noted()
    bench.builder = BatchBuilder(bench.pool, 1, way, CPU)
    batch = bench.build((0, 3, [1]), (4, 4, [2, 3]), (4, 3, [4, 5]), (9, 1, [6, 7, 8]), (2, 2, [9]))
    assert batch.token_ids.tolist() == [309, 204, 205, 206, 402, 403, 0, 1, 2, 104, 105, 106, 107]
    # A prompt's first tokens have no context, however few they are; four rows are more than the way takes.
    assert [(chunk.first_row, chunk.count, chunk.start) for chunk in batch.chunks] == [(6, 3, 0), (9, 4, 4)]
    told = [(one.first_row, one.count, one.start, one.context, one.table[0]) for one in way.told]
    assert told == [(0, 1, 9, 10, 6), (1, 3, 4, 7, 4), (4, 2, 2, 4, 9)]
    assert batch.sampled_rows is not None
    assert (batch.sampled_rows.tolist(), batch.sampled_slices) == ([0, 3, 5, 8, 12], (3, 2, 4, 0, 1))


@pytest.mark.parametrize(
    ("sample", "rows", "slices"),
    [("xxx", [0, 1, 5], (1, 2, 0)), ("x..", [5], (0,)), ("..x", [1], (2,)), ("...", [], ())],
)
def test_only_rows_that_sample_are_wanted(sample: str, rows: list[int], slices: tuple[int, ...]) -> None:
    batch = Bench().build((0, 4, [1]), (6, 1, [2, 3]), (5, 1, [4, 5]), sample=sample)
    assert batch.sampled_rows is not None
    assert (batch.sampled_rows.tolist(), batch.sampled_slices) == (rows, slices)


def test_slices_that_failed_are_left_out() -> None:
    batch = Bench().build((5, 1, [1, 2]), (6, 1, [3, 4]), (0, 2, [5]), left_out=(0,))
    assert (batch.token_ids.tolist(), batch.sampled_slices) == ([106, 200, 201], (1, 2))


def test_filling_rows_are_computed_and_neither_written_nor_sampled() -> None:
    bench = Bench(rows_min=4)
    batch = bench.build((5, 1, [7, 9]))
    assert (batch.rows, batch.tokens, len(batch.token_ids), len(batch.positions)) == (4, 1, 4, 4)
    assert batch.token_ids.tolist() == [5, 0, 0, 0]
    assert batch.sampled_rows is not None
    assert (batch.sampled_rows.tolist(), len(batch.write_index)) == ([0], 1)
    full = bench.build((0, 4, [1]))
    assert (full.rows, full.tokens) == (4, 4)


@pytest.mark.parametrize(
    ("slice_", "cleared"),
    [
        # A block that is begun by one token, or by a chunk that does not fill it, is cleared; one that has tokens is not.
        ((0, 1, [3]), [3]),
        ((4, 1, [3, 5]), [5]),
        ((5, 1, [3, 5]), []),
        ((7, 1, [3, 5]), []),
        ((0, 4, [3]), []),
        ((0, 5, [3, 5]), [5]),
        ((0, 3, [3]), [3]),
        ((1, 2, [3]), []),
        ((2, 4, [3, 5]), [5]),
        ((2, 6, [3, 5]), []),
        ((4, 2, [3, 5]), [5]),
    ],
)
def test_what_lies_behind_a_blocks_last_token_is_finite(slice_: tuple[int, int, list[int]], cleared: list[int]) -> None:
    bench = Bench()
    bench.build(slice_)
    assert bench.cleared() == cleared


def test_blocks_of_one_token_are_never_part_filled() -> None:
    bench = Bench(block_tokens=1)
    batch = bench.build((2, 1, [3, 5, 7]), (0, 3, [8, 9, 10]))
    assert bench.cleared() == []
    assert bench.places(batch) == [(7, 0), (8, 0), (9, 0), (10, 0)]


def test_a_group_masks_what_is_beyond_each_of_its_sequences() -> None:
    batch = Bench().build((2, 1, [1]), (6, 1, [2, 3]), (6, 1, [4, 5]))
    [group] = groups_of(batch)
    assert (group.count, group.context) == (3, 7)
    assert group.mask is not None
    assert group.mask.shape == (3 * KV_HEADS, 1, 7)
    seen = (group.mask[:, 0] == 0).sum(1).tolist()
    # Longest first, each of a sequence's KV heads alike.
    assert seen == [7, 7, 7, 7, 3, 3]
    assert (group.mask[-1, 0] == torch.tensor([0.0] * 3 + [-torch.inf] * 4)).all()


def test_a_mask_has_the_models_dtype() -> None:
    [group] = groups_of(Bench(rows_min=1, dtype=torch.bfloat16).build((2, 1, [1]), (6, 1, [2, 3])))
    assert group.mask is not None
    assert group.mask.dtype == torch.bfloat16


def test_a_group_reads_its_sequences_keys_and_values() -> None:
    bench = Bench()
    batch = bench.build((6, 1, [2, 3]), (2, 1, [1]))
    pool = bench.pool.slabs.view(torch.float32).view(BLOCKS, LAYERS, 2, KV_HEADS, SIZE, HEAD_DIM)
    pool.copy_(torch.arange(pool.numel(), dtype=torch.float32).view(pool.shape))
    [group] = groups_of(batch)
    found = bench.pool.read(2, group.index, group.count)
    for part in range(2):
        for head in range(KV_HEADS):
            assert torch.equal(found[part, head], torch.cat([pool[2, 2, part, head], pool[3, 2, part, head]]))
            assert torch.equal(found[part, KV_HEADS + head, :SIZE], pool[1, 2, part, head])


@pytest.mark.parametrize(("count", "blocks"), [(2, [2, 9]), (5, [2, 9]), (6, [2, 9, 4]), (9, [2, 9, 4])])
def test_a_chunk_reads_all_blocks_up_to_its_last_token(count: int, blocks: list[int]) -> None:
    bench = Bench()
    [chunk] = bench.build((3, count, [2, 9, 4, 20])).chunks
    assert chunk.index is not None
    pool = bench.pool.slabs.view(torch.float32).view(BLOCKS, LAYERS, 2, KV_HEADS, SIZE, HEAD_DIM)
    pool.copy_(torch.arange(pool.numel(), dtype=torch.float32).view(pool.shape))
    found = bench.pool.read(1, chunk.index, 1)
    assert found.shape == (2, KV_HEADS, len(blocks) * SIZE, HEAD_DIM)
    assert torch.equal(found[1, 1], torch.cat([pool[block, 1, 1, 1] for block in blocks]))


@pytest.mark.parametrize(
    ("padding", "gathered", "groups"),
    [
        (1 << 30, 1 << 30, [(4, 25)]),
        # No padding: equal numbers of blocks only.
        (0, 1 << 30, [(2, 25), (1, 9), (1, 7)]),
        # The third and the fourth would read four blocks too many, each.
        (4 * LAYER_BLOCK_BYTES, 1 << 30, [(3, 25), (1, 7)]),
        (4 * LAYER_BLOCK_BYTES - 1, 1 << 30, [(2, 25), (2, 9)]),
        # Two, three sequences of seven blocks.
        (1 << 30, 14 * LAYER_BLOCK_BYTES, [(2, 25), (2, 9)]),
        (1 << 30, 21 * LAYER_BLOCK_BYTES, [(3, 25), (1, 7)]),
        # A single one may be longer than all that a group may gather.
        (1 << 30, 0, [(1, 25), (1, 25), (1, 9), (1, 7)]),
    ],
)
def test_groups_waste_little_and_gather_no_more_than_they_may(
    monkeypatch: pytest.MonkeyPatch, padding: int, gathered: int, groups: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(gathered_file, "PADDING_BYTES_MAX", padding)
    monkeypatch.setattr(gathered_file, "GATHER_BYTES_MAX", gathered)
    long = list(range(7))
    batch = Bench().build((6, 1, long), (24, 1, long), (8, 1, long), (24, 1, long))
    assert [(group.count, group.context) for group in groups_of(batch)] == groups
    assert [group.first_row for group in groups_of(batch)] == [
        sum(count for count, _ in groups[:place]) for place in range(len(groups))
    ]
