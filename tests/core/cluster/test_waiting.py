"""Who of those that wait goes next: tenants by share, a tenant's own by urgency."""

from collections import Counter
from random import Random

from orchestrator.core.cluster.waiting import WaitingQueue
from orchestrator.core.fairness import CREDIT_TOKENS
from orchestrator.core.types import Request, RequestId, ServiceClass, TenantId
from tests.core.cluster.cluster_builders import make_request

SHARES = {TenantId("one"): 1.0, TenantId("three"): 3.0}


def queue_of(*requests: Request) -> WaitingQueue:
    queue = WaitingQueue(lambda tenant: SHARES.get(tenant, 1.0))
    for request in requests:
        queue.push(request)
    return queue


def asked(serial: int, tenant: str = "t", **changes: object) -> Request:
    return make_request(serial, tenant=TenantId(tenant), **changes)


def started(queue: WaitingQueue, count: int) -> list[int]:
    """Start so many, and return which."""
    order: list[int] = []
    while len(order) < count and (first := queue.first()) is not None:
        order.append(first)
        queue.started(first, 0)
    return order


def test_requests_of_one_tenant_are_ordered_by_class_then_priority_then_arrival() -> None:
    queue = queue_of(
        asked(1),
        asked(2, priority=5),
        asked(3, service_class=ServiceClass.CADENCE),
        asked(4, service_class=ServiceClass.BATCH, priority=9),
        asked(5),
    )
    assert started(queue, 9) == [3, 2, 1, 5, 4]


def test_tenants_take_turns_by_their_shares() -> None:
    ones, threes = [asked(serial, "one") for serial in range(1, 9)], [asked(serial, "three") for serial in range(11, 19)]
    assert started(queue_of(*ones, *threes), 8) == [1, 11, 12, 13, 2, 14, 15, 16]


def test_turns_are_counted_in_work_not_in_requests() -> None:
    long = [asked(serial, "long", prompt="a" * 7, tail=0) for serial in (1, 2)]  # 28 tokens and 8 of output
    short = [asked(serial, "short", prompt="a", tail=0) for serial in range(11, 17)]  # 4 and 8
    assert started(queue_of(*long, *short), 8) == [1, 11, 12, 13, 2, 14, 15, 16]


def test_a_flood_of_urgent_requests_keeps_nobody_else_out() -> None:
    flood = [asked(serial, "a", service_class=ServiceClass.CADENCE, priority=9) for serial in range(1, 6)]
    queue = queue_of(*flood, asked(11, "b", service_class=ServiceClass.BATCH), asked(12, "b", service_class=ServiceClass.BATCH))
    assert started(queue, 7) == [1, 11, 2, 12, 3, 4, 5]


def test_who_comes_late_begins_where_the_others_are() -> None:
    large = {"prompt_tokens": CREDIT_TOKENS, "hashes": (), "output_tokens_max": 1}
    queue = queue_of(*(asked(serial, "early", **large) for serial in range(1, 11)))
    assert started(queue, 5) == [1, 2, 3, 4, 5]
    for serial in range(11, 15):
        queue.push(asked(serial, "late", **large))
    assert started(queue, 6) == [11, 12, 6, 13, 7, 14]  # but for its credit, turns it did not take are not made up for


def test_cached_tokens_are_no_work() -> None:
    prompt = {"prompt_tokens": 1_000, "hashes": (), "output_tokens_max": 1}
    queue = queue_of(*(asked(serial, tenant, **prompt) for serial, tenant in ((1, "a"), (2, "a"), (11, "b"), (12, "b"))))
    queue.started(RequestId(1), 990)  # 11 tokens of work
    queue.started(RequestId(11), 0)
    assert queue.first() == 2


def test_leaving_and_coming_back_while_others_wait_gives_no_turn() -> None:
    queue = queue_of(asked(1, "a"), asked(2, "b"), asked(3, "b"))
    assert started(queue, 1) == [1]
    queue.push(asked(4, "a"))
    assert started(queue, 3) == [2, 3, 4]


def test_withdrawn_requests_are_skipped_and_leave_no_trace() -> None:
    queue = queue_of(*(asked(serial) for serial in range(1, 101)))
    for serial in range(1, 100):
        queue.remove(RequestId(serial))
    queue.remove(RequestId(999))
    assert (len(queue), queue.first(), queue.waiting(TenantId("t"))) == (1, 100, 1)
    queue.remove(RequestId(100))
    assert (queue.first(), queue.tenants, queue.last(TenantId("t"))) == (None, (), None)
    queue.push(asked(7))  # one that comes back
    assert (queue.first(), RequestId(7) in queue) == (7, True)


def test_work_follows_shares_whatever_comes() -> None:
    random = Random(7)
    queue = queue_of()
    shares = {"one": 1.0, "three": 3.0}
    work: Counter[str] = Counter()
    sizes: dict[int, tuple[str, int]] = {}
    for serial in range(1, 2001):
        for offset, tenant in enumerate(shares):
            number = 2 * serial + offset
            request = asked(number, tenant, prompt="a" * random.randint(0, 20), priority=random.randint(0, 3))
            sizes[number] = (tenant, request.prompt_tokens + 8)
            queue.push(request)
    for _ in range(1000):
        (number,) = started(queue, 1)
        tenant, size = sizes[number]
        work[tenant] += size
        # Never further apart than the largest requests of both.
        assert abs(work["one"] / 1.0 - work["three"] / 3.0) <= 89 / 1.0 + 89 / 3.0
