"""The controller as an actor: carries out on Ray what the pure one (`controller.py`) orders, and tells it what comes of that.

All actors and placement groups are detached and named, so that a cluster outlives the command that started it, and the controller
its own life: Ray starts it again, and it goes on with what it wrote down (`memory.py`) and finds running. It pings every process
once a second; gateways notice if it stops doing so (`actors.Lookout`).
"""

import asyncio
import os
import time
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, assert_never, cast

import ray as typed_ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from orchestrator.core.commands import ClearTimer, SetTimer
from orchestrator.core.config import ClusterConfig, ConfigError
from orchestrator.core.events import TimerFired
from orchestrator.core.types import GatewayId
from orchestrator.fleet import memory
from orchestrator.fleet.actors import (
    NAMESPACE,
    STOP_S,
    Description,
    DraftProcess,
    GatewayProcess,
    NodeProcess,
    StoreProcess,
    asking,
    remote,
)
from orchestrator.fleet.controller import Controller
from orchestrator.fleet.groups import GroupProcess
from orchestrator.fleet.processes import (
    Part,
    ProcessName,
    State,
    bundles_of,
    cannot_be_placed,
    parts_of,
    pool_of,
    strategy_of,
    unplaceable,
)
from orchestrator.fleet.vital import Vital, end, end_by, own_vital
from orchestrator.fleet.words import (
    Answer,
    BackoffTimer,
    BootAsked,
    Command,
    ConfigGiven,
    Drain,
    DrainAsked,
    EndAsked,
    Event,
    Found,
    HostUsed,
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
    Settle,
    Start,
    StartFailed,
    Stop,
    TellMembers,
)
from orchestrator.live.front import HostStore, Membership, NodePlace
from orchestrator.live.secret import drawn_secret

#: Ray's own annotations are too loose for the checker.
ray = cast(Any, typed_ray)

#: Seconds Ray gets to place a process that fits somewhere.
PLACEMENT_S = 8.0
#: Seconds a process gets to load its model and serve.
START_S = 900.0
#: Seconds between two pings of a process, and between two looks at one that has not answered.
PING_EVERY_S = 1.0
#: Seconds that a process gets to answer a question other than a ping.
ASK_S = 5.0
#: Seconds in which gateways must know a process that serves, and how often they are asked.
SETTLE_S = 30.0
SETTLE_EVERY_S = 0.1
#: Seconds that the nodes of a host wait for a store which starts.
STORE_S = 30.0
#: Lines of news kept for commands.
NEWS_MAX = 1000
#: What an operator may wish for by `ask`.
Wish = DrainAsked | ReturnAsked | ResizeAsked | RestartAsked | ConfigGiven


@dataclass(frozen=True, slots=True)
class Started:
    """How a start went: the gateways' URLs, or the problem that ended it."""

    urls: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class News:
    """What the controller has to tell: how many processes are up, and the lines since the last look."""

    up: int
    processes: int
    serial: int
    lines: tuple[str, ...]


@dataclass(slots=True)
class _Life:
    """One start of a process, from its order to its end."""

    part: Part
    incarnation: int
    #: The hosts that its nodes are on, as Ray names them; that of the process comes first. None while it has no place.
    hosts: tuple[str, ...] = ()
    #: What its nodes were told last of their hosts' stores, by host.
    told_stores: Mapping[str, HostStore] = field(default_factory=dict[str, HostStore])
    #: And of the processes that draft for them.
    told_drafters: tuple[str, ...] = ()
    handle: Any = None
    vital: Vital | None = None
    version: str = ""
    tasks: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])


class Silence:
    """How long a process has not answered, as far as this one can tell: while it stood still itself it heard nobody."""

    def __init__(self, now: float) -> None:
        self._seconds = 0.0
        self._looked = now

    def goes_on(self, now: float) -> float:
        """Nothing was heard since the last look either. Returns the seconds that count."""
        self._seconds += min(now - self._looked, 2 * PING_EVERY_S)
        self._looked = now
        return self._seconds

    def ends(self, now: float) -> None:
        """The process has answered."""
        self._seconds, self._looked = 0.0, now


class ControllerProcess:
    """Actor: owns a cluster's membership."""

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._machine: Controller | None = None
        #: Stands for that of the cluster file where it says none.
        self._secret = ""
        self._lives: dict[ProcessName, _Life] = {}
        self._groups: dict[ProcessName, PlacementGroup] = {}
        self._timers: dict[ProcessName, asyncio.TimerHandle] = {}
        #: By host, as Ray names it.
        self._stores: dict[str, HostStore] = {}
        #: Addresses of the processes that draft, by pool.
        self._drafters: dict[str, tuple[str, ...]] = {}
        self._answers: dict[int, asyncio.Future[str | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        #: What gateways are being told of members; each message has a serial number, so that they may overtake each other.
        self._tellings: set[asyncio.Task[None]] = set()
        self._booting: asyncio.Task[str | None] | None = None
        self._members = Membership(serial=int(time.time()))
        self._news: deque[str] = deque(maxlen=NEWS_MAX)
        self._news_serial = 0
        self._wishes = 0
        self._vital = own_vital()
        self._resuming: asyncio.Task[None] | None = None
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._resuming = asyncio.get_running_loop().create_task(self._resume())

    # --- asked by commands --------------------------------------------------------------------------------------------

    async def start(self, config: ClusterConfig) -> Started:
        """Place and start everything; what was started is ended again if something cannot be. Once it runs, only say where."""
        await self._resumed()
        secret = config.cluster.secret
        if self._machine is None:
            offers = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            problem = unplaceable(config, parts_of(config), offers)
            if problem is not None:
                return Started(problem=problem)
            try:
                secret = secret or await asyncio.to_thread(drawn_secret, config)
            except ConfigError as error:
                return Started(problem=str(error))
        if self._machine is None:  # another command may have been faster meanwhile
            self._secret = secret
            self._machine = Controller(config)
            self._booting = asyncio.get_running_loop().create_task(self._wish(BootAsked(self._next_wish())))
        if self._booting is not None:
            problem = await self._booting
            if problem is not None:
                memory.forget(self._cluster)
                return Started(problem=problem)
        return Started(urls=tuple(self._members.gateways.values()))

    async def ask(self, wish: Wish) -> str | None:
        """Do what an operator wishes; its serial number is set here. Returns once it is done, with the problem if it is not."""
        await self._resumed()
        return await self._wish(replace(wish, serial=self._next_wish()))

    async def end(self, drain_s: float) -> str | None:
        """Let running requests end, up to `drain_s`, and end all processes. Returns the problem if some did not end."""
        await self._resumed()
        problem = await self._wish(EndAsked(self._next_wish(), drain_s)) if self._machine is not None else None
        memory.forget(self._cluster)
        return problem

    async def news(self, after: int) -> News:
        """Return what was told after line number `after`."""
        missed = self._news_serial - after if after <= self._news_serial else self._news_serial
        lines = tuple(self._news)[max(len(self._news) - missed, 0) :] if missed else ()
        processes = self._machine.processes if self._machine is not None else ()
        up = sum(process.state is State.UP for process in processes)
        return News(up, len(processes), self._news_serial, lines)

    async def drain_s(self) -> float:
        """Return the seconds that the cluster file gives running requests."""
        await self._resumed()
        return self._machine.config.cluster.drain_s if self._machine is not None else 0.0

    async def status(self) -> dict[str, Any]:
        """Return how the cluster and its processes are, as JSON-able values."""
        await self._resumed()
        assert self._machine is not None, "nothing was started"
        reports = await asyncio.gather(*(self._ask_life(life, "status") for life in self._gateways()))
        return {
            "cluster": self._cluster,
            "version": version("weft"),
            "busy_with": self._machine.busy_with,
            "processes": [
                {
                    "process": process.part.name,
                    "group": process.part.group,
                    "nodes": list(process.part.nodes),
                    "state": str(process.state),
                    "incarnation": process.incarnation,
                    "restarts": process.restarts,
                    "failures": process.failures,
                    "address": process.address if process.serves else "",
                    "version": self._lives[process.part.name].version if process.part.name in self._lives else "",
                }
                for process in self._machine.processes
            ],
            "gateways": [report for report in reports if report is not None],
        }

    async def incarnation_of(self, name: ProcessName) -> int | None:
        """Return which start of a process is the cluster's; None if the cluster has no such process."""
        await self._resumed()
        processes = self._machine.processes if self._machine is not None else ()
        return next((process.incarnation for process in processes if process.part.name == name), None)

    async def restart(self) -> None:
        """End this process; Ray starts it again, from what is installed now, and it goes on with the cluster."""
        await self._in_order()
        os._exit(0)

    # --- the machine --------------------------------------------------------------------------------------------------

    def _next_wish(self) -> int:
        self._wishes += 1
        return self._wishes

    async def _wish(self, wish: Wish | BootAsked | EndAsked) -> str | None:
        answer = self._answers[wish.serial] = asyncio.get_running_loop().create_future()
        self._handle(wish)
        return await answer

    def _handle(self, event: Event) -> None:
        assert self._machine is not None, f"{event} before the start"
        try:
            for order in self._machine.handle(event, time.time()):
                self._carry_out(order)
            self._machine.validate()
        except Exception as error:  # A controller that broke its own rules cannot go on: the next one starts from what runs.
            end_by(error)

    def _carry_out(self, order: Command) -> None:
        match order:
            case Start():
                life = self._lives[order.part.name] = _Life(order.part, order.incarnation)
                self._spawn(self._start(life, order.address), life)
            case Drain() | Stop() | Settle():
                life = self._life(order.name, order.incarnation)
                if life is not None:
                    self._spawn(self._see_to(order, life))
            case Kill(name, incarnation):
                life = self._life(name, incarnation)
                if life is not None:
                    self._kill(life)
            case Release(name):
                group = self._groups.pop(name, None)
                if group is not None:
                    remove_placement_group(group)
            case TellMembers():
                self._tell_members(order)
            case Keep():
                memory.write(self._cluster, cast(Controller, self._machine).config, order)
            case SetTimer(BackoffTimer(name), at):
                self._clear_timer(name)
                loop = asyncio.get_running_loop()
                self._timers[name] = loop.call_later(max(at - time.time(), 0.0), self._on_timer, name)
            case ClearTimer(BackoffTimer(name)):
                self._clear_timer(name)
            case Say(line):
                self._news_serial += 1
                self._news.append(line)
            case Answer(serial, problem):
                self._answers.pop(serial).set_result(problem)
            case _:
                assert_never(order)

    def _on_timer(self, name: ProcessName) -> None:
        del self._timers[name]
        self._handle(TimerFired(BackoffTimer(name)))

    def _clear_timer(self, name: ProcessName) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    # --- orders -------------------------------------------------------------------------------------------------------

    async def _start(self, life: _Life, address: str) -> None:
        """Start a process, say how it went, and watch it from then on."""
        name = life.part.name
        problem = await self._try_start(life, address)
        if isinstance(problem, str):
            self._handle_of(life, StartFailed(name, life.incarnation, problem))
            return
        life.version = problem.version
        self._handle_of(life, _serves(problem))
        if life.part.nodes:
            await self._tell_stores(life)
            await self._tell_drafters(life)
        await self._watch(life)

    def _handle_of(self, life: _Life, event: Event) -> None:
        """Tell the machine of a life, unless that was ended meanwhile."""
        if self._lives.get(life.part.name) is life:
            if isinstance(event, StartFailed):
                self._kill(life, cancel=False)
            self._handle(event)

    async def _try_start(self, life: _Life, address: str) -> Description | str:
        """Place and start a process and wait until it serves. Returns what it says of itself, or the problem."""
        try:
            problem = await self._place(life.part)
            if problem is not None:
                return problem
            life.hosts = self._hosts_of(life.part)
            if life.part.nodes:
                life.told_stores = await self._stores_of(life.hosts)
            life.handle = self._actor(life)
            config = self._effective_config()
            more: tuple[Any, ...] = (life.told_stores,) if life.part.nodes else ()
            if life.part.is_gateway:
                more = (self._http_port(life.part, address), self._members)
            found: Description = await asyncio.wait_for(life.handle.start.remote(config, *more), START_S)
            life.vital = await asyncio.wait_for(life.handle.ping.remote(self._vital), ASK_S)
        except RayTaskError as error:
            return one_line(cast(BaseException, error.cause))
        except RayActorError:
            return f"its process ended while it started; its log is under {_log_folder()}"
        except TimeoutError:
            return f"did not serve within {START_S:g} s"
        except (RayError, ValueError) as error:
            return one_line(error)
        return found

    async def _place(self, part: Part) -> str | None:
        """Reserve what a process asks for. Returns the problem if there is no room; it stays asked for."""
        if part.is_store:
            return None
        machine = cast(Controller, self._machine)
        bundles = bundles_of(machine.config, part)
        group = self._groups.get(part.name)
        if group is None:
            unique = f"{self._cluster}/{part.name}"
            strategy = strategy_of(machine.config, part)
            group = self._groups[part.name] = placement_group(bundles, strategy=strategy, name=unique, lifetime="detached")
        if await asyncio.to_thread(group.wait, PLACEMENT_S):
            return None
        return cannot_be_placed(part.group, 1, bundles, [node["Resources"] for node in ray.nodes() if node["Alive"]])

    def _hosts_of(self, part: Part) -> tuple[str, ...]:
        """Return the hosts on which a process and its nodes have their places, that of the process first."""
        if part.is_store:
            return (part.host,)
        table: dict[str, Any] = ray.util.placement_group_table(self._groups[part.name])
        places: dict[int, str] = table["bundles_to_node_id"]
        return tuple(dict.fromkeys(places[number] for number in range(part.size) if number in places))

    def _actor(self, life: _Life) -> Any:
        """Ask Ray for a process."""
        config = cast(Controller, self._machine).config
        bundle = next(iter(bundles_of(config, life.part)), dict[str, float]())
        options = {
            "name": self._actor_name(life),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_concurrency": 8,
            **asking(bundle),
            "scheduling_strategy": self._strategy(life.part),
        }
        return remote(_kind(config, life.part), options).remote(life.part, life.incarnation)

    def _strategy(self, part: Part) -> Any:
        if part.is_store:
            return NodeAffinitySchedulingStrategy(part.host, soft=False)
        return PlacementGroupSchedulingStrategy(self._groups[part.name], placement_group_bundle_index=0)

    def _actor_name(self, life: _Life) -> str:
        return f"{self._cluster}/{life.part.name}/{life.incarnation}"

    def _effective_config(self) -> ClusterConfig:
        config = cast(Controller, self._machine).config
        return replace(config, cluster=replace(config.cluster, secret=config.cluster.secret or self._secret))

    def _http_port(self, part: Part, address: str) -> int:
        """Return the port a gateway should listen on: as the file says, else the one it had, so that clients find it again."""
        first = cast(Controller, self._machine).config.gateway.http_port
        if first:
            return first + part.number
        return int(address.rpartition(":")[2]) if address else 0

    async def _watch(self, life: _Life) -> None:
        """Ping a process until it is dead or was ended."""
        name, silence = life.part.name, Silence(time.monotonic())
        while self._lives.get(name) is life:
            ping = asyncio.ensure_future(life.handle.ping.remote(self._vital))
            while not (await asyncio.wait((ping,), timeout=PING_EVERY_S))[0]:
                self._handle(ProcessSilent(name, life.incarnation, silence.goes_on(time.monotonic())))
                if self._lives.get(name) is not life:
                    ping.cancel()
                    return
            try:
                life.vital = ping.result()
                silence.ends(time.monotonic())
            except (RayTaskError, ActorUnavailableError):
                self._handle(ProcessSilent(name, life.incarnation, silence.goes_on(time.monotonic())))
            except RayActorError:
                self._handle(ProcessDied(name, life.incarnation))
                return
            await asyncio.sleep(PING_EVERY_S)

    async def _see_to(self, order: Drain | Stop | Settle, life: _Life) -> None:
        match order:
            case Drain(name, incarnation, seconds, lingers):
                await self._in_order()
                most = seconds + cast(Controller, self._machine).config.gateway.linger_s + STOP_S
                clean = await self._ask_life(life, "drain", seconds, lingers, within_s=most)
                self._handle(ProcessDrained(name, incarnation, bool(clean)))
            case Stop(name, incarnation):
                await self._ask_life(life, "stop", within_s=STOP_S)
                self._kill(life)
                self._handle(ProcessStopped(name, incarnation))
            case Settle(name, incarnation):
                problem = await self._settle(life)
                self._handle(ProcessSettled(name, incarnation, problem))
            case _:
                assert_never(order)

    async def _settle(self, life: _Life) -> str | None:
        """Wait until the gateways that take requests are ready and know a process. Returns the problem if that takes too long."""
        until = time.monotonic() + SETTLE_S
        while True:
            await self._in_order()
            taking = [gateway for gateway in self._gateways() if gateway.part.number in self._members.gateways]
            answers = await asyncio.gather(*(self._ask_life(one, "settled", life.part.nodes) for one in taking))
            late = [one.part.name for one, answer in zip(taking, answers, strict=True) if not answer]
            if not late:
                return None
            if time.monotonic() > until:
                return f"it serves, and {', '.join(late)} is not ready with it after {SETTLE_S:g} s"
            await asyncio.sleep(SETTLE_EVERY_S)

    def _kill(self, life: _Life, cancel: bool = True) -> None:
        """End a process at once, also one that hangs."""
        if self._lives.get(life.part.name) is life:
            del self._lives[life.part.name]
        if life.handle is not None:
            ray.kill(life.handle)
        if life.vital is not None:
            end(life.vital)
        current = asyncio.current_task()
        for task in life.tasks if cancel else ():
            if task is not current:
                task.cancel()

    # --- gateways -----------------------------------------------------------------------------------------------------

    def _gateways(self) -> list[_Life]:
        """Return the gateways that can be asked."""
        processes = cast(Controller, self._machine).processes
        names = [process.part.name for process in processes if process.part.is_gateway and process.serves]
        return [self._lives[name] for name in names if name in self._lives]

    def _tell_members(self, order: TellMembers) -> None:
        nodes = tuple(NodePlace(node, pool, address) for node, pool, address in order.nodes)
        gateways: Mapping[GatewayId, str] = {GatewayId(number): url for number, url in order.gateways.items()}
        stores = tuple(HostStore(store, address) for store, _, address in order.stores)
        self._members = Membership(self._members.serial + 1, nodes, gateways, stores)
        self._stores = {host: HostStore(store, address) for store, host, address in order.stores}
        pools = dict.fromkeys(pool for pool, _, _ in order.drafters)
        self._drafters = {name: tuple(address for pool, _, address in order.drafters if pool == name) for name in pools}
        for life in self._lives.values():
            if life.part.nodes and life.vital is not None:
                self._spawn(self._tell_stores(life), life)
                self._spawn(self._tell_drafters(life), life)
        telling = self._spawn(self._tell_gateways(self._members))
        self._tellings.add(telling)
        telling.add_done_callback(self._tellings.discard)

    async def _tell_gateways(self, members: Membership) -> None:
        await asyncio.gather(*(self._ask_life(life, "set_members", members) for life in self._gateways()))

    async def _stores_of(self, hosts: Sequence[str]) -> dict[str, HostStore]:
        """Return hosts' stores; one that is being started is waited for, since it comes before the nodes of its host."""
        for host in hosts:
            self._handle(HostUsed(host))
        for _ in range(int(STORE_S / SETTLE_EVERY_S)):
            if not any(self._store_starts(host) for host in hosts if host not in self._stores):
                break
            await asyncio.sleep(SETTLE_EVERY_S)
        return {host: self._stores[host] for host in hosts if host in self._stores}

    def _store_starts(self, host: str) -> bool:
        processes = cast(Controller, self._machine).processes
        return any(process.part.host == host and process.state is State.STARTING for process in processes)

    async def _tell_stores(self, life: _Life) -> None:
        """Tell a process with nodes of its hosts' stores, if it was told otherwise before."""
        stores = {host: self._stores[host] for host in life.hosts if host in self._stores}
        if stores == life.told_stores:
            return
        life.told_stores = stores
        await self._ask_life(life, "set_stores", stores)

    async def _tell_drafters(self, life: _Life) -> None:
        """Tell a process with nodes which processes draft for them, if it was told otherwise before."""
        wanted = pool_of(cast(Controller, self._machine).config, life.part).engine.speculation.draft_pool
        drafters = self._drafters.get(wanted, ())
        if drafters == life.told_drafters:
            return
        life.told_drafters = drafters
        await self._ask_life(life, "set_drafters", self._members.serial, drafters)

    async def _in_order(self) -> None:
        """Wait until the gateways know what they were to be told up to now."""
        if self._tellings:
            await asyncio.wait(tuple(self._tellings))

    async def _ask_life(self, life: _Life, method: str, *arguments: Any, within_s: float = ASK_S) -> Any:
        """Call a process that may be dead or hung; None if it did not answer, which its watch finds out too."""
        if life.handle is None:
            return None
        try:
            return await asyncio.wait_for(getattr(life.handle, method).remote(*arguments), within_s)
        except (RayError, TimeoutError):
            return None

    # --- after a restart of the controller ----------------------------------------------------------------------------

    async def _resumed(self) -> None:
        if self._resuming is not None:
            await asyncio.wait((self._resuming,))

    async def _resume(self) -> None:
        """Take over what a former life of this controller started."""
        try:
            remembered = memory.read(self._cluster)
            if remembered is None:
                return
            lives, described = await self._find_lives()
            drawn = next((one.config.cluster.secret for one in described), "")
            self._secret = drawn or await asyncio.to_thread(drawn_secret, remembered.config)
            self._machine = Controller(_with_known_secrets(remembered, described), remembered.kept)
            for part in remembered.kept.parts:
                self._find_group(part)
            for life in lives:
                self._lives[life.part.name] = life
                self._find_group(life.part)
                if life.part.name in self._groups:
                    life.hosts = self._hosts_of(life.part)
            found = [
                Found(one.part, one.incarnation, cast(str, one.address), one.fingerprints, one.draining, one.node_addresses)
                for one in described
            ]
            self._handle(Resumed(tuple(found)))
            for life in lives:
                if self._lives.get(life.part.name) is life:
                    self._spawn(self._watch(life), life)
        except Exception as error:  # Half a memory is none: the next life tries again.
            end_by(error)

    def _find_group(self, part: Part) -> None:
        try:
            self._groups[part.name] = get_placement_group(f"{self._cluster}/{part.name}")
        except ValueError:
            self._groups.pop(part.name, None)

    async def _find_lives(self) -> tuple[list[_Life], list[Description]]:
        """Return the processes that serve, oldest first; what does not is ended."""
        named: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
        prefix = f"{self._cluster}/"
        names = [entry["name"] for entry in named if entry["namespace"] == NAMESPACE and entry["name"].startswith(prefix)]
        lives: list[_Life] = []
        described: list[Description] = []
        for name in sorted(names, key=lambda name: name.rpartition("/")[2]):
            if name.count("/") != prefix.count("/") + 1:
                continue
            handle = ray.get_actor(name, NAMESPACE)
            try:
                found = await asyncio.wait_for(handle.describe.remote(), ASK_S)
                vital = await asyncio.wait_for(handle.ping.remote(self._vital), ASK_S)
            except (RayError, TimeoutError):
                found = vital = None
            if found is None or vital is None or found.address is None:
                ray.kill(handle)
                continue
            lives.append(_Life(found.part, found.incarnation, (vital.host,), handle=handle, vital=vital, version=found.version))
            described.append(found)
        return lives, described

    # --- parts --------------------------------------------------------------------------------------------------------

    def _life(self, name: ProcessName, incarnation: int) -> _Life | None:
        life = self._lives.get(name)
        return life if life is not None and life.incarnation == incarnation else None

    def _spawn(self, work: Coroutine[Any, Any, None], life: _Life | None = None) -> asyncio.Task[None]:
        """Run something beside; an error in it ends this controller, and the next one goes on."""
        task = asyncio.get_running_loop().create_task(work)
        for tasks in (self._tasks, *((life.tasks,) if life is not None else ())):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        task.add_done_callback(_exit_on_error)
        return task


def _kind(config: ClusterConfig, part: Part) -> type:
    """Return the actor that a process is."""
    if part.is_store:
        return StoreProcess
    if part.is_gateway:
        return GatewayProcess
    if not part.nodes:
        return DraftProcess
    return NodeProcess if pool_of(config, part).split is None else GroupProcess


def one_line(error: BaseException) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _with_known_secrets(remembered: memory.Memory, described: list[Description]) -> ClusterConfig:
    """Return the cluster's configuration with the secrets that its processes know."""
    if not remembered.lacks_secrets or not described:
        return remembered.config
    drawn = not remembered.config.cluster.secret
    config = described[-1].config
    return replace(config, cluster=replace(config.cluster, secret="")) if drawn else config


def _serves(found: Description) -> ProcessServes:
    assert found.address is not None, f"{found.part.name} has started and does not serve"
    return ProcessServes(found.part.name, found.incarnation, found.address, found.fingerprints, found.node_addresses)


def _exit_on_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        end_by(error)


def _log_folder() -> str:
    return str(ray._private.worker._global_node.get_logs_dir_path())
