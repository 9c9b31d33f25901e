"""Says what a trace asks of any cluster: tokens a second, contexts, and how much need not be computed for how much KV memory.

How much of a prompt is still held depends on how long unused blocks are kept, and that on the memory there is. Both follow from
the trace alone: with blocks kept for `keep_s` seconds after their last use,

    held tokens      of all blocks used in the last `keep_s` seconds, at a busy moment
    uncached tokens  of a prompt: those whose block was not used in the last `keep_s` seconds

A cache of so many held tokens that forgets the longest unused block keeps blocks about so long: Che, Tung and Wang's
approximation of least-recently-used caches (https://doi.org/10.1109/JSAC.2002.801752).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.sim.names import generated_runs, successors
from orchestrator.traces import TracedTurn

Floats = NDArray[np.float64]
Indexes = NDArray[np.int64]

#: Seconds that unused blocks are kept: the points at which the trade of memory for hits is known, besides keeping all for ever.
KEEPS_S = (0.0, 5.0, 15.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3840.0, float("inf"))
#: The trace's time is cut into so many slices to find its busy moments.
SLICES = 120
#: But into fewer where a slice would have fewer requests than this in the mean.
SLICE_REQUESTS_MIN = 50
#: A busy moment: nine in ten slices ask for less.
BUSY = 0.9
#: Prompts of a sample: each stands for an equal share of all, from the least to the most to compute.
SAMPLE_SIZE = 50


@dataclass(frozen=True, slots=True)
class Prompt:
    """A typical prompt: what is to be computed of it and the context that is held already."""

    uncached_tokens: float
    cached_tokens: float


@dataclass(frozen=True, slots=True)
class Held:
    """What keeping unused blocks for some time costs in memory, and what it saves."""

    keep_s: float
    #: KV tokens held at a busy moment.
    tokens: float
    #: Share of all prompt tokens that need not be computed.
    hit_rate: float
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Demand:
    """What the trace asks of a cluster. Rates are those of a busy moment, not the mean."""

    requests: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    #: Context of a generated token, mean over all of them.
    context_tokens: float
    #: Longest prompt plus answer.
    context_tokens_max: int
    #: Variance over squared mean of the time between arrivals; 1 if they are independent of each other.
    arrival_scv: float
    #: By keeping time, ascending; the last keeps all for ever.
    held: tuple[Held, ...]

    def with_memory(self, tokens: float) -> Held:
        """Return what a cache of so many tokens holds: the longest keeping time that fits, the shortest if none does."""
        fitting = [held for held in self.held if held.tokens <= tokens]
        return fitting[-1] if fitting else self.held[0]


def demand_of(turns: Sequence[TracedTurn]) -> Demand:
    """Return what a trace asks, taking its arrivals as they were recorded."""
    arrivals = np.array([turn.arrival_s for turn in turns])
    inputs = np.array([turn.input_tokens for turn in turns], dtype=np.float64)
    outputs = np.array([turn.output_tokens for turn in turns], dtype=np.float64)
    duration_s = max(float(arrivals.max() - arrivals.min()), 1.0)
    busy = _busy(arrivals, np.ones(len(turns)))
    gaps = np.diff(np.sort(arrivals))
    mean_gap_s = float(gaps.mean()) if len(gaps) else 0.0
    return Demand(
        requests=len(turns),
        duration_s=duration_s,
        requests_per_s=busy * len(turns) / duration_s,
        output_tokens_per_s=_busy(arrivals, outputs) * float(outputs.sum()) / duration_s,
        context_tokens=float((outputs * (inputs + outputs / 2)).sum() / max(outputs.sum(), 1.0)),
        context_tokens_max=int((inputs + outputs).max()),
        arrival_scv=float(gaps.var()) / mean_gap_s**2 if mean_gap_s else 1.0,
        held=_held(turns, arrivals, inputs),
    )


def _busy(arrivals: Floats, weights: Floats) -> float:
    """Return what a busy slice asks over what the mean slice asks, 1 or more.

    Slices with few requests differ by chance alone, and would make few requests look like bursts.
    """
    since_s = arrivals - arrivals.min()
    count = min(SLICES, max(1, len(arrivals) // SLICE_REQUESTS_MIN))
    slices = np.minimum(since_s * count / max(float(since_s.max()), 1.0), count - 1).astype(np.int64)
    asked = np.bincount(slices, weights=weights, minlength=count)
    mean = float(asked.mean())
    return max(1.0, float(np.quantile(asked, BUSY)) / mean) if mean else 1.0


def _held(turns: Sequence[TracedTurn], arrivals: Floats, inputs: Floats) -> tuple[Held, ...]:
    """Return the trade of memory for hits."""
    uses = _Uses(turns)
    end_s = float(arrivals.max())
    found: list[Held] = []
    for keep_s in KEEPS_S:
        hits = uses.hits(len(turns), keep_s)
        cached = np.minimum(hits, np.maximum(inputs - 1, 0))
        hit_rate = float(cached.sum() / max(inputs.sum(), 1.0))
        held = Held(keep_s, uses.tokens_held(keep_s, end_s), hit_rate, _sample(inputs - cached, cached))
        found.append(held)
    return tuple(found)


def _sample(uncached: Floats, cached: Floats) -> tuple[Prompt, ...]:
    """Return the means of equal shares of all prompts, ordered by what is to be computed."""
    order = np.lexsort((cached, uncached))
    shares = [share for share in np.array_split(order, SAMPLE_SIZE) if len(share)]
    return tuple(Prompt(float(uncached[share].mean()), float(cached[share].mean())) for share in shares)


class _Uses:
    """Every use of every run of blocks: when, for how many tokens, in which prompt, and how long after the use before.

    Block names are cut at every point where any run begins or ends; what lies between two cuts is always used together.
    """

    __slots__ = ("_since_s", "_times_s", "_tokens", "_turns")

    def __init__(self, turns: Sequence[TracedTurn]) -> None:
        after = successors(turns)
        answers = [generated_runs(turn, after.get(turn.id)) for turn in turns]
        cuts = _cuts(run for turn, answer in zip(turns, answers, strict=True) for run in (*turn.block_runs, *answer))
        sizes = np.diff(cuts).astype(np.float64) if len(cuts) else np.zeros(0)
        latest = np.full(len(sizes), -np.inf)
        times: list[Floats] = []
        since: list[Floats] = []
        tokens: list[Floats] = []
        indexes: list[Indexes] = []
        for index, (turn, answer) in enumerate(zip(turns, answers, strict=True)):
            for runs, is_prompt in ((turn.block_runs, True), (answer, False)):
                pieces = _pieces(runs, cuts)
                if not len(pieces):
                    continue
                times.append(np.full(len(pieces), turn.arrival_s))
                since.append(turn.arrival_s - latest[pieces])
                tokens.append(sizes[pieces] * turn.block_tokens)
                indexes.append(np.full(len(pieces), index if is_prompt else -1))
                latest[pieces] = turn.arrival_s
        self._times_s = np.concatenate(times) if times else np.zeros(0)
        #: Seconds since the use before; infinite at the first.
        self._since_s = np.concatenate(since) if since else np.zeros(0)
        self._tokens = np.concatenate(tokens) if tokens else np.zeros(0)
        #: Index of the prompt that used it; -1 where an answer filled it.
        self._turns = np.concatenate(indexes) if indexes else np.zeros(0, dtype=np.int64)

    def hits(self, turns: int, keep_s: float) -> Floats:
        """Return each prompt's tokens that were used in the last `keep_s` seconds: its beginning, as a prefix is used whole."""
        kept = (self._turns >= 0) & (self._since_s <= keep_s) & np.isfinite(self._since_s)
        return np.bincount(self._turns[kept], weights=self._tokens[kept], minlength=turns).astype(np.float64)

    def tokens_held(self, keep_s: float, end_s: float) -> float:
        """Return the tokens used in the last `keep_s` seconds, at a busy moment."""
        if not len(self._times_s) or not keep_s:
            return 0.0
        moments = np.linspace(float(self._times_s.min()), end_s, SLICES + 1)[1:]
        forgotten_s = self._times_s + keep_s
        held = _sum_until(moments, self._times_s, self._tokens) - _sum_until(moments, forgotten_s, self._tokens)
        # What is used again in time is not held twice: its earlier use ends now and not when it would have been forgotten.
        renewed = self._since_s < keep_s
        used_s, sizes = self._times_s[renewed], self._tokens[renewed]
        held -= _sum_until(moments, used_s, sizes)
        held += _sum_until(moments, used_s - self._since_s[renewed] + keep_s, sizes)
        return float(np.quantile(held, BUSY))


def _sum_until(moments: Floats, times: Floats, weights: Floats) -> Floats:
    """Return, for each moment, the weights of what happened until then."""
    order = np.argsort(times, kind="stable")
    sums = np.concatenate(([0.0], np.cumsum(weights[order])))
    return sums[np.searchsorted(times[order], moments, side="right")]


def _cuts(runs: Iterable[tuple[int, int]]) -> Indexes:
    """Return every name at which a run begins, or ends before it; ascending."""
    ends = [bound for first, count in runs for bound in (first, first + count)]
    return np.unique(np.array(ends, dtype=np.int64))


def _pieces(runs: Iterable[tuple[int, int]], cuts: Indexes) -> Indexes:
    """Return the indexes of the pieces between cuts that make up some runs."""
    pieces: list[Indexes] = [np.zeros(0, dtype=np.int64)]
    for first, count in runs:
        low, high = np.searchsorted(cuts, (first, first + count))
        pieces.append(np.arange(low, high, dtype=np.int64))
    return np.concatenate(pieces)
