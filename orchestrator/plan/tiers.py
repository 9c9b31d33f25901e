"""Sizes what is below a plan's GPU memory, CPU memory of its hosts and CMX: by what the trace comes back to and by simulating it.

A store that has room for every context that is asked for again loses nothing, and less may do nearly as well: memory is tried
in steps, and CMX behind the smallest of them. Nobody publishes what a host's memory or CMX costs, so less is taken to be cheaper.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from orchestrator.core.config import StoreConfig
from orchestrator.core.types import PoolName
from orchestrator.plan.demand import Demand
from orchestrator.profiles.catalog import Catalog
from orchestrator.profiles.resolve import Resolved, resolve

#: Shares of what the trace comes back to that hosts' memory is tried with.
SHARES = (0.125, 0.25, 0.5, 1.0)
#: Hit rates that differ by less are as good as each other.
HIT_RATE_NEAR = 0.002
#: Where segments are to go; whoever serves the plan gives the place that its hosts share.
CMX = "file:///cmx"


@dataclass(frozen=True, slots=True)
class Tried:
    """What a plan reached with something below its memory, or with nothing."""

    store: StoreConfig | None
    #: Shares of all prompt tokens, by the tier they were in.
    hbm: float
    cpu: float
    cmx: float
    #: At the asked percentile.
    ttft_s: float

    @property
    def hit_rate(self) -> float:
        return self.hbm + self.cpu + self.cmx


#: Simulates clusters and returns what each reached, in their order.
MeasureTiers = Callable[[Sequence[Resolved]], Sequence[Tried]]


def size_tiers(demand: Demand, plan: Resolved, catalog: Catalog, measure: MeasureTiers) -> tuple[Tried, ...]:
    """Try what may be below a plan's memory; returns all that was tried, nothing first and then by size."""
    stores = (None, *_stores(demand, plan, catalog))
    return tuple(measure([resolve(replace(plan.config, store=store), catalog) for store in stores]))


def best_of(tried: Sequence[Tried]) -> Tried:
    """Return the smallest that is as good as the best."""
    most = max(one.hit_rate for one in tried)
    return next(one for one in tried if one.hit_rate >= most - HIT_RATE_NEAR)


def _stores(demand: Demand, plan: Resolved, catalog: Catalog) -> list[StoreConfig]:
    """Return the stores to try, smallest first: with room for a segment at least, and no more than hosts of these chips have."""
    least, wanted, most = 1, 0.0, float("inf")
    for pool in plan.config.pools:
        hardware, block_bytes = pool.hardware, plan.hardware[PoolName(pool.name)].block_bytes
        host_nodes = max(1, hardware.host_chips // hardware.chips)
        hosts = ceil(pool.nodes / host_nodes)
        wanted = max(wanted, demand.held[-1].tokens / pool.engine.block_tokens * block_bytes / hosts)
        least = max(least, StoreConfig().segment_blocks * block_bytes)
        memory = catalog.chip(hardware.chip, hardware.chips * hardware.group_nodes).host
        if memory is not None:
            most = min(most, memory.capacity_bytes * host_nodes * hardware.chips)
    sizes = dict.fromkeys(int(min(max(share * wanted, least), most)) for share in SHARES)
    first, *others = [StoreConfig(cpu_bytes=size) for size in sizes]
    shared = replace(first, cmx=CMX, cmx_bytes=int(max(wanted, least)))
    return [first, shared, *others]
