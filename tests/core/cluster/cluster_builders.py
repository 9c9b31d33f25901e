"""Builders of what a cluster is told, every field defaulted; commands it gives, reduced to what a test is about."""

from collections.abc import Sequence
from typing import Any

from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.commands import Assign, ClearTimer, ClusterCommand, SetTimer
from orchestrator.core.config import ClusterConfig, LimitsConfig, ModelConfig, PoolConfig, RouterConfig
from orchestrator.core.events import Ended, FirstToken, NodeJoined, NodeReported, RequestArrived, StoreJoined, StoreReported
from orchestrator.core.types import (
    CostProfile,
    FinishReason,
    KvBatch,
    Load,
    ModelName,
    NodeId,
    NodeSpec,
    PoolKind,
    Request,
    RequestId,
    SessionId,
    StoredModel,
    StoredRun,
    StoreId,
    StoreLoad,
    StoreSpec,
    TenantId,
)
from tests.builders import BLOCK_TOKENS, node_spec, prompt_hashes

#: A token takes 10 ms, a step nothing; a block comes from a peer in 1 ms + 1 ms.
PROFILE = CostProfile(prefill_token_s=0.01, sequence_s=0.00001, fetch_bytes_per_s=64_000.0, fetch_latency_s=0.001)
KINDS = {"p": PoolKind.PREFILL, "d": PoolKind.DECODE, "a": PoolKind.AGGREGATED, "l": PoolKind.LPX}


def cluster_config(limits: LimitsConfig | None = None, router: RouterConfig | None = None) -> ClusterConfig:
    """Return a cluster file's content with the models m and other; pools are only named there, nodes join by themselves."""
    pools = tuple(PoolConfig(name=model, kind=PoolKind.AGGREGATED, model=model) for model in ("m", "other"))
    models = {"m": ModelConfig(), "other": ModelConfig()}
    return ClusterConfig(limits=limits or LimitsConfig(), router=router or RouterConfig(), models=models, pools=pools)


def spec_of(name: str, **changes: Any) -> NodeSpec:
    """Return a node of the kind that its name's first letter says: p0, d0, a0, l0."""
    fields: dict[str, Any] = {"id": NodeId(name), "kind": KINDS[name[0]], "profile": PROFILE, "blocks": 1000}
    return node_spec(**{**fields, **changes})


def make_request(serial: int = 1, prompt: str = "ab", tail: int = 1, **changes: Any) -> Request:
    """Return a request of one block a letter and `tail` tokens more."""
    fields: dict[str, Any] = {
        "id": RequestId(serial),
        "model": ModelName("m"),
        "tenant": TenantId("t"),
        "prompt_tokens": len(prompt) * BLOCK_TOKENS + tail,
        "hashes": prompt_hashes(prompt),
        "output_tokens_max": 8,
    }
    return Request(**{**fields, **changes})


def arrived(serial: int = 1, prompt: str = "ab", **changes: Any) -> RequestArrived:
    """Return the arrival of such a request; `session` may be plain text."""
    if "session" in changes:
        changes["session"] = SessionId(changes["session"])
    return RequestArrived(make_request(serial, prompt, **changes))


def stored(*prompts: str, sequence: int = 1, cleared: bool = False) -> KvBatch:
    """Return a batch that stores whole prompts, one letter a block."""
    return KvBatch(sequence, tuple(StoredRun(None, prompt_hashes(prompt)) for prompt in prompts), cleared=cleared)


def load_of(spec: NodeSpec, **changes: Any) -> Load:
    """Return the load of an idle node."""
    return Load(**{"blocks_free": spec.blocks, **changes})


def reported(name: str, *kv: KvBatch, first: Sequence[int] = (), ended: Sequence[Ended] = (), **load: Any) -> NodeReported:
    """Return a node's frame; `first` are requests whose first token it brings."""
    first_tokens = tuple(FirstToken(RequestId(serial), 0) for serial in first)
    return NodeReported(NodeId(name), load_of(spec_of(name), **load), first_tokens, tuple(ended), kv)


def end_of(serial: int, reason: FinishReason = FinishReason.STOP, computed_tokens: int = 0, message: str = "") -> Ended:
    """Return the end of a part of a request with three tokens of output."""
    return Ended(RequestId(serial), reason, 3, computed_tokens, message)


def join(cluster: Cluster, *names: str, **changes: Any) -> None:
    """Let nodes join that hold nothing."""
    for name in names:
        cluster.handle(NodeJoined(spec_of(name, **changes)), 0.0)
        cluster.handle(reported(name, KvBatch(0, cleared=True)), 0.0)


def without_timers(commands: Sequence[ClusterCommand]) -> list[ClusterCommand]:
    """Return the commands that are not about timers."""
    return [command for command in commands if not isinstance(command, SetTimer | ClearTimer)]


def nodes_of(commands: Sequence[ClusterCommand]) -> list[str]:
    """Return the nodes that something is assigned to, in order."""
    return [command.node for command in commands if isinstance(command, Assign)]


def store_spec(name: str = "s0", host: str = "h0", cmx: bool = False, block_bytes: int = 64, **changes: Any) -> StoreSpec:
    """Return a host's store for model m: 100 blocks in `cpu`, each there in a millisecond, and segments of two blocks."""
    models = (StoredModel(ModelName("m"), BLOCK_TOKENS, block_bytes, 100, segment_blocks=2, cmx=cmx),)
    rates = {"cpu_bytes_per_s": 64_000.0, "cmx_bytes_per_s": 6_400.0, "cmx_latency_s": 0.01}
    fields: dict[str, Any] = {"id": StoreId(name), "incarnation": 1, "host": host, "address": "", "models": models, **rates}
    return StoreSpec(**{**fields, **changes})


def store_reported(name: str, *kv: KvBatch, model: str = "m", **load: Any) -> StoreReported:
    """Return a store's report of one model."""
    return StoreReported(StoreId(name), ModelName(model), StoreLoad(**load), tuple(kv))


def join_store(cluster: Cluster, name: str = "s0", *prompts: str, segments: Sequence[str] = (), **changes: Any) -> None:
    """Let a store join that has these prompts in `cpu`, and these in `cmx`, one letter a block."""
    cluster.handle(StoreJoined(store_spec(name, **changes)), 0.0)
    ends = tuple(prompt_hashes(prompt)[end] for prompt in segments for end in range(1, len(prompt), 2))
    held = KvBatch(1, stored(*prompts).stored if prompts else (), cleared=True, segments_stored=ends)
    cluster.handle(store_reported(name, held), 0.0)
