"""Members: which processes a cluster file gives, what they ask Ray for, and when one is given up."""

import pytest

from orchestrator.core.config import ClusterConfig, EngineConfig, GatewayConfig, PoolConfig
from orchestrator.core.types import PoolKind
from orchestrator.fleet.members import (
    BACKOFF_S_MAX,
    FAILURES_MAX,
    SHARE_CPU,
    STABLE_S,
    Member,
    State,
    bundles_of,
    fits_nowhere,
    members_of,
    pools_by_node,
    unplaceable,
)


def cluster() -> ClusterConfig:
    engine = EngineConfig(name="profiled")
    crowd = PoolConfig("crowd", PoolKind.AGGREGATED, nodes=5, nodes_per_process=2, engine=engine)
    rack = PoolConfig("rack", PoolKind.PREFILL, nodes=2, resources={"nvl72": 1}, gpus=1, cpus=4)
    return ClusterConfig(gateway=GatewayConfig(count=2), pools=(rack, crowd))


def test_nodes_that_share_a_process_share_a_member_and_the_last_takes_the_rest() -> None:
    members = members_of(cluster())
    assert [(member.name, member.nodes) for member in members] == [
        ("node-rack-0", ("rack-0",)),
        ("node-rack-1", ("rack-1",)),
        ("node-crowd-0", ("crowd-0", "crowd-1")),
        ("node-crowd-2", ("crowd-2", "crowd-3")),
        ("node-crowd-4", ("crowd-4",)),
        ("gateway-0", ()),
        ("gateway-1", ()),
    ]
    assert list(pools_by_node(cluster())) == ["rack-0", "rack-1", "crowd-0", "crowd-1", "crowd-2", "crowd-3", "crowd-4"]


def test_each_pool_is_a_group_and_who_asks_for_nothing_asks_for_a_share_of_a_core() -> None:
    assert bundles_of(members_of(cluster())) == {
        "pool rack": [{"CPU": 4, "GPU": 1, "nvl72": 1}] * 2,
        "pool crowd": [{"CPU": SHARE_CPU}] * 3,
        "gateways": [{"CPU": SHARE_CPU}] * 2,
    }


def test_what_cannot_be_placed_is_told_with_what_was_asked_and_what_there_is() -> None:
    offers = [{"CPU": 2.0, "memory": 1e9, "node:10.0.0.1": 1.0}, {"CPU": 2.0, "nvl72": 1.0}]
    assert unplaceable("pool rack", [{"CPU": 4, "nvl72": 1}] * 2, offers) == (
        "pool rack: 2 processes asking for {CPU: 4, nvl72: 1} each cannot be placed; the cluster offers {CPU: 4, nvl72: 1}"
    )
    # Enough in the sum is not enough: one machine must have it.
    assert fits_nowhere({"CPU": 4}, offers)
    assert not fits_nowhere({"CPU": 2, "nvl72": 1}, offers)


def test_the_first_death_is_answered_at_once_and_later_ones_ever_more_slowly() -> None:
    member = Member("node-a-0", "pool a", 0, {})
    waits = []
    for _ in range(FAILURES_MAX):
        member.went_down(0.0)
        assert member.state is State.DOWN
        waits.append(member.backoff_s)
    assert waits[:4] == [0.0, 0.5, 1.0, 2.0]
    assert waits[-1] == BACKOFF_S_MAX
    member.went_down(0.0)
    assert member.state is State.GIVEN_UP


@pytest.mark.parametrize(("life_s", "failures"), [(STABLE_S - 1, 4), (STABLE_S, 1)])
def test_a_stable_life_makes_the_failures_before_it_forgotten(life_s: float, failures: int) -> None:
    member = Member("node-a-0", "pool a", 0, {}, failures=3)
    member.went_up(100.0)
    member.went_down(100.0 + life_s)
    assert member.failures == failures
