from orchestrator.wire import node_pb2 as _node_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachFrame(_message.Message):
    __slots__ = ("hello", "offers", "written", "reads", "copied", "closed", "goodbye")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    hello: NodeHello
    offers: _containers.RepeatedCompositeFieldContainer[Offer]
    written: _containers.RepeatedCompositeFieldContainer[Written]
    reads: _containers.RepeatedCompositeFieldContainer[Read]
    copied: _containers.RepeatedCompositeFieldContainer[Copied]
    closed: _containers.RepeatedScalarFieldContainer[int]
    goodbye: bool
    def __init__(self, hello: _Optional[_Union[NodeHello, _Mapping]] = ..., offers: _Optional[_Iterable[_Union[Offer, _Mapping]]] = ..., written: _Optional[_Iterable[_Union[Written, _Mapping]]] = ..., reads: _Optional[_Iterable[_Union[Read, _Mapping]]] = ..., copied: _Optional[_Iterable[_Union[Copied, _Mapping]]] = ..., closed: _Optional[_Iterable[int]] = ..., goodbye: bool = ...) -> None: ...

class NodeHello(_message.Message):
    __slots__ = ("node", "model", "fingerprint", "layout", "block_tokens", "block_bytes", "process", "host")
    NODE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    node: str
    model: str
    fingerprint: str
    layout: str
    block_tokens: int
    block_bytes: int
    process: int
    host: str
    def __init__(self, node: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., layout: _Optional[str] = ..., block_tokens: _Optional[int] = ..., block_bytes: _Optional[int] = ..., process: _Optional[int] = ..., host: _Optional[str] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("offer", "parent", "hashes")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    offer: int
    parent: bytes
    hashes: bytes
    def __init__(self, offer: _Optional[int] = ..., parent: _Optional[bytes] = ..., hashes: _Optional[bytes] = ...) -> None: ...

class Written(_message.Message):
    __slots__ = ("offer", "blocks")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    offer: int
    blocks: int
    def __init__(self, offer: _Optional[int] = ..., blocks: _Optional[int] = ...) -> None: ...

class Read(_message.Message):
    __slots__ = ("read", "hashes", "first_block", "tokens", "background", "direct")
    READ_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    read: int
    hashes: bytes
    first_block: int
    tokens: int
    background: bool
    direct: bool
    def __init__(self, read: _Optional[int] = ..., hashes: _Optional[bytes] = ..., first_block: _Optional[int] = ..., tokens: _Optional[int] = ..., background: bool = ..., direct: bool = ...) -> None: ...

class Copied(_message.Message):
    __slots__ = ("read", "answers", "failure")
    READ_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    read: int
    answers: int
    failure: str
    def __init__(self, read: _Optional[int] = ..., answers: _Optional[int] = ..., failure: _Optional[str] = ...) -> None: ...

class ArenaFrame(_message.Message):
    __slots__ = ("arena", "grants", "slots")
    ARENA_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    arena: Arena
    grants: _containers.RepeatedCompositeFieldContainer[Grant]
    slots: _containers.RepeatedCompositeFieldContainer[Slots]
    def __init__(self, arena: _Optional[_Union[Arena, _Mapping]] = ..., grants: _Optional[_Iterable[_Union[Grant, _Mapping]]] = ..., slots: _Optional[_Iterable[_Union[Slots, _Mapping]]] = ...) -> None: ...

class Arena(_message.Message):
    __slots__ = ("memory", "first_byte", "slots", "folder")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    FIRST_BYTE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    memory: _node_pb2.SharedMemory
    first_byte: int
    slots: int
    folder: Folder
    def __init__(self, memory: _Optional[_Union[_node_pb2.SharedMemory, _Mapping]] = ..., first_byte: _Optional[int] = ..., slots: _Optional[int] = ..., folder: _Optional[_Union[Folder, _Mapping]] = ...) -> None: ...

class Folder(_message.Message):
    __slots__ = ("path", "device", "inode", "segment_blocks", "move_s_max")
    PATH_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    INODE_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MOVE_S_MAX_FIELD_NUMBER: _ClassVar[int]
    path: str
    device: int
    inode: int
    segment_blocks: int
    move_s_max: float
    def __init__(self, path: _Optional[str] = ..., device: _Optional[int] = ..., inode: _Optional[int] = ..., segment_blocks: _Optional[int] = ..., move_s_max: _Optional[float] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("offer", "first", "slots", "orphan")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    ORPHAN_FIELD_NUMBER: _ClassVar[int]
    offer: int
    first: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    orphan: bool
    def __init__(self, offer: _Optional[int] = ..., first: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., orphan: bool = ...) -> None: ...

class Slots(_message.Message):
    __slots__ = ("read", "slots", "tokens", "final", "cmx_blocks", "segment")
    READ_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    CMX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    read: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    tokens: int
    final: bool
    cmx_blocks: int
    segment: int
    def __init__(self, read: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., tokens: _Optional[int] = ..., final: bool = ..., cmx_blocks: _Optional[int] = ..., segment: _Optional[int] = ...) -> None: ...

class ToStore(_message.Message):
    __slots__ = ("hello", "resyncs", "leases", "ended_leases", "prefetches", "evictions", "frames_received")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESYNCS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    ENDED_LEASES_FIELD_NUMBER: _ClassVar[int]
    PREFETCHES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    FRAMES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    hello: GatewayHello
    resyncs: _containers.RepeatedCompositeFieldContainer[Resync]
    leases: _containers.RepeatedCompositeFieldContainer[_node_pb2.Lease]
    ended_leases: _containers.RepeatedCompositeFieldContainer[_node_pb2.EndedLease]
    prefetches: _containers.RepeatedCompositeFieldContainer[Prefetch]
    evictions: _containers.RepeatedCompositeFieldContainer[Evict]
    frames_received: int
    def __init__(self, hello: _Optional[_Union[GatewayHello, _Mapping]] = ..., resyncs: _Optional[_Iterable[_Union[Resync, _Mapping]]] = ..., leases: _Optional[_Iterable[_Union[_node_pb2.Lease, _Mapping]]] = ..., ended_leases: _Optional[_Iterable[_Union[_node_pb2.EndedLease, _Mapping]]] = ..., prefetches: _Optional[_Iterable[_Union[Prefetch, _Mapping]]] = ..., evictions: _Optional[_Iterable[_Union[Evict, _Mapping]]] = ..., frames_received: _Optional[int] = ...) -> None: ...

class GatewayHello(_message.Message):
    __slots__ = ("gateway",)
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    gateway: int
    def __init__(self, gateway: _Optional[int] = ...) -> None: ...

class Resync(_message.Message):
    __slots__ = ("model", "after")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    model: str
    after: int
    def __init__(self, model: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class Prefetch(_message.Message):
    __slots__ = ("model", "hashes", "blocks")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    model: str
    hashes: bytes
    blocks: int
    def __init__(self, model: _Optional[str] = ..., hashes: _Optional[bytes] = ..., blocks: _Optional[int] = ...) -> None: ...

class Evict(_message.Message):
    __slots__ = ("model", "hashes", "first_block", "end_block", "tier", "demote")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    DEMOTE_FIELD_NUMBER: _ClassVar[int]
    model: str
    hashes: bytes
    first_block: int
    end_block: int
    tier: str
    demote: bool
    def __init__(self, model: _Optional[str] = ..., hashes: _Optional[bytes] = ..., first_block: _Optional[int] = ..., end_block: _Optional[int] = ..., tier: _Optional[str] = ..., demote: bool = ...) -> None: ...

class FromStore(_message.Message):
    __slots__ = ("welcome", "holdings", "loads", "leases", "refused_calls", "moves")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_CALLS_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    holdings: _containers.RepeatedCompositeFieldContainer[Holdings]
    loads: _containers.RepeatedCompositeFieldContainer[ModelLoad]
    leases: _containers.RepeatedCompositeFieldContainer[_node_pb2.Lease]
    refused_calls: int
    moves: _containers.RepeatedCompositeFieldContainer[_node_pb2.Move]
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., holdings: _Optional[_Iterable[_Union[Holdings, _Mapping]]] = ..., loads: _Optional[_Iterable[_Union[ModelLoad, _Mapping]]] = ..., leases: _Optional[_Iterable[_Union[_node_pb2.Lease, _Mapping]]] = ..., refused_calls: _Optional[int] = ..., moves: _Optional[_Iterable[_Union[_node_pb2.Move, _Mapping]]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("store", "incarnation", "host", "address", "models", "cpu_bytes_per_s", "cmx_bytes_per_s", "cmx_latency_s")
    STORE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    CPU_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    CMX_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    CMX_LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    store: str
    incarnation: int
    host: str
    address: str
    models: _containers.RepeatedCompositeFieldContainer[StoredModel]
    cpu_bytes_per_s: float
    cmx_bytes_per_s: float
    cmx_latency_s: float
    def __init__(self, store: _Optional[str] = ..., incarnation: _Optional[int] = ..., host: _Optional[str] = ..., address: _Optional[str] = ..., models: _Optional[_Iterable[_Union[StoredModel, _Mapping]]] = ..., cpu_bytes_per_s: _Optional[float] = ..., cmx_bytes_per_s: _Optional[float] = ..., cmx_latency_s: _Optional[float] = ...) -> None: ...

class StoredModel(_message.Message):
    __slots__ = ("model", "block_tokens", "block_bytes", "slots", "segment_blocks", "cmx")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CMX_FIELD_NUMBER: _ClassVar[int]
    model: str
    block_tokens: int
    block_bytes: int
    slots: int
    segment_blocks: int
    cmx: bool
    def __init__(self, model: _Optional[str] = ..., block_tokens: _Optional[int] = ..., block_bytes: _Optional[int] = ..., slots: _Optional[int] = ..., segment_blocks: _Optional[int] = ..., cmx: bool = ...) -> None: ...

class Holdings(_message.Message):
    __slots__ = ("model", "batch", "segments_stored", "segments_removed")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_STORED_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_REMOVED_FIELD_NUMBER: _ClassVar[int]
    model: str
    batch: _node_pb2.KvBatch
    segments_stored: bytes
    segments_removed: bytes
    def __init__(self, model: _Optional[str] = ..., batch: _Optional[_Union[_node_pb2.KvBatch, _Mapping]] = ..., segments_stored: _Optional[bytes] = ..., segments_removed: _Optional[bytes] = ...) -> None: ...

class ModelLoad(_message.Message):
    __slots__ = ("model", "slots_free", "slots_cached", "slots_used", "segments", "reads_waiting", "waiting_bytes", "cpu_bytes_per_s", "cmx_bytes_per_s", "counts", "leased", "evicted_idle_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FREE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_CACHED_FIELD_NUMBER: _ClassVar[int]
    SLOTS_USED_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    READS_WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    CMX_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_IDLE_S_FIELD_NUMBER: _ClassVar[int]
    model: str
    slots_free: int
    slots_cached: int
    slots_used: int
    segments: int
    reads_waiting: int
    waiting_bytes: int
    cpu_bytes_per_s: float
    cmx_bytes_per_s: float
    counts: Counts
    leased: _containers.RepeatedCompositeFieldContainer[LeasedBytes]
    evicted_idle_s: float
    def __init__(self, model: _Optional[str] = ..., slots_free: _Optional[int] = ..., slots_cached: _Optional[int] = ..., slots_used: _Optional[int] = ..., segments: _Optional[int] = ..., reads_waiting: _Optional[int] = ..., waiting_bytes: _Optional[int] = ..., cpu_bytes_per_s: _Optional[float] = ..., cmx_bytes_per_s: _Optional[float] = ..., counts: _Optional[_Union[Counts, _Mapping]] = ..., leased: _Optional[_Iterable[_Union[LeasedBytes, _Mapping]]] = ..., evicted_idle_s: _Optional[float] = ...) -> None: ...

class Counts(_message.Message):
    __slots__ = ("taken", "given", "declined", "recalled", "written", "cpu_hits", "cmx_hits", "misses", "cpu_evicted", "cmx_evicted", "prefetched", "failures", "prefetch_used", "prefetch_wasted")
    class FailuresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    GIVEN_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    RECALLED_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    CPU_HITS_FIELD_NUMBER: _ClassVar[int]
    CMX_HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    CPU_EVICTED_FIELD_NUMBER: _ClassVar[int]
    CMX_EVICTED_FIELD_NUMBER: _ClassVar[int]
    PREFETCHED_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_USED_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_WASTED_FIELD_NUMBER: _ClassVar[int]
    taken: int
    given: int
    declined: int
    recalled: int
    written: int
    cpu_hits: int
    cmx_hits: int
    misses: int
    cpu_evicted: int
    cmx_evicted: int
    prefetched: int
    failures: _containers.ScalarMap[str, int]
    prefetch_used: int
    prefetch_wasted: int
    def __init__(self, taken: _Optional[int] = ..., given: _Optional[int] = ..., declined: _Optional[int] = ..., recalled: _Optional[int] = ..., written: _Optional[int] = ..., cpu_hits: _Optional[int] = ..., cmx_hits: _Optional[int] = ..., misses: _Optional[int] = ..., cpu_evicted: _Optional[int] = ..., cmx_evicted: _Optional[int] = ..., prefetched: _Optional[int] = ..., failures: _Optional[_Mapping[str, int]] = ..., prefetch_used: _Optional[int] = ..., prefetch_wasted: _Optional[int] = ...) -> None: ...

class LeasedBytes(_message.Message):
    __slots__ = ("tenant", "tier", "bytes")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    tier: str
    bytes: int
    def __init__(self, tenant: _Optional[str] = ..., tier: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...
