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
    DOWN        a failure                                     TimerFired                          STARTING
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

from orchestrator.core.config import GATEWAYS, GATEWAYS_MAX, NODES_MAX, STORES, ClusterConfig, ConfigError
from orchestrator.core.events import TimerFired
from orchestrator.fleet.differences import changes_between, with_sizes
from orchestrator.fleet.lives import Lives
from orchestrator.fleet.processes import Process, ProcessName, State, Then
from orchestrator.fleet.words import (
    Answer,
    BackoffTimer,
    BootAsked,
    Command,
    ConfigGiven,
    DrainAsked,
    EndAsked,
    Event,
    HostUsed,
    Keep,
    Kill,
    ProcessDied,
    ProcessDrained,
    ProcessServes,
    ProcessSettled,
    ProcessSilent,
    ProcessStopped,
    ResizeAsked,
    RestartAsked,
    Resumed,
    ReturnAsked,
    Say,
    Settle,
    StartFailed,
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

    __slots__ = ("_lives", "_operation")

    def __init__(self, config: ClusterConfig, kept: Keep | None = None) -> None:
        self._lives = Lives(config, kept)
        self._operation: _Operation | None = None

    @property
    def config(self) -> ClusterConfig:
        """What processes that start now are started with, with the sizes that are wanted."""
        sizes = dict.fromkeys(self._lives.groups, 0)
        for process in self._lives.wanted():
            sizes[process.part.group] += process.part.size
        return with_sizes(self._lives.config, sizes)

    @property
    def processes(self) -> tuple[Process, ...]:
        """All processes, in the order they were wanted."""
        return self._lives.processes

    @property
    def busy_with(self) -> str | None:
        """What is under way, as operators read it."""
        return None if self._operation is None else self._operation.title

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take in what happened and return what to do, in this order."""
        self._lives.orders = []
        match event:
            case Resumed():
                self._on_resumed(event, now)
            case HostUsed(host):
                self._on_host_used(host, now)
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
            case TimerFired(BackoffTimer(name)):
                self._lives.wakes(name, now)
            case BootAsked(serial):
                self._on_boot_asked(serial, now)
            case DrainAsked() | ReturnAsked() | ResizeAsked() | RestartAsked() | ConfigGiven():
                self._on_wish(event, now)
            case EndAsked():
                self._on_end_asked(event, now)
            case _:
                assert_never(event)
        self._advance(now)
        self._lives.tell_members()
        return self._lives.orders

    # --- facts --------------------------------------------------------------------------------------------------------

    def _on_resumed(self, event: Resumed, now: float) -> None:
        self._lives.order(Say("the controller was started again"))
        for found in event.found:
            self._lives.take_over(found, now)
        for process in self.processes:
            if process.state is State.DOWN:
                self._lives.start(process, now)
        self._lives.keep()

    def _on_host_used(self, host: str, now: float) -> None:
        process = None if self._lives.ending else self._lives.store_for(host)
        if process is None:
            return
        self._lives.keep()
        if self._operation is not None and self._operation.boots:
            self._operation.coming[process.part.name] = None
        self._lives.start(process, now)

    def _on_process_serves(self, event: ProcessServes, now: float) -> None:
        process = self._lives.current(event.name, event.incarnation)
        if process is None or process.state is not State.STARTING:
            self._lives.order(Kill(event.name, event.incarnation))
            return
        problem = self._lives.unlike_others(process, event)
        if problem is not None:
            self._lives.order(Kill(event.name, event.incarnation))
            self._failed_to_start(process, problem, now)
            return
        process.address, process.fingerprints = event.address, event.fingerprints
        process.node_addresses = event.node_addresses
        process.went_up(now)
        operation = self._operation
        if operation is not None and operation.boots:
            operation.coming.pop(event.name, None)
            return
        self._lives.order(Say(f"{event.name} serves"))
        if operation is not None and event.name in operation.coming:
            self._lives.tell_members()
            self._lives.order(Settle(event.name, event.incarnation))

    def _on_start_failed(self, event: StartFailed, now: float) -> None:
        process = self._lives.current(event.name, event.incarnation)
        if process is not None and process.state is State.STARTING:
            self._failed_to_start(process, event.problem, now)

    def _failed_to_start(self, process: Process, problem: str, now: float) -> None:
        line = f"{process.part.name}: {problem}"
        if self._operation is not None and self._operation.boots:
            self._abandon(line)
            return
        self._lives.order(Say(line))
        if self._operation is not None and process.part.name in self._operation.coming:
            self._close(line)
        process.went_down(now)
        self._lives.retry(process, now)

    def _on_process_died(self, event: ProcessDied, now: float) -> None:
        process = self._lives.current(event.name, event.incarnation)
        if process is not None and process.serves:
            self._lives.lost(process, "died", now)

    def _on_process_silent(self, event: ProcessSilent, now: float) -> None:
        process = self._lives.current(event.name, event.incarnation)
        if process is not None and process.serves and event.silent_s >= self._lives.config.cluster.hung_s:
            self._lives.lost(process, f"has not answered for {event.silent_s:.1f} s", now)

    def _on_process_drained(self, event: ProcessDrained) -> None:
        process = self._lives.current(event.name, event.incarnation)
        if process is None or process.state is not State.DRAINING:
            return
        if not event.clean:
            line = f"{event.name}: some requests did not end in time"
            self._lives.order(Say(line))
            if self._lives.ending and self._operation is not None:
                self._operation.problem = line
        self._lives.stop(process)

    def _on_process_stopped(self, event: ProcessStopped, now: float) -> None:
        process = self._lives.current(event.name, event.incarnation)
        if process is not None and process.state is State.STOPPING:
            self._lives.gone(process, now)

    def _on_process_settled(self, event: ProcessSettled) -> None:
        process, operation = self._lives.current(event.name, event.incarnation), self._operation
        if process is None or operation is None or event.name not in operation.coming:
            return
        if event.problem is not None:
            self._close(f"{event.name}: {event.problem}")
        elif process.state is State.UP:
            del operation.coming[event.name]

    # --- wishes -------------------------------------------------------------------------------------------------------

    def _on_boot_asked(self, serial: int, now: float) -> None:
        if self._operation is not None or any(process.incarnation for process in self.processes):
            self._lives.order(Answer(serial, "the cluster is started already"))
            return
        self._operation = _Operation(serial, f"starting {self._lives.config.cluster.name}", boots=True)
        self._lives.keep()
        for process in self.processes:
            self._operation.coming[process.part.name] = None
            self._lives.start(process, now)

    def _on_wish(self, wish: DrainAsked | ReturnAsked | ResizeAsked | RestartAsked | ConfigGiven, now: float) -> None:
        if self._operation is not None:
            self._lives.order(Answer(wish.serial, f"{self._operation.title} is under way; ask again when it is done"))
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
            self._lives.order(Answer(wish.serial, problem))

    def _begin_drain(self, wish: DrainAsked, now: float) -> str | None:
        process = self._lives.find(wish.target)
        if process is None:
            return self._lives.unknown(wish.target)
        name = process.part.name
        if process.state is State.DRAINED:
            return f"{name} is drained already"
        if not wish.force and self._lives.is_last(process):
            what = "gateway that serves" if process.part.is_gateway else "process that generates for its model"
            return f"{name} is the only {what}; --force drains it all the same"
        self._operation = _Operation(wish.serial, f"draining {name}", leaving={name: None})
        self._lives.retire(process, Then.OUT, now)
        self._lives.keep()
        return None

    def _begin_return(self, wish: ReturnAsked, now: float) -> str | None:
        process = self._lives.find(wish.target)
        if process is None:
            return self._lives.unknown(wish.target)
        name = process.part.name
        if process.state is not State.DRAINED:
            return f"{name} is not drained but {process.state}"
        self._operation = _Operation(wish.serial, f"returning {name}", coming={name: None})
        process.failures = 0
        self._lives.start(process, now)
        self._lives.keep()
        return None

    def _begin_resize(self, wish: ResizeAsked, now: float) -> str | None:
        most = GATEWAYS_MAX if wish.group == GATEWAYS else NODES_MAX
        if wish.group not in self._lives.groups:
            return f"no pool is called {wish.group}; there are: {', '.join(self._lives.groups)}"
        if wish.group == STORES:
            return "each host that has nodes has one store, and no other has any"
        if not 1 <= wish.count <= most:
            return f"{wish.group} must be 1 to {most}, not {wish.count}"
        if wish.group == GATEWAYS:
            try:
                self._lives.config.check_gateways(wish.count)
            except ConfigError as error:
                return str(error)
        self._operation = _Operation(wish.serial, f"resizing {wish.group} to {wish.count}")
        self._resize(wish.group, wish.count, now)
        return None

    def _begin_restart(self, wish: RestartAsked) -> str | None:
        unknown = [group for group in wish.groups if group not in self._lives.groups]
        if unknown:
            return f"no pool is called {unknown[0]}; there are: {', '.join(self._lives.groups)}"
        groups = wish.groups or self._lives.groups
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
            self._lives.order(Say(f"applying {told}"))
        self._lives.config = wish.config
        for group, count in changes.sizes.items():
            self._resize(group, count, now)
        self._roll(changes.restarts)
        return None

    def _on_end_asked(self, wish: EndAsked, now: float) -> None:
        if self._operation is not None:
            self._close("the cluster is being ended")
        self._lives.ending = True
        self._operation = operation = _Operation(wish.serial, "ending the cluster", deque([_EndNodes()]))
        for process in self.processes:
            if process.part.is_gateway:
                operation.leaving[process.part.name] = None
                if process.state is State.UP:
                    self._lives.drain(process, Then.AWAY, wish.drain_s)
                else:
                    self._lives.retire(process, Then.AWAY, now)

    # --- operations ---------------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        """Take the operation's next steps, or answer that it is over."""
        while (operation := self._operation) is not None:
            operation.leaving = {name: None for name in operation.leaving if self._leaves(name)}
            if operation.coming or operation.leaving:
                return
            if not operation.steps:
                self._close(operation.problem)
                return
            self._take(operation, operation.steps.popleft(), now)

    def _take(self, operation: _Operation, step: _Restart | _Retire | _EndNodes, now: float) -> None:
        match step:
            case _Restart(name):
                process = self._lives.named(name)
                if process is not None and process.state is not State.DRAINED:
                    self._restart(operation, process, now)
            case _Retire(name):
                process = self._lives.named(name)
                if process is not None:
                    operation.leaving[name] = None
                    self._lives.retire(process, Then.AWAY, now)
            case _EndNodes():
                for process in self.processes:
                    operation.leaving[process.part.name] = None
                    if process.serves:
                        process.then = Then.AWAY
                        self._lives.stop(process)
                    else:
                        self._lives.retire(process, Then.AWAY, now)
            case _:
                assert_never(step)

    def _restart(self, operation: _Operation, process: Process, now: float) -> None:
        part = process.part
        if part.pool is not None and process.state is State.UP and self._lives.is_last(process):
            # Requests would find nothing meanwhile: another one comes first.
            for fresh in self._lives.fresh(part.group, part.size):
                operation.coming[fresh.part.name] = None
                self._lives.start(fresh, now)
            operation.steps.appendleft(_Retire(part.name))
            self._lives.keep()
            return
        if part.is_gateway and self._lives.is_last(process):
            self._lives.order(Say(f"{part.name} is the only gateway: nothing answers while it starts anew"))
        operation.coming[part.name] = None
        self._lives.retire(process, Then.AGAIN, now)

    def _resize(self, group: str, count: int, now: float) -> None:
        """Let processes go, the youngest first, and start fresh ones, until the group has its size."""
        operation = self._operation
        assert operation is not None, f"{group} is resized by nobody"
        members = self._lives.wanted(group)
        size = sum(process.part.size for process in members)
        # What does not serve goes first.
        for process in sorted(members, key=lambda process: (process.serves, -process.part.number)):
            if size <= count:
                break
            size -= process.part.size
            operation.leaving[process.part.name] = None
            self._lives.retire(process, Then.AWAY, now)
        for fresh in self._lives.fresh(group, count - size):
            operation.coming[fresh.part.name] = None
            self._lives.start(fresh, now)
        self._lives.keep()

    def _roll(self, groups: Iterable[str]) -> None:
        """Have all processes of some groups started anew, in the groups' order."""
        operation = self._operation
        assert operation is not None, "restarts are wanted by nobody"
        for group in groups:
            names = [process.part.name for process in self._lives.wanted(group)]
            operation.steps += [_Restart(name) for name in names if name not in operation.coming]

    def _close(self, problem: str | None) -> None:
        """Answer the operation; what it started goes on by itself."""
        assert self._operation is not None, "nothing is under way"
        self._lives.order(Answer(self._operation.serial, problem))
        self._operation = None

    def _abandon(self, problem: str) -> None:
        """End all at once: the cluster could not be started."""
        self._lives.abandon()
        self._close(problem)

    def _leaves(self, name: ProcessName) -> bool:
        """Return whether a process that is to go has not gone yet."""
        process = self._lives.named(name)
        return process is not None and process.then is not None

    def validate(self) -> None:
        """Raise `AssertionError` unless every process, and all that is waited for, is accounted for."""
        self._lives.validate()
        if self._operation is not None:
            for name in (*self._operation.coming, *self._operation.leaving):
                assert self._lives.named(name) is not None, f"{self._operation.title} waits for {name}, which is not there"
