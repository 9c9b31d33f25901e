"""State of every process of a cluster, the steps between states, and what gateways hear of them. Pure.

`controller.py` has one of these and decides what is to happen; nothing else touches it. See there for a process's life.
"""

from typing import assert_never

from orchestrator.core.commands import ClearTimer, SetTimer
from orchestrator.core.config import GATEWAYS, STORES, ClusterConfig
from orchestrator.core.types import PoolName, StoreId
from orchestrator.fleet.processes import (
    Part,
    Process,
    ProcessName,
    State,
    Then,
    bundles_of,
    node_parts,
    parts_of,
    pool_of,
    strategy_of,
)
from orchestrator.fleet.words import (
    BackoffTimer,
    Command,
    Drain,
    Found,
    Keep,
    Kill,
    ProcessServes,
    Release,
    Say,
    Start,
    Stop,
    TellMembers,
)


class Lives:
    """All processes that a cluster must have.

    Args:
        config: the cluster's; its sizes are only those of the start.
        kept: what a former life of the controller wrote down; None for a cluster that starts.
    """

    __slots__ = ("_last_incarnation", "_next_numbers", "_processes", "_told", "_waiting", "config", "ending", "orders")

    def __init__(self, config: ClusterConfig, kept: Keep | None) -> None:
        self.config = config
        #: Orders of the event that is being handled.
        self.orders: list[Command] = []
        #: True once no membership is told any more.
        self.ending = False
        self._processes: dict[ProcessName, Process] = {}
        #: Number of each pool's next node: none is used twice.
        self._next_numbers: dict[str, int] = {}
        #: Processes with a timer: exactly those that are DOWN.
        self._waiting: dict[ProcessName, None] = {}
        #: No two starts have the same, also not of processes that have a name one after the other.
        self._last_incarnation = 0
        #: The last membership told.
        self._told: TellMembers | None = None
        for part in kept.parts if kept is not None else parts_of(config):
            self._add(part)
        if kept is not None:
            self._next_numbers |= kept.next_numbers
            for name in kept.drained:
                self._processes[name].state = State.DRAINED

    @property
    def processes(self) -> tuple[Process, ...]:
        """All processes, in the order they were wanted."""
        return tuple(self._processes.values())

    def take_over(self, found: Found, now: float) -> None:
        """Go on with a process that a former life of the controller started."""
        name = found.part.name
        process = self._processes.get(name)
        if process is not None and process.incarnation >= found.incarnation:
            self.order(Kill(name, found.incarnation))
            return
        then = None
        if process is None:  # it was about to be forgotten
            process = self._add(found.part)
            then = Then.AWAY
        elif process.incarnation:  # one process of a name is enough
            self.order(Kill(name, process.incarnation))
        if process.state is State.DRAINED:
            then = Then.OUT
        elif found.draining and then is None:
            then = Then.AGAIN
        process.incarnation, process.address, process.fingerprints = found.incarnation, found.address, found.fingerprints
        process.node_addresses, process.kept = found.node_addresses, self._asks(found.part)
        self._last_incarnation = max(self._last_incarnation, found.incarnation)
        process.went_up(now)
        if then is not None:
            self.drain(process, then)

    def unlike_others(self, process: Process, event: ProcessServes) -> str | None:
        """Return the problem if a process has other checkpoints than those that serve."""
        for other in self._processes.values():
            for model, fingerprint in event.fingerprints.items():
                theirs = other.fingerprints.get(model, fingerprint) if other.serves and other is not process else fingerprint
                if theirs != fingerprint:
                    return f"model {model}: its checkpoint is another one than {other.part.name}'s ({fingerprint}, {theirs})"
        return None

    def retry(self, process: Process, now: float) -> None:
        """Start a process again after a failure: at once, later, or never."""
        name = process.part.name
        if process.state is State.GIVEN_UP:
            self.order(Say(f"{name} is given up after {process.failures} failures in a row"))
        elif process.backoff_s:
            self._waiting[name] = None
            self.order(SetTimer(BackoffTimer(name), now + process.backoff_s))
        else:
            self.start(process, now)

    def start(self, process: Process, now: float) -> None:
        """Have a process started, which is not running."""
        self._forget_timer(process)
        process.restarts += process.incarnation > 0
        # Milliseconds, so that many starts at once do not run ahead of the time at which another life of the controller begins.
        self._last_incarnation = max(self._last_incarnation + 1, int(now * 1000))
        process.incarnation = self._last_incarnation
        process.state, process.then = State.STARTING, None
        asks = self._asks(process.part)
        if process.kept not in (None, asks):  # the configuration has changed meanwhile: it is placed anew
            self.order(Release(process.part.name))
        process.kept = asks
        self.order(Start(process.part, process.incarnation, process.address))

    def drain(self, process: Process, then: Then, end_s: float | None = None) -> None:
        """Let what runs on a process end, then stop it; within `end_s` and without lingering if the cluster ends."""
        process.state, process.then = State.DRAINING, then
        # Gateways hear that one takes nothing new before it refuses anything.
        self.tell_members()
        seconds = self.config.cluster.drain_s if end_s is None else end_s
        self.order(Drain(process.part.name, process.incarnation, seconds, lingers=end_s is None))

    def retire(self, process: Process, then: Then, now: float) -> None:
        """End a process however it is."""
        match process.state:
            case State.UP:
                self.drain(process, then)
            case State.DRAINING | State.STOPPING:
                process.then = then
            case State.STARTING:
                self.order(Kill(process.part.name, process.incarnation))
                process.then = then
                self.gone(process, now)
            case State.DOWN | State.GIVEN_UP | State.DRAINED:
                process.then = then
                self.gone(process, now)
            case _:
                assert_never(process.state)

    def stop(self, process: Process) -> None:
        """End a process in good order; what is to follow is set."""
        process.state = State.STOPPING
        self.order(Stop(process.part.name, process.incarnation))

    def gone(self, process: Process, now: float) -> None:
        """Go on after a process has ended that was to end."""
        name, then = process.part.name, process.then
        assert then is not None, f"{name} is gone and nothing was to follow"
        process.then = None
        self._forget_timer(process)
        if then is Then.AGAIN:
            process.failures = 0
            self.start(process, now)
            return
        self.order(Release(name))
        process.kept = None
        if then is Then.OUT:
            process.state = State.DRAINED
        else:
            del self._processes[name]
        self.keep()

    def lost(self, process: Process, what: str, now: float) -> None:
        """Go on without a process that served; whatever is left of it is ended."""
        self.order(Say(f"{process.part.name} {what}"), Kill(process.part.name, process.incarnation))
        if process.then is not None:
            self.gone(process, now)
        else:
            process.went_down(now)
            self.retry(process, now)

    @property
    def groups(self) -> tuple[str, ...]:
        """What operators may name: the pools, the stores if there are any, and the gateways."""
        stores = (STORES,) if self.config.store is not None else ()
        return (*(pool.name for pool in self.config.pools), *stores, GATEWAYS)

    def wanted(self, group: str | None = None) -> list[Process]:
        """Return the processes (of a group) that are not on their way out for good."""
        return [
            process
            for process in self._processes.values()
            if process.then is not Then.AWAY and group in (None, process.part.group)
        ]

    def current(self, name: ProcessName, incarnation: int) -> Process | None:
        """Return a process if that is its latest start."""
        process = self._processes.get(name)
        return process if process is not None and process.incarnation == incarnation else None

    def find(self, target: str) -> Process | None:
        """Return the process of that name, or the one that hosts a node of that name."""
        for process in self._processes.values():
            if target == process.part.name or target in process.part.nodes:
                return process
        return None

    def unknown(self, target: str) -> str:
        """Return the line that says what there is instead."""
        known = [str(name) for process in self._processes.values() for name in process.part.nodes or (process.part.name,)]
        return f"no node or gateway is called {target}; there are: {', '.join(known)}"

    def is_last(self, process: Process) -> bool:
        """Return whether requests would find no gateway, or nothing that generates, without a process."""
        if process.state is not State.UP or not self._generates(process.part):
            return False
        others = [other for other in self._processes.values() if other is not process and other.state is State.UP]
        if process.part.pool is None:
            return not any(other.part.is_gateway for other in others)
        model = pool_of(self.config, process.part).model
        return not any(
            bool(other.part.nodes) and self._generates(other.part) and pool_of(self.config, other.part).model == model
            for other in others
        )

    def _generates(self, part: Part) -> bool:
        return part.is_gateway or (bool(part.nodes) and pool_of(self.config, part).kind.generates)

    def fresh(self, group: str, count: int) -> list[Process]:
        """Add processes for so many more nodes, or gateways; none if `count` is not over 0."""
        if group == GATEWAYS:
            taken = [process.part.number for process in self._processes.values() if process.part.is_gateway]
            free = [number for number in range(len(taken) + max(count, 0)) if number not in taken]
            return [self._add(Part(None, number)) for number in free[: max(count, 0)]]
        pool = next(pool for pool in self.config.pools if pool.name == group)
        return [self._add(part) for part in node_parts(pool, self._next_numbers[group], max(count, 0))]

    def store_for(self, host: str) -> Process | None:
        """Add a process for a host's store; None if there are none in this cluster, or that host has one."""
        stores = [process.part for process in self._processes.values() if process.part.is_store]
        if self.config.store is None or any(part.host == host for part in stores):
            return None
        return self._add(Part(None, max((part.number for part in stores), default=-1) + 1, host=host))

    def _asks(self, part: Part) -> tuple[str, list[dict[str, float]]]:
        return strategy_of(self.config, part), bundles_of(self.config, part)

    def _add(self, part: Part) -> Process:
        process = self._processes[part.name] = Process(part)
        if part.pool is not None:
            last = part.number + part.size
            self._next_numbers[part.pool] = max(self._next_numbers.get(part.pool, 0), last)
        return process

    def _forget_timer(self, process: Process) -> None:
        if process.part.name in self._waiting:
            del self._waiting[process.part.name]
            self.order(ClearTimer(BackoffTimer(process.part.name)))

    def keep(self) -> None:
        """Have written down what a later life of the controller must know."""
        wanted = self.wanted()
        drained = tuple(one.part.name for one in wanted if one.state is State.DRAINED or one.then is Then.OUT)
        self.order(Keep(tuple(process.part for process in wanted), drained, dict(self._next_numbers)))

    def tell_members(self) -> None:
        """Have the gateways told who is there, if that has changed; a node that is kept out is not."""
        nodes = tuple(
            (node, PoolName(process.part.group), process.address_of(node))
            for process in self._processes.values()
            if process.state is not State.DRAINED
            for node in process.part.nodes
        )
        gateways = {
            process.part.number: process.address
            for process in self._processes.values()
            if process.part.is_gateway and process.state is State.UP
        }
        stores = tuple(
            (StoreId(process.part.name), process.part.host, process.address)
            for process in self._processes.values()
            if process.part.is_store and process.state is State.UP
        )
        drafters = tuple(
            (process.part.pool, process.part.name, process.address)
            for process in self._processes.values()
            if process.part.pool is not None and not process.part.nodes and process.state is State.UP
        )
        told = TellMembers(nodes, gateways, stores, drafters)
        if told != self._told and not self.ending:
            self._told = told
            self.order(told)

    def order(self, *orders: Command) -> None:
        """Add to the orders of the event that is being handled."""
        self.orders += orders

    def validate(self) -> None:
        """Raise `AssertionError` unless every process is accounted for."""
        seen: dict[str, ProcessName] = {}
        for name, process in self._processes.items():
            assert process.part.name == name, f"{name} holds {process.part.name}"
            ends = process.state in (State.DRAINING, State.STOPPING)
            assert ends == (process.then is not None), f"{name} is {process.state}, then {process.then}"
            running = process.state in (State.STARTING, State.UP, State.DRAINING, State.STOPPING)
            assert process.incarnation or not running, f"{name} is {process.state} without a start"
            if process.incarnation:
                assert (name in self._waiting) == (process.state is State.DOWN), (
                    f"{name} is {process.state}, waits: {self._waiting}"
                )
            for node in process.part.nodes:
                assert node not in seen, f"{node} is hosted by {seen[node]} and {name}"
                seen[node] = name
                assert process.part.number < self._next_numbers[process.part.group], f"{name} has a number yet to come"

    def named(self, name: ProcessName) -> Process | None:
        """Return the process of that name."""
        return self._processes.get(name)

    def wakes(self, name: ProcessName, now: float) -> None:
        """Start a process whose backoff is over."""
        self._waiting.pop(name, None)
        self.start(self._processes[name], now)

    def abandon(self) -> None:
        """Kill all processes and forget them."""
        for process in self.processes:
            self._forget_timer(process)
            self.order(Kill(process.part.name, process.incarnation), Release(process.part.name))
        self._processes.clear()
        self.ending = True
