"""Starts, watches and replaces a cluster's processes on Ray. The only file of the orchestrator that imports Ray.

    command ──> Fleet ──> Controller ──> NodeProcess ...     one actor a process, each in a bundle of its pool's placement group
                                   └──> GatewayProcess ...

The command (`Fleet`) holds the Ray connection and asks one controller for everything else. All actors are detached and named, and
Ray restarts the controller, which then finds the others by their names and goes on. In local mode the command also owns Ray
itself, so that everything ends with it. The token path never crosses Ray: gateways and nodes speak gRPC.

A node process that dies is started again under the same ids with a higher incarnation, in the same bundle; gateways hear of the
death at once and of the new address when it serves. A process that keeps dying is given up, with its last problem in the news.
"""

import asyncio
import math
import os
import secrets
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import ray as typed_ray
from ray._private import ray_constants
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.core.config import ClusterConfig, PoolConfig
from orchestrator.core.types import GatewayId, NodeId, PoolName
from orchestrator.fleet.loops import LoopThread, serve_long
from orchestrator.fleet.members import Member, State, bundles_of, fits_nowhere, members_of, pools_by_node, unplaceable
from orchestrator.live.front import Front, FrontAddress, Membership, NodePlace
from orchestrator.live.secret import with_secrets
from workers.engines.checkpoint import default_model_path, fingerprint
from workers.ray_transport import RayObjects
from workers.server import DriverLimits, NodeServer

#: Ray's own annotations are too loose for the checker.
ray = cast(Any, typed_ray)
# Nothing is sent to Ray's makers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

NAMESPACE = "weft"
#: Seconds Ray gets to place a group that fits somewhere.
PLACEMENT_S = 8.0
#: Seconds a process gets to load its model and serve.
START_S = 900.0
#: Seconds between two pings of a process, and that one may take.
PING_EVERY_S = 1.0
PING_S = 5.0
#: Pings in a row that a process may miss before it counts as hung.
PINGS_MISSED_MAX = 3
#: Seconds a stopping process gets to close what it holds.
STOP_S = 5.0
#: Seconds a Ray cluster's address gets to take a connection.
CONNECT_S = 5.0
#: Lines of news kept for the command.
NEWS_MAX = 1000
#: Seconds between two looks of the command at its cluster.
LOOK_EVERY_S = 0.5
#: Bytes of Ray's object store on a local cluster, where blocks move through shared memory of our own.
LOCAL_STORE_BYTES = 200 * 1024 * 1024
#: Ray starts a local cluster's workers with a lower priority and measures itself; neither is wanted here.
LOCAL_SETTINGS = {"worker_niceness": 0, "enable_metrics_collection": False}


class FleetFailed(Exception):
    """The cluster cannot be started or reached; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class NodeAddress:
    """Where a process serves its nodes, and what they compute with."""

    address: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Started:
    """How a start went: the gateways' URLs, or the problem that ended it."""

    urls: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class News:
    """What the controller has to tell: how many processes are up, and the lines since the last look."""

    up: int
    members: int
    serial: int
    lines: tuple[str, ...]


def model_folder(config: ClusterConfig, model: str) -> Path:
    """Return a model's checkpoint directory on this host; the built-in one is made if need be."""
    path = config.models[model].path
    return Path(path) if path else default_model_path()


# --- actors -----------------------------------------------------------------------------------------------------------


class NodeProcess:
    """Actor: the nodes of one process."""

    def __init__(self, config: ClusterConfig, pool: PoolConfig, nodes: Sequence[NodeId], incarnation: int) -> None:
        self._config = config
        self._pool = pool
        self._nodes = tuple(nodes)
        self._incarnation = incarnation
        self._loop = LoopThread("node")
        self._server: NodeServer | None = None
        self._address: NodeAddress | None = None
        self._watch: asyncio.Task[None] | None = None
        # Read when the engine's libraries are loaded: threads that wait for work by spinning take the cores of other nodes.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    def start(self) -> NodeAddress:
        """Open the engine and serve; once it serves, only say where."""
        if self._address is not None:
            return self._address
        self._config = with_secrets(self._config)
        folder = model_folder(self._config, self._pool.model)
        name = fingerprint(folder)
        self._address = NodeAddress(self._loop.run(self._serve(folder)), name)
        serve_long()
        return self._address

    def ping(self) -> int:
        """Return the process id; comes back only if the event loop turns."""
        return self._loop.run(_process_id(), PING_S)

    def drain(self, seconds: float) -> bool:
        """Take nothing new and let what runs end; False if some did not."""
        return self._server is None or self._loop.run(self._server.drain(seconds))

    def stop(self) -> None:
        """Stop serving and close the engine."""
        if self._watch is not None:
            self._watch.cancel()
        if self._server is not None:
            self._loop.run(self._server.stop(), STOP_S)
        self._loop.stop()

    async def _serve(self, folder: Path) -> str:
        limits = DriverLimits(gateway_lost_s=self._config.cluster.node_lost_s)
        host = ray.util.get_node_ip_address()
        journal = self._config.cluster.journal
        self._server = NodeServer(self._pool, self._nodes, self._incarnation, folder, host, RayObjects(), limits, journal)
        address = await self._server.start()
        self._watch = asyncio.ensure_future(_exit_on_failure(self._server))
        return address


class GatewayProcess:
    """Actor: one gateway."""

    def __init__(self, config: ClusterConfig, number: GatewayId, http_port: int) -> None:
        self._config = config
        self._number = number
        self._http_port = http_port
        self._loop = LoopThread("gateway")
        self._front: Front | None = None
        self._address: FrontAddress | None = None

    def start(self) -> FrontAddress:
        """Read the models' text sides and serve; once it serves, only say where."""
        if self._address is not None:
            return self._address
        self._config = with_secrets(self._config)
        folders = {model: model_folder(self._config, model) for model in self._config.models}
        names = {model: fingerprint(folder) for model, folder in folders.items()}
        self._address = self._loop.run(self._serve(folders, names))
        serve_long()
        return self._address

    def ping(self) -> int:
        """Return the process id; comes back only if the event loop turns."""
        return self._loop.run(_process_id(), PING_S)

    def set_members(self, members: Membership) -> None:
        """Tell the gateway all nodes, and all gateways that take requests."""
        self._loop.run(self._running.set_members(members))

    def mark_dead(self, nodes: Sequence[NodeId]) -> None:
        """Tell the gateway that nodes died."""
        self._loop.run(self._running.mark_dead(nodes))

    def drain(self, seconds: float) -> bool:
        """Take nothing new and let what runs end; False if some did not."""
        return self._front is None or self._loop.run(self._front.drain(seconds))

    def stop(self) -> None:
        """Stop serving."""
        if self._front is not None:
            self._loop.run(self._front.stop(), STOP_S)
        self._loop.stop()

    @property
    def _running(self) -> Front:
        assert self._front is not None, "not started"
        return self._front

    async def _serve(self, folders: dict[str, Path], names: dict[str, str]) -> FrontAddress:
        reach, pools = ray.util.get_node_ip_address(), pools_by_node(self._config)
        self._front = Front(self._config, self._number, reach, self._http_port, folders, names, pools, _exit)
        return await self._front.start()


async def _process_id() -> int:
    return os.getpid()


async def _exit_on_failure(server: NodeServer) -> None:
    try:
        await server.wait()
    except Exception as error:  # Whatever it was, the node is in an unknown state: the controller starts a new process.
        _exit(error)


def _exit(error: BaseException) -> None:
    traceback.print_exception(error)
    os._exit(1)


class Controller:
    """Actor: owns a cluster's membership."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._members = members_of(config)
        self._groups: dict[str, PlacementGroup] = {}
        self._watches: list[asyncio.Task[None]] = []
        self._news: deque[str] = deque(maxlen=NEWS_MAX)
        self._serial = 0
        self._told = int(time.time())
        self._started: Started | None = None
        self._resuming: asyncio.Task[None] | None = None
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._resuming = asyncio.get_running_loop().create_task(self._resume())

    # --- asked by the command -----------------------------------------------------------------------------------------

    async def start(self) -> Started:
        """Place and start everything; what was started is stopped again if something cannot be. Once it runs, only say where."""
        if self._resuming is not None:
            await self._resuming
        if self._started is not None:
            return self._started
        try:
            await self._place()
            await self._start_all()
        except FleetFailed as problem:
            await self.stop(0.0)
            return Started(problem=str(problem))
        return self._serving()

    async def news(self, after: int) -> News:
        """Return what was told after line number `after`."""
        lines = tuple(self._news)[len(self._news) - min(self._serial - after, len(self._news)) :]
        up = sum(member.state is State.UP for member in self._members)
        return News(up, len(self._members), self._serial, lines)

    async def stop(self, drain_s: float) -> bool:
        """Let running requests end, up to `drain_s`, and end all processes; False if some requests did not end."""
        for watch in self._watches:
            watch.cancel()
        ends = [_quietly(member, "drain", drain_s, within_s=drain_s + STOP_S) for member in self._gateways]
        drained = await asyncio.gather(*ends)
        await asyncio.gather(*(_quietly(member, "stop", within_s=STOP_S) for member in reversed(self._members)))
        for member in self._members:
            if member.handle is not None:
                ray.kill(member.handle)
        for group in self._groups.values():
            remove_placement_group(group)
        return all(drained)

    # --- starting -----------------------------------------------------------------------------------------------------

    @property
    def _gateways(self) -> list[Member]:
        return [member for member in self._members if member.gateway is not None]

    @property
    def _nodes(self) -> list[Member]:
        return [member for member in self._members if member.gateway is None]

    def _serving(self) -> Started:
        self._started = Started(urls=tuple(member.address for member in self._gateways))
        return self._started

    async def _place(self) -> None:
        offers = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        groups = bundles_of(self._members)
        for name, bundles in groups.items():
            if any(fits_nowhere(bundle, offers) for bundle in bundles):
                raise FleetFailed(unplaceable(name, bundles, offers))
        for name, bundles in groups.items():
            unique = f"{self._config.cluster.name}/{name}"
            self._groups[name] = placement_group(bundles, strategy="PACK", name=unique, lifetime="detached")
        placed = await asyncio.gather(*(asyncio.to_thread(group.wait, PLACEMENT_S) for group in self._groups.values()))
        for name, done in zip(self._groups, placed, strict=True):
            if not done:
                raise FleetFailed(unplaceable(name, groups[name], offers))

    async def _start_all(self) -> None:
        problems = await asyncio.gather(*(self._try_start(member) for member in self._members))
        for member, problem in zip(self._members, problems, strict=True):
            if problem is not None:
                raise FleetFailed(f"{member.name}: {problem}")
        self._check_fingerprints()
        await self._tell_members()
        self._watches = [asyncio.create_task(self._watch(member)) for member in self._members]

    async def _try_start(self, member: Member) -> str | None:
        """Start a process and wait until it serves. Returns the problem if it does not."""
        # After a restart of the controller nobody knows how often a dead process had been started: seconds always grow.
        member.incarnation = max(member.incarnation + 1, int(time.time()))
        member.state = State.STARTING
        try:
            member.handle = self._actor(member)
            found = await asyncio.wait_for(member.handle.start.remote(), START_S)
        except RayTaskError as error:
            return _line(cast(BaseException, error.cause))
        except RayActorError:
            return f"its process ended while it started; its log is under {_log_folder()}"
        except TimeoutError:
            return f"did not serve within {START_S:g} s"
        except (RayError, ValueError) as error:
            return _line(error)
        match found:
            case NodeAddress():
                member.address = found.address
                member.fingerprints = {cast(PoolConfig, member.pool).model: found.fingerprint}
            case FrontAddress():
                member.address = found.url
                member.fingerprints = dict(found.fingerprints)
            case _:
                raise AssertionError(f"{member.name} started as {found!r}")
        member.went_up(time.monotonic())
        return None

    def _actor(self, member: Member) -> Any:
        """Ask Ray for a member's process."""
        options = {
            "name": f"{self._config.cluster.name}/{member.name}/{member.incarnation}",
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_concurrency": 4,
            "num_cpus": member.bundle.get("CPU", 0),
            "num_gpus": member.bundle.get("GPU", 0),
            "resources": {name: amount for name, amount in member.bundle.items() if name not in ("CPU", "GPU")},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._groups[member.group], placement_group_bundle_index=member.index
            ),
        }
        if member.gateway is not None:
            return _remote(GatewayProcess, options).remote(self._config, member.gateway, self._http_port(member))
        return _remote(NodeProcess, options).remote(self._config, member.pool, member.nodes, member.incarnation)

    def _http_port(self, member: Member) -> int:
        """Return the port a gateway should listen on: the one it had, so that clients find it again."""
        if member.address:
            return int(member.address.rpartition(":")[2])
        return _nth_port(self._config.gateway.http_port, member.index)

    def _check_fingerprints(self) -> None:
        seen: dict[str, tuple[str, str]] = {}
        for member in self._members:
            for model, name in member.fingerprints.items():
                first, other = seen.setdefault(model, (name, member.name))
                if first != name:
                    raise FleetFailed(f"model {model}: {member.name} and {other} have different checkpoints ({name}, {first})")

    # --- watching -----------------------------------------------------------------------------------------------------

    async def _watch(self, member: Member) -> None:
        """Keep one process alive until it is given up."""
        while True:
            problem = await self._end_of(member)
            member.went_down(time.monotonic())
            self._tell(f"{member.name} {problem}")
            if member.handle is not None:
                ray.kill(member.handle)
            await self._tell_dead(member)
            while member.state is State.DOWN:
                await self._restart(member)
            if member.state is State.GIVEN_UP:
                self._tell(f"{member.name} is given up after {member.failures} failures in a row")
                return

    async def _end_of(self, member: Member) -> str:
        """Ping a process until it is dead or hung. Returns which."""
        if member.handle is None:
            return "is gone"
        missed = 0
        while missed < PINGS_MISSED_MAX:
            try:
                await asyncio.wait_for(member.handle.ping.remote(), PING_S)
                missed = 0
            except RayActorError:
                return "died"
            except (TimeoutError, RayTaskError):
                missed += 1
            await asyncio.sleep(PING_EVERY_S)
        return "does not answer"

    async def _restart(self, member: Member) -> None:
        await asyncio.sleep(member.backoff_s)
        member.restarts += 1
        started = time.monotonic()
        problem = await self._try_start(member)
        if problem is None:
            self._tell(f"{member.name} serves again after {time.monotonic() - started:.1f} s")
            await self._tell_members()
        else:
            self._tell(f"{member.name}: {problem}")
            member.went_down(time.monotonic())

    async def _tell_dead(self, member: Member) -> None:
        if member.nodes:
            await self._tell_gateways("mark_dead", member.nodes)

    async def _tell_members(self) -> None:
        """Tell all gateways who is there."""
        self._told += 1
        nodes = [
            NodePlace(node, PoolName(cast(PoolConfig, member.pool).name), member.address if member.state is State.UP else "")
            for member in self._nodes
            for node in member.nodes
        ]
        gateways = {cast(GatewayId, member.gateway): member.address for member in self._gateways if member.state is State.UP}
        await self._tell_gateways("set_members", Membership(self._told, tuple(nodes), gateways))

    async def _tell_gateways(self, method: str, argument: Any) -> None:
        up = [member for member in self._gateways if member.state is State.UP]
        await asyncio.gather(*(_quietly(member, method, argument, within_s=PING_S) for member in up))

    def _tell(self, line: str) -> None:
        self._serial += 1
        self._news.append(line)

    # --- after a restart of the controller ----------------------------------------------------------------------------

    async def _resume(self) -> None:
        """Take over what a former life of this controller started."""
        prefix = self._config.cluster.name
        for name in bundles_of(self._members):
            self._groups[name] = get_placement_group(f"{prefix}/{name}")
        named: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
        alive = [entry["name"] for entry in named if entry["namespace"] == NAMESPACE]
        for member in self._members:
            for name in alive:
                if name.startswith(f"{prefix}/{member.name}/"):
                    await self._adopt(member, name)
        self._tell("the controller was started again")
        await self._tell_members()
        self._watches = [asyncio.create_task(self._watch(member)) for member in self._members]
        self._serving()

    async def _adopt(self, member: Member, name: str) -> None:
        member.handle = ray.get_actor(name, NAMESPACE)
        member.incarnation = int(name.rpartition("/")[2])
        # An actor that serves already answers `start` by saying where.
        member.state = State.DOWN
        found = await _quietly(member, "start", within_s=START_S)
        if isinstance(found, NodeAddress | FrontAddress):
            member.address = found.address if isinstance(found, NodeAddress) else found.url
            member.went_up(time.monotonic())


def _remote(kind: type, options: dict[str, Any]) -> Any:
    """Return Ray's handle factory of a class."""
    return ray.remote(kind).options(**options)


def _nth_port(first: int, index: int) -> int:
    return first + index if first else 0


def _line(error: BaseException) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _log_folder() -> str:
    return str(ray._private.worker._global_node.get_logs_dir_path())


async def _quietly(member: Member, method: str, *arguments: Any, within_s: float) -> Any:
    """Call a member that may be dead or hung; None if it did not answer, which its watch finds out too."""
    if member.handle is None:
        return None
    try:
        return await asyncio.wait_for(getattr(member.handle, method).remote(*arguments), within_s)
    except (RayError, TimeoutError):
        return None


# --- the command's side -----------------------------------------------------------------------------------------------


class Fleet:
    """A cluster as the command that starts it holds it; a context manager that leaves nothing running.

    Args:
        config: the cluster's; a missing secret is drawn.
        address: a running Ray cluster (`ray://host:port` or `host:port`); None starts one here for as long as this lasts.
        attach: take over the cluster of that name if it runs there already.
    """

    def __init__(self, config: ClusterConfig, address: str | None = None, attach: bool = False) -> None:
        settings = config.cluster
        self._config = replace(config, cluster=replace(settings, secret=settings.secret or secrets.token_hex(32)))
        self._address = address
        self._attach = attach
        self._controller: Any = None
        self._serial = 0

    def __enter__(self) -> Self:
        """Connect to Ray, or start it. Raises `FleetFailed`."""
        try:
            if self._address is None:
                _start_ray(self._config)
            else:
                _look_for_ray(self._address)
                ray.init(address=self._address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
            where = "here" if self._address is None else f"at {self._address}"
            raise FleetFailed(f"cannot {'start' if self._address is None else 'reach'} Ray {where}: {_line(error)}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop what still runs, at once, and leave Ray."""
        try:
            self.stop(0.0)
        finally:
            ray.shutdown()

    def start(self, progress: Callable[[News], None], stopped: Callable[[], bool]) -> tuple[str, ...]:
        """Start the cluster and return its gateways' URLs once it serves.

        Args:
            progress: told now and then how far it is.
            stopped: asked now and then; True gives the start up and returns nothing.

        Raises:
            FleetFailed: a cluster of that name runs already, or this one cannot be started.
        """
        name = f"{self._config.cluster.name}/controller"
        options = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0, "max_restarts": -1}
        runs = {"name": name, "namespace": NAMESPACE} in ray.util.list_named_actors(all_namespaces=True)
        if runs and not self._attach:
            raise FleetFailed(f'a cluster named "{self._config.cluster.name}" runs there already; --attach takes it over')
        try:
            self._controller = ray.get_actor(name) if runs else _remote(Controller, options).remote(self._config)
            starting = self._controller.start.remote()
            while not ray.wait([starting], timeout=LOOK_EVERY_S)[0]:
                if stopped():
                    return ()
                progress(self.news())
            started: Started = ray.get(starting)
        except (RayError, ValueError) as error:
            raise FleetFailed(f"the controller failed: {_line(error)}") from error
        if started.problem:
            raise FleetFailed(started.problem)
        return started.urls

    def news(self) -> News:
        """Return what happened since the last call."""
        try:
            news: News = ray.get(self._controller.news.remote(self._serial), timeout=PING_S)
        except (GetTimeoutError, RayActorError):
            # The controller is being started again; it remembers no news.
            self._serial = 0
            return News(0, 0, 0, ())
        self._serial = news.serial
        return news

    def stop(self, drain_s: float) -> bool:
        """Let running requests end, up to `drain_s`, then end the cluster; False if some requests did not end."""
        if self._controller is None:
            return True
        controller, self._controller = self._controller, None
        try:
            drained: bool = ray.get(controller.stop.remote(drain_s), timeout=drain_s + 4 * STOP_S)
        except (GetTimeoutError, RayActorError):
            drained = False
        ray.kill(controller)
        return drained


def _look_for_ray(address: str) -> None:
    """See that something listens at an address: Ray itself would try for minutes. Raises `OSError`."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    loopback = host in ("127.0.0.1", "localhost")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
        if loopback:
            _keep_to_loopback()
    except OSError:
        if not loopback:
            raise
        # By a loopback address Ray means the machine's own.
        socket.create_connection((ray.util.get_node_ip_address(), int(port)), CONNECT_S).close()


def _keep_to_loopback() -> None:
    """Make Ray take a loopback address as it is: it does so only where it believes that it cannot form a cluster."""
    ray_constants.ENABLE_RAY_CLUSTER = False


def _start_ray(config: ClusterConfig) -> None:
    """Start Ray on this machine for this process alone, on the loopback address."""
    _keep_to_loopback()
    asked = sum(member.bundle.get("CPU", 0.0) for member in members_of(config))
    ray.init(
        address="local",
        num_cpus=min(max(1, math.ceil(asked)), os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        namespace=NAMESPACE,
        object_store_memory=LOCAL_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        _system_config=LOCAL_SETTINGS,
    )
