"""Which processes of a cluster run, start again, drain and go: `Controller.handle(event, now)` is the only entrance. Pure.

A process's life:

    state       entered by                                    left by                             to
    STARTING    BootAsked, a larger size, a backoff's end     ProcessServes                       UP
                                                              StartFailed                         DOWN or GIVEN_UP
    UP          ProcessServes; Resumed (found serving)        ProcessDied, ProcessSilent too long DOWN, STARTING or GIVEN_UP
                                                              a wish that it should go            DRAINING
    DRAINING    DrainAsked, a smaller size, a restart         ProcessDrained                      STOPPING
                                                              ProcessDied, ProcessSilent          as if stopped
    STOPPING    ProcessDrained, EndAsked                      ProcessStopped                      STARTING, DRAINED or forgotten
    DOWN        a failure                                     BackoffEnded                        STARTING
    GIVEN_UP    too many failures in a row                    a restart                           STARTING
    DRAINED     DrainAsked, done                              ReturnAsked                         STARTING

One operation (a wish that takes time) is under way at a time; others are refused meanwhile, but for the end of all. An operation
is over when what it starts (`coming`) has settled, what it ends (`leaving`) is gone, and no step is left; or at a first problem.

Rule 1: whatever is not UP, DRAINED or GIVEN_UP has an order under way, or a timer, that will be heard of again.
Rule 2: facts carry the incarnation they are about; those about an older life are nothing but a reason to kill what is left of it.
Rule 3: `now` is Unix time, so that incarnations grow over the controller's own lives.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import assert_never

from orchestrator.core.config import GATEWAYS, GATEWAYS_MAX, NODES_MAX, ClusterConfig
from orchestrator.core.types import PoolKind, PoolName
from orchestrator.fleet.differences import changes_between, with_sizes
from orchestrator.fleet.processes import Part, Process, ProcessName, State, Then, node_parts, parts_of, pool_of
from orchestrator.fleet.words import (
    Answer,
    BackoffEnded,
    BootAsked,
    ClearTimer,
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
    SetTimer,
    Settle,
    Start,
    StartFailed,
    Stop,
    TellMembers,
)


@dataclass(frozen=True, slots=True)
class _Restart:
    """Start a process anew; where it is the last that generates, by starting another one first."""

    name: ProcessName


@dataclass(frozen=True, slots=True)
class _Retire:
    """Drain a process and forget it."""

    name: ProcessName


@dataclass(frozen=True, slots=True)
class _EndNodes:
    """End all node processes: no gateway is left that could use them."""


@dataclass(slots=True)
class _Operation:
    """A wish that takes time."""

    serial: int
    title: str
    steps: deque[_Restart | _Retire | _EndNodes] = field(default_factory=deque[_Restart | _Retire | _EndNodes])
    #: Processes that must settle, and those that must be gone, before the next step.
    coming: dict[ProcessName, None] = field(default_factory=lambda: {})
    leaving: dict[ProcessName, None] = field(default_factory=lambda: {})
    #: At the start of a cluster one failure is the failure of all.
    boots: bool = False
    #: What the answer will say although all was done.
    problem: str | None = None


class Controller:
    """The processes of one cluster.

    Args:
        config: the cluster's.
        kept: what a former life of this controller wrote down; None for a cluster that starts.
    """

    __slots__ = (
        "_config",
        "_ending",
        "_last_incarnation",
        "_next_numbers",
        "_operation",
        "_orders",
        "_processes",
        "_told",
        "_waiting",
    )

    def __init__(self, config: ClusterConfig, kept: Keep | None = None) -> None:
        self._config = config
        self._processes: dict[ProcessName, Process] = {}
        #: Number of each pool's next node: none is used twice.
        self._next_numbers: dict[str, int] = {}
        #: Processes with a timer: exactly those that are DOWN.
        self._waiting: dict[ProcessName, None] = {}
        #: No two starts have the same, also not of processes that have a name one after the other.
        self._last_incarnation = 0
        self._operation: _Operation | None = None
        self._ending = False
        self._orders: list[Command] = []
        #: The last membership told.
        self._told: TellMembers | None = None
        for part in kept.parts if kept is not None else parts_of(config):
            self._add(part)
        if kept is not None:
            self._next_numbers |= kept.next_numbers
            for name in kept.drained:
                self._processes[name].state = State.DRAINED

    @property
    def config(self) -> ClusterConfig:
        """What processes that start now are started with, with the sizes that are wanted."""
        sizes = dict.fromkeys([GATEWAYS, *(pool.name for pool in self._config.pools)], 0)
        for process in self._wanted():
            sizes[process.part.group] += process.part.size
        return with_sizes(self._config, sizes)

    @property
    def processes(self) -> tuple[Process, ...]:
        """All processes, in the order they were wanted."""
        return tuple(self._processes.values())

    @property
    def busy_with(self) -> str | None:
        """What is under way, as operators read it."""
        return None if self._operation is None else self._operation.title

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take in what happened and return what to do, in this order."""
        self._orders = []
        match event:
            case Resumed():
                self._on_resumed(event, now)
            case ProcessServes():
                self._on_process_serves(event, now)
            case StartFailed():
                self._on_start_failed(event, now)
            case ProcessDied():
                self._on_process_died(event, now)
            case ProcessSilent():
                self._on_process_silent(event, now)
            case ProcessDrained():
                self._on_process_drained(event)
            case ProcessStopped():
                self._on_process_stopped(event, now)
            case ProcessSettled():
                self._on_process_settled(event)
            case BackoffEnded(name):
                self._waiting.pop(name, None)
                self._start(self._processes[name], now)
            case BootAsked(serial):
                self._on_boot_asked(serial, now)
            case DrainAsked() | ReturnAsked() | ResizeAsked() | RestartAsked() | ConfigGiven():
                self._on_wish(event, now)
            case EndAsked():
                self._on_end_asked(event, now)
            case _:
                assert_never(event)
        self._advance(now)
        self._tell_members()
        return self._orders

    # --- lives --------------------------------------------------------------------------------------------------------

    def _on_resumed(self, event: Resumed, now: float) -> None:
        self._order(Say("the controller was started again"))
        for found in event.found:
            self._take_over(found, now)
        for process in self._processes.values():
            if process.state is State.DOWN:
                self._start(process, now)
        self._keep()

    def _take_over(self, found: Found, now: float) -> None:
        """Go on with a process that a former life of the controller started."""
        name = found.part.name
        process = self._processes.get(name)
        if process is not None and process.incarnation >= found.incarnation:
            self._order(Kill(name, found.incarnation))
            return
        then = None
        if process is None:  # it was about to be forgotten
            process = self._add(found.part)
            then = Then.AWAY
        elif process.incarnation:  # one process of a name is enough
            self._order(Kill(name, process.incarnation))
        if process.state is State.DRAINED:
            then = Then.OUT
        elif found.draining and then is None:
            then = Then.AGAIN
        process.incarnation, process.address, process.fingerprints = found.incarnation, found.address, found.fingerprints
        self._last_incarnation = max(self._last_incarnation, found.incarnation)
        process.went_up(now)
        if then is not None:
            self._drain(process, then)

    def _on_process_serves(self, event: ProcessServes, now: float) -> None:
        process = self._current(event.name, event.incarnation)
        if process is None or process.state is not State.STARTING:
            self._order(Kill(event.name, event.incarnation))
            return
        problem = self._unlike_others(process, event)
        if problem is not None:
            self._order(Kill(event.name, event.incarnation))
            self._failed_to_start(process, problem, now)
            return
        process.address, process.fingerprints = event.address, event.fingerprints
        process.went_up(now)
        operation = self._operation
        if operation is not None and operation.boots:
            operation.coming.pop(event.name, None)
            return
        self._order(Say(f"{event.name} serves"))
        if operation is not None and event.name in operation.coming:
            self._tell_members()
            self._order(Settle(event.name, event.incarnation))

    def _unlike_others(self, process: Process, event: ProcessServes) -> str | None:
        """Return the problem if a process has other checkpoints than those that serve."""
        for other in self._processes.values():
            for model, fingerprint in event.fingerprints.items():
                theirs = other.fingerprints.get(model, fingerprint) if other.serves and other is not process else fingerprint
                if theirs != fingerprint:
                    return f"model {model}: its checkpoint is another one than {other.part.name}'s ({fingerprint}, {theirs})"
        return None

    def _on_start_failed(self, event: StartFailed, now: float) -> None:
        process = self._current(event.name, event.incarnation)
        if process is not None and process.state is State.STARTING:
            self._failed_to_start(process, event.problem, now)

    def _failed_to_start(self, process: Process, problem: str, now: float) -> None:
        line = f"{process.part.name}: {problem}"
        if self._operation is not None and self._operation.boots:
            self._abandon(line)
            return
        self._order(Say(line))
        if self._operation is not None and process.part.name in self._operation.coming:
            self._close(line)
        process.went_down(now)
        self._retry(process, now)

    def _on_process_died(self, event: ProcessDied, now: float) -> None:
        process = self._current(event.name, event.incarnation)
        if process is not None and process.serves:
            self._lost(process, "died", now)

    def _on_process_silent(self, event: ProcessSilent, now: float) -> None:
        process = self._current(event.name, event.incarnation)
        if process is not None and process.serves and event.silent_s >= self._config.cluster.hung_s:
            self._lost(process, f"has not answered for {event.silent_s:.1f} s", now)

    def _lost(self, process: Process, what: str, now: float) -> None:
        """Go on without a process that served; whatever is left of it is ended."""
        self._order(Say(f"{process.part.name} {what}"), Kill(process.part.name, process.incarnation))
        if process.then is not None:
            self._gone(process, now)
        else:
            process.went_down(now)
            self._retry(process, now)

    def _retry(self, process: Process, now: float) -> None:
        """Start a process again after a failure: at once, later, or never."""
        name = process.part.name
        if process.state is State.GIVEN_UP:
            self._order(Say(f"{name} is given up after {process.failures} failures in a row"))
        elif process.backoff_s:
            self._waiting[name] = None
            self._order(SetTimer(name, now + process.backoff_s))
        else:
            self._start(process, now)

    def _start(self, process: Process, now: float) -> None:
        self._forget_timer(process)
        process.restarts += process.incarnation > 0
        # Milliseconds, so that many starts at once do not run ahead of the time at which another life of the controller begins.
        self._last_incarnation = max(self._last_incarnation + 1, int(now * 1000))
        process.incarnation = self._last_incarnation
        process.state, process.then = State.STARTING, None
        self._order(Start(process.part, process.incarnation, process.address))

    def _drain(self, process: Process, then: Then) -> None:
        """Let what runs on a process end, then stop it."""
        process.state, process.then = State.DRAINING, then
        # Gateways hear that one takes nothing new before it refuses anything.
        self._tell_members()
        self._order(Drain(process.part.name, process.incarnation, self._config.cluster.drain_s))

    def _retire(self, process: Process, then: Then, now: float) -> None:
        """End a process however it is."""
        match process.state:
            case State.UP:
                self._drain(process, then)
            case State.DRAINING | State.STOPPING:
                process.then = then
            case State.STARTING:
                self._order(Kill(process.part.name, process.incarnation))
                process.then = then
                self._gone(process, now)
            case State.DOWN | State.GIVEN_UP | State.DRAINED:
                process.then = then
                self._gone(process, now)
            case _:
                assert_never(process.state)

    def _on_process_drained(self, event: ProcessDrained) -> None:
        process = self._current(event.name, event.incarnation)
        if process is None or process.state is not State.DRAINING:
            return
        if not event.clean:
            line = f"{event.name}: some requests did not end in time"
            self._order(Say(line))
            if self._ending and self._operation is not None:
                self._operation.problem = line
        self._stop(process)

    def _stop(self, process: Process) -> None:
        process.state = State.STOPPING
        self._order(Stop(process.part.name, process.incarnation))

    def _on_process_stopped(self, event: ProcessStopped, now: float) -> None:
        process = self._current(event.name, event.incarnation)
        if process is not None and process.state is State.STOPPING:
            self._gone(process, now)

    def _gone(self, process: Process, now: float) -> None:
        """Go on after a process has ended that was to end."""
        name, then = process.part.name, process.then
        assert then is not None, f"{name} is gone and nothing was to follow"
        process.then = None
        self._forget_timer(process)
        if self._operation is not None:
            self._operation.leaving.pop(name, None)
        if then is Then.AGAIN:
            process.failures = 0
            self._start(process, now)
            return
        self._order(Release(name))
        if then is Then.OUT:
            process.state = State.DRAINED
        else:
            del self._processes[name]
        self._keep()

    def _on_process_settled(self, event: ProcessSettled) -> None:
        process, operation = self._current(event.name, event.incarnation), self._operation
        if process is None or operation is None or event.name not in operation.coming:
            return
        if event.problem is not None:
            self._close(f"{event.name}: {event.problem}")
        elif process.state is State.UP:
            del operation.coming[event.name]

    # --- wishes -------------------------------------------------------------------------------------------------------

    def _on_boot_asked(self, serial: int, now: float) -> None:
        if self._operation is not None or any(process.incarnation for process in self._processes.values()):
            self._order(Answer(serial, "the cluster is started already"))
            return
        self._operation = _Operation(serial, f"starting {self._config.cluster.name}", boots=True)
        self._keep()
        for process in self.processes:
            self._operation.coming[process.part.name] = None
            self._start(process, now)

    def _on_wish(self, wish: DrainAsked | ReturnAsked | ResizeAsked | RestartAsked | ConfigGiven, now: float) -> None:
        if self._operation is not None:
            self._order(Answer(wish.serial, f"{self._operation.title} is under way; ask again when it is done"))
            return
        match wish:
            case DrainAsked():
                problem = self._begin_drain(wish, now)
            case ReturnAsked():
                problem = self._begin_return(wish, now)
            case ResizeAsked():
                problem = self._begin_resize(wish, now)
            case RestartAsked():
                problem = self._begin_restart(wish)
            case ConfigGiven():
                problem = self._begin_change(wish, now)
            case _:
                assert_never(wish)
        if problem is not None:
            self._order(Answer(wish.serial, problem))

    def _begin_drain(self, wish: DrainAsked, now: float) -> str | None:
        process = self._find(wish.target)
        if process is None:
            return self._unknown(wish.target)
        name = process.part.name
        if process.state is State.DRAINED:
            return f"{name} is drained already"
        if not wish.force and self._is_last(process):
            what = "gateway that serves" if process.part.pool is None else "process that generates for its model"
            return f"{name} is the only {what}; --force drains it all the same"
        self._operation = _Operation(wish.serial, f"draining {name}", leaving={name: None})
        self._retire(process, Then.OUT, now)
        self._keep()
        return None

    def _begin_return(self, wish: ReturnAsked, now: float) -> str | None:
        process = self._find(wish.target)
        if process is None:
            return self._unknown(wish.target)
        name = process.part.name
        if process.state is not State.DRAINED:
            return f"{name} is not drained but {process.state}"
        self._operation = _Operation(wish.serial, f"returning {name}", coming={name: None})
        process.failures = 0
        self._start(process, now)
        self._keep()
        return None

    def _begin_resize(self, wish: ResizeAsked, now: float) -> str | None:
        most = GATEWAYS_MAX if wish.group == GATEWAYS else NODES_MAX
        if wish.group not in self._groups:
            return f"no pool is called {wish.group}; there are: {', '.join(self._groups)}"
        if not 1 <= wish.count <= most:
            return f"{wish.group} must be 1 to {most}, not {wish.count}"
        self._operation = _Operation(wish.serial, f"resizing {wish.group} to {wish.count}")
        self._resize(wish.group, wish.count, now)
        return None

    def _begin_restart(self, wish: RestartAsked) -> str | None:
        unknown = [group for group in wish.groups if group not in self._groups]
        if unknown:
            return f"no pool is called {unknown[0]}; there are: {', '.join(self._groups)}"
        groups = wish.groups or self._groups
        self._operation = _Operation(wish.serial, f"restarting {', '.join(groups)}")
        self._roll(groups)
        return None

    def _begin_change(self, wish: ConfigGiven, now: float) -> str | None:
        changes = changes_between(self.config, wish.config)
        told = ", ".join(map(str, changes.differences))
        if changes.fixed:
            return (
                f"a running cluster cannot change {', '.join(map(str, changes.fixed))}; end it with weft down and start it anew"
            )
        if changes.differences and not wish.restart:
            return (
                f"the running cluster differs: {told}; --restart applies it by restarting {', '.join(changes.restarts)} in turn"
            )
        self._operation = _Operation(wish.serial, "applying the cluster file")
        if changes.differences:
            self._order(Say(f"applying {told}"))
        self._config = wish.config
        for group, count in changes.sizes.items():
            self._resize(group, count, now)
        self._roll(changes.restarts)
        return None

    def _on_end_asked(self, wish: EndAsked, now: float) -> None:
        if self._operation is not None:
            self._close("the cluster is being ended")
        self._ending = True
        self._operation = operation = _Operation(wish.serial, "ending the cluster", deque([_EndNodes()]))
        for process in self.processes:
            if process.part.pool is None:
                operation.leaving[process.part.name] = None
                if process.state is State.UP:
                    process.state, process.then = State.DRAINING, Then.AWAY
                    self._order(Drain(process.part.name, process.incarnation, wish.drain_s, lingers=False))
                else:
                    self._retire(process, Then.AWAY, now)

    # --- operations ---------------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Take the operation's next steps, or answer that it is over."""
        while (operation := self._operation) is not None and not operation.coming and not operation.leaving:
            if not operation.steps:
                self._close(operation.problem)
                return
            self._take(operation, operation.steps.popleft(), now)

    def _take(self, operation: _Operation, step: _Restart | _Retire | _EndNodes, now: float) -> None:
        match step:
            case _Restart(name):
                if name in self._processes and self._processes[name].state is not State.DRAINED:
                    self._restart(operation, self._processes[name], now)
            case _Retire(name):
                if name in self._processes:
                    operation.leaving[name] = None
                    self._retire(self._processes[name], Then.AWAY, now)
            case _EndNodes():
                for process in self.processes:
                    operation.leaving[process.part.name] = None
                    if process.serves:
                        process.then = Then.AWAY
                        self._stop(process)
                    else:
                        self._retire(process, Then.AWAY, now)
            case _:
                assert_never(step)

    def _restart(self, operation: _Operation, process: Process, now: float) -> None:
        part = process.part
        if part.pool is not None and process.state is State.UP and self._is_last(process):
            # Requests would find nothing meanwhile: another one comes first.
            for fresh in self._fresh(part.group, part.size):
                operation.coming[fresh.part.name] = None
                self._start(fresh, now)
            operation.steps.appendleft(_Retire(part.name))
            self._keep()
            return
        if part.pool is None and self._is_last(process):
            self._order(Say(f"{part.name} is the only gateway: nothing answers while it starts anew"))
        operation.coming[part.name] = None
        self._retire(process, Then.AGAIN, now)

    def _resize(self, group: str, count: int, now: float) -> None:
        """Let processes go, the youngest first, and start fresh ones, until the group has its size."""
        operation = self._operation
        assert operation is not None, f"{group} is resized by nobody"
        members = [process for process in self._wanted() if process.part.group == group]
        size = sum(process.part.size for process in members)
        # What does not serve goes first.
        for process in sorted(members, key=lambda process: (process.serves, -process.part.number)):
            if size <= count:
                break
            size -= process.part.size
            operation.leaving[process.part.name] = None
            self._retire(process, Then.AWAY, now)
        for fresh in self._fresh(group, count - size):
            operation.coming[fresh.part.name] = None
            self._start(fresh, now)
        self._keep()

    def _roll(self, groups: Iterable[str]) -> None:
        """Have all processes of some groups started anew, in the groups' order."""
        operation = self._operation
        assert operation is not None, "restarts are wanted by nobody"
        for group in groups:
            names = [process.part.name for process in self._wanted() if process.part.group == group]
            operation.steps += [_Restart(name) for name in names if name not in operation.coming]

    def _close(self, problem: str | None) -> None:
        """Answer the operation; what it started goes on by itself."""
        assert self._operation is not None, "nothing is under way"
        self._order(Answer(self._operation.serial, problem))
        self._operation = None

    def _abandon(self, problem: str) -> None:
        """End all at once: the cluster could not be started."""
        for process in self.processes:
            self._forget_timer(process)
            self._order(Kill(process.part.name, process.incarnation), Release(process.part.name))
        self._processes.clear()
        self._ending = True
        self._close(problem)

    # --- parts --------------------------------------------------------------------------------------------------------

    @property
    def _groups(self) -> tuple[str, ...]:
        return (*(pool.name for pool in self._config.pools), GATEWAYS)

    def _wanted(self) -> list[Process]:
        return [process for process in self._processes.values() if process.then is not Then.AWAY]

    def _current(self, name: ProcessName, incarnation: int) -> Process | None:
        process = self._processes.get(name)
        return process if process is not None and process.incarnation == incarnation else None

    def _find(self, target: str) -> Process | None:
        """Return the process of that name, or the one that hosts a node of that name."""
        for process in self._processes.values():
            if target == process.part.name or target in process.part.nodes:
                return process
        return None

    def _unknown(self, target: str) -> str:
        known = [str(name) for process in self._processes.values() for name in process.part.nodes or (process.part.name,)]
        return f"no node or gateway is called {target}; there are: {', '.join(known)}"

    def _is_last(self, process: Process) -> bool:
        """Return whether requests would find no gateway, or nothing that generates, without a process."""
        if process.state is not State.UP or not self._generates(process.part):
            return False
        others = [other for other in self._processes.values() if other is not process and other.state is State.UP]
        if process.part.pool is None:
            return not any(other.part.pool is None for other in others)
        model = pool_of(self._config, process.part).model
        return not any(
            other.part.pool is not None and self._generates(other.part) and pool_of(self._config, other.part).model == model
            for other in others
        )

    def _generates(self, part: Part) -> bool:
        return part.pool is None or pool_of(self._config, part).kind is not PoolKind.PREFILL

    def _fresh(self, group: str, count: int) -> list[Process]:
        """Add processes for so many more nodes, or gateways; none if `count` is not over 0."""
        if group == GATEWAYS:
            taken = [process.part.number for process in self._processes.values() if process.part.pool is None]
            free = [number for number in range(len(taken) + max(count, 0)) if number not in taken]
            return [self._add(Part(None, number)) for number in free[: max(count, 0)]]
        pool = next(pool for pool in self._config.pools if pool.name == group)
        return [self._add(part) for part in node_parts(pool, self._next_numbers[group], max(count, 0))]

    def _add(self, part: Part) -> Process:
        process = self._processes[part.name] = Process(part)
        if part.pool is not None:
            last = part.number + len(part.nodes)
            self._next_numbers[part.pool] = max(self._next_numbers.get(part.pool, 0), last)
        return process

    def _forget_timer(self, process: Process) -> None:
        if process.part.name in self._waiting:
            del self._waiting[process.part.name]
            self._order(ClearTimer(process.part.name))

    def _keep(self) -> None:
        wanted = self._wanted()
        drained = tuple(one.part.name for one in wanted if one.state is State.DRAINED or one.then is Then.OUT)
        self._order(Keep(tuple(process.part for process in wanted), drained, dict(self._next_numbers)))

    def _tell_members(self) -> None:
        """Have the gateways told who is there, if that has changed."""
        nodes = tuple(
            (node, PoolName(process.part.group), process.address if process.serves else "")
            for process in self._processes.values()
            for node in process.part.nodes
        )
        gateways = {
            process.part.number: process.address
            for process in self._processes.values()
            if process.part.pool is None and process.state is State.UP
        }
        told = TellMembers(nodes, gateways)
        if told != self._told and not self._ending:
            self._told = told
            self._order(told)

    def _order(self, *orders: Command) -> None:
        self._orders += orders

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
        if self._operation is not None:
            for name in (*self._operation.coming, *self._operation.leaving):
                assert name in self._processes, f"{self._operation.title} waits for {name}, which is not there"
            for name in self._operation.leaving:
                assert self._processes[name].then is not None, f"{name} is to leave and {self._processes[name].state}"
