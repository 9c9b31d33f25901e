"""Everything that can happen to a cluster, to a node or to a store: facts in the past tense.

An event carries the name of the command it answers: `Fetch` is ended by `FetchEnded`, `RunStep` by `StepFinished` or
`StepFailed`. Failures are events too; nothing crosses a driver as an exception.
"""

from dataclasses import dataclass, field
from typing import Generic

from orchestrator.core.hints import Hint
from orchestrator.core.making import quickly_made
from orchestrator.core.outlook import Outlook
from orchestrator.core.timers import ClusterTimer, NodeTimer, StoreTimer, TimerKey
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
    ModelName,
    MoveFailure,
    MoveId,
    NodeId,
    NodeSpec,
    OfferId,
    Prefetch,
    PrefetchEnd,
    PrefetchId,
    Request,
    RequestId,
    SessionId,
    SlotId,
    StepId,
    StoreId,
    StoreLoad,
    StoreSpec,
    TenantId,
    Tier,
)


@quickly_made
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


@quickly_made
@dataclass(frozen=True, slots=True)
class Assigned:
    """A gateway gave this node a part in a request."""

    assignment: Assignment


@quickly_made
@dataclass(frozen=True, slots=True)
class Cancelled:
    """A gateway no longer wants a request. Unknown ids are ignored: the end may have crossed the cancel."""

    request: RequestId


@dataclass(frozen=True, slots=True)
class SourceLost:
    """The node that a request's blocks are read from is gone. Ignored unless the request still reads, or is to, from that one."""

    request: RequestId
    source: NodeId


@quickly_made
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
    #: Tokens generated: 0 for a slice that does not sample, 1 otherwise, more where several steps were run as one or drafted
    #: tokens were accepted.
    output_tokens: int = 0
    #: Hashes of blocks of which this step computed the last token's KV, in order: only blocks with generated tokens in them.
    #: The newest token has no KV yet and completes nothing. Prompt blocks' hashes came with the assignment.
    hashes: tuple[BlockHash, ...] = ()
    #: True when a sampled token ends the sequence (end of sequence, stop token).
    stopped: bool = False
    #: Set when this sequence alone cannot go on (for example not a number in its logits).
    failure: str | None = None
    #: Tokens that were drafted and verified, accepted or not.
    drafted_tokens: int = 0
    #: Seconds of the step that a draft model took for this sequence: to draft them or, if there are none, to read what came
    #: before. None: it did nothing, what was drafted was looked up.
    drafting_s: float | None = None


@quickly_made
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


@quickly_made
@dataclass(frozen=True, slots=True)
class FetchProgressed:
    """Blocks came from a peer or the store; `tokens` of the prompt, counted from its start, are now present without a hole.

    With `direct` the last of them came from `cmx` alone: they are not in the store's memory.
    """

    request: RequestId
    tokens: int
    direct: bool = False


@quickly_made
@dataclass(frozen=True, slots=True)
class FetchEnded:
    """A fetch or a load is over and will write no more. `tokens` and `direct` as in `FetchProgressed`.

    `computed_tokens` are prompt tokens the source computed for this very request, for the bill; `failure` says why less
    came than was asked for, None if nothing went wrong. `cmx_tokens` of a load came from `cmx`, the others from `cpu`.
    """

    request: RequestId
    tokens: int
    computed_tokens: int = 0
    failure: str | None = None
    cmx_tokens: int = 0
    direct: bool = False


@quickly_made
@dataclass(frozen=True, slots=True)
class OfferEnded:
    """An offer is over and nothing of it is read any more; `failure` says why the store has not got all of it, None if it has."""

    offer: OfferId
    failure: str | None = None


@quickly_made
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


@quickly_made
@dataclass(frozen=True, slots=True)
class BlocksSent:
    """The peer has its copy of these blocks (the answer to one `SendBlocks`)."""

    export: ExportId
    blocks: tuple[BlockId, ...]


@quickly_made
@dataclass(frozen=True, slots=True)
class ExportClosed:
    """The peer is gone or satisfied; nothing of this export is read any more."""

    export: ExportId


@dataclass(frozen=True, slots=True)
class ResyncRequested:
    """A gateway missed KV batches after number `after`; None asks for everything held now. `model` is one of a store's."""

    gateway: GatewayId
    after: int | None
    model: ModelName | None = None


@dataclass(frozen=True, slots=True)
class BlocksRetired:
    """A gateway says that a chain's blocks from `first_block` on are dead: what only that chain has of them goes first.

    With `at_once` it goes now.
    """

    hashes: tuple[BlockHash, ...] = field(repr=False)
    first_block: int
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class BlocksRetained:
    """A gateway says that prompts which begin with a chain of blocks are expected. Ignored as far as it is not held."""

    hashes: tuple[BlockHash, ...] = field(repr=False)
    outlook: Outlook


@quickly_made
@dataclass(frozen=True, slots=True)
class Expected:
    """A gateway expects something else of a context than when its last turn was assigned. Ignored where it is not held."""

    outlook: Outlook


@dataclass(frozen=True, slots=True)
class BlocksWanted:
    """A gateway expects a prompt here. Answered by exactly one `ReportPrefetchEnded`, once the node is done with it."""

    prefetch: Prefetch


@dataclass(frozen=True, slots=True)
class PrefetchCancelled:
    """A gateway expects that prompt no longer. Unknown ids are ignored: the end may have crossed the cancel."""

    prefetch: PrefetchId


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
    | OfferEnded
    | LeasePlaced
    | LeaseEnded
    | ExportOpened
    | BlocksSent
    | ExportClosed
    | ResyncRequested
    | BlocksRetired
    | BlocksRetained
    | BlocksWanted
    | PrefetchCancelled
    | Expected
    | DrainRequested
    | TimerFired[NodeTimer]
)


# --- what happens to a store ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeAttached:
    """A node of the host has mapped the arena. Nothing is granted or served to one that has not attached."""

    node: NodeId
    model: ModelName


@dataclass(frozen=True, slots=True)
class NodeDetached:
    """A node is gone; its offers and reads have ended. A copy that it was in the middle of may go on for a moment."""

    node: NodeId


@quickly_made
@dataclass(frozen=True, slots=True)
class Offered:
    """A node holds complete blocks that the store may want: `hashes`, which follow on `parent`, None at the start of a prompt."""

    offer: OfferId
    node: NodeId
    model: ModelName
    parent: BlockHash | None
    hashes: tuple[BlockHash, ...] = field(repr=False)


@quickly_made
@dataclass(frozen=True, slots=True)
class OfferWritten:
    """The first `blocks` granted ones were copied, and no more will be: the offer is over. 0 if the copy failed."""

    offer: OfferId
    blocks: int


@quickly_made
@dataclass(frozen=True, slots=True)
class ReadOpened:
    """A node wants blocks of a prompt: those from index `first_block` on, up to `tokens` of the prompt.

    `hashes` are the prompt's full-block hashes from its first block on. With `background` no request waits for them, and others'
    reads go before it. With `direct` the node reads segments by itself that are in cmx alone.
    """

    read: ExportId
    node: NodeId
    model: ModelName
    hashes: tuple[BlockHash, ...] = field(repr=False)
    first_block: int
    tokens: int
    background: bool = False
    direct: bool = False


@quickly_made
@dataclass(frozen=True, slots=True)
class SlotsRead:
    """The node has its copy of these slots, the ones served longest ago."""

    read: ExportId
    slots: tuple[SlotId, ...]


@quickly_made
@dataclass(frozen=True, slots=True)
class SegmentRead:
    """The node is through with a segment that it was to read by itself: it has its blocks, or `failure` says why not.

    Those after one that failed it does not read. Unknown ones are ignored: they were given up.
    """

    read: ExportId
    number: int
    failure: MoveFailure | None = None


@dataclass(frozen=True, slots=True)
class ReadClosed:
    """The node is satisfied or gave up; nothing of this read is copied any more. Unknown ids are ignored."""

    read: ExportId


@dataclass(frozen=True, slots=True)
class CmxFound:
    """Segments of a model were found in cmx, the one written longest ago first. Told at start, in pages."""

    model: ModelName
    segments: tuple[BlockHash, ...] = field(repr=False)


@quickly_made
@dataclass(frozen=True, slots=True)
class CmxRead:
    """A `ReadCmx` is over: the slots hold the segment, or `failure` says why not. Nothing is written to them any more."""

    move: MoveId
    failure: MoveFailure | None = None


@quickly_made
@dataclass(frozen=True, slots=True)
class CmxWritten:
    """A `WriteCmx` is over: the segment is in cmx, whole, or `failure` says why not. Its slots are not read any more."""

    move: MoveId
    failure: MoveFailure | None = None


@dataclass(frozen=True, slots=True)
class PrefetchAsked:
    """Somebody expects a prompt: bring its first `blocks` from cmx into the arena, as far as they are there."""

    model: ModelName
    hashes: tuple[BlockHash, ...] = field(repr=False)
    blocks: int


@dataclass(frozen=True, slots=True)
class EvictAsked:
    """Somebody expects no use of blocks [first_block, end_block) of a chain: they are to leave `tier`.

    With `demote` they leave cpu only once all their whole segments are in cmx. What is leased, used, or continued by what is not
    in the range stays.
    """

    model: ModelName
    hashes: tuple[BlockHash, ...] = field(repr=False)
    first_block: int
    end_block: int
    tier: Tier
    demote: bool = False


StoreEvent = (
    NodeAttached
    | NodeDetached
    | Offered
    | OfferWritten
    | ReadOpened
    | SlotsRead
    | SegmentRead
    | ReadClosed
    | CmxFound
    | CmxRead
    | CmxWritten
    | LeasePlaced
    | LeaseEnded
    | PrefetchAsked
    | EvictAsked
    | ResyncRequested
    | TimerFired[StoreTimer]
)


# --- what happens to a cluster ----------------------------------------------------------------------------------------


@quickly_made
@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A client's turn was parsed, tokenised and hashed."""

    request: Request


@quickly_made
@dataclass(frozen=True, slots=True)
class RequestAbandoned:
    """The client went away, or a stop string was found: nobody wants more of this request."""

    request: RequestId
    #: What nodes had brought of it.
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a request has brought is counted: it goes on from there. Answers `Resume`.

    `hashes` are those of the full blocks of its prompt and of the `output_tokens` that came, and `stopped` says that the last
    of these ends the output.
    """

    request: RequestId
    output_tokens: int
    hashes: tuple[BlockHash, ...] = field(repr=False)
    stopped: bool = False


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


@quickly_made
@dataclass(frozen=True, slots=True)
class FirstToken:
    """A request's first token came: its prompt is complete on that node.

    `computed_tokens` of the prompt were computed, on this node or for it on its source; the others were cached. Of those this
    node loaded `cpu_tokens` and `cmx_tokens` from its host's store, which had them in that tier, and `peer_tokens` were fetched
    from a node that had them; the rest was in `hbm`. `regretted_tokens` were computed although this node had held them.

    Where a request goes on that has generated before, it is the first one that this node adds.
    """

    request: RequestId
    computed_tokens: int
    cpu_tokens: int = 0
    cmx_tokens: int = 0
    peer_tokens: int = 0
    regretted_tokens: int = 0


@quickly_made
@dataclass(frozen=True, slots=True)
class Ended:
    """A node is done with its part of a request."""

    request: RequestId
    reason: FinishReason
    output_tokens: int
    #: As in `FirstToken`; for PREFILLED what this node computed and loaded.
    computed_tokens: int
    message: str = ""
    cpu_tokens: int = 0
    cmx_tokens: int = 0
    #: Prompt tokens that a peer had and this node fetched from it.
    peer_tokens: int = 0
    #: Prompt tokens that this node computed although it had held them: it forgot them, not long ago.
    regretted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PrefetchEnded:
    """A node is done with a prefetch, for which it had brought blocks [first_block, end_block) of the chain."""

    prefetch: PrefetchId
    reason: PrefetchEnd
    first_block: int = 0
    end_block: int = 0


@quickly_made
@dataclass(frozen=True, slots=True)
class NodeReported:
    """One frame of a node's stream, without the tokens."""

    node: NodeId
    load: Load
    first_tokens: tuple[FirstToken, ...] = ()
    ended: tuple[Ended, ...] = ()
    kv: tuple[KvBatch, ...] = ()
    prefetches: tuple[PrefetchEnded, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreJoined:
    """A store's stream is up. The same id with a higher incarnation replaces the older one."""

    store: StoreSpec


@dataclass(frozen=True, slots=True)
class StoreLost:
    """A store's stream broke and could not be mended: what it had in `cpu` is lost."""

    store: StoreId
    reason: str


@quickly_made
@dataclass(frozen=True, slots=True)
class StoreReported:
    """What changed in a store's holdings of one model, and its state."""

    store: StoreId
    model: ModelName
    load: StoreLoad
    kv: tuple[KvBatch, ...] = ()


@dataclass(frozen=True, slots=True)
class GatewaysChanged:
    """Other gateways take requests now: `count`, of which this one is the `place`th, from 0 on."""

    place: int
    count: int


@dataclass(frozen=True, slots=True)
class HintAsked:
    """A harness asked for something to be done with the cache; its targets are resolved."""

    hint: Hint


@dataclass(frozen=True, slots=True)
class LeasesTold:
    """A holder tells of leases: all it keeps to a gateway that has just joined, later what other gateways placed and ended.

    It is a node, or else a store.
    """

    node: NodeId | None
    placed: tuple[Lease, ...]
    ended: tuple[LeaseEnded, ...] = ()
    store: StoreId | None = None


@quickly_made
@dataclass(frozen=True, slots=True)
class Answered:
    """A session's turn is over and was understood: what its model waits for now. Ignored of turns that are not known any more."""

    request: RequestId
    model: ModelName
    tenant: TenantId
    session: SessionId
    #: A tool; empty: none, it has said all it has to say.
    tool: str = ""


@dataclass(frozen=True, slots=True)
class ToolStarted:
    """A session waits for a tool of some class, `expected_s` seconds from now if that is known. Ignored of sessions not known."""

    model: ModelName
    tenant: TenantId
    session: SessionId
    tool: str = ""
    expected_s: float | None = None


@dataclass(frozen=True, slots=True)
class ToolFinished:
    """What a session waited for is there: its next turn is about to come."""

    model: ModelName
    tenant: TenantId
    session: SessionId


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """A session comes back no more."""

    model: ModelName
    tenant: TenantId
    session: SessionId


ClusterEvent = (
    RequestArrived
    | RequestAbandoned
    | Resumed
    | Answered
    | ToolStarted
    | ToolFinished
    | SessionEnded
    | GatewaysChanged
    | HintAsked
    | LeasesTold
    | NodeJoined
    | NodeLost
    | NodeDraining
    | NodeReported
    | StoreJoined
    | StoreLost
    | StoreReported
    | DrainRequested
    | TimerFired[ClusterTimer]
)
