"""Events and orders of the fleet's controller: facts in the past tense, orders imperatives; plain data.

An operator's wish carries a serial number, and exactly one `Answer` with that number follows: at once if it is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from orchestrator.core.commands import ClearTimer, SetTimer
from orchestrator.core.config import ClusterConfig
from orchestrator.core.events import TimerFired
from orchestrator.core.timers import Timer
from orchestrator.core.types import NodeId, PoolName, StoreId
from orchestrator.fleet.processes import Part, ProcessName

# --- facts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """A process that serves, left by a former life of the controller."""

    part: Part
    incarnation: int
    address: str
    fingerprints: Mapping[str, str] = field(default_factory=lambda: {})
    draining: bool = False
    node_addresses: Mapping[NodeId, str] = field(default_factory=lambda: {})


@dataclass(frozen=True, slots=True)
class Resumed:
    """The controller was started again and found these."""

    found: tuple[Found, ...] = ()


@dataclass(frozen=True, slots=True)
class HostUsed:
    """A process with nodes was placed on a host, which may have no store yet."""

    host: str


@dataclass(frozen=True, slots=True)
class ProcessServes:
    """A start succeeded."""

    name: ProcessName
    incarnation: int
    address: str
    fingerprints: Mapping[str, str] = field(default_factory=lambda: {})
    node_addresses: Mapping[NodeId, str] = field(default_factory=lambda: {})


@dataclass(frozen=True, slots=True)
class StartFailed:
    """A start did not; nothing is left of it."""

    name: ProcessName
    incarnation: int
    problem: str


@dataclass(frozen=True, slots=True)
class ProcessDied:
    """A process that served is gone."""

    name: ProcessName
    incarnation: int


@dataclass(frozen=True, slots=True)
class ProcessSilent:
    """A process has not answered for so long; told again and again while it goes on."""

    name: ProcessName
    incarnation: int
    silent_s: float


@dataclass(frozen=True, slots=True)
class ProcessDrained:
    """Nothing runs on a process any more, or (not `clean`) the time for that is over."""

    name: ProcessName
    incarnation: int
    clean: bool


@dataclass(frozen=True, slots=True)
class ProcessStopped:
    """A process was stopped and is gone."""

    name: ProcessName
    incarnation: int


@dataclass(frozen=True, slots=True)
class ProcessSettled:
    """All gateways hold links to a process's nodes, and a gateway is ready; or it did not come to that."""

    name: ProcessName
    incarnation: int
    problem: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class BackoffTimer(Timer):
    """A process has waited long enough to be started again."""

    name: ProcessName

    def __str__(self) -> str:
        return f"backoff:{self.name}"


#: All timers that a controller has.
ControllerTimer: TypeAlias = BackoffTimer


# --- wishes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BootAsked:
    """Start all processes; if one does not start, end all again."""

    serial: int


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """Let what runs on a node or gateway end, end its process and keep it out. Only `force` takes the last one of its kind."""

    serial: int
    target: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class ReturnAsked:
    """Start a drained process again."""

    serial: int
    target: str


@dataclass(frozen=True, slots=True)
class ResizeAsked:
    """Have so many nodes in a pool, or so many gateways."""

    serial: int
    group: str
    count: int


@dataclass(frozen=True, slots=True)
class RestartAsked:
    """Start all processes of these groups anew, one after the other; none named: of all."""

    serial: int
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ConfigGiven:
    """Run as another configuration says: sizes are changed; what needs restarts is refused unless `restart`."""

    serial: int
    config: ClusterConfig
    restart: bool = False


@dataclass(frozen=True, slots=True)
class EndAsked:
    """Let running requests end, up to `drain_s` seconds, and end all processes."""

    serial: int
    drain_s: float


Event: TypeAlias = (
    Resumed
    | HostUsed
    | ProcessServes
    | StartFailed
    | ProcessDied
    | ProcessSilent
    | ProcessDrained
    | ProcessStopped
    | ProcessSettled
    | BootAsked
    | DrainAsked
    | ReturnAsked
    | ResizeAsked
    | RestartAsked
    | ConfigGiven
    | EndAsked
    | TimerFired[ControllerTimer]
)

# --- orders -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Place and start a process; `ProcessServes` or `StartFailed` follows. `address` is where it was before, if it was."""

    part: Part
    incarnation: int
    address: str = ""


@dataclass(frozen=True, slots=True)
class Drain:
    """Let what runs on a process end; `ProcessDrained` follows within so many seconds. A gateway that `lingers` goes on refusing
    requests for a while before it is gone."""

    name: ProcessName
    incarnation: int
    seconds: float
    lingers: bool = True


@dataclass(frozen=True, slots=True)
class Stop:
    """End a process in good order; `ProcessStopped` follows."""

    name: ProcessName
    incarnation: int


@dataclass(frozen=True, slots=True)
class Kill:
    """End a process at once, whatever it does; nothing follows."""

    name: ProcessName
    incarnation: int


@dataclass(frozen=True, slots=True)
class Release:
    """Give back what was reserved for a process that will not be started again here."""

    name: ProcessName


@dataclass(frozen=True, slots=True)
class Settle:
    """Wait until a process that serves is known to all gateways; `ProcessSettled` follows."""

    name: ProcessName
    incarnation: int


@dataclass(frozen=True, slots=True)
class TellMembers:
    """Tell all gateways who is there: each node with its pool and address (empty: it does not serve), the gateways that take
    requests, the stores that serve, each with its host and address, and the processes that draft, each with its pool and address.
    Nodes are told of their host's store, and of a process that drafts for them."""

    nodes: tuple[tuple[NodeId, PoolName, str], ...]
    gateways: Mapping[int, str]
    stores: tuple[tuple[StoreId, str, str], ...] = ()
    drafters: tuple[tuple[PoolName, ProcessName, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Keep:
    """Write down what a later life of the controller must know."""

    parts: tuple[Part, ...]
    drained: tuple[ProcessName, ...]
    #: The number of each pool's next node.
    next_numbers: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Say:
    """Tell operators a line."""

    line: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A wish was granted, or (with the problem, one line) was not."""

    serial: int
    problem: str | None = None


Command: TypeAlias = (
    Start
    | Drain
    | Stop
    | Kill
    | Release
    | Settle
    | TellMembers
    | Keep
    | SetTimer[ControllerTimer]
    | ClearTimer[ControllerTimer]
    | Say
    | Answer
)
