"""Metrics: each fact once, under both families' names, at a price a token can pay."""

from prometheus_client.parser import text_string_to_metric_families

from orchestrator.core.cluster.sessions import ReprefillReason
from orchestrator.core.commands import Assign, Complete, Restart
from orchestrator.core.events import Ended, NodeJoined, NodeLost, NodeReported, RequestArrived
from orchestrator.core.types import (
    Assignment,
    BlockHash,
    CostProfile,
    FinishReason,
    GatewayId,
    Load,
    ModelName,
    NodeId,
    NodeSpec,
    PoolKind,
    PoolName,
    Request,
    RequestId,
    Role,
    ServiceClass,
    TenantId,
)
from orchestrator.live.metrics import Metrics

MODEL = ModelName("default")
NODES = {NodeId("decode-0"): PoolName("decode"), NodeId("decode-1"): PoolName("decode")}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def spec(node: str = "decode-0", incarnation: int = 0) -> NodeSpec:
    kinds = {"model": MODEL, "pool": PoolName("decode"), "kind": PoolKind.DECODE, "profile": CostProfile()}
    sizes = {"blocks": 10, "block_tokens": 16, "block_bytes": 1, "sequences_max": 4, "step_tokens_max": 64}
    return NodeSpec(id=NodeId(node), incarnation=incarnation, context_tokens_max=512, **kinds, **sizes)


def arrived(request: int = 1, tokens: int = 40) -> RequestArrived:
    hashes = (BlockHash(b"a" * 16), BlockHash(b"b" * 16))
    return RequestArrived(Request(RequestId(request), MODEL, TenantId("t"), tokens, hashes, 8))


def assign(request: int = 1, node: str = "decode-0") -> Assign:
    return Assign(NodeId(node), Assignment(RequestId(request), Role.GENERATE, 40, (), 8))


def complete(cached: int = 32, predicted: int = 32, cpu: int = 0, cmx: int = 0) -> Complete:
    ended = Ended(RequestId(1), FinishReason.STOP, 3, 40 - cached)
    return Complete(RequestId(1), ended, cached, predicted, cpu, cmx)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, tuple(sorted(labels.items()))))


def cluster(clock: Clock | None = None, gateway: int = 0, gateways: int = 1) -> Metrics:
    metrics = Metrics(GatewayId(gateway), gateways, NODES, clock or Clock())
    for node in NODES:
        metrics.observe(0.0, NodeJoined(spec(node)), [])
    return metrics


def test_a_request_waits_runs_and_is_counted_with_its_cached_tokens() -> None:
    metrics = cluster()
    metrics.observe(0.0, arrived(), [])
    assert value(metrics, "weft_requests_waiting", model="default") == 1
    metrics.observe(0.1, NodeLost(NodeId("decode-1"), "gone"), [assign()])
    assert value(metrics, "weft_requests_waiting", model="default") == 0
    assert value(metrics, "weft_requests_running", model="default") == 1
    metrics.observe(0.2, NodeReported(NodeId("decode-0"), Load()), [complete()])
    assert value(metrics, "weft_requests_running", model="default") == 0
    assert value(metrics, "weft_input_tokens_total", model="default", pool="decode") == 40
    assert value(metrics, "weft_cached_tokens_total", model="default", pool="decode", tier="hbm") == 32
    # The same facts under vLLM's names; the sources add up to the prompt.
    source = {"model_name": "default", "engine": "decode"}
    assert value(metrics, "vllm:prefix_cache_hits_total", **source) == 32
    assert value(metrics, "vllm:prompt_tokens_by_source_total", source="local_compute", **source) == 8


def test_cached_tokens_are_counted_by_the_tier_they_were_in() -> None:
    metrics = cluster()
    metrics.observe(0.0, arrived(), [assign()])
    metrics.observe(0.2, NodeReported(NodeId("decode-0"), Load()), [complete(32, cpu=12, cmx=16)])
    where = {"model": "default", "pool": "decode"}
    counts = [value(metrics, "weft_cached_tokens_total", **where, tier=tier) for tier in ("hbm", "cpu", "cmx")]
    assert counts == [4, 12, 16]


def test_tokens_are_timed_one_by_one_and_an_exchange_of_several_shares_its_time() -> None:
    clock = Clock()
    metrics = cluster(clock)
    watch = metrics.open_turn(MODEL, ServiceClass.STANDARD)
    metrics.observe(0.0, arrived(), [assign()])
    watch.assigned(RequestId(1))
    for seconds, tokens in ((2.0, 1), (0.3, 3), (0.0, 0)):
        clock.now += seconds
        watch.delivered(tokens)
    watch.ended(FinishReason.LENGTH)
    labels = {"model": "default", "pool": "decode", "class": "standard"}
    assert value(metrics, "weft_ttft_seconds_sum", **labels) == 2.0
    assert value(metrics, "weft_itl_seconds_count", **labels) == 3
    assert value(metrics, "weft_itl_seconds_bucket", le="0.1", **labels) == 3
    assert value(metrics, "weft_itl_seconds_bucket", le="0.075", **labels) == 0
    assert value(metrics, "weft_output_tokens_total", model="default", pool="decode") == 4
    assert value(metrics, "vllm:inter_token_latency_seconds_count", model_name="default", engine="decode") == 3
    finished = {"model_name": "default", "engine": "decode", "finished_reason": "length"}
    assert value(metrics, "vllm:request_success_total", **finished) == 1


def test_a_wrong_prediction_and_a_restart_are_told_as_tokens_computed_again() -> None:
    metrics = cluster()
    metrics.observe(0.0, arrived(), [assign()])
    metrics.observe(0.1, NodeLost(NodeId("decode-0"), "killed"), [Restart(RequestId(1), "node lost"), assign(node="decode-1")])
    metrics.observe(0.2, NodeReported(NodeId("decode-1"), Load()), [complete(cached=16, predicted=32)])
    assert value(metrics, "weft_reprefilled_tokens_total", reason="restarted") == 40
    metrics.attach({ReprefillReason.NEW: 100, ReprefillReason.EVICTED: 16})
    assert value(metrics, "weft_reprefilled_tokens_total", reason="evicted") == 16
    assert value(metrics, "weft_route_hit_error_tokens_bucket", model="default", le="16.0") == 1


def test_a_node_shows_its_blocks_and_goes_down_and_its_preemptions_survive_a_restart() -> None:
    metrics = cluster()
    load = Load(running=2, waiting=1, blocks_used=6, blocks_cached=3, blocks_free=1, preemptions=5, step_s=0.01)
    metrics.observe(0.0, NodeReported(NodeId("decode-0"), load), [])
    assert value(metrics, "weft_kv_blocks", node="decode-0", tier="hbm", state="cached") == 3
    assert value(metrics, "vllm:kv_cache_usage_perc", model_name="default", engine="decode-0") == 0.6
    assert value(metrics, "vllm:num_requests_running", model_name="default", engine="decode-0") == 2
    assert value(metrics, "weft_step_seconds_count", pool="decode") == 1
    metrics.observe(0.1, NodeLost(NodeId("decode-0"), "killed"), [])
    assert value(metrics, "weft_node_up", node="decode-0", pool="decode") == 0
    assert value(metrics, "vllm:num_preemptions_total", model_name="default", engine="decode-0") == 5
    metrics.observe(0.2, NodeJoined(spec("decode-0", incarnation=1)), [])
    metrics.observe(0.3, NodeReported(NodeId("decode-0"), Load(preemptions=2)), [])
    assert value(metrics, "weft_node_up", node="decode-0", pool="decode") == 1
    assert value(metrics, "vllm:num_preemptions_total", model_name="default", engine="decode-0") == 7


def test_sums_over_two_gateways_count_every_node_once() -> None:
    pair = [cluster(gateway=number, gateways=2) for number in range(2)]
    for metrics in pair:
        for node in NODES:
            metrics.observe(0.0, NodeReported(node, Load(blocks_used=4, step_s=0.01)), [])
            metrics.moved(node, "hbm", "hbm", 1000, 0.1)
    totals = {"weft_node_up": 2, "weft_step_seconds_count": 2, "weft_kv_moved_bytes_total": 2000, "weft_kv_move_seconds_count": 2}
    for name, total in totals.items():
        found = [amount for metrics in pair for (sample, _), amount in samples(metrics).items() if sample == name]
        assert sum(found) == total, name
    used = {labels for metrics in pair for (sample, labels) in samples(metrics) if sample == "weft_node_up"}
    assert len(used) == 2


def test_nodes_that_come_and_go_and_gateways_that_drain_change_who_exports_what() -> None:
    pair = [cluster(gateway=number, gateways=2) for number in range(2)]
    grown = {**NODES, NodeId("decode-2"): PoolName("decode")}
    for metrics in pair:  # gateway 0 drains: the other one exports every node, the new one as well, which is not up yet
        metrics.set_members(grown, [1])
    assert [len(ups(metrics)) for metrics in pair] == [0, len(grown)]
    assert value(pair[1], "weft_node_up", node="decode-2", pool="decode") == 0
    gone = next(iter(NODES))
    kept = {node: pool for node, pool in grown.items() if node != gone}
    for metrics in pair:
        metrics.set_members(kept, [0, 1])
    assert sorted(node for metrics in pair for node in ups(metrics)) == sorted(kept)


def ups(metrics: Metrics) -> list[str]:
    return [dict(labels)["node"] for (sample, labels) in samples(metrics) if sample == "weft_node_up"]


def test_answers_are_counted_by_status_and_routes_by_time() -> None:
    metrics = cluster()
    metrics.answered("default", "/v1/chat/completions", 529, TenantId("t"))
    metrics.routed(15e-6)
    labels = {"model": "default", "endpoint": "/v1/chat/completions", "status": "529", "tenant": "t"}
    assert value(metrics, "weft_requests_total", **labels) == 1
    assert value(metrics, "weft_route_seconds_bucket", le="2e-05") == 1
