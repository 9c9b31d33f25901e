"""Fits a cost profile to the steps in a node's journal: what the node's own clock says, thread hops and frames included.

A step lasts from the event at which the core ordered it to the event that ended it. The engine's share is known to the
microsecond, the whole only as finely as the loop's clock ticks (uvloop: a millisecond), so that the rest is averaged over all
steps of as many sequences. Steps of one kind (prompt tokens, sequences, contexts) are represented by their median, every kind
counts alike, and errors count relative to the step's length. All coefficients are kept from being negative, and the curve over a
step's tokens from falling.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median, quantiles

import msgspec
import numpy as np
from numpy.typing import NDArray

from orchestrator.core.commands import RunStep
from orchestrator.core.cost.costs import step_seconds
from orchestrator.core.events import StepFinished
from orchestrator.core.types import CostProfile
from orchestrator.wire.journal import Entry

#: A knot of the curve is this much above the one before but for the last, and has a kind of step of exactly so many tokens.
KNOT_RATIO = 1.6
#: Contexts within this ratio are of one kind.
CONTEXT_RATIO = 1.15

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step as its node saw it."""

    #: (prompt tokens computed, context before them) of each chunk.
    prefills: tuple[tuple[int, int], ...]
    #: Sequences that decoded, and the context of all of them.
    sequences: int
    context_tokens: int
    #: Of the engine alone, and from order to answer.
    engine_s: float
    seconds: float

    @property
    def slices(self) -> int:
        return self.sequences + len(self.prefills)

    @property
    def tokens(self) -> int:
        return self.sequences + sum(count for count, _ in self.prefills)

    @property
    def attended(self) -> float:
        """Pairs of a prompt token and a token before it."""
        return sum(count * (context + count / 2) for count, context in self.prefills)

    def predicted_s(self, profile: CostProfile) -> float:
        return step_seconds(profile, self.prefills, self.sequences, self.context_tokens)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A profile and how well it tells the steps it was made from: predicted over measured time of each kind."""

    profile: CostProfile
    kinds: int
    steps: int
    ratio_p10: float
    ratio_p50: float
    ratio_p90: float


def steps_of(entries: Iterable[Entry]) -> list[Step]:
    """Return the steps in a node's journal that ended well."""
    decoder = msgspec.msgpack.Decoder(RunStep)
    steps: list[Step] = []
    running: tuple[float, RunStep] | None = None
    for entry in entries:
        if isinstance(entry.event, StepFinished) and running is not None:
            steps.append(_step(running[1], entry.event.seconds, entry.now - running[0]))
            running = None
        for name, command in entry.commands or ():
            if name == RunStep.__name__:
                running = entry.now, decoder.decode(command)
    return steps


def _step(command: RunStep, engine_s: float, seconds: float) -> Step:
    decoding = command.slices[: command.decoding]
    chunks = command.slices[command.decoding :]
    prefills = tuple((part.count, part.start) for part in chunks)
    return Step(prefills, len(decoding), sum(part.start for part in decoding), engine_s, seconds)


def fit(steps: Sequence[Step]) -> Fitted:
    """Return the profile that tells the steps best. Needs steps of several lengths, batches and contexts."""
    base_s, slice_s = handling(steps)
    kinds = [replace(step, seconds=step.engine_s + base_s + slice_s * step.slices) for step in _kinds(steps)]
    knots = _knots(sorted({step.tokens for step in kinds}))
    rows = np.array([_row(step, knots) for step in kinds])
    seconds = np.array([step.seconds for step in kinds])
    found = nonnegative_least_squares(rows / seconds[:, None], np.ones(len(kinds)))
    curve = np.cumsum(found[3:])
    profile = CostProfile(
        sequence_s=rounded(found[0]),
        context_token_s=rounded(found[1]),
        prefill_token_context_s=rounded(found[2]),
        batch_tokens=tuple(knots),
        batch_s=tuple(rounded(value) for value in curve),
    )
    ratios = quantiles([step.predicted_s(profile) / step.seconds for step in kinds], n=10)
    return Fitted(profile, len(kinds), len(steps), ratios[0], ratios[4], ratios[8])


def handling(steps: Sequence[Step]) -> tuple[float, float]:
    """Return the seconds that a step takes beyond its engine's: for itself, and for each sequence in it.

    Of each number of sequences the mean counts, without the tenth at either end: medians of a coarse clock are whole ticks.
    """
    rests: dict[int, list[float]] = {}
    for step in steps:
        rests.setdefault(step.slices, []).append(step.seconds - step.engine_s)
    means = [(slices, _trimmed_mean(found), len(found)) for slices, found in rests.items()]
    rows = np.array([[1.0, slices] for slices, _, _ in means])
    weights = np.sqrt(np.array([count for _, _, count in means], dtype=float))
    base_s, slice_s = nonnegative_least_squares(rows * weights[:, None], np.array([mean for _, mean, _ in means]) * weights)
    return float(base_s), float(slice_s)


def _trimmed_mean(values: Sequence[float]) -> float:
    cut = len(values) // 10
    return fmean(sorted(values)[cut : len(values) - cut])


def _kinds(steps: Sequence[Step]) -> list[Step]:
    """Return one step of each kind, of the median length."""
    found: dict[tuple[int, ...], list[Step]] = {}
    for step in steps:
        if step.tokens and step.engine_s > 0.0:
            prompt = step.tokens - step.sequences
            key = prompt, step.sequences, _bucket(step.context_tokens), _bucket(step.attended)
            found.setdefault(key, []).append(step)
    return [_middle(alike) for alike in found.values()]


def _middle(alike: Sequence[Step]) -> Step:
    """Return the step that stands nearest to the median length."""
    length = median(step.engine_s for step in alike)
    return min(alike, key=lambda step: abs(step.engine_s - length))


def _bucket(value: float) -> int:
    return int(np.log(value) / np.log(CONTEXT_RATIO)) if value >= 1 else -1


def _knots(tokens: Sequence[int]) -> list[int]:
    knots = [tokens[0]]
    for count in tokens:
        if count >= knots[-1] * KNOT_RATIO:
            knots.append(count)
    return knots if knots[-1] == tokens[-1] else [*knots, tokens[-1]]


def _row(step: Step, knots: Sequence[int]) -> list[float]:
    """Return what each coefficient is multiplied with: three of attention, the curve's start, the rise to each next knot."""
    rises = [(step.tokens - low) / (high - low) for low, high in pairwise(knots)]
    # The last slope goes on after the last knot.
    clipped = [min(max(rise, 0.0), 1.0) for rise in rises[:-1]] + [max(rise, 0.0) for rise in rises[-1:]]
    return [step.sequences, step.context_tokens, step.attended, 1.0, *clipped]


def nonnegative_least_squares(rows: Matrix, wanted: Matrix) -> Matrix:
    """Return x >= 0 with the least |rows @ x - wanted|, by Lawson and Hanson's active set method.

    C. L. Lawson, R. J. Hanson, Solving Least Squares Problems, 1974, chapter 23.
    """
    count = rows.shape[1]
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0.0] = 1.0
    rows = rows / scale
    chosen = np.zeros(count, dtype=bool)
    found = np.zeros(count)
    for _ in range(10 * count):
        gradient = rows.T @ (wanted - rows @ found)
        gradient[chosen] = -np.inf
        if chosen.all() or gradient.max() <= 1e-10:
            break
        chosen[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(count)
            trial[chosen] = np.linalg.lstsq(rows[:, chosen], wanted, rcond=None)[0]
            bad = chosen & (trial <= 0.0)
            if not bad.any():
                found = trial
                break
            step = float(np.min(found[bad] / np.maximum(found[bad] - trial[bad], 1e-300)))
            found = found + step * (trial - found)
            chosen &= found > 1e-15
            found[~chosen] = 0.0
    return found / scale


def rounded(value: float) -> float:
    """Keep four digits: more would be noise."""
    return float(f"{value:.4g}")
