"""What a node's process and the one that keeps its beat say to each other. Both are ours: pickled, over a socket of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from orchestrator.core.commands import Slice
from orchestrator.core.config import BeatConfig, EngineConfig
from orchestrator.core.types import RequestId, Sampling
from workers.engines.base import BeatCounts, EngineDescription, SliceOutput


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
    """The engine runs; its longest step took `worst_s`."""

    description: EngineDescription
    worst_s: float


@dataclass(frozen=True, slots=True)
class Unopened:
    """The engine cannot be had; `where` is the field of the cluster file that says so, if one does."""

    where: str | None
    problem: str


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
    """What a step brought, and how the beat is kept."""

    outputs: list[SliceOutput]
    counts: BeatCounts


@dataclass(frozen=True, slots=True)
class Unstepped:
    """A step failed."""

    reason: str


Order: TypeAlias = Add | Forget | Step
