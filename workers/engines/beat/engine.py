"""An engine that keeps a beat, as its node sees it: steps are computed in another process (`process.py`), blocks are copied here.

A step takes as long as it is until the next beat, and then the step itself: whoever calls `step` after each step keeps the beat.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from orchestrator.core.commands import Slice
from orchestrator.core.config import PoolConfig
from orchestrator.core.types import RequestId, Sampling, SplitLoad
from workers.engines.base import BeatCounts, SliceOutput, SplitPlaces
from workers.engines.beat.child import Child, check_device
from workers.engines.beat.messages import (
    Add,
    Forget,
    MemoryGiven,
    MemoryWanted,
    Opened,
    Opening,
    Step,
    Stepped,
    Unstepped,
)
from workers.engines.kvpool import KvPool, PooledBlocks
from workers.engines.shape import read_architecture
from workers.engines.stored import engine_slab
from workers.memory import SharedArena

#: Seconds that opening a model, and then a step, may take before the process is given up: it hangs.
OPEN_S_MAX, STEP_S_MAX = 600.0, 60.0


class StepBroken(Exception):
    """A step failed in the process that computes; the message says how."""


class BeatEngine(PooledBlocks):
    """One model on CPUs, or its attention, in a process that keeps a beat; see `base.Engine`."""

    def __init__(
        self, model_dir: Path, pool: PoolConfig, share: Callable[[int], SharedArena], places: SplitPlaces | None = None
    ) -> None:
        """Start the process and wait until it has loaded the model and measured its longest step.

        Args:
            model_dir: a Hugging Face checkpoint directory.
            pool: beat, slots, cores and the engine's settings.
            share: makes the memory for KV.
            places: where the FFN ranks are that compute the layers' second halves; None: the process computes all.

        Raises:
            ConfigError: for a beat that cannot be kept here, for another device, for cores and priorities that cannot be had,
                and as `EagerEngine`.
            EngineLost: if the process ends or hangs.
            RuntimeError: for a checkpoint that cannot be computed, and for FFN ranks that are not there.
        """
        check_device(pool)
        config = replace(pool.engine, device="cpu", threads=pool.engine.threads or len(pool.beat.cores))
        self._child = Child("workers.engines.beat.process", "the process that keeps the beat")
        self.beats: BeatCounts | None = BeatCounts()
        self.halves: SplitLoad | None = None
        scheduler = pool.scheduler
        sizes = scheduler.sequences_max, scheduler.step_tokens_max
        opening = Opening(model_dir, pool.name, config, pool.beat, pool.profile.beat_s, *sizes, places)
        try:
            self._open(opening, share)
        except BaseException:
            self._child.end()
            raise

    def _open(self, opening: Opening, share: Callable[[int], SharedArena]) -> None:
        self._child.send(opening)
        wanted = self._child.opened(OPEN_S_MAX)
        assert isinstance(wanted, MemoryWanted), f"{wanted!r} instead of what memory is wanted"
        arena = share(wanted.bytes)
        self._child.send(MemoryGiven(arena.place(()).SerializeToString()))
        opened = self._child.opened(OPEN_S_MAX)
        assert isinstance(opened, Opened), f"{opened!r} instead of an engine"
        self.description = known = opened.description
        self.worst_step_s = opened.worst_s
        self.halves = opened.halves
        shape, config = read_architecture(opening.model_dir), opening.engine
        cpu = torch.device("cpu")
        self._pool = KvPool(
            known.blocks, engine_slab(shape, config), cpu, lambda size: arena.view[:size], config.kv_format_stored
        )

    @property
    def routing(self) -> None:
        return None

    @property
    def drafts(self) -> None:
        return None

    def add(self, request: RequestId, tokens: "array[int]", sampling: Sampling, generated: int = 0) -> None:
        self._child.send(Add(request, tokens.tobytes(), sampling, generated))

    def forget(self, request: RequestId) -> None:
        self._child.send(Forget(request))

    def step(self, slices: Sequence[Slice]) -> list[SliceOutput]:
        """Compute a step on the next beat; see `base.Engine.step`. Raises `StepBroken`, or `EngineLost` if none will follow."""
        self._child.send(Step(slices))
        match self._child.answer(STEP_S_MAX):
            case Stepped(outputs, counts, halves):
                self.beats, self.halves = counts, halves
                return outputs
            case Unstepped(reason):
                raise StepBroken(reason)
            case other:
                raise AssertionError(f"{other!r} instead of a step")

    def pause_s(self, slices: Sequence[Slice], decoding: int) -> float:
        """Return 0: the wait for the beat is in the step."""
        return 0.0

    def close(self) -> None:
        """End the process and let go of the memory."""
        self._child.end()
        del self._pool
