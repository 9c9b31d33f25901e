"""Chooses tokens from logits: greedy at once for a whole step, everything else vectorised over the rows that need it.

Order: logit bias, presence and frequency penalties (over generated tokens), temperature, top-k, top-p (of what top-k left),
min-p. Log probabilities are those of the raw logits. Randomness is a function of (seed, position) alone, so that a sequence
draws the same numbers whatever is in its batch, and when it is computed again.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.engines.base import SliceOutput, TokenLogprobs
from workers.engines.sequences import TokenSequence

#: Most likely tokens that truncation looks at before it sorts the whole vocabulary.
RANKED_TOKENS = 1024
_MASK = (1 << 64) - 1


def sample(logits: Tensor, sequences: Sequence[TokenSequence]) -> list[SliceOutput]:
    """Choose one token for each row of logits [rows, vocabulary] and append it to the row's sequence.

    A row without any usable number fails alone.
    """
    if all(sequence.plain for sequence in sequences):
        best, tokens = logits.max(-1)
        return [_finish(*row) for row in zip(sequences, tokens.tolist(), best.tolist(), strict=True)]
    raw = logits.float()
    adjusted = _adjusted(raw, sequences)
    best, greedy = adjusted.max(-1)
    tokens, best = greedy.tolist(), best.tolist()
    drawn = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0 and math.isfinite(best[row])]
    if drawn:
        for row, token in zip(drawn, _draw(adjusted[drawn], [sequences[row] for row in drawn]), strict=True):
            tokens[row] = token
    reports = _logprobs(raw, tokens, sequences)
    return [_finish(*row) for row in zip(sequences, tokens, best, reports, strict=True)]


def _finish(sequence: TokenSequence, token: int, best: float, logprobs: tuple[TokenLogprobs, ...] = ()) -> SliceOutput:
    if not math.isfinite(best):
        return SliceOutput(failure=f"no token can be chosen: the largest logit is {best}")
    sequence.append(token)
    return SliceOutput(tokens=(token,), logprobs=logprobs, stopped=token in sequence.ending)


def _adjusted(raw: Tensor, sequences: Sequence[TokenSequence]) -> Tensor:
    """Return logits with biases and penalties, a copy if there are any."""
    rows: list[int] = []
    tokens: list[int] = []
    changes: list[float] = []
    for row, sequence in enumerate(sequences):
        sampling = sequence.sampling
        change = {token: bias for token, bias in sampling.logit_bias.items() if 0 <= token < raw.shape[1]}
        for token, count in (sequence.counts or {}).items():
            penalty = sampling.presence_penalty + sampling.frequency_penalty * count
            change[token] = change.get(token, 0.0) - penalty
        rows.extend([row] * len(change))
        tokens.extend(change)
        changes.extend(change.values())
    if not rows:
        return raw
    where = (torch.tensor(rows, device=raw.device), torch.tensor(tokens, device=raw.device))
    return raw.index_put(where, torch.tensor(changes, dtype=raw.dtype, device=raw.device), accumulate=True)


def _draw(logits: Tensor, sequences: Sequence[TokenSequence]) -> list[int]:
    """Draw a token for each row by inverting its cumulative distribution.

    A row's own settings say in which order its tokens stand there, so that it draws the same whatever is in its batch.
    """
    settings = [sequence.sampling for sequence in sequences]
    temperatures = torch.tensor([sampling.temperature for sampling in settings], device=logits.device)
    scaled = logits / temperatures[:, None]
    chances = [uniform(sequence.seed, len(sequence.tokens)) for sequence in sequences]
    uniforms = torch.tensor(chances, dtype=torch.float64, device=logits.device)
    whole = [row for row, sampling in enumerate(settings) if sampling.top_k == 0 and sampling.top_p >= 1 and sampling.min_p <= 0]
    if len(whole) == len(settings):
        return _invert(scaled.softmax(-1), uniforms).tolist()
    ranked, order = _truncated(scaled, sequences)
    drawn = order.gather(1, _invert(ranked, uniforms)[:, None])[:, 0]
    if whole:
        drawn[whole] = _invert(scaled[whole].softmax(-1), uniforms[whole])
    return drawn.tolist()


def _truncated(scaled: Tensor, sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
    """Return the weights of the tokens that truncation leaves (0 for the others), most likely first, and their ids."""
    settings = [sequence.sampling for sequence in sequences]
    vocabulary = scaled.shape[1]
    top_k = torch.tensor([sampling.top_k or vocabulary for sampling in settings], device=scaled.device)[:, None]
    top_p = torch.tensor([sampling.top_p for sampling in settings], device=scaled.device)[:, None]
    min_p = torch.tensor([sampling.min_p for sampling in settings], device=scaled.device)[:, None]
    total = scaled.logsumexp(-1, keepdim=True)
    width = min(vocabulary, RANKED_TOKENS)
    while True:
        values, order = scaled.topk(width, dim=-1)
        chances = (values - total).exp_()
        decided = (top_k <= width) | ((top_p < 1) & (chances.sum(-1, keepdim=True) >= top_p))
        decided |= chances[:, -1:] < min_p * chances[:, :1]
        if width == vocabulary or bool(decided.all()):
            break
        width = vocabulary
    chances.masked_fill_(torch.arange(width, device=scaled.device) >= top_k, 0.0)
    limited = torch.where(top_k < vocabulary, chances.sum(-1, keepdim=True), 1.0)
    before = chances.cumsum(-1) - chances
    keep = (before < top_p * limited) | (top_p >= 1)
    keep[:, 0] = True
    return chances * (keep & (chances >= min_p * chances[:, :1])), order


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return, for each row, the first index where the running sum of weights passes `uniform` of the whole."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    wanted = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, wanted, right=True)[:, 0]


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that is a function of its arguments (SplitMix64)."""
    state = (seed * 0x9E3779B97F4A7C15 + position * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) & _MASK
    for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        state = ((state ^ state >> 30) * multiplier) & _MASK
    return ((state ^ state >> 31) >> 11) * 2.0**-53


def _logprobs(raw: Tensor, tokens: list[int], sequences: Sequence[TokenSequence]) -> list[tuple[TokenLogprobs, ...]]:
    """Return each row's report: one entry, or none if its request wants none."""
    wanted = [row for row, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
    reports: list[tuple[TokenLogprobs, ...]] = [()] * len(tokens)
    if not wanted:
        return reports
    chances = raw[wanted].log_softmax(-1)
    counts = [min(sequences[row].sampling.logprobs or 0, raw.shape[1]) for row in wanted]
    values, ids = (found.tolist() for found in chances.topk(max(counts), dim=-1))
    chosen = chances.gather(1, torch.tensor([[tokens[row]] for row in wanted], device=raw.device))[:, 0].tolist()
    for place, row in enumerate(wanted):
        top = tuple(zip(ids[place], values[place], strict=True))[: counts[place]]
        reports[row] = (TokenLogprobs(chosen[place], top),)
    return reports
