"""Everything that can happen to a cluster or to a node: facts in the past tense.

An event carries the name of the command it answers: `Fetch` is ended by `FetchEnded`, `RunStep` by `StepFinished` or
`StepFailed`. Failures are events too; nothing crosses a driver as an exception.
"""

from dataclasses import dataclass, field
from typing import Generic

from orchestrator.core.timers import ClusterTimer, NodeTimer, TimerKey
from orchestrator.core.types import (
    Assignment,
    BlockHash,
    BlockId,
    ExportId,
    FinishReason,
    GatewayId,
    KvBatch,
    Lease,
    LeaseId,
    Load,
    NodeId,
    NodeSpec,
    Request,
    RequestId,
    StepId,
)


@dataclass(frozen=True, slots=True)
class TimerFired(Generic[TimerKey]):
    """The time asked for by `SetTimer` has come. A timer that was set again fires only at the later setting."""

    key: TimerKey


# --- what happens to whoever holds blocks: nodes and stores -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LeasePlaced:
    """A gateway placed, renewed, moved or lowered a lease. Ignored if that revision or a later one is known, or has ended."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """A gateway ended a lease before its time; revisions up to this one are over."""

    lease: LeaseId
    revision: int


# --- what happens to a node -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Assigned:
    """A gateway gave this node a part in a request."""

    assignment: Assignment


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A gateway no longer wants a request. Unknown ids are ignored: the end may have crossed the cancel."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class SourceLost:
    """The node that a request's blocks are read from is gone. Ignored unless the request still reads, or is to, from that one."""

    request: RequestId
    source: NodeId


@dataclass(frozen=True, slots=True)
class GatewayHeard:
    """A gateway gave a sign of life; it gives several in `lost_s` seconds, and has nobody who waits once it has given none."""

    gateway: GatewayId
    lost_s: float


@dataclass(frozen=True, slots=True)
class GatewayLost:
    """A gateway's stream ended and did not come back in time; nobody waits for its requests."""

    gateway: GatewayId


@dataclass(slots=True)
class SliceResult:
    """What one step did for one sequence. Not frozen, for the reason given at `Slice`."""

    request: RequestId
    #: Tokens generated: 0 for a slice that does not sample, 1 otherwise, more where several steps were run as one.
    output_tokens: int = 0
    #: Hashes of blocks of which this step computed the last token's KV, in order: only blocks with generated tokens in them.
    #: The newest token has no KV yet and completes nothing. Prompt blocks' hashes came with the assignment.
    hashes: tuple[BlockHash, ...] = ()
    #: True when a sampled token ends the sequence (end of sequence, stop token).
    stopped: bool = False
    #: Set when this sequence alone cannot go on (for example not a number in its logits).
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class StepFinished:
    """The engine ran a step; results stand in the order of the step's slices."""

    step: StepId
    results: tuple[SliceResult, ...]
    #: Seconds the engine took.
    seconds: float
    #: Steps that were run as one (`RunStep.steps_max`): every sequence has got a token from each.
    steps: int = 1


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The engine could not run a step at all; every sequence in it ends."""

    step: StepId
    reason: str


@dataclass(frozen=True, slots=True)
class FetchProgressed:
    """Blocks arrived from a peer; `tokens` of the prompt, counted from its start, are now present without a hole."""

    request: RequestId
    tokens: int


@dataclass(frozen=True, slots=True)
class FetchEnded:
    """A fetch is over and will write no more. `tokens` as in `FetchProgressed`.

    `computed_tokens` are prompt tokens the source computed for this very request, for the bill; `failure` says why less
    came than was asked for, None if nothing went wrong.
    """

    request: RequestId
    tokens: int
    computed_tokens: int = 0
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class ExportOpened:
    """A peer wants blocks of a prompt: those from index `first_block` on, up to `tokens` of the prompt.

    `hashes` are the prompt's full-block hashes from its first block on. With `pending` the request itself is, or is about
    to be, computed here: blocks go out as they complete, the unfilled last one too. Without, only what is cached now.
    `incarnation` is the start of this node that the peer was told of, None if it was told of none.
    """

    export: ExportId
    request: RequestId
    hashes: tuple[BlockHash, ...] = field(repr=False)
    first_block: int
    tokens: int
    pending: bool
    incarnation: int | None = None


@dataclass(frozen=True, slots=True)
class BlocksSent:
    """The peer has its copy of these blocks (the answer to one `SendBlocks`)."""

    export: ExportId
    blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class ExportClosed:
    """The peer is gone or satisfied; nothing of this export is read any more."""

    export: ExportId


@dataclass(frozen=True, slots=True)
class ResyncRequested:
    """A gateway missed KV batches after number `after`; None asks for everything held now."""

    gateway: GatewayId
    after: int | None


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """No new assignments from now on; what runs may finish."""


NodeEvent = (
    Assigned
    | Cancelled
    | SourceLost
    | GatewayHeard
    | GatewayLost
    | StepFinished
    | StepFailed
    | FetchProgressed
    | FetchEnded
    | ExportOpened
    | BlocksSent
    | ExportClosed
    | ResyncRequested
    | DrainRequested
    | TimerFired[NodeTimer]
)


# --- what happens to a cluster ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A client's turn was parsed, tokenised and hashed."""

    request: Request


@dataclass(frozen=True, slots=True)
class RequestAbandoned:
    """The client went away, or a stop string was found: nobody wants more of this request."""

    request: RequestId
    #: What nodes had brought of it.
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node's stream is up. The same id with a higher incarnation replaces the older one."""

    node: NodeSpec


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node's stream broke and could not be mended; all it held and did is lost."""

    node: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class NodeDraining:
    """A node takes nothing new and will leave; what it runs may finish."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A request's first token came: its prompt is complete on that node.

    `computed_tokens` of the prompt were computed, on this node or for it on its source; the others were cached.
    """

    request: RequestId
    computed_tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A node is done with its part of a request."""

    request: RequestId
    reason: FinishReason
    output_tokens: int
    #: As in `FirstToken`; for PREFILLED what this node computed.
    computed_tokens: int
    message: str = ""


@dataclass(frozen=True, slots=True)
class NodeReported:
    """One frame of a node's stream, without the tokens."""

    node: NodeId
    load: Load
    first_tokens: tuple[FirstToken, ...] = ()
    ended: tuple[Ended, ...] = ()
    kv: tuple[KvBatch, ...] = ()


@dataclass(frozen=True, slots=True)
class GatewaysChanged:
    """Other gateways take requests now: `count`, of which this one is the `place`th, from 0 on."""

    place: int
    count: int


ClusterEvent = (
    RequestArrived
    | RequestAbandoned
    | GatewaysChanged
    | NodeJoined
    | NodeLost
    | NodeDraining
    | NodeReported
    | DrainRequested
    | TimerFired[ClusterTimer]
)
