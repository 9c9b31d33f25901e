"""Metrics: each fact once, under both families' names, at a price a token can pay."""

from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from orchestrator.core.cluster.sessions import ReprefillReason
from orchestrator.core.commands import Assign, Complete, Restart, Resume
from orchestrator.core.events import (
    Ended,
    FirstToken,
    NodeJoined,
    NodeLost,
    NodeReported,
    RequestArrived,
    Resumed,
    StoreJoined,
    StoreLost,
    StoreReported,
)
from orchestrator.core.experts import ExpertBalance
from orchestrator.core.hints import Earned, Outcome, Reason, Verb
from orchestrator.core.types import (
    Assignment,
    BlockHash,
    CostProfile,
    FinishReason,
    GatewayId,
    LeasedBytes,
    Load,
    ModelName,
    NodeId,
    NodeSpec,
    PooledDrafts,
    PoolKind,
    PoolName,
    Request,
    RequestId,
    Role,
    ServiceClass,
    SplitLoad,
    StoreCounts,
    StoredModel,
    StoreId,
    StoreLoad,
    StoreSpec,
    TenantId,
    Tier,
    attempt_id,
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


def complete(cached: int = 32, predicted: int = 32, cpu: int = 0, cmx: int = 0, peer: int = 0) -> Complete:
    ended = Ended(RequestId(1), FinishReason.STOP, 3, 40 - cached)
    return Complete(RequestId(1), ended, cached, predicted, cpu, cmx, peer)


def store_of(name: str = "s0", models: tuple[str, ...] = ("default",)) -> StoreSpec:
    """Return a store with ten slots a model, of ten bytes each, and segments of four blocks in cmx."""
    parts = tuple(StoredModel(ModelName(model), 16, 10, 10, segment_blocks=4, cmx=True) for model in models)
    return StoreSpec(StoreId(name), 1, "h0", "", parts)


def store_told(name: str = "s0", model: str = "default", **load: object) -> StoreReported:
    return StoreReported(StoreId(name), ModelName(model), StoreLoad(**load))  # type: ignore[arg-type]


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, tuple(sorted(labels.items()))))


def cluster(clock: Clock | None = None, gateway: int = 0, gateways: int = 1) -> Metrics:
    metrics = Metrics(GatewayId(gateway), gateways, NODES, clock or Clock(), cmx_bytes=1000)
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
    metrics.observe(0.2, NodeReported(NodeId("decode-0"), Load()), [complete(32, cpu=10, cmx=16, peer=2)])
    where = {"model": "default", "pool": "decode"}
    counts = [value(metrics, "weft_cached_tokens_total", **where, tier=tier) for tier in ("hbm", "peer", "cpu", "cmx")]
    assert counts == [4, 2, 10, 16]
    engine = {"model_name": "default", "engine": "decode"}
    names = ("prefix_cache_queries", "prefix_cache_hits", "external_prefix_cache_queries", "external_prefix_cache_hits")
    assert [value(metrics, f"vllm:{name}_total", **engine) for name in names] == [40, 4, 36, 28]
    sources = ("local_cache_hit", "external_kv_transfer", "local_compute")
    assert [value(metrics, "vllm:prompt_tokens_by_source_total", **engine, source=one) for one in sources] == [4, 28, 8]


def test_beats_are_counted_over_restarts_and_their_jitter_is_sampled() -> None:
    metrics = cluster()
    where = {"node": "decode-0", "pool": "decode"}
    # A node without a beat shows none.
    metrics.observe(0.0, NodeReported(NodeId("decode-0"), Load()), [])
    assert value(metrics, "weft_beats_total", **where) is None
    metrics.observe(0.1, NodeReported(NodeId("decode-0"), Load(beats=100, beats_missed=2, beat_late_s=3e-5)), [])
    # It is lost for a moment and is the same; then it is another process, which counts from 0.
    metrics.observe(0.2, NodeLost(NodeId("decode-0"), "gone"), [])
    metrics.observe(0.3, NodeJoined(spec("decode-0")), [])
    metrics.observe(0.4, NodeReported(NodeId("decode-0"), Load(beats=130, beats_missed=2)), [])
    metrics.observe(0.5, NodeJoined(spec("decode-0", 1)), [])
    metrics.observe(0.6, NodeReported(NodeId("decode-0"), Load(beats=7, beats_missed=1)), [])
    assert value(metrics, "weft_beats_total", **where) == 137
    assert value(metrics, "weft_beats_missed_total", **where) == 3
    assert value(metrics, "weft_beat_jitter_seconds_count", pool="decode") == 3


def test_what_a_pool_drafts_is_counted_over_restarts() -> None:
    metrics = cluster()
    where = {"node": "decode-0", "pool": "decode"}
    metrics.observe(0.0, NodeReported(NodeId("decode-0"), Load()), [])
    assert value(metrics, "weft_draft_steps_total", outcome="late", **where) is None
    metrics.observe(0.1, NodeReported(NodeId("decode-0"), Load(pooled_drafts=PooledDrafts(10, 2, 3, 4, 0.5, 8, 5))), [])
    # It is lost for a moment and is the same; then it is another process, which counts from 0.
    metrics.observe(0.2, NodeLost(NodeId("decode-0"), "gone"), [])
    assert value(metrics, "weft_draft_slots", state="taken", **where) is None
    metrics.observe(0.3, NodeJoined(spec("decode-0")), [])
    metrics.observe(0.4, NodeReported(NodeId("decode-0"), Load(pooled_drafts=PooledDrafts(11, 2, 3, 4, 0.75, 8, 6))), [])
    assert [value(metrics, "weft_draft_slots", state=state, **where) for state in ("taken", "free")] == [6, 2]
    metrics.observe(0.5, NodeJoined(spec("decode-0", 1)), [])
    metrics.observe(0.6, NodeReported(NodeId("decode-0"), Load(pooled_drafts=PooledDrafts(0, 0, 7, 0, 0.0))), [])
    outcomes = ("answered", "late", "unreached")
    assert [value(metrics, "weft_draft_steps_total", outcome=one, **where) for one in outcomes] == [11, 2, 10]
    assert value(metrics, "weft_draft_wait_seconds_total", **where) == 0.75
    assert value(metrics, "weft_draft_slotless_total", **where) == 4
    assert [value(metrics, "weft_draft_slots", state=state, **where) for state in ("taken", "free")] == [0, 0]


def test_halves_of_split_decode_and_moves_of_experts_are_counted_over_restarts() -> None:
    metrics = cluster()
    where = {"node": "decode-0", "pool": "decode"}
    metrics.observe(0.0, NodeReported(NodeId("decode-0"), Load()), [])
    assert value(metrics, "weft_afd_ranks", part="ffn", **where) is None
    # Two FFN ranks for four attention ranks; the first of those speaks for the group.
    metrics.observe(0.1, NodeReported(NodeId("decode-0"), Load(split=SplitLoad(2.0, 1.5, 0.5))), [])
    balance = ExpertBalance(moves=3, imbalance=0.0, imbalance_first=0.75)
    metrics.observe(0.2, NodeReported(NodeId("decode-0"), Load(split=SplitLoad(4.0, 2.5, 0.5, balance))), [])
    # It is lost for a moment and is the same; then its group is another one, which counts from 0.
    metrics.observe(0.3, NodeLost(NodeId("decode-0"), "gone"), [])
    assert value(metrics, "weft_expert_imbalance", placement="now", **where) is None
    assert value(metrics, "weft_afd_links", transport="shm", **where) is None
    metrics.observe(0.4, NodeJoined(spec("decode-0")), [])
    metrics.observe(0.5, NodeReported(NodeId("decode-0"), Load(split=SplitLoad(5.0, 3.0, 0.5, balance))), [])
    assert value(metrics, "weft_expert_imbalance", placement="now", **where) == 0.0
    assert value(metrics, "weft_expert_imbalance", placement="first", **where) == 0.75
    metrics.observe(0.6, NodeJoined(spec("decode-0", 1)), [])
    balance = ExpertBalance(1, 0.1, 0.2)
    metrics.observe(0.7, NodeReported(NodeId("decode-0"), Load(split=SplitLoad(1.0, 1.0, 0.5, balance, 1, 3))), [])
    assert value(metrics, "weft_afd_seconds_total", part="attention", **where) == 6.0
    assert value(metrics, "weft_afd_seconds_total", part="ffn", **where) == 4.0
    assert [value(metrics, "weft_afd_ranks", part=part, **where) for part in ("attention", "ffn")] == [1, 0.5]
    assert [value(metrics, "weft_afd_links", transport=way, **where) for way in ("shm", "tcp")] == [1, 3]
    assert value(metrics, "weft_expert_moves_total", **where) == 4


def test_tiers_show_how_full_they_are_and_what_they_forget() -> None:
    metrics = cluster()
    load = Load(blocks_used=6, blocks_cached=3, blocks_free=1, blocks_evicted=7, evicted_idle_s=2.5)
    metrics.observe(0.0, NodeReported(NodeId("decode-0"), load), [])
    metrics.observe(0.0, StoreJoined(store_of(models=("default", "other"))), [])
    counts = StoreCounts(cpu_evicted=5, cmx_evicted=8)
    for model in ("default", "other"):
        told = store_told(model=model, slots_used=1, slots_cached=2, segments=3, counts=counts, evicted_idle_s=4.0)
        metrics.observe(0.1, told, [])
    places = (("decode-0", "hbm"), ("s0", "cpu"), ("s0", "cmx"))
    told = {
        name: [value(metrics, f"weft_kv_{name}", node=node, tier=tier) for node, tier in places]
        for name in ("bytes", "capacity_bytes", "evicted_blocks_total", "evicted_idle_seconds")
    }
    assert told == {
        "bytes": [9, 60, 240],
        "capacity_bytes": [10, 200, 1000],
        "evicted_blocks_total": [7, 10, 16],
        "evicted_idle_seconds": [2.5, 4.0, None],
    }
    assert value(metrics, "weft_kv_blocks", node="s0", tier="cmx", state="cached") == 24


def test_a_store_tells_what_it_did_and_is_seen_to_go_and_leave() -> None:
    metrics = cluster()
    metrics.set_stores([StoreId("s0")])
    assert value(metrics, "weft_store_up", store="s0") == 0
    metrics.observe(0.0, StoreJoined(store_of()), [])
    counts = StoreCounts(prefetched=9, prefetch_wasted=4, misses=2, failures=(("unavailable", 3),))
    leased = (LeasedBytes(TenantId("t"), Tier.CPU, 30),)
    metrics.observe(0.1, store_told(counts=counts, reads_waiting=5, leased=leased), [])
    assert value(metrics, "weft_store_up", store="s0") == 1
    did = [value(metrics, "weft_store_blocks_total", store="s0", event=event) for event in ("prefetched", "misses", "taken")]
    assert did == [9, 2, 0]
    assert value(metrics, "weft_store_failures_total", store="s0", reason="unavailable") == 3
    assert value(metrics, "weft_wasted_prefetch_bytes_total", store="s0") == 40
    assert value(metrics, "weft_store_reads_waiting", store="s0") == 5
    assert value(metrics, "weft_lease_held_bytes", store="s0", tenant="t", tier="cpu") == 30
    metrics.observe(0.2, StoreLost(StoreId("s0"), "killed"), [])
    assert value(metrics, "weft_store_up", store="s0") == 0
    assert value(metrics, "weft_store_reads_waiting", store="s0") is None
    metrics.set_stores([])
    assert value(metrics, "weft_store_up", store="s0") is None


def test_leases_and_what_hints_earned_are_told_by_the_gateways_that_know() -> None:
    first, second = cluster(gateways=2), cluster(gateway=1, gateways=2)
    key = TenantId("t"), Tier.HBM
    for metrics in (first, second):
        metrics.attach_leases({key: 64}, lambda: {key: 640.0}, {Verb.PIN: Earned(Verb.PIN, "", "", None, 64, 12, 8, 0.25)})
        metrics.hinted(Verb.PIN, Outcome.CLIPPED, Reason.QUOTA_BYTES)
        metrics.hinted(Verb.PIN, Outcome.APPLIED, None)
        names = ("bytes", "found_tokens", "earned_tokens", "saved_seconds")
        assert [value(metrics, f"weft_hint_{name}_total", action="pin") for name in names] == [64, 12, 8, 0.25]
        assert value(metrics, "weft_hint_actions_total", action="pin", outcome="clipped", reason="quota_bytes") == 1
        assert value(metrics, "weft_hint_actions_total", action="pin", outcome="applied", reason="") == 1
    # All gateways know of all leases: one of them tells.
    assert value(first, "weft_lease_byte_seconds_total", tenant="t", tier="hbm") == 640
    assert value(second, "weft_lease_byte_seconds_total", tenant="t", tier="hbm") is None


def test_regret_is_counted_where_it_was_computed() -> None:
    metrics = cluster()
    ended = Ended(RequestId(1), FinishReason.STOP, 3, 40, regretted_tokens=32)
    metrics.observe(0.0, NodeReported(NodeId("decode-0"), Load(), ended=(ended,)), [])
    assert value(metrics, "weft_regretted_tokens_total", node="decode-0", pool="decode") == 32


def test_tokens_are_timed_one_by_one_and_an_exchange_of_several_shares_its_time() -> None:
    clock = Clock()
    metrics = cluster(clock)
    watch = metrics.open_turn(MODEL, ServiceClass.STANDARD, clock.now)
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


def test_a_request_that_goes_on_elsewhere_is_told_and_what_was_computed_again_for_it() -> None:
    metrics = cluster()
    one, again = RequestId(1), attempt_id(RequestId(1), 1)
    metrics.observe(0.0, arrived(), [assign()])
    lost = NodeLost(NodeId("decode-0"), "killed")
    metrics.observe(0.1, lost, [Resume(one, "killed")])
    on = assign(node="decode-1")
    on = replace(on, assignment=replace(on.assignment, request=again, generated_tokens=12))
    metrics.observe(0.1, Resumed(one, 12, ()), [on])
    first = FirstToken(again, 24)
    metrics.observe(0.2, NodeReported(NodeId("decode-1"), Load(), first_tokens=(first,)), [])
    metrics.observe(0.3, NodeReported(NodeId("decode-1"), Load()), [complete(cached=16, predicted=16)])
    assert value(metrics, "weft_resumed_requests_total", model="default") == 1
    assert value(metrics, "weft_replayed_tokens_total", model="default") == 12
    assert value(metrics, "weft_reprefilled_tokens_total", reason="resumed") == 24
    assert value(metrics, "weft_input_tokens_total", model="default", pool="decode") == 40


def test_a_node_shows_its_blocks_and_goes_down_and_its_counts_survive_a_restart() -> None:
    metrics = cluster()
    counts = {"preemptions": 5, "drafted_tokens": 40, "accepted_tokens": 30}
    load = Load(running=2, waiting=1, blocks_used=6, blocks_cached=3, blocks_free=1, step_s=0.01, **counts)
    metrics.observe(0.0, NodeReported(NodeId("decode-0"), load), [])
    assert value(metrics, "weft_kv_blocks", node="decode-0", tier="hbm", state="cached") == 3
    assert value(metrics, "vllm:kv_cache_usage_perc", model_name="default", engine="decode-0") == 0.6
    assert value(metrics, "vllm:num_requests_running", model_name="default", engine="decode-0") == 2
    assert value(metrics, "weft_step_seconds_count", pool="decode") == 1
    metrics.observe(0.1, NodeLost(NodeId("decode-0"), "killed"), [])
    assert value(metrics, "weft_node_up", node="decode-0", pool="decode") == 0
    assert value(metrics, "vllm:num_preemptions_total", model_name="default", engine="decode-0") == 5
    metrics.observe(0.2, NodeJoined(spec("decode-0", incarnation=1)), [])
    metrics.observe(0.3, NodeReported(NodeId("decode-0"), Load(preemptions=2, drafted_tokens=3, accepted_tokens=1)), [])
    assert value(metrics, "weft_node_up", node="decode-0", pool="decode") == 1
    assert value(metrics, "vllm:num_preemptions_total", model_name="default", engine="decode-0") == 7
    assert value(metrics, "weft_speculation_tokens_total", node="decode-0", outcome="accepted") == 31
    assert value(metrics, "weft_speculation_tokens_total", node="decode-0", outcome="rejected") == 12
    assert value(metrics, "vllm:spec_decode_num_draft_tokens_total", model_name="default", engine="decode-0") == 43


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
