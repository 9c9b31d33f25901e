"""Runs an ASGI application on uvicorn inside the loop that is already running, on a port of its own choosing if asked.

uvicorn is set up for streams of small writes: httptools, no access log, and TCP_NODELAY, which uvloop sets on every accepted
connection, and asyncio where the listener says that it is TCP's. The head of an answer goes out with what follows it at once, as
one packet and by one call into the system.
"""

import asyncio
import socket
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: Seconds a connection may be idle: longer than common clients' pools keep theirs, so that we never close under a request.
_KEEP_ALIVE_S = 75
_BACKLOG = 2048
#: An answer's head begins so.
_HEAD = b"HTTP/"


class HeadJoining:
    """A connection on which an answer's head waits for what is written next, until the loop turns."""

    __slots__ = ("_head", "_inner", "_loop", "_write")

    def __init__(self, inner: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._inner = inner
        self._write = inner.write
        self._loop = loop
        self._head = b""

    def write(self, data: bytes) -> None:
        """Write on, behind the head if that waits."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(_HEAD):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._write(data)

    def close(self) -> None:
        """Close the connection once what was written is out."""
        self._flush()
        self._inner.close()

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            if not self._inner.is_closing():
                self._write(head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Protocol(HttpToolsProtocol):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast("asyncio.Transport", HeadJoining(transport, self.loop)))


class HttpServer:
    """One listening server, with TLS if it is given a certificate and its key (PEM files)."""

    def __init__(self, application: Any, cert: str = "", key: str = "") -> None:
        config = uvicorn.Config(
            application,
            http=_Protocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=1,
            ssl_certfile=cert or None,
            ssl_keyfile=key or None,
        )
        self._server = uvicorn.Server(config)
        self._ticking: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port, which is `port` unless that is 0. Raises `OSError` if it is taken."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
        except OSError:
            listener.close()
            raise
        self._server.config.load()
        self._server.lifespan = self._server.config.lifespan_class(self._server.config)
        await self._server.startup(sockets=[listener])
        # uvicorn's own loop only refreshes the Date header and looks whether it should end; signals stay with the caller.
        self._ticking = asyncio.create_task(self._server.main_loop())
        bound: int = listener.getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Close the listener and all connections; requests still running get a second."""
        if self._ticking is None:
            return
        self._server.should_exit = True
        await self._ticking
        await self._server.shutdown()
        self._ticking = None
