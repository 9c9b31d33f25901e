"""The fleet's controller: what starts, dies, drains, grows, restarts and ends, as literals; and what always holds, at random."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.core.commands import ClearTimer, SetTimer
from orchestrator.core.config import GATEWAYS, LimitsConfig, SchedulerConfig, SplitConfig, TenantConfig
from orchestrator.core.events import TimerFired
from orchestrator.core.types import NodeId, PoolName
from orchestrator.fleet.controller import Controller
from orchestrator.fleet.processes import FAILURES_MAX, Part, ProcessName, State
from orchestrator.fleet.words import (
    Answer,
    BackoffTimer,
    BootAsked,
    Command,
    ConfigGiven,
    Drain,
    DrainAsked,
    EndAsked,
    Event,
    Found,
    Keep,
    Kill,
    ProcessDied,
    ProcessDrained,
    ProcessServes,
    ProcessSettled,
    ProcessSilent,
    ProcessStopped,
    Release,
    ResizeAsked,
    RestartAsked,
    Resumed,
    ReturnAsked,
    Say,
    Settle,
    Start,
    StartFailed,
    Stop,
    TellMembers,
)
from tests.builders import some
from tests.fleet.clusters import Run, answers, booted, brief, outcome_of, small

P0, D0, D1, G0 = map(ProcessName, ("node-prefill-0", "node-decode-0", "node-decode-1", "gateway-0"))
PREFILL, DECODE = PoolName("prefill"), PoolName("decode")


def lines(orders: list[Command]) -> list[str]:
    return [order.line for order in orders if isinstance(order, Say)]


def test_a_boot_starts_all_and_is_done_when_the_last_serves() -> None:
    controller = Controller(small(prefill=1, decode=1))
    p0, d0, g0 = Part(PREFILL, 0, (NodeId("prefill-0"),)), Part(DECODE, 0, (NodeId("decode-0"),)), Part(None, 0)
    away = TellMembers(((NodeId("prefill-0"), PREFILL, ""), (NodeId("decode-0"), DECODE, "")), {})
    assert controller.handle(BootAsked(7), 1000.0) == [
        Keep((p0, d0, g0), (), {"prefill": 1, "decode": 1}),
        Start(p0, 1_000_000),
        Start(d0, 1_000_001),
        Start(g0, 1_000_002),
        away,
    ]
    assert controller.handle(ProcessServes(P0, 1_000_000, "p"), 1001.0) == [
        TellMembers(((NodeId("prefill-0"), PREFILL, "p"), (NodeId("decode-0"), DECODE, "")), {})
    ]
    controller.handle(ProcessServes(G0, 1_000_002, "http://g"), 1001.0)
    assert controller.handle(ProcessServes(D0, 1_000_001, "d"), 1002.0) == [
        Answer(7),
        TellMembers(((NodeId("prefill-0"), PREFILL, "p"), (NodeId("decode-0"), DECODE, "d")), {0: "http://g"}),
    ]


def test_a_boot_in_which_one_does_not_start_ends_all_and_says_which() -> None:
    controller = Controller(small(prefill=1, decode=1))
    controller.handle(BootAsked(7), 1000.0)
    orders = controller.handle(StartFailed(D0, 1_000_001, "no such folder"), 1001.0)
    assert brief(orders) == ["kill prefill-0", "kill decode-0", "kill gateway-0"]
    assert [order for order in orders if isinstance(order, Release)] == [Release(P0), Release(D0), Release(G0)]
    assert orders[-1] == Answer(7, "node-decode-0: no such folder")


def test_other_checkpoints_than_those_that_serve_are_refused() -> None:
    controller = Controller(small(prefill=1, decode=1))
    controller.handle(BootAsked(7), 1000.0)
    controller.handle(ProcessServes(P0, 1_000_000, "p", {"default": "one"}), 1001.0)
    (answer,) = answers(controller.handle(ProcessServes(D0, 1_000_001, "d", {"default": "two"}), 1001.0))
    assert answer == Answer(7, "node-decode-0: model default: its checkpoint is another one than node-prefill-0's (two, one)")


def test_what_dies_is_killed_for_sure_and_starts_again_at_once_then_ever_later_until_given_up() -> None:
    run = booted(small(), Start)
    incarnation = run.incarnation(D0)
    orders = run.tell(ProcessDied(D0, incarnation))
    assert brief(orders) == ["kill decode-0", "start decode-0"]
    assert lines(orders) == ["node-decode-0 died"]
    waits = []
    for _ in range(FAILURES_MAX - 1):
        orders = run.tell(StartFailed(D0, run.incarnation(D0), "no"))
        timer = next(order for order in orders if isinstance(order, SetTimer))
        waits.append(timer.at - run.now)
        assert run.state(D0) is State.DOWN
        assert brief(run.tell(TimerFired(BackoffTimer(D0)))) == ["start decode-0"]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    orders = run.tell(StartFailed(D0, run.incarnation(D0), "no"))
    assert lines(orders) == ["node-decode-0: no", "node-decode-0 is given up after 9 failures in a row"]
    assert run.state(D0) is State.GIVEN_UP
    # Restarting its pool gives it another chance.
    assert brief(run.tell(RestartAsked(2, ("decode",)))) == ["start decode-0"]


@pytest.mark.parametrize("name", [D0, P0, G0])
def test_what_is_silent_for_too_long_is_hung_and_replaced(name: ProcessName) -> None:
    run = booted(small(), Start)
    before = run.incarnation(name)
    assert run.tell(ProcessSilent(name, before, 4.9)) == []  # hung_s is 5
    orders = run.tell(ProcessSilent(name, before, 5.1))
    assert lines(orders) == [f"{name} has not answered for 5.1 s"]
    assert [order for order in orders if isinstance(order, Kill)] == [Kill(name, before)]
    assert run.incarnation(name) > before
    # It wakes up and says that it serves: what is old is ended.
    assert run.tell(ProcessServes(name, before, "old")) == [Kill(name, before)]
    assert run.tell(ProcessSilent(name, before, 9.0)) == run.tell(ProcessDied(name, before)) == []


def test_gateways_hear_of_a_death_before_and_of_the_address_after_the_new_start() -> None:
    run = booted(small(decode=1), Start)
    (gone,) = [order for order in run.tell(ProcessDied(D0, run.incarnation(D0))) if isinstance(order, TellMembers)]
    assert gone.nodes == ((NodeId("prefill-0"), PREFILL, "node-prefill-0:1000000"), (NodeId("decode-0"), DECODE, ""))
    (back,) = [order for order in run.release() if isinstance(order, TellMembers)]
    assert back.nodes[1] == (NodeId("decode-0"), DECODE, "node-decode-0:1000003")


# --- drain ------------------------------------------------------------------------------------------------------------


def test_a_drained_node_finishes_stops_gives_back_what_it_had_and_stays_out_until_it_returns() -> None:
    run = booted(small(), Drain)
    assert run.tell(DrainAsked(2, "decode-1")) == [
        Drain(D1, 1_000_002, 30.0),
        Keep(run.done[0].parts, (D1,), {"prefill": 1, "decode": 2}),  # type: ignore[union-attr]
    ]
    orders = run.release()
    assert brief(orders) == ["stop decode-1"]
    assert Release(D1) in orders
    assert answers(orders) == [Answer(2)]
    assert run.state(D1) is State.DRAINED
    # Gateways do not expect it: it is no node that is down.
    assert nodes_told(orders) == ["prefill-0", "decode-0"]
    assert answers(run.tell(DrainAsked(3, "node-decode-1"))) == [Answer(3, "node-decode-1 is drained already")]
    orders = run.tell(ReturnAsked(4, "decode-1"))
    assert nodes_told(orders) == ["prefill-0", "decode-0", "decode-1"]
    assert brief(orders) == ["start decode-1", "settle decode-1"]
    assert answers(orders) == [Answer(4)]
    assert run.state(D1) is State.UP


def nodes_told(orders: list[Command]) -> list[str]:
    """Return the nodes that the last membership told has."""
    return [node for node, _, _ in [order for order in orders if isinstance(order, TellMembers)][-1].nodes]


def test_a_gateway_is_taken_from_the_others_view_before_it_refuses_anything() -> None:
    run = booted(small(gateways=2), Drain)
    orders = run.tell(DrainAsked(2, "gateway-1"))
    tell, drain = orders[:2]
    assert isinstance(tell, TellMembers)
    assert list(tell.gateways) == [0]
    assert drain == Drain(ProcessName("gateway-1"), 1_000_004, 30.0)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("decode-0", "node-decode-0 is the only process that generates for its model; --force drains it all the same"),
        ("gateway-0", "gateway-0 is the only gateway that serves; --force drains it all the same"),
        ("decode-9", "no node or gateway is called decode-9; there are: prefill-0, decode-0, gateway-0"),
    ],
)
def test_the_last_of_its_kind_is_drained_only_by_force(target: str, problem: str) -> None:
    run = booted(small(decode=1))
    assert run.tell(DrainAsked(2, target)) == [Answer(2, problem)]
    if "--force" in problem:
        assert answers(run.tell(DrainAsked(3, target, force=True))) == [Answer(3)]


def test_requests_that_do_not_end_do_not_keep_a_node() -> None:
    run = booted(small(), Drain)
    run.tell(DrainAsked(2, "decode-0"))
    orders = run.tell(ProcessDrained(D0, 1_000_001, clean=False))
    assert lines(orders) == ["node-decode-0: some requests did not end in time"]
    assert answers(orders) == [Answer(2)]


@pytest.mark.parametrize("fact", [ProcessDied(D0, 1_000_001), ProcessSilent(D0, 1_000_001, 6.0)])
def test_a_node_that_dies_while_it_drains_is_drained(fact: Event) -> None:
    run = booted(small(), Drain)
    run.tell(DrainAsked(2, "decode-0"))
    assert answers(run.tell(fact)) == [Answer(2)]
    assert run.state(D0) is State.DRAINED


# --- resize -----------------------------------------------------------------------------------------------------------


def test_growing_starts_fresh_names_and_is_done_when_gateways_know_them() -> None:
    run = booted(small(), Settle)
    orders = run.tell(ResizeAsked(2, "decode", 4))
    assert brief(orders) == ["start decode-2", "start decode-3", "settle decode-2", "settle decode-3"]
    assert answers(orders) == []
    assert answers(run.release()) == []
    assert answers(run.release()) == [Answer(2)]
    assert [pool.nodes for pool in run.controller.config.pools] == [1, 4]


def test_more_gateways_than_a_tenant_may_have_requests_are_refused() -> None:
    run = booted(replace(small(), tenants=(TenantConfig("t", requests_max=2),)), Settle)
    problem = "tenants[0].requests_max: must be at least 1 for each of 3 gateways, is 2"
    assert answers(run.tell(ResizeAsked(2, GATEWAYS, 3))) == [Answer(2, problem)]


def test_shrinking_drains_the_youngest_and_their_names_are_not_used_again() -> None:
    run = booted(small(decode=3))
    assert brief(run.tell(ResizeAsked(2, "decode", 1))) == [
        "drain decode-2",
        "drain decode-1",
        "stop decode-2",
        "stop decode-1",
    ]
    run.tell(ResizeAsked(3, "decode", 2))
    assert run.names == [P0, D0, G0, "node-decode-3"]


def test_what_does_not_serve_goes_first() -> None:
    run = booted(small(decode=3))
    run.tell(DrainAsked(2, "decode-0"))
    assert brief(run.tell(ResizeAsked(3, "decode", 2))) == []
    assert run.names == [P0, D1, "node-decode-2", G0]


def test_nodes_that_share_processes_come_and_go_with_them_to_the_exact_number() -> None:
    shared = small(decode=1)
    pool = replace(shared.pools[1], nodes=5, nodes_per_process=2, engine=replace(shared.pools[1].engine, name="profiled"))
    run = booted(replace(shared, pools=(shared.pools[0], pool)))
    run.tell(ResizeAsked(2, "decode", 3))  # 0 1, 2 3, 4: two processes go and a fresh one with one node comes
    hosted = [process.part.nodes for process in run.controller.processes if process.part.pool == "decode"]
    assert hosted == [("decode-0", "decode-1"), ("decode-5",)]


def test_gateways_are_resized_by_their_own_word() -> None:
    run = booted(small(gateways=2))
    assert brief(run.tell(ResizeAsked(2, "gateways", 1))) == ["drain gateway-1", "stop gateway-1"]
    # Numbers are ports too: a free one is used again.
    assert brief(run.tell(ResizeAsked(3, "gateways", 3))) == [
        "start gateway-1",
        "start gateway-2",
        "settle gateway-1",
        "settle gateway-2",
    ]


@pytest.mark.parametrize(
    ("group", "count", "problem"),
    [
        ("none", 2, "no pool is called none; there are: prefill, decode, gateways"),
        ("decode", 0, "decode must be 1 to 16384, not 0"),
        ("gateways", 5000, "gateways must be 1 to 1024, not 5000"),
    ],
)
def test_impossible_sizes_are_refused(group: str, count: int, problem: str) -> None:
    assert booted(small()).tell(ResizeAsked(2, group, count)) == [Answer(2, problem)]


def test_a_node_that_finds_no_room_is_told_and_tried_again() -> None:
    run = booted(small(), Start)
    run.tell(ResizeAsked(2, "decode", 3))
    orders = run.tell(StartFailed(ProcessName("node-decode-2"), 1_000_004, "no room"))
    assert answers(orders) == [Answer(2, "node-decode-2: no room")]
    assert brief(orders) == ["start decode-2"]


# --- restart ----------------------------------------------------------------------------------------------------------


def test_a_rolling_restart_takes_one_at_a_time_and_waits_until_gateways_know_it() -> None:
    run = booted(small(gateways=2))
    orders = run.tell(RestartAsked(2))
    one = ("drain {0}", "stop {0}", "start {0}", "settle {0}")
    expected = [text.format(name) for name in ("prefill-0", "decode-0", "decode-1", "gateway-0", "gateway-1") for text in one]
    assert brief(orders) == expected
    assert answers(orders) == [Answer(2)]
    assert all(process.restarts == 1 for process in some(run.controller.processes))


def test_where_only_one_generates_another_comes_first() -> None:
    run = booted(small(decode=1))
    assert brief(run.tell(RestartAsked(2, ("decode",)))) == [
        "start decode-1",
        "settle decode-1",
        "drain decode-0",
        "stop decode-0",
    ]
    assert run.names == [P0, G0, D1]


def test_a_rolling_restart_ends_at_its_first_problem() -> None:
    run = booted(small(), Start)
    assert brief(run.tell(RestartAsked(2, ("decode",)))) == ["drain decode-0", "stop decode-0", "start decode-0"]
    orders = run.tell(StartFailed(D0, run.incarnation(D0), "broken"))
    assert answers(orders) == [Answer(2, "node-decode-0: broken")]
    assert run.state(D1) is State.UP


def test_a_process_that_gateways_do_not_get_to_know_ends_the_restart() -> None:
    run = booted(small(), Settle)
    run.tell(RestartAsked(2, ("decode",)))
    orders = run.tell(ProcessSettled(D0, run.incarnation(D0), "gateway-0 is not ready"))
    assert answers(orders) == [Answer(2, "node-decode-0: gateway-0 is not ready")]


def test_one_thing_at_a_time() -> None:
    run = booted(small(decode=3), Drain)
    run.tell(DrainAsked(2, "decode-0"))
    for wish in (DrainAsked(3, "decode-1"), ResizeAsked(3, "decode", 9), RestartAsked(3), ReturnAsked(3, "decode-1")):
        problem = "draining node-decode-0 is under way; ask again when it is done"
        assert run.tell(wish) == [Answer(3, problem)]


# --- changed files ----------------------------------------------------------------------------------------------------


def test_a_file_that_says_the_same_changes_nothing() -> None:
    assert booted(small()).tell(ConfigGiven(2, small()))[-1] == Answer(2)
    assert brief(booted(small()).tell(ConfigGiven(2, small()))) == []


def test_sizes_are_applied_and_other_changes_only_when_restarts_are_wanted() -> None:
    given = small(decode=3, limits=LimitsConfig(waiting_max=7))
    run = booted(small())
    told = "the running cluster differs: limits.waiting_max 1024 -> 7; --restart applies it by restarting gateways in turn"
    assert run.tell(ConfigGiven(2, given)) == [Answer(2, told)]
    orders = run.tell(ConfigGiven(3, given, restart=True))
    assert brief(orders) == [
        "start decode-2",
        "settle decode-2",
        "drain gateway-0",
        "stop gateway-0",
        "start gateway-0",
        "settle gateway-0",
    ]
    assert answers(orders) == [Answer(3)]
    assert run.controller.config == given
    assert brief(run.tell(ConfigGiven(4, replace(given, pools=small().pools)))) == ["drain decode-2", "stop decode-2"]


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    ("changed", "placed_anew"),
    [
        ({"cpus": 2.0}, True),
        ({"resources": {"lpx": 1.0}}, True),
        ({"split": SplitConfig(ffn=2)}, True),
        ({"split": SplitConfig(across_hosts=True)}, True),
        ({"scheduler": SchedulerConfig(sequences_max=7)}, False),
    ],
)
def test_a_process_that_asks_for_something_else_now_is_placed_anew(
    changed: dict[str, Any], placed_anew: bool, resumed: bool
) -> None:
    prefill, decode = small().pools
    before = replace(small(), pools=(prefill, replace(decode, split=SplitConfig())))
    run = booted(before)
    if resumed:
        run, found = Run(Controller(before, last_kept(run))), found_of(run)
        run.tell(Resumed(found))
    given = replace(before, pools=(prefill, replace(before.pools[1], **changed)))
    orders = run.tell(ConfigGiven(3, given, restart=True))
    assert [order for order in orders if isinstance(order, Release)] == [Release(D0), Release(D1)] * placed_anew
    # Its place is given up only once it has stopped, and again only if something changes again.
    kinds = [type(order) for order in orders if isinstance(order, Stop | Release | Start) and D0 in str(order)]
    assert kinds[-2:] == ([Release, Start] if placed_anew else [Stop, Start])
    assert Release(D0) not in run.tell(RestartAsked(4, ("decode",)))


# --- the controller's own lives -----------------------------------------------------------------------------------------


def last_kept(run: Run) -> Keep:
    return [order for order in run.done if isinstance(order, Keep)][-1]


def found_of(run: Run, *names: str) -> tuple[Found, ...]:
    return tuple(
        Found(one.part, one.incarnation, one.address, one.fingerprints, one.state is State.DRAINING)
        for one in run.controller.processes
        if one.serves and (not names or one.part.name in names)
    )


def test_a_new_life_goes_on_with_what_runs_and_starts_what_does_not() -> None:
    run = booted(small())
    run.tell(ResizeAsked(2, "decode", 3))
    run.tell(DrainAsked(3, "decode-1"))
    again = Run(Controller(small(), last_kept(run)), now=2000.0)
    orders = again.tell(Resumed(found_of(run, P0, G0)))
    assert brief(orders) == ["start decode-0", "start decode-2"]
    assert again.state(D1) is State.DRAINED
    assert again.incarnation(P0) == 1_000_000
    assert again.incarnation(D0) == 2_000_000
    again.tell(ResizeAsked(4, "decode", 4))
    assert again.names[-1] == "node-decode-3"


def test_a_new_life_finishes_what_was_draining() -> None:
    shrinking = booted(small(decode=3), Drain)
    shrinking.tell(ResizeAsked(2, "decode", 2))
    again = Run(Controller(small(), last_kept(shrinking)))
    assert brief(again.tell(Resumed(found_of(shrinking)))) == ["drain decode-2", "stop decode-2"]
    assert again.names == [P0, D0, D1, G0]

    draining = booted(small(), Drain)
    draining.tell(DrainAsked(2, "decode-1"))
    again = Run(Controller(small(), last_kept(draining)))
    assert brief(again.tell(Resumed(found_of(draining)))) == ["drain decode-1", "stop decode-1"]
    assert again.state(D1) is State.DRAINED

    restarting = booted(small(), Drain)
    restarting.tell(RestartAsked(2, ("decode",)))
    again = Run(Controller(small(), last_kept(restarting)))
    assert brief(again.tell(Resumed(found_of(restarting)))) == ["drain decode-0", "stop decode-0", "start decode-0"]


def test_of_two_processes_of_a_name_the_younger_stays() -> None:
    run = booted(small())
    (one,) = found_of(run, D0)
    again = Run(Controller(small(), last_kept(run)))
    orders = again.tell(Resumed((*found_of(run), replace(one, incarnation=1_000_009))))
    assert [order for order in orders if isinstance(order, Kill)] == [Kill(D0, 1_000_001)]
    assert again.incarnation(D0) == 1_000_009


# --- the end ----------------------------------------------------------------------------------------------------------


def test_the_end_lets_gateways_finish_then_stops_the_nodes() -> None:
    run = booted(small(), Drain)
    assert brief(run.tell(EndAsked(2, 12.0))) == ["drain gateway-0"]
    assert run.held == [Drain(G0, 1_000_003, 12.0, lingers=False)]
    orders = run.release()
    assert brief(orders) == ["stop gateway-0", "stop prefill-0", "stop decode-0", "stop decode-1"]
    assert answers(orders) == [Answer(2)]
    assert run.names == []


def test_the_end_says_what_did_not_finish_and_interrupts_what_is_under_way() -> None:
    run = booted(small(), Drain)
    run.tell(DrainAsked(2, "decode-1"))
    assert answers(run.tell(EndAsked(3, 1.0))) == [Answer(2, "the cluster is being ended")]
    orders = run.tell(ProcessDrained(G0, 1_000_003, clean=False))
    assert answers(orders) == [Answer(3, "gateway-0: some requests did not end in time")]
    assert run.names == []


def test_the_end_does_not_wait_for_what_starts_or_waits() -> None:
    run = booted(small(), Start)
    run.tell(ProcessDied(D0, run.incarnation(D0)))
    run.tell(ProcessDied(D1, run.incarnation(D1)))
    run.tell(StartFailed(D1, run.incarnation(D1), "no"))
    orders = run.tell(EndAsked(2, 1.0))
    assert answers(orders) == [Answer(2)]
    assert Kill(D0, 1_000_004) in orders
    assert ClearTimer(BackoffTimer(D1)) in orders
    assert run.names == []


# --- at random --------------------------------------------------------------------------------------------------------


class Chaos:
    """A world in which processes die, hang and fail to start, orders come about in any order, and operators wish at any time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        self.config = small(decode=3, gateways=2)
        self.controller = Controller(self.config)
        self.pending: list[Command] = []
        self.timers: dict[ProcessName, float] = {}
        #: Starts of each process that were ordered and not ended, and those that serve.
        self.lives: dict[ProcessName, int] = {}
        self.up: dict[tuple[ProcessName, int], str] = {}
        self.kept: Keep | None = None
        self.asked: list[int] = []
        self.answered: list[int] = []

    def wish(self, wish: Event) -> None:
        self.asked.append(wish.serial)  # type: ignore[union-attr]
        self.tell(wish)

    def tell(self, event: Event) -> None:
        for order in self.controller.handle(event, self.now):
            self.take(order)
        self.controller.validate()
        self.check()

    def take(self, order: Command) -> None:
        match order:
            case Start(part, incarnation):
                assert self.lives.get(part.name, 0) < incarnation, f"{part.name} is started as {incarnation} again"
                assert part.name not in {name for name, _ in self.up}, f"{part.name} is started twice"
                self.lives[part.name] = incarnation
                self.pending.append(order)
            case Drain() | Stop() | Settle():
                self.pending.append(order)
            case Kill(name, incarnation):
                self.up.pop((name, incarnation), None)
                self.pending = [
                    one
                    for one in self.pending
                    if (getattr(one, "name", None) or one.part.name, one.incarnation) != (name, incarnation)  # type: ignore[union-attr]
                ]
            case SetTimer(BackoffTimer(name), at):
                self.timers[name] = at
            case ClearTimer(BackoffTimer(name)):
                del self.timers[name]
            case Answer(serial, _):
                self.answered.append(serial)
            case Keep():
                self.kept = order
            case _:
                pass

    def check(self) -> None:
        """Every wanted process runs, starts, waits, was given up, or is kept out: nothing is forgotten."""
        starting = {one.part.name for one in self.pending if isinstance(one, Start)}
        for process in self.controller.processes:
            name = process.part.name
            match process.state:
                case State.STARTING:
                    assert name in starting, name
                case State.UP:
                    assert (name, process.incarnation) in self.up, name
                case State.DRAINING | State.STOPPING:
                    assert any(getattr(one, "name", None) == name for one in self.pending), name
                case State.DOWN:
                    assert name in self.timers, name
                case State.GIVEN_UP | State.DRAINED:
                    assert (name, process.incarnation) not in self.up, name

    def step(self, failing: float) -> None:
        """Let one thing happen."""
        self.now += self.random.uniform(0.0, 2.0)
        due = [name for name, at in self.timers.items() if at <= self.now]
        if due:
            del self.timers[due[0]]
            self.tell(TimerFired(BackoffTimer(due[0])))
        elif self.up and self.random.random() < failing:
            name, incarnation = self.random.choice(sorted(self.up))
            if self.random.random() < 0.5:
                del self.up[name, incarnation]
                self.pending = [one for one in self.pending if getattr(one, "name", None) != name]
                self.tell(ProcessDied(name, incarnation)) if self.serves(name) else self.revive(name, incarnation)
            else:
                self.tell(ProcessSilent(name, incarnation, self.random.uniform(0.0, 8.0)))
        elif self.pending:
            self.finish(self.pending.pop(self.random.randrange(len(self.pending))), failing)

    def serves(self, name: ProcessName) -> bool:
        return any(process.part.name == name and process.serves for process in self.controller.processes)

    def revive(self, name: ProcessName, incarnation: int) -> None:
        """A process that is being stopped is gone a little earlier."""
        self.tell(ProcessStopped(name, incarnation))

    def finish(self, order: Command, failing: float) -> None:
        fact = outcome_of(order)
        if isinstance(order, Start) and self.random.random() < failing:
            fact = StartFailed(order.part.name, order.incarnation, "by chance")
        if isinstance(fact, ProcessServes):
            self.up[fact.name, fact.incarnation] = fact.address
        elif isinstance(fact, ProcessStopped):
            self.up.pop((fact.name, fact.incarnation), None)
        elif isinstance(fact, ProcessSettled) and self.random.random() < failing:
            fact = replace(fact, problem="by chance")
        if fact is not None:
            self.tell(fact)

    def reborn(self) -> None:
        """The controller is started again: its timers and what it waited for are gone, the processes are not."""
        self.now += 1.0
        former = {process.part.name: process for process in self.controller.processes}
        self.pending.clear()
        self.timers.clear()
        self.asked = list(self.answered)
        self.controller = Controller(self.config, self.kept)
        found = [
            Found(former[name].part, incarnation, address, {"default": "f"}, former[name].state is State.DRAINING)
            for (name, incarnation), address in self.up.items()
        ]
        self.tell(Resumed(tuple(found)))


def wishes(chance: random.Random, serial: int) -> Iterator[Event]:
    yield DrainAsked(serial, chance.choice(["decode-0", "decode-1", "gateway-0", "prefill-0"]), force=chance.random() < 0.5)
    yield ReturnAsked(serial, chance.choice(["decode-0", "decode-1", "gateway-0", "prefill-0"]))
    yield ResizeAsked(serial, chance.choice(["decode", "prefill", "gateways"]), chance.randint(1, 5))
    yield RestartAsked(serial, chance.choice([(), ("decode",), ("gateways",)]))


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_every_process_is_accounted_for_and_every_wish_answered(seed: int) -> None:
    chaos = Chaos(seed)
    chaos.wish(BootAsked(1))
    while chaos.pending:
        chaos.step(0.0)
    serial = 1
    for _ in range(400):
        if chaos.random.random() < 0.1:
            serial += 1
            chaos.wish(chaos.random.choice(list(wishes(chaos.random, serial))))
        elif chaos.random.random() < 0.01:
            chaos.reborn()
        else:
            chaos.step(0.1)
    # Nothing fails any more: all that is wanted comes up.
    while chaos.pending or chaos.timers:
        chaos.step(0.0)
    assert sorted(chaos.asked) == sorted(chaos.answered)
    states = {process.state for process in chaos.controller.processes}
    assert states <= {State.UP, State.DRAINED, State.GIVEN_UP}, f"seed {seed}: {states}"
    chaos.wish(EndAsked(serial + 1, 1.0))
    while chaos.pending:
        chaos.step(0.0)
    assert chaos.controller.processes == ()
    assert chaos.up == {}
