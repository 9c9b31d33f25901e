"""Clients of the cache API, one that blocks and one for asyncio: the same calls, in the words of `words.py`."""

import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, cast

import grpc
import grpc.aio

from orchestrator.harness.channels import CALL_S_MAX, OPTIONS, Gateway, failure
from orchestrator.harness.words import (
    Action,
    Price,
    Residency,
    Result,
    Target,
    WatchEvent,
    event_of,
    price_of,
    residency_of,
    result_of,
)
from orchestrator.wire import cache_pb2, cache_pb2_grpc


class CacheClient:
    """Blocks until it is answered. To be closed, or used in a `with`.

    Args:
        address: HOST:PORT of a gateway's gRPC port.
        key: the key that requests over HTTP have; empty where none is asked for.
        certificates: PEM of certificates to believe: the port is served with TLS. None: plain.
        timeout_s: seconds that a call may take.

    Every call raises `CacheError`.
    """

    def __init__(self, address: str, key: str = "", certificates: bytes | None = None, timeout_s: float = CALL_S_MAX) -> None:
        self._gateway = Gateway(address, key, certificates)
        self._timeout_s = timeout_s
        if certificates is None:
            self._channel = grpc.insecure_channel(address, options=OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(certificates), options=OPTIONS)
        # The generated stub has no types.
        self._stub = cast(Any, cache_pb2_grpc).CacheControlStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def apply(self, *actions: Action, message_id: str = "") -> list[Result]:
        """Have actions done, in order; return what became of each. The same message id again has no second effect."""
        answer = self._call("Apply", applying(actions, message_id))
        return [result_of(one) for one in answer.results]

    def lookup(self, *targets: Target, hashes: bool = False) -> list[Residency]:
        """Return where each target is, with its blocks' hashes if asked for."""
        answer = self._call("Lookup", cache_pb2.LookupRequest(targets=targets, hashes=hashes))
        return [residency_of(one) for one in answer.residencies]

    def quote(self, *actions: Action) -> list[Price]:
        """Return what each action would come to; nothing is done."""
        return [price_of(one) for one in self._call("Quote", cache_pb2.QuoteRequest(actions=actions)).prices]

    def watch(self, *targets: Target) -> Iterator[WatchEvent]:
        """Yield what happens to targets, beginning with how they are, until the iterator is closed."""
        call = self._stub.Watch(cache_pb2.WatchRequest(targets=targets), metadata=self._gateway.metadata)
        try:
            for event in call:
                yield event_of(event)
        except grpc.RpcError as error:
            raise failure(error, self._gateway.address) from error
        finally:
            call.cancel()

    def _call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=self._timeout_s, metadata=self._gateway.metadata)
        except grpc.RpcError as error:
            raise failure(error, self._gateway.address) from error


class AsyncCacheClient:
    """The same for asyncio: every call is awaited. To be made on a running loop, and closed, or used in an `async with`."""

    def __init__(self, address: str, key: str = "", certificates: bytes | None = None, timeout_s: float = CALL_S_MAX) -> None:
        self._gateway = Gateway(address, key, certificates)
        self._timeout_s = timeout_s
        if certificates is None:
            self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(certificates), options=OPTIONS)
        self._stub = cast(Any, cache_pb2_grpc).CacheControlStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close(None)

    async def apply(self, *actions: Action, message_id: str = "") -> list[Result]:
        """Have actions done, in order; return what became of each. The same message id again has no second effect."""
        answer = await self._call("Apply", applying(actions, message_id))
        return [result_of(one) for one in answer.results]

    async def lookup(self, *targets: Target, hashes: bool = False) -> list[Residency]:
        """Return where each target is, with its blocks' hashes if asked for."""
        answer = await self._call("Lookup", cache_pb2.LookupRequest(targets=targets, hashes=hashes))
        return [residency_of(one) for one in answer.residencies]

    async def quote(self, *actions: Action) -> list[Price]:
        """Return what each action would come to; nothing is done."""
        answer = await self._call("Quote", cache_pb2.QuoteRequest(actions=actions))
        return [price_of(one) for one in answer.prices]

    async def watch(self, *targets: Target) -> AsyncIterator[WatchEvent]:
        """Yield what happens to targets, beginning with how they are, until the iterator is closed."""
        call = self._stub.Watch(cache_pb2.WatchRequest(targets=targets), metadata=self._gateway.metadata)
        try:
            async for event in call:
                yield event_of(event)
        except grpc.aio.AioRpcError as error:
            raise failure(error, self._gateway.address) from error
        finally:
            call.cancel()

    async def _call(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self._stub, method)(request, timeout=self._timeout_s, metadata=self._gateway.metadata)
        except grpc.aio.AioRpcError as error:
            raise failure(error, self._gateway.address) from error


def applying(actions: Sequence[Action], message_id: str) -> cache_pb2.ApplyRequest:
    """Return a message of actions; without a name of its own it gets one, so that gRPC's own retries have no second effect."""
    return cache_pb2.ApplyRequest(message_id=message_id or uuid.uuid4().hex, actions=actions)
