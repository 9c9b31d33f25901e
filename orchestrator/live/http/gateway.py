"""The front door: HTTP requests in OpenAI's words become turns for the driver, and their tokens become answers.

A generation request goes through these steps, each of which may end it with an error body:

    key -> tenant, body -> request (`openai/requests.py`), name -> model, headers -> session -> another gateway (`proxy.py`)?
    messages -> text (`templates.py`) -> tokens and block hashes (`prompts.py`) -> turns -> driver
    tokens -> pieces (`generation.py`) -> body or events (`openai/answers.py`) -> client

The generation endpoints are plain ASGI; everything else is a FastAPI application (`routes.py`) behind them.
"""

import asyncio
import logging
import time
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import blake2b
from hmac import compare_digest
from secrets import token_hex
from typing import Any, Protocol, TypeVar

from starlette.middleware.cors import CORSMiddleware

from orchestrator.core.blocks import hash_root
from orchestrator.core.cluster.sessions import owner_of
from orchestrator.core.config import ClusterConfig
from orchestrator.core.types import (
    DEFAULT_TENANT,
    BlockHash,
    FinishReason,
    GatewayId,
    ModelName,
    RequestId,
    ServiceClass,
    SessionId,
    TenantId,
)
from orchestrator.live.http.exchange import CLIENT_GONE, ClientGone, Exchange, Message, Receive, Scope, Send, closing
from orchestrator.live.http.openai.answers import DONE, Answer, ChatShape, CompletionShape, Shape, Usage
from orchestrator.live.http.openai.requests import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    parse_chat,
    parse_completion,
    sampling_of,
    template_messages,
    template_tools,
    tool_parameters,
)
from orchestrator.live.http.proxy import FORWARDED, PeerUnreachable, forward, pinned
from orchestrator.live.http.routes import MODELS, PROBED, make_routes
from orchestrator.live.http.server import HttpServer
from orchestrator.live.text.generation import Generation, Piece
from orchestrator.live.text.models import ModelText
from orchestrator.live.text.prompts import PromptTokeniser
from orchestrator.live.text.reasoning import ReasoningStyle, ThinkParser
from orchestrator.live.text.templates import TemplateFailed
from orchestrator.live.text.tools import ToolParser, make_parser
from orchestrator.live.turns import Prompt, TokenStream, Turn, TurnDriver, TurnFailed
from orchestrator.wire.logs import REQUEST

log = logging.getLogger("weft.gateway")

AnswerParser = ToolParser | ThinkParser
Asked = TypeVar("Asked", bound=GenerationRequest)

#: Metrics' label for a model nobody serves: what clients write must not become a label.
UNKNOWN_MODEL = "unknown"
#: And for a path that nothing is served at.
UNKNOWN_ENDPOINT = "unknown"
#: Longer session names are hashed down to this many characters.
_SESSION_CHARS_MAX = 256
#: Seconds after which a client may come back to a gateway that is being shut down.
_DRAIN_RETRY_S = 5.0


class TurnWatch(Protocol):
    """Measures one generation."""

    def assigned(self, request: RequestId) -> None:
        """The driver took it under this id."""
        ...

    def delivered(self, tokens: int) -> None:
        """So many more tokens came."""
        ...

    def ended(self, reason: FinishReason) -> None:
        """It is over."""
        ...


class GatewayMetrics(Protocol):
    """What the gateway reports."""

    def answered(self, model: str, endpoint: str, status: int, tenant: TenantId) -> None:
        """One HTTP request ended; a client that went away counts as 499."""
        ...

    def open_turn(self, model: ModelName, service_class: ServiceClass, started: float | None = None) -> TurnWatch:
        """One generation begins."""
        ...


class TurnRecorder(Protocol):
    """Writes down generations; see `recorder.py`."""

    def watch(self, turn: Turn, inner: TurnWatch) -> TurnWatch:
        """Return what measures a generation that begins now and passes everything on."""
        ...


@dataclass(frozen=True, slots=True)
class _Model:
    """A served model."""

    name: ModelName
    text: ModelText
    #: Each tenant's own, so that nobody's prompts push out another's.
    prompts: Mapping[TenantId, PromptTokeniser]


@dataclass(frozen=True, slots=True)
class _Job:
    """What all choices of a request share."""

    exchange: Exchange
    model: _Model
    tenant: TenantId
    session: SessionId | None
    request: GenerationRequest
    shape: Shape


@dataclass(slots=True)
class _Choice:
    """One generation under way."""

    index: int
    stream: TokenStream
    generation: Generation
    watch: TurnWatch


class Gateway:
    """One gateway. Belongs to one event loop.

    Args:
        config: the cluster's.
        gateway: this one's number, from 0.
        models: the text side of every model in `config`.
        secret: keys block hashes; the same in all gateways.
        driver: takes the turns.
        metrics: is told what happens.
        metrics_page: returns the Prometheus exposition.
        status: returns what `/status` shows, as JSON-able values.
        recorder: writes generations down; None if nobody asked for that.
        around: returns the ASGI application that is served in place of this one; None for this one.
    """

    def __init__(
        self,
        config: ClusterConfig,
        gateway: GatewayId,
        models: Mapping[ModelName, ModelText],
        secret: bytes,
        driver: TurnDriver,
        metrics: GatewayMetrics,
        metrics_page: Callable[[], bytes],
        status: Callable[[], Any],
        recorder: TurnRecorder | None = None,
        around: Callable[[Any], Any] | None = None,
    ) -> None:
        self._config = config
        self._number = gateway
        self._secret = secret
        self._driver = driver
        self._metrics = metrics
        self._recorder = recorder
        self._tenants = {_digest(key.encode()): TenantId(one.name) for one in config.tenants for key in one.keys}
        tenants = tuple(TenantId(one.name) for one in config.tenants) or (DEFAULT_TENANT,)
        self._models = {name: _Model(name, text, _prompts(config, name, text, tenants)) for name, text in models.items()}
        self._session_headers = tuple(name.lower().encode() for name in config.gateway.session_headers)
        #: Base URLs of the gateways that take requests; this one is not among them while it drains.
        self._peers: dict[GatewayId, str] = {}
        self._posts: dict[str, Callable[[Exchange], Awaitable[None]]] = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completions,
        }
        self._cold = make_routes(self, metrics_page, status)
        cert, key = config.gateway.cert, config.gateway.key
        application = _with_origins(self, config.gateway.cors_origins)
        self._server = HttpServer(application if around is None else around(application), cert, key)
        self._peers_tls = pinned(cert) if cert else None
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._started_unix_s = int(time.time())

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port, which is `port` unless that is 0. Raises `OSError` if it is taken."""
        return await self._server.start(host, port)

    def join(self, peers: Mapping[GatewayId, str]) -> None:
        """Learn the base URLs of all gateways that take requests: from now on sessions are served by their owner among them."""
        self._peers = dict(peers)

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

    @property
    def ready(self) -> bool:
        """True while requests can be served."""
        return self._driver.ready and not self._draining

    # --- one request --------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection scope."""
        if self._draining and scope["type"] == "http":
            send = closing(send)
        handler = self._posts.get(scope["path"]) if scope["type"] == "http" else None
        if handler is None:
            await self._serve_cold(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self._number)
        self._running += 1
        self._idle.clear()
        try:
            await handler(exchange)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _serve_cold(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the routes answer; name the request as everywhere, and count it."""
        if scope["type"] != "http":
            await self._cold(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self._number)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                await exchange.open(message["status"], list(message["headers"]))
            else:
                await send(message)

        try:
            await self._cold(scope, receive, named)
        except Exception:  # The routes have answered it (`_on_fault`); it must not end the connection as well.
            log.exception("a request failed by a fault of ours", extra={REQUEST: exchange.request_id.decode()})
        known = exchange.path in PROBED or exchange.path == MODELS or exchange.path.startswith(f"{MODELS}/")
        endpoint = f"/{'/'.join(exchange.path.split('/')[1:3])}" if known else UNKNOWN_ENDPOINT
        if exchange.path not in PROBED or exchange.status >= 400:
            self._metrics.answered(UNKNOWN_MODEL, endpoint, exchange.status, DEFAULT_TENANT)

    async def _chat(self, exchange: Exchange) -> None:
        await self._serve(exchange, parse_chat, self._chat_answer)

    async def _completions(self, exchange: Exchange) -> None:
        await self._serve(exchange, parse_completion, self._completion_answer)

    async def _serve(
        self,
        exchange: Exchange,
        parse: Callable[[bytes], Asked],
        answer: Callable[[Exchange, Asked, _Model, TenantId, SessionId | None], Awaitable[None]],
    ) -> None:
        """Take a request to its end, whatever that is, and count it. One that another gateway serves is counted there."""
        tenant, label = DEFAULT_TENANT, UNKNOWN_MODEL
        try:
            if exchange.method != "POST":
                raise ApiError(405, f"{exchange.method} {exchange.path}: only POST is served", code="method_not_allowed")
            tenant = self.authenticate(exchange.headers)
            # What another gateway passed on before it heard of the drain is served like what runs.
            if self._draining and FORWARDED not in exchange.headers:
                raise ApiError(503, "this gateway is shutting down", code="draining", retry_after_s=_DRAIN_RETRY_S)
            body = await exchange.body(self._config.gateway.body_bytes_max)
            request = parse(body)
            model = self._model_named(request.model)
            label = model.name
            session = self._session_of(exchange, request)
            if session is not None and await self._passed_on(exchange, body, session):
                return
            await answer(exchange, request, model, tenant, session)
        except ApiError as error:
            await exchange.refuse(error)
        except ClientGone:
            exchange.status = CLIENT_GONE
        except Exception:  # A fault of ours must end this request alone, with an answer, and be found in the log.
            log.exception("a request failed by a fault of ours", extra={REQUEST: exchange.request_id.decode()})
            await exchange.fail()
        if log.isEnabledFor(logging.DEBUG):
            fields = {REQUEST: exchange.request_id.decode(), "status": exchange.status, "model": label, "tenant": tenant}
            log.debug("%s answered", exchange.path, extra=fields)
        self._metrics.answered(label, exchange.path, exchange.status, tenant)

    async def _passed_on(self, exchange: Exchange, body: bytes, session: SessionId) -> bool:
        """Let the session's owner answer, if that is another gateway that can be reached."""
        if not self._peers or FORWARDED in exchange.headers:
            return False
        owner = owner_of(session, self._peers)
        if owner == self._number:
            return False
        try:
            await forward(exchange, body, self._peers[owner], self._peers_tls)
        except PeerUnreachable:
            # Serving it here costs a recompute; refusing it would cost the request.
            return False
        return True

    async def _chat_answer(
        self, exchange: Exchange, request: ChatRequest, model: _Model, tenant: TenantId, session: SessionId | None
    ) -> None:
        tools = request.shown_tools
        self._check_generations(request.choices)
        try:
            messages = template_messages(request.messages)
            text = model.text.template.render(
                messages,
                template_tools(tools),
                request.template_variables,
                request.opens_answer,
                bool(request.continue_final_message),
            )
        except TemplateFailed as error:
            raise ApiError(400, str(error), code="invalid_messages", param="messages") from error
        prompt = await self._encode(model, text, tenant, session, request.salt, prefixed=False)
        shape = ChatShape(self._answer("chatcmpl", request, model), request.choices, request.include_usage)
        job = _Job(exchange, model, tenant, session, request, shape)
        parameters = tool_parameters(tools)
        thinks = model.text.reasoning_style is not ReasoningStyle.NONE
        continued = str(messages[-1]["content"]) if request.continue_final_message else None
        opened = model.text.reasoning_style.opened_by(text, continued)

        def parser() -> AnswerParser | None:
            calls = make_parser(model.text.tool_style, parameters) if tools else None
            return ThinkParser(opened, calls, request.include_reasoning is not False) if thinks else calls

        await self._run(
            job,
            [prompt],
            request.output_tokens_wanted,
            request.logprobs_wanted,
            parser,
        )

    async def _completion_answer(
        self, exchange: Exchange, request: CompletionRequest, model: _Model, tenant: TenantId, session: SessionId | None
    ) -> None:
        prompts: list[Prompt] = []
        generations = len(request.prompts) * request.choices
        self._check_generations(generations)
        for prompt in request.prompts:
            if isinstance(prompt, str):
                prompts.append(await self._encode(model, prompt, tenant, session, request.salt, prefixed=True))
            else:
                prompts.append(self._adopt(model, prompt, tenant, request.salt))
        answer = self._answer("cmpl", request, model)
        shape = CompletionShape(answer, generations, request.include_usage)
        job = _Job(exchange, model, tenant, session, request, shape)
        await self._run(job, prompts, request.output_tokens_wanted, request.logprobs_wanted, lambda: None)

    # --- turns --------------------------------------------------------------------------------------------------------

    async def _run(
        self,
        job: _Job,
        prompts: Sequence[Prompt],
        output_tokens_wanted: int | None,
        logprobs: int | None,
        make_answer_parser: Callable[[], AnswerParser | None],
    ) -> None:
        """Start every choice of every prompt and send what they bring; whatever happens, no turn stays behind."""
        for prompt in prompts:
            self._check_length(job.model, prompt)
        choices: list[_Choice] = []
        with job.exchange.watch(lambda: _cancel(choices)):
            try:
                for prompt in prompts:
                    for sample in range(job.request.choices):
                        turn = self._turn(job, prompt, output_tokens_wanted, logprobs, sample)
                        choices.append(self._start(job, turn, len(choices), make_answer_parser(), logprobs is not None))
                if job.request.stream:
                    await self._stream(job, prompts, choices)
                else:
                    await self._collect(job, prompts, choices)
            except TurnFailed as failure:
                raise _api_error(failure) from failure
            finally:
                _cancel(choices)

    def _turn(self, job: _Job, prompt: Prompt, output_tokens_wanted: int | None, logprobs: int | None, sample: int) -> Turn:
        request, text = job.request, job.model.text
        sampling = sampling_of(request, logprobs, text.vocabulary_size)
        sampling.stop_token_ids.extend(sorted(_own_ends(job).difference(sampling.stop_token_ids)))
        if request.seed is not None:
            sampling.seed = (request.seed + sample) & 0xFFFF_FFFF_FFFF_FFFF
        room = text.context_tokens_max - prompt.count
        return Turn(
            model=job.model.name,
            tenant=job.tenant,
            prompt=prompt,
            sampling=sampling,
            output_tokens_max=room if output_tokens_wanted is None else min(room, output_tokens_wanted),
            session=job.session,
            service_class=request.service_class,
            priority=request.urgency,
            name=job.exchange.request_id.decode(),
        )

    def _start(self, job: _Job, turn: Turn, index: int, parser: AnswerParser | None, scored: bool) -> _Choice:
        text = job.model.text
        ends = frozenset(turn.sampling.stop_token_ids)
        detokeniser = text.vocabulary.detokeniser(turn.prompt.tokens, marked=parser is not None)
        generation = Generation(detokeniser, job.request.stops, ends, parser, scored)
        watch = self._metrics.open_turn(turn.model, turn.service_class)
        stream = self._driver.start(turn)
        if self._recorder is not None:
            watch = self._recorder.watch(turn, watch)
        watch.assigned(stream.request)
        return _Choice(index, stream, generation, watch)

    async def _collect(self, job: _Job, prompts: Sequence[Prompt], choices: Sequence[_Choice]) -> None:
        """Answer with one body."""
        collected: list[tuple[Generation, list[Piece]]] = []
        for choice in choices:
            pieces: list[Piece] = []
            while choice.generation.finish_reason is None:
                pieces += await _read(choice)
            collected.append((choice.generation, pieces))
        await job.exchange.answer(200, job.shape.whole(collected, _usage(prompts, choices)))

    async def _stream(self, job: _Job, prompts: Sequence[Prompt], choices: Sequence[_Choice]) -> None:
        """Answer with events: all that came together goes out together."""
        shape, exchange = job.shape, job.exchange
        left = len(choices)
        async with aclosing(_batches(choices)) as batches:
            try:
                async for batch in batches:
                    events: list[bytes] = []
                    if not exchange.streaming:
                        await exchange.open_events()
                        events += [shape.opening(choice.index) for choice in choices]
                    for choice, pieces in batch:
                        events += shape.events(choice.index, pieces)
                        if choice.generation.finish_reason is not None:
                            left -= 1
                            events.append(shape.ending(choice.index, choice.generation.finish_reason))
                    if not left:
                        usage = [shape.usage(_usage(prompts, choices))] if job.request.include_usage else []
                        await exchange.close(b"".join([*events, *usage, DONE]))
                    elif data := b"".join(events):
                        await exchange.write(data)
            except TurnFailed as failure:
                if not exchange.streaming:
                    raise
                error = _api_error(failure)
                await exchange.close(b"data: " + error.body() + b"\n\n" + DONE)
                exchange.status = error.status
                return

    # --- parts --------------------------------------------------------------------------------------------------------

    def authenticate(self, headers: Mapping[bytes, bytes]) -> TenantId:
        """Return the tenant a request's key stands for. Raises `ApiError` 401."""
        if not self._config.tenants:
            return DEFAULT_TENANT
        tenant = self._tenants.get(_digest(_key_of(headers)))
        if tenant is None:
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        return tenant

    def authenticate_metrics(self, headers: Mapping[bytes, bytes]) -> None:
        """See that the page of metrics may be shown. Raises `ApiError` 401."""
        key = self._config.gateway.metrics_key
        if not key:
            self.authenticate(headers)
        elif not compare_digest(_key_of(headers), key.encode()):
            raise ApiError(401, "the key for metrics is missing or wrong", code="invalid_api_key")

    def model_cards(self) -> list[dict[str, Any]]:
        """Return the models clients may name, in OpenAI's shape; aliases that match by their beginning are left out."""
        aliases = (alias for model in self._config.models.values() for alias in model.aliases)
        exact = [alias for alias in aliases if not alias.endswith("*")]
        return [self.model_card(name) for name in (*self._models, *exact)]

    def model_card(self, name: str) -> dict[str, Any]:
        """Return one model in OpenAI's shape. Raises `ApiError` 404."""
        model = self._model_named(name)
        return {
            "id": name,
            "object": "model",
            "created": self._started_unix_s,
            "owned_by": "weft",
            "root": model.name,
            "max_model_len": model.text.context_tokens_max,
        }

    def _model_named(self, name: str) -> _Model:
        """Return the model of that name, or else of the longest alias that matches."""
        served = self._config.model_named(name)
        if served is None:
            raise ApiError(404, f"the model {name!r} does not exist", code="model_not_found", param="model")
        return self._models[ModelName(served)]

    def _session_of(self, exchange: Exchange, request: GenerationRequest) -> SessionId | None:
        """Return the session a request belongs to: the first configured header that is there, else what the body says."""
        for name in self._session_headers:
            value = exchange.headers.get(name)
            if value:
                return _session(value.decode("latin-1"))
        return _session(request.session_hint) if request.session_hint else None

    async def _encode(
        self, model: _Model, text: str, tenant: TenantId, session: SessionId | None, salt: str, prefixed: bool
    ) -> Prompt:
        key = (session,) if session is not None else None
        return await model.prompts[tenant].encode_aside(text, self._root(model, tenant, salt), key, prefixed)

    def _adopt(self, model: _Model, tokens: Sequence[int], tenant: TenantId, salt: str) -> Prompt:
        size = model.text.vocabulary_size
        if min(tokens) < 0 or max(tokens) >= size:
            raise ApiError(400, f"prompt: token ids must be from 0 to {size - 1}", code="invalid_value", param="prompt")
        return model.prompts[tenant].adopt(array("I", tokens).tobytes(), self._root(model, tenant, salt))

    def _root(self, model: _Model, tenant: TenantId, salt: str) -> BlockHash:
        return hash_root(self._secret, model.text.fingerprint, f"{tenant}\0{salt}")

    def _check_generations(self, count: int) -> None:
        """Refuse a request that is too many in one, before any of them begins."""
        most = self._config.gateway.generations_max
        if count > most:
            problem = f"a request may have {most} generations (prompts times n), this one has {count}"
            raise ApiError(400, problem, code="too_many_generations", param="n")

    def _check_length(self, model: _Model, prompt: Prompt) -> None:
        most = model.text.context_tokens_max
        if prompt.count >= most:
            problem = f"this model's maximum context length is {most} tokens, and the prompt has {prompt.count} already"
            raise ApiError(400, problem, code="context_length_exceeded", param="messages")
        if prompt.count == 0:
            raise ApiError(400, "the prompt is empty", code="invalid_value", param="messages")

    def _answer(self, kind: str, request: GenerationRequest, model: _Model) -> Answer:
        return Answer(f"{kind}-{token_hex(12)}", int(time.time()), request.model, model.text.vocabulary)


def _key_of(headers: Mapping[bytes, bytes]) -> bytes:
    """Return the key a request carries, as OpenAI's clients send it or as Anthropic's do; empty if it has none."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def _own_ends(job: _Job) -> frozenset[int]:
    """Return the tokens with which the model itself ends such an answer, none if they are to be ignored."""
    if job.request.ignore_eos:
        return frozenset()
    text = job.model.text
    return text.chat_eos_token_ids if isinstance(job.request, ChatRequest) else text.eos_token_ids


def _with_origins(gateway: Gateway, origins: Sequence[str]) -> Any:
    """Return the application that web pages from some origins may call too."""
    if not origins:
        return gateway
    exposed = ("x-request-id", "x-weft-gateway", "x-weft-refused", "retry-after")
    return CORSMiddleware(gateway, origins, allow_methods=("GET", "POST"), allow_headers=("*",), expose_headers=exposed)


async def _read(choice: _Choice) -> list[Piece]:
    """Wait for a choice's next tokens and return what they bring. Raises `TurnFailed`."""
    generation = choice.generation
    delta = await choice.stream.read()
    choice.watch.delivered(len(delta.tokens))
    pieces = generation.take(delta)
    if generation.stopped and delta.finish is None:
        choice.stream.cancel()
    if generation.finish_reason is not None:
        choice.watch.ended(delta.finish or FinishReason.STOP)
    return pieces


async def _batches(choices: Sequence[_Choice]) -> AsyncGenerator[list[tuple[_Choice, list[Piece]]], None]:
    """Yield what choices bring, as it comes, until all have ended. Raises `TurnFailed` of whichever fails first."""
    if len(choices) == 1:
        while choices[0].generation.finish_reason is None:
            yield [(choices[0], await _read(choices[0]))]
        return
    reads: dict[asyncio.Future[list[Piece]], _Choice] = {asyncio.ensure_future(_read(choice)): choice for choice in choices}
    try:
        while reads:
            await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
            batch = [(choice, read.result()) for read, choice in reads.items() if read.done()]
            again = [choice for choice, _ in batch if choice.generation.finish_reason is None]
            reads = {read: choice for read, choice in reads.items() if not read.done()}
            reads |= {asyncio.ensure_future(_read(choice)): choice for choice in again}
            yield batch
    finally:
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)


def _cancel(choices: Sequence[_Choice]) -> None:
    """Free what unfinished choices hold."""
    for choice in choices:
        if choice.generation.finish_reason is None:
            choice.generation.finish_reason = "cancelled"
            choice.stream.cancel()
            choice.watch.ended(FinishReason.CANCELLED)


def _usage(prompts: Sequence[Prompt], choices: Sequence[_Choice]) -> Usage:
    """Add up an answer's tokens; a prompt's cached tokens are those its first choice found."""
    samples = len(choices) // len(prompts)
    return Usage(
        prompt_tokens=sum(prompt.count for prompt in prompts),
        cached_tokens=sum(choice.generation.cached_tokens for choice in choices[::samples]),
        completion_tokens=sum(choice.generation.tokens for choice in choices),
        reasoning_tokens=sum(choice.generation.reasoning_tokens for choice in choices),
    )


def _api_error(failure: TurnFailed) -> ApiError:
    return ApiError(failure.status, failure.message, failure.code, retry_after_s=failure.retry_after_s)


def _prompts(
    config: ClusterConfig, name: ModelName, text: ModelText, tenants: Sequence[TenantId]
) -> dict[TenantId, PromptTokeniser]:
    """Return a tokeniser for each tenant, all with the same share of the memory for prompts."""
    sharing = len(config.models) * len(tenants)
    block_tokens = config.pools_of(name)[0].engine.block_tokens
    prompts_max = max(1, config.gateway.prompts_cached_max // sharing)
    chars_max = config.gateway.prompt_chars_cached_max // sharing
    return {
        tenant: PromptTokeniser(text.tokenizer, text.segmenter, text.prefix, block_tokens, prompts_max, chars_max)
        for tenant in tenants
    }


def _session(name: str) -> SessionId:
    return SessionId(name if len(name) <= _SESSION_CHARS_MAX else _digest(name.encode()).hex())


def _digest(key: bytes) -> bytes:
    return blake2b(key, digest_size=32).digest()
