"""Opens what traces requests, where a cluster file asks for it (`[trace]`); without that OpenTelemetry need not be installed.

`spans.py` does the work. This is the one place that imports it, and only then.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from orchestrator.core.config import ConfigError, TraceConfig
from orchestrator.core.types import GatewayId
from orchestrator.live.driver import Observer
from orchestrator.live.http.gateway import GatewayMetrics
from orchestrator.live.metrics import Metrics


class Traces(Observer, GatewayMetrics, Protocol):
    """Is told all that metrics are told, passes it on to them, and makes spans of it."""

    def wrap(self, application: Any) -> Any:
        """Return the ASGI application with a span around each request for a generation."""
        ...

    def close(self) -> None:
        """Export what is left, for a while; blocks."""
        ...


Opener: TypeAlias = Callable[[TraceConfig, GatewayId, Metrics], Traces]


def traces_opener(config: TraceConfig) -> Opener | None:
    """Return what opens a gateway's traces; None if none are asked for. Raises `ConfigError` if they are and cannot be made."""
    if not config.endpoint:
        return None
    try:
        from orchestrator.live.spans import open_spans  # noqa: PLC0415
    except ModuleNotFoundError as error:
        missing = f"traces need {error.name}, which is not installed on this host: pip install 'weft[otel]'"
        raise ConfigError("trace.endpoint", missing) from None
    return open_spans
