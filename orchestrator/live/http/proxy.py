"""Several gateways, one owner for each session: finds the owner and passes a request on to it.

A session's cache knowledge (its prompt, its place in the index) lives in one gateway: see `owner_of` in
`core/cluster/sessions.py`.
"""

import asyncio
import ssl
from collections.abc import Mapping
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import httptools
import httpx

from orchestrator.core.cluster.sessions import owner_of
from orchestrator.core.types import GatewayId, SessionId
from orchestrator.live.http.exchange import Exchange, HeaderList

#: Says that a request was passed on already; it is served where it arrives, whoever owns it.
FORWARDED = b"x-weft-forwarded"
#: Where gateways ask each other about hints, each method by its name.
CALLS = "/weft.cache.v1.CacheControl"
_CALL_S_MAX = 10.0
_CONNECT_S_MAX = 2.0
_READ_BYTES = 64 * 1024
#: Headers that belong to one connection, or that the answering side writes itself.
_OWN_HEADERS = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"host", b"expect", FORWARDED})
_CONNECTION_HEADERS = _OWN_HEADERS | {b"date"}


class PeerUnreachable(Exception):
    """The owner could not be reached; nothing was sent to the client yet."""


class _Parser(Protocol):
    def feed_data(self, data: bytes) -> None: ...
    def get_status_code(self) -> int: ...


class _Reply:
    """Collects what httptools reads from the peer's answer."""

    def __init__(self) -> None:
        self.headers: HeaderList = []
        self.body: list[bytes] = []
        self.headed = False
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.headed = True

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        self.complete = True


class Peers:
    """The gateways that take requests, as one of them sees them.

    Args:
        number: this one's.
        cert: PEM file of the certificate that all of them serve with; empty for plain HTTP.
    """

    def __init__(self, number: GatewayId, cert: str) -> None:
        self._number = number
        self._tls = pinned(cert) if cert else None
        #: Base URLs; this one is not among them while it drains.
        self._urls: dict[GatewayId, str] = {}
        #: For questions of ours; made with the first.
        self._client: httpx.AsyncClient | None = None

    def join(self, urls: Mapping[GatewayId, str]) -> None:
        """Learn the base URLs of all gateways that take requests."""
        self._urls = dict(urls)

    def owner(self, session: SessionId) -> str | None:
        """Return the base URL of the gateway that a session belongs to; None if that is this one, or no other is known."""
        owner = owner_of(session, self._urls) if self._urls else self._number
        return None if owner == self._number else self._urls[owner]

    async def call(self, owner: str, method: str, request: bytes, key: bytes) -> bytes | None:
        """Return what another gateway answers to a question about hints (`routes.py`); None if it does not answer."""
        try:
            answer = await self._asking().post(f"{owner}{CALLS}/{method}", content=request, headers=_asking_headers(key))
        except httpx.HTTPError:
            return None
        return answer.content if answer.status_code == 200 else None

    async def ask(self, gateway: GatewayId, method: str, path: str, key: bytes) -> tuple[int, bytes] | None:
        """Return status and body of what another gateway answers to a request without a body; None if it does not answer."""
        url = self._urls.get(gateway)
        if url is None or gateway == self._number:
            return None
        try:
            answer = await self._asking().request(method, url + path, headers=_asking_headers(key))
        except httpx.HTTPError:
            return None
        return answer.status_code, answer.content

    def _asking(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = httpx.AsyncClient(verify=self._tls or True, timeout=_CALL_S_MAX, trust_env=False)
        return self._client

    async def close(self) -> None:
        """Close connections to other gateways."""
        if self._client is not None:
            await self._client.aclose()

    async def pass_on(self, exchange: Exchange, body: bytes, session: SessionId | None, keeper: GatewayId | None = None) -> bool:
        """Let the gateway that a request belongs to answer, if that is another that can be reached; return whether it has.

        Args:
            exchange: the request.
            body: its body.
            session: belongs to a gateway.
            keeper: the gateway that keeps what the request goes on from, whoever owns its session; None if none does.
        """
        if FORWARDED in exchange.headers or keeper == self._number:
            return False
        kept = self._urls.get(keeper) if keeper is not None else None
        owner = kept or (self.owner(session) if session is not None else None)
        if owner is None:
            return False
        try:
            await forward(exchange, body, owner, self._tls)
        except PeerUnreachable:
            # Serving it here costs a recompute; refusing it would cost the request.
            return False
        return True


def _asking_headers(key: bytes) -> dict[str, str]:
    # Where no key is asked for there is none; a header that ends in a blank is never sent.
    return {FORWARDED.decode(): "1", **({"authorization": f"Bearer {key.decode('latin-1')}"} if key else {})}


def pinned(cert: str) -> ssl.SSLContext:
    """Return how gateways that serve with one certificate call each other: it, and no other, is believed, on any address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cert)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


async def forward(exchange: Exchange, body: bytes, peer: str, tls: ssl.SSLContext | None = None) -> None:
    """Answer a request with what the peer at base URL `peer` answers, as it comes.

    A client that goes away ends the connection to the peer, which notices as if the client were its own.

    Raises:
        PeerUnreachable: before anything was sent to the client.
        ConnectionError: the peer went away in the middle of its answer.
    """
    address = urlsplit(peer)
    try:
        opening = asyncio.open_connection(address.hostname, address.port, ssl=tls if address.scheme == "https" else None)
        reader, writer = await asyncio.wait_for(opening, _CONNECT_S_MAX)
    except (TimeoutError, OSError) as error:
        raise PeerUnreachable(f"{peer}: {error}") from error
    try:
        if writer.transport.is_closing():  # the peer died as soon as it had taken the connection
            raise PeerUnreachable(f"{peer}: closed before its request")
        with exchange.watch(writer.close):
            writer.write(_request(exchange, body, address.netloc))
            await _relay(reader, exchange, peer)
    finally:
        writer.close()


def _request(exchange: Exchange, body: bytes, host: str) -> bytes:
    kept = [(name, value) for name, value in exchange.headers.items() if name not in _OWN_HEADERS]
    named = [(b"host", host.encode()), (b"connection", b"close"), (b"content-length", b"%d" % len(body)), (FORWARDED, b"1")]
    ids = [] if b"x-request-id" in exchange.headers else [(b"x-request-id", exchange.request_id)]
    lines = [b"%s: %s\r\n" % pair for pair in (*kept, *named, *ids)]
    return b"POST %s HTTP/1.1\r\n" % exchange.path.encode() + b"".join(lines) + b"\r\n" + body


async def _read(reader: asyncio.StreamReader) -> bytes:
    """Return what comes next; nothing once the peer has closed the connection, or is gone without having done so."""
    try:
        return await reader.read(_READ_BYTES)
    except OSError:
        return b""


async def _relay(reader: asyncio.StreamReader, exchange: Exchange, peer: str) -> None:
    reply = _Reply()
    parser = cast(_Parser, cast(Any, httptools).HttpResponseParser(reply))
    while not reply.complete:
        data = await _read(reader)
        if not data and not reply.headed:
            raise PeerUnreachable(f"{peer}: closed before its answer")
        if not data:
            raise ConnectionError(f"{peer}: closed in the middle of its answer")
        parser.feed_data(data)
        if reply.headed and not exchange.status:
            headers = [(name, value) for name, value in reply.headers if name not in _CONNECTION_HEADERS]
            await exchange.open(parser.get_status_code(), headers, named=True)
        if reply.body and not reply.complete:
            await exchange.write(b"".join(reply.body))
            reply.body.clear()
    await exchange.close(b"".join(reply.body))
