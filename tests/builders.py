"""Builders of the core's nouns that default every field, so that a test shows only what matters."""

from collections.abc import Iterable
from typing import Any, TypeVar

from orchestrator.core.types import (
    Assignment,
    BlockHash,
    CostProfile,
    Lease,
    LeaseId,
    ModelName,
    NodeId,
    NodeSpec,
    PoolKind,
    PoolName,
    RequestId,
    Role,
    StoredModel,
    StoreId,
    StoreSpec,
    TenantId,
    Tier,
)
from orchestrator.wire.trust import Trust

T = TypeVar("T")

#: What all processes of a tests' cluster know.
SECRET = "the tests' secret"
TRUST = Trust(SECRET.encode())
#: Tokens in a block in tests: few enough to count on one hand.
BLOCK_TOKENS = 4


def node_spec(**changes: Any) -> NodeSpec:
    """Return a small node: 16 blocks of 4 tokens, 8 sequences, steps of 64 tokens that take no time."""
    fields: dict[str, Any] = {
        "id": NodeId("n0"),
        "model": ModelName("m"),
        "pool": PoolName("p"),
        "kind": PoolKind.AGGREGATED,
        "incarnation": 1,
        "blocks": 16,
        "block_tokens": BLOCK_TOKENS,
        "block_bytes": 64,
        "sequences_max": 8,
        "step_tokens_max": 64,
        "context_tokens_max": 1000,
        "profile": CostProfile(),
    }
    fields |= changes
    return NodeSpec(**{"leased_blocks_max": fields["blocks"] // 2, **fields})


def stored_model(name: str = "m", **changes: Any) -> StoredModel:
    """Return a small part of a store: 16 slots, segments of 2 blocks of 4 tokens, no cmx."""
    fields: dict[str, Any] = {
        "model": ModelName(name),
        "block_tokens": BLOCK_TOKENS,
        "block_bytes": 64,
        "slots": 16,
        "segment_blocks": 2,
    }
    return StoredModel(**{**fields, **changes})


def store_spec(**changes: Any) -> StoreSpec:
    """Return a store of one model on one host."""
    fields: dict[str, Any] = {
        "id": StoreId("s0"),
        "incarnation": 1,
        "host": "h0",
        "address": "",
        "models": (stored_model(),),
    }
    return StoreSpec(**{**fields, **changes})


def prompt_hashes(prompt: str) -> tuple[BlockHash, ...]:
    """Return names for a prompt with one letter a block: "abc" has blocks a, ab and abc."""
    return tuple(BlockHash(prompt[: index + 1].encode()) for index in range(len(prompt)))


def assignment(request: int = 1, prompt: str = "ab", tail: int = 1, **changes: Any) -> Assignment:
    """Return an assignment to generate 4 tokens after a prompt of one block a letter and `tail` tokens more."""
    fields: dict[str, Any] = {
        "request": RequestId(request),
        "role": Role.GENERATE,
        "prompt_tokens": len(prompt) * BLOCK_TOKENS + tail,
        "hashes": prompt_hashes(prompt),
        "output_tokens_max": 4,
    }
    return Assignment(**{**fields, **changes})


def lease(name: str = "l", prompt: str = "ab", **changes: Any) -> Lease:
    """Return a lease of a tenant's for a minute on a prompt of one block a letter, in `hbm`."""
    fields: dict[str, Any] = {
        "id": LeaseId(name),
        "tenant": TenantId("t"),
        "model": ModelName("m"),
        "hashes": prompt_hashes(prompt),
        "tier": Tier.HBM,
        "ttl_s": 60.0,
        "size_bytes": len(prompt) * 64,
    }
    return Lease(**{**fields, **changes})


def some(items: Iterable[T]) -> list[T]:
    """Return what is to be looked at, of which there must be something: `all` of nothing is true."""
    listed = list(items)
    assert listed, "there is nothing to look at"
    return listed
