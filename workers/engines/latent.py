"""Latent attention of one layer (MLA, arXiv 2405.04434): one vector a token is kept for the keys and values of all heads.

What is kept of a token: its latent, normalised to length 1, and a key that all heads share and that turns with the position. Two
ways to the same result:

- *absorbed*: queries are projected into the space of latents, and what is attended to is projected out of it. Latents are read as
  they lie, once for all heads. For decodes, and for few tokens after a long context.
- *expanded*: keys and values of all heads are computed from latents, some heads at a time. Products of queries and keys then are
  less than half as wide: for prompts.
"""

import torch
from torch import Tensor
from torch.nn import functional

from workers.engines.attention import MASK_ENTRIES_MAX, causal_mask
from workers.engines.batch import PromptChunk, StepBatch
from workers.engines.decodes import Decodes
from workers.engines.kvpool import KvPool
from workers.engines.loader import Loader

#: Bytes of expanded keys and values at a time; those of one head may be more.
EXPANDED_BYTES_MAX = 64 * 1024 * 1024


class LatentAttention:
    """All heads attend to the same latents."""

    def __init__(self, loader: Loader, prefix: str, gain: Tensor | None) -> None:
        """Load the projections named `prefix`; `gain` is what their inputs have to be multiplied by."""
        shape, latent = loader.shape, loader.shape.latent
        assert latent is not None
        self._heads, self._scale = shape.heads, shape.score_scale
        self._rank, self._turned = latent.kv_rank, latent.rope_dim
        self._plain, self._value = latent.nope_dim, latent.value_dim
        #: To (compressed) queries, latents and shared keys, side by side.
        self._inputs = loader.latent_inputs(prefix, gain)
        self._from_compressed = loader.compressed_queries(prefix) if latent.query_rank else None
        #: [heads, key dimensions that do not turn, latent] and [heads, latent, value dimension].
        self._latent_norm, self._keys, self._values = loader.latents(prefix)

    def attend(self, normed: Tensor, rotation: Tensor, batch: StepBatch, pool: KvPool, layer: int) -> Tensor:
        """Return [rows, heads x value dimension] of rows [rows, hidden]; what is kept of them goes into the pool."""
        queries, kept = self._project(normed, rotation)
        pool.write(layer, batch.write_index, kept[: batch.tokens].unsqueeze(1))
        attended = queries.new_zeros(batch.rows, self._heads, self._value)
        if batch.decodes is not None:
            attended[: batch.decode_rows] = self._decode(queries[: batch.decode_rows], batch.decodes, layer)
        for chunk in batch.chunks:
            part = slice(chunk.first_row, chunk.first_row + chunk.count)
            self._attend_chunk(queries[part], kept[part], chunk, pool, layer, attended[part])
        return attended.view(batch.rows, -1)

    def _project(self, normed: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries [rows, heads, key dimension] and what is kept [rows, latent and shared key], both turned."""
        rows = self._inputs(normed)
        width = self._rank + self._turned
        queries, kept = rows.split((rows.shape[1] - width, width), dim=1)
        if self._from_compressed is not None:
            norm, expand = self._from_compressed
            queries = expand(norm(queries.float()))
        queries = queries.view(len(rows), self._heads, -1)
        turned = torch.empty(len(rows), self._heads + 1, self._turned, device=rows.device)
        turned[:, :-1], turned[:, -1] = queries[..., self._plain :], kept[:, self._rank :]
        torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(rotation)
        queries[..., self._plain :], kept[:, self._rank :] = turned[:, :-1], turned[:, -1]
        kept[:, : self._rank] = self._latent_norm(kept[:, : self._rank].float())
        return queries, kept

    def _decode(self, queries: Tensor, decodes: Decodes, layer: int) -> Tensor:
        """Attend the rows of sequences that have few: [count, heads, value dimension]."""
        sums = queries.new_empty(len(queries), self._heads, self._rank)
        decodes.attend(self._absorbed(queries).flatten(1), sums, layer, self._scale)
        return self._values_of(sums)

    def _attend_chunk(
        self, queries: Tensor, kept: Tensor, chunk: PromptChunk, pool: KvPool, layer: int, attended: Tensor
    ) -> None:
        """Attend a run of one sequence's tokens; fills `attended` [count, heads, value dimension]."""
        if chunk.index is None:
            self._attend_expanded(queries, kept, 0, attended)
            return
        latents = pool.read(layer, chunk.index, 1)[0, 0, : chunk.start + chunk.count]
        if self._expands(chunk):
            self._attend_expanded(queries, latents, chunk.start, attended)
        else:
            self._attend_absorbed(queries, latents, chunk.start, attended)

    def _expands(self, chunk: PromptChunk) -> bool:
        """Tell whether the multiplications that expanded products spare are more than those that expand the context."""
        pairs = chunk.count * (chunk.start + chunk.count / 2)
        spared = 2 * self._rank - self._plain - self._value
        return pairs * spared > chunk.start * self._rank * (self._plain + self._value)

    def _attend_absorbed(self, queries: Tensor, latents: Tensor, start: int, attended: Tensor) -> None:
        absorbed = self._absorbed(queries)
        piece = max(1, MASK_ENTRIES_MAX // (len(latents) * self._heads))
        for first in range(0, len(queries), piece):
            end = min(first + piece, len(queries))
            seen = start + end
            mask = causal_mask(start + first, end - first, seen, queries).repeat_interleave(self._heads, 0)
            rows = absorbed[first:end].view(1, -1, absorbed.shape[-1])
            sums = self._sums(rows, latents[:seen].unsqueeze(0), mask.unsqueeze(0))
            attended[first:end] = self._values_of(sums.view(end - first, self._heads, -1))

    def _attend_expanded(self, queries: Tensor, latents: Tensor, start: int, attended: Tensor) -> None:
        # The fast products of PyTorch want values as wide as keys.
        width = max(self._plain + self._turned, self._value)
        queries = _padded(queries.transpose(0, 1), width)
        together = max(1, EXPANDED_BYTES_MAX // (2 * len(latents) * width * latents.itemsize))
        for head in range(0, self._heads, together):
            heads = slice(head, min(head + together, self._heads))
            keys, values = self._expand(latents, heads, width)
            self._attend_heads(queries[heads], keys, values, start, attended[:, heads])

    def _expand(self, latents: Tensor, heads: slice, width: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of some heads, [heads, tokens, width] each."""
        values = _padded(torch.matmul(latents[:, : self._rank], self._values[heads]), width)
        keys = latents.new_zeros(values.shape)
        keys[..., : self._plain] = torch.matmul(latents[:, : self._rank], self._keys[heads].transpose(1, 2))
        keys[..., self._plain : self._plain + self._turned] = latents[:, self._rank :]
        return keys, values

    def _attend_heads(self, queries: Tensor, keys: Tensor, values: Tensor, start: int, attended: Tensor) -> None:
        """Fill `attended` [count, heads, value dimension] from [heads, tokens, width] each."""
        piece = queries.shape[1] if start == 0 else max(1, MASK_ENTRIES_MAX // keys.shape[1])
        for first in range(0, queries.shape[1], piece):
            end = min(first + piece, queries.shape[1])
            seen = start + end
            mask = causal_mask(start + first, end - first, seen, queries) if start else None
            found = functional.scaled_dot_product_attention(
                queries[None, :, first:end],
                keys[None, :, :seen],
                values[None, :, :seen],
                attn_mask=mask,
                is_causal=mask is None,
                scale=self._scale,
            )
            attended[first:end] = found[0, :, :, : self._value].transpose(0, 1)

    def _absorbed(self, queries: Tensor) -> Tensor:
        """Return queries as they meet latents and shared keys: [count, heads, latent and shared key]."""
        absorbed = queries.new_empty(len(queries), self._heads, self._rank + self._turned)
        absorbed[..., : self._rank] = torch.bmm(queries[..., : self._plain].transpose(0, 1), self._keys).transpose(0, 1)
        absorbed[..., self._rank :] = queries[..., self._plain :]
        return absorbed

    def _sums(self, queries: Tensor, latents: Tensor, mask: Tensor) -> Tensor:
        """Return the sums of latents that queries [sequences, queries, ..] see in [sequences, tokens, ..]."""
        queries, keys = queries * self._scale, latents.transpose(1, 2)
        return torch.bmm(torch.baddbmm(mask, queries, keys).softmax(-1), latents[..., : self._rank])

    def _values_of(self, sums: Tensor) -> Tensor:
        """Return [count, heads, value dimension] of sums of latents [count, heads, latent]."""
        return torch.bmm(sums.transpose(0, 1), self._values).transpose(0, 1)


def _padded(rows: Tensor, width: int) -> Tensor:
    return rows if rows.shape[-1] == width else functional.pad(rows, (0, width - rows.shape[-1]))
