from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_GENERATE: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_GENERATE: Role

class GatewayFrame(_message.Message):
    __slots__ = ("hello", "submits", "cancels", "resync", "frames_received", "lost_sources", "leases", "ended_leases", "advice", "outlooks", "prefetches", "cancelled_prefetches")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    RESYNC_FIELD_NUMBER: _ClassVar[int]
    FRAMES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    LOST_SOURCES_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    ENDED_LEASES_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    OUTLOOKS_FIELD_NUMBER: _ClassVar[int]
    PREFETCHES_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_PREFETCHES_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submits: _containers.RepeatedCompositeFieldContainer[Submit]
    cancels: _containers.RepeatedScalarFieldContainer[int]
    resync: Resync
    frames_received: int
    lost_sources: _containers.RepeatedCompositeFieldContainer[LostSource]
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    ended_leases: _containers.RepeatedCompositeFieldContainer[EndedLease]
    advice: _containers.RepeatedCompositeFieldContainer[Advice]
    outlooks: _containers.RepeatedCompositeFieldContainer[Outlook]
    prefetches: _containers.RepeatedCompositeFieldContainer[Prefetch]
    cancelled_prefetches: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submits: _Optional[_Iterable[_Union[Submit, _Mapping]]] = ..., cancels: _Optional[_Iterable[int]] = ..., resync: _Optional[_Union[Resync, _Mapping]] = ..., frames_received: _Optional[int] = ..., lost_sources: _Optional[_Iterable[_Union[LostSource, _Mapping]]] = ..., leases: _Optional[_Iterable[_Union[Lease, _Mapping]]] = ..., ended_leases: _Optional[_Iterable[_Union[EndedLease, _Mapping]]] = ..., advice: _Optional[_Iterable[_Union[Advice, _Mapping]]] = ..., outlooks: _Optional[_Iterable[_Union[Outlook, _Mapping]]] = ..., prefetches: _Optional[_Iterable[_Union[Prefetch, _Mapping]]] = ..., cancelled_prefetches: _Optional[_Iterable[int]] = ...) -> None: ...

class Prefetch(_message.Message):
    __slots__ = ("id", "hashes", "keep_s", "stored_blocks", "source", "source_address", "source_host", "source_blocks", "source_incarnation")
    ID_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    KEEP_S_FIELD_NUMBER: _ClassVar[int]
    STORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_HOST_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    id: int
    hashes: bytes
    keep_s: float
    stored_blocks: int
    source: str
    source_address: str
    source_host: str
    source_blocks: int
    source_incarnation: int
    def __init__(self, id: _Optional[int] = ..., hashes: _Optional[bytes] = ..., keep_s: _Optional[float] = ..., stored_blocks: _Optional[int] = ..., source: _Optional[str] = ..., source_address: _Optional[str] = ..., source_host: _Optional[str] = ..., source_blocks: _Optional[int] = ..., source_incarnation: _Optional[int] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("id", "tenant", "model", "hashes", "tier", "ttl_s", "size_bytes", "revision", "session")
    ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    id: str
    tenant: str
    model: str
    hashes: bytes
    tier: str
    ttl_s: float
    size_bytes: int
    revision: int
    session: str
    def __init__(self, id: _Optional[str] = ..., tenant: _Optional[str] = ..., model: _Optional[str] = ..., hashes: _Optional[bytes] = ..., tier: _Optional[str] = ..., ttl_s: _Optional[float] = ..., size_bytes: _Optional[int] = ..., revision: _Optional[int] = ..., session: _Optional[str] = ...) -> None: ...

class EndedLease(_message.Message):
    __slots__ = ("id", "revision")
    ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    id: str
    revision: int
    def __init__(self, id: _Optional[str] = ..., revision: _Optional[int] = ...) -> None: ...

class Advice(_message.Message):
    __slots__ = ("hashes", "first_block", "at_once", "outlook")
    HASHES_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    AT_ONCE_FIELD_NUMBER: _ClassVar[int]
    OUTLOOK_FIELD_NUMBER: _ClassVar[int]
    hashes: bytes
    first_block: int
    at_once: bool
    outlook: Outlook
    def __init__(self, hashes: _Optional[bytes] = ..., first_block: _Optional[int] = ..., at_once: bool = ..., outlook: _Optional[_Union[Outlook, _Mapping]] = ...) -> None: ...

class Outlook(_message.Message):
    __slots__ = ("context", "ages_s", "chances")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    AGES_S_FIELD_NUMBER: _ClassVar[int]
    CHANCES_FIELD_NUMBER: _ClassVar[int]
    context: int
    ages_s: _containers.RepeatedScalarFieldContainer[float]
    chances: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, context: _Optional[int] = ..., ages_s: _Optional[_Iterable[float]] = ..., chances: _Optional[_Iterable[float]] = ...) -> None: ...

class LostSource(_message.Message):
    __slots__ = ("request", "source")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    request: int
    source: str
    def __init__(self, request: _Optional[int] = ..., source: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("gateway", "incarnation", "frames_sent", "frames_received", "heartbeat_s")
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FRAMES_SENT_FIELD_NUMBER: _ClassVar[int]
    FRAMES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    gateway: int
    incarnation: int
    frames_sent: int
    frames_received: int
    heartbeat_s: float
    def __init__(self, gateway: _Optional[int] = ..., incarnation: _Optional[int] = ..., frames_sent: _Optional[int] = ..., frames_received: _Optional[int] = ..., heartbeat_s: _Optional[float] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request", "role", "tokens", "hashes", "hash_root", "output_tokens_max", "priority", "source", "source_address", "source_host", "source_tokens", "source_pending", "sampling", "name", "tenant", "share", "timed", "source_incarnation", "stored_tokens", "outlook", "generated_tokens", "scored")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    HASH_ROOT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_HOST_FIELD_NUMBER: _ClassVar[int]
    SOURCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_PENDING_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    TIMED_FIELD_NUMBER: _ClassVar[int]
    SOURCE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STORED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTLOOK_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCORED_FIELD_NUMBER: _ClassVar[int]
    request: int
    role: Role
    tokens: bytes
    hashes: bytes
    hash_root: bytes
    output_tokens_max: int
    priority: int
    source: str
    source_address: str
    source_host: str
    source_tokens: int
    source_pending: bool
    sampling: Sampling
    name: str
    tenant: str
    share: float
    timed: bool
    source_incarnation: int
    stored_tokens: int
    outlook: Outlook
    generated_tokens: int
    scored: bool
    def __init__(self, request: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., tokens: _Optional[bytes] = ..., hashes: _Optional[bytes] = ..., hash_root: _Optional[bytes] = ..., output_tokens_max: _Optional[int] = ..., priority: _Optional[int] = ..., source: _Optional[str] = ..., source_address: _Optional[str] = ..., source_host: _Optional[str] = ..., source_tokens: _Optional[int] = ..., source_pending: bool = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., name: _Optional[str] = ..., tenant: _Optional[str] = ..., share: _Optional[float] = ..., timed: bool = ..., source_incarnation: _Optional[int] = ..., stored_tokens: _Optional[int] = ..., outlook: _Optional[_Union[Outlook, _Mapping]] = ..., generated_tokens: _Optional[int] = ..., scored: bool = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed", "stop_token_ids", "logprobs", "logit_bias", "grammar", "repetition_penalty", "output_tokens_min", "forbidden_runs", "allowed_token_ids", "prompt_logprobs", "adapter", "thoughts")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_MIN_FIELD_NUMBER: _ClassVar[int]
    FORBIDDEN_RUNS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    THOUGHTS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: int
    logit_bias: _containers.ScalarMap[int, float]
    grammar: str
    repetition_penalty: float
    output_tokens_min: int
    forbidden_runs: _containers.RepeatedCompositeFieldContainer[TokenRun]
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_logprobs: int
    adapter: str
    thoughts: ThoughtsLimit
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[int] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., grammar: _Optional[str] = ..., repetition_penalty: _Optional[float] = ..., output_tokens_min: _Optional[int] = ..., forbidden_runs: _Optional[_Iterable[_Union[TokenRun, _Mapping]]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., prompt_logprobs: _Optional[int] = ..., adapter: _Optional[str] = ..., thoughts: _Optional[_Union[ThoughtsLimit, _Mapping]] = ...) -> None: ...

class ThoughtsLimit(_message.Message):
    __slots__ = ("tokens_max", "end", "begin", "instead")
    TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    INSTEAD_FIELD_NUMBER: _ClassVar[int]
    tokens_max: int
    end: int
    begin: _containers.RepeatedScalarFieldContainer[int]
    instead: int
    def __init__(self, tokens_max: _Optional[int] = ..., end: _Optional[int] = ..., begin: _Optional[_Iterable[int]] = ..., instead: _Optional[int] = ...) -> None: ...

class TokenRun(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class Resync(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: int
    def __init__(self, after: _Optional[int] = ...) -> None: ...

class NodeFrame(_message.Message):
    __slots__ = ("welcome", "requests", "counts", "tokens", "logprobs", "first_tokens", "ended", "kv", "load", "draining", "moves", "refused_calls", "leases", "ended_leases", "prompt_scores", "ended_prefetches")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_CALLS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    ENDED_LEASES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SCORES_FIELD_NUMBER: _ClassVar[int]
    ENDED_PREFETCHES_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    requests: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    first_tokens: _containers.RepeatedCompositeFieldContainer[FirstToken]
    ended: _containers.RepeatedCompositeFieldContainer[Ended]
    kv: _containers.RepeatedCompositeFieldContainer[KvBatch]
    load: Load
    draining: bool
    moves: _containers.RepeatedCompositeFieldContainer[Move]
    refused_calls: int
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    ended_leases: _containers.RepeatedCompositeFieldContainer[EndedLease]
    prompt_scores: _containers.RepeatedCompositeFieldContainer[PromptScores]
    ended_prefetches: _containers.RepeatedCompositeFieldContainer[PrefetchEnded]
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., requests: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., first_tokens: _Optional[_Iterable[_Union[FirstToken, _Mapping]]] = ..., ended: _Optional[_Iterable[_Union[Ended, _Mapping]]] = ..., kv: _Optional[_Iterable[_Union[KvBatch, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., draining: bool = ..., moves: _Optional[_Iterable[_Union[Move, _Mapping]]] = ..., refused_calls: _Optional[int] = ..., leases: _Optional[_Iterable[_Union[Lease, _Mapping]]] = ..., ended_leases: _Optional[_Iterable[_Union[EndedLease, _Mapping]]] = ..., prompt_scores: _Optional[_Iterable[_Union[PromptScores, _Mapping]]] = ..., ended_prefetches: _Optional[_Iterable[_Union[PrefetchEnded, _Mapping]]] = ...) -> None: ...

class PrefetchEnded(_message.Message):
    __slots__ = ("id", "reason", "first_block", "end_block")
    ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    id: int
    reason: str
    first_block: int
    end_block: int
    def __init__(self, id: _Optional[int] = ..., reason: _Optional[str] = ..., first_block: _Optional[int] = ..., end_block: _Optional[int] = ...) -> None: ...

class PromptScores(_message.Message):
    __slots__ = ("request", "first", "logprobs", "ranks", "top_tokens", "top_logprobs")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request: int
    first: int
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    top_tokens: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, request: _Optional[int] = ..., first: _Optional[int] = ..., logprobs: _Optional[_Iterable[float]] = ..., ranks: _Optional[_Iterable[int]] = ..., top_tokens: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Move(_message.Message):
    __slots__ = ("source", "target", "bytes", "seconds", "request", "began_s_ago")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    BEGAN_S_AGO_FIELD_NUMBER: _ClassVar[int]
    source: str
    target: str
    bytes: int
    seconds: float
    request: int
    began_s_ago: float
    def __init__(self, source: _Optional[str] = ..., target: _Optional[str] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., request: _Optional[int] = ..., began_s_ago: _Optional[float] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("node", "model", "pool", "kind", "incarnation", "blocks", "block_tokens", "block_bytes", "sequences_max", "step_tokens_max", "context_tokens_max", "profile", "address", "host", "fingerprint", "resumed", "stores", "leased_blocks_max")
    NODE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_MAX_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    STORES_FIELD_NUMBER: _ClassVar[int]
    LEASED_BLOCKS_MAX_FIELD_NUMBER: _ClassVar[int]
    node: str
    model: str
    pool: str
    kind: str
    incarnation: int
    blocks: int
    block_tokens: int
    block_bytes: int
    sequences_max: int
    step_tokens_max: int
    context_tokens_max: int
    profile: CostProfile
    address: str
    host: str
    fingerprint: str
    resumed: bool
    stores: bool
    leased_blocks_max: int
    def __init__(self, node: _Optional[str] = ..., model: _Optional[str] = ..., pool: _Optional[str] = ..., kind: _Optional[str] = ..., incarnation: _Optional[int] = ..., blocks: _Optional[int] = ..., block_tokens: _Optional[int] = ..., block_bytes: _Optional[int] = ..., sequences_max: _Optional[int] = ..., step_tokens_max: _Optional[int] = ..., context_tokens_max: _Optional[int] = ..., profile: _Optional[_Union[CostProfile, _Mapping]] = ..., address: _Optional[str] = ..., host: _Optional[str] = ..., fingerprint: _Optional[str] = ..., resumed: bool = ..., stores: bool = ..., leased_blocks_max: _Optional[int] = ...) -> None: ...

class CostProfile(_message.Message):
    __slots__ = ("step_s", "prefill_token_s", "prefill_token_context_s", "sequence_s", "context_token_s", "fetch_bytes_per_s", "fetch_latency_s", "batch_tokens", "batch_s", "overlap", "pass_tokens", "tokens_per_pass", "beat_s", "draft_step_s")
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_CONTEXT_S_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_S_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BATCH_S_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_FIELD_NUMBER: _ClassVar[int]
    PASS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_PASS_FIELD_NUMBER: _ClassVar[int]
    BEAT_S_FIELD_NUMBER: _ClassVar[int]
    DRAFT_STEP_S_FIELD_NUMBER: _ClassVar[int]
    step_s: float
    prefill_token_s: float
    prefill_token_context_s: float
    sequence_s: float
    context_token_s: float
    fetch_bytes_per_s: float
    fetch_latency_s: float
    batch_tokens: _containers.RepeatedScalarFieldContainer[int]
    batch_s: _containers.RepeatedScalarFieldContainer[float]
    overlap: float
    pass_tokens: int
    tokens_per_pass: float
    beat_s: float
    draft_step_s: float
    def __init__(self, step_s: _Optional[float] = ..., prefill_token_s: _Optional[float] = ..., prefill_token_context_s: _Optional[float] = ..., sequence_s: _Optional[float] = ..., context_token_s: _Optional[float] = ..., fetch_bytes_per_s: _Optional[float] = ..., fetch_latency_s: _Optional[float] = ..., batch_tokens: _Optional[_Iterable[int]] = ..., batch_s: _Optional[_Iterable[float]] = ..., overlap: _Optional[float] = ..., pass_tokens: _Optional[int] = ..., tokens_per_pass: _Optional[float] = ..., beat_s: _Optional[float] = ..., draft_step_s: _Optional[float] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("request", "logprob", "top_tokens", "top_logprobs")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request: int
    logprob: float
    top_tokens: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, request: _Optional[int] = ..., logprob: _Optional[float] = ..., top_tokens: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("request", "computed_tokens", "began_s_ago", "cpu_tokens", "cmx_tokens", "peer_tokens", "regretted_tokens")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BEGAN_S_AGO_FIELD_NUMBER: _ClassVar[int]
    CPU_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CMX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PEER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REGRETTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request: int
    computed_tokens: int
    began_s_ago: float
    cpu_tokens: int
    cmx_tokens: int
    peer_tokens: int
    regretted_tokens: int
    def __init__(self, request: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., began_s_ago: _Optional[float] = ..., cpu_tokens: _Optional[int] = ..., cmx_tokens: _Optional[int] = ..., peer_tokens: _Optional[int] = ..., regretted_tokens: _Optional[int] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("request", "reason", "output_tokens", "computed_tokens", "message", "began_s_ago", "cpu_tokens", "cmx_tokens", "peer_tokens", "regretted_tokens")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    BEGAN_S_AGO_FIELD_NUMBER: _ClassVar[int]
    CPU_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CMX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PEER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REGRETTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request: int
    reason: str
    output_tokens: int
    computed_tokens: int
    message: str
    began_s_ago: float
    cpu_tokens: int
    cmx_tokens: int
    peer_tokens: int
    regretted_tokens: int
    def __init__(self, request: _Optional[int] = ..., reason: _Optional[str] = ..., output_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., message: _Optional[str] = ..., began_s_ago: _Optional[float] = ..., cpu_tokens: _Optional[int] = ..., cmx_tokens: _Optional[int] = ..., peer_tokens: _Optional[int] = ..., regretted_tokens: _Optional[int] = ...) -> None: ...

class KvBatch(_message.Message):
    __slots__ = ("sequence", "stored", "removed", "cleared", "snapshot", "page", "more")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    stored: _containers.RepeatedCompositeFieldContainer[StoredRun]
    removed: bytes
    cleared: bool
    snapshot: int
    page: int
    more: bool
    def __init__(self, sequence: _Optional[int] = ..., stored: _Optional[_Iterable[_Union[StoredRun, _Mapping]]] = ..., removed: _Optional[bytes] = ..., cleared: bool = ..., snapshot: _Optional[int] = ..., page: _Optional[int] = ..., more: bool = ...) -> None: ...

class StoredRun(_message.Message):
    __slots__ = ("parent", "hashes")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    parent: bytes
    hashes: bytes
    def __init__(self, parent: _Optional[bytes] = ..., hashes: _Optional[bytes] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "queued_tokens", "context_tokens", "blocks_free", "blocks_cached", "blocks_used", "cost_scale", "preemptions", "step_s", "tenants", "blocks_leased", "blocks_unleased", "blocks_evicted", "evicted_idle_s", "drafted_tokens", "accepted_tokens", "beats", "beats_missed", "beat_late_s", "split", "prefetch_room_blocks", "blocks_prefetched", "prefetched", "prefetch_used", "prefetch_wasted", "pooled_drafts")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    COST_SCALE_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_LEASED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_UNLEASED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_EVICTED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_IDLE_S_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BEATS_FIELD_NUMBER: _ClassVar[int]
    BEATS_MISSED_FIELD_NUMBER: _ClassVar[int]
    BEAT_LATE_S_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_ROOM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_PREFETCHED_FIELD_NUMBER: _ClassVar[int]
    PREFETCHED_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_USED_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_WASTED_FIELD_NUMBER: _ClassVar[int]
    POOLED_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    queued_tokens: int
    context_tokens: int
    blocks_free: int
    blocks_cached: int
    blocks_used: int
    cost_scale: float
    preemptions: int
    step_s: float
    tenants: _containers.RepeatedCompositeFieldContainer[TenantLoad]
    blocks_leased: int
    blocks_unleased: int
    blocks_evicted: int
    evicted_idle_s: float
    drafted_tokens: int
    accepted_tokens: int
    beats: int
    beats_missed: int
    beat_late_s: float
    split: SplitLoad
    prefetch_room_blocks: int
    blocks_prefetched: int
    prefetched: int
    prefetch_used: int
    prefetch_wasted: int
    pooled_drafts: PooledDrafts
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., context_tokens: _Optional[int] = ..., blocks_free: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., blocks_used: _Optional[int] = ..., cost_scale: _Optional[float] = ..., preemptions: _Optional[int] = ..., step_s: _Optional[float] = ..., tenants: _Optional[_Iterable[_Union[TenantLoad, _Mapping]]] = ..., blocks_leased: _Optional[int] = ..., blocks_unleased: _Optional[int] = ..., blocks_evicted: _Optional[int] = ..., evicted_idle_s: _Optional[float] = ..., drafted_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ..., beats: _Optional[int] = ..., beats_missed: _Optional[int] = ..., beat_late_s: _Optional[float] = ..., split: _Optional[_Union[SplitLoad, _Mapping]] = ..., prefetch_room_blocks: _Optional[int] = ..., blocks_prefetched: _Optional[int] = ..., prefetched: _Optional[int] = ..., prefetch_used: _Optional[int] = ..., prefetch_wasted: _Optional[int] = ..., pooled_drafts: _Optional[_Union[PooledDrafts, _Mapping]] = ...) -> None: ...

class PooledDrafts(_message.Message):
    __slots__ = ("answered", "late", "unreached", "slotless", "wait_s", "slots", "slots_taken")
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    UNREACHED_FIELD_NUMBER: _ClassVar[int]
    SLOTLESS_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_TAKEN_FIELD_NUMBER: _ClassVar[int]
    answered: int
    late: int
    unreached: int
    slotless: int
    wait_s: float
    slots: int
    slots_taken: int
    def __init__(self, answered: _Optional[int] = ..., late: _Optional[int] = ..., unreached: _Optional[int] = ..., slotless: _Optional[int] = ..., wait_s: _Optional[float] = ..., slots: _Optional[int] = ..., slots_taken: _Optional[int] = ...) -> None: ...

class SplitLoad(_message.Message):
    __slots__ = ("attention_s", "ffn_s", "ffn_ranks", "experts", "links_shared", "links_network")
    ATTENTION_S_FIELD_NUMBER: _ClassVar[int]
    FFN_S_FIELD_NUMBER: _ClassVar[int]
    FFN_RANKS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    LINKS_SHARED_FIELD_NUMBER: _ClassVar[int]
    LINKS_NETWORK_FIELD_NUMBER: _ClassVar[int]
    attention_s: float
    ffn_s: float
    ffn_ranks: float
    experts: ExpertBalance
    links_shared: int
    links_network: int
    def __init__(self, attention_s: _Optional[float] = ..., ffn_s: _Optional[float] = ..., ffn_ranks: _Optional[float] = ..., experts: _Optional[_Union[ExpertBalance, _Mapping]] = ..., links_shared: _Optional[int] = ..., links_network: _Optional[int] = ...) -> None: ...

class ExpertBalance(_message.Message):
    __slots__ = ("moves", "imbalance", "imbalance_first")
    MOVES_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_FIRST_FIELD_NUMBER: _ClassVar[int]
    moves: int
    imbalance: float
    imbalance_first: float
    def __init__(self, moves: _Optional[int] = ..., imbalance: _Optional[float] = ..., imbalance_first: _Optional[float] = ...) -> None: ...

class TenantLoad(_message.Message):
    __slots__ = ("tenant", "waiting", "queued_tokens")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    waiting: int
    queued_tokens: int
    def __init__(self, tenant: _Optional[str] = ..., waiting: _Optional[int] = ..., queued_tokens: _Optional[int] = ...) -> None: ...

class FetchFrame(_message.Message):
    __slots__ = ("request", "frames_copied")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    FRAMES_COPIED_FIELD_NUMBER: _ClassVar[int]
    request: FetchRequest
    frames_copied: int
    def __init__(self, request: _Optional[_Union[FetchRequest, _Mapping]] = ..., frames_copied: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("request", "hashes", "first_block", "tokens", "pending", "block_bytes", "transports", "incarnation")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    request: int
    hashes: bytes
    first_block: int
    tokens: int
    pending: bool
    block_bytes: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    incarnation: int
    def __init__(self, request: _Optional[int] = ..., hashes: _Optional[bytes] = ..., first_block: _Optional[int] = ..., tokens: _Optional[int] = ..., pending: bool = ..., block_bytes: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., incarnation: _Optional[int] = ...) -> None: ...

class BlocksFrame(_message.Message):
    __slots__ = ("tokens", "final", "computed_tokens", "blocks", "shm", "ray", "failure")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SHM_FIELD_NUMBER: _ClassVar[int]
    RAY_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    final: bool
    computed_tokens: int
    blocks: int
    shm: SharedMemory
    ray: RayObject
    failure: str
    def __init__(self, tokens: _Optional[int] = ..., final: bool = ..., computed_tokens: _Optional[int] = ..., blocks: _Optional[int] = ..., shm: _Optional[_Union[SharedMemory, _Mapping]] = ..., ray: _Optional[_Union[RayObject, _Mapping]] = ..., failure: _Optional[str] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("path", "size", "blocks", "cookie")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COOKIE_FIELD_NUMBER: _ClassVar[int]
    path: str
    size: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    cookie: bytes
    def __init__(self, path: _Optional[str] = ..., size: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ..., cookie: _Optional[bytes] = ...) -> None: ...

class RayObject(_message.Message):
    __slots__ = ("reference",)
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    reference: bytes
    def __init__(self, reference: _Optional[bytes] = ...) -> None: ...
