"""The keys of timers, one closed set for each state machine.

The text of a key, `kind:about`, is what journals hold; `cluster_timer`, `node_timer` and `store_timer` read it again, each its
own machine's.
"""

from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from orchestrator.core.making import quickly_made
from orchestrator.core.types import ExportId, GatewayId, LeaseId, ModelName, MoveId, NodeId, PrefetchId, RequestId, StoreId

#: The timers of one machine.
TimerKey = TypeVar("TimerKey")


class UnknownTimer(ValueError):
    """A text names no timer of this machine."""


class Timer:
    """The key of a timer: what it is for, and whom it is about."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(str(self))


# --- of all of them -----------------------------------------------------------------------------------------------------


@quickly_made
@dataclass(frozen=True, slots=True, repr=False)
class LeaseTimer(Timer):
    """A lease has had its time."""

    lease: LeaseId

    def __str__(self) -> str:
        return f"lease:{self.lease}"


# --- a cluster's ------------------------------------------------------------------------------------------------------


@quickly_made
@dataclass(frozen=True, slots=True, repr=False)
class RequestTimer(Timer):
    """A request has had its time: the whole of it, or that for finding a node."""

    request: RequestId

    def __str__(self) -> str:
        return f"request:{self.request}"


@quickly_made
@dataclass(frozen=True, slots=True, repr=False)
class ResyncTimer(Timer):
    """A node's resync of its KV batches did not come."""

    node: NodeId

    def __str__(self) -> str:
        return f"resync:{self.node}"


@quickly_made
@dataclass(frozen=True, slots=True, repr=False)
class StoreResyncTimer(Timer):
    """A store's resync of its KV batches of a model did not come."""

    store: StoreId
    model: ModelName

    def __str__(self) -> str:
        return f"store:{len(self.store)}:{self.store}{self.model}"


@dataclass(frozen=True, slots=True, repr=False)
class RefitTimer(Timer):
    """Leases have exceeded the memory there is for long enough."""

    def __str__(self) -> str:
        return "refit:"


@quickly_made
@dataclass(frozen=True, slots=True, repr=False)
class ReturnTimer(Timer):
    """A session is about to come back; it has this number at its gateway."""

    number: int

    def __str__(self) -> str:
        return f"return:{self.number}"


ClusterTimer: TypeAlias = RequestTimer | ResyncTimer | StoreResyncTimer | LeaseTimer | RefitTimer | ReturnTimer


def cluster_timer(text: str) -> ClusterTimer:
    """Return the key that a text names. Raises `UnknownTimer`."""
    kind, _, about = text.partition(":")
    match kind:
        case "request":
            return RequestTimer(RequestId(_number(about, text)))
        case "resync":
            return ResyncTimer(NodeId(about))
        case "store":
            length, _, names = about.partition(":")
            count = _number(length, text)
            return StoreResyncTimer(StoreId(names[:count]), ModelName(names[count:]))
        case "lease":
            return LeaseTimer(LeaseId(about))
        case "refit":
            return RefitTimer()
        case "return":
            return ReturnTimer(_number(about, text))
        case _:
            raise UnknownTimer(f"a cluster has no timer {text!r}")


# --- a node's ---------------------------------------------------------------------------------------------------------


@quickly_made
@dataclass(frozen=True, slots=True, repr=False)
class HoldTimer(Timer):
    """Nobody has fetched a prompt that was computed for a decode node."""

    request: RequestId

    def __str__(self) -> str:
        return f"hold:{self.request}"


@quickly_made
@dataclass(frozen=True, slots=True, repr=False)
class FetchTimer(Timer):
    """The source of a request's blocks is silent."""

    request: RequestId

    def __str__(self) -> str:
        return f"fetch:{self.request}"


@quickly_made
@dataclass(frozen=True, slots=True, repr=False)
class ExportTimer(Timer):
    """The request that a peer wants to read has not come."""

    export: ExportId

    def __str__(self) -> str:
        return f"export:{self.export}"


@quickly_made
@dataclass(frozen=True, slots=True, repr=False)
class GatewayTimer(Timer):
    """It is time to see whether a gateway was heard."""

    gateway: GatewayId

    def __str__(self) -> str:
        return f"gateway:{self.gateway}"


@quickly_made
@dataclass(frozen=True, slots=True, repr=False)
class PrefetchTimer(Timer):
    """A prefetch has had its time."""

    prefetch: PrefetchId

    def __str__(self) -> str:
        return f"prefetch:{self.prefetch}"


NodeTimer: TypeAlias = HoldTimer | FetchTimer | ExportTimer | GatewayTimer | PrefetchTimer | LeaseTimer


def node_timer(text: str) -> NodeTimer:
    """Return the key that a text names. Raises `UnknownTimer`."""
    kind, _, about = text.partition(":")
    match kind:
        case "hold":
            return HoldTimer(RequestId(_number(about, text)))
        case "fetch":
            return FetchTimer(RequestId(_number(about, text)))
        case "export":
            return ExportTimer(ExportId(_number(about, text)))
        case "gateway":
            return GatewayTimer(GatewayId(_number(about, text)))
        case "prefetch":
            return PrefetchTimer(PrefetchId(RequestId(_number(about, text))))
        case "lease":
            return LeaseTimer(LeaseId(about))
        case _:
            raise UnknownTimer(f"a node has no timer {text!r}")


# --- a store's --------------------------------------------------------------------------------------------------------


@quickly_made
@dataclass(frozen=True, slots=True, repr=False)
class MoveTimer(Timer):
    """A transfer to or from cmx takes too long."""

    move: MoveId

    def __str__(self) -> str:
        return f"move:{self.move}"


@quickly_made
@dataclass(frozen=True, slots=True, repr=False)
class DetachTimer(Timer):
    """Whatever a lost node was copying is long over."""

    node: NodeId

    def __str__(self) -> str:
        return f"detach:{self.node}"


@dataclass(frozen=True, slots=True, repr=False)
class CmxTimer(Timer):
    """It is time to try again what cmx did not do."""

    def __str__(self) -> str:
        return "cmx:"


StoreTimer: TypeAlias = MoveTimer | LeaseTimer | DetachTimer | CmxTimer


def store_timer(text: str) -> StoreTimer:
    """Return the key that a text names. Raises `UnknownTimer`."""
    kind, _, about = text.partition(":")
    match kind:
        case "move":
            return MoveTimer(MoveId(_number(about, text)))
        case "lease":
            return LeaseTimer(LeaseId(about))
        case "detach":
            return DetachTimer(NodeId(about))
        case "cmx":
            return CmxTimer()
        case _:
            raise UnknownTimer(f"a store has no timer {text!r}")


def _number(about: str, text: str) -> int:
    if not (about.isascii() and about.isdigit()):
        raise UnknownTimer(f"a timer must be about a number, is {text!r}")
    return int(about)
