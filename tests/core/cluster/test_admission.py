"""Who is let in, who waits in what order, and when the others are told to come back."""

import pytest

from orchestrator.core.cluster.admission import Admission, Pace, WaitingQueue
from orchestrator.core.config import LimitsConfig
from orchestrator.core.types import ModelName, Request, RequestId, ServiceClass, TenantId
from tests.core.cluster.cluster_builders import make_request

MODEL = ModelName("m")


def admission(**limits: int) -> Admission:
    return Admission(LimitsConfig(**limits), (MODEL,))


def refused(machine: Admission, request: Request, generates: bool = True, context: int = 100) -> tuple[int, str] | None:
    refusal = machine.refusal(request, generates, context)
    return None if refusal is None else (refusal.status, refusal.code)


def test_the_reasons_not_to_let_a_request_in() -> None:
    machine = admission(tenant_requests_max=1)
    assert refused(machine, make_request()) is None
    assert refused(machine, make_request(), generates=False) == (503, "no_node")
    assert refused(machine, make_request(prompt="x" * 24, tail=3)) is None  # 99 tokens leave room for one
    assert refused(machine, make_request(prompt="x" * 25, tail=0)) == (400, "context_length_exceeded")
    machine.entered(make_request())
    assert refused(machine, make_request(2)) == (429, "tenant_requests_max")
    assert refused(machine, make_request(2, tenant=TenantId("other"))) is None
    machine.left(make_request())
    assert refused(machine, make_request(2)) is None
    machine.draining = True
    assert refused(machine, make_request(2)) == (503, "draining")


def test_a_full_queue_is_an_overload() -> None:
    machine = admission(waiting_max=1)
    assert machine.overflow(make_request()) is None
    machine.queue(MODEL).push(make_request())
    overflow = machine.overflow(make_request(2))
    assert overflow is not None
    assert (overflow.status, overflow.code, overflow.retry_after_s) == (529, "overloaded", 1.0)


def test_waiting_requests_are_ordered_by_class_then_priority_then_arrival() -> None:
    queue = WaitingQueue()
    queue.push(make_request(1))
    queue.push(make_request(2, priority=5))
    queue.push(make_request(3, service_class=ServiceClass.CADENCE))
    queue.push(make_request(4, service_class=ServiceClass.BATCH, priority=9))
    queue.push(make_request(5))
    order: list[int] = []
    while (first := queue.first) is not None:
        order.append(first)
        queue.remove(first)
    assert order == [3, 2, 1, 5, 4]


def test_withdrawn_requests_are_skipped_and_leave_no_trace() -> None:
    queue = WaitingQueue()
    for serial in range(1, 101):
        queue.push(make_request(serial))
    for serial in range(1, 100):
        queue.remove(RequestId(serial))
    queue.remove(RequestId(999))
    assert (len(queue), queue.first) == (1, 100)
    queue.remove(RequestId(100))
    queue.push(make_request(7))  # one that comes back
    assert (queue.first, RequestId(7) in queue) == (7, True)


@pytest.mark.parametrize(("waiting", "seconds"), [(0, 1.0), (10, 5.0), (1000, 60.0)])
def test_retry_after_follows_how_fast_requests_complete(waiting: int, seconds: float) -> None:
    pace = Pace()
    assert pace.retry_after_s(1000) == 1.0  # nothing is known yet
    for step in range(5):
        pace.completed(step * 0.5)
    assert pace.retry_after_s(waiting) == pytest.approx(seconds)
