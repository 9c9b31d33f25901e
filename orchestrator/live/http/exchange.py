"""One HTTP request and its answer over ASGI: the body in, bytes out, and word of a client that goes away.

This does not know what is asked; see `gateway.py`.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from types import TracebackType
from typing import Any

from orchestrator.live.http.codings import Plain, reader, too_large
from orchestrator.live.http.dialects import Dialect
from orchestrator.live.http.errors import HttpError, fault

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
HeaderList = list[tuple[bytes, bytes]]

#: What is written down for a client that did not wait for its answer; nobody receives it.
CLIENT_GONE = 499
#: Seconds of an answer after which its client's going away is listened for: most have ended before, and listening is a task.
_LISTEN_AFTER_S = 0.1
#: Longer request ids are replaced, not cut: a cut one would name another request.
_REQUEST_ID_CHARS_MAX = 128
_JSON = (b"content-type", b"application/json")
_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


class Exchange:
    """One request being answered.

    Args:
        scope, receive, send: ASGI's.
        gateway: this gateway's number, told to the client.
        dialect: in whose words errors are said.
    """

    __slots__ = ("_dialect", "_gateway", "_receive", "_send", "headers", "method", "path", "request_id", "status", "streaming")

    def __init__(self, scope: Scope, receive: Receive, send: Send, gateway: int, dialect: Dialect) -> None:
        self._receive = receive
        self._send = send
        self._dialect = dialect
        self._gateway = b"%d" % gateway
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        #: The last of each name; names in lower case.
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = request_id_of(self.headers.get(b"x-request-id"))
        #: Status sent, or to be written down; 0 before there is one.
        self.status = 0
        self.streaming = False

    async def body(self, bytes_max: int) -> bytes:
        """Return the whole body, as it was before it was compressed.

        Raises:
            HttpError: it is over the limit (413), compressed in a way that is not read (415), or not as it says (400).
            ClientGone: it never ends.
        """
        body = await body_of(self._receive, self.headers, bytes_max)
        self.headers.pop(b"content-encoding", None)  # Whoever is passed it on gets it plain.
        return body

    async def answer(self, status: int, body: bytes, headers: HeaderList | None = None) -> None:
        """Send a whole JSON answer."""
        length = (b"content-length", b"%d" % len(body))
        await self.open(status, [_JSON, length, *(headers or ())])
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, error: HttpError) -> None:
        """Answer with an error body."""
        await self.answer(error.status, self._dialect.error_body(error, self.request_id.decode()), error.headers)

    async def fail(self) -> None:
        """End an answer after a fault of ours: with an error body, or by ending the stream where it stands."""
        error = fault()
        if not self.status:
            await self.refuse(error)
        else:
            await self.close(self._dialect.error_event(error) if self.streaming else b"")
        self.status = error.status

    async def open_events(self) -> None:
        """Start a stream of server-sent events."""
        self.streaming = True
        await self.open(200, _STREAM)

    async def open(self, status: int, headers: HeaderList, named: bool = False) -> None:
        """Send status and headers; `named` ones say already which request and gateway this is."""
        self.status = status
        if not named:
            also = self._dialect.request_header
            headers = [*headers, (b"x-request-id", self.request_id), (b"x-weft-gateway", self._gateway)]
            if also is not None:
                headers.append((also, self.request_id))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes) -> None:
        """Send a part of the body; waits while the client reads more slowly than we write."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def close(self, data: bytes = b"") -> None:
        """Send the last part of the body."""
        await self._send({"type": "http.response.body", "body": data})

    def watch(self, on_gone: Callable[[], None]) -> "Watch":
        """Return a context in which a client that goes away has `on_gone` called at once and raises `ClientGone`."""
        return Watch(self._receive, on_gone)


class Watch:
    """Listens for the end of the connection beside the task that answers, once that has taken a moment."""

    __slots__ = ("_gone", "_listener", "_on_gone", "_receive", "_start", "_task")

    def __init__(self, receive: Receive, on_gone: Callable[[], None]) -> None:
        self._receive = receive
        self._on_gone = on_gone
        self._gone = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a watch needs a task to interrupt"
        self._task = task
        self._listener: asyncio.Future[Message] | None = None
        self._start = task.get_loop().call_later(_LISTEN_AFTER_S, self._listen)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._start.cancel()
        if self._listener is not None:
            self._listener.remove_done_callback(self._heard)
            self._listener.cancel()
        if self._gone and kind is asyncio.CancelledError and self._task.uncancel() == 0:
            raise ClientGone from error

    def _listen(self) -> None:
        self._listener = asyncio.ensure_future(self._receive())
        self._listener.add_done_callback(self._heard)

    def _heard(self, listener: "asyncio.Future[Message]") -> None:
        if not listener.cancelled():
            self._gone = True
            self._on_gone()
            self._task.cancel()


async def body_of(receive: Receive, headers: Mapping[bytes, bytes], bytes_max: int) -> bytes:
    """Return a request's whole body; see `Exchange.body`."""
    coding = headers.get(b"content-encoding")
    reading = reader(coding, bytes_max) if coding is not None else Plain(bytes_max)
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > bytes_max:
        raise too_large(bytes_max)
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunks.append(reading.add(message.get("body", b"")))
        if not message.get("more_body", False):
            reading.finish()
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def closing(send: Send) -> Send:
    """Return a way to answer after which the connection is closed: a client's next request opens one elsewhere."""

    async def send_and_close(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return send_and_close


def request_id_of(given: bytes | None) -> bytes:
    """Return what a client calls its request (`x-request-id`), or a name of ours if it gives none that can be used."""
    if given and len(given) <= _REQUEST_ID_CHARS_MAX and all(33 <= byte <= 126 for byte in given):
        return given
    return b"%032x" % random.getrandbits(128)


def key_of(headers: Mapping[bytes, bytes]) -> bytes:
    """Return the key a request carries, as OpenAI's clients send it or as Anthropic's do; empty if it has none."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
