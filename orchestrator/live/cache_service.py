"""The cache API as gRPC has it: callers by metadata, refusals as statuses; what is asked is `hints.py`'s business."""

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from typing import NoReturn, Protocol, TypeVar

import grpc

from orchestrator.live.hints import Caller, HintDesk, MessageRefused, TooManyWatches
from orchestrator.live.http.exchange import key_of
from orchestrator.live.refusals import KeyUnknown
from orchestrator.wire import cache_pb2

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Context(Protocol):
    """What a call knows, as far as it is needed here."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn: ...


class CacheService:
    """Serves `weft.cache.v1.CacheControl`."""

    def __init__(self, desk: HintDesk) -> None:
        self._desk = desk

    async def Apply(self, request: cache_pb2.ApplyRequest, context: Context) -> cache_pb2.ApplyResponse:  # noqa: N802
        """Do a batch of actions."""
        return await self._answer(self._desk.apply, request, context)

    async def Stream(  # noqa: N802
        self, requests: AsyncIterable[cache_pb2.ApplyRequest], context: Context
    ) -> AsyncIterator[cache_pb2.ApplyResponse]:
        """Do batches of actions as they come."""
        caller = await self._caller(context)
        try:
            async for request in requests:
                yield await self._desk.apply(request, caller)
        except MessageRefused as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def Lookup(self, request: cache_pb2.LookupRequest, context: Context) -> cache_pb2.LookupResponse:  # noqa: N802
        """Tell where things are."""
        return await self._answer(self._desk.lookup, request, context)

    async def Quote(self, request: cache_pb2.QuoteRequest, context: Context) -> cache_pb2.QuoteResponse:  # noqa: N802
        """Tell what actions would come to."""
        return await self._answer(self._desk.quote, request, context)

    async def Watch(self, request: cache_pb2.WatchRequest, context: Context) -> AsyncIterator[cache_pb2.WatchEvent]:  # noqa: N802
        """Tell what happens."""
        caller = await self._caller(context)
        try:
            async for event in self._desk.watch(request, caller):
                yield event
        except MessageRefused as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except TooManyWatches as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))

    async def _answer(self, answer: Callable[[Asked, Caller], Awaitable[Answer]], request: Asked, context: Context) -> Answer:
        caller = await self._caller(context)
        try:
            return await answer(request, caller)
        except MessageRefused as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def _caller(self, context: Context) -> Caller:
        try:
            return self._desk.caller(_key(context.invocation_metadata() or ()))
        except KeyUnknown as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.message)


def _key(metadata: Sequence[tuple[str, str | bytes]]) -> bytes:
    """Return what a caller shows, as over HTTP."""
    return key_of({name.encode(): value.encode() if isinstance(value, str) else value for name, value in metadata})
