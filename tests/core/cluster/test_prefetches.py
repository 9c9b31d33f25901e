"""What becomes of a prefetch into `hbm`: which node brings it, from where, how much of it, what ends it, what it has earned."""

from dataclasses import replace

import pytest

from orchestrator.core.cluster import prefetches as prefetches_module
from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.cluster.expectations import EARLY, LATE
from orchestrator.core.cluster.prefetches import KEPT_S, KEPT_S_MAX, LATE_S
from orchestrator.core.cluster.returns import LATE_S as LATE_RETURN_S
from orchestrator.core.cluster.returns import LEAD_S
from orchestrator.core.commands import CancelPrefetch, ClearTimer, EvictBlocks, PrefetchBlocks, PrefetchStored, SetTimer
from orchestrator.core.config import StoreConfig, TenantConfig
from orchestrator.core.events import Ended, NodeDraining, NodeLost, NodeReported, PrefetchEnded, TimerFired
from orchestrator.core.hints import Earned, Outcome, Reason, Verb
from orchestrator.core.timers import ReturnTimer
from orchestrator.core.types import (
    BlockHash,
    FinishReason,
    GatewayId,
    NodeId,
    Prefetch,
    PrefetchEnd,
    RequestId,
    SessionId,
    TenantId,
    Tier,
    prefetch_id,
)
from tests.builders import prompt_hashes
from tests.core.cluster.cluster_builders import (
    arrived,
    cluster_config,
    end_of,
    join,
    join_store,
    load_of,
    nodes_of,
    reported,
    spec_of,
    stored,
)
from tests.core.cluster.test_hints import ask, hint

A0, A1, S = NodeId("a0"), NodeId("a1"), SessionId("s")
P1, P2 = (prefetch_id(GatewayId(0), serial) for serial in (1, 2))
LONG = "abcdefgh"
#: A node that would bring as many blocks as anybody wants.
ROOM = {"prefetch_room_blocks": 100}


def make_cluster(**changes: object) -> Cluster:
    config = replace(cluster_config(), store=StoreConfig(cmx="file:///cmx", cmx_bytes=1 << 30))
    return Cluster(GatewayId(0), replace(config, **changes))  # type: ignore[arg-type]


@pytest.fixture
def cluster() -> Cluster:
    """Return a cluster of two nodes on one host, whose store has a prompt in `cpu`."""
    made = make_cluster()
    join(made, "a0", "a1", stores=True, host="h0")
    join_store(made, "s0", LONG)
    for node in ("a0", "a1"):
        made.handle(reported(node, **ROOM), 0.5)
    return made


def told(name: str, identity: int, reason: PrefetchEnd, first: int = 0, end: int = 0) -> NodeReported:
    """Return a node's word of what became of a prefetch."""
    ended = PrefetchEnded(prefetch_id(GatewayId(0), identity), reason, first, end)
    return NodeReported(NodeId(name), load_of(spec_of(name), **ROOM), prefetches=(ended,))


def served(cluster: Cluster, serial: int, prompt: str, session: str = "s") -> str:
    """Let a turn of a session run; returns the node that it ran on."""
    (node,) = nodes_of(cluster.handle(arrived(serial, prompt, session=session), 1.0))
    cluster.handle(reported(node, ended=[end_of(serial)], **ROOM), 1.5)
    return node


def test_the_node_that_the_next_turn_would_be_routed_to_loads_it_from_its_store(cluster: Cluster) -> None:
    node = served(cluster, 1, LONG)  # and it has forgotten it since
    receipt, others = ask(cluster, hint(Verb.PREFETCH, LONG, session=S, ttl_s=20.0), 2.0)
    assert (receipt.outcome, receipt.reason, receipt.tier) == (Outcome.DEFERRED, Reason.NOT_RESIDENT, Tier.HBM)
    assert (receipt.blocks, receipt.size_bytes, receipt.ttl_s, receipt.prefetch) == (8, 8 * 64, 20.0, P1)
    assert others == [PrefetchBlocks(NodeId(node), Prefetch(P1, prompt_hashes(LONG), 20.0, stored_blocks=8))]
    cluster.handle(reported(node, stored(LONG), **ROOM), 3.0)
    assert nodes_of(cluster.handle(arrived(2, LONG + "i", session="s"), 4.0)) == [node]


def test_what_is_in_cmx_comes_through_the_store() -> None:
    cluster = make_cluster()
    join(cluster, "a0", stores=True, host="h0")
    join_store(cluster, "s0", "ab", segments=(LONG,), cmx=True)
    cluster.handle(reported("a0", **ROOM), 0.5)
    receipt, others = ask(cluster, hint(Verb.PREFETCH, LONG))
    assert (receipt.outcome, receipt.blocks, receipt.ttl_s) == (Outcome.DEFERRED, 8, KEPT_S)
    assert others == [PrefetchBlocks(A0, Prefetch(P1, prompt_hashes(LONG), KEPT_S, stored_blocks=8))]


def test_what_a_node_has_that_takes_no_more_requests_comes_from_there() -> None:
    cluster = Cluster(GatewayId(0), cluster_config())
    join(cluster, "a0", "a1", incarnation=3)
    cluster.handle(reported("a0", stored(LONG), **ROOM), 0.5)
    cluster.handle(reported("a1", stored("abc"), **ROOM), 0.5)
    held, nothing = ask(cluster, hint(Verb.PREFETCH, LONG))
    assert (held.outcome, held.blocks, held.tier, nothing) == (Outcome.APPLIED, 8, Tier.HBM, [])
    cluster.handle(NodeDraining(A0), 1.0)
    receipt, others = ask(cluster, hint(Verb.PREFETCH, LONG, action="1"))
    assert (receipt.outcome, receipt.blocks) == (Outcome.DEFERRED, 8)
    prefetch = Prefetch(P1, prompt_hashes(LONG), KEPT_S, source=A0, source_blocks=8, source_incarnation=3)
    assert others == [PrefetchBlocks(A1, prefetch)]


def test_what_nobody_holds_is_missing_and_nobody_brings_it_without_nodes(cluster: Cluster) -> None:
    assert ask(cluster, hint(Verb.PREFETCH, "xyz"))[0].reason is Reason.NOT_RESIDENT
    for node in (A0, A1):
        cluster.handle(NodeLost(node, "killed"), 1.0)
    receipt, _ = ask(cluster, hint(Verb.PREFETCH, LONG, action="1"))
    # It is in cpu, and stays there.
    assert (receipt.outcome, receipt.reason, receipt.tier) == (Outcome.CLIPPED, Reason.LOWER_TIER, Tier.CPU)


def test_a_node_brings_as_much_as_it_says_that_it_has_room_for(cluster: Cluster) -> None:
    for node in ("a0", "a1"):
        cluster.handle(reported(node, prefetch_room_blocks=3), 0.5)
    receipt, (asked,) = ask(cluster, hint(Verb.PREFETCH, LONG))
    assert (receipt.outcome, receipt.reason, receipt.blocks) == (Outcome.CLIPPED, Reason.NO_ROOM, 3)
    assert isinstance(asked, PrefetchBlocks)
    assert (asked.prefetch.hashes, asked.prefetch.stored_blocks) == (prompt_hashes("abc"), 3)
    for node in ("a0", "a1"):
        cluster.handle(reported(node, prefetch_room_blocks=0), 0.6)
    receipt, others = ask(cluster, hint(Verb.PREFETCH, LONG, action="1"))
    # It comes up to cpu at least, where it is already.
    assert (receipt.outcome, receipt.reason, receipt.tier, others) == (Outcome.CLIPPED, Reason.LOWER_TIER, Tier.CPU, [])


def test_a_node_that_has_no_room_lets_the_store_bring_it_up_to_cpu_or_nobody() -> None:
    cluster = make_cluster()
    join(cluster, "a0", stores=True, host="h0")
    join_store(cluster, "s0", "ab", segments=(LONG,), cmx=True)
    receipt, others = ask(cluster, hint(Verb.PREFETCH, LONG))
    assert (receipt.outcome, receipt.reason, receipt.tier) == (Outcome.CLIPPED, Reason.LOWER_TIER, Tier.CPU)
    assert [type(command) for command in others] == [PrefetchStored]
    bare = Cluster(GatewayId(0), cluster_config())
    join(bare, "a0", "a1")
    bare.handle(reported("a0", stored(LONG)), 0.5)
    bare.handle(NodeDraining(A0), 1.0)
    receipt, others = ask(bare, hint(Verb.PREFETCH, LONG))
    assert (receipt.outcome, receipt.reason, others) == (Outcome.REJECTED, Reason.NO_ROOM, [])


def test_a_tenants_quota_bounds_what_is_brought_for_it() -> None:
    tenant = TenantConfig("t", keys=("k",), pinned_bytes_max={Tier.HBM: 5 * 64})
    cluster = make_cluster(tenants=(tenant,))
    join(cluster, "a0", stores=True, host="h0")
    join_store(cluster, "s0", LONG, "xyz")
    cluster.handle(reported("a0", **ROOM), 0.5)
    receipt, _ = ask(cluster, hint(Verb.PREFETCH, LONG, ttl_s=10.0))
    assert (receipt.outcome, receipt.reason, receipt.blocks) == (Outcome.CLIPPED, Reason.QUOTA_BYTES, 5)
    full, others = ask(cluster, hint(Verb.PREFETCH, "xyz", action="1"))
    assert (full.outcome, full.reason, others) == (Outcome.CLIPPED, Reason.LOWER_TIER, [])
    # Its time is over, or the node has told of its end: there is room again.
    assert ask(cluster, hint(Verb.PREFETCH, "xyz", action="2", ttl_s=1.0), 11.1)[0].outcome is Outcome.DEFERRED
    cluster.handle(told("a0", 2, PrefetchEnd.NO_ROOM), 11.2)
    assert ask(cluster, hint(Verb.PREFETCH, LONG, action="3"), 11.3)[0].blocks == 5


def test_the_same_again_is_not_brought_twice_and_nothing_is_kept_for_longer_than_may_be(cluster: Cluster) -> None:
    receipt, _ = ask(cluster, hint(Verb.PREFETCH, LONG, ttl_s=1e4))
    assert (receipt.outcome, receipt.reason, receipt.ttl_s) == (Outcome.CLIPPED, Reason.TTL_MAX, KEPT_S_MAX)
    again, others = ask(cluster, hint(Verb.PREFETCH, "abcd", action="1"), 2.0)
    assert (again.outcome, again.blocks, again.prefetch, others) == (Outcome.DEFERRED, 4, None, [])
    foreign, others = ask(cluster, hint(Verb.PREFETCH, LONG, action="2", tenant=TenantId("u")), 2.0)
    assert (foreign.prefetch, len(others)) == (P2, 1)


@pytest.mark.parametrize(
    "ending",
    [
        hint(Verb.EVICT, LONG, "1", session=S),
        hint(Verb.SUPERSEDE, LONG, "1", session=S, first_block=2),
        hint(Verb.RETAIN, LONG, "1", priority=0),
        hint(Verb.DEMOTE, LONG, "1", tier=Tier.CPU),
        hint(Verb.UNPIN, LONG, "1", session=S),
        hint(Verb.UNPIN, LONG, "1"),
        hint(Verb.END_SESSION, LONG + "xyz", "1", session=S),
    ],
)
def test_it_is_given_up_when_its_blocks_or_its_session_are(cluster: Cluster, ending: object) -> None:
    served(cluster, 1, LONG)
    _, (asked,) = ask(cluster, hint(Verb.PREFETCH, LONG, session=S))
    assert isinstance(asked, PrefetchBlocks)
    receipt, others = ask(cluster, ending)  # type: ignore[arg-type]
    assert receipt.outcome is Outcome.APPLIED
    assert CancelPrefetch(asked.node, P1) in others
    cluster.handle(told(asked.node, 1, PrefetchEnd.CANCELLED), 3.0)
    assert CancelPrefetch(asked.node, P1) not in ask(cluster, replace(ending, action="2"))[1]  # type: ignore[type-var]


@pytest.mark.parametrize(
    "other",
    [
        hint(Verb.EVICT, "ab", "1"),  # another chain, which the prefetch goes on from
        hint(Verb.SUPERSEDE, LONG, "1", session=S, first_block=8),  # what is dead lies behind it
        hint(Verb.EVICT, LONG, "1", tenant=TenantId("u")),
        hint(Verb.EVICT, LONG, "1", tier=Tier.CPU),
        hint(Verb.EVICT, LONG, "1", session=SessionId("fork")),
        hint(Verb.UNPIN, LONG, "1", session=SessionId("fork")),
    ],
)
def test_others_leave_it_alone(cluster: Cluster, other: object) -> None:
    served(cluster, 1, LONG)
    ask(cluster, hint(Verb.PREFETCH, LONG, session=S))
    _, others = ask(cluster, other)  # type: ignore[arg-type]
    assert [command for command in others if isinstance(command, CancelPrefetch)] == []


def test_a_cancel_goes_before_the_eviction_it_makes_room_for(cluster: Cluster) -> None:
    _, (asked,) = ask(cluster, hint(Verb.PREFETCH, LONG))
    assert isinstance(asked, PrefetchBlocks)
    cluster.handle(reported(asked.node, stored(LONG), **ROOM), 2.0)
    _, others = ask(cluster, hint(Verb.EVICT, LONG, "1", tier=Tier.HBM))
    assert others == [
        CancelPrefetch(asked.node, P1),
        EvictBlocks(hint().model or "", prompt_hashes(LONG), 0, True, (asked.node,)),
    ]  # type: ignore[arg-type]


def test_there_are_only_so_many_and_those_of_which_nothing_was_heard_count_no_more(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetches_module, "PREFETCHES_MAX", 1)
    assert ask(cluster, hint(Verb.PREFETCH, LONG, ttl_s=5.0), 1.0)[0].prefetch == P1
    assert ask(cluster, hint(Verb.PREFETCH, "abcdefgh"[:7], "1", tenant=TenantId("u")), 2.0)[0].reason is Reason.LOWER_TIER
    assert ask(cluster, hint(Verb.PREFETCH, LONG, "2", ttl_s=5.0), 6.1 + LATE_S)[0].prefetch == P2
    cluster.validate()


def effects(cluster: Cluster, hashes: tuple[BlockHash, ...] = prompt_hashes(LONG)) -> list[Earned]:
    return list(cluster.hints.effects.of(TenantId("t"), None, hashes))


def test_it_has_earned_what_the_next_prompt_finds_in_hbm_of_what_was_brought_there(cluster: Cluster) -> None:
    _, (asked,) = ask(cluster, hint(Verb.PREFETCH, LONG, session=S))
    assert isinstance(asked, PrefetchBlocks)
    assert [(one.size_bytes, one.ended) for one in effects(cluster)] == [(0, None)]
    # The node held two blocks, and brought six; that it was used comes before the end of the request that used it.
    cluster.handle(reported(asked.node, stored(LONG), **ROOM), 2.0)
    assert nodes_of(cluster.handle(arrived(1, LONG, session="s"), 3.0)) == [asked.node]
    cluster.handle(told(asked.node, 1, PrefetchEnd.USED, 2, 8), 3.1)
    cluster.handle(reported(asked.node, ended=[Ended(RequestId(1), FinishReason.STOP, 3, 1)], **ROOM), 4.0)
    (brought,) = effects(cluster)
    assert (brought.size_bytes, brought.found_tokens, brought.earned_tokens) == (6 * 64, 32, 24)
    # Six blocks would have come from cpu in 6 ms and 1 ms more.
    assert brought.saved_s == pytest.approx(0.007)
    assert brought.ended is PrefetchEnd.USED


def test_it_has_earned_nothing_on_another_node_nor_when_its_node_is_lost(cluster: Cluster) -> None:
    _, (asked,) = ask(cluster, hint(Verb.PREFETCH, LONG, session=S))
    assert isinstance(asked, PrefetchBlocks)
    cluster.handle(told(asked.node, 1, PrefetchEnd.LAPSED, 0, 8), 2.0)
    cluster.handle(NodeLost(asked.node, "killed"), 2.5)
    (other,) = nodes_of(cluster.handle(arrived(1, LONG, session="s"), 3.0))
    assert other != asked.node
    cluster.handle(reported(other, ended=[Ended(RequestId(1), FinishReason.STOP, 3, 1)], **ROOM), 4.0)
    assert [(one.found_tokens, one.earned_tokens, one.ended) for one in effects(cluster)] == [(32, 0, PrefetchEnd.LAPSED)]
    # One that is under way on a node that dies is over with it, and may be asked for elsewhere.
    _, (again,) = ask(cluster, hint(Verb.PREFETCH, LONG, "1"), 5.0)
    assert isinstance(again, PrefetchBlocks)
    cluster.handle(NodeLost(again.node, "killed"), 6.0)
    cluster.handle(told(again.node, 2, PrefetchEnd.USED, 0, 8), 6.1)
    assert effects(cluster)[1].ended is None
    cluster.validate()


def test_a_session_whose_tool_is_about_to_return_has_its_context_brought_back(cluster: Cluster) -> None:
    node = served(cluster, 1, LONG)
    _, others = ask(cluster, hint(Verb.TOOL_STARTED, LONG, session=S, expected_s=20.0), 2.0)
    (timer,) = [command for command in others if isinstance(command, SetTimer)]
    assert timer == SetTimer(ReturnTimer(1), 2.0 + EARLY * 20.0 - LEAD_S)
    (asked,) = cluster.handle(TimerFired(ReturnTimer(1)), timer.at)
    assert isinstance(asked, PrefetchBlocks)
    assert (asked.node, asked.prefetch.hashes, asked.prefetch.stored_blocks) == (node, prompt_hashes(LONG), 8)
    # It is kept for as long as the tool may be late.
    assert timer.at + asked.prefetch.keep_s == pytest.approx(2.0 + LATE * 20.0 + LATE_RETURN_S)
    assert cluster.handle(TimerFired(ReturnTimer(1)), timer.at) == []


def test_at_a_tools_end_a_context_is_brought_back_at_once(cluster: Cluster) -> None:
    served(cluster, 1, LONG)
    ask(cluster, hint(Verb.TOOL_STARTED, LONG, session=S, expected_s=20.0), 2.0)
    _, others = ask(cluster, hint(Verb.TOOL_FINISHED, LONG, "1", session=S), 3.0)
    assert ClearTimer(ReturnTimer(1)) in others
    assert [type(command) for command in others if isinstance(command, PrefetchBlocks)] == [PrefetchBlocks]


def test_a_session_that_is_back_or_over_or_gone_only_for_a_moment_is_not_awaited(cluster: Cluster) -> None:
    served(cluster, 1, LONG)
    for serial, expected_s in enumerate((None, LEAD_S)):
        _, others = ask(cluster, hint(Verb.TOOL_STARTED, LONG, str(serial), session=S, expected_s=expected_s), 2.0)
        assert [command for command in others if isinstance(command, SetTimer)] == []
    ask(cluster, hint(Verb.TOOL_STARTED, LONG, "2", session=S, expected_s=20.0), 2.0)
    # A next tool in place of it, then the next turn; and later its end.
    _, others = ask(cluster, hint(Verb.TOOL_STARTED, LONG, "3", session=S, expected_s=30.0), 3.0)
    assert ClearTimer(ReturnTimer(1)) in others
    assert ClearTimer(ReturnTimer(2)) in cluster.handle(arrived(2, LONG + "i", session="s"), 4.0)
    ask(cluster, hint(Verb.TOOL_STARTED, LONG, "4", session=S, expected_s=20.0), 5.0)
    _, others = ask(cluster, hint(Verb.END_SESSION, LONG, "5", session=S), 6.0)
    assert ClearTimer(ReturnTimer(3)) in others
    assert cluster.handle(TimerFired(ReturnTimer(3)), 30.0) == []
    cluster.validate()


def test_what_is_where_it_would_be_wanted_is_not_brought_back(cluster: Cluster) -> None:
    node = served(cluster, 1, LONG)
    cluster.handle(reported(node, stored(LONG), **ROOM), 1.6)
    ask(cluster, hint(Verb.TOOL_STARTED, LONG, session=S, expected_s=20.0), 2.0)
    assert cluster.handle(TimerFired(ReturnTimer(1)), 20.0) == []
