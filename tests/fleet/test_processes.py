"""Processes: which ones a cluster file gives, what they ask Ray for, and when one is given up."""

import pytest

from orchestrator.core.config import ClusterConfig, PoolConfig, SplitConfig
from orchestrator.core.types import NodeId, PoolKind, PoolName
from orchestrator.fleet.processes import (
    BACKOFF_S_MAX,
    FAILURES_MAX,
    SHARE_CPU,
    STABLE_S,
    Part,
    Process,
    State,
    bundles_of,
    cannot_be_placed,
    fits_nowhere,
    parts_of,
    pools_by_node,
    strategy_of,
    unplaceable,
)
from tests.fleet.clusters import crowded

PART = Part(PoolName("a"), 0, (NodeId("a-0"),))


def test_nodes_that_share_a_process_share_a_part_and_the_last_takes_the_rest() -> None:
    assert [(part.name, part.nodes) for part in parts_of(crowded())] == [
        ("node-rack-0", ("rack-0",)),
        ("node-rack-1", ("rack-1",)),
        ("node-crowd-0", ("crowd-0", "crowd-1")),
        ("node-crowd-2", ("crowd-2", "crowd-3")),
        ("node-crowd-4", ("crowd-4",)),
        ("gateway-0", ()),
        ("gateway-1", ()),
    ]
    assert list(pools_by_node(crowded())) == ["rack-0", "rack-1", "crowd-0", "crowd-1", "crowd-2", "crowd-3", "crowd-4"]


def test_who_asks_for_nothing_asks_for_a_share_of_a_core() -> None:
    config = crowded()
    assert [bundles_of(config, part) for part in parts_of(config)] == [
        *[[{"CPU": 4, "GPU": 1, "nvl72": 1}]] * 2,
        *[[{"CPU": SHARE_CPU}]] * 5,
    ]


def test_a_group_asks_for_each_of_its_ranks_and_one_machine_must_have_all() -> None:
    split = SplitConfig(attention=2, ffn=1, cpus=2)
    pool = PoolConfig("halves", PoolKind.DECODE, nodes=3, cpus=1, split=split)
    config = ClusterConfig(pools=(pool,))
    groups = [part for part in parts_of(config) if part.pool is not None]
    assert [part.nodes for part in groups] == [("halves-0", "halves-1"), ("halves-2",)]
    assert [bundles_of(config, part) for part in groups] == [[{"CPU": 1}, {"CPU": 1}, {"CPU": 2}], [{"CPU": 1}, {"CPU": 2}]]
    assert cannot_be_placed("halves", 1, bundles_of(config, groups[0]), [{"CPU": 3.0}]) == (
        "pool halves: 1 process asking for {CPU: 4} each cannot be placed; the cluster offers {CPU: 3}"
    )


@pytest.mark.parametrize(("across", "strategy"), [(False, "STRICT_PACK"), (True, "PACK")])
def test_only_a_group_that_may_is_placed_on_several_hosts(across: bool, strategy: str) -> None:
    halves = PoolConfig("halves", PoolKind.DECODE, split=SplitConfig(across_hosts=across))
    config = ClusterConfig(pools=(halves, PoolConfig("whole", PoolKind.PREFILL)))
    found = {part.group: strategy_of(config, part) for part in parts_of(config)}
    assert found == {"halves": strategy, "whole": "STRICT_PACK", "gateways": "STRICT_PACK"}


def test_nodes_of_a_group_have_addresses_of_their_own_while_it_serves() -> None:
    process = Process(PART, address="leader:1", node_addresses={NodeId("b"): "follower:2"})
    assert process.address_of(NodeId("b")) == ""
    process.went_up(0.0)
    assert [process.address_of(NodeId(name)) for name in "ab"] == ["leader:1", "follower:2"]


def test_what_cannot_be_placed_is_told_with_what_was_asked_and_what_there_is() -> None:
    config, offers = crowded(), [{"CPU": 2.0, "memory": 1e9, "node:10.0.0.1": 1.0}, {"CPU": 2.0, "GPU": 1.0, "nvl72": 1.0}]
    assert unplaceable(config, parts_of(config), offers) == (
        "pool rack: 2 processes asking for {CPU: 4, GPU: 1, nvl72: 1} each cannot be placed; "
        "the cluster offers {CPU: 4, GPU: 1, nvl72: 1}"
    )
    # Enough in the sum is not enough: one machine must have it.
    assert fits_nowhere({"CPU": 4}, offers)
    assert unplaceable(config, parts_of(config), [*offers, {"CPU": 8.0, "GPU": 1.0, "nvl72": 2.0}]) is None


def test_the_first_death_is_answered_at_once_and_later_ones_ever_more_slowly() -> None:
    process = Process(PART)
    waits = []
    for _ in range(FAILURES_MAX):
        process.went_down(0.0)
        assert process.state is State.DOWN
        waits.append(process.backoff_s)
    assert waits[:4] == [0.0, 0.5, 1.0, 2.0]
    assert waits[-1] == BACKOFF_S_MAX
    process.went_down(0.0)
    assert process.state is State.GIVEN_UP


@pytest.mark.parametrize(("life_s", "failures"), [(STABLE_S - 1, 4), (STABLE_S, 1)])
def test_a_stable_life_makes_the_failures_before_it_forgotten(life_s: float, failures: int) -> None:
    process = Process(PART, failures=3)
    process.went_up(100.0)
    process.went_down(100.0 + life_s)
    assert process.failures == failures
