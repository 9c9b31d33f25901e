"""Runs several simulations of one trace, in processes side by side where that pays; the results are the same either way."""

import gc
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context

from orchestrator.core.config import RouterPolicy
from orchestrator.profiles.resolve import Resolved
from orchestrator.sim.faults import Faults
from orchestrator.sim.runs import CacheRule, Run, simulate
from orchestrator.traces import TracedTurn

#: Requests simulated in all from which starting processes (a second or so each) is worth it.
PARALLEL_REQUESTS_MIN = 20_000


@dataclass(frozen=True, slots=True)
class Case:
    """One run to make of a trace."""

    resolved: Resolved
    policy: RouterPolicy
    cache: CacheRule
    turns: Sequence[TracedTurn]
    seed: int
    faults: Faults | None = None
    #: Whether every invariant is checked after every event.
    checks: bool = False


class SimulationFailed(Exception):
    """A run was lost with its process; the message is one line."""


def run_cases(cases: Sequence[Case], jobs: int | None, progress: Callable[[float], None]) -> list[Run]:
    """Return the runs in the order of their cases; `progress` is told how many are done, in parts of one.

    `jobs` processes at most; None: as many as there are cores if the cases are large, else none but this one.
    """
    workers = min(_workers(cases) if jobs is None else jobs, len(cases))
    return _side_by_side(cases, workers, progress) if workers > 1 else _one_by_one(cases, progress)


def _workers(cases: Sequence[Case]) -> int:
    requests = sum(len(case.turns) for case in cases)
    return (os.cpu_count() or 1) if requests >= PARALLEL_REQUESTS_MIN else 1


def _one_by_one(cases: Sequence[Case], progress: Callable[[float], None]) -> list[Run]:
    return [_run(case, lambda share, done=done: progress(done + share)) for done, case in enumerate(cases)]


def _side_by_side(cases: Sequence[Case], workers: int, progress: Callable[[float], None]) -> list[Run]:
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        try:
            # Workers, which are started here, leave interrupts to this process: it ends them and says what happened.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = [pool.submit(_run, case) for case in cases]
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress(done)
        except BrokenProcessPool:
            raise SimulationFailed("a simulating process was killed, perhaps for memory; try --jobs 1 or --limit") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():
                worker.terminate()
            raise
        return [future.result() for future in futures]


def _run(case: Case, progress: Callable[[float], None] | None = None) -> Run:
    run = simulate(case.resolved, case.turns, case.policy, case.cache, case.seed, progress, case.faults, case.checks)
    # A world's parts refer to each other, so it stays in memory until someone looks for such rings.
    gc.collect()
    return run
