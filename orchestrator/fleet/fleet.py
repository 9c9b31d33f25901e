"""A handle on a cluster for commands: connect to Ray, find or start the controller, ask it, leave or end everything.

    command ──> Fleet ──> ControllerProcess ──> NodeProcess ...     one actor a process, each in a placement group of its own
                             ^            └──> GatewayProcess ...
                             └── Ray starts it again ──┘

All actors are detached and named: a cluster outlives the command. Only one whose Ray was started here, for the command alone,
ends with it. The token path never crosses Ray: gateways and nodes speak gRPC.
"""

import math
import os
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import ray as typed_ray
from ray._private import ray_constants
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from orchestrator.core.config import ClusterConfig
from orchestrator.fleet.actors import NAMESPACE, STOP_S, controller_name
from orchestrator.fleet.keeper import ControllerProcess, News, Started, Wish, one_line, remote
from orchestrator.fleet.processes import bundles_of, parts_of

#: Ray's own annotations are too loose for the checker.
ray = cast(Any, typed_ray)
# Nothing is sent to Ray's makers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

Result = TypeVar("Result")

#: Seconds a Ray cluster's address gets to take a connection, and a controller to answer a simple question.
CONNECT_S = 5.0
ANSWER_S = 10.0
#: Seconds between two looks of the command at what it waits for.
LOOK_EVERY_S = 0.5
#: Seconds that the end of a cluster may take beyond the drain.
END_S = 30.0
#: Bytes of Ray's object store on a local cluster, where blocks move through shared memory of our own.
LOCAL_STORE_BYTES = 200 * 1024 * 1024
#: Ray starts a local cluster's workers with a lower priority and measures itself; neither is wanted here.
LOCAL_SETTINGS = {"worker_niceness": 0, "enable_metrics_collection": False}


class FleetFailed(Exception):
    """The cluster cannot be started, reached or changed; the message is one line for the operator."""


class Fleet:
    """A connection to Ray and to the cluster of one name there; a context manager.

    Args:
        name: the cluster's.
        address: a running Ray cluster (`ray://host:port` or `host:port`); None starts one here for as long as this lasts.
        ends: end the cluster when this is left; always so with a Ray of its own.
        cpus: CPU cores that a Ray of its own offers.
    """

    def __init__(self, name: str, address: str | None, ends: bool = False, cpus: int = 1) -> None:
        self._name = name
        self._address = address
        self._ends = ends or address is None
        self._cpus = cpus
        self._controller: Any = None
        self._serial = 0

    @staticmethod
    def local(config: ClusterConfig) -> "Fleet":
        """Return a fleet with a Ray of its own, large enough for a cluster."""
        return Fleet(config.cluster.name, None, cpus=local_cpus(config))

    def __enter__(self) -> Self:
        """Connect to Ray, or start it. Raises `FleetFailed`."""
        try:
            if self._address is None:
                _start_ray(self._cpus)
            else:
                _look_for_ray(self._address)
                ray.init(address=self._address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
            where = "here" if self._address is None else f"at {self._address}"
            raise FleetFailed(f"cannot {'start' if self._address is None else 'reach'} Ray {where}: {one_line(error)}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave Ray; end what still runs, at once, if the cluster was to end."""
        try:
            if self._ends:
                self.end(0.0)
        finally:
            ray.shutdown()

    # --- starting and finding -----------------------------------------------------------------------------------------

    @property
    def runs(self) -> bool:
        """Whether a cluster of that name is there."""
        named = ray.util.list_named_actors(all_namespaces=True)
        return {"name": controller_name(self._name), "namespace": NAMESPACE} in named

    def start(self, config: ClusterConfig, progress: Callable[[News], None], stopped: Callable[[], bool]) -> tuple[str, ...]:
        """Start the cluster and return its gateways' URLs once it serves.

        Args:
            config: the cluster's.
            progress: told now and then how far it is.
            stopped: asked now and then; True gives the start up and returns nothing.

        Raises:
            FleetFailed: a cluster of that name runs already, or this one cannot be started.
        """
        name = controller_name(self._name)
        if self.runs:
            raise FleetFailed(f'a cluster named "{self._name}" runs there already; --attach takes it over')
        options = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0, "max_restarts": -1}
        try:
            self._controller = remote(ControllerProcess, options).remote(self._name)
        except (RayError, ValueError) as error:
            raise FleetFailed(f"the controller cannot be started: {one_line(error)}") from error
        started = self._await(self._controller.start.remote(config), progress, stopped)
        if started is None or started.problem:
            self.end(0.0)
        return _urls(started)

    def attach(self) -> tuple[str, ...]:
        """Take hold of the cluster that runs and return its gateways' URLs. Raises `FleetFailed`."""
        if not self.runs:
            raise FleetFailed(f'no cluster named "{self._name}" runs there')
        self._controller = ray.get_actor(controller_name(self._name), NAMESPACE)
        status = self._get("status")
        return tuple(one["address"] for one in status["processes"] if one["group"] == "gateways" and one["address"])

    # --- asking -------------------------------------------------------------------------------------------------------

    def ask(self, wish: Wish, progress: Callable[[News], None]) -> None:
        """Have something done and wait for it. Raises `FleetFailed` if it is refused or does not come about."""
        problem = self._await(self._controller.ask.remote(wish), progress, lambda: False)
        if problem is not None:
            raise FleetFailed(problem)

    def news(self) -> News:
        """Return what happened since the last call."""
        try:
            news: News = ray.get(self._controller.news.remote(self._serial), timeout=ANSWER_S)
        except (GetTimeoutError, RayActorError):
            # The controller is being started again; it remembers no news.
            self._serial = 0
            return News(0, 0, 0, ())
        self._serial = news.serial
        return news

    def status(self) -> dict[str, Any]:
        """Return how the cluster is. Raises `FleetFailed`."""
        return self._get("status")

    def drain_s(self) -> float:
        """Return the seconds that the cluster gives running requests. Raises `FleetFailed`."""
        return self._get("drain_s")

    def restart_controller(self) -> None:
        """Have the controller started again by Ray. Raises `FleetFailed`."""
        try:
            ray.get(self._controller.restart.remote(), timeout=ANSWER_S)
        except RayActorError:
            return  # that is how it ends
        except GetTimeoutError as error:
            raise FleetFailed("the controller does not answer") from error

    def end(self, drain_s: float) -> str | None:
        """Let running requests end, up to `drain_s`, then end the cluster. Returns the problem if some did not end."""
        if self._controller is None:
            return None
        controller, self._controller = self._controller, None
        try:
            problem: str | None = ray.get(controller.end.remote(drain_s), timeout=drain_s + END_S)
        except (GetTimeoutError, RayActorError) as error:
            problem = f"the controller did not end the cluster: {one_line(error) or 'it does not answer'}"
        ray.kill(controller)
        return problem

    def _get(self, method: str) -> Any:
        try:
            return ray.get(getattr(self._controller, method).remote(), timeout=ANSWER_S + STOP_S)
        except GetTimeoutError as error:
            raise FleetFailed("the controller does not answer") from error
        except RayError as error:
            raise FleetFailed(f"the controller failed: {one_line(error)}") from error

    def _await(self, answer: Any, progress: Callable[[News], None], stopped: Callable[[], bool]) -> Any:
        """Return what a long question is answered with, None if it was given up. Raises `FleetFailed`."""
        try:
            while not ray.wait([answer], timeout=LOOK_EVERY_S)[0]:
                if stopped():
                    return None
                progress(self.news())
            result = ray.get(answer)
        except RayActorError as error:
            told = f"the controller ended meanwhile ({one_line(error)}); see weft status, and ask again"
            raise FleetFailed(told) from error
        except (RayError, ValueError) as error:
            raise FleetFailed(f"the controller failed: {one_line(error)}") from error
        progress(self.news())
        return result


def local_cpus(config: ClusterConfig) -> int:
    """Return the CPU cores that a Ray cluster on this machine should offer for a cluster."""
    asked = sum(bundle.get("CPU", 0.0) for part in parts_of(config) for bundle in bundles_of(config, part))
    return min(max(1, math.ceil(asked)), os.cpu_count() or 1)


def _urls(started: Started | None) -> tuple[str, ...]:
    if started is None:
        return ()
    if started.problem:
        raise FleetFailed(started.problem)
    return started.urls


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


def _start_ray(cpus: int) -> None:
    """Start Ray on this machine for this process alone, on the loopback address."""
    _keep_to_loopback()
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        namespace=NAMESPACE,
        object_store_memory=LOCAL_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        _system_config=LOCAL_SETTINGS,
    )
