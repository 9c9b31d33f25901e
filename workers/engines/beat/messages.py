"""What processes that keep a beat are told by those that start them, and answer. All ours: pickled, over sockets of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from orchestrator.core.commands import Slice
from orchestrator.core.config import BeatConfig, ConfigError, EngineConfig, PoolConfig
from orchestrator.core.types import RequestId, Sampling, SplitLoad
from workers.engines.base import BeatCounts, EngineDescription, NetworkPlace, SliceOutput, SplitPlaces


@dataclass(frozen=True, slots=True)
class Opening:
    """First message: what to open."""

    model_dir: Path
    pool: str
    engine: EngineConfig
    beat: BeatConfig
    beat_s: float
    slots: int
    step_tokens_max: int
    #: None: it computes whole layers.
    places: SplitPlaces | None


@dataclass(frozen=True, slots=True)
class MemoryWanted:
    """Asks for the memory of the KV pool; answered by where it is."""

    bytes: int


@dataclass(frozen=True, slots=True)
class MemoryGiven:
    """A serialised `SharedMemory`."""

    place: bytes


@dataclass(frozen=True, slots=True)
class Opened:
    """The engine runs; its longest step takes `worst_s`, and took so much of either half if there are two."""

    description: EngineDescription
    worst_s: float
    halves: SplitLoad | None


@dataclass(frozen=True, slots=True)
class Unopened:
    """The engine, or the rank, cannot be had; `where` is the field of the cluster file that says so, if one does."""

    where: str | None
    problem: str

    @staticmethod
    def by(error: Exception, pool: str) -> "Unopened":
        """Return what an error says; that of a setting names it within the pool."""
        if isinstance(error, ConfigError):
            return Unopened(f"pools.{pool}.{error.where}", error.problem)
        return Unopened(None, f"{type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True)
class Add:
    """As `Engine.add`."""

    request: RequestId
    tokens: bytes
    sampling: Sampling
    generated: int


@dataclass(frozen=True, slots=True)
class Forget:
    """As `Engine.forget`."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class Step:
    """As `Engine.step`, on the next beat. Answered by `Stepped` or `Unstepped`."""

    slices: Sequence[Slice]


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step brought, how the beat is kept, and what either half has done if there are two."""

    outputs: list[SliceOutput]
    counts: BeatCounts
    halves: SplitLoad | None


@dataclass(frozen=True, slots=True)
class Unstepped:
    """A step failed."""

    reason: str


@dataclass(frozen=True, slots=True)
class RankOpening:
    """First and last message to an FFN rank: what to open."""

    model_dir: Path
    pool: PoolConfig
    rank: int
    #: None: attention ranks are all on this host.
    network: NetworkPlace | None = None


@dataclass(frozen=True, slots=True)
class RankOpened:
    """The rank serves there; see `FfnRank`."""

    address: str
    network_address: str | None = None


@dataclass(frozen=True, slots=True)
class DraftsOpening:
    """First and last message to a process that drafts: what to open, for which model, and where it is to listen."""

    model_dir: Path
    pool: PoolConfig
    place: NetworkPlace


@dataclass(frozen=True, slots=True)
class DraftsOpened:
    """Drafts are to be had there; a pass for all slots takes so long."""

    address: str
    pass_s: float


Order: TypeAlias = Add | Forget | Step
