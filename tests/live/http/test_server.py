"""What goes out together on a connection, and what does not wait."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from orchestrator.live.http.server import HeadJoining, HttpServer

Send = Callable[[dict[str, Any]], Awaitable[None]]
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4"), (b"x-one", b"1")]}
BODY = {"type": "http.response.body", "body": b"body"}
REQUEST = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"


@asynccontextmanager
async def _connected(answer: Callable[[Send], Awaitable[None]], request: bytes = REQUEST) -> AsyncGenerator[asyncio.StreamReader]:
    """Yield what a client reads of a server that answers so."""

    async def application(scope: Any, receive: Any, send: Send) -> None:
        del scope, receive
        await answer(send)

    server = HttpServer(application)
    port = await server.start("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    yield reader
    writer.close()
    await server.stop()


class _Written(asyncio.Transport):
    """Takes down what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.parts.append(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


def _written(*steps: Callable[[HeadJoining, _Written], None]) -> list[bytes]:
    """Return what is written in so many steps, between which the loop turns."""

    async def run() -> list[bytes]:
        inner = _Written()
        joining = HeadJoining(inner, asyncio.get_running_loop())
        for step in steps:
            step(joining, inner)
            await asyncio.sleep(0)
        return inner.parts

    return asyncio.run(run())


def _both(joining: HeadJoining, inner: _Written) -> None:
    del inner
    joining.write(b"HTTP/1.1 200 OK\r\n\r\n")
    joining.write(b"one")
    joining.write(b"two")


def test_a_head_goes_out_with_what_follows_at_once() -> None:
    assert _written(_both, _both) == [b"HTTP/1.1 200 OK\r\n\r\none", b"two"] * 2


def test_a_head_goes_out_alone_as_the_loop_turns() -> None:
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    parts = _written(lambda joining, _: joining.write(head), lambda joining, _: joining.write(b"one"))
    assert parts == [head, b"one"]


def test_a_head_goes_out_before_its_connection_ends() -> None:
    def refuse(joining: HeadJoining, inner: _Written) -> None:
        joining.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        joining.close()
        assert inner.closed

    assert _written(refuse) == [b"HTTP/1.1 400 Bad Request\r\n\r\n"]


def test_nothing_is_written_to_a_connection_that_is_gone() -> None:
    def lose(joining: HeadJoining, inner: _Written) -> None:
        joining.write(b"HTTP/1.1 200 OK\r\n\r\n")
        inner.closed = True

    assert _written(lose) == []


def test_a_head_does_not_wait_for_a_later_body() -> None:
    async def run() -> None:
        later = asyncio.Event()

        async def answer(send: Send) -> None:
            await send(START)
            await later.wait()
            await send(BODY)

        async with _connected(answer) as reader:
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            later.set()
            assert await reader.readexactly(4) == b"body"

    asyncio.run(run())


def test_what_is_no_request_is_told_so_before_the_connection_ends() -> None:
    async def answer(send: Send) -> None:
        raise AssertionError(f"this was no request: {send}")

    async def run() -> None:
        async with _connected(answer, b"NONSENSE\r\n\r\n") as reader:
            assert (await reader.read()).startswith(b"HTTP/1.1 400 Bad Request\r\n")

    asyncio.run(run())
