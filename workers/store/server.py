"""A host's store as a process: takes the memory, opens `cmx`, serves nodes and gateways over gRPC, stops.

Does not know who starts it: everything comes in through the constructor.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from orchestrator.core.config import StoreConfig
from orchestrator.core.types import ModelName, StoredModel, StoreId, StoreSpec
from orchestrator.wire import codec, store_pb2, store_pb2_grpc
from orchestrator.wire.buckets import open_bucket
from orchestrator.wire.journal import open_journal, store_header
from orchestrator.wire.trust import Caller, Refused, Trust
from workers.memory import host_id
from workers.store.arena import Arena, parts_of
from workers.store.cmx import Cmx, model_key
from workers.store.driver import Kept, StoreDriver, Unlike
from workers.store.models import ModelBlocks

Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"
#: Seconds that calls have to end once the store stops.
STOP_S = 0.1
_STATUS = {
    Refused.TOKEN: grpc.StatusCode.UNAUTHENTICATED,
    Refused.PROTOCOL: grpc.StatusCode.FAILED_PRECONDITION,
    Refused.NODE: grpc.StatusCode.NOT_FOUND,
    Refused.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
}


class StoreServer:
    """One host's store.

    Args:
        store: its id.
        incarnation: higher at each start of the same id.
        config: the cluster file's.
        models: those that nodes of this cluster serve.
        trust: who may call.
        host: address to listen on and to be reached by; the port is chosen by the system.
        journal: folder in which it writes down what it is told and what it decides; empty for none.
    """

    def __init__(
        self,
        store: StoreId,
        incarnation: int,
        config: StoreConfig,
        models: Sequence[ModelBlocks],
        trust: Trust,
        host: str = "127.0.0.1",
        journal: str = "",
    ) -> None:
        self._store = store
        self._incarnation = incarnation
        self._config = config
        self._models = tuple(models)
        self._trust = trust
        self._host = host
        self._journal = journal
        self._server = grpc.aio.server(options=(*codec.CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)))
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._failure: asyncio.Future[BaseException] | None = None
        self._arena: Arena | None = None
        self._driver: StoreDriver | None = None
        self._populating: asyncio.Future[None] | None = None
        self._stopped = False

    async def start(self) -> str:
        """Take the memory and listen. Returns the address. Raises `ConfigError` if the file asks for what cannot be."""
        self._failure = asyncio.get_running_loop().create_future()
        port = self._trust.listen(self._server, f"{self._host}:0")
        address = f"{self._host}:{port}"
        self._driver = self._open(address)
        assert self._arena is not None
        # Nobody waits for it; a host that has less memory than was asked for is noticed at once.
        populate = self._arena.populate
        self._populating = asyncio.get_running_loop().run_in_executor(None, populate, lambda: self._stopped)
        self._populating.add_done_callback(self._on_populated)
        store_pb2_grpc.add_StoreServicer_to_server(_Service(self._store, self._driver, self._trust), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._server.start()
        for service in ("", store_pb2.DESCRIPTOR.services_by_name["Store"].full_name):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return address

    @property
    def driver(self) -> StoreDriver:
        """What serves; there once it has started."""
        assert self._driver is not None, "not started"
        return self._driver

    async def populated(self) -> None:
        """Wait until all of the memory is taken."""
        assert self._populating is not None, "not started"
        await asyncio.wait((self._populating,))

    async def wait(self) -> NoReturn:
        """Wait for an error that leaves the store in an unknown state, and raise it; the process should end then."""
        assert self._failure is not None, "not started"
        raise await asyncio.shield(self._failure)

    async def stop(self) -> None:
        """Stop at once. Nodes and gateways see their streams end."""
        self._stopped = True
        stopping = asyncio.ensure_future(self._server.stop(STOP_S))
        if self._populating is not None:
            await asyncio.wait((self._populating,))
        if self._driver is not None:
            await self._driver.close()
        await stopping
        if self._arena is not None:
            self._arena.close()

    def _open(self, address: str) -> StoreDriver:
        config = self._config
        parts = parts_of(config, {one.model: one.block_bytes for one in self._models})
        kept = {
            one.model: Kept(
                StoredModel(
                    one.model,
                    one.block_tokens,
                    one.block_bytes,
                    parts[one.model].slots,
                    config.segment_blocks,
                    bool(config.cmx),
                ),
                one.fingerprint,
                one.layout,
            )
            for one in self._models
        }
        spec = StoreSpec(
            id=self._store,
            incarnation=self._incarnation,
            host=host_id(),
            address=address,
            models=tuple(one.model for one in kept.values()),
            cpu_bytes_per_s=config.cpu_bytes_per_s,
            cmx_bytes_per_s=config.cmx_bytes_per_s,
            cmx_latency_s=config.cmx_latency_s,
        )
        self._arena = Arena(parts)
        name = f"store-{self._store}-{self._incarnation}"
        return StoreDriver(
            spec=spec,
            config=config,
            kept=kept,
            arena=self._arena,
            cmx=self._segments() if config.cmx else {},
            fatal=self._on_fatal,
            journal=open_journal(self._journal, name, store_header(spec, config)),
        )

    def _segments(self) -> dict[ModelName, Cmx]:
        config = self._config
        bucket = open_bucket(config.cmx, "store.cmx")
        return {
            one.model: Cmx(
                bucket,
                model_key(one.fingerprint, one.layout, one.block_tokens, one.block_bytes, config.segment_blocks),
                one.block_bytes,
                config.segment_blocks,
                config.move_s_max,
            )
            for one in self._models
        }

    def _on_populated(self, populating: "asyncio.Future[None]") -> None:
        if not populating.cancelled() and (error := populating.exception()) is not None:
            self._on_fatal(error)

    def _on_fatal(self, error: BaseException) -> None:
        if self._failure is not None and not self._failure.done():
            self._failure.set_result(error)


class _Service(store_pb2_grpc.StoreServicer):
    """Sees that the caller may call."""

    def __init__(self, store: StoreId, driver: StoreDriver, trust: Trust) -> None:
        self._store = store
        self._driver = driver
        self._trust = trust

    async def Attach(self, request_iterator: object, context: Context) -> None:  # noqa: N802
        await self._check(Caller.ATTACHED, context)
        await self._serve(self._driver.serve_node(context), context)

    async def Connect(self, request_iterator: object, context: Context) -> None:  # noqa: N802
        await self._check(Caller.STORE_GATEWAY, context)
        await self._serve(self._driver.serve_gateway(context), context)

    async def _check(self, caller: Caller, context: Context) -> None:
        metadata = tuple(context.invocation_metadata() or ())
        # Whoever has no token learns nothing, not even which store this is.
        refused = self._trust.problem(caller, self._store, metadata)
        if refused is None and dict(metadata).get(codec.NODE_METADATA) != self._store:
            refused = Refused.NODE, f"store {self._store} is here"
        if refused is not None:
            self._driver.refuse(*refused, context.peer())
            await context.abort(_STATUS[refused[0]], refused[1])

    async def _serve(self, call: Awaitable[None], context: Context) -> None:
        """Serve a call; one that says what means nothing ends, and nothing else does."""
        try:
            await call
        except (codec.MalformedMessage, DecodeError) as error:
            self._driver.refuse(Refused.MALFORMED, str(error), context.peer())
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Unlike as error:
            self._driver.refuse(Refused.NODE, str(error), context.peer())
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
