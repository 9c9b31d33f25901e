"""What gateways make of hosts' stores: what is loaded instead of computed or fetched, and what is believed of stores."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.cluster.kvindex import Matches
from orchestrator.core.cluster.resyncs import RESYNC_S, RESYNCS_MAX
from orchestrator.core.commands import Assign, ClearTimer, Complete, RequestStoreResync, SetTimer
from orchestrator.core.config import RouterConfig, RouterPolicy
from orchestrator.core.events import Ended, NodeLost, RequestAbandoned, StoreJoined, StoreLost, TimerFired
from orchestrator.core.timers import StoreResyncTimer
from orchestrator.core.types import CostProfile, FinishReason, KvBatch, ModelName, NodeId, RequestId, StoreId
from tests.builders import BLOCK_TOKENS, prompt_hashes
from tests.core.cluster.cluster_builders import (
    PROFILE,
    arrived,
    end_of,
    join,
    join_store,
    reported,
    store_reported,
    store_spec,
    stored,
    without_timers,
)

MakeCluster = Callable[..., Cluster]
M, S0 = ModelName("m"), StoreId("s0")
TIMER = StoreResyncTimer(S0, M)
LONG = "abcdefghij"


def assign(cluster: Cluster, prompt: str = LONG, keep: bool = False) -> list[Assign]:
    """Let a request arrive and return what is assigned for it; it is given up at once, unless it is kept."""
    commands = cluster.handle(arrived(1, prompt), 0.0)
    if not keep:
        cluster.handle(RequestAbandoned(RequestId(1)), 0.0)
    return [command for command in commands if isinstance(command, Assign)]


def loads(assigned: list[Assign]) -> list[tuple[str, int, str | None]]:
    """Return on which nodes how many tokens are loaded, and from whom more is fetched."""
    return [(part.node, part.assignment.stored_tokens, part.assignment.source) for part in assigned]


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Cluster:
    """Return a cluster with a node on host h0 that can load."""
    return make_cluster("a0", stores=True, host="h0")


# --- what is loaded ---------------------------------------------------------------------------------------------------


def test_what_the_hosts_store_has_is_loaded_instead_of_computed(cluster: Cluster) -> None:
    join_store(cluster, "s0", "abcdefgh")
    (part,) = assign(cluster)
    assert loads([part]) == [("a0", 8 * BLOCK_TOKENS, None)]
    assert part.why is not None
    # eight blocks at a millisecond each, and one for asking
    assert part.why.load_s == pytest.approx(0.009)
    assert part.why.compute_s == pytest.approx(0.09)
    assert part.why.hit_tokens == 8 * BLOCK_TOKENS


def test_blocks_that_are_stored_in_fewer_bytes_are_loaded_sooner(cluster: Cluster) -> None:
    join_store(cluster, "s0", "abcd", segments=["abcdefgh"], cmx=True, block_bytes=16, cmx_bytes_per_s=64_000.0)
    (part,) = assign(cluster)
    assert part.why is not None
    # a quarter of a millisecond for each of eight blocks, one for asking, and ten until the first comes from cmx
    assert part.why.load_s == pytest.approx(0.013)


def test_what_a_node_holds_is_loaded_only_if_it_forgets_it_before_the_prompts_turn(cluster: Cluster) -> None:
    # the store has none of it so far, but gets all that its node holds
    join_store(cluster, "s0")
    cluster.handle(reported("a0", stored("abcdefgh")), 0.0)
    (part,) = assign(cluster)
    assert loads([part]) == [("a0", 8 * BLOCK_TOKENS, None)]
    assert part.why is not None
    assert (part.why.hit_tokens, part.why.load_s) == (8 * BLOCK_TOKENS, 0.0)


def test_what_a_node_holds_is_computed_again_where_its_store_is_slower(cluster: Cluster) -> None:
    join_store(cluster, "s0", "abcdefgh", cpu_bytes_per_s=64.0)
    cluster.handle(reported("a0", stored("abcdefgh")), 0.0)
    assert loads(assign(cluster)) == [("a0", 0, None)]


def test_a_slow_store_is_not_asked(cluster: Cluster) -> None:
    join_store(cluster, "s0", "abcdefgh", cpu_bytes_per_s=64.0)
    assert loads(assign(cluster)) == [("a0", 0, None)]


def test_a_store_is_asked_once_it_was_measured_to_be_fast(cluster: Cluster) -> None:
    join_store(cluster, "s0", "abcdefgh", cpu_bytes_per_s=64.0)
    cluster.handle(store_reported("s0", cpu_bytes_per_s=64_000.0), 0.0)
    assert loads(assign(cluster)) == [("a0", 8 * BLOCK_TOKENS, None)]


def test_the_node_whose_host_has_it_is_chosen(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    for name, host in (("a0", "h0"), ("a1", "h1"), ("a2", "h2")):
        join(cluster, name, host=host, stores=True)
    join_store(cluster, "s1", "abcdefgh", host="h1")
    join_store(cluster, "s2", "ab", host="h2")
    assert loads(assign(cluster)) == [("a1", 8 * BLOCK_TOKENS, None)]


def test_a_node_without_a_store_or_on_another_host_loads_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", stores=False, host="h0")
    join(cluster, "a1", stores=True, host="h1")
    join_store(cluster, "s0", LONG, host="h0")
    assert [part.assignment.stored_tokens for part in assign(cluster)] == [0]


def test_what_any_host_put_into_cmx_can_be_loaded_by_all(cluster: Cluster) -> None:
    join_store(cluster, "s0", "ab", cmx=True)
    join_store(cluster, "s1", cmx=True, host="h1", segments=["abcdefgh"])
    (part,) = assign(cluster)
    assert loads([part]) == [("a0", 8 * BLOCK_TOKENS, None)]
    assert part.why is not None
    # two blocks from cpu, after a millisecond for asking; six from cmx at 10 ms each, and 10 ms for that to begin
    assert part.why.load_s == pytest.approx(0.003 + 0.07)


def test_what_is_in_cmx_is_computed_where_that_is_sooner(cluster: Cluster) -> None:
    join_store(cluster, "s0", "abcdef", cmx=True, segments=["abcdefgh"], cmx_latency_s=10.0)
    assert loads(assign(cluster)) == [("a0", 6 * BLOCK_TOKENS, None)]


def test_others_who_wait_for_cmx_come_first(cluster: Cluster) -> None:
    join_store(cluster, "s0", cmx=True, segments=["abcdefgh"])
    cluster.handle(store_reported("s0", waiting_bytes=64_000), 0.0)
    assert loads(assign(cluster)) == [("a0", 0, None)]


def test_a_store_that_has_no_way_to_cmx_brings_nothing_from_there(cluster: Cluster) -> None:
    join_store(cluster, "s0", "ab", cmx=False)
    join_store(cluster, "s1", cmx=True, host="h1", segments=["abcdefgh"])
    assert loads(assign(cluster)) == [("a0", 2 * BLOCK_TOKENS, None)]


def test_what_the_store_lacks_is_fetched_from_a_peer_that_has_it(cluster: Cluster) -> None:
    # the peer is busy, and its blocks come slower than the store's
    join(cluster, "a1", profile=replace(PROFILE, fetch_bytes_per_s=16_000.0))
    cluster.handle(reported("a1", stored(LONG), queued_tokens=4000, waiting=1), 0.0)
    join_store(cluster, "s0", "abcdefgh", cpu_bytes_per_s=640_000.0)
    assert loads(assign(cluster, "abcdefghijk")) == [("a0", 8 * BLOCK_TOKENS, "a1")]


def test_a_prefill_node_loads_and_the_node_that_generates_gets_all_from_it(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=RouterConfig(disaggregation_tokens_min=0), stores=True, host="h0")
    join_store(cluster, "s0", "abcdefgh")
    prefill, generate = assign(cluster, keep=True)
    assert loads([prefill, generate]) == [("p0", 8 * BLOCK_TOKENS, None), ("d0", 0, "p0")]
    # what each of the two loaded is counted once
    ended = Ended(RequestId(1), FinishReason.PREFILLED, 0, 9, cpu_tokens=24, cmx_tokens=8)
    cluster.handle(reported("p0", ended=[ended]), 0.0)
    commands = cluster.handle(reported("d0", first=[1], ended=[end_of(1, computed_tokens=9)]), 0.0)
    (complete,) = [command for command in commands if isinstance(command, Complete)]
    assert (complete.cached_tokens, complete.cpu_tokens, complete.cmx_tokens) == (32, 24, 8)


def test_nodes_that_compute_in_no_time_load_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", stores=True, host="h0", profile=CostProfile())
    join_store(cluster, "s0", LONG)
    assert loads(assign(cluster)) == [("a0", 0, None)]


@pytest.mark.parametrize("policy", [policy for policy in RouterPolicy if policy is not RouterPolicy.PREDICTED_TIME])
def test_baselines_know_no_stores(make_cluster: MakeCluster, policy: RouterPolicy) -> None:
    cluster = make_cluster("a0", router=RouterConfig(policy=policy), stores=True, host="h0")
    join_store(cluster, "s0", LONG)
    assert loads(assign(cluster)) == [("a0", 0, None)]


# --- what is believed -------------------------------------------------------------------------------------------------


def test_a_store_that_joins_is_asked_for_all_it_holds_of_each_model_served_here(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    models = tuple(replace(store_spec().models[0], model=ModelName(model)) for model in ("m", "unknown", "other"))
    other = StoreResyncTimer(S0, ModelName("other"))
    assert cluster.handle(StoreJoined(store_spec(models=models)), 1.0) == [
        RequestStoreResync(S0, M, None),
        SetTimer(TIMER, 1.0 + RESYNC_S),
        RequestStoreResync(S0, ModelName("other"), None),
        SetTimer(other, 1.0 + RESYNC_S),
    ]
    assert cluster.handle(store_reported("s0", KvBatch(0, cleared=True), model="other"), 1.0) == [ClearTimer(other)]
    assert cluster.handle(store_reported("s0", KvBatch(0, cleared=True), model="unknown"), 1.0) == []
    assert cluster.handle(store_reported("s9", KvBatch(0, cleared=True)), 1.0) == []


def test_a_gap_in_what_a_store_tells_is_asked_for_and_halves_what_is_believed_until_then(cluster: Cluster) -> None:
    join_store(cluster, "s0", "abcdefgh")
    gap = cluster.handle(store_reported("s0", KvBatch(3, segments_removed=(prompt_hashes("ab")[1],))), 2.0)
    assert without_timers(gap) == [RequestStoreResync(S0, M, 1)]
    assert loads(assign(cluster)) == [("a0", 4 * BLOCK_TOKENS, None)]
    mended = cluster.handle(store_reported("s0", KvBatch(2), KvBatch(3)), 2.0)
    assert mended == [ClearTimer(TIMER)]
    assert loads(assign(cluster)) == [("a0", 8 * BLOCK_TOKENS, None)]


def test_nothing_is_believed_of_a_store_that_answers_no_resync(cluster: Cluster) -> None:
    join_store(cluster, "s0", "abcdefgh")
    cluster.handle(store_reported("s0", KvBatch(3)), 0.0)
    for _ in range(RESYNCS_MAX):
        assert without_timers(cluster.handle(TimerFired(TIMER), 0.0)) == [RequestStoreResync(S0, M, 1)]
    assert without_timers(cluster.handle(TimerFired(TIMER), 0.0)) == [RequestStoreResync(S0, M, None)]
    assert loads(assign(cluster)) == [("a0", 0, None)]


def test_a_store_that_is_lost_takes_its_memory_with_it_and_not_the_shared_storage(cluster: Cluster) -> None:
    join_store(cluster, "s0", LONG, cmx=True, segments=["abcd"])
    join_store(cluster, "s1", cmx=True, host="h1")
    cluster.handle(StoreLost(S0, "its stream broke"), 0.0)
    assert cluster.handle(TimerFired(TIMER), 0.0) == []
    assert loads(assign(cluster)) == [("a0", 0, None)]
    join_store(cluster, "s2", cmx=True)
    assert loads(assign(cluster)) == [("a0", 4 * BLOCK_TOKENS, None)]


def test_a_store_that_is_lost_while_it_is_asked_is_asked_no_more(cluster: Cluster) -> None:
    cluster.handle(StoreJoined(store_spec()), 0.0)
    assert cluster.handle(StoreLost(S0, "gone"), 0.0) == [ClearTimer(TIMER)]
    assert cluster.handle(StoreLost(S0, "gone"), 0.0) == []


def test_a_store_that_was_started_anew_holds_nothing_of_what_it_held(cluster: Cluster) -> None:
    join_store(cluster, "s0", LONG)
    assert cluster.handle(StoreJoined(store_spec(incarnation=1)), 0.0) == []
    assert without_timers(cluster.handle(StoreJoined(store_spec(incarnation=2)), 0.0)) == [RequestStoreResync(S0, M, None)]
    assert loads(assign(cluster)) == [("a0", 0, None)]


def test_views_show_what_stores_are_believed_to_hold(cluster: Cluster) -> None:
    join_store(cluster, "s0", "abcd", "abx")
    (view,) = cluster.stores
    assert (view.spec.id, view.model, view.believed_blocks, view.exact) == (S0, M, 5, True)


def test_a_node_that_comes_later_finds_its_hosts_store(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    join_store(cluster, "s0", "abcdefgh")
    join(cluster, "a0", stores=True, host="h0")
    assert loads(assign(cluster)) == [("a0", 8 * BLOCK_TOKENS, None)]
    cluster.handle(NodeLost(NodeId("a0"), "gone"), 0.0)


def test_matches_of_some_columns_are_those_of_nodes_that_have_them() -> None:
    matches = Matches(((2, 0b111), (5, 0b110), (7, 0b100)))
    assert matches.within(0b011).levels == ((2, 0b011), (5, 0b010))
    assert matches.within(0b100).levels == ((7, 0b100),)
    assert matches.within(0).levels == ()
