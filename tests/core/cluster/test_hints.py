"""What a cluster answers harnesses, by literals: a hint in, a receipt and what nodes are told out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.cluster.expectations import EARLY
from orchestrator.core.cluster.leases import REFIT_S
from orchestrator.core.cluster.returns import LEAD_S
from orchestrator.core.commands import AnswerHint, ClearTimer, EndLease, EvictBlocks, Expect, PlaceLease, RetainBlocks, SetTimer
from orchestrator.core.config import LeasesConfig
from orchestrator.core.events import HintAsked, LeaseEnded, LeasesTold, NodeJoined, NodeLost, TimerFired
from orchestrator.core.hints import Hint, Holding, LeaseChange, Outcome, Reason, Receipt, Verb
from orchestrator.core.timers import LeaseTimer, RefitTimer, ReturnTimer
from orchestrator.core.types import BlockHash, FinishReason, GatewayId, LeaseId, ModelName, NodeId, SessionId, TenantId, Tier
from tests.builders import prompt_hashes
from tests.core.cluster.cluster_builders import arrived, cluster_config, end_of, join, nodes_of, reported, spec_of, stored

MakeCluster = Callable[..., Cluster]


def hint(verb: Verb = Verb.PIN, prompt: str = "abc", action: str = "0", **changes: Any) -> Hint:
    """Return a hint about a prompt, as one action of message `m`."""
    fields: dict[str, Any] = {
        "tenant": TenantId("t"),
        "message": "m",
        "action": action,
        "model": ModelName("m"),
        "hashes": prompt_hashes(prompt),
    }
    return Hint(verb, **{**fields, **changes})


def ask(cluster: Cluster, asked: Hint, now: float = 1.0) -> tuple[Receipt, list[object]]:
    """Return the answer to a hint, and the other commands."""
    answer, *others = cluster.handle(HintAsked(asked), now)
    assert isinstance(answer, AnswerHint)
    assert (answer.tenant, answer.verb, answer.message, answer.action) == (asked.tenant, asked.verb, asked.message, asked.action)
    return answer.receipt, others


def test_a_pin_is_told_to_the_models_nodes_and_has_a_timer(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", "a1")
    cluster.handle(NodeJoined(spec_of("a2", model=ModelName("other"))), 0.0)
    cluster.handle(reported("a0", stored("abcd")), 0.5)
    receipt, (placed, timer) = ask(cluster, hint(ttl_s=30.0))
    assert receipt.outcome is Outcome.APPLIED
    assert (receipt.blocks, receipt.size_bytes, receipt.tier, receipt.ttl_s) == (3, 3 * 64, Tier.HBM, 30.0)
    assert isinstance(placed, PlaceLease)
    assert placed.nodes == ("a0", "a1")
    assert (placed.lease.hashes, placed.lease.id, placed.change) == (prompt_hashes("abc"), receipt.lease, LeaseChange.PLACED)
    assert timer == SetTimer(LeaseTimer(placed.lease.id), 31.0)


def test_what_nobody_holds_yet_is_leased_from_when_it_is_computed(make_cluster: MakeCluster) -> None:
    receipt, others = ask(make_cluster("a0"), hint())
    assert (receipt.outcome, receipt.reason) == (Outcome.DEFERRED, Reason.NOT_RESIDENT)
    assert isinstance(others[0], PlaceLease)


def test_the_same_action_twice_has_no_second_effect(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    first, _ = ask(cluster, hint())
    again, others = ask(cluster, hint())
    assert again == replace(first, outcome=Outcome.DUPLICATE, first=Outcome.DEFERRED)
    assert others == []
    # Another action of the same message, and the same names of another tenant, are other actions.
    other, _ = ask(cluster, hint(action="1"))
    foreign, _ = ask(cluster, hint(tenant=TenantId("u")))
    assert len({first.lease, other.lease, foreign.lease}) == 3


def test_what_was_refused_may_be_asked_again(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    refused, _ = ask(cluster, hint())
    assert (refused.outcome, refused.reason) == (Outcome.REJECTED, Reason.NO_NODE)
    join(cluster, "a0")
    assert ask(cluster, hint())[0].outcome is Outcome.DEFERRED


def test_only_so_many_actions_are_remembered() -> None:
    cluster = Cluster(GatewayId(0), replace(cluster_config(), leases=LeasesConfig(actions_remembered_max=2)))
    join(cluster, "a0")
    cluster.handle(reported("a0", stored("abc")), 0.5)
    for action in "012":
        ask(cluster, hint(Verb.EVICT, action=action))
    assert ask(cluster, hint(Verb.EVICT, action="2"))[0].outcome is Outcome.DUPLICATE
    assert ask(cluster, hint(Verb.EVICT, action="0"))[0].outcome is Outcome.APPLIED
    cluster.validate()


def test_an_unpin_tells_the_nodes_and_clears_the_timer(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    _, (placed, _) = ask(cluster, hint())
    assert isinstance(placed, PlaceLease)
    foreign, nothing = ask(cluster, hint(Verb.UNPIN, action="1", tenant=TenantId("u"), lease=placed.lease.id))
    assert (foreign.outcome, foreign.reason, nothing) == (Outcome.MISSING, Reason.NO_LEASE, [])
    receipt, others = ask(cluster, hint(Verb.UNPIN, action="2", lease=placed.lease.id))
    assert (receipt.outcome, receipt.lease, receipt.blocks) == (Outcome.APPLIED, placed.lease.id, 3)
    assert others == [
        EndLease(replace(placed.lease), LeaseChange.UNPINNED, (NodeId("a0"),)),
        ClearTimer(LeaseTimer(placed.lease.id)),
    ]
    assert ask(cluster, hint(Verb.UNPIN, action="3", lease=placed.lease.id))[0].outcome is Outcome.MISSING


def test_a_session_or_a_prompt_means_the_leases_that_were_placed_with_it(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    ask(cluster, hint(session=SessionId("s")))
    ask(cluster, hint(action="1", prompt="ab"))
    receipt, others = ask(cluster, hint(Verb.UNPIN, action="2", prompt="abcdef", session=SessionId("s")))
    assert receipt.outcome is Outcome.APPLIED
    assert len(others) == 2
    assert ask(cluster, hint(Verb.UNPIN, action="3", prompt="xy"))[0].outcome is Outcome.MISSING
    assert ask(cluster, hint(Verb.UNPIN, action="4", prompt="ab"))[0].outcome is Outcome.APPLIED


def test_a_lease_that_is_renewed_keeps_its_id(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    first, _ = ask(cluster, hint(prompt="ab"))
    receipt, (placed, timer) = ask(cluster, hint(prompt="abcd", action="1", lease=first.lease, ttl_s=60.0), 5.0)
    assert (receipt.lease, receipt.blocks) == (first.lease, 4)
    assert isinstance(placed, PlaceLease)
    assert (placed.change, placed.lease.revision) == (LeaseChange.RENEWED, 1)
    assert timer == SetTimer(LeaseTimer(placed.lease.id), 65.0)
    missing, _ = ask(cluster, hint(action="2", lease=LeaseId("another")))
    assert (missing.outcome, missing.reason) == (Outcome.MISSING, Reason.NO_LEASE)


def test_expiry_is_told_to_nobody_who_holds_since_all_have_clocks(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    _, (placed, _) = ask(cluster, hint(ttl_s=10.0))
    assert isinstance(placed, PlaceLease)
    assert cluster.handle(TimerFired(LeaseTimer(placed.lease.id)), 10.9) == []  # set again meanwhile, and not yet
    assert cluster.handle(TimerFired(LeaseTimer(placed.lease.id)), 11.0) == [
        EndLease(placed.lease, LeaseChange.EXPIRED, ()),
    ]


def test_a_node_that_joins_is_told_of_leases_and_tells_of_its_own(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    _, (placed, _) = ask(cluster, hint(ttl_s=10.0))
    assert isinstance(placed, PlaceLease)
    joined = cluster.handle(NodeJoined(spec_of("a1")), 4.0)
    assert PlaceLease(replace(placed.lease, ttl_s=7.0), None, (NodeId("a1"),)) in joined
    # What it kept for another gateway is known from now on, and counts.
    far = replace(placed.lease, id=LeaseId("far"), hashes=prompt_hashes("xy"), size_bytes=128, ttl_s=5.0)
    told = cluster.handle(LeasesTold(NodeId("a1"), (far,)), 4.0)
    assert told == [PlaceLease(far, LeaseChange.PLACED, ()), SetTimer(LeaseTimer(far.id), 9.0)]
    assert cluster.hints.leases.used_bytes[TenantId("t"), Tier.HBM] == 5 * 64
    # A pin of the same message that comes here now is that lease.
    assert cluster.handle(LeasesTold(NodeId("a1"), (far,)), 4.5) == []


def test_a_node_that_is_behind_is_corrected(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", "a1")
    first, (placed, _) = ask(cluster, hint())
    assert isinstance(placed, PlaceLease)
    _, (renewed, _) = ask(cluster, hint(action="1", prompt="abcd", lease=first.lease))
    assert isinstance(renewed, PlaceLease)
    behind = cluster.handle(LeasesTold(NodeId("a1"), (placed.lease,)), 1.0)
    assert behind == [PlaceLease(renewed.lease, None, (NodeId("a1"),))]
    ask(cluster, hint(Verb.UNPIN, action="2", lease=first.lease))
    (ended,) = cluster.handle(LeasesTold(NodeId("a1"), (placed.lease,)), 1.0)
    assert isinstance(ended, EndLease)
    assert (ended.lease.id, ended.lease.revision, ended.nodes) == (first.lease, 1, ("a1",))


def test_an_end_that_another_gateway_told_a_node_of_counts_here(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    _, (placed, _) = ask(cluster, hint())
    assert isinstance(placed, PlaceLease)
    over = LeasesTold(NodeId("a0"), (), (LeaseEnded(placed.lease.id, 0),))
    assert cluster.handle(over, 1.0) == [
        EndLease(placed.lease, LeaseChange.UNPINNED, ()),
        ClearTimer(LeaseTimer(placed.lease.id)),
    ]


def test_memory_that_comes_back_in_time_costs_no_lease(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    ask(cluster, hint())
    lost = cluster.handle(NodeLost(NodeId("a0"), "killed"), 2.0)
    assert SetTimer(RefitTimer(), 2.0 + REFIT_S) in lost
    joined = cluster.handle(NodeJoined(spec_of("a0", incarnation=2)), 3.0)
    assert ClearTimer(RefitTimer()) in joined
    assert any(isinstance(command, PlaceLease) for command in joined)


def test_memory_that_stays_away_ends_leases(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    _, (placed, _) = ask(cluster, hint())
    assert isinstance(placed, PlaceLease)
    cluster.handle(NodeLost(NodeId("a0"), "killed"), 2.0)
    commands = cluster.handle(TimerFired(RefitTimer()), 2.0 + REFIT_S)
    assert commands == [EndLease(placed.lease, LeaseChange.NO_MEMORY, ()), ClearTimer(LeaseTimer(placed.lease.id))]


def test_an_eviction_goes_to_who_holds_the_blocks_and_spares_what_is_leased(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", "a1")
    cluster.handle(reported("a0", stored("abcde")), 0.5)
    receipt, others = ask(cluster, hint(Verb.EVICT, "abcd", first_block=1))
    assert (receipt.outcome, receipt.blocks) == (Outcome.APPLIED, 3)
    assert others == [EvictBlocks(ModelName("m"), prompt_hashes("abcd"), 1, True, (NodeId("a0"),))]
    ask(cluster, hint(action="1", prompt="ab"))
    receipt, others = ask(cluster, hint(Verb.EVICT, "abcd", action="2"))
    assert (receipt.outcome, receipt.reason) == (Outcome.CLIPPED, Reason.LEASED)
    assert others == [EvictBlocks(ModelName("m"), prompt_hashes("abcd"), 2, True, (NodeId("a0"),))]
    receipt, others = ask(cluster, hint(Verb.SUPERSEDE, "abcd", action="5", first_block=3))
    assert others == [EvictBlocks(ModelName("m"), prompt_hashes("abcd"), 3, False, (NodeId("a0"),))]  # dead, not unwanted
    receipt, others = ask(cluster, hint(Verb.EVICT, "ab", action="3"))
    assert (receipt.outcome, receipt.reason, others) == (Outcome.REJECTED, Reason.LEASED, [])
    receipt, _ = ask(cluster, hint(Verb.EVICT, "xy", action="4"))
    assert (receipt.outcome, receipt.reason) == (Outcome.MISSING, Reason.NOT_RESIDENT)


def test_a_forked_session_goes_where_its_parent_is(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", "a1")
    first = nodes_of(cluster.handle(arrived(1, "abcd", session="parent"), 0.0))
    cluster.handle(reported(first[0], ended=[end_of(1, FinishReason.STOP)]), 0.1)
    fork = hint(Verb.FORK, session=SessionId("parent"), children=(SessionId("child"),))
    assert ask(cluster, fork)[0].outcome is Outcome.APPLIED
    assert nodes_of(cluster.handle(arrived(2, "vwxyz", session="child"), 1.0)) == first
    unknown = hint(Verb.FORK, action="1", session=SessionId("nobody"), children=(SessionId("child"),))
    assert ask(cluster, unknown)[0].reason is Reason.NO_SESSION
    foreign = hint(Verb.FORK, action="2", tenant=TenantId("u"), session=SessionId("parent"), children=(SessionId("c"),))
    assert ask(cluster, foreign)[0].outcome is Outcome.MISSING


def test_pauses_of_a_session_are_told_to_where_it_is(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(arrived(1, "abcd", session="s"), 0.0)
    cluster.handle(reported("a0", ended=[end_of(1, FinishReason.STOP)]), 0.1)
    started = hint(Verb.TOOL_STARTED, "abcd", session=SessionId("s"), tool_class="bash", expected_s=30.0)
    receipt, (*told, timer) = ask(cluster, started)
    assert receipt.outcome is Outcome.APPLIED
    assert [type(command) for command in told] == [Expect]
    assert timer == SetTimer(ReturnTimer(1), 1.0 + EARLY * 30.0 - LEAD_S)
    assert ask(cluster, hint(Verb.TOOL_FINISHED, "abcd", action="1", session=SessionId("s")))[0].outcome is Outcome.APPLIED
    unknown = hint(Verb.TOOL_STARTED, "abcd", action="2", session=SessionId("nobody"))
    assert ask(cluster, unknown)[0].reason is Reason.NO_SESSION


def test_the_end_of_a_session_ends_its_leases_and_lets_its_blocks_go(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(reported("a0", stored("abcd")), 0.5)
    ask(cluster, hint(session=SessionId("s")))
    receipt, others = ask(cluster, hint(Verb.END_SESSION, "abcd", action="1", session=SessionId("s")))
    assert (receipt.outcome, receipt.blocks) == (Outcome.APPLIED, 4)
    assert [type(command) for command in others] == [EndLease, ClearTimer, EvictBlocks]
    gone = hint(Verb.END_SESSION, "", action="2", session=SessionId("s"))
    assert ask(cluster, gone)[0].reason is Reason.NO_SESSION


def test_what_is_to_be_retained_is_expected_where_it_is_or_forgotten_first(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", "a1")
    cluster.handle(reported("a0", stored("abcd")), 0.5)
    receipt, (retain,) = ask(cluster, hint(Verb.RETAIN, "abcd", priority=75, ttl_s=20.0))
    assert (receipt.outcome, receipt.blocks, receipt.tier, receipt.ttl_s) == (Outcome.APPLIED, 4, Tier.HBM, 20.0)
    assert isinstance(retain, RetainBlocks)
    assert (retain.nodes, retain.outlook.ages_s, retain.outlook.chances) == ((NodeId("a0"),), (20.0,), (0.5,))
    # Said again of the same blocks it is about the same: nothing is expected of them by what says nothing.
    _, (neutral,) = ask(cluster, hint(Verb.RETAIN, "abcd", action="1"))
    assert isinstance(neutral, RetainBlocks)
    assert (neutral.outlook.context, neutral.outlook.ages_s) == (retain.outlook.context, ())
    _, others = ask(cluster, hint(Verb.RETAIN, "abcd", action="2", priority=0))
    assert others == [EvictBlocks(ModelName("m"), prompt_hashes("abcd"), 0, False, (NodeId("a0"),))]
    assert ask(cluster, hint(Verb.RETAIN, "xy", action="3", priority=100))[0].reason is Reason.NOT_RESIDENT


@pytest.mark.parametrize("verb", [Verb.DEMOTE, Verb.SHARE])
def test_what_nobody_could_do_is_said_to_be_so(make_cluster: MakeCluster, verb: Verb) -> None:
    receipt, others = ask(make_cluster("a0"), hint(verb))
    assert (receipt.outcome, receipt.reason, others) == (Outcome.UNSUPPORTED, Reason.NO_HOLDER, [])
    assert receipt.message


def test_a_tier_that_nobody_has_is_unsupported(make_cluster: MakeCluster) -> None:
    receipt, _ = ask(make_cluster("a0"), hint(tier=Tier.CPU))
    assert (receipt.outcome, receipt.reason) == (Outcome.UNSUPPORTED, Reason.NO_TIER)


def test_a_target_without_blocks_is_too_short(make_cluster: MakeCluster) -> None:
    assert ask(make_cluster("a0"), hint(prompt=""))[0].reason is Reason.TOO_SHORT


def test_a_price_is_what_would_be_granted_and_changes_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(reported("a0", stored("ab")), 0.5)
    price = cluster.hints.price(hint(ttl_s=10.0), 1.0)
    assert (price.receipt.outcome, price.receipt.lease, price.byte_s) == (Outcome.DEFERRED, None, 3 * 64 * 10.0)
    assert (price.bytes_left, price.byte_s_left) == (500 * 64, None)
    # One token is to be computed at least, and 12 tokens of which 8 are held.
    assert (price.ttft_cached_s, price.ttft_computed_s) == (pytest.approx(0.05), pytest.approx(0.13))
    assert not len(cluster.hints.leases)


def test_who_holds_what_is_what_the_index_believes(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", "a1", "a2")
    cluster.handle(reported("a0", stored("ab")), 0.5)
    cluster.handle(reported("a1", stored("abcd")), 0.5)
    held = cluster.hints.holdings(ModelName("m"), prompt_hashes("abc"))
    assert held == (Holding(Tier.HBM, "a1", 3), Holding(Tier.HBM, "a0", 2))
    assert cluster.hints.holdings(ModelName("m"), (BlockHash(b"x"),)) == ()
