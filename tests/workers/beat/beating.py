"""Engines that keep a beat, over small checkpoints."""

from pathlib import Path
from typing import Any

from orchestrator.core.config import BeatConfig, EngineConfig, PoolConfig, SchedulerConfig, SplitConfig
from orchestrator.core.types import CostProfile, PoolKind
from workers.engines.base import SplitPlaces
from workers.engines.beat.engine import BeatEngine
from workers.memory import SharedArena

BLOCK_TOKENS, SLOTS, CONTEXT = 16, 8, 1024
#: Many times what a step takes: also where other programs want the processor these tests do not depend on them.
BEAT_S = 0.15


def lpx_pool(
    beat_s: float = BEAT_S, beat: BeatConfig | None = None, split: SplitConfig | None = None, **engine: Any
) -> PoolConfig:
    """Return a pool whose nodes keep a beat."""
    sizes = {"block_tokens": BLOCK_TOKENS, "blocks": 512, "threads": 1, "context_tokens_max": CONTEXT}
    return PoolConfig(
        name="lpx",
        kind=PoolKind.LPX,
        engine=EngineConfig(dtype="float32", **(sizes | engine)),
        scheduler=SchedulerConfig(sequences_max=SLOTS, step_tokens_max=256),
        profile=CostProfile(beat_s=beat_s),
        beat=beat or BeatConfig(),
        split=split,
    )


def beat_engine(
    path: Path, beat_s: float = BEAT_S, beat: BeatConfig | None = None, places: SplitPlaces | None = None, **engine: Any
) -> BeatEngine:
    """Open an engine; whoever asks for one closes it."""
    return BeatEngine(path, lpx_pool(beat_s, beat, **engine), SharedArena, places)
