"""Chooses tokens from logits: greedy at once for a whole step, everything else vectorised over the rows that need it.

Order: logit bias, repetition penalty (over prompt and generated tokens), presence and frequency penalties (over generated
ones), what must not come, what a grammar lets come, temperature, top-k, top-p (of what top-k left), min-p. Where thoughts are as
long as they may be their end comes, whatever else might. Log probabilities are those of the raw logits. Randomness is a function
of (seed, position) alone, so that a sequence draws the same numbers whatever is in its batch, and when it is computed again.
"""

import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.core.types import Sampling
from workers.engines.base import PromptScores, SliceOutput, TokenLogprobs
from workers.engines.grammars import Masks
from workers.engines.sequences import TokenSequence

#: Most likely tokens that truncation looks at before it sorts the whole vocabulary.
RANKED_TOKENS = 1024
#: Rows of a prompt whose log probabilities are made at once: each takes some copies of its logits.
SCORED_ROWS = 128
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of logits: a sequence's next token, if as many of its drafts as are `ahead` of it are right."""

    sequence: TokenSequence
    ahead: int

    @property
    def position(self) -> int:
        """How many tokens there are before it."""
        return len(self.sequence.tokens) - self.sequence.drafted + self.ahead

    @property
    def counts(self) -> Mapping[int, int]:
        """How often each token was generated before it; empty if no penalty needs it."""
        counts, position = self.sequence.counts, self.position
        if counts is None or not self.ahead:
            return counts or {}
        return Counter(counts) + Counter(self.sequence.tokens[position - self.ahead : position])

    @property
    def seen(self) -> NDArray[np.bool_] | None:
        """Which tokens there are before it; None if no penalty needs it."""
        seen, position = self.sequence.seen, self.position
        if seen is None or not self.ahead:
            return seen
        seen = seen.copy()
        seen[self.sequence.tokens[position - self.ahead : position]] = True
        return seen


def sample(logits: Tensor, sequences: Sequence[TokenSequence], masks: Masks | None = None) -> list[SliceOutput]:
    """Choose tokens from logits [rows, vocabulary] and append them to the sequences: one, and one more for each right draft.

    Each sequence has one row, and one more for each of its drafts. What is chosen in a row depends on nothing but what is before
    it, so that a draft is right if it is what would have been chosen, and tokens are those that steps of one token each bring.
    A sequence whose first row has no usable number fails alone. With `masks` the logits may be changed.
    """
    if all(sequence.plain for sequence in sequences):
        logits = masks.apply(logits) if masks is not None else logits
        best, tokens = (found.tolist() for found in logits.max(-1))
        _limit_thoughts(tokens, sequences)
        return _finish_all(sequences, tokens, best)
    raw = logits.float()
    rows = [_Row(sequence, ahead) for sequence in sequences for ahead in range(1 + sequence.drafted)]
    adjusted = _adjusted(raw, rows)
    if masks is not None:
        adjusted = masks.apply(adjusted.clone() if adjusted is raw else adjusted)
    best, greedy = adjusted.max(-1)
    tokens, best = greedy.tolist(), best.tolist()
    drawn = [number for number, row in enumerate(rows) if row.sequence.sampling.temperature > 0 and math.isfinite(best[number])]
    if drawn:
        for number, token in zip(drawn, _draw(adjusted[drawn], [rows[number] for number in drawn]), strict=True):
            tokens[number] = token
    _limit_thoughts(tokens, sequences)
    return _finish_all(sequences, tokens, best, _logprobs(raw, tokens, [row.sequence for row in rows]))


def _limit_thoughts(tokens: list[int], sequences: Sequence[TokenSequence]) -> None:
    """Put others in the place of tokens with which thoughts would be longer than they may be."""
    row = 0
    for sequence in sequences:
        if (thoughts := sequence.thoughts) is not None:
            for ahead in range(1 + sequence.drafted):
                tokens[row + ahead] = thoughts.kept(tokens[row + ahead], sequence.tokens, sequence.drafted, ahead)
        row += 1 + sequence.drafted


def _finish_all(
    sequences: Sequence[TokenSequence], tokens: list[int], best: list[float], reports: Sequence[tuple[TokenLogprobs, ...]] = ()
) -> list[SliceOutput]:
    outputs: list[SliceOutput] = []
    end = 0
    for sequence in sequences:
        first, end = end, end + 1 + sequence.drafted
        outputs.append(_finish(sequence, tokens[first:end], best[first:end], reports[first:end]))
    return outputs


def _finish(
    sequence: TokenSequence, tokens: list[int], best: list[float], reports: Sequence[tuple[TokenLogprobs, ...]]
) -> SliceOutput:
    """Take a sequence's tokens as far as its drafts were right, none is an end, and there are numbers to choose by."""
    drafts = sequence.take_drafts() if sequence.drafted else ()
    if sequence.walk is not None and sequence.walk.failure is not None:
        return SliceOutput(failure=sequence.walk.failure)
    if not math.isfinite(best[0]):
        return SliceOutput(failure=f"no token can be chosen: the largest logit is {best[0]}")
    count = 1
    while count <= len(drafts) and tokens[count - 1] == drafts[count - 1] and math.isfinite(best[count]):
        if tokens[count - 1] in sequence.ending:
            break
        count += 1
    chosen = tuple(tokens[:count])
    for token in chosen:
        sequence.append(token)
    logprobs = tuple([one for report in reports[:count] for one in report])
    return SliceOutput(tokens=chosen, logprobs=logprobs, stopped=chosen[-1] in sequence.ending, drafted=len(drafts))


def _adjusted(raw: Tensor, rows: Sequence[_Row]) -> Tensor:
    """Return logits with biases and penalties and without what must not come, a copy if there is any of these."""
    logits = _added(raw, [row.sequence.sampling.logit_bias for row in rows])
    logits = _less_repeated(logits, rows)
    logits = _added(logits, [_penalties(row) for row in rows])
    logits = _added(logits, [dict.fromkeys(_forbidden(row), -math.inf) for row in rows])
    barred = [(number, row.sequence.barred) for number, row in enumerate(rows)]
    return _replaced(logits, {number: logits[number] + _tensor(mask, logits) for number, mask in barred if mask is not None})


def _added(logits: Tensor, changes: Sequence[Mapping[int, float]]) -> Tensor:
    """Return logits with what is to be added to each row's, by token."""
    numbers = [number for number, change in enumerate(changes) for _ in change]
    if not numbers:
        return logits
    tokens = [token for change in changes for token in change]
    values = [value for change in changes for value in change.values()]
    where = (torch.tensor(numbers, device=logits.device), torch.tensor(tokens, device=logits.device))
    return logits.index_put(where, torch.tensor(values, dtype=logits.dtype, device=logits.device), accumulate=True)


def _less_repeated(logits: Tensor, rows: Sequence[_Row]) -> Tensor:
    """Return logits in which tokens that came before are less likely, as `transformers` has it."""
    changed: dict[int, Tensor] = {}
    for number, row in enumerate(rows):
        if (seen := row.seen) is not None:
            one, penalty = logits[number], row.sequence.sampling.repetition_penalty
            changed[number] = torch.where(_tensor(seen, logits), torch.where(one < 0, one * penalty, one / penalty), one)
    return _replaced(logits, changed)


def _penalties(row: _Row) -> dict[int, float]:
    sampling = row.sequence.sampling
    return {token: -(sampling.presence_penalty + sampling.frequency_penalty * count) for token, count in row.counts.items()}


def _forbidden(row: _Row) -> set[int]:
    """Return tokens that must not come: ends before there is enough, and what would complete a forbidden run."""
    sequence, position = row.sequence, row.position
    sampling = sequence.sampling
    early = position - sequence.prompt_tokens < sampling.output_tokens_min
    forbidden = set(sequence.ending) if early else set[int]()
    for *before, last in sampling.forbidden_runs:
        if len(before) <= position and sequence.tokens[position - len(before) : position].tolist() == before:
            forbidden.add(last)
    return forbidden


def _replaced(logits: Tensor, rows: Mapping[int, Tensor]) -> Tensor:
    """Return logits with some rows in place of others; the same if there are none."""
    if not rows:
        return logits
    logits = logits.clone()
    for number, row in rows.items():
        logits[number] = row
    return logits


def _tensor(values: NDArray[np.bool_] | NDArray[np.float32], beside: Tensor) -> Tensor:
    return torch.from_numpy(values).to(beside.device)


def _draw(logits: Tensor, rows: Sequence[_Row]) -> list[int]:
    """Draw a token for each row by inverting its cumulative distribution.

    A row's own settings say in which order its tokens stand there, so that it draws the same whatever is in its batch.
    """
    settings = [row.sequence.sampling for row in rows]
    temperatures = torch.tensor([sampling.temperature for sampling in settings], device=logits.device)
    scaled = logits / temperatures[:, None]
    chances = [uniform(row.sequence.seed, row.position) for row in rows]
    uniforms = torch.tensor(chances, dtype=torch.float64, device=logits.device)
    whole = [row for row, sampling in enumerate(settings) if sampling.top_k == 0 and sampling.top_p >= 1 and sampling.min_p <= 0]
    if len(whole) == len(settings):
        return _invert(scaled.softmax(-1), uniforms).tolist()
    ranked, order = _truncated(scaled, settings)
    drawn = order.gather(1, _invert(ranked, uniforms)[:, None])[:, 0]
    if whole:
        drawn[whole] = _invert(scaled[whole].softmax(-1), uniforms[whole])
    return drawn.tolist()


def _truncated(scaled: Tensor, settings: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """Return the weights of the tokens that truncation leaves (0 for the others), most likely first, and their ids."""
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


def score(logits: Tensor, sequence: TokenSequence, first: int) -> PromptScores:
    """Return the log probabilities of tokens of a prompt from `first` on, from the logits [tokens, vocabulary] before each."""
    most = min(sequence.sampling.prompt_logprobs or 0, logits.shape[1])
    logprobs, ranks, top_tokens, top_logprobs = array("f"), array("I"), array("I"), array("f")
    for rows in logits.split(SCORED_ROWS):
        start = first + len(logprobs)
        tokens = torch.tensor(sequence.tokens[start : start + len(rows)].tolist(), device=rows.device)
        chances = rows.float().log_softmax(-1)
        chosen = chances.gather(1, tokens[:, None])
        values, ids = chances.topk(most, dim=-1)
        logprobs.extend(chosen[:, 0].tolist())
        ranks.extend((chances >= chosen).sum(-1).tolist())
        top_tokens.extend(ids.flatten().tolist())
        top_logprobs.extend(values.flatten().tolist())
    sequence.scored = first + len(logprobs)
    return PromptScores(first, logprobs, ranks, top_tokens, top_logprobs)


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
