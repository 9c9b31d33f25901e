"""A store's nouns as protobuf messages and back: what stores say to gateways and to the nodes of their host, and hear from them.

Every function is the inverse of its neighbour; a message that cannot be what it claims raises `MalformedMessage`, the only error
here. See also: `codec.py`, for what gateways and nodes say to each other.
"""

from dataclasses import fields
from math import isfinite

from orchestrator.core.blocks import pack_hashes
from orchestrator.core.config import TENANT_CHARS_MAX
from orchestrator.core.events import EvictAsked, PrefetchAsked, ReadOpened
from orchestrator.core.types import (
    BlockHash,
    ExportId,
    KvBatch,
    LeasedBytes,
    ModelName,
    NodeId,
    StoreCounts,
    StoredModel,
    StoreId,
    StoreLoad,
    StoreSpec,
    TenantId,
    Tier,
)
from orchestrator.wire import store_pb2
from orchestrator.wire.codec import NAME_CHARS_MAX, MalformedMessage, hash_from, hashes_from, kv_from, kv_message, tier_from

_COUNTS = tuple(item.name for item in fields(StoreCounts) if item.name != "failures")


def welcome_message(spec: StoreSpec) -> store_pb2.Welcome:
    """Return a store's answer to a gateway's hello."""
    return store_pb2.Welcome(
        store=spec.id,
        incarnation=spec.incarnation,
        host=spec.host,
        address=spec.address,
        models=[
            store_pb2.StoredModel(
                model=one.model,
                block_tokens=one.block_tokens,
                block_bytes=one.block_bytes,
                slots=one.slots,
                segment_blocks=one.segment_blocks,
                cmx=one.cmx,
            )
            for one in spec.models
        ],
        cpu_bytes_per_s=spec.cpu_bytes_per_s,
        cmx_bytes_per_s=spec.cmx_bytes_per_s,
        cmx_latency_s=spec.cmx_latency_s,
    )


def spec_from(welcome: store_pb2.Welcome) -> StoreSpec:
    """Return the store that a Welcome describes."""
    models = tuple(
        StoredModel(ModelName(one.model), one.block_tokens, one.block_bytes, one.slots, one.segment_blocks, one.cmx)
        for one in welcome.models
    )
    for one in models:
        if not (one.block_tokens and one.block_bytes and one.segment_blocks):
            raise MalformedMessage(f"store {welcome.store} has blocks of no size: {one}")
    rates = (welcome.cpu_bytes_per_s, welcome.cmx_bytes_per_s)
    if not all(rate > 0 for rate in rates) or not (isfinite(welcome.cmx_latency_s) and welcome.cmx_latency_s >= 0):
        raise MalformedMessage(f"store {welcome.store} has rates {rates} and a latency of {welcome.cmx_latency_s}")
    return StoreSpec(
        id=StoreId(welcome.store),
        incarnation=welcome.incarnation,
        host=welcome.host,
        address=welcome.address,
        models=models,
        cpu_bytes_per_s=welcome.cpu_bytes_per_s,
        cmx_bytes_per_s=welcome.cmx_bytes_per_s,
        cmx_latency_s=welcome.cmx_latency_s,
    )


def prefetch_message(asked: PrefetchAsked) -> store_pb2.Prefetch:
    """Return the message for advice to bring blocks up."""
    return store_pb2.Prefetch(model=asked.model, hashes=pack_hashes(asked.hashes), blocks=asked.blocks)


def evict_message(asked: EvictAsked) -> store_pb2.Evict:
    """Return the message for advice to let blocks go."""
    return store_pb2.Evict(
        model=asked.model,
        hashes=pack_hashes(asked.hashes),
        first_block=asked.first_block,
        end_block=asked.end_block,
        tier=asked.tier,
        demote=asked.demote,
    )


def prefetch_from(message: store_pb2.Prefetch) -> PrefetchAsked:
    """Return the advice in a message."""
    hashes = hashes_from(message.hashes)
    if not 0 < message.blocks <= len(hashes):
        raise MalformedMessage(f"a prefetch of {message.blocks} blocks with {len(hashes)} hashes")
    return PrefetchAsked(ModelName(message.model), hashes, message.blocks)


def evict_from(message: store_pb2.Evict) -> EvictAsked:
    """Return the advice in a message."""
    hashes = hashes_from(message.hashes)
    if not message.first_block < message.end_block <= len(hashes):
        raise MalformedMessage(f"blocks {message.first_block} to {message.end_block} of {len(hashes)} cannot be evicted")
    tier = tier_from(message.tier)
    if tier is Tier.HBM:
        raise MalformedMessage("a store has no hbm")
    return EvictAsked(ModelName(message.model), hashes, message.first_block, message.end_block, tier, message.demote)


def read_from(message: store_pb2.Read, read: ExportId, node: NodeId, model: StoredModel, folder: bool) -> ReadOpened:
    """Return the read that a node of a model asks for, under the number that it has here.

    `folder` says whether the model's segments lie where a node can read them by itself.
    """
    hashes = hashes_from(message.hashes)
    first, tokens, each = message.first_block, message.tokens, model.block_tokens
    if not first * each < tokens <= len(hashes) * each:
        raise MalformedMessage(f"a read of tokens {first * each} to {tokens} of {len(hashes)} blocks of {each}")
    return ReadOpened(read, node, model.model, hashes, first, tokens, message.background, folder and message.direct)


def offer_from(message: store_pb2.Offer) -> tuple[BlockHash | None, tuple[BlockHash, ...]]:
    """Return what an offer follows on and what it offers."""
    hashes = hashes_from(message.hashes)
    if not hashes:
        raise MalformedMessage(f"offer {message.offer} offers nothing")
    return hash_from(message.parent, "parent"), hashes


def holdings_message(model: ModelName, batch: KvBatch) -> store_pb2.Holdings:
    """Return the message for one numbered change of what a store holds of a model."""
    return store_pb2.Holdings(
        model=model,
        batch=kv_message(batch),
        segments_stored=pack_hashes(batch.segments_stored),
        segments_removed=pack_hashes(batch.segments_removed),
    )


def holdings_from(message: store_pb2.Holdings) -> tuple[ModelName, KvBatch]:
    """Return the model and the change of holdings in a message."""
    batch = kv_from(message.batch)
    stored, removed = hashes_from(message.segments_stored), hashes_from(message.segments_removed)
    return ModelName(message.model), KvBatch(
        batch.sequence, batch.stored, batch.removed, batch.cleared, batch.snapshot, batch.page, batch.more, stored, removed
    )


def load_message(model: ModelName, load: StoreLoad) -> store_pb2.ModelLoad:
    """Return the message for a store's state for one model."""
    counts = store_pb2.Counts(**{name: getattr(load.counts, name) for name in _COUNTS}, failures=dict(load.counts.failures))
    return store_pb2.ModelLoad(
        model=model,
        slots_free=load.slots_free,
        slots_cached=load.slots_cached,
        slots_used=load.slots_used,
        segments=load.segments,
        reads_waiting=load.reads_waiting,
        waiting_bytes=load.waiting_bytes,
        cpu_bytes_per_s=load.cpu_bytes_per_s,
        cmx_bytes_per_s=load.cmx_bytes_per_s,
        counts=counts,
        leased=[store_pb2.LeasedBytes(tenant=one.tenant, tier=one.tier, bytes=one.bytes) for one in load.leased],
        evicted_idle_s=load.evicted_idle_s,
    )


def load_from(message: store_pb2.ModelLoad) -> tuple[ModelName, StoreLoad]:
    """Return the model and the store's state for it in a message."""
    for rate in (message.cpu_bytes_per_s, message.cmx_bytes_per_s):
        if not (isfinite(rate) and rate >= 0):
            raise MalformedMessage(f"a store measured {rate} bytes a second")
    if not (isfinite(message.evicted_idle_s) and message.evicted_idle_s >= 0):
        raise MalformedMessage(f"what a store forgot had idled for {message.evicted_idle_s} seconds")
    counts = StoreCounts(
        **{name: getattr(message.counts, name) for name in _COUNTS},
        failures=tuple(sorted((name[:NAME_CHARS_MAX], count) for name, count in message.counts.failures.items())),
    )
    return ModelName(message.model), StoreLoad(
        slots_free=message.slots_free,
        slots_cached=message.slots_cached,
        slots_used=message.slots_used,
        segments=message.segments,
        reads_waiting=message.reads_waiting,
        waiting_bytes=message.waiting_bytes,
        cpu_bytes_per_s=message.cpu_bytes_per_s,
        cmx_bytes_per_s=message.cmx_bytes_per_s,
        counts=counts,
        leased=tuple(
            LeasedBytes(TenantId(one.tenant[:TENANT_CHARS_MAX]), tier_from(one.tier), one.bytes) for one in message.leased
        ),
        evicted_idle_s=message.evicted_idle_s,
    )
