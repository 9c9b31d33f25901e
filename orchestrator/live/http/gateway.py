"""The front door: HTTP requests in some API's words become turns for the driver, and their tokens become answers.

A generation request goes through these steps, each of which may end it with an error body:

    key -> tenant, body -> Asked (the endpoint's `Dialect`), name -> model, session -> another gateway (`proxy.py`)?
    Asked -> tokens and block hashes (`intake.py`) -> turns -> driver -> pieces (`choices.py`)
    pieces -> body or events (the dialect's writer) -> client (`sending.py`)

The generation endpoints are plain ASGI; everything else is a FastAPI application (`routes.py`) behind them. The only place that
knows which API is spoken at which path.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from starlette.middleware.cors import CORSMiddleware

from orchestrator.core.config import ClusterConfig
from orchestrator.core.types import DEFAULT_TENANT, GatewayId, ModelName, SessionId, TenantId
from orchestrator.live.asked import Asked
from orchestrator.live.choices import Choices, Kept, TurnMetrics, TurnRecorder
from orchestrator.live.http.anthropic import dialect as anthropic
from orchestrator.live.http.dialects import Dialect
from orchestrator.live.http.errors import HttpError, http_error
from orchestrator.live.http.exchange import CLIENT_GONE, ClientGone, Exchange, Message, Receive, Scope, Send, closing, key_of
from orchestrator.live.http.openai import dialect as openai
from orchestrator.live.http.proxy import CALLS, FORWARDED, Peers
from orchestrator.live.http.responses.dialect import PATH as RESPONSES
from orchestrator.live.http.responses.dialect import Responses
from orchestrator.live.http.responses.retrieval import Retrieval
from orchestrator.live.http.responses.stored import StoredResponses
from orchestrator.live.http.retention import is_final, parent_of
from orchestrator.live.http.routes import ASKED, MODELS, PROBED, Calls, make_routes
from orchestrator.live.http.sending import send_events, send_whole
from orchestrator.live.http.server import HttpServer
from orchestrator.live.intake import Intake, Keep, Prepared, ServedModel
from orchestrator.live.refusals import Refused
from orchestrator.live.turns import TurnDriver, TurnFailed
from orchestrator.wire.logs import REQUEST

log = logging.getLogger("weft.gateway")

#: Metrics' label for a model nobody serves: what clients write must not become a label.
UNKNOWN_MODEL = "unknown"
#: And for a path that nothing is served at.
UNKNOWN_ENDPOINT = "unknown"
#: Seconds after which a client may come back to a gateway that is being shut down.
_DRAIN_RETRY_S = 5.0


class GatewayMetrics(TurnMetrics, Protocol):
    """What the gateway reports."""

    def answered(self, model: str, endpoint: str, status: int, tenant: TenantId) -> None:
        """One HTTP request ended; a client that went away counts as 499."""
        ...


class SessionLives(Protocol):
    """Who acts on what requests say besides what they ask for."""

    def begins(self, model: ModelName, tenant: TenantId, session: SessionId, parent: SessionId) -> None:
        """A request says what its session forked from."""
        ...

    def kept(self, model: ModelName, tenant: TenantId, session: SessionId | None, keep: Keep) -> int:
        """A request asks for a prompt's beginning to be kept; return how many of its blocks are."""
        ...

    def ends(self, model: ModelName, tenant: TenantId, session: SessionId) -> None:
        """A session's last request has ended."""
        ...


class Gateway:
    """One gateway. Belongs to one event loop.

    Args:
        config: the cluster's.
        gateway: this one's number, from 0.
        intake: knows keys, models and prompts.
        driver: takes the turns.
        metrics: is told what happens.
        metrics_page: returns the Prometheus exposition.
        status: returns what `/status` shows, as JSON-able values.
        recorder: writes generations down; None if nobody asked for that.
        around: returns the ASGI application that is served in place of this one; None for this one.
        calls: answers what other gateways ask about hints (`routes.py`).
        lives: told of what requests say of sessions and of keeping their prompts; None if nobody is.
    """

    def __init__(
        self,
        config: ClusterConfig,
        gateway: GatewayId,
        intake: Intake,
        driver: TurnDriver,
        metrics: GatewayMetrics,
        metrics_page: Callable[[], bytes],
        status: Callable[[], Any],
        recorder: TurnRecorder | None = None,
        around: Callable[[Any], Any] | None = None,
        calls: Calls | None = None,
        lives: Callable[[], SessionLives] | None = None,
    ) -> None:
        self._number = gateway
        self._lives = lives
        self._intake = intake
        self._driver = driver
        self._metrics = metrics
        self._recorder = recorder
        self._body_bytes_max = config.gateway.body_bytes_max
        self._session_headers = tuple(name.lower().encode() for name in config.gateway.session_headers)
        cert, key = config.gateway.cert, config.gateway.key
        #: The other gateways.
        self.peers = Peers(gateway, cert)
        stored = _stored(config)
        retrieval = Retrieval(gateway, stored, self.peers.ask)
        #: What is spoken where; nothing is spoken twice.
        self._endpoints: Mapping[str, Dialect] = {
            **openai.ENDPOINTS,
            **anthropic.ENDPOINTS,
            **Responses(gateway, stored).endpoints,
        }
        self._cold = make_routes(
            intake, lambda: self.ready, metrics_page, status, int(time.time()), retrieval, calls, self._body_bytes_max
        )
        application = _with_origins(self, config.gateway.cors_origins)
        self._server = HttpServer(application if around is None else around(application), cert, key)
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port, which is `port` unless that is 0. Raises `OSError` if it is taken."""
        return await self._server.start(host, port)

    def join(self, peers: Mapping[GatewayId, str]) -> None:
        """Learn the base URLs of all gateways that take requests: from now on sessions are served by their owner among them."""
        self.peers.join(peers)

    async def drain(self, seconds: float, linger_s: float = 0.0) -> bool:
        """Take nothing new and wait for what runs, for `linger_s` and `seconds` at most; return True if nothing is left.

        For `linger_s` at least new requests are refused, and their connections closed, so that whoever balances load has time to
        see that this gateway is not ready before nobody listens here any more.
        """
        self._draining = True
        await asyncio.sleep(linger_s)
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Stop listening and end what still runs."""
        self._draining = True
        await self._server.stop()
        await self.peers.close()

    @property
    def ready(self) -> bool:
        """True while requests can be served."""
        return self._driver.ready and not self._draining

    # --- one request --------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection scope."""
        if self._draining and scope["type"] == "http":
            send = closing(send)
        dialect = self._endpoints.get(scope["path"]) if scope["type"] == "http" else None
        if dialect is None and scope["type"] == "http" and scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
            dialect = self._endpoints.get(scope["path"])
        if dialect is None:
            await self._serve_cold(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self._number, dialect)
        self._running += 1
        self._idle.clear()
        try:
            await self._serve(exchange, dialect)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _serve_cold(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the routes answer; name the request as everywhere, and count it."""
        if scope["type"] != "http":
            await self._cold(scope, receive, send)
            return
        words = anthropic.MESSAGES if anthropic.speaks(scope["path"], dict(scope["headers"])) else openai.CHAT
        exchange = Exchange(scope, receive, send, self._number, words)
        scope = {**scope, "state": {REQUEST: exchange.request_id.decode()}}

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                await exchange.open(message["status"], list(message["headers"]))
            else:
                await send(message)

        try:
            await self._cold(scope, receive, named)
        except Exception:  # The routes have answered it (`_on_fault`); it must not end the connection as well.
            log.exception("a request failed by a fault of ours", extra={REQUEST: exchange.request_id.decode()})
        known = exchange.path in (*PROBED, *ASKED) or exchange.path.startswith((f"{MODELS}/", f"{RESPONSES}/", f"{CALLS}/"))
        endpoint = f"/{'/'.join(exchange.path.split('/')[1:3])}" if known else UNKNOWN_ENDPOINT
        if exchange.path not in PROBED or exchange.status >= 400:
            self._metrics.answered(UNKNOWN_MODEL, endpoint, exchange.status, DEFAULT_TENANT)

    async def _serve(self, exchange: Exchange, dialect: Dialect) -> None:
        """Take a request to its end, whatever that is, and count it. One that another gateway serves is counted there."""
        arrived_s = self._metrics.clock()
        tenant, label = DEFAULT_TENANT, UNKNOWN_MODEL
        try:
            _check_method(exchange)
            tenant = self._intake.tenant_of(key_of(exchange.headers))
            self._check_draining(exchange)
            body = await exchange.body(self._body_bytes_max)
            asked = dialect.parse(body)
            model = self._intake.model_named(asked.model)
            label = model.label
            session = self._session_of(exchange, asked)
            if await self.peers.pass_on(exchange, body, session, asked.hints.gateway):
                return
            if dialect.complete is not None:
                asked = dialect.complete(asked, tenant, session)
                session = self._session_of(exchange, asked)
            await self._answer(exchange, dialect, asked, model, tenant, session, arrived_s)
        except HttpError as error:
            await exchange.refuse(error)
        except (Refused, TurnFailed) as error:
            await exchange.refuse(http_error(error))
        except ClientGone:
            exchange.status = CLIENT_GONE
        except Exception:  # A fault of ours must end this request alone, with an answer, and be found in the log.
            log.exception("a request failed by a fault of ours", extra={REQUEST: exchange.request_id.decode()})
            await exchange.fail()
        self._count(exchange, label, tenant)

    async def _answer(
        self,
        exchange: Exchange,
        dialect: Dialect,
        asked: Asked,
        model: ServedModel,
        tenant: TenantId,
        session: SessionId | None,
        arrived_s: float,
    ) -> None:
        """Start what is asked for and send what it brings; whatever happens, no turn stays behind."""
        if dialect.count is not None:
            await exchange.answer(200, dialect.count(await self._intake.count(asked, model, tenant)))
            return
        lives = self._lives() if self._lives is not None else None
        parent = self._parent_of(exchange) if session is not None else None
        if lives is not None and session is not None and parent is not None:
            lives.begins(model.name, tenant, session, parent)
        prepared = await self._intake.prepare(asked, model, tenant, session)
        choices = Choices(prepared, exchange.request_id.decode(), arrived_s)
        writer = dialect.writer(asked, model.text.vocabulary)
        with exchange.watch(choices.cancel):
            try:
                choices.start(self._driver, self._metrics, self._recorder)
                if lives is not None:
                    choices.kept = [_kept(lives, prepared, keep) for keep in prepared.keeps]
                if asked.report.streams:
                    await send_events(exchange, choices, writer)
                else:
                    await send_whole(exchange, choices, writer)
            finally:
                choices.cancel()
                if lives is not None and session is not None and is_final(exchange.headers):
                    lives.ends(model.name, tenant, session)

    def _parent_of(self, exchange: Exchange) -> SessionId | None:
        """Return the session that a request's session forked from, if a header says so."""
        named = parent_of(exchange.headers)
        return self._intake.session_named(named.decode("latin-1")) if named is not None else None

    def _check_draining(self, exchange: Exchange) -> None:
        # What another gateway passed on before it heard of the drain is served like what runs.
        if self._draining and FORWARDED not in exchange.headers:
            raise HttpError(503, "this gateway is shutting down", code="draining", retry_after_s=_DRAIN_RETRY_S)

    def _session_of(self, exchange: Exchange, asked: Asked) -> SessionId | None:
        """Return the session a request belongs to: the first configured header that is there, else what the body says."""
        for name in self._session_headers:
            value = exchange.headers.get(name)
            if value:
                return self._intake.session_named(value.decode("latin-1"))
        return self._intake.session_named(asked.hints.session)

    def _count(self, exchange: Exchange, model: ModelName | str, tenant: TenantId) -> None:
        if log.isEnabledFor(logging.DEBUG):
            fields = {REQUEST: exchange.request_id.decode(), "status": exchange.status, "model": model, "tenant": tenant}
            log.debug("%s answered", exchange.path, extra=fields)
        self._metrics.answered(model, exchange.path, exchange.status, tenant)


def _kept(lives: SessionLives, prepared: Prepared, keep: Keep) -> Kept:
    """Have a prompt's beginning kept; return what of it is."""
    blocks = lives.kept(prepared.model.name, prepared.tenant, prepared.session, keep)
    return Kept(keep.tokens // len(keep.hashes) * blocks, keep.seconds)


def _check_method(exchange: Exchange) -> None:
    if exchange.method != "POST":
        problem = f"{exchange.method} {exchange.path}: only POST is served"
        raise HttpError(405, problem, code="method_not_allowed", allow="POST")


def _stored(config: ClusterConfig) -> StoredResponses:
    """Return where one gateway keeps its tenants' responses."""
    tenants = tuple(TenantId(one.name) for one in config.tenants) or (DEFAULT_TENANT,)
    gateway = config.gateway
    return StoredResponses(tenants, gateway.responses_max, gateway.responses_bytes_max, gateway.responses_s_max)


def _with_origins(gateway: Gateway, origins: Sequence[str]) -> Any:
    """Return the application that web pages from some origins may call too."""
    if not origins:
        return gateway
    exposed = ("x-request-id", "request-id", "x-weft-gateway", "x-weft-refused", "retry-after")
    methods = ("GET", "HEAD", "POST", "DELETE")
    return CORSMiddleware(gateway, origins, allow_methods=methods, allow_headers=("*",), expose_headers=exposed)
