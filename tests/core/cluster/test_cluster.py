"""The cluster by literals: events in, commands out, a rule a test."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.cluster.following import Trust
from orchestrator.core.cluster.resyncs import RESYNC_S, RESYNCS_MAX
from orchestrator.core.commands import (
    Abort,
    Assign,
    Cancel,
    ClearTimer,
    Complete,
    Refuse,
    ReportSourceLost,
    RequestResync,
    Restart,
    Resume,
    SetTimer,
)
from orchestrator.core.config import GatewayConfig, LimitsConfig, RouterConfig, TenantConfig
from orchestrator.core.events import (
    DrainRequested,
    GatewaysChanged,
    NodeDraining,
    NodeJoined,
    NodeLost,
    NodeReported,
    RequestAbandoned,
    RequestArrived,
    TimerFired,
)
from orchestrator.core.timers import RequestTimer, ResyncTimer
from orchestrator.core.types import (
    Assignment,
    FinishReason,
    GatewayId,
    KvBatch,
    Load,
    ModelName,
    NodeId,
    RequestId,
    Role,
    ServiceClass,
    StoredRun,
    TenantId,
    attempt_id,
)
from tests.builders import prompt_hashes
from tests.core.cluster.cluster_builders import (
    arrived,
    cluster_config,
    end_of,
    join,
    nodes_of,
    reported,
    spec_of,
    stored,
    without_timers,
)

MakeCluster = Callable[..., Cluster]
A0, A1 = NodeId("a0"), NodeId("a1")
D0, P0 = NodeId("d0"), NodeId("p0")
R1, R2 = RequestId(1), RequestId(2)
APART = RouterConfig(disaggregation_tokens_min=0)
DEADLINE = RequestTimer(RequestId(1))


def generate(request: int = 1, prompt: str = "ab", tokens: int = 9, attempt: int = 0, **changes: Any) -> Assignment:
    """Return what a node is given to generate 8 tokens; sources are at their first start."""
    changes.setdefault("source_incarnation", 1 if "source" in changes else None)
    part = Assignment(
        attempt_id(RequestId(request), attempt), Role.GENERATE, tokens, prompt_hashes(prompt), 8, tenant=TenantId("t")
    )
    return replace(part, **changes)


def full(name: str) -> NodeReported:
    """Return a frame of a node that takes nothing more for now."""
    return reported(name, waiting=64)


# --- the plain life ---------------------------------------------------------------------------------------------------


def test_a_request_is_assigned_streamed_and_completed(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    assert cluster.handle(arrived(), 10.0) == [SetTimer(DEADLINE, 610.0), Assign(A0, generate())]
    assert (cluster.running, cluster.waiting) == (1, 0)
    # its first token is no decision
    assert cluster.handle(reported("a0", first=[1]), 11.0) == []
    # 5 of 9 prompt tokens were computed
    ended = end_of(1, computed_tokens=5)
    assert cluster.handle(reported("a0", ended=[ended]), 12.0) == [ClearTimer(DEADLINE), Complete(R1, ended, 4, 0)]
    assert cluster.running == 0


def test_holdings_lead_the_next_turn_and_the_prediction_is_told_at_the_end(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", "a1")
    cluster.handle(reported("a1", stored("ab")), 1.0)
    commands = cluster.handle(arrived(), 2.0)
    assert nodes_of(commands) == ["a1"]
    assert isinstance(commands[1], Assign)
    assert commands[1].why is not None
    assert commands[1].why.hit_tokens == 8
    ended = end_of(1, computed_tokens=1)
    assert Complete(R1, ended, 8, 8) in cluster.handle(reported("a1", ended=[ended]), 3.0)


def test_siblings_follow_the_first_before_any_holding_is_told(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", "a1", "a2")
    nodes = [nodes_of(cluster.handle(arrived(serial, "abcdefgh" + tail), 1.0)) for serial, tail in ((1, "x"), (2, "y"))]
    assert nodes[0] == nodes[1]


def test_a_prompt_that_is_scored_is_found_nowhere(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", "a1")
    cluster.handle(reported("a1", stored("ab")), 1.0)
    commands = without_timers(cluster.handle(arrived(scored=True), 2.0))
    [assign] = commands
    assert isinstance(assign, Assign)
    assert assign.assignment == generate(scored=True)
    assert assign.why is not None
    assert assign.why.hit_tokens == 0


def test_a_prompt_that_is_scored_is_computed_whole_on_the_prefill_node(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART)
    cluster.handle(reported("d0", stored("ab")), 0.0)
    assert without_timers(cluster.handle(arrived(scored=True), 0.0)) == [
        Assign(P0, generate(role=Role.PREFILL, scored=True)),
        Assign(D0, generate(source=P0, source_tokens=9, source_pending=True, scored=True)),
    ]


def test_a_session_stays_where_it_ran(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", "a1", "a2")
    first = nodes_of(cluster.handle(arrived(1, session="s"), 1.0))
    cluster.handle(reported(first[0], ended=[end_of(1)]), 2.0)
    assert nodes_of(cluster.handle(arrived(2, "yz", session="s"), 3.0)) == first


def test_a_cluster_is_ready_while_each_model_has_a_node_that_generates(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0")
    assert not cluster.ready
    join(cluster, "a1", model=ModelName("other"))
    assert cluster.ready
    cluster.handle(NodeDraining(D0), 1.0)
    assert not cluster.ready
    cluster.handle(NodeJoined(spec_of("d0", incarnation=2)), 2.0)
    assert cluster.ready
    cluster.handle(NodeLost(D0, "killed"), 3.0)
    assert not cluster.ready


def test_output_is_clipped_to_the_context(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", context_tokens_max=12)
    assert without_timers(cluster.handle(arrived(), 0.0)) == [Assign(A0, generate(output_tokens_max=3))]


def test_each_model_has_its_own_nodes(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    join(cluster, "a1", model=ModelName("other"))
    assert nodes_of(cluster.handle(arrived(1), 1.0)) == ["a0"]
    assert nodes_of(cluster.handle(arrived(2, model=ModelName("other")), 1.0)) == ["a1"]


# --- prefill and decode apart -----------------------------------------------------------------------------------------


def test_who_reads_is_told_which_start_of_the_source_is_meant(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART)
    cluster.handle(NodeJoined(spec_of("p0", incarnation=7)), 0.0)
    parts = [command.assignment for command in cluster.handle(arrived(), 0.0) if isinstance(command, Assign)]
    assert [(part.source, part.source_incarnation) for part in parts] == [(None, None), (P0, 7)]


def test_the_prompt_is_computed_on_one_node_and_fetched_by_the_other(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART)
    assert without_timers(cluster.handle(arrived(), 0.0)) == [
        Assign(P0, generate(role=Role.PREFILL)),
        Assign(D0, generate(source=P0, source_tokens=9, source_pending=True)),
    ]
    assert cluster.handle(reported("p0", ended=[end_of(1, FinishReason.PREFILLED, 9)]), 1.0) == []
    # with its first token the generating node has all it needs: what is held for it may go
    assert cluster.handle(reported("d0", first=[1]), 2.0) == [Cancel(P0, R1)]
    ended = end_of(1, computed_tokens=9)
    assert without_timers(cluster.handle(reported("d0", ended=[ended]), 3.0)) == [Complete(R1, ended, 0, 0)]


def test_a_request_given_up_after_its_prefill_leaves_nothing_held(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART)
    cluster.handle(arrived(), 0.0)
    cluster.handle(reported("p0", ended=[end_of(1, FinishReason.PREFILLED, 9)]), 1.0)
    assert cluster.handle(RequestAbandoned(R1), 2.0) == [Cancel(P0, R1), Cancel(D0, R1), ClearTimer(DEADLINE)]


def test_the_prefill_node_fetches_what_the_session_generated_elsewhere(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART)
    cluster.handle(reported("d0", stored("abcdefgh")), 1.0)
    prompt, tokens = "abcdefghij", 41
    assert without_timers(cluster.handle(arrived(1, prompt), 2.0)) == [
        Assign(P0, generate(1, prompt, tokens, role=Role.PREFILL, source=D0, source_tokens=32)),
        Assign(D0, generate(1, prompt, tokens, source=P0, source_tokens=41, source_pending=True)),
    ]


def test_a_lost_prefill_node_leaves_its_part_to_the_decode_node(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART)
    cluster.handle(arrived(), 0.0)
    # whoever reads from it is told
    assert cluster.handle(NodeLost(P0, "killed"), 1.0) == [ReportSourceLost(D0, R1, P0)]
    ended = end_of(1, computed_tokens=9)
    assert without_timers(cluster.handle(reported("d0", ended=[ended]), 2.0)) == [Complete(R1, ended, 0, 0)]


def test_a_prefill_node_lost_after_its_part_is_reported_too_until_the_first_token(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART)
    cluster.handle(arrived(1), 0.0)
    cluster.handle(arrived(2), 0.0)
    for request in (1, 2):
        cluster.handle(reported("p0", ended=[end_of(request, FinishReason.PREFILLED, 9)]), 1.0)
    cluster.handle(reported("d0", first=[1]), 2.0)
    assert cluster.handle(NodeLost(P0, "killed"), 3.0) == [ReportSourceLost(D0, R2, P0)]


def test_a_lost_node_that_only_cached_blocks_is_reported_to_the_prefill_node_that_reads_them(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", "d1", router=APART)
    cluster.handle(reported("d0", stored("abcdefgh")), 1.0)
    assigns = [command for command in cluster.handle(arrived(1, "abcdefghij"), 2.0) if isinstance(command, Assign)]
    assert assigns[0].assignment.source == D0
    commands = cluster.handle(NodeLost(D0, "killed"), 3.0)
    if assigns[1].node == D0:  # then both parts start over
        assert nodes_of(commands) == ["p0", "d1"]
    else:
        assert commands == [ReportSourceLost(P0, R1, D0)]


def test_a_source_that_starts_anew_is_reported_to_its_readers(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART)
    cluster.handle(arrived(), 0.0)
    commands = cluster.handle(NodeJoined(spec_of("p0", incarnation=2)), 1.0)
    assert ReportSourceLost(D0, R1, P0) in commands


def test_a_failed_prefill_leaves_its_part_to_the_decode_node(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART)
    cluster.handle(arrived(), 0.0)
    assert cluster.handle(reported("p0", ended=[end_of(1, FinishReason.FAILED)]), 1.0) == []
    assert cluster.running == 1


def test_a_request_that_ends_first_takes_its_prefill_along(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART)
    cluster.handle(arrived(), 0.0)
    ended = end_of(1, computed_tokens=9)  # the fetch failed: the decode node computed all and was done before
    assert without_timers(cluster.handle(reported("d0", ended=[ended]), 1.0)) == [Cancel(P0, R1), Complete(R1, ended, 0, 0)]


def test_a_lost_decode_node_starts_both_parts_over(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", "d1", router=APART)
    lost = NodeId(nodes_of(cluster.handle(arrived(), 0.0))[1])
    other = NodeId("d1") if lost == "d0" else D0
    assert without_timers(cluster.handle(NodeLost(lost, "killed"), 1.0)) == [
        Cancel(P0, R1),
        Restart(R1, f"{lost} was lost: killed"),
        Assign(P0, generate(attempt=1, role=Role.PREFILL)),
        Assign(other, generate(attempt=1, source=P0, source_tokens=9, source_pending=True)),
    ]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failure_before_the_first_token_is_tried_elsewhere(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", "a1")
    first = nodes_of(cluster.handle(arrived(), 0.0))[0]
    other = A1 if first == "a0" else A0
    report = reported(first, ended=[end_of(1, FinishReason.FAILED, message="draining")])
    assert without_timers(cluster.handle(report, 1.0)) == [Restart(R1, f"{first}: draining"), Assign(other, generate(attempt=1))]
    # a node that failed it comes again only because there is no third; then it is enough
    second = cluster.handle(reported(other, ended=[end_of(attempt_id(R1, 1), FinishReason.FAILED)]), 2.0)
    last = NodeId(nodes_of(second)[0])
    assert without_timers(cluster.handle(reported(last, ended=[end_of(attempt_id(R1, 2), FinishReason.FAILED)]), 3.0)) == [
        Abort(R1, 503, "node_failed", f"{last}: the node ended it: failed")
    ]


def test_a_failure_after_the_first_token_ends_with_an_error_where_nothing_is_to_go_on(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", "a1", limits=LimitsConfig(resumes_max=0))
    node = nodes_of(cluster.handle(arrived(), 0.0))[0]
    cluster.handle(reported(node, first=[1]), 1.0)
    report = reported(node, ended=[end_of(1, FinishReason.FAILED, message="not a number")])
    assert cluster.handle(report, 2.0) == [ClearTimer(DEADLINE), Abort(R1, 502, "node_failed", f"{node}: not a number")]


def test_a_lost_node_s_requests_start_over_or_go_on(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(arrived(1), 0.0)
    cluster.handle(arrived(2), 0.0)
    cluster.handle(reported("a0", first=[2]), 1.0)
    join(cluster, "a1")
    assert without_timers(cluster.handle(NodeLost(A0, "killed"), 2.0)) == [
        Restart(R1, "a0 was lost: killed"),
        Assign(A1, generate(1, attempt=1)),
        Resume(R2, "a0 was lost: killed"),
    ]


def test_with_no_node_left_a_started_over_request_waits_for_one(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(arrived(), 0.0)
    lost = cluster.handle(NodeLost(A0, "killed"), 5.0)
    assert lost == [Restart(R1, "a0 was lost: killed"), SetTimer(DEADLINE, 65.0)]
    assert cluster.waiting == 1
    joined = cluster.handle(NodeJoined(spec_of("a0", incarnation=2)), 6.0)
    assert [SetTimer(DEADLINE, 600.0), Assign(A0, generate(attempt=1))] == joined[-2:]


def test_a_new_incarnation_ends_the_former(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(arrived(), 0.0)
    assert without_timers(cluster.handle(NodeJoined(spec_of("a0", incarnation=2)), 1.0)) == [
        Restart(R1, "a0 was lost: it was started anew"),
        RequestResync(A0, None),
        Assign(A0, generate(attempt=1)),
    ]
    assert cluster.handle(NodeJoined(spec_of("a0", incarnation=1)), 2.0) == []  # late news of the former


def test_late_and_unknown_reports_are_ignored(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", "a1")
    node = nodes_of(cluster.handle(arrived(), 0.0))[0]
    other = "a1" if node == "a0" else "a0"
    assert cluster.handle(reported(other, first=[1], ended=[end_of(1)]), 1.0) == []  # it never had it
    assert cluster.handle(reported(node, first=[9], ended=[end_of(9)]), 1.0) == []
    assert cluster.handle(NodeReported(NodeId("x"), Load()), 1.0) == []
    assert cluster.handle(NodeLost(NodeId("x"), ""), 1.0) == []
    assert cluster.handle(RequestAbandoned(RequestId(9)), 1.0) == []
    assert cluster.handle(TimerFired(RequestTimer(RequestId(9))), 1.0) == []
    assert cluster.running == 1


# --- giving up --------------------------------------------------------------------------------------------------------


def test_an_abandoned_request_is_cancelled_everywhere_at_once(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART)
    cluster.handle(arrived(), 0.0)
    assert cluster.handle(RequestAbandoned(R1), 1.0) == [Cancel(P0, R1), Cancel(D0, R1), ClearTimer(DEADLINE)]
    assert cluster.handle(reported("d0", ended=[end_of(1, FinishReason.CANCELLED)]), 1.1) == []
    assert cluster.running == 0


def test_a_request_past_its_deadline_is_cancelled_and_aborted(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    assert SetTimer(DEADLINE, 30.0) in cluster.handle(arrived(timeout_s=30.0), 0.0)
    assert without_timers(cluster.handle(TimerFired(DEADLINE), 30.0)) == [
        Cancel(A0, R1),
        Abort(R1, 504, "deadline_exceeded", "not finished within 30 seconds"),
    ]


def test_the_cluster_s_own_deadline_holds_too(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", limits=LimitsConfig(request_s_max=5.0))
    assert SetTimer(DEADLINE, 5.0) in cluster.handle(arrived(timeout_s=30.0), 0.0)


# --- holding and refusing ---------------------------------------------------------------------------------------------


def test_requests_wait_while_all_nodes_are_full_and_go_in_order_of_urgency(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(full("a0"), 0.0)
    assert cluster.handle(arrived(1), 1.0) == [SetTimer(DEADLINE, 61.0)]
    cluster.handle(arrived(2, service_class=ServiceClass.INTERACTIVE), 2.0)
    assert (cluster.running, cluster.waiting) == (0, 2)
    # room for one: the more urgent, and both get a new timer when they are placed
    assert without_timers(cluster.handle(reported("a0", waiting=63, running=8), 3.0)) == [Assign(A0, generate(2))]
    assert cluster.handle(reported("a0", waiting=0), 4.0) == [SetTimer(DEADLINE, 601.0), Assign(A0, generate(1))]


def test_what_was_assigned_and_not_yet_reported_counts_as_waiting(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", limits=LimitsConfig(node_waiting_max=2))
    # 8 run at once, 2 wait, the eleventh is held
    assert [len(nodes_of(cluster.handle(arrived(serial), 1.0))) for serial in range(1, 12)] == [1] * 10 + [0]


def test_a_later_request_does_not_overtake_those_that_wait(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(full("a0"), 0.0)
    cluster.handle(arrived(1), 1.0)
    join(cluster, "a1", model=ModelName("other"))
    assert nodes_of(cluster.handle(arrived(3, model=ModelName("other")), 2.0)) == ["a1"]  # another model's does not wait
    assert nodes_of(cluster.handle(arrived(2), 2.0)) == []


def test_a_request_waited_too_long_is_refused(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", limits=LimitsConfig(waiting_s_max=3.0))
    cluster.handle(full("a0"), 0.0)
    assert cluster.handle(arrived(), 1.0) == [SetTimer(DEADLINE, 4.0)]
    message = "no node had room for this request in 3 seconds"
    assert cluster.handle(TimerFired(DEADLINE), 4.0) == [ClearTimer(DEADLINE), Refuse(R1, 503, "waited_too_long", message, 1.0)]


def test_a_deadline_may_come_while_a_request_is_held(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(full("a0"), 0.0)
    assert cluster.handle(arrived(timeout_s=2.0), 1.0) == [SetTimer(DEADLINE, 3.0)]
    assert without_timers(cluster.handle(TimerFired(DEADLINE), 3.0)) == [
        Refuse(R1, 504, "deadline_exceeded", "not finished within 2 seconds")
    ]


def test_an_abandoned_request_leaves_the_queue(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(full("a0"), 0.0)
    cluster.handle(arrived(), 1.0)
    assert cluster.handle(RequestAbandoned(R1), 2.0) == [ClearTimer(DEADLINE)]
    assert cluster.handle(reported("a0"), 3.0) == []


def status(cluster: Cluster, event: RequestArrived, now: float = 1.0) -> int | None:
    """Return the HTTP status with which an arrival is refused, None if it is not."""
    refusals = [command for command in cluster.handle(event, now) if isinstance(command, Refuse)]
    return refusals[0].status if refusals else None


def test_refusals_have_their_status(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", limits=LimitsConfig(waiting_max=1, tenant_requests_max=2))
    assert status(cluster, arrived(1, model=ModelName("other"))) == 503  # no node
    assert status(cluster, arrived(1, model=ModelName("unheard of"))) == 503
    assert status(cluster, arrived(1, "x" * 250)) == 400  # 1,001 tokens of 1,000
    cluster.handle(full("a0"), 1.0)
    assert status(cluster, arrived(1)) is None  # held
    assert status(cluster, arrived(2)) == 529  # one may wait
    cluster.handle(reported("a0"), 1.0)
    assert status(cluster, arrived(2)) is None
    assert status(cluster, arrived(3)) == 429  # the tenant's third
    assert status(cluster, arrived(3, tenant=TenantId("u"))) is None
    cluster.handle(DrainRequested(), 2.0)
    assert status(cluster, arrived(4, tenant=TenantId("u"))) == 503
    assert cluster.running == 3  # what runs may finish


def test_a_flood_waits_for_its_turns_and_makes_room_for_others() -> None:
    config = replace(cluster_config(LimitsConfig(waiting_max=3)), tenants=(TenantConfig("t"), TenantConfig("u", share=2.0)))
    cluster = Cluster(GatewayId(0), config)
    join(cluster, "a0")
    cluster.handle(full("a0"), 0.0)
    assert [status(cluster, arrived(serial)) for serial in (1, 2, 3, 4)] == [None, None, None, 529]
    u = TenantId("u")
    message = "all nodes are full and 3 requests wait, at most 3 may"
    assert without_timers(cluster.handle(arrived(5, tenant=u), 1.0)) == [Refuse(RequestId(3), 529, "overloaded", message, 1.0)]
    assert without_timers(cluster.handle(arrived(6, tenant=u), 1.0)) == [Refuse(RequestId(2), 529, "overloaded", message, 1.0)]
    assert status(cluster, arrived(7, tenant=u)) == 529  # two of three are its part
    cluster.validate()
    parts = [one.assignment for one in cluster.handle(reported("a0"), 2.0) if isinstance(one, Assign)]
    assert [(part.request, part.tenant) for part in parts] == [(1, "t"), (5, "u"), (6, "u")]


def test_gateways_that_come_and_go_change_the_part_of_a_limit_that_is_this_ones() -> None:
    config = replace(cluster_config(), tenants=(TenantConfig("t", requests_max=3),), gateway=GatewayConfig(count=2))
    cluster = Cluster(GatewayId(1), config)
    join(cluster, "a0")
    assert [status(cluster, arrived(serial)) for serial in (1, 2)] == [None, 429]  # the other one has two
    assert cluster.handle(GatewaysChanged(place=0, count=1), 1.0) == []
    assert [status(cluster, arrived(serial)) for serial in (2, 3, 4)] == [None, None, 429]
    cluster.handle(GatewaysChanged(place=0, count=3), 2.0)
    assert status(cluster, arrived(4)) == 429  # what runs goes on


def test_a_tenants_share_goes_with_its_parts() -> None:
    cluster = Cluster(GatewayId(0), replace(cluster_config(), tenants=(TenantConfig("t", share=2.5),)))
    join(cluster, "a0")
    commands = (*cluster.handle(arrived(1), 1.0), *cluster.handle(arrived(2, tenant=TenantId("u")), 1.0))
    assert [one.assignment.share for one in commands if isinstance(one, Assign)] == [2.5, 1.0]


def test_output_of_cancelled_requests_counts_too() -> None:
    cluster = Cluster(GatewayId(0), replace(cluster_config(), tenants=(TenantConfig("t", tokens_per_s=10.0),)))
    join(cluster, "a0")
    assert status(cluster, arrived(1), 0.0) is None  # 9 of the 20 that are saved up
    cluster.handle(RequestAbandoned(R1, output_tokens=12), 0.0)
    assert status(cluster, arrived(2), 0.5) == 429
    assert status(cluster, arrived(2), 1.0) is None
    ended = replace(end_of(2), output_tokens=20)
    cluster.handle(reported("a0", ended=[ended]), 1.0)
    assert status(cluster, arrived(3), 3.0) == 429  # 20 are owed
    assert status(cluster, arrived(3), 4.0) is None


def test_a_draining_node_takes_nothing_new_and_finishes_what_it_has(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(arrived(1), 0.0)
    assert cluster.handle(NodeDraining(A0), 1.0) == []
    assert status(cluster, arrived(2)) == 503
    join(cluster, "a1")
    assert nodes_of(cluster.handle(arrived(2), 2.0)) == ["a1"]
    ended = end_of(1)
    assert without_timers(cluster.handle(reported("a0", ended=[ended]), 3.0)) == [Complete(R1, ended, 9, 0)]


# --- holdings ---------------------------------------------------------------------------------------------------------


def test_a_node_that_joins_is_asked_what_it_holds(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    timer = ResyncTimer(A0)
    assert cluster.handle(NodeJoined(spec_of("a0")), 1.0) == [RequestResync(A0, None), SetTimer(timer, 1.0 + RESYNC_S)]
    # what changes meanwhile is of no use before the answer
    assert cluster.handle(reported("a0", stored("ab", sequence=5)), 1.1) == []
    assert cluster.handle(reported("a0", stored("ab", sequence=5, cleared=True)), 1.2) == [ClearTimer(timer)]
    assert (cluster.nodes[0].trust, cluster.nodes[0].believed_blocks) == (Trust.EXACT, 2)


def test_a_gap_is_mended_by_one_replay(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    timer = ResyncTimer(A0)
    cluster.handle(reported("a0", stored("a", sequence=1)), 1.0)
    gap = cluster.handle(reported("a0", stored("abc", sequence=3)), 2.0)
    assert gap == [RequestResync(A0, 1), SetTimer(timer, 2.0 + RESYNC_S)]
    assert cluster.handle(reported("a0", stored("abcd", sequence=4)), 2.1) == []  # asked once
    assert cluster.nodes[0].trust is Trust.STALE
    resync = (stored("ab", sequence=2), stored("abc", sequence=3), stored("abcd", sequence=4))
    assert cluster.handle(reported("a0", *resync), 2.2) == [ClearTimer(timer)]
    assert (cluster.nodes[0].trust, cluster.nodes[0].believed_blocks) == (Trust.EXACT, 4)


def test_a_replay_is_waited_for_while_pages_come_and_asked_for_anew_when_they_stop(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.handle(NodeJoined(spec_of("a0")), 0.0)
    timer = ResyncTimer(A0)
    runs = [StoredRun(None, prompt_hashes(name)) for name in "abc"]
    first = [KvBatch(5, (run,), cleared=page == 0, snapshot=1, page=page, more=True) for page, run in enumerate(runs)]
    # each page is as good as an answer: the wait begins anew
    assert cluster.handle(reported("a0", first[0]), 0.4) == [SetTimer(timer, 0.4 + RESYNC_S)]
    assert cluster.handle(reported("a0", first[1]), 0.8) == [SetTimer(timer, 0.8 + RESYNC_S)]
    assert (cluster.nodes[0].trust, cluster.nodes[0].believed_blocks) == (Trust.STALE, 2)
    # a change meanwhile is none, nor is a page again
    assert cluster.handle(reported("a0", stored("z", sequence=6), first[1]), 0.9) == []
    # the third page never comes: everything is asked for
    again = cluster.handle(TimerFired(timer), 0.8 + RESYNC_S)
    assert again == [RequestResync(A0, None), SetTimer(timer, 0.8 + RESYNC_S + 2 * RESYNC_S)]
    second = (
        KvBatch(6, (runs[0],), cleared=True, snapshot=2, more=True),
        KvBatch(6, (StoredRun(None, prompt_hashes("z")),), snapshot=2, page=1),
    )
    assert cluster.handle(reported("a0", *second, stored("y", sequence=7)), 1.4) == [ClearTimer(timer)]
    assert (cluster.nodes[0].trust, cluster.nodes[0].believed_blocks) == (Trust.EXACT, 3)


def test_a_replay_that_does_not_come_is_asked_for_ever_more_rarely(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    timer = ResyncTimer(A0)
    cluster.handle(reported("a0", stored("a", sequence=1)), 0.0)
    cluster.handle(reported("a0", stored("abc", sequence=3)), 0.0)
    now, waits = RESYNC_S, list[float]()
    for _ in range(RESYNCS_MAX + 3):
        resync, again = cluster.handle(TimerFired(timer), now)
        assert isinstance(again, SetTimer)
        waits.append(again.at - now)
        now = again.at
        # after too many nothing is believed any more, and everything is asked for
        assert resync == RequestResync(A0, 1 if len(waits) <= RESYNCS_MAX else None)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert (cluster.nodes[0].trust, cluster.nodes[0].believed_blocks) == (Trust.BLIND, 0)


def test_a_node_that_leaves_is_not_asked_any_more(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.handle(NodeJoined(spec_of("a0")), 0.0)
    timer = ResyncTimer(A0)
    assert cluster.handle(NodeLost(A0, ""), 0.1) == [ClearTimer(timer)]
    assert cluster.handle(TimerFired(timer), 0.5) == []


def test_status_pages_see_nodes_as_they_are(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0", "d0")
    cluster.handle(reported("d0", KvBatch(1), running=3), 1.0)
    views = cluster.nodes
    assert [(view.spec.id, view.load.running, view.draining, view.requests) for view in views] == [
        ("a0", 0, False, 0),
        ("d0", 3, False, 0),
    ]
