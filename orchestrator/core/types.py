"""The nouns every other file speaks in: ids, requests, assignments, nodes, loads.

No payload is ever in here. A request is a count of tokens and the hashes of its full blocks; the tokens themselves and the
bytes of KV stay with whoever drives the core.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NewType

from orchestrator.core.experts import ExpertBalance
from orchestrator.core.making import quickly_made
from orchestrator.core.outlook import Outlook

#: Unique in the cluster: a running number in the lowest `REQUEST_SERIAL_BITS`, then the gateway's, then that of the attempt.
#: Gateways and clients mean a request by its first attempt's id; nodes know it by that of the attempt they have a part in, so
#: that what still comes of one that was given up is nobody's.
RequestId = NewType("RequestId", int)
GatewayId = NewType("GatewayId", int)
NodeId = NewType("NodeId", str)
#: One host's store of KV below its nodes' memory.
StoreId = NewType("StoreId", str)
#: One start of an FFN rank, as ranks on other hosts call it.
RankName = NewType("RankName", str)
ModelName = NewType("ModelName", str)
#: What clients call a model with a LoRA adapter; no model is called so.
AdapterName = NewType("AdapterName", str)
PoolName = NewType("PoolName", str)
SessionId = NewType("SessionId", str)
TenantId = NewType("TenantId", str)
#: Names a block's tokens and everything before them: 16 bytes (see `blocks.py`), in simulations the numbers that traces give;
#: decisions tell them apart and do nothing else with them.
BlockHash = NewType("BlockHash", object)
#: A slot of one node's paged KV pool, 0 to blocks - 1.
BlockId = NewType("BlockId", int)
StepId = NewType("StepId", int)
#: One peer's reading of blocks from one node, or a node's from its host's store.
ExportId = NewType("ExportId", int)
#: A slot of one model's part of a store's arena, 0 to slots - 1.
SlotId = NewType("SlotId", BlockId)
#: One run of blocks that a node offers to its host's store; its driver numbers them.
OfferId = NewType("OfferId", int)
#: One transfer of a segment between a store's arena and cmx.
MoveId = NewType("MoveId", int)
#: Unique in the cluster; made of what asked for the lease, so that the same asked twice is one.
LeaseId = NewType("LeaseId", str)

#: A chain that a node brings into its memory for no request yet; unique in the cluster. Where nodes deal with who brings blocks
#: it stands in a request's place: no request has its bit.
PrefetchId = NewType("PrefetchId", RequestId)

#: Whose requests are where no keys are asked for.
DEFAULT_TENANT = TenantId("default")
#: Seeds are whole numbers of 64 bits; greater ones, and negative ones, are cut to them.
SEED_MASK = (1 << 64) - 1
#: What a tenant's share may be; within these, the work of years stays a number.
SHARE_MIN, SHARE_MAX = 1e-3, 1e6

REQUEST_SERIAL_BITS, REQUEST_GATEWAY_BITS = 40, 12
_ATTEMPT_SHIFT = REQUEST_SERIAL_BITS + REQUEST_GATEWAY_BITS
_GATEWAY_MASK, _REQUEST_MASK = (1 << REQUEST_GATEWAY_BITS) - 1, (1 << _ATTEMPT_SHIFT) - 1
#: Attempts at a request beyond the first; ids so fit 60 bits.
ATTEMPTS_MAX = 255
_PREFETCH_BIT = 1 << 62


def request_id(gateway: GatewayId, serial: int) -> RequestId:
    """Return the cluster-wide id of a gateway's `serial`-th request."""
    assert 0 <= serial < 1 << REQUEST_SERIAL_BITS, f"serial {serial} does not fit {REQUEST_SERIAL_BITS} bits"
    return RequestId(gateway << REQUEST_SERIAL_BITS | serial)


def gateway_of(request: RequestId) -> GatewayId:
    """Return the gateway that issued a request id, and so the one that waits for its tokens."""
    return GatewayId(request >> REQUEST_SERIAL_BITS & _GATEWAY_MASK)


def attempt_id(request: RequestId, attempt: int) -> RequestId:
    """Return what nodes call a request in its `attempt`-th attempt, from 0."""
    assert 0 <= attempt <= ATTEMPTS_MAX, f"attempt {attempt} at request {request}: there are {ATTEMPTS_MAX} at most"
    return RequestId(request | attempt << _ATTEMPT_SHIFT)


def request_of(attempt: RequestId) -> RequestId:
    """Return the request that an attempt's id is about."""
    return RequestId(attempt & _REQUEST_MASK)


def prefetch_id(gateway: GatewayId, serial: int) -> PrefetchId:
    """Return the cluster-wide id of a gateway's `serial`-th prefetch; `gateway_of` returns that one."""
    return PrefetchId(RequestId(request_id(gateway, serial) | _PREFETCH_BIT))


def is_prefetch(identity: RequestId) -> bool:
    """Return whether an id is a prefetch's, not a request's."""
    return bool(identity & _PREFETCH_BIT)


class ServiceClass(StrEnum):
    """What the user asks of time to first token, inter-token time and jitter; later members are more urgent."""

    BATCH = "batch"
    STANDARD = "standard"
    INTERACTIVE = "interactive"
    CADENCE = "cadence"


class PoolKind(StrEnum):
    """What the nodes of a pool do."""

    PREFILL = "prefill"  # computes prompts and hands their KV to a decode node
    DECODE = "decode"  # generates; computes short uncached tails itself
    AGGREGATED = "aggregated"  # one node does both
    LPX = "lpx"  # generates on a fixed beat, for class cadence; computes no prompts

    @property
    def generates(self) -> bool:
        """Whether requests can end on such nodes."""
        return self is not PoolKind.PREFILL


class Role(StrEnum):
    """What one node does for one request."""

    PREFILL = "prefill"  # compute the prompt's KV and hold it until it is fetched
    GENERATE = "generate"  # deliver tokens


class Tier(StrEnum):
    """A level of the memory that KV is kept in, best first."""

    HBM = "hbm"  # a node's own pool
    CPU = "cpu"  # the host's arena
    CMX = "cmx"  # content-addressed storage that all hosts share

    @property
    def level(self) -> int:
        """0 for the best; lower tiers have higher ones."""
        return tuple(Tier).index(self)

    @property
    def below(self) -> "Tier | None":
        """The next lower one."""
        return next((tier for tier in Tier if tier.level == self.level + 1), None)


class FinishReason(StrEnum):
    """Why a node ended a request."""

    STOP = "stop"  # an end-of-sequence or stop token
    LENGTH = "length"  # output_tokens_max reached
    PREFILLED = "prefilled"  # a PREFILL assignment is computed; its blocks are held for the fetch
    CANCELLED = "cancelled"
    FAILED = "failed"  # the node could not serve it; the report carries the message


@quickly_made
@dataclass(frozen=True, slots=True)
class Request:
    """One turn as the cluster sees it."""

    id: RequestId
    model: ModelName
    tenant: TenantId
    prompt_tokens: int
    #: Chained hashes of the prompt's full blocks, first block first: `prompt_tokens // block_tokens` of them.
    hashes: tuple[BlockHash, ...] = field(repr=False)
    #: The most tokens that may be generated.
    output_tokens_max: int
    session: SessionId | None = None
    service_class: ServiceClass = ServiceClass.STANDARD
    #: Higher is served earlier among requests of one class.
    priority: int = 0
    #: Seconds from arrival after which the request is given up.
    timeout_s: float = 600.0
    #: What clients, logs and traces call it.
    name: str = ""
    #: Of class cadence: the longest beat, in seconds, that serves it; 0: any.
    beat_s_max: float = 0.0
    #: Log probabilities of its prompt are wanted: all of it is computed for this request, whatever is cached.
    scored: bool = False


@quickly_made
@dataclass(frozen=True, slots=True)
class ThoughtsLimit:
    """How many of an output's tokens may be thoughts, and which tokens tell where those begin and end."""

    tokens_max: int
    #: Ends thoughts; comes after so many tokens of them, unless it has come before.
    end: int
    #: Begin thoughts, one after the other, if there are any; empty: the output begins with them.
    begin: tuple[int, ...] = ()
    #: They may begin again, and where they must not, this comes in the place of the second that begins them (there are two at
    #: least); None: they begin once, with the output.
    instead: int | None = None


@quickly_made
@dataclass(frozen=True, slots=True)
class Sampling:
    """What a node computes tokens with, how it chooses them, what ends them, and what it reports of the choice."""

    #: 0 is greedy and ignores top_p, top_k, min_p and seed.
    temperature: float = 0.0
    #: 1 keeps all.
    top_p: float = 1.0
    #: 0 keeps all.
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    #: 0 to `SEED_MASK`; the same seed, prompt and parameters give the same tokens, whatever else is in the batch. None for any.
    seed: int | None = None
    #: All that end the output once the model's own ends are among them, if they are to count: nodes know no others.
    stop_token_ids: tuple[int, ...] = ()
    #: Most likely tokens to report at each position, beside the sampled one; None for no log probabilities at all.
    logprobs: int | None = None
    #: Added to logits, by token id.
    logit_bias: Mapping[int, float] = field(default_factory=lambda: {})
    #: Logits of tokens that the prompt or the output has are divided by it, negative ones multiplied; 1 changes none.
    repetition_penalty: float = 1.0
    #: Nothing ends the output before it has so many tokens.
    output_tokens_min: int = 0
    #: Runs of tokens that are never completed, whether they begin in the prompt or in the output; none is empty.
    forbidden_runs: tuple[tuple[int, ...], ...] = ()
    #: The only tokens that may come; empty for all.
    allowed_token_ids: tuple[int, ...] = ()
    #: What the output must be to the letter, as engines read it (`live/text/grammars.py` writes it); empty for anything. An end
    #: is a token that may come exactly where the grammar may end.
    grammar: str = ""
    #: Most likely tokens to report at each position of the prompt but the first, beside its token; None for none at all.
    prompt_logprobs: int | None = None
    #: The LoRA adapter that the model is changed by; None: none.
    adapter: AdapterName | None = None
    #: None: it may think for as long as it likes.
    thoughts: ThoughtsLimit | None = None

    def ending_with(self, tokens: frozenset[int]) -> "Sampling":
        """Return the same with further tokens that end the output."""
        further = tokens.difference(self.stop_token_ids)
        return replace(self, stop_token_ids=(*self.stop_token_ids, *sorted(further))) if further else self

    def for_choice(self, number: int) -> "Sampling":
        """Return the same for one of several choices, from 0: each has a seed of its own."""
        if self.seed is None or not number:
            return self
        return replace(self, seed=(self.seed + number) & SEED_MASK)


@quickly_made
@dataclass(frozen=True, slots=True)
class Assignment:
    """One node's part in one request.

    The node serves the prompt's tokens from four runs, left to right; each but the last may be empty:

        [0, hit)                 blocks it holds already
        [hit, stored_tokens)     blocks it loads from its host's store
        [.., source_tokens)      blocks it fetches from `source`, if there is one
        [.., given_tokens)       what is left: it computes them

    A load or a fetch that brings less than promised only makes a later run longer.

    A request that goes on after its node was lost comes with what it has generated, behind its prompt:

        |-------- prompt_tokens --------|-- generated_tokens --|-- still to come --|
                                        |-------------- output_tokens_max ---------|
    """

    request: RequestId
    role: Role
    prompt_tokens: int
    hashes: tuple[BlockHash, ...] = field(repr=False)
    output_tokens_max: int
    #: Node to fetch from, or None to compute everything that is not held.
    source: NodeId | None = None
    #: Prompt tokens the source is expected to have, counted from the start of the prompt.
    source_tokens: int = 0
    #: True when the source is still computing this very request (prefill and decode apart): wait for it as it goes.
    source_pending: bool = False
    #: Which start of the source is meant: a later one holds nothing of what that held.
    source_incarnation: int | None = None
    priority: int = 0
    #: What is expected after this turn; None: nothing is known.
    #: A prediction: like reasons it takes no part in equality.
    outlook: Outlook | None = field(default=None, compare=False)
    #: What clients, logs and traces call the request.
    name: str = ""
    tenant: TenantId = DEFAULT_TENANT
    #: The tenant's part of a full node, relative to the other tenants' that compete for it then.
    share: float = 1.0
    #: Prompt tokens that the store of the node's host is to bring, counted from the start of the prompt.
    stored_tokens: int = 0
    #: Tokens of the output that were generated elsewhere. `hashes` name their full blocks as well, and "prompt" in what is to be
    #: loaded, fetched or held means both.
    generated_tokens: int = 0
    #: Log probabilities of the prompt are wanted: it takes nothing of it from what is cached, but for what was computed for this
    #: very request. What is computed is cached for others as ever.
    scored: bool = False

    @property
    def given_tokens(self) -> int:
        """Tokens that it comes with: the prompt and what was generated."""
        return self.prompt_tokens + self.generated_tokens


@dataclass(frozen=True, slots=True)
class Prefetch:
    """A chain that a node is to bring into its memory before a request asks for it, and to keep there for a while.

    Its blocks come from three runs, left to right, as a request's do; nothing is computed:

        [0, hit)                 blocks the node holds already
        [hit, stored_blocks)     blocks it loads from its host's store
        [.., source_blocks)      blocks it fetches from `source`, if there is one
    """

    id: PrefetchId
    #: From the prompt's first block to the last one that is wanted.
    hashes: tuple[BlockHash, ...] = field(repr=False)
    #: Seconds, from when this is told, after which it is given up, or kept no longer.
    keep_s: float
    stored_blocks: int = 0
    source: NodeId | None = None
    source_blocks: int = 0
    #: Which start of the source is meant.
    source_incarnation: int | None = None


class PrefetchEnd(StrEnum):
    """Why a node is done with a prefetch."""

    USED = "used"  # a request came for all of it, which keeps it now
    LAPSED = "lapsed"  # nobody came in its time
    CANCELLED = "cancelled"  # who asked for it wants it no more, or is gone, or the node leaves
    NO_ROOM = "no_room"  # the node needs the memory for requests, or has lent as much as it may
    NOT_FOUND = "not_found"  # nobody brought anything of it


@dataclass(frozen=True, slots=True)
class CostProfile:
    """Step time of one kind of node, affine in context; see `costs.py` for the formula. All in seconds unless named otherwise.

        attention = sequence_s * n + context_token_s * sum(c) + prefill_token_context_s * sum(p * (c + p / 2))
        rest      = prefill_token_s * sum(p) + curve(sum(p) + n * pass_tokens)
        step      = step_s + (1 - overlap) * (attention + rest) + overlap * max(attention, rest)

    p are prompt tokens computed in the step, c the context before them or before a decoded token, n the sequences that
    decode. `curve` is piecewise linear through (batch_tokens, batch_s): weights read, experts hit, matrix products, hops. All
    zero means that a step takes no time. With a beat every step takes that; what is above is the work that must fit into it.
    """

    step_s: float = 0.0
    prefill_token_s: float = 0.0
    prefill_token_context_s: float = 0.0
    sequence_s: float = 0.0
    context_token_s: float = 0.0
    #: Bytes a second at which blocks arrive from another node.
    fetch_bytes_per_s: float = 2e9
    #: Seconds before the first fetched byte arrives.
    fetch_latency_s: float = 0.001
    #: Points of the curve: tokens in a step, ascending, and the seconds of so many; level before the first, the last slope
    #: goes on after the last.
    batch_tokens: tuple[int, ...] = ()
    batch_s: tuple[float, ...] = ()
    #: Share of attention and the rest that run at the same time on different processors (ping-pong micro-batches), 0 to 1.
    overlap: float = 0.0
    #: Tokens computed for each decoding sequence in a pass: 1, and one more for each drafted token to verify.
    pass_tokens: int = 1
    #: Tokens a pass yields for each decoding sequence, on average: over 1 with speculation.
    tokens_per_pass: float = 1.0
    #: Seconds from one pass to the next on nodes that keep a beat; 0: a pass begins when the one before it is done.
    beat_s: float = 0.0
    #: Seconds in which a draft model drafts a token for each sequence for which it does (`engine.speculation`).
    draft_step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Lease:
    """A promise to a tenant that a chain of blocks stays at or above a tier for a while.

    Gateways and holders (nodes, stores) each keep what they were told. A lease that is renewed, moved to other blocks or lowered
    keeps its id and counts `revision` up: whoever hears of several believes the highest.
    """

    id: LeaseId
    tenant: TenantId
    model: ModelName
    #: From the first block of the prompt to the last one that is leased: one is of use only with all before it.
    hashes: tuple[BlockHash, ...] = field(repr=False)
    #: The lowest that the blocks may sink to.
    tier: Tier
    #: Seconds left, from when this is told: clocks of processes differ.
    ttl_s: float
    #: What the blocks take of the tenant's quota.
    size_bytes: int
    revision: int = 0
    #: The session that was named to place it, if one was.
    session: SessionId | None = None

    def until(self, expires_at: float, now: float) -> "Lease":
        """Return it as it is told `now`, with the seconds that it has left."""
        return replace(self, ttl_s=expires_at - now)


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What a node is: fixed from its start to its end."""

    id: NodeId
    model: ModelName
    pool: PoolName
    kind: PoolKind
    #: Counts restarts under the same id; a higher one makes all belief about the lower one void.
    incarnation: int
    #: KV blocks in its pool.
    blocks: int
    block_tokens: int
    block_bytes: int
    #: Sequences that decode together at most.
    sequences_max: int
    #: Tokens computed in one step at most, decoded and prefilled together.
    step_tokens_max: int
    #: Longest prompt plus output it accepts, tokens.
    context_tokens_max: int
    profile: CostProfile
    #: gRPC address, host:port.
    address: str = ""
    #: Equal on nodes that share host memory.
    host: str = ""
    #: True if its host has a store: what it computes is offered to that, and loaded from there when it is told to.
    stores: bool = False
    #: KV blocks that leases may hold together.
    leased_blocks_max: int = 0
    #: Tokens that its engine drafts for a sequence in one step at most; 0: it does not speculate.
    draft_tokens_max: int = 0
    #: True if a draft model drafts where nothing is looked up.
    draft_model: bool = False


@quickly_made
@dataclass(frozen=True, slots=True)
class TenantLoad:
    """A tenant's part in a node's load: requests that wait, and prompt tokens accepted and not yet computed."""

    tenant: TenantId
    waiting: int
    queued_tokens: int


@quickly_made
@dataclass(frozen=True, slots=True)
class SplitLoad:
    """What the two halves of split decode did for a node since its start."""

    #: Seconds that it computed, all but what FFN ranks do; and that FFN ranks computed for it, all of them together.
    attention_s: float = 0.0
    ffn_s: float = 0.0
    #: FFN ranks of its group for each attention rank.
    ffn_ranks: float = 0.0
    #: Of the node that speaks for its group, once experts' loads are known.
    experts: ExpertBalance | None = None
    #: FFN ranks that it reaches by memory that it shares with them, and over the network.
    links_shared: int = 0
    links_network: int = 0


@dataclass(frozen=True, slots=True)
class PooledDrafts:
    """What a pool that drafts did for a node since its start, and how that process is."""

    #: Steps for which it was asked: those with an answer, those whose answer came late or not at all, and those in which there
    #: was nobody to ask.
    answered: int = 0
    late: int = 0
    unreached: int = 0
    #: Sequences that were asked for and found no slot.
    slotless: int = 0
    #: Seconds that steps waited for it.
    wait_s: float = 0.0
    #: Slots of the process, and those that are taken, by whichever nodes; both 0 while it is not reached.
    slots: int = 0
    slots_taken: int = 0


@quickly_made
@dataclass(frozen=True, slots=True)
class Load:
    """A node's state at the end of a step; each is a count now, not a rate."""

    running: int = 0
    waiting: int = 0
    #: Prompt tokens accepted and not yet computed.
    queued_tokens: int = 0
    #: Context tokens of the sequences that decode.
    context_tokens: int = 0
    blocks_free: int = 0
    #: Blocks with reusable content that nobody uses now: free for the asking, at the price of forgetting.
    blocks_cached: int = 0
    blocks_used: int = 0
    #: Measured over predicted step time, smoothed; 1.0 until measured.
    cost_scale: float = 1.0
    preemptions: int = 0
    #: Smoothed seconds of recent steps.
    step_s: float = 0.0
    #: What waits and is queued, by tenant; empty if all of it is the default tenant's.
    tenants: tuple[TenantLoad, ...] = ()
    #: Blocks kept for leases, and those that leases wanted kept and did not get, counted for each lease.
    blocks_leased: int = 0
    blocks_unleased: int = 0
    #: Blocks forgotten for want of room since its start, and the seconds that the newest of them had not been used; 0: none was.
    blocks_evicted: int = 0
    evicted_idle_s: float = 0.0
    #: Tokens drafted since its start, and how many of them were accepted.
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    #: Of an engine that keeps a beat, since its start: its beats, those whose tokens were not there by the beat's end, and the
    #: seconds that the last one's step began late.
    beats: int = 0
    beats_missed: int = 0
    beat_late_s: float = 0.0
    #: None of a node whose attention and FFN are not split.
    split: SplitLoad | None = None
    #: Blocks that it would bring for prefetches now, and those that it keeps for them.
    prefetch_room_blocks: int = 0
    blocks_prefetched: int = 0
    #: Blocks that prefetches have brought since its start; of those, found by a request before they went, and forgotten unused.
    prefetched: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    #: None of a node that no pool drafts for.
    pooled_drafts: PooledDrafts | None = None


class MoveFailure(StrEnum):
    """Why a transfer to or from cmx did not do what it was to."""

    MISSING = "missing"  # there is no such object
    DAMAGED = "damaged"  # it is not what was written: cut off, changed, of another size
    UNAVAILABLE = "unavailable"  # the storage does not answer, or refuses
    FULL = "full"  # the storage has no room
    CANCELLED = "cancelled"  # given up before it was done


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One model's part of a store."""

    model: ModelName
    block_tokens: int
    block_bytes: int
    #: Blocks that its part of the arena has room for.
    slots: int
    #: Blocks in a segment, the unit of cmx: segments are aligned in their chain, and named by their last block.
    segment_blocks: int = 8
    #: Whether segments of it go to cmx.
    cmx: bool = False

    @property
    def segment_bytes(self) -> int:
        return self.segment_blocks * self.block_bytes


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """What a store is: fixed from its start to its end. Nodes of its host read from it, no others."""

    id: StoreId
    #: Counts restarts under the same id; a higher one makes all belief about the lower one's arena void.
    incarnation: int
    #: Equal to that of the nodes that can read its arena.
    host: str
    #: gRPC address, host:port.
    address: str
    models: tuple[StoredModel, ...]
    #: What copies between its arena and a node, and between cmx and its arena, are expected to take, until they were measured.
    cpu_bytes_per_s: float = 10e9
    cmx_bytes_per_s: float = 1e9
    cmx_latency_s: float = 0.005


@quickly_made
@dataclass(frozen=True, slots=True)
class StoreCounts:
    """What a store has done for one model since it started. Blocks, unless it says otherwise."""

    #: Copied in by nodes, and copied out by them.
    taken: int = 0
    given: int = 0
    #: Offered and not taken: no room, or too much under way.
    declined: int = 0
    #: Moved from cmx into the arena, and from the arena to cmx.
    recalled: int = 0
    written: int = 0
    #: Of what reads wanted: found in the arena, brought from cmx, and not had in the end.
    cpu_hits: int = 0
    cmx_hits: int = 0
    misses: int = 0
    #: Forgotten in the arena; and in cmx, for want of room.
    cpu_evicted: int = 0
    cmx_evicted: int = 0
    #: Brought from cmx because somebody advised it; of those, read by a node before they went, and forgotten unread.
    prefetched: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    #: What went wrong, by its name, and how often.
    failures: tuple[tuple[str, int], ...] = ()


@quickly_made
@dataclass(frozen=True, slots=True)
class LeasedBytes:
    """What of a tenant's leases a store holds in one tier, bytes; blocks of several leases count for each."""

    tenant: TenantId
    tier: Tier
    bytes: int


@quickly_made
@dataclass(frozen=True, slots=True)
class StoreLoad:
    """A store's state for one model, now."""

    slots_free: int = 0
    #: Slots with content that nobody uses now: free for the asking, at the price of forgetting.
    slots_cached: int = 0
    slots_used: int = 0
    #: Segments that it knows of in cmx.
    segments: int = 0
    #: Reads that wait for blocks from cmx, and the bytes they wait for.
    reads_waiting: int = 0
    waiting_bytes: int = 0
    #: Measured, smoothed; 0 until measured.
    cpu_bytes_per_s: float = 0.0
    cmx_bytes_per_s: float = 0.0
    counts: StoreCounts = StoreCounts()
    leased: tuple[LeasedBytes, ...] = ()
    #: Seconds that what was forgotten in the arena lately, for want of room, had not been used; 0: nothing was.
    evicted_idle_s: float = 0.0


@quickly_made
@dataclass(frozen=True, slots=True)
class StoredRun:
    """Consecutive blocks that a node now holds; `parent` precedes the first, None at the start of a prompt."""

    parent: BlockHash | None
    hashes: tuple[BlockHash, ...]


@quickly_made
@dataclass(frozen=True, slots=True)
class KvBatch:
    """What changed in one node's holdings, or in one store's of one model, numbered without gaps so that a lost batch is noticed.

    Removals are applied before storings. `cleared` says: forget all you believed of this node first.

    All that a node holds (a *snapshot*) may be too much for one message. It comes in pages then, which share a number: `cleared`
    begins with page 0, whatever has `more` is followed by the next page, and who has got them all is where the number says.
    """

    sequence: int
    stored: tuple[StoredRun, ...] = ()
    removed: tuple[BlockHash, ...] = ()
    cleared: bool = False
    #: Tells a node's snapshots apart; 0 for what is none.
    snapshot: int = 0
    page: int = 0
    more: bool = False
    #: Segments that a store has put into the shared storage, or found there, and those that it has removed or found missing.
    segments_stored: tuple[BlockHash, ...] = ()
    segments_removed: tuple[BlockHash, ...] = ()

    @property
    def blocks(self) -> int:
        """How many blocks it tells of, each segment counted as one."""
        segments = len(self.segments_stored) + len(self.segments_removed)
        return len(self.removed) + sum([len(run.hashes) for run in self.stored]) + segments
