"""What must hold in a simulated world after every event, and at its end. The world does not know how it is checked.

after every event   every cluster's and node's own invariants; whatever is unfinished has something that will wake it
at the end          every request is over, no node works or holds anything for anybody, beliefs and holdings agree
"""

from collections.abc import Mapping
from typing import Protocol

from orchestrator.core.cluster.cluster import Cluster
from orchestrator.core.cluster.following import Trust
from orchestrator.core.types import GatewayId, NodeId, RequestId
from orchestrator.sim.agenda import Agenda
from orchestrator.sim.network import Transfers
from orchestrator.sim.simulated import SimulatedNode
from orchestrator.sim.stores import SimulatedStore


class Stuck(AssertionError):
    """Nothing is left to happen, but requests are unfinished."""

    def __init__(self, now: float, turns: list[int], unfinished: int) -> None:
        under_way = ", ".join(str(turn) for turn in turns[:5]) or "none"
        super().__init__(
            f"at {now:.6f} s nothing is left to happen and {unfinished} turns are unfinished; under way: {under_way}"
        )


class Checked(Protocol):
    """What the checks look at."""

    agenda: Agenda
    clusters: dict[GatewayId, Cluster]
    nodes: dict[NodeId, SimulatedNode]
    stores: dict[str, SimulatedStore]
    transfers: Transfers
    unaware: dict[tuple[GatewayId, NodeId], bool]

    @property
    def visits(self) -> Mapping[RequestId, object]: ...


class Checks:
    """The checks of one world."""

    __slots__ = ("_world",)

    def __init__(self, world: Checked) -> None:
        self._world = world

    def after_event(self) -> None:
        """Raise `AssertionError` unless everything holds now."""
        world = self._world
        for cluster in world.clusters.values():
            cluster.validate()
        for simulated in world.nodes.values():
            if simulated.alive:
                simulated.node.validate()
                self._check_wakeup(simulated)
        for store in world.stores.values():
            if store.alive:
                store.store.validate()

    def _check_wakeup(self, simulated: SimulatedNode) -> None:
        """A node with sequences runs a step, or waits for blocks that are on their way."""
        load = simulated.load
        if load.running and simulated.run is None:
            bringing = len(self._world.transfers) + sum(store.unfinished for store in self._world.stores.values())
            assert bringing, f"{simulated.spec.id} has {load.running} sequences, no step and nothing to fetch or load"
        assert simulated.run is None or len(self._world.agenda), f"{simulated.spec.id} runs a step that never ends"

    def at_the_end(self) -> None:
        """Raise `AssertionError` unless nothing is left over."""
        world = self._world
        assert not world.visits, f"{len(world.visits)} requests never ended"
        assert not len(world.transfers), f"{len(world.transfers)} transfers never ended"
        for gateway, cluster in world.clusters.items():
            assert cluster.running + cluster.waiting == 0, f"gateway {gateway} has {cluster.running} running requests left"
            for view in cluster.nodes:
                self._check_belief(gateway, view.spec.id, view.trust, view.believed_blocks)
            for part in cluster.stores:
                load = world.stores[part.spec.host].store.load(part.model)
                assert not part.exact or part.believed_blocks == load.slots_cached, (
                    f"gateway {gateway} believes that {part.spec.id} has {part.believed_blocks} blocks: {load.slots_cached}"
                )
        for store in world.stores.values():
            assert not store.unfinished, f"{store.spec.id} has {store.unfinished} offers and reads left"
            for stored in store.spec.models:
                used = store.store.load(stored.model).slots_used
                assert used == 0, f"{store.spec.id} still uses {used} slots"
        for simulated in world.nodes.values():
            load = simulated.load
            assert load.running + load.waiting == 0, f"{simulated.spec.id} still has {load.running} + {load.waiting} requests"
            assert load.blocks_used == 0, f"{simulated.spec.id} still uses {load.blocks_used} blocks"

    def _check_belief(self, gateway: GatewayId, node: NodeId, trust: Trust, believed_blocks: int) -> None:
        """In the quiet at the end a gateway that trusts what it knows of a node knows how much that holds, but for late news."""
        simulated = self._world.nodes[node]
        unaware = self._world.unaware.get((gateway, node), False)
        if trust is Trust.EXACT and not simulated.node.untold and not unaware:
            present = simulated.load.blocks_cached
            assert believed_blocks == present, f"gateway {gateway} believes that {node} has {believed_blocks} blocks: {present}"
