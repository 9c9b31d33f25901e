"""The actors that are a cluster's processes: nodes, drafters, gateways, stores. Asked by the controller (`keeper.py`) alone.

What they are to be comes with `start`, from actor to actor: what a constructor is given Ray keeps in its tables, and a
configuration may hold secrets.
"""

import asyncio
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias, cast

import ray as typed_ray
from ray.exceptions import GetTimeoutError, RayError

from orchestrator.core.config import ClusterConfig
from orchestrator.core.experts import Placement
from orchestrator.core.types import GatewayId, ModelName, NodeId, StoreId
from orchestrator.fleet.loops import LoopThread, serve_long
from orchestrator.fleet.processes import Part, ProcessName, pool_of, pools_by_node
from orchestrator.fleet.vital import Vital, end, end_by, own_vital
from orchestrator.live.front import Front, HostStore, Membership
from orchestrator.live.secret import with_secrets
from orchestrator.wire.logs import open_log
from orchestrator.wire.trust import read_trust
from workers.drafting import DraftProcessServer
from workers.engines.base import NetworkPlace, SplitPlaces
from workers.engines.checkpoint import default_model_path, fingerprint
from workers.engines.greetings import place_of
from workers.engines.peft import adapter_fingerprint
from workers.ray_transport import RayObjects
from workers.server import DriverLimits, NodeServer
from workers.store.models import ModelBlocks, model_blocks
from workers.store.server import StoreServer
from workers.tiers import StorePlace

#: Ray's own annotations are too loose for the checker.
ray = cast(Any, typed_ray)

#: Stores by their hosts, as Ray names those.
HostStores: TypeAlias = Mapping[str, HostStore]

NAMESPACE = "weft"
#: Seconds a stopping process gets to close what it holds.
STOP_S = 5.0
#: Seconds that a node which starts waits for its host's store at most.
ATTACH_S = 5.0
#: Seconds between two looks at how long the controller has been silent.
LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Description:
    """What a process says of itself; `address` is None until it serves."""

    part: Part
    incarnation: int
    config: ClusterConfig
    address: str | None
    fingerprints: dict[str, str]
    draining: bool
    version: str
    #: Where those of its nodes are that have an address of their own.
    node_addresses: dict[NodeId, str] = field(default_factory=dict[NodeId, str])


def remote(kind: type, options: dict[str, Any]) -> Any:
    """Return Ray's handle factory of a class."""
    return ray.remote(kind).options(**options)


def asking(bundle: Mapping[str, float]) -> dict[str, Any]:
    """Return a bundle as the options of the actor that takes it."""
    others = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "resources": others}


def controller_name(cluster: str) -> str:
    """Return the name of a cluster's controller in Ray."""
    return f"{cluster}/controller"


def model_folder(config: ClusterConfig, model: str) -> Path:
    """Return a model's checkpoint directory on this host; the built-in one is made if need be."""
    path = config.models[model].path
    return Path(path) if path else default_model_path()


def fingerprints_of(config: ClusterConfig, model: str) -> dict[str, str]:
    """Return what names a model's checkpoint on this host, and what names each of its adapters, by their names."""
    own = fingerprint(model_folder(config, model), config.pools_of(model)[0].engine.weights)
    adapters = config.models[model].adapters
    return {model: own} | {name: adapter_fingerprint(own, Path(adapter.path)) for name, adapter in adapters.items()}


class Lookout:
    """Watches the controller from a process that the controller watches: whoever is silent for too long is asked after.

    A controller that does not answer is ended, so that Ray starts it again; only gateways do that (`ends_controller`). One that
    answers says which incarnation of this process is the cluster's: an older one, which hung and was replaced, ends itself.
    """

    def __init__(self, config: ClusterConfig, name: ProcessName, incarnation: int, ends_controller: bool) -> None:
        self._controller_name = controller_name(config.cluster.name)
        self._hung_s = config.cluster.hung_s
        self._name = name
        self._incarnation = incarnation
        self._ends_controller = ends_controller
        self._controller: Vital | None = None
        self._heard = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)

    def heard_of(self, controller: Vital) -> None:
        """The controller has pinged this process."""
        self._heard, first = time.monotonic(), self._controller is None
        self._controller = controller
        if first:
            self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            self.look()

    def look(self) -> None:
        """Ask after the controller if it has been silent for too long."""
        if time.monotonic() - self._heard > self._hung_s:
            self._ask()

    def _ask(self) -> None:
        assert self._controller is not None, "nobody watches before the first ping"
        suspect = self._controller
        try:
            controller = ray.get_actor(self._controller_name, NAMESPACE)
            current = ray.get(controller.incarnation_of.remote(self._name), timeout=self._hung_s)
        except GetTimeoutError:
            if self._ends_controller and self._controller == suspect:
                end(suspect)
        except (RayError, ValueError):
            return  # it is being started again, or the cluster is being ended
        else:
            if current != self._incarnation:
                os._exit(0)
            self._heard = time.monotonic()


class _Process:
    """What all kinds of processes have in common."""

    ends_controller = False

    def __init__(self, part: Part, incarnation: int) -> None:
        self._part = part
        self._incarnation = incarnation
        self._loop = LoopThread(part.name)
        self._config: ClusterConfig | None = None
        self._lookout: Lookout | None = None
        self._address: str | None = None
        self._node_addresses: dict[NodeId, str] = {}
        self._fingerprints: dict[str, str] = {}
        self._draining = False

    def drain(self, seconds: float, lingers: bool) -> bool:
        """Take nothing new and let what runs end; False if some did not.

        Here there is nothing to wait for: others go on without it.
        """
        del seconds, lingers
        self._draining = True
        return True

    def describe(self) -> Description | None:
        """Return what this process is; None before its start."""
        if self._config is None:
            return None
        names = dict(self._fingerprints)
        address, draining = self._address, self._draining
        where = dict(self._node_addresses)
        return Description(self._part, self._incarnation, self._config, address, names, draining, version("weft"), where)

    def ping(self, controller: Vital) -> Vital:
        """Return which process this is; comes back only if the event loop turns."""
        if self._lookout is not None:
            self._lookout.heard_of(controller)
        return self._loop.run(_vital())

    def _configure(self, config: ClusterConfig) -> ClusterConfig:
        """Take the configuration with what its secrets name on this host."""
        self._config = config
        self._lookout = Lookout(config, self._part.name, self._incarnation, self.ends_controller)
        open_log(self._part.name, config.log)
        return with_secrets(config)

    def _close(self) -> None:
        if self._lookout is not None:
            self._lookout.close()
        self._loop.stop()


class NodeProcess(_Process):
    """Actor: the nodes of one process."""

    def __init__(self, part: Part, incarnation: int) -> None:
        super().__init__(part, incarnation)
        self._server: NodeServer | None = None
        self._drafters_serial = 0
        self._watch: asyncio.Task[None] | None = None
        # Read when the engine's libraries are loaded: threads that wait for work by spinning take the cores of other nodes.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    def start(self, config: ClusterConfig, stores: HostStores, places: SplitPlaces | None = None) -> Description | None:
        """Open the engine, serve, with the host's store if that is there, and say where.

        `places` are the FFN ranks of a group of which the nodes are attention ranks.
        """
        config = self._configure(config)
        pool = pool_of(config, self._part)
        folder = model_folder(config, pool.model)
        self._fingerprints = fingerprints_of(config, pool.model)
        self._address = self._loop.run(self._serve(config, folder, own_store(stores), places))
        serve_long()
        return self.describe()

    def alive(self) -> bool:
        """Return true; comes back only if the event loop turns."""
        self._loop.run(_vital())
        return True

    def take_picks(self) -> list[list[int]]:
        """Return how many rows picked each expert, by layer, since the last call."""
        return self._serving.take_picks()

    def use_experts(self, layer: int, version: int, placement: Placement) -> None:
        """Route a layer's rows by another placement, which all FFN ranks have prepared."""
        self._serving.use_experts(layer, version, placement)

    @property
    def _serving(self) -> NodeServer:
        assert self._server is not None, "not started"
        return self._server

    @property
    def _nodes(self) -> tuple[NodeId, ...]:
        """The nodes that this process hosts itself."""
        return self._part.nodes

    def set_stores(self, stores: HostStores) -> None:
        """Tell the nodes which stores there are now: they use that of their host."""
        if self._server is not None:
            self._loop.run(self._server.set_store(_place(own_store(stores))))

    def set_drafters(self, serial: int, addresses: Sequence[str]) -> None:
        """Tell the nodes which processes draft for their pool now: they ask one of them, of their own host if there is one.

        What has a lower serial number than was heard before is nothing new.
        """
        if self._server is not None and serial >= self._drafters_serial:
            self._drafters_serial = serial
            self._server.use_drafts(nearest(addresses, ray.util.get_node_ip_address(), self._part.number))

    def drain(self, seconds: float, lingers: bool) -> bool:
        """Take nothing new and let what runs end; False if some did not."""
        del lingers  # gateways hear of it by their links
        self._draining = True
        return self._server is None or self._loop.run(self._server.drain(seconds))

    def stop(self) -> None:
        """Stop serving and close the engine."""
        if self._watch is not None:
            self._watch.cancel()
        if self._server is not None:
            self._loop.run(self._server.stop(), STOP_S)
        self._close()

    async def _serve(self, config: ClusterConfig, folder: Path, store: HostStore | None, places: SplitPlaces | None) -> str:
        limits = DriverLimits(gateway_lost_s=config.cluster.node_lost_s)
        trust = read_trust(config.cluster.secret, config.cluster.tls)
        host, pool, journal = ray.util.get_node_ip_address(), pool_of(config, self._part), config.cluster.journal
        self._server = NodeServer(
            pool,
            self._nodes,
            self._incarnation,
            folder,
            trust,
            host,
            RayObjects(trust),
            limits,
            journal,
            stores=config.store is not None,
            places=places,
            model=config.models[pool.model],
        )
        address = await self._server.start()
        if store is not None:
            await self._server.set_store(_place(store), ATTACH_S)
        self._watch = asyncio.ensure_future(_exit_on_failure(self._server))
        return address


class DraftProcess(_Process):
    """Actor: one process of a pool that drafts."""

    def __init__(self, part: Part, incarnation: int) -> None:
        super().__init__(part, incarnation)
        self._server: DraftProcessServer | None = None
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    def start(self, config: ClusterConfig) -> Description | None:
        """Load the draft model, serve, and say where."""
        config = self._configure(config)
        pool = pool_of(config, self._part)
        assert pool.drafter is not None, f"pool {pool.name} does not draft"
        self._fingerprints = {f"{pool.name}.drafter": fingerprint(Path(pool.drafter.model), pool.engine.weights)}
        trust = read_trust(config.cluster.secret, config.cluster.tls)
        place = NetworkPlace(ray.util.get_node_ip_address(), trust)
        self._server = DraftProcessServer(pool, model_folder(config, pool.model), place, config.cluster.hung_s, end_by)
        self._address = self._server.address
        serve_long()
        return self.describe()

    def stop(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.close()
        self._close()


class StoreProcess(_Process):
    """Actor: one host's store."""

    def __init__(self, part: Part, incarnation: int) -> None:
        super().__init__(part, incarnation)
        self._server: StoreServer | None = None
        self._watch: asyncio.Task[None] | None = None

    def start(self, config: ClusterConfig) -> Description | None:
        """Take the memory, serve, and say where."""
        config = self._configure(config)
        engines = {model: config.pools_of(model)[0].engine for model in config.models}
        models = [model_blocks(ModelName(model), engine, model_folder(config, model)) for model, engine in engines.items()]
        self._fingerprints = {
            model: fingerprint(model_folder(config, model), engine.weights) for model, engine in engines.items()
        }
        self._address = self._loop.run(self._serve(config, models))
        serve_long()
        return self.describe()

    def stop(self) -> None:
        """Stop serving; what is in the memory is lost."""
        if self._watch is not None:
            self._watch.cancel()
        if self._server is not None:
            self._loop.run(self._server.stop(), STOP_S)
        self._close()

    async def _serve(self, config: ClusterConfig, models: list[ModelBlocks]) -> str:
        trust = read_trust(config.cluster.secret, config.cluster.tls)
        host, journal = ray.util.get_node_ip_address(), config.cluster.journal
        assert config.store is not None, "a store without [store]"
        store = StoreId(self._part.name)
        self._server = StoreServer(store, self._incarnation, config.store, models, trust, host, journal)
        address = await self._server.start()
        self._watch = asyncio.ensure_future(_exit_on_failure(self._server))
        return address


class GatewayProcess(_Process):
    """Actor: one gateway."""

    ends_controller = True

    def __init__(self, part: Part, incarnation: int) -> None:
        super().__init__(part, incarnation)
        self._front: Front | None = None

    def start(self, config: ClusterConfig, http_port: int, members: Membership) -> Description | None:
        """Read the models' text sides, reach the nodes that are there, serve, and say where."""
        config = self._configure(config)
        folders = {model: model_folder(config, model) for model in config.models}
        self._fingerprints = {}
        for model in config.models:
            self._fingerprints |= fingerprints_of(config, model)
        self._address = self._loop.run(self._serve(config, http_port, folders, members))
        serve_long()
        return self.describe()

    def set_members(self, members: Membership) -> None:
        """Tell the gateway all nodes, and all gateways that take requests."""
        self._loop.run(self._running.set_members(members))

    def settled(self, nodes: Sequence[NodeId]) -> bool:
        """Return whether the gateway is ready and holds links to these nodes."""
        return self._loop.run(self._running.settled(nodes))

    def status(self) -> dict[str, Any]:
        """Return what `/status` shows."""
        return self._loop.run(self._running.report())

    def drain(self, seconds: float, lingers: bool) -> bool:
        """Take nothing new and let what runs end; False if some did not."""
        self._draining = True
        return self._front is None or self._loop.run(self._front.drain(seconds, lingers))

    def stop(self) -> None:
        """Stop serving."""
        if self._front is not None:
            self._loop.run(self._front.stop(), STOP_S)
        self._close()

    @property
    def _running(self) -> Front:
        assert self._front is not None, "not started"
        return self._front

    async def _serve(self, config: ClusterConfig, http_port: int, folders: dict[str, Path], members: Membership) -> str:
        number, reach, pools = GatewayId(self._part.number), ray.util.get_node_ip_address(), pools_by_node(config)
        self._front = Front(config, number, reach, http_port, folders, self._fingerprints, pools, end_by)
        return (await self._front.start(members)).url


def nearest(addresses: Sequence[str], host: str, number: int) -> str | None:
    """Return which process a node of that number asks for drafts: one of its host, or of any if there is none; None: nobody."""
    near = [address for address in addresses if place_of(address)[0] == host] or addresses
    return near[number % len(near)] if near else None


def own_store(stores: HostStores) -> HostStore | None:
    """Return the store of this process's host."""
    return stores.get(own_vital().host)


def _place(store: HostStore | None) -> StorePlace | None:
    return StorePlace(store.store, store.address) if store is not None else None


async def _vital() -> Vital:
    return own_vital()


async def _exit_on_failure(server: NodeServer | StoreServer) -> None:
    try:
        await server.wait()
    except Exception as error:  # Whatever it was, the node or store is in an unknown state: the controller starts a new process.
        end_by(error)
