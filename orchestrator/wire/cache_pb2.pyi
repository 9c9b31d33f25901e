from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_HBM: _ClassVar[Tier]
    TIER_CPU: _ClassVar[Tier]
    TIER_CMX: _ClassVar[Tier]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_APPLIED: _ClassVar[Outcome]
    OUTCOME_CLIPPED: _ClassVar[Outcome]
    OUTCOME_DEFERRED: _ClassVar[Outcome]
    OUTCOME_DUPLICATE: _ClassVar[Outcome]
    OUTCOME_REJECTED: _ClassVar[Outcome]
    OUTCOME_MISSING: _ClassVar[Outcome]
    OUTCOME_UNSUPPORTED: _ClassVar[Outcome]
TIER_UNSPECIFIED: Tier
TIER_HBM: Tier
TIER_CPU: Tier
TIER_CMX: Tier
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_APPLIED: Outcome
OUTCOME_CLIPPED: Outcome
OUTCOME_DEFERRED: Outcome
OUTCOME_DUPLICATE: Outcome
OUTCOME_REJECTED: Outcome
OUTCOME_MISSING: Outcome
OUTCOME_UNSUPPORTED: Outcome

class TokenRange(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("id", "model", "range")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    range: TokenRange
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., range: _Optional[_Union[TokenRange, _Mapping]] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("chat_json", "text", "model", "cache_salt", "range")
    CHAT_JSON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    chat_json: str
    text: str
    model: str
    cache_salt: str
    range: TokenRange
    def __init__(self, chat_json: _Optional[str] = ..., text: _Optional[str] = ..., model: _Optional[str] = ..., cache_salt: _Optional[str] = ..., range: _Optional[_Union[TokenRange, _Mapping]] = ...) -> None: ...

class Blocks(_message.Message):
    __slots__ = ("hashes", "model", "first_block")
    HASHES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    model: str
    first_block: int
    def __init__(self, hashes: _Optional[_Iterable[bytes]] = ..., model: _Optional[str] = ..., first_block: _Optional[int] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("session", "prompt", "blocks", "lease")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    session: Session
    prompt: Prompt
    blocks: Blocks
    lease: str
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., blocks: _Optional[_Union[Blocks, _Mapping]] = ..., lease: _Optional[str] = ...) -> None: ...

class ApplyRequest(_message.Message):
    __slots__ = ("message_id", "actions")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    actions: _containers.RepeatedCompositeFieldContainer[Action]
    def __init__(self, message_id: _Optional[str] = ..., actions: _Optional[_Iterable[_Union[Action, _Mapping]]] = ...) -> None: ...

class Action(_message.Message):
    __slots__ = ("action_id", "deadline_s", "pin", "unpin", "retain", "evict", "prefetch", "demote", "share", "fork", "supersede", "tool_started", "tool_finished", "end_session")
    ACTION_ID_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    UNPIN_FIELD_NUMBER: _ClassVar[int]
    RETAIN_FIELD_NUMBER: _ClassVar[int]
    EVICT_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_FIELD_NUMBER: _ClassVar[int]
    DEMOTE_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    FORK_FIELD_NUMBER: _ClassVar[int]
    SUPERSEDE_FIELD_NUMBER: _ClassVar[int]
    TOOL_STARTED_FIELD_NUMBER: _ClassVar[int]
    TOOL_FINISHED_FIELD_NUMBER: _ClassVar[int]
    END_SESSION_FIELD_NUMBER: _ClassVar[int]
    action_id: str
    deadline_s: float
    pin: Pin
    unpin: Unpin
    retain: Retain
    evict: Evict
    prefetch: Prefetch
    demote: Demote
    share: Share
    fork: Fork
    supersede: Supersede
    tool_started: ToolStarted
    tool_finished: ToolFinished
    end_session: EndSession
    def __init__(self, action_id: _Optional[str] = ..., deadline_s: _Optional[float] = ..., pin: _Optional[_Union[Pin, _Mapping]] = ..., unpin: _Optional[_Union[Unpin, _Mapping]] = ..., retain: _Optional[_Union[Retain, _Mapping]] = ..., evict: _Optional[_Union[Evict, _Mapping]] = ..., prefetch: _Optional[_Union[Prefetch, _Mapping]] = ..., demote: _Optional[_Union[Demote, _Mapping]] = ..., share: _Optional[_Union[Share, _Mapping]] = ..., fork: _Optional[_Union[Fork, _Mapping]] = ..., supersede: _Optional[_Union[Supersede, _Mapping]] = ..., tool_started: _Optional[_Union[ToolStarted, _Mapping]] = ..., tool_finished: _Optional[_Union[ToolFinished, _Mapping]] = ..., end_session: _Optional[_Union[EndSession, _Mapping]] = ...) -> None: ...

class Pin(_message.Message):
    __slots__ = ("target", "tier", "ttl_s", "lease")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    target: Target
    tier: Tier
    ttl_s: float
    lease: str
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., tier: _Optional[_Union[Tier, str]] = ..., ttl_s: _Optional[float] = ..., lease: _Optional[str] = ...) -> None: ...

class Unpin(_message.Message):
    __slots__ = ("target",)
    TARGET_FIELD_NUMBER: _ClassVar[int]
    target: Target
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ...) -> None: ...

class Retain(_message.Message):
    __slots__ = ("target", "priority", "ttl_s")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    target: Target
    priority: int
    ttl_s: float
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., priority: _Optional[int] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class Evict(_message.Message):
    __slots__ = ("target", "tier")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    target: Target
    tier: Tier
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., tier: _Optional[_Union[Tier, str]] = ...) -> None: ...

class Prefetch(_message.Message):
    __slots__ = ("target", "tier")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    target: Target
    tier: Tier
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., tier: _Optional[_Union[Tier, str]] = ...) -> None: ...

class Demote(_message.Message):
    __slots__ = ("target", "tier")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    target: Target
    tier: Tier
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., tier: _Optional[_Union[Tier, str]] = ...) -> None: ...

class Share(_message.Message):
    __slots__ = ("target", "copies")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    target: Target
    copies: int
    def __init__(self, target: _Optional[_Union[Target, _Mapping]] = ..., copies: _Optional[int] = ...) -> None: ...

class Fork(_message.Message):
    __slots__ = ("parent", "children")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    parent: Session
    children: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, parent: _Optional[_Union[Session, _Mapping]] = ..., children: _Optional[_Iterable[str]] = ...) -> None: ...

class Supersede(_message.Message):
    __slots__ = ("session", "keep_tokens")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KEEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    session: Session
    keep_tokens: int
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., keep_tokens: _Optional[int] = ...) -> None: ...

class ToolStarted(_message.Message):
    __slots__ = ("session", "tool_class", "expected_s", "call_id")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TOOL_CLASS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_S_FIELD_NUMBER: _ClassVar[int]
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    session: Session
    tool_class: str
    expected_s: float
    call_id: str
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., tool_class: _Optional[str] = ..., expected_s: _Optional[float] = ..., call_id: _Optional[str] = ...) -> None: ...

class ToolFinished(_message.Message):
    __slots__ = ("session", "call_id")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    session: Session
    call_id: str
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., call_id: _Optional[str] = ...) -> None: ...

class EndSession(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class ApplyResponse(_message.Message):
    __slots__ = ("message_id", "results")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    results: _containers.RepeatedCompositeFieldContainer[Result]
    def __init__(self, message_id: _Optional[str] = ..., results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("action_id", "outcome", "reason", "message", "lease", "blocks", "tokens", "bytes", "tier", "ttl_s", "first_outcome")
    ACTION_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_OUTCOME_FIELD_NUMBER: _ClassVar[int]
    action_id: str
    outcome: Outcome
    reason: str
    message: str
    lease: str
    blocks: int
    tokens: int
    bytes: int
    tier: Tier
    ttl_s: float
    first_outcome: Outcome
    def __init__(self, action_id: _Optional[str] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., lease: _Optional[str] = ..., blocks: _Optional[int] = ..., tokens: _Optional[int] = ..., bytes: _Optional[int] = ..., tier: _Optional[_Union[Tier, str]] = ..., ttl_s: _Optional[float] = ..., first_outcome: _Optional[_Union[Outcome, str]] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("targets", "hashes")
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    targets: _containers.RepeatedCompositeFieldContainer[Target]
    hashes: bool
    def __init__(self, targets: _Optional[_Iterable[_Union[Target, _Mapping]]] = ..., hashes: bool = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("residencies",)
    RESIDENCIES_FIELD_NUMBER: _ClassVar[int]
    residencies: _containers.RepeatedCompositeFieldContainer[Residency]
    def __init__(self, residencies: _Optional[_Iterable[_Union[Residency, _Mapping]]] = ...) -> None: ...

class Residency(_message.Message):
    __slots__ = ("outcome", "reason", "message", "model", "blocks", "tokens", "bytes", "holdings", "leases", "hashes", "effects")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    EFFECTS_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    reason: str
    message: str
    model: str
    blocks: int
    tokens: int
    bytes: int
    holdings: _containers.RepeatedCompositeFieldContainer[Holding]
    leases: _containers.RepeatedCompositeFieldContainer[LeaseState]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    effects: _containers.RepeatedCompositeFieldContainer[Effect]
    def __init__(self, outcome: _Optional[_Union[Outcome, str]] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., model: _Optional[str] = ..., blocks: _Optional[int] = ..., tokens: _Optional[int] = ..., bytes: _Optional[int] = ..., holdings: _Optional[_Iterable[_Union[Holding, _Mapping]]] = ..., leases: _Optional[_Iterable[_Union[LeaseState, _Mapping]]] = ..., hashes: _Optional[_Iterable[bytes]] = ..., effects: _Optional[_Iterable[_Union[Effect, _Mapping]]] = ...) -> None: ...

class Effect(_message.Message):
    __slots__ = ("message_id", "action_id", "verb", "lease", "bytes", "found_tokens", "earned_tokens", "saved_s", "ended")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_ID_FIELD_NUMBER: _ClassVar[int]
    VERB_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FOUND_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EARNED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAVED_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    action_id: str
    verb: str
    lease: str
    bytes: int
    found_tokens: int
    earned_tokens: int
    saved_s: float
    ended: str
    def __init__(self, message_id: _Optional[str] = ..., action_id: _Optional[str] = ..., verb: _Optional[str] = ..., lease: _Optional[str] = ..., bytes: _Optional[int] = ..., found_tokens: _Optional[int] = ..., earned_tokens: _Optional[int] = ..., saved_s: _Optional[float] = ..., ended: _Optional[str] = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("tier", "holder", "blocks", "tokens")
    TIER_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    holder: str
    blocks: int
    tokens: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., holder: _Optional[str] = ..., blocks: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class LeaseState(_message.Message):
    __slots__ = ("lease", "model", "tier", "blocks", "bytes", "ttl_s", "session")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    lease: str
    model: str
    tier: Tier
    blocks: int
    bytes: int
    ttl_s: float
    session: str
    def __init__(self, lease: _Optional[str] = ..., model: _Optional[str] = ..., tier: _Optional[_Union[Tier, str]] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., ttl_s: _Optional[float] = ..., session: _Optional[str] = ...) -> None: ...

class QuoteRequest(_message.Message):
    __slots__ = ("actions",)
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    actions: _containers.RepeatedCompositeFieldContainer[Action]
    def __init__(self, actions: _Optional[_Iterable[_Union[Action, _Mapping]]] = ...) -> None: ...

class QuoteResponse(_message.Message):
    __slots__ = ("prices",)
    PRICES_FIELD_NUMBER: _ClassVar[int]
    prices: _containers.RepeatedCompositeFieldContainer[Price]
    def __init__(self, prices: _Optional[_Iterable[_Union[Price, _Mapping]]] = ...) -> None: ...

class Price(_message.Message):
    __slots__ = ("result", "byte_s", "bytes_left", "byte_s_left", "ttft_cached_s", "ttft_computed_s")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    BYTE_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_LEFT_FIELD_NUMBER: _ClassVar[int]
    BYTE_S_LEFT_FIELD_NUMBER: _ClassVar[int]
    TTFT_CACHED_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_COMPUTED_S_FIELD_NUMBER: _ClassVar[int]
    result: Result
    byte_s: float
    bytes_left: float
    byte_s_left: float
    ttft_cached_s: float
    ttft_computed_s: float
    def __init__(self, result: _Optional[_Union[Result, _Mapping]] = ..., byte_s: _Optional[float] = ..., bytes_left: _Optional[float] = ..., byte_s_left: _Optional[float] = ..., ttft_cached_s: _Optional[float] = ..., ttft_computed_s: _Optional[float] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("targets",)
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    targets: _containers.RepeatedCompositeFieldContainer[Target]
    def __init__(self, targets: _Optional[_Iterable[_Union[Target, _Mapping]]] = ...) -> None: ...

class WatchEvent(_message.Message):
    __slots__ = ("target", "residency", "lease")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    target: int
    residency: Residency
    lease: LeaseChange
    def __init__(self, target: _Optional[int] = ..., residency: _Optional[_Union[Residency, _Mapping]] = ..., lease: _Optional[_Union[LeaseChange, _Mapping]] = ...) -> None: ...

class LeaseChange(_message.Message):
    __slots__ = ("lease", "change", "reason")
    class Change(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CHANGE_UNSPECIFIED: _ClassVar[LeaseChange.Change]
        CHANGE_PLACED: _ClassVar[LeaseChange.Change]
        CHANGE_CHANGED: _ClassVar[LeaseChange.Change]
        CHANGE_LOWERED: _ClassVar[LeaseChange.Change]
        CHANGE_ENDED: _ClassVar[LeaseChange.Change]
    CHANGE_UNSPECIFIED: LeaseChange.Change
    CHANGE_PLACED: LeaseChange.Change
    CHANGE_CHANGED: LeaseChange.Change
    CHANGE_LOWERED: LeaseChange.Change
    CHANGE_ENDED: LeaseChange.Change
    LEASE_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseState
    change: LeaseChange.Change
    reason: str
    def __init__(self, lease: _Optional[_Union[LeaseState, _Mapping]] = ..., change: _Optional[_Union[LeaseChange.Change, str]] = ..., reason: _Optional[str] = ...) -> None: ...
