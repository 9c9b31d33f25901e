"""What a simulated run amounted to: every request's times, every pool's use, the gaps between tokens.

Filled by `world.py`; `runs.py` makes the figures of it that people read.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import exp, log

from orchestrator.core.types import Load, NodeId, PoolName
from orchestrator.sim.halves import SplitUse
from orchestrator.traces import TracedTurn

#: Logarithmic buckets are this much wider than the one before: a percentile is off by half of it at most.
BUCKET_RATIO = 1.005


@dataclass(slots=True)
class Served:
    """One request's way through the cluster. Times are seconds of virtual time from the start."""

    turn: TracedTurn
    arrived_s: float
    #: When its first token reached the gateway; None if none did.
    first_token_s: float | None = None
    #: When it was over, well or not; None while it is under way.
    ended_s: float | None = None
    #: Prompt tokens that were not computed, and those of them that a store had in `cpu` or in `cmx`.
    cached_tokens: int = 0
    cpu_tokens: int = 0
    cmx_tokens: int = 0
    output_tokens: int = 0
    #: The node that generated, and the one that computed the prompt if that was another.
    node: NodeId | None = None
    prefill: NodeId | None = None
    #: Why it did not complete; None if it did.
    failure: str | None = None
    #: Times it was started over on other nodes.
    restarts: int = 0
    #: Times it went on elsewhere after it had brought tokens, and how many of those nodes were given for that, in all.
    resumes: int = 0
    replayed_tokens: int = 0

    @property
    def completed(self) -> bool:
        return self.ended_s is not None and self.failure is None

    @property
    def ttft_s(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second after the first one, what a user calls speed; None with fewer than two tokens."""
        if self.ended_s is None or self.first_token_s is None or self.output_tokens < 2:
            return None
        seconds = self.ended_s - self.first_token_s
        return (self.output_tokens - 1) / seconds if seconds > 0 else None


class Distribution:
    """Counts of positive values in logarithmic buckets: any number of them in little room, percentiles to 0.25 %."""

    __slots__ = ("_counts", "total", "weight")

    def __init__(self) -> None:
        self._counts: dict[int, float] = {}
        self.weight = 0.0
        self.total = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        """Count a value `weight` times; values of zero or less count as the smallest."""
        bucket = int(log(value) / log(BUCKET_RATIO) // 1) if value > 0 else -100_000
        self._counts[bucket] = self._counts.get(bucket, 0.0) + weight
        self.weight += weight
        self.total += value * weight

    def percentile(self, share: float) -> float:
        """Return the value below which `share` (0 to 1) of all lie; 0.0 without any."""
        wanted, seen = share * self.weight, 0.0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= wanted:
                return exp((bucket + 0.5) * log(BUCKET_RATIO)) if bucket > -100_000 else 0.0
        return 0.0

    def buckets(self) -> Iterable[tuple[float, float]]:
        """Yield (middle of a bucket, its weight), ascending."""
        for bucket in sorted(self._counts):
            yield exp((bucket + 0.5) * log(BUCKET_RATIO)) if bucket > -100_000 else 0.0, self._counts[bucket]


@dataclass(frozen=True, slots=True)
class PoolSample:
    """All nodes of a pool at one moment, summed."""

    at_s: float
    running: int
    waiting: int
    blocks_used: int
    blocks_cached: int
    blocks_free: int


@dataclass(slots=True)
class BeatUse:
    """What the nodes of a pool that keeps a beat did in their beats."""

    beat_s: float
    #: Beats with anybody in a slot, those whose work was longer than the beat, and the seconds of work of all.
    beats: float = 0.0
    missed: float = 0.0
    work_s: float = 0.0
    #: Slots taken, summed over the beats.
    slots: float = 0.0

    def add(self, beats: float, slots: int, work_s: float) -> None:
        """Count so many beats of a node with equally many taken slots and so much work each."""
        self.beats += beats
        self.slots += beats * slots
        self.work_s += beats * work_s
        self.missed += beats if work_s > self.beat_s else 0.0


@dataclass(slots=True)
class PoolUse:
    """A pool over the whole run."""

    nodes: int
    blocks: int
    #: Seconds in which a step ran, summed over the nodes.
    busy_s: float = 0.0
    #: Prompt tokens computed and tokens generated.
    prefill_tokens: int = 0
    output_tokens: int = 0
    #: Bytes of KV that came from other nodes.
    fetched_bytes: int = 0
    preemptions: int = 0
    #: Tokens drafted by `engine.speculation`, and how many of them were accepted.
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    #: Blocks that were brought before a request asked for them; of those, found by one, and forgotten before one came.
    prefetched_blocks: int = 0
    prefetch_used_blocks: int = 0
    prefetch_wasted_blocks: int = 0
    #: None where the nodes do not split their passes.
    split: SplitUse | None = None
    #: None where the nodes keep no beat.
    beat: BeatUse | None = None
    #: Taken at equal intervals of virtual time, some hundreds in a run.
    samples: list[PoolSample] = field(default_factory=lambda: [])

    def count(self, load: Load) -> None:
        """Take in what a node has counted that now ends."""
        self.preemptions += load.preemptions
        self.drafted_tokens += load.drafted_tokens
        self.accepted_tokens += load.accepted_tokens
        self.prefetched_blocks += load.prefetched
        self.prefetch_used_blocks += load.prefetch_used
        self.prefetch_wasted_blocks += load.prefetch_wasted


@dataclass(slots=True)
class StoreUse:
    """All hosts' stores over the whole run."""

    hosts: int = 0
    #: Blocks that there is room for in `cpu`.
    slots: int = 0
    #: Bytes that nodes copied in and out, and that went to `cmx` and came from there.
    offered_bytes: int = 0
    loaded_bytes: int = 0
    cmx_written_bytes: int = 0
    cmx_read_bytes: int = 0
    #: Blocks in `cpu` and segments in `cmx`, taken at the same times as the pools' samples.
    slots_held: list[int] = field(default_factory=lambda: [])
    segments: list[int] = field(default_factory=lambda: [])


@dataclass(slots=True)
class Outcome:
    """A whole run."""

    served: list[Served]
    pools: dict[PoolName, PoolUse]
    #: Seconds between two tokens of one request, counted once a token.
    itl_s: Distribution
    #: None where hosts have none.
    stores: StoreUse | None = None
    #: Virtual seconds from the first arrival to the last end; wall seconds that simulating took.
    duration_s: float = 0.0
    wall_s: float = 0.0
    #: Calls of `handle` on clusters and nodes.
    events: int = 0
    #: Hash of every command in order; empty unless asked for.
    digest: str = ""
