"""The processes a cluster must have: which nodes they host, what they ask Ray for, and how often one may be started again.

Plain data, no Ray: `fleet.py` acts on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orchestrator.core.config import ClusterConfig, PoolConfig
from orchestrator.core.types import GatewayId, NodeId, PoolName

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
    DOWN = "down"
    GIVEN_UP = "given up"


@dataclass(slots=True)
class Member:
    """One process the cluster must have: some nodes of a pool, or a gateway."""

    name: str
    #: Name of its placement group, its bundle there, and what the bundle asks for.
    group: str
    index: int
    bundle: dict[str, float]
    pool: PoolConfig | None = None
    nodes: tuple[NodeId, ...] = ()
    gateway: GatewayId | None = None
    state: State = State.STARTING
    #: Grows with each start.
    incarnation: int = 0
    restarts: int = 0
    #: Starts in a row without a stable life after.
    failures: int = 0
    up_since: float = 0.0
    #: gRPC address of a node process, URL of a gateway; empty until it was up once.
    address: str = ""
    #: Names the checkpoint of each model it serves.
    fingerprints: dict[str, str] = field(default_factory=lambda: {})
    #: Ray's handle of the actor.
    handle: Any = None

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


def members_of(config: ClusterConfig) -> list[Member]:
    """Return the processes a cluster file asks for: nodes by pool, then gateways."""
    members: list[Member] = []
    for pool in config.pools:
        nodes = node_ids(pool)
        bundle = _bundle({"CPU": pool.cpus, "GPU": pool.gpus, **pool.resources})
        for index, first in enumerate(range(0, pool.nodes, pool.nodes_per_process)):
            hosted = nodes[first : first + pool.nodes_per_process]
            members.append(Member(f"node-{hosted[0]}", f"pool {pool.name}", index, bundle, pool=pool, nodes=hosted))
    for number in range(config.gateway.count):
        bundle = _bundle(config.gateway.resources)
        members.append(Member(f"gateway-{number}", "gateways", number, bundle, gateway=GatewayId(number)))
    return members


def node_ids(pool: PoolConfig) -> tuple[NodeId, ...]:
    """Return the ids of a pool's nodes."""
    return tuple(NodeId(f"{pool.name}-{number}") for number in range(pool.nodes))


def pools_by_node(config: ClusterConfig) -> dict[NodeId, PoolName]:
    """Return every node of a cluster file and its pool, in the file's order."""
    return {node: PoolName(pool.name) for pool in config.pools for node in node_ids(pool)}


def bundles_of(members: Sequence[Member]) -> dict[str, list[dict[str, float]]]:
    """Return the bundles of each placement group, in order of their index."""
    groups: dict[str, list[dict[str, float]]] = {}
    for member in members:
        groups.setdefault(member.group, []).append(member.bundle)
    return groups


def unplaceable(group: str, bundles: Sequence[Mapping[str, float]], offers: Sequence[Mapping[str, float]]) -> str:
    """Return the line that tells the operator why a group cannot be placed; `offers` are the Ray nodes' resources."""
    total: dict[str, float] = {}
    for offer in offers:
        for name, amount in offer.items():
            if not name.startswith(_RAYS_OWN):
                total[name] = total.get(name, 0.0) + amount
    count = f"{len(bundles)} process{'es' if len(bundles) > 1 else ''}"
    return f"{group}: {count} asking for {_listed(bundles[0])} each cannot be placed; the cluster offers {_listed(total)}"


def fits_nowhere(bundle: Mapping[str, float], offers: Sequence[Mapping[str, float]]) -> bool:
    """Return whether no Ray node, even empty, has what a bundle asks for."""
    return not any(all(offer.get(name, 0.0) >= amount for name, amount in bundle.items()) for offer in offers)


def _bundle(asked: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in asked.items() if amount > 0} or {"CPU": SHARE_CPU}


def _listed(resources: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in sorted(resources.items())) + "}"
