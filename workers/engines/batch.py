"""Turns a step's slices into the tensors that all layers of a model share.

Rows of a step, one a token:

    [0, decodes)   sequences that compute one token, longest context first
    [.., tokens)   chunks of prompts, one after the other, those of few tokens first
    [.., rows)     filling, where the device is faster with a few rows more; computed and never looked at
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.core.commands import Slice
from workers.engines.adapters import PLAIN, AdaptedRows, adapted_rows
from workers.engines.decodes import Decodes, DecodeSequence, DecodeWay
from workers.engines.kvpool import KvPool


class BatchSequence(Protocol):
    """What is asked of a sequence."""

    #: Its tokens, as far as they are computed in the step at least, and its block of each run of tokens.
    tokens: "array[int]"
    table: NDArray[np.int64]
    #: How many of its tokens are to be verified.
    drafted: int
    #: The number of its adapter; None: it has none.
    adapter: int | None
    #: Tokens of its prompt, and how many of these need no log probabilities any more.
    prompt_tokens: int
    scored: int


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """A run of one sequence's tokens that attend to what is before them and to each other."""

    first_row: int
    count: int
    #: Tokens before the chunk.
    start: int
    #: For reading the context and the chunk from the pool; None if the chunk is all there is.
    index: Tensor | None


@dataclass(frozen=True, slots=True)
class ScoredRun:
    """Rows that tell how likely the next tokens of a prompt were."""

    slice_number: int
    #: The place in the prompt of the token that follows the first of the rows.
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Everything about a step that does not depend on the layer."""

    rows: int
    tokens: int
    token_ids: Tensor
    positions: Tensor
    positions_max: int
    write_index: Tensor
    #: Sequences that compute one row, or, where the way of attending has it so, a few after what is in the pool.
    decodes: Decodes | None
    #: All others that compute several.
    chunks: tuple[PromptChunk, ...]
    #: Rows whose next token is wanted, in the order of `sampled_slices`, then those of `scored`; None: all, in order.
    sampled_rows: Tensor | None
    #: How many of them are there for their next token.
    sampled: int
    #: Indexes of the slices that sample, in the order of `sampled_rows`: one row each, and one more for each draft.
    sampled_slices: tuple[int, ...]
    #: Runs of rows that are there for log probabilities of prompts.
    scored: tuple[ScoredRun, ...]
    #: Which rows have adapters; and which of the sampled ones, counted among these.
    adapted: AdaptedRows = ()
    adapted_sampled: AdaptedRows = ()

    @property
    def decode_rows(self) -> int:
        """Rows that `decodes` attends for, the first ones."""
        return self.chunks[0].first_row if self.chunks else self.tokens


class BatchBuilder:
    """Builds batches for one engine."""

    def __init__(self, pool: KvPool, rows_min: int, way: DecodeWay, device: torch.device) -> None:
        self._pool = pool
        #: Batches of fewer rows are filled up.
        self.rows_min = rows_min
        self._way = way
        self._device = device

    def build(self, slices: Sequence[Slice], sequences: Sequence[BatchSequence], numbers: Sequence[int]) -> StepBatch:
        """Return the batch of `slices[i]` for the i in `numbers`; `sequences` stands beside `slices`."""
        decodes = [number for number in numbers if slices[number].count == 1]
        decodes.sort(key=lambda number: -slices[number].start)
        few = [number for number in numbers if slices[number].count > 1 and self._is_few(slices[number])]
        chunks = few + [number for number in numbers if slices[number].count > 1 and not self._is_few(slices[number])]
        token_ids, positions, blocks = self._rows(slices, sequences, decodes, chunks)
        tokens = len(token_ids)
        rows = max(tokens, self.rows_min)
        positions_max = int(positions.max())
        write_index = self._pool.write_index(blocks, positions % self._pool.block_tokens)
        if rows > tokens:
            token_ids, positions = (np.pad(values, (0, rows - tokens)) for values in (token_ids, positions))
        sampled = self._sampled_rows(slices, sequences, decodes, chunks)
        scored, runs = _scored_rows(slices, sequences, [*decodes, *chunks])
        everything = len(sampled) == rows and not scored
        wanted = [*(row for row, _ in sampled), *scored]
        adapters = self._adapters(slices, sequences, decodes + chunks)
        wanted_adapters = adapters[wanted] if adapters is not None else None
        mixed = tokens - sum(slices[number].count for number in chunks[len(few) :])
        return StepBatch(
            rows=rows,
            tokens=tokens,
            token_ids=self._to_device(token_ids),
            positions=self._to_device(positions),
            positions_max=positions_max,
            write_index=self._to_device(write_index),
            decodes=self._decodes(slices, sequences, decodes + few),
            chunks=self._prompt_chunks(slices, sequences, chunks[len(few) :], tokens),
            sampled_rows=None if everything else self._to_device(np.array(wanted, dtype=np.int64)),
            sampled=len(sampled),
            sampled_slices=tuple(dict.fromkeys(number for _, number in sampled)),
            scored=runs,
            adapted=self._adapted(adapters, mixed),
            adapted_sampled=self._adapted(wanted_adapters, len(wanted)),
        )

    @staticmethod
    def _adapters(slices: Sequence[Slice], sequences: Sequence[BatchSequence], members: list[int]) -> NDArray[np.int64] | None:
        """Return the rows' adapters; None if none has any."""
        if all(sequences[number].adapter is None for number in members):
            return None
        own = [sequences[number].adapter for number in members]
        numbers = np.array([PLAIN if adapter is None else adapter for adapter in own], np.int64)
        return numbers.repeat([slices[number].count for number in members])

    def _adapted(self, adapters: NDArray[np.int64] | None, mixed: int) -> AdaptedRows:
        return () if adapters is None else adapted_rows(adapters, mixed, self._to_device)

    def _rows(
        self, slices: Sequence[Slice], sequences: Sequence[BatchSequence], decodes: list[int], chunks: list[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return token ids, positions and blocks of all rows; clear blocks that are begun and not filled."""
        size = self._pool.block_tokens
        starts = [slices[number].start for number in decodes]
        ids = [sequences[number].tokens[start] for number, start in zip(decodes, starts, strict=True)]
        blocks = [sequences[number].table[start // size] for number, start in zip(decodes, starts, strict=True)]
        for start, block in zip(starts, blocks, strict=True):
            if start % size == 0 and size > 1:
                self._pool.clear(block)
        if not chunks:
            return np.array(ids, np.int64), np.array(starts, np.int64), np.array(blocks, np.int64)
        parts = [(np.array(ids, np.int64), np.array(starts, np.int64), np.array(blocks, np.int64))]
        for number in chunks:
            start, end = slices[number].start, slices[number].start + slices[number].count
            places = np.arange(start, end, dtype=np.int64)
            table = sequences[number].table
            if end % size and end - end % size >= start:
                self._pool.clear(table[end // size])
            parts.append((np.array(sequences[number].tokens[start:end], np.int64), places, table[places // size]))
        ids, positions, blocks = (np.concatenate(column) for column in zip(*parts, strict=True))
        return ids, positions, blocks

    @staticmethod
    def _sampled_rows(
        slices: Sequence[Slice], sequences: Sequence[BatchSequence], decodes: list[int], chunks: list[int]
    ) -> list[tuple[int, int]]:
        """Return (row, slice number) for the last row of each slice that samples, and before it those its drafts are held to."""
        rows = [(row, number) for row, number in enumerate(decodes) if slices[number].sample]
        end = len(decodes)
        for number in chunks:
            end += slices[number].count
            if slices[number].sample:
                rows += [(row, number) for row in range(end - 1 - sequences[number].drafted, end)]
        return rows

    def _is_few(self, piece: Slice) -> bool:
        """Whether a chunk reads so much more than it computes that it is attended for as decodes are."""
        return piece.start > 0 and piece.count <= self._way.rows_max

    def _decodes(self, slices: Sequence[Slice], sequences: Sequence[BatchSequence], members: list[int]) -> Decodes | None:
        if not members:
            return None
        described: list[DecodeSequence] = []
        row = 0
        for number in members:
            start, count = slices[number].start, slices[number].count
            described.append(DecodeSequence(row, count, start, sequences[number].table))
            row += count
        return self._way.plan(described)

    def _prompt_chunks(
        self, slices: Sequence[Slice], sequences: Sequence[BatchSequence], chunks: list[int], tokens: int
    ) -> tuple[PromptChunk, ...]:
        """Describe the chunks that are a step's last rows of `tokens`."""
        first_row = tokens - sum(slices[number].count for number in chunks)
        found: list[PromptChunk] = []
        for number in chunks:
            start, count = slices[number].start, slices[number].count
            index = None
            if start:
                blocks = (start + count - 1) // self._pool.block_tokens + 1
                index = self._to_device(self._pool.read_index(sequences[number].table[None, :blocks]))
            found.append(PromptChunk(first_row, count, start, index))
            first_row += count
        return tuple(found)

    def _to_device(self, values: NDArray[np.int64] | NDArray[np.bool_]) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


def _scored_rows(
    slices: Sequence[Slice], sequences: Sequence[BatchSequence], members: Sequence[int]
) -> tuple[list[int], tuple[ScoredRun, ...]]:
    """Return the rows after which a token of a prompt comes that has no log probability yet, all and run by run."""
    rows: list[int] = []
    runs: list[ScoredRun] = []
    first_row = 0
    for number in members:
        start, count, sequence = slices[number].start, slices[number].count, sequences[number]
        first, end = max(start + 1, sequence.scored), min(start + count + 1, sequence.prompt_tokens)
        if first < end:
            rows += range(first_row + first - start - 1, first_row + end - start - 1)
            runs.append(ScoredRun(number, first, end - first))
        first_row += count
    return rows, tuple(runs)
