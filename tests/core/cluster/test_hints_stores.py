"""What hints become where hosts have stores: leases below hbm, blocks that are brought up, sent down and given up."""

from dataclasses import replace

import pytest

from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.commands import EndLease, EvictBlocks, EvictStored, PlaceLease, PrefetchStored
from orchestrator.core.config import StoreConfig
from orchestrator.core.events import LeasesTold, StoreLost
from orchestrator.core.hints import Holding, LeaseChange, Outcome, Reason, Verb
from orchestrator.core.types import GatewayId, LeaseId, ModelName, NodeId, StoreId, Tier
from tests.builders import prompt_hashes
from tests.core.cluster.cluster_builders import cluster_config, join, join_store, reported, stored
from tests.core.cluster.test_hints import ask, hint

M, S0, A0 = ModelName("m"), StoreId("s0"), NodeId("a0")
#: One segment of eight blocks, and two more.
LONG = "abcdefghij"


@pytest.fixture
def cluster() -> Cluster:
    """Return a cluster with a node; its stores are said to have a gigabyte in cmx."""
    made = Cluster(GatewayId(0), replace(cluster_config(), store=StoreConfig(cmx="file:///cmx", cmx_bytes=1 << 30)))
    join(made, "a0", stores=True, host="h0")
    return made


def test_who_holds_what_is_told_by_tier(cluster: Cluster) -> None:
    join_store(cluster, "s0", "abcde", segments=(LONG[:8],), cmx=True)
    cluster.handle(reported("a0", stored("abc")), 0.5)
    held = cluster.hints.holdings(M, prompt_hashes(LONG))
    assert held == (Holding(Tier.HBM, "a0", 3), Holding(Tier.CPU, "s0", 5), Holding(Tier.CMX, "", 8))


def test_a_lease_goes_to_nodes_and_stores_and_what_is_too_much_for_hbm_to_a_lower_tier(cluster: Cluster) -> None:
    join_store(cluster, "s0", LONG)
    receipt, others = ask(cluster, hint(prompt=LONG, tier=Tier.CPU))
    assert (receipt.outcome, receipt.tier) == (Outcome.APPLIED, Tier.CPU)
    assert isinstance(others[0], PlaceLease)
    assert (others[0].nodes, others[0].stores) == ((A0,), (S0,))
    receipt, others = ask(cluster, hint(Verb.UNPIN, action="1", lease=receipt.lease))
    assert isinstance(others[0], EndLease)
    assert (others[0].nodes, others[0].stores) == ((A0,), (S0,))


def test_a_store_that_joins_is_told_of_leases_and_tells_of_its_own(cluster: Cluster) -> None:
    receipt, (placed, _) = ask(cluster, hint(ttl_s=60.0))
    assert isinstance(placed, PlaceLease)
    join_store(cluster, "s0", LONG)
    far = replace(placed.lease, id=LeaseId("far"), revision=4, ttl_s=9.0)
    told = cluster.handle(LeasesTold(None, (far,), store=S0), 2.0)
    assert isinstance(told[0], PlaceLease)
    assert (told[0].lease, told[0].change) == (far, LeaseChange.PLACED)
    ask(cluster, hint(Verb.UNPIN, action="1", lease=LeaseId("far")))
    # From a store that has not heard of the end.
    assert cluster.handle(LeasesTold(None, (far,), store=S0), 3.0) == [EndLease(far, None, (), (S0,))]
    assert cluster.handle(LeasesTold(None, (far,), store=StoreId("gone")), 3.0) == []
    assert receipt.lease is not None


def test_a_lease_is_lowered_once_there_is_a_lower_tier(cluster: Cluster) -> None:
    receipt, _ = ask(cluster, hint())
    down = hint(Verb.DEMOTE, action="1", lease=receipt.lease, tier=Tier.CPU)
    assert ask(cluster, down)[0].outcome is Outcome.UNSUPPORTED
    join_store(cluster, "s0", LONG)
    lowered, (placed, _) = ask(cluster, down)
    assert (lowered.outcome, lowered.tier, lowered.lease) == (Outcome.APPLIED, Tier.CPU, receipt.lease)
    assert isinstance(placed, PlaceLease)
    assert (placed.change, placed.lease.revision) == (LeaseChange.LOWERED, 1)
    again = hint(Verb.DEMOTE, action="2", lease=receipt.lease, tier=Tier.CPU)
    assert ask(cluster, again)[0].reason is Reason.INVALID


def test_what_cmx_has_beyond_is_brought_up_to_the_store_that_has_most(cluster: Cluster) -> None:
    join_store(cluster, "s0", "abcde", segments=(LONG[:8],), cmx=True)
    receipt, others = ask(cluster, hint(Verb.PREFETCH, LONG, tier=Tier.CPU))
    assert (receipt.outcome, receipt.blocks, receipt.tier) == (Outcome.DEFERRED, 8, Tier.CPU)
    assert others == [PrefetchStored(M, prompt_hashes(LONG), 8, (S0,))]
    receipt, others = ask(cluster, hint(Verb.PREFETCH, LONG, action="1", tier=Tier.HBM))
    assert (receipt.outcome, receipt.reason, len(others)) == (Outcome.CLIPPED, Reason.LOWER_TIER, 1)
    receipt, others = ask(cluster, hint(Verb.PREFETCH, "abc", action="2", tier=Tier.CPU))
    assert (receipt.outcome, receipt.blocks, others) == (Outcome.APPLIED, 3, [])
    cluster.handle(reported("a0", stored(LONG)), 0.5)
    receipt, others = ask(cluster, hint(Verb.PREFETCH, LONG, action="3"))
    assert (receipt.outcome, receipt.tier, others) == (Outcome.APPLIED, Tier.HBM, [])
    assert ask(cluster, hint(Verb.PREFETCH, "xyz", action="4"))[0].reason is Reason.NOT_RESIDENT


def test_what_is_shared_comes_from_cmx_to_hosts_that_lack_it_until_enough_nodes_may_have_it(cluster: Cluster) -> None:
    join_store(cluster, "s0", LONG[:8], segments=(LONG[:8],), cmx=True)
    # One node, whose host's store has all of it.
    receipt, others = ask(cluster, hint(Verb.SHARE, LONG, copies=1))
    assert (receipt.outcome, receipt.blocks, others) == (Outcome.APPLIED, 8, [])
    receipt, others = ask(cluster, hint(Verb.SHARE, LONG, action="1"))
    assert (receipt.outcome, receipt.reason, others) == (Outcome.CLIPPED, Reason.FEWER_COPIES, [])
    # Two hosts more: the one whose store has most gets the rest of it.
    for number in (1, 2):
        join(cluster, f"a{number}", stores=True, host=f"h{number}")
    join_store(cluster, "s1", "ab", cmx=True, host="h1")
    join_store(cluster, "s2", "abcd", cmx=True, host="h2")
    receipt, others = ask(cluster, hint(Verb.SHARE, LONG, action="2"))
    assert (receipt.outcome, receipt.reason) == (Outcome.DEFERRED, Reason.NOT_RESIDENT)
    assert others == [PrefetchStored(M, prompt_hashes(LONG), 8, (StoreId("s2"),))]
    receipt, others = ask(cluster, hint(Verb.SHARE, LONG, action="3", copies=9))
    assert (receipt.outcome, receipt.reason) == (Outcome.CLIPPED, Reason.FEWER_COPIES)
    assert others == [PrefetchStored(M, prompt_hashes(LONG), 8, (StoreId("s2"), StoreId("s1")))]
    # A node that holds it needs no store.
    cluster.handle(reported("a1", stored(LONG)), 0.5)
    assert ask(cluster, hint(Verb.SHARE, LONG, action="4"))[0].outcome is Outcome.APPLIED
    assert ask(cluster, hint(Verb.SHARE, "xyz", action="5"))[0].reason is Reason.NOT_RESIDENT


def test_blocks_sink_as_far_as_a_lower_tier_has_them(cluster: Cluster) -> None:
    join_store(cluster, "s0", "abcde", segments=(), cmx=True)
    cluster.handle(reported("a0", stored(LONG)), 0.5)
    receipt, others = ask(cluster, hint(Verb.DEMOTE, LONG, first_block=1, tier=Tier.CPU))
    assert (receipt.outcome, receipt.blocks) == (Outcome.APPLIED, 4)
    assert others == [EvictBlocks(M, prompt_hashes("abcde"), 1, True, (A0,))]
    _, others = ask(cluster, hint(Verb.DEMOTE, LONG, action="1", tier=Tier.CMX))
    assert others[1] == EvictStored(M, prompt_hashes(LONG), 0, 5, Tier.CPU, True, (S0,))
    assert ask(cluster, hint(Verb.DEMOTE, LONG, action="2", tier=Tier.HBM))[0].reason is Reason.INVALID
    assert ask(cluster, hint(Verb.DEMOTE, "xyz", action="3", tier=Tier.CPU))[0].reason is Reason.NOT_RESIDENT


def test_an_eviction_leaves_the_tier_that_is_named_or_all(cluster: Cluster) -> None:
    join_store(cluster, "s0", "abcde", segments=(LONG[:8],), cmx=True)
    cluster.handle(reported("a0", stored("abc")), 0.5)
    hashes = prompt_hashes(LONG)
    of_hbm = EvictBlocks(M, hashes, 0, True, (A0,))
    of_cpu = EvictStored(M, hashes, 0, 5, Tier.CPU, False, (S0,))
    of_cmx = EvictStored(M, hashes, 0, 8, Tier.CMX, False, (S0,))
    assert ask(cluster, hint(Verb.EVICT, LONG))[1] == [of_hbm, of_cpu, of_cmx]
    assert ask(cluster, hint(Verb.EVICT, LONG, action="1", tier=Tier.HBM))[1] == [of_hbm]
    assert ask(cluster, hint(Verb.EVICT, LONG, action="2", tier=Tier.CPU))[1] == [of_cpu]
    cluster.handle(StoreLost(S0, "killed"), 2.0)
    assert ask(cluster, hint(Verb.EVICT, LONG, action="3", tier=Tier.CPU))[0].reason is Reason.NO_TIER
