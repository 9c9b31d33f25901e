"""Sizing what is below a plan's memory: what is tried, and which of it is enough."""

from collections.abc import Sequence

from orchestrator.core.config import ClusterConfig, EngineConfig, HardwareConfig, ModelConfig, PoolConfig, StoreConfig
from orchestrator.core.types import PoolKind, PoolName
from orchestrator.plan.demand import demand_of
from orchestrator.plan.tiers import CMX, HIT_RATE_NEAR, SHARES, Tried, best_of, size_tiers
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import Resolved, resolve
from tests.sim.worlds import agents

CATALOG = Catalog.load()
DEMAND = demand_of(agents(6, 4, seed=1))


def plan(nodes: int, host_chips: int = 4) -> Resolved:
    """Return a cluster of so many nodes of one chip."""
    hardware = HardwareConfig(chip="h200", host_chips=host_chips)
    pool = PoolConfig("p", PoolKind.AGGREGATED, nodes=nodes, engine=EngineConfig(memory_fraction=0.9), hardware=hardware)
    return resolve(ClusterConfig(models={"default": ModelConfig(shape="gpt-oss-120b")}, pools=(pool,)), CATALOG)


def tried_for(resolved: Resolved) -> list[StoreConfig | None]:
    def measure(clusters: Sequence[Resolved]) -> list[Tried]:
        return [Tried(one.config.store, 0.5, 0.0, 0.0, 1.0) for one in clusters]

    return [one.store for one in size_tiers(DEMAND, resolved, CATALOG, measure)]


def test_nothing_is_tried_first_and_then_more_and_more_up_to_all_that_is_asked_for_again() -> None:
    resolved = plan(nodes=4)
    nothing, *stores = tried_for(resolved)
    assert nothing is None
    sizes = [store.cpu_bytes for store in stores if store is not None]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(SHARES)
    # four nodes are one host, which is to hold every token's KV
    block_bytes = resolved.hardware[PoolName("p")].block_bytes
    assert sizes[-1] == int(DEMAND.held[-1].tokens / 64 * block_bytes)
    shared = [store for store in stores if store is not None and store.cmx]
    assert [(store.cpu_bytes, store.cmx, store.cmx_bytes) for store in shared] == [(sizes[0], CMX, sizes[-1])]


def test_several_hosts_hold_a_part_each() -> None:
    one, two = tried_for(plan(nodes=4))[-1], tried_for(plan(nodes=8))[-1]
    assert one is not None
    assert two is not None
    assert abs(one.cpu_bytes - 2 * two.cpu_bytes) <= 1


def test_no_host_is_given_more_than_it_has() -> None:
    tight = CATALOG.overridden({"x86.capacity_bytes": 1e6})
    stores = [one.store for one in size_tiers(DEMAND, plan(nodes=1), tight, lambda clusters: [
        Tried(cluster.config.store, 0.5, 0.0, 0.0, 1.0) for cluster in clusters
    ])]  # fmt: skip
    assert max(store.cpu_bytes for store in stores if store is not None) == 4_000_000


def test_the_smallest_that_is_nearly_as_good_as_the_best_is_enough() -> None:
    sizes = [None, StoreConfig(cpu_bytes=1), StoreConfig(cpu_bytes=2), StoreConfig(cpu_bytes=3)]
    rates = (0.5, 0.8, 0.9 - HIT_RATE_NEAR / 2, 0.9)
    tried = [Tried(store, 0.5, rate - 0.5, 0.0, 1.0) for store, rate in zip(sizes, rates, strict=True)]
    assert best_of(tried) is tried[2]
    assert best_of(tried[:1]) is tried[0]
