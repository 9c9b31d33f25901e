"""Clusters that fleet tests start from, and a controller whose processes do at once what they are told."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from orchestrator.core.config import ClusterConfig, EngineConfig, GatewayConfig, PoolConfig
from orchestrator.core.types import PoolKind
from orchestrator.fleet.controller import Controller
from orchestrator.fleet.processes import ProcessName, State
from orchestrator.fleet.words import (
    Answer,
    BootAsked,
    Command,
    Drain,
    Event,
    Kill,
    ProcessDrained,
    ProcessServes,
    ProcessSettled,
    ProcessStopped,
    Settle,
    Start,
    Stop,
    TellMembers,
)


def crowded() -> ClusterConfig:
    """Return two pools, one whose nodes share processes, and two gateways."""
    engine = EngineConfig(name="profiled")
    crowd = PoolConfig("crowd", PoolKind.AGGREGATED, nodes=5, nodes_per_process=2, engine=engine)
    rack = PoolConfig("rack", PoolKind.PREFILL, nodes=2, resources={"nvl72": 1}, gpus=1, cpus=4)
    return ClusterConfig(gateway=GatewayConfig(count=2), pools=(rack, crowd))


def small(prefill: int = 1, decode: int = 2, gateways: int = 1, **changes: Any) -> ClusterConfig:
    """Return a cluster of two pools."""
    pools = (PoolConfig("prefill", PoolKind.PREFILL, nodes=prefill), PoolConfig("decode", PoolKind.DECODE, nodes=decode))
    return ClusterConfig(gateway=GatewayConfig(count=gateways), pools=pools, **changes)


@dataclass
class Run:
    """A controller, and what becomes of its orders in a world in which everything succeeds at once unless it is held back."""

    controller: Controller
    now: float = 1000.0
    #: Orders of these kinds wait in `held` instead of being carried out.
    hold: tuple[type, ...] = ()
    held: list[Command] = field(default_factory=list)
    done: list[Command] = field(default_factory=list)

    def tell(self, event: Event) -> list[Command]:
        """Tell the controller, and of what follows; return all its orders."""
        before = len(self.done)
        events = deque([event])
        while events:
            for order in self.controller.handle(events.popleft(), self.now):
                self.controller.validate()
                self.done.append(order)
                if isinstance(order, self.hold):
                    self.held.append(order)
                elif (fact := outcome_of(order)) is not None:
                    events.append(fact)
        return self.done[before:]

    def release(self) -> list[Command]:
        """Carry out the order that waits longest."""
        fact = outcome_of(self.held.pop(0))
        assert fact is not None
        return self.tell(fact)

    def state(self, name: str) -> State:
        return next(process.state for process in self.controller.processes if process.part.name == name)

    @property
    def names(self) -> list[ProcessName]:
        return [process.part.name for process in self.controller.processes]

    def incarnation(self, name: str) -> int:
        return next(process.incarnation for process in self.controller.processes if process.part.name == name)


def outcome_of(order: Command) -> Event | None:
    """Return the fact that a carried out order leads to."""
    match order:
        case Start(part, incarnation):
            return ProcessServes(part.name, incarnation, f"{part.name}:{incarnation}", {"default": "f"})
        case Drain(name, incarnation):
            return ProcessDrained(name, incarnation, clean=True)
        case Stop(name, incarnation):
            return ProcessStopped(name, incarnation)
        case Settle(name, incarnation):
            return ProcessSettled(name, incarnation)
        case _:
            return None


def booted(config: ClusterConfig, *hold: type) -> Run:
    """Return a cluster that runs; orders of the kinds `hold` wait from now on."""
    run = Run(Controller(config))
    assert answers(run.tell(BootAsked(1))) == [Answer(1)]
    run.hold = hold
    return run


def told(run: Run) -> TellMembers:
    """Return what processes were told last of each other."""
    return [order for order in run.done if isinstance(order, TellMembers)][-1]


def answers(orders: list[Command]) -> list[Answer]:
    return [order for order in orders if isinstance(order, Answer)]


def brief(orders: list[Command]) -> list[str]:
    """Return what is done to processes, as `drain decode-0`, in order."""
    told = {Start: "start", Drain: "drain", Stop: "stop", Kill: "kill", Settle: "settle"}
    found: list[str] = []
    for order in orders:
        name = order.part.name if isinstance(order, Start) else getattr(order, "name", None)
        if type(order) in told:
            found.append(f"{told[type(order)]} {str(name).removeprefix('node-')}")
    return found
