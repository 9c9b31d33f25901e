"""The endpoints that are asked now and then: models, health, metrics, status, tokens. Generation has its way in `gateway.py`."""

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from orchestrator.live.http.anthropic import answers as anthropic
from orchestrator.live.http.anthropic.dialect import speaks
from orchestrator.live.http.errors import HttpError, fault, http_error
from orchestrator.live.http.exchange import CLIENT_GONE, ClientGone, body_of, key_of
from orchestrator.live.http.openai.answers import error_body, model_card
from orchestrator.live.http.openai.tokens import parse_detokenise, parse_tokenise, token_list
from orchestrator.live.http.proxy import CALLS
from orchestrator.live.http.responses.dialect import PATH as RESPONSES
from orchestrator.live.http.responses.retrieval import Retrieval
from orchestrator.live.intake import Intake
from orchestrator.live.refusals import Refused
from orchestrator.wire.logs import REQUEST

#: Asked by probes and scrapers, time and again: only what goes wrong there is counted.
PROBED = ("/live", "/health", "/ready", "/ping", "/metrics", "/status")
MODELS, TOKENISE, DETOKENISE, VERSION = "/v1/models", "/tokenize", "/detokenize", "/version"
#: And those that are counted.
ASKED = (MODELS, TOKENISE, DETOKENISE, VERSION)
#: What OpenAI's API, and servers like it, have beside what is served: by the first part of a path behind the version.
_NOT_SERVED = {
    "assistants": "assistants",
    "audio": "speech and transcriptions",
    "batches": "batches",
    "classify": "classification",
    "edits": "edits",
    "embeddings": "embeddings",
    "evals": "evaluations",
    "files": "files",
    "fine_tuning": "fine-tuning",
    "images": "images",
    "moderations": "moderations",
    "pooling": "poolings",
    "realtime": "realtime sessions",
    "rerank": "rankings",
    "score": "scores",
    "threads": "threads",
    "uploads": "uploads",
    "vector_stores": "vector stores",
    "videos": "videos",
}
_GET = ["GET", "HEAD"]
Calls = Callable[[str, bytes, bytes], Awaitable[bytes | None]]
#: Prometheus' text format.
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_routes(
    intake: Intake,
    is_ready: Callable[[], bool],
    metrics_page: Callable[[], bytes],
    status: Callable[[], Any],
    started_unix_s: int,
    responses: Retrieval,
    calls: Calls | None = None,
    body_bytes_max: int = 0,
) -> FastAPI:
    """Return the application; unknown routes and wrong methods end in error bodies of the API that a client speaks.

    Args:
        intake: knows keys and models.
        is_ready: tells whether requests can be served.
        metrics_page: returns the Prometheus exposition.
        status: returns what `/status` shows, as JSON-able values.
        started_unix_s: since when models are served.
        responses: shows those that are kept.
        calls: answers what other gateways ask about hints of a caller of theirs: method, message, key; None for no such method.
        body_bytes_max: of such a message.
    """
    application = FastAPI(title="Weft", docs_url=None, redoc_url=None, redirect_slashes=False)

    def card(request: Request, name: str) -> dict[str, Any]:
        model = intake.model_named(name)
        if _anthropic(request):
            return anthropic.model_info(name, started_unix_s, model.text.context_tokens_max)
        return model_card(name, model, started_unix_s)

    def models(request: Request) -> Response:
        intake.tenant_of(_key(request))
        cards = [card(request, name) for name in intake.model_names()]
        if _anthropic(request):
            return JSONResponse(anthropic.page_of(cards, request.query_params))
        return JSONResponse({"object": "list", "data": cards})

    def model(request: Request, name: str) -> Response:
        intake.tenant_of(_key(request))
        return JSONResponse(card(request, name))

    async def live() -> Response:
        return JSONResponse({"status": "live"})

    async def ready() -> Response:
        return JSONResponse({"status": "ready"}) if is_ready() else JSONResponse({"status": "not ready"}, 503)

    async def metrics(request: Request) -> Response:
        intake.check_metrics_key(_key(request))
        return Response(metrics_page(), media_type=METRICS_TYPE)

    async def state(request: Request) -> Response:
        intake.tenant_of(_key(request))
        return JSONResponse(status())

    async def _body(request: Request) -> bytes:
        return await body_of(request.receive, dict(request.headers.raw), body_bytes_max)

    async def tokenise(request: Request) -> Response:
        tenant = intake.tenant_of(_key(request))
        asked, spelled = parse_tokenise(await _body(request))
        model = intake.model_or_only(asked.model)
        prompt = await intake.encoded(asked, model, tenant)
        return JSONResponse(token_list(prompt, model.text, spelled))

    async def detokenise(request: Request) -> Response:
        intake.tenant_of(_key(request))
        name, tokens = parse_detokenise(await _body(request))
        return JSONResponse({"prompt": intake.model_or_only(name).text.spelled(tokens)})

    async def version_of() -> Response:
        return JSONResponse({"version": version("weft")})

    async def call(request: Request, method: str) -> Response:
        message = await _body(request)
        answer = await calls(method, message, _key(request)) if calls is not None else None
        if answer is None:
            raise HTTPException(404, "Not Found")
        return Response(answer, media_type="application/x-protobuf")

    async def response(request: Request, name: str) -> Response:
        tenant = intake.tenant_of(_key(request))
        told = await elsewhere(request, name)
        if told is not None:
            return told
        if request.method == "DELETE":
            return _json(responses.delete(tenant, name))
        return _json(responses.response(tenant, name, request.query_params))

    async def input_items(request: Request, name: str) -> Response:
        tenant = intake.tenant_of(_key(request))
        told = await elsewhere(request, name)
        return told or _json(responses.input_items(tenant, name, request.query_params))

    async def elsewhere(request: Request, name: str) -> Response | None:
        path = f"{request.url.path}?{request.url.query}" if request.url.query else request.url.path
        told = await responses.elsewhere(request.method, path, name, _key(request))
        return _json(told[1], told[0]) if told is not None else None

    application.add_api_route(f"{RESPONSES}/{{name}}", response, methods=[*_GET, "DELETE"])
    application.add_api_route(f"{RESPONSES}/{{name}}/input_items", input_items, methods=_GET)
    application.add_api_route(f"{CALLS}/{{method}}", call, methods=["POST"])
    application.add_api_route(MODELS, models, methods=_GET)
    application.add_api_route(f"{MODELS}/{{name:path}}", model, methods=_GET)
    application.add_api_route(TOKENISE, tokenise, methods=["POST"])
    application.add_api_route(DETOKENISE, detokenise, methods=["POST"])
    application.add_api_route(VERSION, version_of, methods=_GET)
    application.add_api_route("/live", live, methods=_GET)
    application.add_api_route("/health", ready, methods=_GET)
    application.add_api_route("/ready", ready, methods=_GET)
    application.add_api_route("/ping", ready, methods=[*_GET, "POST"])
    application.add_api_route("/metrics", metrics, methods=_GET)
    application.add_api_route("/status", state, methods=_GET)
    application.add_exception_handler(HTTPException, _on_http_exception)
    application.add_exception_handler(HttpError, _on_http_error)
    application.add_exception_handler(ClientGone, _on_gone)
    application.add_exception_handler(Refused, _on_refused)
    application.add_exception_handler(Exception, _on_fault)
    return application


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), f"registered for HTTPException, got {type(error).__name__}"
    asked = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        allow = ", ".join(sorted((error.headers or {})["Allow"].split(", ")))
        return _response(request, HttpError(405, f"{asked}: only {allow} is served", code="method_not_allowed", allow=allow))
    parts = request.url.path.strip("/").split("/")
    what = _NOT_SERVED.get(parts[1] if parts[0] in ("v1", "v2") and len(parts) > 1 else parts[0])
    if what is not None:
        return _response(
            request, HttpError(404, f"{asked}: {what} are not served here, only generations of text", code="not_served")
        )
    return _response(request, HttpError(error.status_code, f"{asked}: {error.detail}", code="unknown_url"))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError), f"registered for HttpError, got {type(error).__name__}"
    return _response(request, error)


async def _on_gone(request: Request, error: Exception) -> Response:
    """Answer nobody; the status is written down."""
    del request, error
    return Response(status_code=CLIENT_GONE)


async def _on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused), f"registered for Refused, got {type(error).__name__}"
    return _response(request, http_error(error))


async def _on_fault(request: Request, error: Exception) -> Response:
    """Answer after a fault of ours; who serves the connection logs it."""
    del error
    return _response(request, fault())


def _key(request: Request) -> bytes:
    return key_of(dict(request.headers.raw))


def _anthropic(request: Request) -> bool:
    return speaks(request.url.path, dict(request.headers.raw))


def _response(request: Request, error: HttpError) -> Response:
    body = anthropic.error_body(error, request.scope["state"][REQUEST]) if _anthropic(request) else error_body(error)
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(body, error.status, headers, media_type="application/json")


def _json(body: bytes, status: int = 200) -> Response:
    return Response(body, status, media_type="application/json")
