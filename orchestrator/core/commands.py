"""Everything a cluster, a node or a store can ask of its driver: imperatives.

Each docstring names the events that end the command. Reasons travel with decisions (`why`) but take no part in equality, so
that tests compare what is done and not why.
"""

from dataclasses import dataclass, field
from typing import Generic

from orchestrator.core.events import Ended, FirstToken, LeaseEnded, PrefetchEnded
from orchestrator.core.hints import LeaseChange, Receipt, Verb
from orchestrator.core.making import quickly_made
from orchestrator.core.outlook import Outlook
from orchestrator.core.timers import ClusterTimer, NodeTimer, StoreTimer, TimerKey
from orchestrator.core.types import (
    Assignment,
    BlockHash,
    BlockId,
    ExportId,
    GatewayId,
    KvBatch,
    Lease,
    ModelName,
    MoveId,
    NodeId,
    OfferId,
    Prefetch,
    PrefetchId,
    RequestId,
    SlotId,
    StepId,
    StoreId,
    TenantId,
    Tier,
)


@quickly_made
@dataclass(frozen=True, slots=True)
class SetTimer(Generic[TimerKey]):
    """Fire `TimerFired(key)` at time `at`; setting a key again moves it."""

    key: TimerKey
    at: float


@quickly_made
@dataclass(frozen=True, slots=True)
class ClearTimer(Generic[TimerKey]):
    """Forget a timer; clearing an unset one does nothing."""

    key: TimerKey


# --- what a node asks for ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Slice:
    """One sequence's share of a step: compute tokens [start, start + count) of prompt plus output.

    `blocks` go into the sequence's block table from index `first_block` on; entries before stay as they were told. A
    preempted sequence starts over with `first_block` 0. `sample` asks for a token after the last one computed. Up to `draft_max`
    tokens may be looked up after that one and verified with it, or, where nothing is found, up to `model_draft_max` be drafted by
    a model: the sequence's blocks have room for as many as the larger of the two.

    Not frozen, because every sequence needs one in every step and a frozen one takes four times as long to make.
    """

    request: RequestId
    start: int
    count: int
    first_block: int
    blocks: tuple[BlockId, ...]
    sample: bool
    draft_max: int = 0
    model_draft_max: int = 0

    @property
    def drafts_max(self) -> int:
        """Tokens that may be drafted, wherever they come from."""
        return max(self.draft_max, self.model_draft_max)


@quickly_made
@dataclass(frozen=True, slots=True)
class RunStep:
    """Run one engine step. Ended by `StepFinished` or `StepFailed`; at most one step runs at a time.

    The first `decoding` slices only decode. Up to `steps_max` such steps in a row, each a token further, would find the node
    with nothing to decide, as long as no sequence ends and nothing else happens to it: a driver that knows what they amount to
    may run them as one.
    """

    step: StepId
    slices: tuple[Slice, ...]
    decoding: int = 0
    steps_max: int = field(default=1, compare=False)


@quickly_made
@dataclass(frozen=True, slots=True)
class Fetch:
    """Copy a prompt's blocks from a peer into this node's `blocks`, which stand for prompt blocks `first_block` on.

    `tokens` of the prompt (from its start) are wanted; the last block may be part filled. `hashes` are all the prompt's.
    `pending` and `incarnation` (of the source) as in `ExportOpened`. Answered by any number of `FetchProgressed` and ended by
    exactly one `FetchEnded`. For a prefetch, whose id stands in the request's place, nobody waits: what requests wait for comes
    first.
    """

    request: RequestId
    source: NodeId
    hashes: tuple[BlockHash, ...] = field(repr=False)
    first_block: int
    blocks: tuple[BlockId, ...]
    tokens: int
    pending: bool
    incarnation: int | None = None


@quickly_made
@dataclass(frozen=True, slots=True)
class LoadBlocks:
    """Copy a prompt's blocks from the host's store into this node's `blocks`, which stand for prompt blocks `first_block` on.

    All blocks up to `tokens` of the prompt (from its start) are wanted, whole ones only. `hashes` are all the prompt's. Answered,
    ended and stopped as `Fetch` is, for prefetches too; a request never fetches and loads at once, nor does a prefetch.
    """

    request: RequestId
    hashes: tuple[BlockHash, ...] = field(repr=False)
    first_block: int
    blocks: tuple[BlockId, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class StopFetch:
    """Give a fetch or a load up. Still ended by `FetchEnded`: until then the blocks may be written to."""

    request: RequestId


@quickly_made
@dataclass(frozen=True, slots=True)
class Offer:
    """Let the host's store copy what it lacks of `blocks`, which are named `hashes` and follow on the block named `parent`.

    Ended by exactly one `OfferEnded`; until then none of the blocks, and none before them in the chain, is written to.
    """

    offer: OfferId
    parent: BlockHash | None
    hashes: tuple[BlockHash, ...] = field(repr=False)
    blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class StopOffer:
    """Give an offer up, for its blocks are needed. Still ended by `OfferEnded`: until then they may be read."""

    offer: OfferId


@quickly_made
@dataclass(frozen=True, slots=True)
class SendBlocks:
    """Hand blocks to a peer. They complete the prompt up to `tokens`. Ended by `BlocksSent` or `ExportClosed`.

    `final` says that nothing follows; `computed_tokens` then tells what this node computed of the prompt. A final command
    without blocks ends an export that has nothing (more) to give.
    """

    export: ExportId
    blocks: tuple[BlockId, ...]
    tokens: int
    final: bool
    computed_tokens: int = 0


@quickly_made
@dataclass(frozen=True, slots=True)
class Forget:
    """The engine may drop what it keeps for a request (tokens, block table, sampling state)."""

    request: RequestId


@quickly_made
@dataclass(frozen=True, slots=True)
class ReportFirstToken:
    """Tell the request's gateway, in the frame that carries this step's tokens."""

    report: FirstToken


@quickly_made
@dataclass(frozen=True, slots=True)
class ReportEnded:
    """Tell the request's gateway that this node is done with it, after the last of its tokens."""

    report: Ended


@dataclass(frozen=True, slots=True)
class ReportPrefetchEnded:
    """Tell the gateway that asked for a prefetch what became of it."""

    report: PrefetchEnded


@dataclass(frozen=True, slots=True)
class DropGateway:
    """End the stream of a gateway that hangs: its requests have ended here, and it must learn so if it wakes. Nothing answers."""

    gateway: GatewayId


@quickly_made
@dataclass(frozen=True, slots=True)
class PublishKv:
    """Tell gateways what changed in the holdings: all of them, or one that asked for a resync."""

    batches: tuple[KvBatch, ...]
    gateway: GatewayId | None = None


@dataclass(frozen=True, slots=True)
class TellLeases:
    """Tell gateways of leases: all of them what is new, or one that may know of none all there are. Nothing answers."""

    placed: tuple[Lease, ...] = ()
    ended: tuple[LeaseEnded, ...] = ()
    gateway: GatewayId | None = None


NodeCommand = (
    RunStep
    | Fetch
    | LoadBlocks
    | StopFetch
    | Offer
    | StopOffer
    | SendBlocks
    | Forget
    | ReportFirstToken
    | ReportEnded
    | ReportPrefetchEnded
    | PublishKv
    | TellLeases
    | DropGateway
    | SetTimer[NodeTimer]
    | ClearTimer[NodeTimer]
)


# --- what a store asks for --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grant:
    """Let a node copy blocks [first, first + len(slots)) of its offer into these slots.

    Ended by `OfferWritten` or `NodeDetached`. Without slots nothing is wanted and the offer is over; nothing answers. `orphan`
    then says that the offer's parent is not held: what comes before may be offered.
    """

    offer: OfferId
    first: int
    slots: tuple[SlotId, ...]
    orphan: bool = False


@quickly_made
@dataclass(frozen=True, slots=True)
class ServeSlots:
    """Let a node copy these slots, the next blocks of its read. Ended by `SlotsRead`, `ReadClosed` or `NodeDetached`.

    They complete the prompt up to `tokens`. `final` says that nothing follows; the read then ends with `ReadClosed`.
    """

    read: ExportId
    slots: tuple[SlotId, ...]
    tokens: int
    final: bool


@dataclass(frozen=True, slots=True)
class ServeSegment:
    """Let a node read a segment from cmx by itself, straight into its own memory. Ended by `SegmentRead`, or with its read.

    It is segment number `number` of the read's chain, counted from 0, and brings the next blocks, up to `tokens` of the prompt.
    """

    read: ExportId
    segment: BlockHash
    number: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ReadCmx:
    """Copy a segment from cmx into these slots, one a block. Ended by exactly one `CmxRead`."""

    move: MoveId
    model: ModelName
    segment: BlockHash
    slots: tuple[SlotId, ...]


@dataclass(frozen=True, slots=True)
class WriteCmx:
    """Copy these slots, one a block, to cmx as a segment, whole or not at all. Ended by exactly one `CmxWritten`."""

    move: MoveId
    model: ModelName
    segment: BlockHash
    slots: tuple[SlotId, ...]


@dataclass(frozen=True, slots=True)
class CancelMove:
    """Give a move up. It is still ended by its event: until then its slots may be written to."""

    move: MoveId


@dataclass(frozen=True, slots=True)
class DeleteCmx:
    """Remove segments from cmx. Nothing answers; a later `WriteCmx` of the same segment takes place after it."""

    model: ModelName
    segments: tuple[BlockHash, ...]


@quickly_made
@dataclass(frozen=True, slots=True)
class PublishHoldings:
    """Tell gateways what changed in what is held of a model: all of them, or one that asked for a resync."""

    model: ModelName
    batches: tuple[KvBatch, ...]
    gateway: GatewayId | None = None


StoreCommand = (
    Grant
    | ServeSlots
    | ServeSegment
    | ReadCmx
    | WriteCmx
    | CancelMove
    | DeleteCmx
    | PublishHoldings
    | SetTimer[StoreTimer]
    | ClearTimer[StoreTimer]
)


# --- what a cluster asks for ------------------------------------------------------------------------------------------


@quickly_made
@dataclass(frozen=True, slots=True)
class Scores:
    """Why a route was taken, in predicted seconds and tokens."""

    policy: str
    hit_tokens: int
    #: Predicted time to first token, seconds.
    predicted_ttft_s: float
    queue_s: float = 0.0
    compute_s: float = 0.0
    fetch_s: float = 0.0
    load_s: float = 0.0
    candidates: int = 0


@quickly_made
@dataclass(frozen=True, slots=True)
class Assign:
    """Give a node a part in a request. Ended by an `Ended` in a `NodeReported`, or by `NodeLost`."""

    node: NodeId
    assignment: Assignment
    why: Scores | None = field(default=None, compare=False)


@quickly_made
@dataclass(frozen=True, slots=True)
class Cancel:
    """Tell a node that a request is no longer wanted there. Nothing answers."""

    node: NodeId
    request: RequestId


@dataclass(frozen=True, slots=True)
class ReportSourceLost:
    """Tell a node that the node it reads a request's blocks from is gone. Nothing answers."""

    node: NodeId
    request: RequestId
    source: NodeId


@quickly_made
@dataclass(frozen=True, slots=True)
class Expect:
    """Tell a node that may hold a context that something else is expected of it than before. Nothing answers."""

    node: NodeId
    outlook: Outlook


@quickly_made
@dataclass(frozen=True, slots=True)
class Complete:
    """The request is over and went well; its counts are final.

    `cached_tokens` of the prompt were not computed; of those `cpu_tokens` and `cmx_tokens` were loaded from a store that had them
    in that tier, and `peer_tokens` fetched from another node, by whichever node computed the rest.
    """

    request: RequestId
    ended: Ended
    cached_tokens: int
    predicted_cached_tokens: int
    cpu_tokens: int = 0
    cmx_tokens: int = 0
    peer_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer a request that was not started with an HTTP status: 400, 403, 429, 503, 504 or 529, and when to come back."""

    request: RequestId
    status: int
    code: str
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request that may have delivered tokens already: the client gets one clear error."""

    request: RequestId
    status: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Restart:
    """The request starts over on other nodes; nothing of it had reached the client. Followed by new `Assign`s."""

    request: RequestId
    reason: str


@dataclass(frozen=True, slots=True)
class Resume:
    """The request is to go on elsewhere, after what was delivered: take no more of it from where it ran, and count that.

    Ended by `Resumed`, which is followed by new `Assign`s.
    """

    request: RequestId
    reason: str


@dataclass(frozen=True, slots=True)
class RequestStoreResync:
    """Ask a store for a model's KV batches after `after`, or for all it holds (None). Ended by those in a `StoreReported`."""

    store: StoreId
    model: ModelName
    after: int | None


@dataclass(frozen=True, slots=True)
class RequestResync:
    """Ask a node for the KV batches after `after`, or for all it holds (None). Ended by the batches in a `NodeReported`."""

    node: NodeId
    after: int | None


@dataclass(frozen=True, slots=True)
class AnswerHint:
    """Tell who asked what became of an action; `(message, action)` name it within its tenant."""

    tenant: TenantId
    verb: Verb
    message: str
    action: str
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class PlaceLease:
    """Tell holders of a lease, as it is now. Nothing answers.

    `change` is what has become of it, for whoever watches or counts; None if nothing has, and a holder only has to be told.
    """

    lease: Lease
    change: LeaseChange | None
    nodes: tuple[NodeId, ...]
    stores: tuple[StoreId, ...] = ()


@dataclass(frozen=True, slots=True)
class EndLease:
    """Tell holders that a lease is over. Nothing answers. `change` as in `PlaceLease`; `lease` is as it was last."""

    lease: Lease
    change: LeaseChange | None
    nodes: tuple[NodeId, ...]
    stores: tuple[StoreId, ...] = ()


@dataclass(frozen=True, slots=True)
class EvictBlocks:
    """Tell nodes that a chain's blocks from `first_block` on are dead: they go before anything else, or now. Nothing answers."""

    model: ModelName
    hashes: tuple[BlockHash, ...] = field(repr=False)
    first_block: int
    at_once: bool
    nodes: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class RetainBlocks:
    """Tell nodes that prompts which begin with a chain of blocks are expected. Nothing answers."""

    model: ModelName
    hashes: tuple[BlockHash, ...] = field(repr=False)
    outlook: Outlook
    nodes: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class PrefetchStored:
    """Advise stores to bring a chain's first `blocks` from cmx into their memory. Nothing answers."""

    model: ModelName
    hashes: tuple[BlockHash, ...] = field(repr=False)
    blocks: int
    stores: tuple[StoreId, ...]


@dataclass(frozen=True, slots=True)
class PrefetchBlocks:
    """Have a node bring a chain into its memory. Ended by a `PrefetchEnded` in a `NodeReported`, or by `NodeLost`."""

    node: NodeId
    prefetch: Prefetch


@dataclass(frozen=True, slots=True)
class CancelPrefetch:
    """Tell a node that a prefetch is no longer wanted. Still ended as `PrefetchBlocks` says."""

    node: NodeId
    prefetch: PrefetchId


@dataclass(frozen=True, slots=True)
class EvictStored:
    """Advise stores that blocks [first_block, end_block) of a chain are to leave a tier, see `EvictAsked`. Nothing answers."""

    model: ModelName
    hashes: tuple[BlockHash, ...] = field(repr=False)
    first_block: int
    end_block: int
    tier: Tier
    demote: bool
    stores: tuple[StoreId, ...]


ClusterCommand = (
    Assign
    | Cancel
    | ReportSourceLost
    | Expect
    | Complete
    | Refuse
    | Abort
    | Restart
    | Resume
    | RequestResync
    | RequestStoreResync
    | AnswerHint
    | PlaceLease
    | EndLease
    | EvictBlocks
    | RetainBlocks
    | PrefetchStored
    | PrefetchBlocks
    | CancelPrefetch
    | EvictStored
    | SetTimer[ClusterTimer]
    | ClearTimer[ClusterTimer]
)
