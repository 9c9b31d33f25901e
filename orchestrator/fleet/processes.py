"""The processes of a cluster: which there must be, what each asks Ray for, what each is doing and when it may be started again.

Plain data, no Ray and no clock: `controller.py` decides with it, `keeper.py` acts on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from orchestrator.core.config import GATEWAYS, STORES, ClusterConfig, PoolConfig
from orchestrator.core.types import NodeId, PoolName

ProcessName = NewType("ProcessName", str)

#: CPU share a process asks for whose pool names no resource at all: Ray places nothing that asks for nothing.
SHARE_CPU = 0.001
#: Starts in a row that may fail, or lead to a life shorter than `STABLE_S`, before a process is given up.
FAILURES_MAX = 8
STABLE_S = 60.0
BACKOFF_S_MAX = 30.0
#: Resources that Ray invents itself and nobody asks for.
_RAYS_OWN = ("memory", "object_store_memory", "node:")


class State(StrEnum):
    """What a process of the cluster is doing."""

    STARTING = "starting"
    UP = "up"
    DRAINING = "draining"  # takes nothing new, what runs ends
    STOPPING = "stopping"  # closes what it holds
    DOWN = "down"  # waits to be started again
    GIVEN_UP = "given up"
    DRAINED = "drained"  # kept out by an operator


class Then(StrEnum):
    """What becomes of a process once it has stopped."""

    AGAIN = "again"
    OUT = "out"
    AWAY = "away"


@dataclass(frozen=True, slots=True)
class Part:
    """What one process is there for: some nodes of a pool, drafts for those of another, a gateway, or a host's store."""

    #: None for a gateway and for a store.
    pool: PoolName | None
    #: A gateway's, a drafter's or a store's number, or that of the first node.
    number: int
    #: None of a process of a pool that drafts.
    nodes: tuple[NodeId, ...] = ()
    #: A store's host, as Ray names it; empty for all others, which run where there is room.
    host: str = ""

    @property
    def is_store(self) -> bool:
        """Whether it is a host's store."""
        return bool(self.host)

    @property
    def is_gateway(self) -> bool:
        """Whether it is a gateway."""
        return self.pool is None and not self.host

    @property
    def name(self) -> ProcessName:
        """Its name in the cluster."""
        if self.is_store:
            return ProcessName(f"store-{self.number}")
        if self.pool is None:
            return ProcessName(f"gateway-{self.number}")
        return ProcessName(f"node-{self.nodes[0]}" if self.nodes else f"drafter-{self.pool}-{self.number}")

    @property
    def group(self) -> str:
        """What operators call the processes of its kind."""
        if self.is_store:
            return STORES
        return GATEWAYS if self.pool is None else self.pool

    @property
    def size(self) -> int:
        """How much it adds to its group."""
        return len(self.nodes) or 1


@dataclass(slots=True)
class Process:
    """One process that the cluster must have, and how it is."""

    part: Part
    state: State = State.DOWN
    #: Grows with each start.
    incarnation: int = 0
    restarts: int = 0
    #: Starts in a row without a stable life after.
    failures: int = 0
    up_since: float = 0.0
    #: gRPC address of a node process or store, URL of a gateway; empty until it was up once.
    address: str = ""
    #: Where those of its nodes are that have an address of their own.
    node_addresses: Mapping[NodeId, str] = field(default_factory=lambda: {})
    #: Names the checkpoint of each model it serves.
    fingerprints: Mapping[str, str] = field(default_factory=lambda: {})
    #: What Ray keeps for it, and how it was placed; None where nothing is known to be kept.
    kept: tuple[str, list[dict[str, float]]] | None = None
    #: Set while it drains or stops.
    then: Then | None = None

    @property
    def serves(self) -> bool:
        """True while others may talk to it."""
        return self.state in (State.UP, State.DRAINING)

    def address_of(self, node: NodeId) -> str:
        """Return where a node of it is; empty while it does not serve."""
        return self.node_addresses.get(node, self.address) if self.serves else ""

    def went_up(self, now: float) -> None:
        """Note that it serves."""
        self.state, self.up_since = State.UP, now

    def went_down(self, now: float) -> None:
        """Note that it died, hung or could not start."""
        stable = self.state is State.UP and now - self.up_since >= STABLE_S
        self.failures = 1 if stable else self.failures + 1
        self.state = State.GIVEN_UP if self.failures > FAILURES_MAX else State.DOWN

    @property
    def backoff_s(self) -> float:
        """Seconds to wait before the next start: none after the first death, then doubling."""
        return 0.0 if self.failures <= 1 else min(0.5 * 2.0 ** (self.failures - 2), BACKOFF_S_MAX)


def parts_of(config: ClusterConfig) -> list[Part]:
    """Return what a cluster file asks for: processes by pool, then gateways."""
    parts = [part for pool in config.pools for part in node_parts(pool, 0, pool.nodes)]
    return [*parts, *(Part(None, number) for number in range(config.gateway.count))]


def node_parts(pool: PoolConfig, first: int, count: int) -> list[Part]:
    """Return processes for `count` nodes of a pool, numbered from `first`; of one that drafts so many that have none."""
    if pool.drafter is not None:
        return [Part(PoolName(pool.name), number) for number in range(first, first + count)]
    parts: list[Part] = []
    together = pool.split.attention if pool.split is not None else pool.nodes_per_process
    for number in range(first, first + count, together):
        last = min(number + together, first + count)
        nodes = tuple(pool.node_id(node) for node in range(number, last))
        parts.append(Part(PoolName(pool.name), number, nodes))
    return parts


def pools_by_node(config: ClusterConfig) -> dict[NodeId, PoolName]:
    """Return every node of a cluster file and its pool, in the file's order."""
    return {node: part.pool for part in parts_of(config) if part.pool is not None for node in part.nodes}


def pool_of(config: ClusterConfig, part: Part) -> PoolConfig:
    """Return the pool of a process that is of one."""
    return next(pool for pool in config.pools if pool.name == part.pool)


def bundles_of(config: ClusterConfig, part: Part) -> list[dict[str, float]]:
    """Return what a process asks Ray for; a store nothing: it goes where nodes are.

    A group of split decode asks for its attention ranks, one a node, and then for its FFN ranks; all others for one.
    """
    if part.is_store:
        return []
    if part.pool is None:
        return [_bundle(config.gateway.resources)]
    pool = pool_of(config, part)
    own = _bundle({"CPU": pool.cpus, "GPU": pool.gpus, **pool.resources})
    if pool.split is None:
        return [own]
    ffn = _bundle({"CPU": pool.split.cpus, "GPU": pool.split.gpus, **pool.split.resources})
    return [dict(own) for _ in part.nodes] + [dict(ffn) for _ in range(pool.split.ffn)]


def strategy_of(config: ClusterConfig, part: Part) -> str:
    """Return how Ray places what a process asks for: on one host, or, as close together as there is room, on several."""
    split = pool_of(config, part).split if part.pool is not None else None
    return "PACK" if split is not None and split.across_hosts else "STRICT_PACK"


def unplaceable(config: ClusterConfig, parts: Sequence[Part], offers: Sequence[Mapping[str, float]]) -> str | None:
    """Return the line that tells the operator which processes no Ray node can host; None if each could be hosted by some.

    Args:
        config: the cluster's.
        parts: the processes to place.
        offers: the Ray nodes' resources.
    """
    for part in parts:
        for bundle in bundles_of(config, part):
            if fits_nowhere(bundle, offers):
                return cannot_be_placed(part.group, sum(other.group == part.group for other in parts), [bundle], offers)
    return None


def cannot_be_placed(
    group: str, count: int, bundles: Sequence[Mapping[str, float]], offers: Sequence[Mapping[str, float]]
) -> str:
    """Return the line that says what was asked for, all of it together, and what there is."""
    total: dict[str, float] = {}
    for offer in offers:
        for name, amount in offer.items():
            if not name.startswith(_RAYS_OWN):
                total[name] = total.get(name, 0.0) + amount
    asked: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            asked[name] = asked.get(name, 0.0) + amount
    asking = f"{count} process{'es' if count > 1 else ''} asking for {_listed(asked)} each"
    kind = group if group in (GATEWAYS, STORES) else f"pool {group}"
    return f"{kind}: {asking} cannot be placed; the cluster offers {_listed(total)}"


def fits_nowhere(bundle: Mapping[str, float], offers: Sequence[Mapping[str, float]]) -> bool:
    """Return whether no Ray node, even empty, has what a bundle asks for."""
    return not any(all(offer.get(name, 0.0) >= amount for name, amount in bundle.items()) for offer in offers)


def _bundle(asked: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in asked.items() if amount > 0} or {"CPU": SHARE_CPU}


def _listed(resources: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in sorted(resources.items())) + "}"
