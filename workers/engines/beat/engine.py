"""An engine that keeps a beat, as its node sees it: steps are computed in another process (`process.py`), blocks are copied here.

A step takes as long as it is until the next beat, and then the step itself: whoever calls `step` after each step keeps the beat.
"""

import os
import socket
import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from orchestrator.core.commands import Slice
from orchestrator.core.config import ConfigError, PoolConfig, require
from orchestrator.core.types import RequestId, Sampling
from workers.engines.base import BeatCounts, EngineLost, SliceOutput
from workers.engines.beat.messages import (
    Add,
    Forget,
    MemoryGiven,
    MemoryWanted,
    Opened,
    Opening,
    Order,
    Step,
    Stepped,
    Unopened,
    Unstepped,
)
from workers.engines.kvpool import KvPool, PooledBlocks
from workers.engines.shape import read_architecture
from workers.engines.stored import engine_slab
from workers.memory import SharedArena

#: Seconds that opening a model, and then a step, may take before the process is given up: it hangs.
OPEN_S_MAX, STEP_S_MAX = 600.0, 60.0
#: Seconds in which it has to end once it is told so.
CLOSE_S = 5.0


class StepBroken(Exception):
    """A step failed in the process that computes; the message says how."""


class BeatEngine(PooledBlocks):
    """One model on CPUs, in a process that keeps a beat; see `base.Engine`."""

    def __init__(self, model_dir: Path, pool: PoolConfig, share: Callable[[int], SharedArena]) -> None:
        """Start the process and wait until it has loaded the model and measured its longest step.

        Args:
            model_dir: a Hugging Face checkpoint directory.
            pool: beat, slots, cores and the engine's settings.
            share: makes the memory for KV.

        Raises:
            ConfigError: for a beat that cannot be kept here, for another device, for cores and priorities that cannot be had,
                and as `EagerEngine`.
            EngineLost: if the process ends or hangs.
            RuntimeError: for a checkpoint that cannot be computed.
        """
        device = pool.engine.device
        fits, where = device in ("auto", "cpu"), f"pools.{pool.name}.engine.device"
        require(fits, where, f"must be auto or cpu, is {device!r}: engines keep a beat on CPUs alone")
        config = replace(pool.engine, device="cpu", threads=pool.engine.threads or len(pool.beat.cores))
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "workers.engines.beat.process", str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        self._link: Connection[object, object] = Connection(ours.detach())
        self.beats: BeatCounts | None = BeatCounts()
        scheduler = pool.scheduler
        opening = Opening(
            model_dir, pool.name, config, pool.beat, pool.profile.beat_s, scheduler.sequences_max, scheduler.step_tokens_max
        )
        try:
            self._open(opening, share)
        except BaseException:
            self._end()
            raise

    def _open(self, opening: Opening, share: Callable[[int], SharedArena]) -> None:
        self._send(opening)
        wanted = self._answer(OPEN_S_MAX)
        if isinstance(wanted, Unopened):
            raise _problem(wanted)
        assert isinstance(wanted, MemoryWanted), f"{wanted!r} instead of what memory is wanted"
        arena = share(wanted.bytes)
        self._send(MemoryGiven(arena.place(()).SerializeToString()))
        opened = self._answer(OPEN_S_MAX)
        if isinstance(opened, Unopened):
            raise _problem(opened)
        assert isinstance(opened, Opened), f"{opened!r} instead of an engine"
        self.description = known = opened.description
        self.worst_step_s = opened.worst_s
        shape, config = read_architecture(opening.model_dir), opening.engine
        cpu = torch.device("cpu")
        self._pool = KvPool(
            known.blocks, engine_slab(shape, config), cpu, lambda size: arena.view[:size], config.kv_format_stored
        )

    @property
    def routing(self) -> None:
        return None

    def add(self, request: RequestId, tokens: "array[int]", sampling: Sampling, generated: int = 0) -> None:
        self._send(Add(request, tokens.tobytes(), sampling, generated))

    def forget(self, request: RequestId) -> None:
        self._send(Forget(request))

    def step(self, slices: Sequence[Slice]) -> list[SliceOutput]:
        """Compute a step on the next beat; see `base.Engine.step`. Raises `StepBroken`, or `EngineLost` if none will follow."""
        self._send(Step(slices))
        match self._answer(STEP_S_MAX):
            case Stepped(outputs, counts):
                self.beats = counts
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
        self._end()
        del self._pool

    def _end(self) -> None:
        self._link.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: Order | Opening | MemoryGiven) -> None:
        try:
            self._link.send(message)
        except OSError as error:
            raise self._lost(str(error)) from error

    def _answer(self, seconds: float) -> object:
        """Return the next message. Raises `EngineLost`."""
        try:
            if not self._link.poll(seconds):
                raise self._lost(f"no answer within {seconds:g} s")
            return self._link.recv()
        except (EOFError, OSError) as error:
            self._end()
            raise self._lost(f"exit code {self._process.returncode}") from error

    def _lost(self, why: str) -> EngineLost:
        return EngineLost(f"the process that keeps the beat (pid {self._process.pid}) is lost: {why}")


def _problem(unopened: Unopened) -> Exception:
    return RuntimeError(unopened.problem) if unopened.where is None else ConfigError(unopened.where, unopened.problem)
