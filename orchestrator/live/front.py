"""One gateway with all it needs, on one event loop: driver, HTTP server, gRPC port, metrics, status page.

Does not know what process it is in; `fleet/actors.py` makes it an actor.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from orchestrator.core.config import ClusterConfig, GatewayConfig
from orchestrator.core.types import GatewayId, ModelName, NodeId, PoolName, StoreId, StoreLoad
from orchestrator.live.cache_service import CacheService
from orchestrator.live.driver import ClusterDriver
from orchestrator.live.health import HealthServer
from orchestrator.live.hints import HintDesk, MessageRefused
from orchestrator.live.http.gateway import Gateway
from orchestrator.live.http.openai.dialect import CHAT
from orchestrator.live.intake import Intake
from orchestrator.live.metrics import Metrics, NodeState
from orchestrator.live.recorder import open_recorder
from orchestrator.live.refusals import Invalid
from orchestrator.live.text.models import ModelText
from orchestrator.live.tracing import traces_opener
from orchestrator.wire.journal import cluster_header, open_journal
from orchestrator.wire.trust import read_pem, read_trust

#: Seconds between two looks whether all nodes are reached.
_REACH_EVERY_S = 0.02
#: What a server is told to listen on all addresses.
ANY_ADDRESS = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class NodePlace:
    """A node that the cluster has, and where it serves; an empty address while it does not."""

    node: NodeId
    pool: PoolName
    address: str


@dataclass(frozen=True, slots=True)
class HostStore:
    """A store that serves."""

    store: StoreId
    address: str


@dataclass(frozen=True, slots=True)
class Membership:
    """All nodes that the cluster has, the URLs of all gateways that take requests, and the stores that serve."""

    #: Grows with each one told.
    serial: int = 0
    nodes: tuple[NodePlace, ...] = ()
    gateways: Mapping[GatewayId, str] = field(default_factory=lambda: {})
    stores: tuple[HostStore, ...] = ()


@dataclass(frozen=True, slots=True)
class FrontAddress:
    """Where a gateway serves, and what checkpoints and adapters it knows by their fingerprints."""

    url: str
    fingerprints: Mapping[str, str]


class Front:
    """A gateway. Made on a running loop.

    Args:
        config: the cluster's, with its secret.
        number: this gateway's.
        reach: this host's address for others, told to them when the gateway listens on all of its addresses.
        http_port: 0 for any.
        folders: checkpoint directory of every model.
        fingerprints: of those checkpoints, and of the models' adapters.
        pools: every node of the cluster and its pool.
        fatal: told of an error that leaves the gateway in an unknown state; the process should end.

    Raises:
        ConfigError: this host lacks what the configuration asks for.
    """

    def __init__(
        self,
        config: ClusterConfig,
        number: GatewayId,
        reach: str,
        http_port: int,
        folders: Mapping[str, Path],
        fingerprints: Mapping[str, str],
        pools: Mapping[NodeId, PoolName],
        fatal: Callable[[BaseException], None],
    ) -> None:
        self._config = config
        self._number = number
        self._reach = reach
        self._http_port = http_port
        self._fingerprints = dict(fingerprints)
        self._grpc_address = ""
        self._members = Membership()
        cmx_bytes = config.store.cmx_bytes if config.store is not None else 0
        self._metrics = Metrics(number, config.gateway.count, pools, cmx_bytes=cmx_bytes)
        name = f"gateway-{number}-{int(time.time())}"
        journal = open_journal(config.cluster.journal, name, cluster_header(number, config))
        trust = read_trust(config.cluster.secret, config.cluster.tls)
        opener = traces_opener(config.trace)
        self._traces = opener(config.trace, number, self._metrics) if opener is not None else None
        told = self._traces or self._metrics
        self._driver = ClusterDriver(number, config, trust, told, fatal, journal)
        self._metrics.attach(self._driver.reprefilled_tokens)
        hints = self._driver.hints
        self._metrics.attach_leases(
            hints.leases.used_bytes, lambda: hints.leases.byte_seconds(self._driver.now), hints.effects.sums
        )
        page, status = self._metrics.render, self.status
        self._recorder = open_recorder(config, number)
        texts = {ModelName(name): self._text(name, folder) for name, folder in folders.items()}
        intake = Intake(config, texts, config.cluster.secret.encode(), fingerprints)
        driver, around = self._driver, self._traces.wrap if self._traces is not None else None
        self._gateway = Gateway(
            config, number, intake, driver, told, page, status, self._recorder, around, self._call, lambda: self._desk
        )
        tokens = {name: config.pools_of(name)[0].engine.block_tokens for name in intake.models}
        self._desk = HintDesk(intake, driver, self._metrics, self._gateway.peers, CHAT.parse, tokens)
        bytes_max = config.gateway.body_bytes_max
        self._health = HealthServer(_certificate(config.gateway), CacheService(self._desk), bytes_max)

    async def start(self, members: Membership | None = None) -> FrontAddress:
        """Serve, once the nodes that serve already are reached, or do not answer in time. Raises `OSError` if a port is taken."""
        if members is not None:
            await self.set_members(members)
            await self._reach_nodes([place.node for place in members.nodes if place.address])
        host, first = self._config.gateway.host, self._config.gateway.grpc_port
        grpc_port = await self._health.start(host, first + self._number if first else 0)
        try:
            http_port = await self._gateway.start(host, self._http_port)
        except OSError as error:
            raise OSError(f"HTTP cannot listen on {host}:{self._http_port}: {error.strerror}") from error
        named = self._reach if host in ANY_ADDRESS else host
        shown = f"[{named}]" if ":" in named else named
        self._grpc_address = f"{shown}:{grpc_port}"
        scheme = "https" if self._config.gateway.cert else "http"
        return FrontAddress(f"{scheme}://{shown}:{http_port}", self._fingerprints)

    async def _reach_nodes(self, nodes: Sequence[NodeId]) -> None:
        """Wait until nodes are reached, so that the first request finds them; not for longer than one may be away."""
        for _ in range(int(self._config.cluster.node_lost_s / _REACH_EVERY_S)):
            if not nodes or await self.settled(nodes):
                return
            await asyncio.sleep(_REACH_EVERY_S)

    async def set_members(self, members: Membership) -> None:
        """Hold streams to exactly the nodes that serve, and pass sessions on to the gateways that take requests."""
        if members.serial <= self._members.serial:  # overtaken by a later one
            return
        self._members = members
        for place in members.nodes:
            if not place.address:
                self._driver.mark_dead(place.node)
        self._driver.set_nodes([(place.node, place.address) for place in members.nodes if place.address])
        self._driver.set_stores([(place.store, place.address) for place in members.stores])
        self._metrics.set_stores([place.store for place in members.stores])
        self._metrics.set_members({place.node: place.pool for place in members.nodes}, sorted(members.gateways))
        self._driver.set_gateways(tuple(members.gateways))
        self._gateway.join(members.gateways)

    async def settled(self, nodes: Sequence[NodeId]) -> bool:
        """Return whether requests are taken here and may go to these nodes, as they were started last."""
        addresses = {place.node: place.address for place in self._members.nodes}
        states = [(self._metrics.nodes.get(node), addresses.get(node)) for node in nodes]
        return self._gateway.ready and all(
            state is not None and state.up and state.spec is not None and state.spec.address == address
            for state, address in states
        )

    async def report(self) -> dict[str, Any]:
        """Return what `/status` shows, for whoever asks from another thread."""
        return self.status()

    async def drain(self, seconds: float, lingers: bool = False) -> bool:
        """Take nothing new and let what runs end; False if some did not. With `lingers` others get time to see it."""
        await self._health.serving(False)
        return await self._gateway.drain(seconds, self._config.gateway.linger_s if lingers else 0.0)

    async def stop(self) -> None:
        """Stop serving; what runs ends with an error."""
        await self._driver.close()
        await self._gateway.stop()
        await self._health.stop()
        if self._recorder is not None:
            await asyncio.to_thread(self._recorder.close)
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    def _lives(self) -> HintDesk:
        return self._desk

    async def _call(self, method: str, request: bytes, key: bytes) -> bytes | None:
        """Answer what another gateway asks about hints of a caller of its own."""
        try:
            return await self._desk.serve(method, request, self._desk.caller(key, forwarded=True))
        except (MessageRefused, DecodeError) as error:
            raise Invalid(str(error), "invalid_message") from error

    def status(self) -> dict[str, Any]:
        """Return what `/status` shows."""
        return {
            "cluster": self._config.cluster.name,
            "gateway": self._number,
            "gateways": max(len(self._members.gateways), 1),
            "grpc_address": self._grpc_address,
            "ready": self._gateway.ready,
            "requests": {
                model: {"running": running, "waiting": waiting}
                for model, (running, waiting) in self._metrics.requests_by_model().items()
            },
            "nodes": [
                _node_status(node, state) | {"computed_tokens": self._metrics.computed_tokens(node)}
                for node, state in self._metrics.nodes.items()
            ],
            "stores": [
                {"store": store, "model": model} | _store_status(load) for (store, model), load in self._metrics.stores.items()
            ],
        }

    def _text(self, model: str, folder: Path) -> ModelText:
        limits = [pool.engine.context_tokens_max for pool in self._config.pools_of(model)]
        shortest = min((limit for limit in limits if limit), default=0)
        return ModelText.load(folder, self._fingerprints[model], self._config.models[model], shortest)


def _certificate(gateway: GatewayConfig) -> tuple[bytes, bytes] | None:
    """Return what the gateway serves with, key first, if it has a certificate. Raises `ConfigError`."""
    if not gateway.cert:
        return None
    return read_pem(gateway.key, "gateway.key"), read_pem(gateway.cert, "gateway.cert")


def _store_status(load: StoreLoad) -> dict[str, Any]:
    slots = {"used": load.slots_used, "cached": load.slots_cached, "free": load.slots_free}
    return {"slots": slots, "segments": load.segments, "waiting_reads": load.reads_waiting}


def _node_status(node: NodeId, state: NodeState) -> dict[str, Any]:
    status: dict[str, Any] = {"node": node, "pool": state.pool, "up": state.up}
    if state.spec is not None:
        spec, load = state.spec, state.load
        status |= {
            "model": spec.model,
            "kind": str(spec.kind),
            "incarnation": spec.incarnation,
            "restarts": state.restarts,
            "address": spec.address,
            "running": load.running,
            "waiting": load.waiting,
            "queued_tokens": load.queued_tokens,
            "blocks": {"used": load.blocks_used, "cached": load.blocks_cached, "free": load.blocks_free, "total": spec.blocks},
            "block_tokens": spec.block_tokens,
        }
    return status
