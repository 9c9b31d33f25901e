"""What was lost with a node after its first token goes on elsewhere: events in, commands out, a rule a test."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.commands import Abort, Assign, Cancel, ClearTimer, ClusterCommand, Complete, Restart, Resume, SetTimer
from orchestrator.core.config import LimitsConfig, RouterConfig
from orchestrator.core.events import (
    Ended,
    FirstToken,
    NodeJoined,
    NodeLost,
    NodeReported,
    RequestAbandoned,
    Resumed,
    TimerFired,
)
from orchestrator.core.timers import RequestTimer
from orchestrator.core.types import (
    Assignment,
    FinishReason,
    Load,
    NodeId,
    RequestId,
    Role,
    TenantId,
    attempt_id,
)
from tests.builders import prompt_hashes
from tests.core.cluster.cluster_builders import arrived, end_of, join, nodes_of, reported, spec_of, stored, without_timers

MakeCluster = Callable[..., Cluster]
A0, A1, D0, D1, P0 = map(NodeId, ("a0", "a1", "d0", "d1", "p0"))
R1 = RequestId(1)
DEADLINE = RequestTimer(R1)
APART = RouterConfig(disaggregation_tokens_min=0)
KILLED = "a0 was lost: killed"


def resumed(tokens: int = 3, prompt: str = "abc", **changes: Any) -> Resumed:
    """Return what came of the request: three tokens after its prompt of nine, which fill the block named "abc" together."""
    return Resumed(R1, tokens, prompt_hashes(prompt), **changes)


def goes_on(attempt: int = 1, tokens: int = 3, prompt: str = "abc", **changes: Any) -> Assignment:
    """Return what the next node is given of such a request: the same prompt, the same limit, and what was generated."""
    changes.setdefault("source_incarnation", 1 if "source" in changes else None)
    role = changes.pop("role", Role.GENERATE)
    fields = {"tenant": TenantId("t"), "generated_tokens": tokens, **changes}
    return Assignment(attempt_id(R1, attempt), role, 9, prompt_hashes(prompt), 8, **fields)


def streaming(make_cluster: MakeCluster, *others: str, **changes: Any) -> Cluster:
    """Return a cluster in which a0 generates for a request, computed whole; the others joined later."""
    cluster = make_cluster("a0", **changes)
    cluster.handle(arrived(), 0.0)
    cluster.handle(first_token("a0", 1, computed_tokens=9), 1.0)
    join(cluster, *others)
    return cluster


def first_token(node: str, request: int, **counts: int) -> NodeReported:
    return NodeReported(NodeId(node), Load(), (FirstToken(RequestId(request), **{"computed_tokens": 0, **counts}),))


def end_at(attempt: int, output_tokens: int = 8, **changes: Any) -> Ended:
    fields: dict[str, Any] = {"reason": FinishReason.STOP, "computed_tokens": 1, **changes}
    return Ended(attempt_id(R1, attempt), output_tokens=output_tokens, **fields)


def only(commands: list[ClusterCommand], kind: type) -> Any:
    [found] = [command for command in commands if isinstance(command, kind)]
    return found


# --- the plain case ---------------------------------------------------------------------------------------------------


def test_a_lost_node_s_request_goes_on_elsewhere_after_what_it_brought(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster, "a1")
    # the driver is asked what came of it; until then nothing is decided, and the request keeps its deadline
    assert cluster.handle(NodeLost(A0, "killed"), 2.0) == [Resume(R1, KILLED)]
    assert (cluster.running, cluster.waiting) == (1, 0)
    # nine tokens are its prompt and three are not: the limit counts all of its output
    assert cluster.handle(resumed(), 2.0) == [SetTimer(DEADLINE, 600.0), Assign(A1, goes_on())]
    assert cluster.handle(first_token("a1", attempt_id(R1, 1)), 3.0) == []
    # the end is told by the name that clients know, and counts of the prompt what its first node did
    done = only(cluster.handle(reported("a1", ended=[end_at(1)]), 4.0), Complete)
    assert done == Complete(R1, Ended(R1, FinishReason.STOP, 8, 9), 0, 0)
    assert cluster.running == 0


def test_what_a_failing_node_had_goes_on_elsewhere_too(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster, "a1")
    report = reported("a0", ended=[end_of(1, FinishReason.FAILED, message="out of memory")])
    assert cluster.handle(report, 2.0) == [Resume(R1, "a0: out of memory")]
    # not where it failed, though that node is there and idle
    assert nodes_of(cluster.handle(resumed(), 2.0)) == ["a1"]


def test_a_request_goes_where_its_generated_blocks_are(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster, "a1", "a2", "a3")
    cluster.handle(reported("a2", stored("abc")), 1.5)
    cluster.handle(NodeLost(A0, "killed"), 2.0)
    commands = cluster.handle(resumed(4, "abc"), 2.0)
    assert nodes_of(commands) == ["a2"]
    why = only(commands, Assign).why
    assert why is not None
    assert why.hit_tokens == 12


def test_what_was_found_of_the_prompt_is_told_as_it_was_at_first(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(arrived(), 0.0)
    cluster.handle(first_token("a0", 1, computed_tokens=1, cpu_tokens=4, peer_tokens=2), 1.0)
    join(cluster, "a1")
    cluster.handle(NodeLost(A0, "killed"), 2.0)
    cluster.handle(resumed(), 2.0)
    cluster.handle(first_token("a1", attempt_id(R1, 1), computed_tokens=9), 3.0)
    done = only(cluster.handle(reported("a1", ended=[end_at(1, computed_tokens=9)]), 4.0), Complete)
    assert (done.cached_tokens, done.cpu_tokens, done.peer_tokens) == (8, 4, 2)


def test_a_request_with_prefill_and_decode_apart_goes_on_with_both(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART)
    cluster.handle(arrived(), 0.0)
    cluster.handle(reported("p0", ended=[end_of(1, FinishReason.PREFILLED, 8)]), 1.0)
    cluster.handle(reported("d0", first=[1]), 2.0)
    join(cluster, "d1")
    assert cluster.handle(NodeLost(D0, "killed"), 3.0) == [Resume(R1, "d0 was lost: killed")]
    assert without_timers(cluster.handle(resumed(), 3.0)) == [
        Assign(P0, goes_on(role=Role.PREFILL)),
        Assign(D1, goes_on(source=P0, source_tokens=12, source_pending=True)),
    ]


def test_a_node_lost_in_the_hand_over_starts_over_what_brought_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART)
    cluster.handle(arrived(), 0.0)
    cluster.handle(reported("p0", ended=[end_of(1, FinishReason.PREFILLED, 8)]), 1.0)
    join(cluster, "d1")
    commands = cluster.handle(NodeLost(D0, "killed"), 2.0)
    assert without_timers(commands)[:2] == [Cancel(P0, R1), Restart(R1, "d0 was lost: killed")]
    assert nodes_of(commands) == ["p0", "d1"]


def test_a_prefill_node_lost_while_a_request_goes_on_leaves_its_part_to_the_decode_node(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART)
    cluster.handle(arrived(), 0.0)
    cluster.handle(reported("d0", first=[1]), 1.0)
    join(cluster, "d1")
    cluster.handle(NodeLost(D0, "killed"), 2.0)
    cluster.handle(resumed(), 2.0)
    commands = cluster.handle(NodeLost(P0, "killed"), 3.0)
    assert [type(command).__name__ for command in commands] == ["ReportSourceLost"]
    assert cluster.handle(reported("d1", first=[attempt_id(R1, 1)]), 4.0) == []
    assert only(cluster.handle(reported("d1", ended=[end_at(1)]), 5.0), Complete).ended.output_tokens == 8


# --- again and again --------------------------------------------------------------------------------------------------


def test_twice_in_a_row_before_another_token_came(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster, "a1")
    cluster.handle(NodeLost(A0, "killed"), 2.0)
    cluster.handle(resumed(), 2.0)
    join(cluster, "a2")
    assert cluster.handle(NodeLost(A1, "killed"), 3.0) == [Resume(R1, "a1 was lost: killed")]
    assert without_timers(cluster.handle(resumed(), 3.0)) == [Assign(NodeId("a2"), goes_on(2))]


def test_twice_with_tokens_between(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster, "a1")
    cluster.handle(NodeLost(A0, "killed"), 2.0)
    cluster.handle(resumed(), 2.0)
    cluster.handle(first_token("a1", attempt_id(R1, 1)), 2.5)
    join(cluster, "a2")
    cluster.handle(NodeLost(A1, "killed"), 3.0)
    assert without_timers(cluster.handle(resumed(7, "abcd"), 3.0)) == [Assign(NodeId("a2"), goes_on(2, 7, "abcd"))]


def test_more_often_than_is_allowed_it_ends_with_one_error(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster, "a1", limits=LimitsConfig(resumes_max=1))
    cluster.handle(NodeLost(A0, "killed"), 2.0)
    cluster.handle(resumed(), 2.0)
    join(cluster, "a2")
    aborted = cluster.handle(NodeLost(A1, "killed"), 3.0)
    assert aborted == [ClearTimer(DEADLINE), Abort(R1, 502, "node_lost", "a1 was lost: killed")]


def test_a_request_that_takes_its_nodes_along_takes_few_of_them(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster, "a1", "a2", "a3", limits=LimitsConfig(retries_max=1))
    cluster.handle(NodeLost(A0, "killed"), 2.0)
    first = NodeId(nodes_of(cluster.handle(resumed(), 2.0))[0])
    assert cluster.handle(NodeLost(first, "killed"), 3.0) == [Resume(R1, f"{first} was lost: killed")]
    second = NodeId(nodes_of(cluster.handle(resumed(), 3.0))[0])
    # a second one without another token is enough; with one it would have gone on
    assert only(cluster.handle(NodeLost(second, "killed"), 4.0), Abort).status == 502


def test_another_token_shows_that_it_does_not(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster, "a1", "a2", "a3", limits=LimitsConfig(retries_max=0))
    lost = A0
    for attempt in (1, 2, 3):
        cluster.handle(NodeLost(lost, "killed"), 2.0)
        lost = NodeId(nodes_of(cluster.handle(resumed(), 2.0))[0])
        cluster.handle(first_token(lost, attempt_id(R1, attempt)), 2.0)
    assert cluster.handle(NodeLost(lost, "killed"), 3.0) == [Resume(R1, f"{lost} was lost: killed")]


def test_the_error_does_not_leave_out_what_its_last_node_still_does(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("p0", "d0", router=APART, limits=LimitsConfig(resumes_max=1))
    cluster.handle(arrived(), 0.0)
    cluster.handle(reported("d0", first=[1]), 1.0)
    cluster.handle(reported("d0", ended=[end_of(1, FinishReason.FAILED)]), 2.0)
    join(cluster, "d1")
    cluster.handle(resumed(), 2.0)
    failed = reported("d1", ended=[end_at(1, reason=FinishReason.FAILED)])
    assert without_timers(cluster.handle(failed, 3.0))[0] == Cancel(P0, attempt_id(R1, 1))


# --- where it was over already ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counted", "reason"),
    [(resumed(8, "abcd"), FinishReason.LENGTH), (resumed(3, stopped=True), FinishReason.STOP)],
)
def test_a_request_that_had_brought_all_is_complete(make_cluster: MakeCluster, counted: Resumed, reason: FinishReason) -> None:
    cluster = streaming(make_cluster)
    cluster.handle(NodeLost(A0, "killed"), 2.0)
    ended = Ended(R1, reason, counted.output_tokens, 9)
    assert cluster.handle(counted, 2.0) == [ClearTimer(DEADLINE), Complete(R1, ended, 0, 0)]
    assert cluster.running == 0


def test_it_ends_where_the_node_would_have_ended_it_that_was_lost(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster, context_tokens_max=12)  # room for three tokens after the prompt
    join(cluster, "a1")  # which has room for all eight
    cluster.handle(NodeLost(A0, "killed"), 2.0)
    assert without_timers(cluster.handle(resumed(2, "ab"), 2.0)) == [
        Assign(A1, replace(goes_on(1, 2, "ab"), output_tokens_max=3))
    ]


# --- while nobody has room --------------------------------------------------------------------------------------------


def test_with_no_node_left_it_waits_for_one_and_goes_on_there(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster)
    cluster.handle(NodeLost(A0, "killed"), 2.0)
    assert cluster.handle(resumed(), 2.0) == [SetTimer(DEADLINE, 62.0)]
    assert cluster.waiting == 1
    joined = cluster.handle(NodeJoined(spec_of("a0", incarnation=2)), 6.0)
    assert [SetTimer(DEADLINE, 600.0), Assign(A0, goes_on())] == joined[-2:]


def test_a_wait_for_a_node_has_an_end(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster)
    cluster.handle(NodeLost(A0, "killed"), 2.0)
    cluster.handle(resumed(), 2.0)
    abort = only(cluster.handle(TimerFired(DEADLINE), 62.0), Abort)
    assert (abort.status, abort.code) == (503, "waited_too_long")
    assert (cluster.running, cluster.waiting) == (0, 0)


def test_its_time_as_a_whole_does_not_begin_anew(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster, "a1")
    cluster.handle(NodeLost(A0, "killed"), 2.0)
    cluster.handle(resumed(), 2.0)
    commands = cluster.handle(TimerFired(DEADLINE), 600.0)
    assert only(commands, Cancel) == Cancel(A1, attempt_id(R1, 1))
    assert only(commands, Abort).status == 504


def test_a_client_may_go_while_its_request_is_counted_or_waits(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster)
    cluster.handle(NodeLost(A0, "killed"), 2.0)
    assert cluster.handle(RequestAbandoned(R1, 3), 2.0) == [ClearTimer(DEADLINE)]
    assert cluster.handle(resumed(), 2.0) == []  # late: nobody wants it any more
    assert (cluster.running, cluster.waiting) == (0, 0)


# --- what a node says of an attempt that was given up -----------------------------------------------------------------


def test_reports_of_a_superseded_attempt_are_nobody_s(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster)
    cluster.handle(NodeLost(A0, "partitioned"), 2.0)
    cluster.handle(resumed(), 2.0)
    join(cluster, "a0")  # the same node is heard again, and gets it again
    assert cluster.running == 1
    for late in (
        reported("a0", first=[1]),
        reported("a0", ended=[end_of(1)]),
        reported("a0", ended=[end_of(1, FinishReason.FAILED)]),
    ):
        assert cluster.handle(late, 4.0) == []
    assert cluster.running == 1
    assert only(cluster.handle(reported("a0", ended=[end_at(1)]), 5.0), Complete).request == R1


def test_a_cancel_names_the_attempt_that_runs(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster, "a1")
    cluster.handle(NodeLost(A0, "killed"), 2.0)
    cluster.handle(resumed(), 2.0)
    assert cluster.handle(RequestAbandoned(R1, 5), 3.0)[0] == Cancel(A1, attempt_id(R1, 1))


def test_a_count_that_nobody_asked_for_changes_nothing(make_cluster: MakeCluster) -> None:
    cluster = streaming(make_cluster)
    assert cluster.handle(resumed(), 2.0) == []
    assert cluster.handle(Resumed(RequestId(77), 1, ()), 2.0) == []


# --- the session ------------------------------------------------------------------------------------------------------


def test_the_session_stays_with_the_node_that_ended_its_turn(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("a0")
    cluster.handle(arrived(session="s"), 0.0)
    cluster.handle(first_token("a0", 1, computed_tokens=9), 1.0)
    join(cluster, "a1", "a2", "a3")
    cluster.handle(NodeLost(A0, "killed"), 2.0)
    node = nodes_of(cluster.handle(resumed(), 2.0))[0]
    cluster.handle(reported(node, stored("ab"), ended=[end_at(1)]), 3.0)
    # the prompt counts once, as it was computed at first; what was computed again is no prompt of the session's
    assert sum(cluster.sessions.reprefilled_tokens.values()) == 9
    assert nodes_of(cluster.handle(arrived(2, "abcd", session="s"), 4.0)) == [node]
