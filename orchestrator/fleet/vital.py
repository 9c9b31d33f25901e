"""Identifies an actor's operating-system process, so that it can be killed when it hangs.

Ray asks a process to end; one that hangs (SIGSTOP, a stuck call) does not hear it. A SIGKILL comes from its own host.
"""

import contextlib
import os
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import ray as typed_ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

#: Ray's own annotations are too loose for the checker.
ray = cast(Any, typed_ray)


@dataclass(frozen=True, slots=True)
class Vital:
    """An operating-system process."""

    pid: int
    #: When it started, as its host counts; tells it from a later process of the same number. Empty where hosts do not say.
    started: str
    #: Ray's id of its host.
    host: str


def own_vital() -> Vital:
    """Return this process."""
    return Vital(os.getpid(), started_at(os.getpid()), ray.get_runtime_context().get_node_id())


def end_by(error: BaseException) -> NoReturn:
    """End this process at once, with what ended it in its log."""
    traceback.print_exception(error)
    os._exit(1)


def end(vital: Vital) -> None:
    """Kill a process on whatever host of the Ray cluster it is; nothing happens if it is gone. Does not wait."""
    if vital.host == ray.get_runtime_context().get_node_id():
        end_here(vital.pid, vital.started)
        return
    there = NodeAffinitySchedulingStrategy(vital.host, soft=False)
    ray.remote(end_here).options(scheduling_strategy=there, num_cpus=0).remote(vital.pid, vital.started)


def end_here(pid: int, started: str, number: int = signal.SIGKILL) -> bool:
    """Send a signal to a process of this host, if it is still the one that was meant. Returns whether it was."""
    if started_at(pid) != started:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    return True


def started_at(pid: int) -> str:
    """Return when a process of this host started, in clock ticks since the host did; empty if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    # A zombie is gone: it only waits for its parent to hear of it.
    return "" if fields[0] == "Z" else fields[19]
