"""What keeps a beat asks of its machine: cores, urgency, memory that stays, no garbage collection that looks at all there is."""

import ctypes
import gc
import os
from collections.abc import Sequence

from orchestrator.core.config import ConfigError

#: mallopt's names in glibc; and a size that no allocation of a step has.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _KEPT_BYTES = -1, -3, 1 << 30


def bind(cores: Sequence[int], field: str) -> None:
    """Let the calling thread, and those it starts, run on these cores alone; on any if there are none.

    Raises `ConfigError`, which names the `field` that asks for them.
    """
    if not cores:
        return
    there = sorted(os.sched_getaffinity(0))
    if not set(cores) <= set(there):
        problem = f"must be cores that this process may run on, which are {', '.join(map(str, there))}; are {list(cores)}"
        raise ConfigError(field, problem)
    os.sched_setaffinity(0, cores)


def put_first(priority: int) -> None:
    """Give the calling thread, and those it starts, a real-time priority; none if that is 0.

    Raises `ConfigError` if it may not have it.
    """
    if not priority:
        return
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except OSError as error:
        problem = f"this process may not have it ({error.strerror}): it takes CAP_SYS_NICE; 0 goes without"
        raise ConfigError("beat.realtime", problem) from None


def keep_memory() -> None:
    """Keep memory that is given back for the next allocation, where the C library can: steps then take none from the system."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def keep_objects() -> None:
    """Have garbage collection never look again at the objects that there are now."""
    gc.collect()
    gc.freeze()
