"""The endpoints that are asked now and then: models, health, metrics, status. Generation has its own short way, `gateway.py`."""

from collections.abc import Callable
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from orchestrator.live.http.openai.requests import ApiError

#: Asked by probes and scrapers, time and again: only what goes wrong there is counted.
PROBED = ("/live", "/health", "/ready", "/metrics", "/status")
MODELS = "/v1/models"
#: Prometheus' text format.
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Answers(Protocol):
    """What the routes ask of the gateway."""

    @property
    def ready(self) -> bool: ...

    def authenticate(self, headers: "dict[bytes, bytes]") -> object: ...

    def authenticate_metrics(self, headers: "dict[bytes, bytes]") -> None: ...

    def model_cards(self) -> list[dict[str, Any]]: ...

    def model_card(self, name: str) -> dict[str, Any]: ...


def make_routes(gateway: Answers, metrics_page: Callable[[], bytes], status: Callable[[], Any]) -> FastAPI:
    """Return the application; unknown routes and wrong methods end in OpenAI's error bodies."""
    application = FastAPI(title="Weft", docs_url=None, redoc_url=None)

    def models(request: Request) -> Response:
        gateway.authenticate(dict(request.headers.raw))
        return JSONResponse({"object": "list", "data": gateway.model_cards()})

    def model(request: Request, name: str) -> Response:
        gateway.authenticate(dict(request.headers.raw))
        return JSONResponse(gateway.model_card(name))

    async def live() -> Response:
        return JSONResponse({"status": "live"})

    async def ready() -> Response:
        return JSONResponse({"status": "ready" if gateway.ready else "not ready"}, 200 if gateway.ready else 503)

    async def metrics(request: Request) -> Response:
        gateway.authenticate_metrics(dict(request.headers.raw))
        return Response(metrics_page(), media_type=METRICS_TYPE)

    async def state(request: Request) -> Response:
        gateway.authenticate(dict(request.headers.raw))
        return JSONResponse(status())

    application.add_api_route("/v1/models", models)
    application.add_api_route("/v1/models/{name:path}", model)
    application.add_api_route("/live", live)
    application.add_api_route("/health", ready)
    application.add_api_route("/ready", ready)
    application.add_api_route("/metrics", metrics)
    application.add_api_route("/status", state)
    application.add_exception_handler(HTTPException, _on_http_exception)
    application.add_exception_handler(ApiError, _on_api_error)
    application.add_exception_handler(Exception, _on_fault)
    return application


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), f"registered for HTTPException, got {type(error).__name__}"
    problem = f"{request.method} {request.url.path}: {error.detail}"
    code = "method_not_allowed" if error.status_code == 405 else "unknown_url"
    return _response(ApiError(error.status_code, problem, code=code))


async def _on_api_error(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, ApiError), f"registered for ApiError, got {type(error).__name__}"
    return _response(error)


async def _on_fault(request: Request, error: Exception) -> Response:
    """Answer after a fault of ours; who serves the connection logs it."""
    del request, error
    return _response(ApiError(500, "internal error; its cause is in the server's log", code="internal_error"))


def _response(error: ApiError) -> Response:
    return Response(error.body(), error.status, media_type="application/json")
