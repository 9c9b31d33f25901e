"""The core's nouns as protobuf messages and back: what gateways and nodes say to each other.

Lists of hashes travel as one run of bytes, 16 a hash. Every function is the inverse of its neighbour; a message that cannot be
what it claims raises `MalformedMessage`, the only error here.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from orchestrator.core.blocks import HASH_BYTES, TOKEN_BYTES, hash_bytes, pack_hashes, split_hashes
from orchestrator.core.config import TENANT_CHARS_MAX
from orchestrator.core.events import (
    BlocksRetained,
    BlocksRetired,
    Ended,
    FirstToken,
    LeaseEnded,
    LeasesTold,
    NodeReported,
    PrefetchEnded,
)
from orchestrator.core.experts import ExpertBalance
from orchestrator.core.outlook import ContextId, Outlook
from orchestrator.core.types import (
    DEFAULT_TENANT,
    SHARE_MAX,
    SHARE_MIN,
    AdapterName,
    Assignment,
    BlockHash,
    CostProfile,
    FinishReason,
    KvBatch,
    Lease,
    LeaseId,
    Load,
    ModelName,
    NodeId,
    NodeSpec,
    PooledDrafts,
    PoolKind,
    PoolName,
    Prefetch,
    PrefetchEnd,
    PrefetchId,
    RequestId,
    Role,
    Sampling,
    SessionId,
    SplitLoad,
    StoredRun,
    TenantId,
    TenantLoad,
    ThoughtsLimit,
    Tier,
    is_prefetch,
)
from orchestrator.wire import node_pb2

#: Call metadata that names the node, since one process may host several.
NODE_METADATA = "weft-node"
#: Bytes of a message at most; a longer one would end its stream.
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
#: Bytes of a frame, about, after which what is left goes into another: whatever comes in one piece fits as well.
FRAME_BYTES_MAX = MESSAGE_BYTES_MAX // 16
#: Characters of a message that a node ends a request with.
MESSAGE_CHARS_MAX = 4096
#: Characters of a request's name.
NAME_CHARS_MAX = 128
#: Seconds that a lease may last: more is a mistake, and timers are kept for it.
LEASE_S_MAX = 400 * 24 * 3600.0
_TIERS = {str(tier): tier for tier in Tier}
#: Curves of outlooks that are known to be right: gateways send the same ones over and over.
CURVES_MAX = 256
#: Frames that a node sends to a gateway beyond those it is known to have read; what comes up meanwhile goes out together. The
#: gateway tells with what it sends anyway, and by itself when half of them are not told.
FRAMES_UNREAD_MAX = 4

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    # A peer's machine that vanished is noticed in 10 s; a killed process at once.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 2_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    # A node that comes back must not wait for a backoff grown in its absence; the callers have their own.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
)

_ROLES = {Role.PREFILL: node_pb2.ROLE_PREFILL, Role.GENERATE: node_pb2.ROLE_GENERATE}
_REASONS = {str(reason): reason for reason in FinishReason}
_ROLES_BACK = {number: role for role, number in _ROLES.items()}


class MalformedMessage(ValueError):
    """The peer sent something that means nothing."""


def hashes_from(packed: bytes) -> tuple[BlockHash, ...]:
    """Cut packed hashes apart."""
    try:
        return split_hashes(packed)
    except ValueError as error:
        raise MalformedMessage(str(error)) from error


def hash_from(packed: bytes, what: str) -> BlockHash | None:
    """Return one hash, or None where none was sent."""
    if len(packed) not in (0, HASH_BYTES):
        raise MalformedMessage(f"{what} must have {HASH_BYTES} bytes, has {len(packed)}")
    return BlockHash(packed) if packed else None


def prompt_tokens_max(block_tokens: int) -> int:
    """Return the tokens of the longest prompt that goes into one message with its hashes and three quarters of its room."""
    return MESSAGE_BYTES_MAX * 3 // 4 * block_tokens // (TOKEN_BYTES * block_tokens + HASH_BYTES)


def check_frame(frame: node_pb2.NodeFrame) -> None:
    """Raise `MalformedMessage` unless the lists of a node's frame that belong together do so."""
    # To go through a message's list takes four times as long as to copy it first.
    if len(frame.requests) != len(frame.counts):
        raise MalformedMessage(f"a frame with {len(frame.requests)} requests and {len(frame.counts)} counts")
    if (told := sum(frame.counts[:])) != len(frame.tokens):
        raise MalformedMessage(f"a frame with {len(frame.tokens)} tokens whose counts make {told}")
    for entry in frame.logprobs[:]:
        if len(entry.top_tokens) != len(entry.top_logprobs):
            raise MalformedMessage(f"log probabilities of {len(entry.top_tokens)} tokens and {len(entry.top_logprobs)} values")
    for scores in frame.prompt_scores[:]:
        tokens, tops = len(scores.logprobs), len(scores.top_tokens)
        if not scores.first or not tokens or len(scores.ranks) != tokens or tops % tokens or len(scores.top_logprobs) != tops:
            counts = f"{len(scores.ranks)} ranks, {tops} likely tokens, {len(scores.top_logprobs)} values of these"
            raise MalformedMessage(f"log probabilities of {tokens} tokens of a prompt from {scores.first} on, with {counts}")


def write_sampling(message: node_pb2.Sampling, sampling: Sampling) -> None:
    """Say in an empty message how tokens are to be chosen; what an unset field means is not said."""
    message.temperature = sampling.temperature
    message.top_p = sampling.top_p
    message.repetition_penalty = sampling.repetition_penalty
    if sampling.stop_token_ids:
        message.stop_token_ids.extend(sampling.stop_token_ids)
    if sampling.top_k:
        message.top_k = sampling.top_k
    if sampling.min_p:
        message.min_p = sampling.min_p
    if sampling.presence_penalty:
        message.presence_penalty = sampling.presence_penalty
    if sampling.frequency_penalty:
        message.frequency_penalty = sampling.frequency_penalty
    if sampling.output_tokens_min:
        message.output_tokens_min = sampling.output_tokens_min
    for run in sampling.forbidden_runs:
        message.forbidden_runs.add(tokens=run)
    if sampling.allowed_token_ids:
        message.allowed_token_ids.extend(sampling.allowed_token_ids)
    if sampling.grammar:
        message.grammar = sampling.grammar
    if sampling.adapter is not None:
        message.adapter = sampling.adapter
    if sampling.seed is not None:
        message.seed = sampling.seed
    if sampling.logprobs is not None:
        message.logprobs = sampling.logprobs
    if sampling.prompt_logprobs is not None:
        message.prompt_logprobs = sampling.prompt_logprobs
    if sampling.logit_bias:
        message.logit_bias.update(sampling.logit_bias)
    if (limit := sampling.thoughts) is not None:
        thoughts = node_pb2.ThoughtsLimit(tokens_max=limit.tokens_max, end=limit.end, begin=limit.begin, instead=limit.instead)
        message.thoughts.CopyFrom(thoughts)


def sampling_from(sampling: node_pb2.Sampling) -> Sampling:
    """Return the sampling in a message; an unset top_p keeps all, an unset penalty for repetition is none."""
    return Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p or 1.0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed if sampling.HasField("seed") else None,
        # What is mostly empty costs less to look at than to copy.
        stop_token_ids=tuple(stops) if (stops := sampling.stop_token_ids) else (),
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        logit_bias=dict(biases) if (biases := sampling.logit_bias) else {},
        repetition_penalty=sampling.repetition_penalty or 1.0,
        output_tokens_min=sampling.output_tokens_min,
        forbidden_runs=tuple([tuple(run.tokens) for run in runs if run.tokens]) if (runs := sampling.forbidden_runs) else (),
        allowed_token_ids=tuple(allowed) if (allowed := sampling.allowed_token_ids) else (),
        prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
        grammar=sampling.grammar,
        adapter=AdapterName(sampling.adapter) if sampling.adapter else None,
        thoughts=_thoughts_from(sampling.thoughts) if sampling.HasField("thoughts") else None,
    )


def _thoughts_from(limit: node_pb2.ThoughtsLimit) -> ThoughtsLimit:
    if limit.HasField("instead") and len(limit.begin) < 2:
        raise MalformedMessage(f"thoughts that begin again, with {len(limit.begin)} tokens")
    instead = limit.instead if limit.HasField("instead") else None
    return ThoughtsLimit(limit.tokens_max, limit.end, tuple(limit.begin), instead)


@dataclass(slots=True)
class Submission:
    """An assignment that a node is to be sent, with what its core does not know of it."""

    assignment: Assignment
    #: uint32 little-endian, packed.
    tokens: bytes
    #: What the hashes' chain starts from.
    hash_root: BlockHash
    sampling: Sampling
    #: In place of the sampling's, if tokens are drawn.
    seed: int | None = None
    #: The node is to tell when it began.
    timed: bool = False
    #: The assignment's source.
    source: NodeSpec | None = None

    def forget_source(self) -> None:
        """Leave out a source that is lost."""
        self.source = None
        known = self.assignment
        self.assignment = replace(known, source=None, source_tokens=0, source_pending=False, source_incarnation=None)


def write_submit(message: node_pb2.Submit, submission: Submission) -> None:
    """Say in an empty message what a node is to do."""
    assignment = submission.assignment
    message.request = assignment.request
    message.role = _ROLES[assignment.role]
    message.tokens = submission.tokens
    message.hashes = pack_hashes(assignment.hashes)
    message.hash_root = hash_bytes(submission.hash_root)
    message.output_tokens_max = assignment.output_tokens_max
    message.name = assignment.name
    message.tenant = assignment.tenant
    message.share = assignment.share
    write_sampling(message.sampling, submission.sampling)
    if submission.seed is not None:
        message.sampling.seed = submission.seed
    if submission.timed:
        message.timed = True
    if submission.source is not None:
        message.source_address = submission.source.address
        message.source_host = submission.source.host
    if assignment.source is not None:
        message.source = assignment.source
        message.source_tokens = assignment.source_tokens
        message.source_pending = assignment.source_pending
        if assignment.source_incarnation is not None:
            message.source_incarnation = assignment.source_incarnation
    if assignment.outlook is not None:
        _write_outlook(message.outlook, assignment.outlook)
    if assignment.priority:
        message.priority = assignment.priority
    if assignment.stored_tokens:
        message.stored_tokens = assignment.stored_tokens
    if assignment.generated_tokens:
        message.generated_tokens = assignment.generated_tokens
    if assignment.scored:
        message.scored = True


def assignment_from(submit: node_pb2.Submit) -> Assignment:
    """Return the assignment in a message; the prompt's length is that of its tokens, less those that were generated."""
    role = _ROLES_BACK.get(submit.role)
    if role is None:
        raise MalformedMessage(f"request {submit.request} has the unknown role {submit.role}")
    count, rest = divmod(len(submit.tokens), TOKEN_BYTES)
    if rest or not count:
        raise MalformedMessage(f"request {submit.request} has {len(submit.tokens)} bytes of tokens")
    if submit.generated_tokens >= count:
        raise MalformedMessage(
            f"request {submit.request} has {count} tokens and none of a prompt: {submit.generated_tokens} are output"
        )
    if not (submit.share == 0 or SHARE_MIN <= submit.share <= SHARE_MAX):
        raise MalformedMessage(f"request {submit.request} has a share of {submit.share}, must be {SHARE_MIN:g} to {SHARE_MAX:g}")
    return Assignment(
        request=RequestId(submit.request),
        role=role,
        prompt_tokens=count - submit.generated_tokens,
        hashes=hashes_from(submit.hashes),
        output_tokens_max=submit.output_tokens_max,
        source=NodeId(submit.source) if submit.source else None,
        source_tokens=submit.source_tokens,
        source_pending=submit.source_pending,
        source_incarnation=submit.source_incarnation if submit.HasField("source_incarnation") else None,
        priority=submit.priority,
        outlook=outlook_from(submit.outlook) if submit.HasField("outlook") else None,
        name=submit.name[:NAME_CHARS_MAX],
        tenant=TenantId(submit.tenant[:TENANT_CHARS_MAX] or DEFAULT_TENANT),
        share=submit.share or 1.0,
        stored_tokens=submit.stored_tokens,
        generated_tokens=submit.generated_tokens,
        scored=submit.scored,
    )


def outlook_message(outlook: Outlook) -> node_pb2.Outlook:
    """Return the message for what is expected of a context."""
    message = node_pb2.Outlook()
    _write_outlook(message, outlook)
    return message


def _write_outlook(message: node_pb2.Outlook, outlook: Outlook) -> None:
    message.context = outlook.context
    message.ages_s.extend(outlook.ages_s)
    message.chances.extend(outlook.chances)


def outlook_from(message: node_pb2.Outlook) -> Outlook:
    """Return what a message expects of a context."""
    ages_s, chances = tuple(message.ages_s), tuple(message.chances)
    problem = _outlook_problem(ages_s, chances)
    if problem is not None:
        raise MalformedMessage(f"context {message.context}: {problem}")
    return Outlook(ContextId(message.context), ages_s, chances)


@lru_cache(CURVES_MAX)
def _outlook_problem(ages_s: tuple[float, ...], chances: tuple[float, ...]) -> str | None:
    return Outlook.problem(ages_s, chances)


def welcome_message(spec: NodeSpec, fingerprint: str, resumed: bool) -> node_pb2.Welcome:
    """Return a node's answer to Hello."""
    profile = spec.profile
    return node_pb2.Welcome(
        node=spec.id,
        model=spec.model,
        pool=spec.pool,
        kind=spec.kind,
        incarnation=spec.incarnation,
        blocks=spec.blocks,
        block_tokens=spec.block_tokens,
        block_bytes=spec.block_bytes,
        sequences_max=spec.sequences_max,
        step_tokens_max=spec.step_tokens_max,
        context_tokens_max=spec.context_tokens_max,
        profile=node_pb2.CostProfile(
            step_s=profile.step_s,
            prefill_token_s=profile.prefill_token_s,
            prefill_token_context_s=profile.prefill_token_context_s,
            sequence_s=profile.sequence_s,
            context_token_s=profile.context_token_s,
            fetch_bytes_per_s=profile.fetch_bytes_per_s,
            fetch_latency_s=profile.fetch_latency_s,
            batch_tokens=profile.batch_tokens,
            batch_s=profile.batch_s,
            overlap=profile.overlap,
            pass_tokens=profile.pass_tokens,
            tokens_per_pass=profile.tokens_per_pass,
            beat_s=profile.beat_s,
            draft_step_s=profile.draft_step_s,
        ),
        address=spec.address,
        host=spec.host,
        fingerprint=fingerprint,
        resumed=resumed,
        stores=spec.stores,
        leased_blocks_max=spec.leased_blocks_max,
    )


def spec_from(welcome: node_pb2.Welcome) -> NodeSpec:
    """Return the node that a Welcome describes."""
    profile = welcome.profile
    if welcome.kind not in tuple(PoolKind):
        raise MalformedMessage(f"node {welcome.node} is of the unknown kind {welcome.kind!r}")
    return NodeSpec(
        id=NodeId(welcome.node),
        model=ModelName(welcome.model),
        pool=PoolName(welcome.pool),
        kind=PoolKind(welcome.kind),
        incarnation=welcome.incarnation,
        blocks=welcome.blocks,
        block_tokens=welcome.block_tokens,
        block_bytes=welcome.block_bytes,
        sequences_max=welcome.sequences_max,
        step_tokens_max=welcome.step_tokens_max,
        context_tokens_max=welcome.context_tokens_max,
        profile=CostProfile(
            step_s=profile.step_s,
            prefill_token_s=profile.prefill_token_s,
            prefill_token_context_s=profile.prefill_token_context_s,
            sequence_s=profile.sequence_s,
            context_token_s=profile.context_token_s,
            fetch_bytes_per_s=profile.fetch_bytes_per_s,
            fetch_latency_s=profile.fetch_latency_s,
            batch_tokens=tuple(profile.batch_tokens),
            batch_s=tuple(profile.batch_s),
            overlap=profile.overlap,
            pass_tokens=profile.pass_tokens,
            tokens_per_pass=profile.tokens_per_pass,
            beat_s=profile.beat_s,
            draft_step_s=profile.draft_step_s,
        ),
        address=welcome.address,
        host=welcome.host,
        stores=welcome.stores,
        leased_blocks_max=welcome.leased_blocks_max,
    )


def first_token_message(report: FirstToken, began_s_ago: float = 0.0) -> node_pb2.FirstToken:
    """Return the message for a first token; `began_s_ago` for requests that are timed."""
    return node_pb2.FirstToken(
        request=report.request,
        computed_tokens=report.computed_tokens,
        began_s_ago=began_s_ago,
        cpu_tokens=report.cpu_tokens,
        cmx_tokens=report.cmx_tokens,
        peer_tokens=report.peer_tokens,
        regretted_tokens=report.regretted_tokens,
    )


def first_token_from(message: node_pb2.FirstToken) -> FirstToken:
    """Return the first token that a message tells of."""
    return FirstToken(
        RequestId(message.request),
        message.computed_tokens,
        message.cpu_tokens,
        message.cmx_tokens,
        message.peer_tokens,
        message.regretted_tokens,
    )


def ended_message(report: Ended, began_s_ago: float = 0.0) -> node_pb2.Ended:
    """Return the message for a request's end on a node; `began_s_ago` for the part of one that is timed."""
    return node_pb2.Ended(
        request=report.request,
        reason=report.reason,
        output_tokens=report.output_tokens,
        computed_tokens=report.computed_tokens,
        message=report.message[:MESSAGE_CHARS_MAX],
        began_s_ago=began_s_ago,
        cpu_tokens=report.cpu_tokens,
        cmx_tokens=report.cmx_tokens,
        peer_tokens=report.peer_tokens,
        regretted_tokens=report.regretted_tokens,
    )


def ended_from(message: node_pb2.Ended) -> Ended:
    """Return the end that a message tells of."""
    reason = _REASONS.get(message.reason)
    if reason is None:
        raise MalformedMessage(f"request {message.request} ended for the unknown reason {message.reason!r}")
    return Ended(
        request=RequestId(message.request),
        reason=reason,
        output_tokens=message.output_tokens,
        computed_tokens=message.computed_tokens,
        message=message.message[:MESSAGE_CHARS_MAX],
        cpu_tokens=message.cpu_tokens,
        cmx_tokens=message.cmx_tokens,
        peer_tokens=message.peer_tokens,
        regretted_tokens=message.regretted_tokens,
    )


def kv_message(batch: KvBatch) -> node_pb2.KvBatch:
    """Return the message for one numbered change of a node's holdings."""
    message = node_pb2.KvBatch(
        sequence=batch.sequence,
        removed=pack_hashes(batch.removed),
        cleared=batch.cleared,
        snapshot=batch.snapshot,
        page=batch.page,
        more=batch.more,
    )
    for run in batch.stored:
        message.stored.add(parent=run.parent or b"", hashes=pack_hashes(run.hashes))
    return message


def kv_from(message: node_pb2.KvBatch) -> KvBatch:
    """Return the change of holdings in a message."""
    return KvBatch(
        sequence=message.sequence,
        stored=tuple(StoredRun(parent=hash_from(run.parent, "parent"), hashes=hashes_from(run.hashes)) for run in message.stored),
        removed=hashes_from(message.removed),
        cleared=message.cleared,
        snapshot=message.snapshot,
        page=message.page,
        more=message.more,
    )


def lease_message(lease: Lease) -> node_pb2.Lease:
    """Return the message for a lease."""
    return node_pb2.Lease(
        id=lease.id,
        tenant=lease.tenant,
        model=lease.model,
        hashes=pack_hashes(lease.hashes),
        tier=lease.tier,
        ttl_s=lease.ttl_s,
        size_bytes=lease.size_bytes,
        revision=lease.revision,
        session=lease.session or "",
    )


def lease_from(message: node_pb2.Lease) -> Lease:
    """Return the lease in a message."""
    if not 0 < message.ttl_s <= LEASE_S_MAX:
        raise MalformedMessage(f"a lease for {message.ttl_s} s, must be over 0 and at most {LEASE_S_MAX:g}")
    if not message.id or len(message.id) > NAME_CHARS_MAX:
        raise MalformedMessage(f"a lease's id has {len(message.id)} characters, must have 1 to {NAME_CHARS_MAX}")
    hashes = hashes_from(message.hashes)
    if not hashes:
        raise MalformedMessage(f"lease {message.id} is for nothing")
    return Lease(
        id=LeaseId(message.id),
        tenant=TenantId(message.tenant[:TENANT_CHARS_MAX] or DEFAULT_TENANT),
        model=ModelName(message.model),
        hashes=hashes,
        tier=tier_from(message.tier),
        ttl_s=message.ttl_s,
        size_bytes=message.size_bytes,
        revision=message.revision,
        session=SessionId(message.session) if message.session else None,
    )


def tier_from(text: str) -> Tier:
    """Return the tier of that name."""
    tier = _TIERS.get(text)
    if tier is None:
        raise MalformedMessage(f"there is no tier {text[:NAME_CHARS_MAX]!r}")
    return tier


def ended_lease_message(ended: LeaseEnded) -> node_pb2.EndedLease:
    """Return the message for the end of a lease."""
    return node_pb2.EndedLease(id=ended.lease, revision=ended.revision)


def ended_lease_from(message: node_pb2.EndedLease) -> LeaseEnded:
    """Return the end of a lease in a message."""
    return LeaseEnded(LeaseId(message.id), message.revision)


def advice_message(advice: BlocksRetired | BlocksRetained) -> node_pb2.Advice:
    """Return the message for what is to become of a chain's blocks."""
    hashes = pack_hashes(advice.hashes)
    if isinstance(advice, BlocksRetained):
        return node_pb2.Advice(hashes=hashes, outlook=outlook_message(advice.outlook))
    return node_pb2.Advice(hashes=hashes, first_block=advice.first_block, at_once=advice.at_once)


def advice_from(message: node_pb2.Advice) -> BlocksRetired | BlocksRetained:
    """Return what is to become of the blocks in a message."""
    hashes = hashes_from(message.hashes)
    if message.HasField("outlook"):
        return BlocksRetained(hashes, outlook_from(message.outlook))
    return BlocksRetired(hashes, message.first_block, message.at_once)


def prefetch_message(prefetch: Prefetch) -> node_pb2.Prefetch:
    """Return the message for a prefetch; where its source is, is left to who knows nodes."""
    return node_pb2.Prefetch(
        id=prefetch.id,
        hashes=pack_hashes(prefetch.hashes),
        keep_s=prefetch.keep_s,
        stored_blocks=prefetch.stored_blocks,
        source=prefetch.source or "",
        source_blocks=prefetch.source_blocks,
        source_incarnation=prefetch.source_incarnation,
    )


def prefetch_from(message: node_pb2.Prefetch) -> Prefetch:
    """Return the prefetch in a message."""
    hashes = hashes_from(message.hashes)
    most = max(message.stored_blocks, message.source_blocks)
    if not hashes or most > len(hashes):
        raise MalformedMessage(f"a prefetch of {most} blocks with {len(hashes)} hashes")
    if not is_prefetch(RequestId(message.id)):
        raise MalformedMessage(f"{message.id} is no prefetch's number")
    if not 0 < message.keep_s <= LEASE_S_MAX:
        raise MalformedMessage(f"a prefetch must be kept for over 0 and up to {LEASE_S_MAX:g} s, not for {message.keep_s} s")
    return Prefetch(
        id=PrefetchId(RequestId(message.id)),
        hashes=hashes,
        keep_s=message.keep_s,
        stored_blocks=message.stored_blocks,
        source=NodeId(message.source) if message.source else None,
        source_blocks=message.source_blocks,
        source_incarnation=message.source_incarnation if message.HasField("source_incarnation") else None,
    )


def prefetch_ended_message(report: PrefetchEnded) -> node_pb2.PrefetchEnded:
    """Return the message for what became of a prefetch."""
    blocks = {"first_block": report.first_block, "end_block": report.end_block}
    return node_pb2.PrefetchEnded(id=report.prefetch, reason=report.reason, **blocks)


def prefetch_ended_from(message: node_pb2.PrefetchEnded) -> PrefetchEnded:
    """Return what became of a prefetch."""
    try:
        reason = PrefetchEnd(message.reason)
    except ValueError:
        raise MalformedMessage(f"a prefetch cannot end for the reason {message.reason!r}") from None
    if message.end_block < message.first_block:
        raise MalformedMessage(f"a prefetch of blocks {message.first_block} to {message.end_block}")
    return PrefetchEnded(PrefetchId(RequestId(message.id)), reason, message.first_block, message.end_block)


def leases_from(node: NodeId, frame: node_pb2.NodeFrame) -> LeasesTold:
    """Return what a frame tells of leases."""
    placed = tuple([lease_from(item) for item in frame.leases])
    return LeasesTold(node, placed, tuple([ended_lease_from(item) for item in frame.ended_leases]))


def load_message(load: Load) -> node_pb2.Load:
    """Return the message for a node's load."""
    return node_pb2.Load(
        running=load.running,
        waiting=load.waiting,
        queued_tokens=load.queued_tokens,
        context_tokens=load.context_tokens,
        blocks_free=load.blocks_free,
        blocks_cached=load.blocks_cached,
        blocks_used=load.blocks_used,
        cost_scale=load.cost_scale,
        preemptions=load.preemptions,
        step_s=load.step_s,
        tenants=[
            node_pb2.TenantLoad(tenant=one.tenant, waiting=one.waiting, queued_tokens=one.queued_tokens) for one in load.tenants
        ],
        blocks_leased=load.blocks_leased,
        blocks_unleased=load.blocks_unleased,
        blocks_evicted=load.blocks_evicted,
        evicted_idle_s=load.evicted_idle_s,
        drafted_tokens=load.drafted_tokens,
        accepted_tokens=load.accepted_tokens,
        beats=load.beats,
        beats_missed=load.beats_missed,
        beat_late_s=load.beat_late_s,
        split=_split_message(load.split) if load.split is not None else None,
        prefetch_room_blocks=load.prefetch_room_blocks,
        blocks_prefetched=load.blocks_prefetched,
        prefetched=load.prefetched,
        prefetch_used=load.prefetch_used,
        prefetch_wasted=load.prefetch_wasted,
        pooled_drafts=_drafts_message(load.pooled_drafts) if load.pooled_drafts is not None else None,
    )


def _drafts_message(drafts: PooledDrafts) -> node_pb2.PooledDrafts:
    return node_pb2.PooledDrafts(
        answered=drafts.answered,
        late=drafts.late,
        unreached=drafts.unreached,
        slotless=drafts.slotless,
        wait_s=drafts.wait_s,
        slots=drafts.slots,
        slots_taken=drafts.slots_taken,
    )


def _split_message(split: SplitLoad) -> node_pb2.SplitLoad:
    experts = split.experts
    told = node_pb2.SplitLoad(
        attention_s=split.attention_s,
        ffn_s=split.ffn_s,
        ffn_ranks=split.ffn_ranks,
        links_shared=split.links_shared,
        links_network=split.links_network,
    )
    if experts is not None:
        told.experts.moves, told.experts.imbalance = experts.moves, experts.imbalance
        told.experts.imbalance_first = experts.imbalance_first
    return told


def load_from(message: node_pb2.Load) -> Load:
    """Return the load in a message."""
    return Load(
        running=message.running,
        waiting=message.waiting,
        queued_tokens=message.queued_tokens,
        context_tokens=message.context_tokens,
        blocks_free=message.blocks_free,
        blocks_cached=message.blocks_cached,
        blocks_used=message.blocks_used,
        cost_scale=message.cost_scale,
        preemptions=message.preemptions,
        step_s=message.step_s,
        tenants=tuple([TenantLoad(TenantId(item.tenant), item.waiting, item.queued_tokens) for item in message.tenants[:]]),
        blocks_leased=message.blocks_leased,
        blocks_unleased=message.blocks_unleased,
        blocks_evicted=message.blocks_evicted,
        evicted_idle_s=message.evicted_idle_s,
        drafted_tokens=message.drafted_tokens,
        accepted_tokens=message.accepted_tokens,
        beats=message.beats,
        beats_missed=message.beats_missed,
        beat_late_s=message.beat_late_s,
        split=_split_from(message.split) if message.HasField("split") else None,
        prefetch_room_blocks=message.prefetch_room_blocks,
        blocks_prefetched=message.blocks_prefetched,
        prefetched=message.prefetched,
        prefetch_used=message.prefetch_used,
        prefetch_wasted=message.prefetch_wasted,
        pooled_drafts=_drafts_from(message.pooled_drafts) if message.HasField("pooled_drafts") else None,
    )


def _drafts_from(message: node_pb2.PooledDrafts) -> PooledDrafts:
    counts = message.answered, message.late, message.unreached, message.slotless
    return PooledDrafts(*counts, message.wait_s, message.slots, message.slots_taken)


def _split_from(message: node_pb2.SplitLoad) -> SplitLoad:
    told = message.experts
    experts = ExpertBalance(told.moves, told.imbalance, told.imbalance_first) if message.HasField("experts") else None
    links = message.links_shared, message.links_network
    return SplitLoad(message.attention_s, message.ffn_s, message.ffn_ranks, experts, *links)


def report_from(node: NodeId, frame: node_pb2.NodeFrame) -> NodeReported:
    """Return what a frame tells the cluster; the tokens stay in the frame."""
    return NodeReported(
        node=node,
        load=load_from(frame.load),
        first_tokens=tuple([first_token_from(item) for item in frame.first_tokens[:]]),
        ended=tuple([ended_from(item) for item in frame.ended[:]]),
        kv=tuple([kv_from(item) for item in frame.kv[:]]),
        prefetches=tuple([prefetch_ended_from(item) for item in frame.ended_prefetches[:]]),
    )
