"""Where and how urgently a thread runs, and those that it starts from then on: what keeps a beat is not to be put off."""

import os
from collections.abc import Sequence

from orchestrator.core.config import ConfigError


def bind(cores: Sequence[int]) -> None:
    """Let the calling thread run on these cores alone; on any if there are none. Raises `ConfigError`."""
    if not cores:
        return
    there = sorted(os.sched_getaffinity(0))
    if not set(cores) <= set(there):
        problem = f"must be cores that this process may run on, which are {', '.join(map(str, there))}; are {list(cores)}"
        raise ConfigError("beat.cores", problem)
    os.sched_setaffinity(0, cores)


def put_first(priority: int) -> None:
    """Give the calling thread a real-time priority; none if that is 0. Raises `ConfigError` if it may not have it."""
    if not priority:
        return
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except OSError as error:
        problem = f"this process may not have it ({error.strerror}): it takes CAP_SYS_NICE; 0 goes without"
        raise ConfigError("beat.realtime", problem) from None
