"""Who is let in, who waits in what order, and when the others are told to come back."""

from typing import Any

import pytest

from orchestrator.core.cluster.admission import Admission, Pace
from orchestrator.core.config import LimitsConfig, TenantConfig
from orchestrator.core.types import ModelName, Request, ServiceClass, TenantId
from tests.core.cluster.cluster_builders import make_request

MODEL, OTHER = ModelName("m"), ModelName("other")


def admission(*tenants: TenantConfig, **limits: int) -> Admission:
    return Admission(LimitsConfig(**limits), (MODEL, OTHER), tenants)


def asked(serial: int, tenant: str = "t", **changes: Any) -> Request:
    return make_request(serial, tenant=TenantId(tenant), **changes)


def refused(
    machine: Admission, request: Request, generates: bool = True, context: int = 100, now: float = 0.0
) -> tuple[int, str] | None:
    refusal = machine.refusal(request, generates, context, now)
    return None if refusal is None else (refusal.status, refusal.code)


def test_the_reasons_not_to_let_a_request_in() -> None:
    machine = admission(tenant_requests_max=1)
    assert refused(machine, make_request()) is None
    assert refused(machine, make_request(), generates=False) == (503, "no_node")
    assert refused(machine, make_request(prompt="x" * 24, tail=3)) is None  # 99 tokens leave room for one
    assert refused(machine, make_request(prompt="x" * 25, tail=0)) == (400, "context_length_exceeded")
    machine.entered(make_request(), 0.0)
    assert refused(machine, make_request(2)) == (429, "tenant_requests_max")
    assert refused(machine, make_request(2, tenant=TenantId("other"))) is None
    machine.left(make_request())
    assert refused(machine, make_request(2)) is None
    machine.draining = True
    assert refused(machine, make_request(2)) == (503, "draining")


def test_a_full_queue_is_an_overload() -> None:
    machine = admission(waiting_max=1)
    assert machine.overflow(asked(1)) is None
    machine.queue(MODEL).push(asked(1))
    second = asked(2)
    assert machine.overflow(second) is second
    refusal = machine.overloaded(second)
    assert (refusal.status, refusal.code, refusal.retry_after_s) == (529, "overloaded", 1.0)


def test_whoever_has_more_than_its_share_of_the_places_makes_room() -> None:
    machine = admission(TenantConfig("big", share=3.0), TenantConfig("small"), waiting_max=4)
    for serial in (1, 2, 3):
        machine.queue(MODEL).push(asked(serial, "small"))
    machine.queue(OTHER).push(asked(4, "small", model=OTHER, priority=1))
    fifth = asked(5, "small")
    assert machine.overflow(fifth) is fifth  # alone it may have all places, and no more
    for serial, goes in ((6, 3), (7, 2), (8, 1)):  # the least urgent and latest first, in whichever queue it is
        victim = machine.overflow(asked(serial, "big"))
        assert victim is not None
        assert victim.id == goes
        machine.queue(MODEL).remove(victim.id)
        machine.queue(MODEL).push(asked(serial, "big"))
    ninth, tenth = asked(9, "big"), asked(10, "small")
    assert machine.overflow(ninth) is ninth  # three of four are its part
    assert machine.overflow(tenth) is tenth  # and one the other's


def test_every_tenant_has_one_place_before_another_has_two() -> None:
    machine = admission(TenantConfig("giant", share=1000.0), waiting_max=2)
    machine.queue(MODEL).push(asked(1, "a"))
    machine.queue(MODEL).push(asked(2, "b"))
    giant = asked(3, "giant")
    assert machine.overflow(giant) is giant  # nobody has more than one
    machine.queue(MODEL).remove(asked(2, "b").id)
    machine.queue(MODEL).push(asked(4, "a"))
    victim = machine.overflow(giant)
    assert victim is not None
    assert victim.id == 4


def test_no_more_priority_or_class_than_the_tenant_may_ask_for() -> None:
    machine = admission(TenantConfig("t", priority_max=5, class_max=ServiceClass.STANDARD))
    assert refused(machine, asked(1, priority=5, service_class=ServiceClass.STANDARD)) is None
    assert refused(machine, asked(1, priority=6)) == (403, "priority_not_allowed")
    assert refused(machine, asked(1, service_class=ServiceClass.INTERACTIVE)) == (403, "class_not_allowed")
    assert refused(machine, asked(1, service_class=ServiceClass.BATCH)) is None
    assert refused(machine, asked(1, "another", priority=6, service_class=ServiceClass.CADENCE)) is None


def test_a_tenants_own_number_of_requests_comes_before_that_of_all() -> None:
    machine = admission(TenantConfig("t", requests_max=2), tenant_requests_max=1)
    machine.entered(asked(1), 0.0)
    machine.entered(asked(2, "another"), 0.0)
    assert refused(machine, asked(3)) is None
    assert refused(machine, asked(3, "another")) == (429, "tenant_requests_max")
    machine.entered(asked(3), 0.0)
    assert refused(machine, asked(4)) == (429, "tenant_requests_max")


def test_requests_a_second() -> None:
    machine = admission(TenantConfig("t", requests_per_s=2.0))
    for serial in range(4):  # two seconds' worth
        assert refused(machine, asked(serial)) is None
        machine.entered(asked(serial), 0.0)
    assert refused(machine, asked(5)) == (429, "requests_per_s")
    assert refused(machine, asked(5, "another")) is None
    assert refused(machine, asked(5), now=0.4) == (429, "requests_per_s")
    assert refused(machine, asked(5), now=0.5) is None  # asking alone takes nothing
    machine.entered(asked(5), 0.5)
    refusal = machine.refusal(asked(6), True, 100, 0.5)
    assert refusal is not None
    assert (refusal.message, refusal.retry_after_s) == ("this tenant asks for more than its requests_per_s, 2", 1.0)


def test_tokens_a_second_count_prompts_when_let_in_and_output_when_it_ends() -> None:
    machine = admission(TenantConfig("t", tokens_per_s=10.0))  # 20 saved up; the prompt has 9
    machine.entered(asked(1), 0.0)
    assert refused(machine, asked(2)) is None
    machine.delivered(TenantId("t"), 12, 0.0)  # 1 is owed
    assert refused(machine, asked(2), now=0.9) == (429, "tokens_per_s")
    assert refused(machine, asked(2), now=1.0) is None
    machine.delivered(TenantId("another"), 1000, 1.0)
    assert refused(machine, asked(2), now=1.0) is None


def test_a_prompt_longer_than_all_that_may_be_saved_up_is_let_in_when_that_is_and_owed() -> None:
    machine = admission(TenantConfig("t", tokens_per_s=2.0))  # 4 saved up
    assert refused(machine, asked(1)) is None
    machine.entered(asked(1), 0.0)  # 5 of 9 are owed
    assert refused(machine, asked(2), now=4.4) == (429, "tokens_per_s")
    assert refused(machine, asked(2), now=4.5) is None


@pytest.mark.parametrize(("waiting", "seconds"), [(0, 1.0), (10, 5.0), (1000, 60.0)])
def test_retry_after_follows_how_fast_requests_complete(waiting: int, seconds: float) -> None:
    pace = Pace()
    assert pace.retry_after_s(1000) == 1.0  # nothing is known yet
    for step in range(5):
        pace.completed(step * 0.5)
    assert pace.retry_after_s(waiting) == pytest.approx(seconds)


# --- several gateways -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("requests_max", "gateways"), [(1, 1), (5, 2), (7, 3), (4, 4), (4096, 1000)])
def test_the_parts_of_all_gateways_make_the_limit(requests_max: int, gateways: int) -> None:
    let_in = 0
    for place in range(gateways):
        machine = Admission(LimitsConfig(), (MODEL,), (TenantConfig("t", requests_max=requests_max),), gateways, place)
        while refused(machine, asked(1)) is None:
            machine.entered(asked(1), 0.0)
            let_in += 1
    assert let_in == requests_max


def test_a_part_grows_when_a_gateway_goes_and_shrinks_when_one_comes() -> None:
    machine = Admission(LimitsConfig(), (MODEL,), (TenantConfig("t", requests_per_s=4.0),), gateways=2)
    rate_of = [_let_in(machine, 0.0)]  # 2 seconds of 2
    machine.divide(0, 1, 0.0)
    rate_of += [_let_in(machine, 1.0), _let_in(machine, 2.0)]
    machine.divide(3, 4, 2.0)
    rate_of += [_let_in(machine, 4.0), _let_in(machine, 5.0)]
    assert rate_of == [4, 4, 4, 2, 1]


def test_what_is_owed_shrinks_with_the_part() -> None:
    machine = Admission(LimitsConfig(), (MODEL,), (TenantConfig("t", tokens_per_s=10.0),))
    machine.entered(asked(1, prompt="a" * 25, tail=0), 0.0)  # 100 tokens of the 20 that are saved up
    machine.divide(0, 2, 0.0)
    assert refused(machine, asked(2, prompt="a", tail=0), now=7.9) == (429, "tokens_per_s")  # 40 owed, 5 a second
    assert refused(machine, asked(2, prompt="a", tail=0), now=8.9) is None


def _let_in(machine: Admission, now: float) -> int:
    count = 0
    while refused(machine, asked(1), now=now) is None:
        machine.entered(asked(1), now)
        count += 1
    return count
