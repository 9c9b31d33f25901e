"""Stores in the fleet: each host that has nodes gets one, which starts again when it dies and is told to gateways."""

from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.core.config import STORES, StoreConfig
from orchestrator.core.types import StoreId
from orchestrator.fleet import memory
from orchestrator.fleet.controller import Controller
from orchestrator.fleet.processes import Part, ProcessName, State, bundles_of, parts_of
from orchestrator.fleet.words import (
    Answer,
    BootAsked,
    DrainAsked,
    EndAsked,
    Found,
    HostUsed,
    Keep,
    ProcessDied,
    ResizeAsked,
    RestartAsked,
    Resumed,
    ReturnAsked,
    Start,
    StartFailed,
    TellMembers,
)
from tests.fleet.clusters import Run, answers, booted, brief, small, told

S0, S1, G0 = map(ProcessName, ("store-0", "store-1", "gateway-0"))
CONFIG = small(store=StoreConfig())


@pytest.fixture
def run() -> Iterator[Run]:
    run = booted(CONFIG)
    yield run
    run.controller.validate()


def test_a_host_that_is_used_gets_one_store_and_another_host_another(run: Run) -> None:
    assert brief(run.tell(HostUsed("a"))) == ["start store-0"]
    assert brief(run.tell(HostUsed("a"))) == []
    assert brief(run.tell(HostUsed("b"))) == ["start store-1"]
    stores = [(store, host) for store, host, _ in told(run).stores]
    assert stores == [(StoreId("store-0"), "a"), (StoreId("store-1"), "b")]
    kept = [order for order in run.done if isinstance(order, Keep)][-1]
    assert kept.parts[-2:] == (Part(None, 0, host="a"), Part(None, 1, host="b"))
    assert bundles_of(CONFIG, kept.parts[-1]) == []


def test_where_no_stores_are_wanted_none_is_started() -> None:
    assert booted(small()).tell(HostUsed("a")) == []


def test_a_cluster_has_started_when_its_stores_have_and_has_not_when_one_does_not() -> None:
    controller = Controller(CONFIG)
    controller.handle(BootAsked(7), 1000.0)
    (start,) = [order for order in controller.handle(HostUsed("a"), 1000.0) if isinstance(order, Start)]
    orders = controller.handle(StartFailed(S0, start.incarnation, "store.cmx: no such folder"), 1001.0)
    assert answers(orders) == [Answer(7, "store-0: store.cmx: no such folder")]
    assert brief(orders)[-1] == "kill store-0"


def test_a_store_that_dies_is_started_again_and_gateways_hear_of_both(run: Run) -> None:
    run.tell(HostUsed("a"))
    first = told(run).stores
    orders = run.tell(ProcessDied(S0, run.incarnation(S0)))
    assert brief(orders) == ["kill store-0", "start store-0"]
    between, after = [order.stores for order in orders if isinstance(order, TellMembers)]
    assert between == ()
    assert after != first
    assert after[0][:2] == first[0][:2]


def test_a_store_is_drained_comes_back_and_goes_with_the_cluster(run: Run) -> None:
    run.tell(HostUsed("a"))
    assert answers(run.tell(DrainAsked(2, "store-0"))) == [Answer(2)]
    assert run.state(S0) is State.DRAINED
    assert told(run).stores == ()
    assert run.tell(HostUsed("a")) == [], "it was kept out by an operator"
    assert answers(run.tell(ReturnAsked(3, "store-0"))) == [Answer(3)]
    assert run.state(S0) is State.UP
    assert brief(run.tell(RestartAsked(4, (STORES,)))) == ["drain store-0", "stop store-0", "start store-0", "settle store-0"]
    (answer,) = answers(run.tell(ResizeAsked(5, STORES, 2)))
    assert answer.problem == "each host that has nodes has one store, and no other has any"
    assert "stop store-0" in brief(run.tell(EndAsked(6, 1.0)))
    assert run.tell(HostUsed("b")) == []


def test_gateways_are_counted_without_stores(run: Run) -> None:
    run.tell(HostUsed("a"))
    (answer,) = answers(run.tell(DrainAsked(2, "gateway-0")))
    assert answer.problem is not None
    assert "the only gateway" in answer.problem
    assert brief(run.tell(ResizeAsked(3, "gateways", 2))) == ["start gateway-1", "settle gateway-1"]


def test_a_new_life_of_the_controller_knows_its_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[bytes, bytes] = {}

    class Table:
        def _internal_kv_put(self, key: bytes, value: bytes, overwrite: bool, namespace: bytes) -> None:
            values[key] = value

        def _internal_kv_get(self, key: bytes, namespace: bytes) -> bytes | None:
            return values.get(key)

    monkeypatch.setattr(memory, "internal_kv", Table())
    kept = Keep((*parts_of(CONFIG), Part(None, 3, host="a")), (), {"prefill": 1, "decode": 2})
    memory.write("c", CONFIG, kept)
    found: Any = memory.read("c")
    assert (found.config, found.kept) == (CONFIG, kept)
    controller = Controller(CONFIG, kept)
    orders = controller.handle(Resumed((Found(Part(None, 3, host="a"), 5, "1.2.3.4:5"),)), 1000.0)
    (members,) = [order for order in orders if isinstance(order, TellMembers)]
    assert members.stores == ((StoreId("store-3"), "a", "1.2.3.4:5"),)
    assert "start store-3" not in brief(orders)
    assert brief(controller.handle(HostUsed("b"), 1001.0)) == ["start store-4"]
