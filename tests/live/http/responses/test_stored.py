"""What is kept of responses is bounded, each tenant's apart, and a chain is forgotten from its first turn."""

import json
from dataclasses import dataclass

from orchestrator.core.types import SessionId, TenantId
from orchestrator.live.http.responses.stored import Stored, StoredResponses

ACME, GLOBEX = TenantId("acme"), TenantId("globex")


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def response(number: int, previous: int | None = None, size: int = 10) -> Stored:
    asked, said = {"id": f"msg_q{number}", "n": "x" * size}, {"id": f"msg_a{number}", "n": number}
    return Stored(
        id=f"resp_{number}",
        previous=f"resp_{previous}" if previous is not None else None,
        session=SessionId("s"),
        input=json.dumps([asked]).encode(),
        output=json.dumps([said]).encode(),
        frame=json.dumps({"id": f"resp_{number}", "output": [], "status": "completed"}).encode(),
        names=(f"msg_q{number}", f"msg_a{number}"),
    )


def keeper(responses: int = 10, size: int = 1 << 20, seconds: float = 60.0, clock: Clock | None = None) -> StoredResponses:
    return StoredResponses((ACME, GLOBEX), 2 * responses, 2 * size, seconds, clock or Clock())


def names(chain: list[Stored] | None) -> list[str] | None:
    return [one.id for one in chain] if chain is not None else None


def test_a_chain_is_found_whole_or_not_at_all() -> None:
    stored = keeper()
    for one in (response(1), response(2, 1), response(3, 2), response(4, 1)):
        stored.keep(ACME, one)
    assert names(stored.chain(ACME, "resp_3")) == ["resp_1", "resp_2", "resp_3"]
    assert names(stored.chain(ACME, "resp_4")) == ["resp_1", "resp_4"]
    assert stored.chain(GLOBEX, "resp_1") is None
    assert stored.remove(ACME, "resp_2")
    assert not stored.remove(ACME, "resp_2")
    assert stored.chain(ACME, "resp_3") is None
    assert stored.find(ACME, "resp_3") is not None


def test_the_chain_that_was_used_least_lately_goes_first_and_from_its_beginning() -> None:
    stored = keeper(responses=4)
    for one in (response(1), response(2, 1), response(11), response(12, 11)):
        stored.keep(ACME, one)
    assert stored.chain(ACME, "resp_2") is not None
    stored.keep(ACME, response(3, 2))
    assert stored.find(ACME, "resp_11") is None
    assert stored.find(ACME, "resp_12") is not None
    assert names(stored.chain(ACME, "resp_3")) == ["resp_1", "resp_2", "resp_3"]
    stored.keep(ACME, response(21))
    assert stored.find(ACME, "resp_12") is None


def test_bytes_are_bounded_by_tenant_and_what_is_larger_than_all_of_them_is_not_kept() -> None:
    size = response(1, size=1000).bytes
    stored = keeper(size=2 * size)
    for number in (1, 2, 3):
        stored.keep(ACME, response(number, size=1000))
    stored.keep(GLOBEX, response(4, size=1000))
    assert [stored.find(ACME, f"resp_{number}") is not None for number in (1, 2, 3)] == [False, True, True]
    stored.keep(ACME, response(5, size=2000 + size))
    assert [stored.find(ACME, f"resp_{number}") is not None for number in (2, 3, 5)] == [True, True, False]
    assert stored.find(GLOBEX, "resp_4") is not None


def test_what_is_not_used_for_long_is_forgotten() -> None:
    clock = Clock()
    stored = keeper(seconds=60.0, clock=clock)
    stored.keep(ACME, response(1))
    stored.keep(ACME, response(2))
    clock.now += 59.0
    assert stored.chain(ACME, "resp_2") is not None
    clock.now += 2.0
    assert stored.find(ACME, "resp_1") is None
    assert stored.item(ACME, "msg_a1") is None
    assert stored.find(ACME, "resp_2") is not None


def test_an_item_is_found_in_the_last_response_that_has_it() -> None:
    stored = keeper()
    stored.keep(ACME, response(1))
    assert stored.item(ACME, "msg_a1") == {"id": "msg_a1", "n": 1}
    assert stored.item(ACME, "msg_q1") == {"id": "msg_q1", "n": "x" * 10}
    assert stored.item(GLOBEX, "msg_a1") is None
    kept = stored.find(ACME, "resp_1")
    assert kept is not None
    assert json.loads(kept.body) == {"id": "resp_1", "output": [{"id": "msg_a1", "n": 1}], "status": "completed"}
    stored.remove(ACME, "resp_1")
    assert stored.item(ACME, "msg_a1") is None
