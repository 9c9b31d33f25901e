"""A request that another gateway owns goes there as it came, and its answer comes back as it is, whatever the peer does."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestrator.core.cluster.sessions import owner_of
from orchestrator.core.types import GatewayId, SessionId
from orchestrator.live.http.exchange import ClientGone, Exchange
from orchestrator.live.http.openai.dialect import CHAT
from orchestrator.live.http.proxy import FORWARDED, Peers, PeerUnreachable, forward

BODY = b'{"model": "m"}'
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-weft-gateway: 1\r\ncontent-length: 2\r\n\r\n{}"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nDate: now\r\n\r\n"


@dataclass
class Peer:
    """What answers with scripted pieces, each once the piece before was taken, and what it was asked."""

    pieces: Sequence[bytes]
    #: After its pieces it closes the connection, or else waits for the other side to do so.
    closes: bool = True
    #: Ends as a killed process does whose kernel still has something for it.
    resets: bool = False
    url: str = ""
    head: bytes = b""
    body: bytes = b""
    #: The next piece may go.
    taken: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        self.head = await reader.readuntil(b"\r\n\r\n")
        self.body = await reader.readexactly(int(self.headers[b"content-length"]))
        for piece in self.pieces:
            await self.taken.acquire()
            writer.write(piece)
        if not self.closes and await reader.read() == b"":
            self.left.set()
        if self.resets:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

    @property
    def headers(self) -> dict[bytes, bytes]:
        lines = self.head.split(b"\r\n")[1:-2]
        return {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}


@asynccontextmanager
async def peer(*pieces: bytes, closes: bool = True, resets: bool = False) -> AsyncIterator[Peer]:
    """Let a peer listen on a free port."""
    one = Peer(pieces, closes, resets)
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    one.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield one
    finally:
        server.close()
        await server.wait_closed()


@dataclass
class Client:
    """Whoever asked: what it was sent, and whether it is still there."""

    headers: Sequence[tuple[bytes, bytes]] = ()
    #: Told of everything that is sent.
    on_sent: Callable[[], None] = lambda: None
    sent: list[dict[str, Any]] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def exchange(self) -> Exchange:
        """Return its request."""
        scope = {"path": "/v1/chat/completions", "method": "POST", "headers": list(self.headers)}
        return Exchange(scope, self._receive, self._send, 0, CHAT)

    async def _receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(dict(message))
        self.on_sent()

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def parts(self) -> list[bytes]:
        """The parts of the body that were sent."""
        return [message["body"] for message in self.sent[1:]]


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 10))  # type: ignore[arg-type]


def test_a_request_goes_on_as_it_came_without_what_belongs_to_its_connection() -> None:
    async def scenario() -> None:
        mine = {b"authorization": b"Bearer key", b"x-request-id": b"name", b"x-session-id": b"one", b"traceparent": b"00-1-2-01"}
        theirs = {b"host": b"here", b"connection": b"keep-alive", b"content-length": b"999", b"expect": b"100-continue"}
        client = Client(tuple((mine | theirs).items()))
        async with peer(WHOLE) as one:
            await forward(client.exchange(), BODY, one.url)
        assert one.head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
        assert one.body == BODY
        written = {b"host": one.url.removeprefix("http://").encode(), b"connection": b"close", b"content-length": b"14"}
        assert one.headers == mine | written | {FORWARDED: b"1"}

    play(scenario)


def test_a_request_without_a_name_goes_on_with_the_one_it_got_here() -> None:
    async def scenario() -> None:
        exchange = Client().exchange()
        async with peer(WHOLE) as one:
            await forward(exchange, BODY, one.url)
        assert one.headers[b"x-request-id"] == exchange.request_id

    play(scenario)


def test_an_answer_comes_back_as_it_is() -> None:
    async def scenario() -> None:
        client = Client()
        exchange = client.exchange()
        async with peer(
            b"HTTP/1.1 429 Too Many\r\nRetry-After: 7\r\nX-Weft-Gateway: 1\r\nDate: now\r\nContent-Length: 2\r\n\r\n{}"
        ) as one:
            await forward(exchange, BODY, one.url)
        # Who answered says which gateway it is; a date is written where the answer goes out.
        assert client.sent[0]["headers"] == [(b"retry-after", b"7"), (b"x-weft-gateway", b"1")]
        assert (client.status, client.parts, exchange.status) == (429, [b"{}"], 429)
        assert not client.sent[-1].get("more_body", False)

    play(scenario)


def test_a_stream_is_passed_on_part_by_part() -> None:
    async def scenario() -> None:
        # The peer sends a part only after what came before has reached the client: nothing is held back.
        pieces = (STREAM, b"3\r\none\r\n", b"3\r\ntwo\r\n", b"0\r\n\r\n")
        async with peer(*pieces) as one:
            client = Client(on_sent=one.taken.release)
            await forward(client.exchange(), BODY, one.url)
        assert client.sent[0]["headers"] == [(b"content-type", b"text/event-stream")]
        assert client.parts == [b"one", b"two", b""]

    play(scenario)


@pytest.mark.parametrize("resets", [False, True], ids=["closes", "resets"])
@pytest.mark.parametrize("pieces", [(), (b"HTTP/1.1 200 OK\r\ncontent-le",)], ids=["nothing", "half a head"])
def test_a_peer_that_ends_before_its_answer_is_unreachable(pieces: tuple[bytes, ...], resets: bool) -> None:
    async def scenario() -> None:
        client = Client()
        async with peer(*pieces, resets=resets) as one:
            with pytest.raises(PeerUnreachable):
                await forward(client.exchange(), BODY, one.url)
        # The request can still be served here.
        assert client.sent == []

    play(scenario)


def test_a_peer_that_is_gone_once_it_has_taken_the_connection_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        client = Client()
        async with peer() as one:
            reader, writer = await asyncio.open_connection(*one.url.removeprefix("http://").split(":"))
            writer.transport.abort()
            await asyncio.wait_for(_until_closed(writer), 10)

            async def opened(*where: Any, **how: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
                del where, how
                return reader, writer

            monkeypatch.setattr(asyncio, "open_connection", opened)
            with pytest.raises(PeerUnreachable, match="before its request"):
                await forward(client.exchange(), BODY, one.url)
        assert client.sent == []

    play(scenario)


async def _until_closed(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        await writer.wait_closed()


def test_a_peer_that_goes_away_within_its_answer_breaks_the_connection() -> None:
    async def scenario() -> None:
        async with peer(STREAM, b"3\r\none\r\n") as one:
            client = Client(on_sent=one.taken.release)
            with pytest.raises(ConnectionError, match="middle"):
                await forward(client.exchange(), BODY, one.url)
        assert (client.status, client.parts) == (200, [b"one"])

    play(scenario)


@pytest.mark.parametrize("pieces", [(), (STREAM,)], ids=["before the answer", "within it"])
def test_a_client_that_goes_away_ends_the_connection_to_the_peer(pieces: tuple[bytes, ...]) -> None:
    async def scenario() -> None:
        async with peer(*pieces, closes=False) as one:
            client = Client()
            client.on_sent = client.gone.set
            if not pieces:
                client.gone.set()
            with pytest.raises(ClientGone):
                await forward(client.exchange(), BODY, one.url)
            if pieces:
                await one.left.wait()

    play(scenario)


# --- who owns what ------------------------------------------------------------------------------------------------------


def session_of(owner: int, among: Sequence[int] = (0, 1)) -> SessionId:
    gateways = [GatewayId(number) for number in among]
    return next(name for name in map(SessionId, map(str, range(1000))) if owner_of(name, gateways) == owner)


def test_only_sessions_of_others_are_passed_on_and_only_once() -> None:
    async def scenario() -> None:
        async with peer(WHOLE) as other:
            peers = Peers(GatewayId(0), "")
            mine, theirs = session_of(0), session_of(1)
            # Nobody else is known yet.
            assert not await peers.pass_on(Client().exchange(), BODY, theirs)
            peers.join({GatewayId(0): "http://127.0.0.1:9", GatewayId(1): other.url})
            assert not await peers.pass_on(Client().exchange(), BODY, mine)
            assert not await peers.pass_on(Client([(FORWARDED, b"1")]).exchange(), BODY, theirs)
            client = Client()
            assert await peers.pass_on(client.exchange(), BODY, theirs)
            assert client.parts == [b"{}"]

    play(scenario)


def test_a_gateway_that_drains_passes_all_sessions_on() -> None:
    async def scenario() -> None:
        async with peer(WHOLE) as other:
            peers = Peers(GatewayId(0), "")
            peers.join({GatewayId(1): other.url})
            assert await peers.pass_on(Client().exchange(), BODY, session_of(0))

    play(scenario)


def test_a_session_whose_owner_cannot_be_reached_is_served_here() -> None:
    async def scenario() -> None:
        async with peer() as gone:
            pass
        peers = Peers(GatewayId(0), "")
        peers.join({GatewayId(0): "http://127.0.0.1:9", GatewayId(1): gone.url})
        client = Client()
        assert not await peers.pass_on(client.exchange(), BODY, session_of(1))
        assert client.sent == []

    play(scenario)


@pytest.mark.parametrize("key", [b"", b"sk-a"])
def test_what_hints_ask_another_gateway_is_answered_with_a_key_and_where_there_is_none(key: bytes) -> None:
    async def scenario() -> None:
        async with peer(WHOLE) as other:
            peers = Peers(GatewayId(0), "")
            assert await peers.call(other.url, "Lookup", b"", key) == b"{}"
            await peers.close()

    play(scenario)
