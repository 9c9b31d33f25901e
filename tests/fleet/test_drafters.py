"""Processes that draft in the fleet: they have no nodes, start again when they die, and nodes are told of them."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from orchestrator.core.config import ClusterConfig, DrafterConfig, EngineConfig, PoolConfig, SpeculationConfig, SpeculationMethod
from orchestrator.core.types import PoolKind, PoolName
from orchestrator.fleet.actors import nearest
from orchestrator.fleet.differences import changes_between
from orchestrator.fleet.processes import Part, ProcessName, State, bundles_of, parts_of, pools_by_node
from orchestrator.fleet.words import (
    Answer,
    ConfigGiven,
    DrainAsked,
    Keep,
    ProcessDied,
    ResizeAsked,
    RestartAsked,
    ReturnAsked,
    TellMembers,
)
from tests.fleet.clusters import Run, answers, booted, brief, told

DRAFTS = PoolName("drafts")
D0, D1 = ProcessName("drafter-drafts-0"), ProcessName("drafter-drafts-1")
SPECULATION = SpeculationConfig(SpeculationMethod.DRAFT_MODEL, draft_pool="drafts")
BOTH = PoolConfig("both", PoolKind.AGGREGATED, engine=EngineConfig(speculation=SPECULATION))
DRAFTING = PoolConfig("drafts", PoolKind.LPX, nodes=2, cpus=2, drafter=DrafterConfig("small"))
CONFIG = ClusterConfig(pools=(BOTH, DRAFTING))


@pytest.fixture
def run() -> Iterator[Run]:
    run = booted(CONFIG)
    yield run
    run.controller.validate()


def drafters(run: Run) -> list[ProcessName]:
    return [name for _, name, _ in told(run).drafters]


def test_each_of_its_processes_asks_for_what_the_pool_does_and_has_no_node() -> None:
    parts = parts_of(CONFIG)
    assert [(part.name, part.group, part.size) for part in parts] == [
        ("node-both-0", "both", 1),
        (D0, "drafts", 1),
        (D1, "drafts", 1),
        ("gateway-0", "gateways", 1),
    ]
    assert [part.nodes for part in parts[1:3]] == [(), ()]
    assert [bundles_of(CONFIG, part) for part in parts[1:3]] == [[{"CPU": 2}]] * 2
    assert list(pools_by_node(CONFIG)) == ["both-0"]


def test_nodes_are_told_of_those_that_serve_and_gateways_of_no_node(run: Run) -> None:
    addresses = [(DRAFTS, name, f"{name}:{run.incarnation(name)}") for name in (D0, D1)]
    assert list(told(run).drafters) == addresses
    assert [node for node, _, _ in told(run).nodes] == ["both-0"]


def test_one_that_dies_is_started_again_and_nodes_hear_of_both(run: Run) -> None:
    first = told(run).drafters
    orders = run.tell(ProcessDied(D0, run.incarnation(D0)))
    assert brief(orders) == [f"kill {D0}", f"start {D0}"]
    between, after = [order.drafters for order in orders if isinstance(order, TellMembers)]
    assert [name for _, name, _ in between] == [D1]
    assert [name for _, name, _ in after] == [D0, D1]
    assert after != first


def test_they_are_drained_come_back_and_are_more_or_fewer(run: Run) -> None:
    # Nobody needs one: the last is drained without force.
    assert answers(run.tell(DrainAsked(2, D1))) == [Answer(2)]
    assert answers(run.tell(DrainAsked(3, D0))) == [Answer(3)]
    assert (run.state(D0), drafters(run)) == (State.DRAINED, [])
    assert answers(run.tell(ReturnAsked(4, D0))) == [Answer(4)]
    assert drafters(run) == [D0]
    assert answers(run.tell(ResizeAsked(5, "drafts", 3))) == [Answer(5)]
    kept = [order for order in run.done if isinstance(order, Keep)][-1]
    assert [part for part in kept.parts if part.pool == DRAFTS] == [Part(DRAFTS, number) for number in range(3)]
    assert answers(run.tell(ResizeAsked(6, "drafts", 1))) == [Answer(6)]
    assert len(drafters(run)) == 1
    left = drafters(run)[0]
    assert brief(run.tell(RestartAsked(7, ("drafts",)))) == [f"{what} {left}" for what in ("drain", "stop", "start", "settle")]


def test_a_node_is_the_last_that_generates_whoever_drafts(run: Run) -> None:
    (answer,) = answers(run.tell(DrainAsked(2, "both-0")))
    assert answer.problem == "node-both-0 is the only process that generates for its model; --force drains it all the same"


def test_what_they_draft_with_is_changed_by_restarting_them_alone(run: Run) -> None:
    changed = replace(DRAFTING, drafter=DrafterConfig("small", sequences_max=4))
    given = replace(CONFIG, pools=(BOTH, changed))
    assert changes_between(CONFIG, given).restarts == ("drafts",)
    orders = run.tell(ConfigGiven(2, given, restart=True))
    assert answers(orders) == [Answer(2)]
    assert {order.rpartition(" ")[2] for order in brief(orders)} == {D0, D1}


def test_a_pool_does_not_begin_to_draft_while_it_runs() -> None:
    serving = PoolConfig("drafts", PoolKind.DECODE, nodes=2, cpus=2)
    before = replace(CONFIG, pools=(replace(BOTH, engine=EngineConfig()), serving))
    assert "pools[1].drafter" in [one.where for one in changes_between(before, CONFIG).fixed]


@pytest.mark.parametrize(
    ("addresses", "number", "chosen"),
    [
        ((), 0, None),
        (("a@h1:1", "b@h2:2", "c@h1:3"), 0, "a@h1:1"),
        (("a@h1:1", "b@h2:2", "c@h1:3"), 1, "c@h1:3"),
        (("a@h1:1", "b@h2:2", "c@h1:3"), 2, "a@h1:1"),
        (("b@h2:2", "d@h3:4"), 3, "d@h3:4"),
    ],
)
def test_a_node_asks_one_of_its_host_and_spreads_by_its_number(
    addresses: tuple[str, ...], number: int, chosen: str | None
) -> None:
    assert nearest(addresses, "h1", number) == chosen
