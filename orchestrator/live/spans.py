"""Traces of requests for OpenTelemetry: one span for each request at the gateway, and within it what became of each generation.

    POST /v1/chat/completions    from the request's head to the end of its answer
      queue                      from its arrival, tokenised, until nodes have room
      route                      the decision which; of a request that had to wait it is part of what made room, and takes no time
      prefill                    from the first step of the node that computes the prompt to the last
      transfer                   from the first block that a node gets from another to the last
      decode                     from the first token to the end

Between `route` and `prefill` a request waits on its node. A generation that is started over has the spans of each attempt: what
failed of it says so. Several generations of one request (`n`, prompts) have theirs side by side, told apart by
`weft.generation`, the request's number in logs and journals.

Facts come from where metrics get theirs, and are passed on to those (`Spans` stands between); which request they belong to goes
from the HTTP side to the driver's in a context variable. Nodes say how long ago what they did began: their clocks are their own.

The only file that imports OpenTelemetry; imported itself only where traces are asked for (`tracing.py`).

Rule 1: of what clients write only names of requests and ids of traces get into a span: no text, no key, no session.
Rule 2: nothing here waits. Spans are exported by a thread of OpenTelemetry's, from a bounded queue, and lost if that is full.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import version
from threading import Thread
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from orchestrator.core.commands import Abort, Assign, ClusterCommand, Complete, Refuse, Restart, Resume, Scores
from orchestrator.core.config import TraceConfig
from orchestrator.core.events import (
    ClusterEvent,
    Ended,
    FirstToken,
    NodeLost,
    NodeReported,
    RequestAbandoned,
    RequestArrived,
)
from orchestrator.core.types import (
    FinishReason,
    GatewayId,
    ModelName,
    NodeId,
    Request,
    RequestId,
    Role,
    ServiceClass,
    TenantId,
    request_of,
)
from orchestrator.live.http.exchange import HeaderList, Receive, Scope, Send, request_id_of
from orchestrator.live.http.gateway import UNKNOWN_ENDPOINT, UNKNOWN_MODEL
from orchestrator.live.metrics import Metrics, Watch

#: Seconds between two exports, spans in one of them at most, and seconds that one may take.
EXPORT_EVERY_S = 5.0
EXPORT_SPANS_MAX = 512
EXPORT_S_MAX = 5.0
#: Seconds that a gateway which ends waits for its last spans to be exported.
CLOSE_S_MAX = 2.0
#: GenAI operations by endpoint; what is not listed here is a chat.
_OPERATIONS = {"/v1/completions": "text_completion"}
_OPERATION = "chat"

log = logging.getLogger("weft.trace")

Attributes = dict[str, str | int | float]


class _ToOurLog(logging.Handler):
    """Passes on what OpenTelemetry says of failing exports."""

    def emit(self, record: logging.LogRecord) -> None:
        log.handle(record)


def open_spans(config: TraceConfig, gateway: GatewayId, metrics: Metrics, exporter: SpanExporter | None = None) -> "Spans":
    """Start a gateway's tracing as a cluster file says.

    Args:
        config: with an endpoint.
        gateway: this one's number.
        metrics: is told all that the returned object is told.
        exporter: where spans go instead of the endpoint.
    """
    said = logging.getLogger("opentelemetry")
    said.handlers, said.propagate = [_ToOurLog()], False
    names = {SERVICE_NAME: config.service, SERVICE_INSTANCE_ID: f"gateway-{gateway}", SERVICE_VERSION: version("weft")}
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(config.sampled_share),
        resource=Resource.create(names),
        shutdown_on_exit=False,
    )
    batches = BatchSpanProcessor(
        exporter or OTLPSpanExporter(f"{config.endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_S_MAX),
        max_queue_size=config.spans_max,
        schedule_delay_millis=EXPORT_EVERY_S * 1000,
        max_export_batch_size=min(EXPORT_SPANS_MAX, config.spans_max),
    )
    provider.add_span_processor(batches)
    return Spans(provider, metrics)


@dataclass(slots=True)
class _Asked:
    """One HTTP request whose trace is recorded."""

    span: Span
    #: What its spans are children of.
    context: Context
    #: Unix time of the performance counter's zero, nanoseconds: one for all of a trace, so that its spans fit together.
    zero_ns: int
    path: str
    answered: bool = False
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


@dataclass(slots=True)
class _Attempt:
    """One try of one generation: what is known of its times, in seconds of the performance counter."""

    asked: _Asked
    request: Request
    number: int
    queued_s: float
    #: When the decision began and when it was made; None while it waits.
    routed_s: tuple[float, float] | None = None
    why: Scores | None = None
    #: The node that computes the prompt, and the one that generates.
    computes: NodeId | None = None
    generates: NodeId | None = None
    prefill_began_s: float | None = None
    prefill_ended_s: float | None = None
    transfers: list[tuple[NodeId, float, float]] = field(default_factory=list[tuple[NodeId, float, float]])
    first_token_s: float | None = None
    #: What was found of the prompt by the attempt that brought the first token; None before that.
    cached_tokens: int | None = None


#: The request that the running task answers; None where no trace of it is recorded.
_ASKED: ContextVar[_Asked | None] = ContextVar("weft_asked", default=None)


class Spans:
    """One gateway's traces. Belongs to the gateway's event loop.

    Args:
        provider: OpenTelemetry's; shut down by `close`.
        metrics: is told all that this is told.
        clock: seconds, monotonic.
    """

    def __init__(self, provider: TracerProvider, metrics: Metrics, clock: Callable[[], float] = time.perf_counter) -> None:
        self._provider = provider
        self._metrics = metrics
        self._clock = clock
        self._tracer = provider.get_tracer("weft", version("weft"))
        self._propagator = TraceContextTextMapPropagator()
        #: Generations under way whose request's trace is recorded.
        self._attempts: dict[RequestId, _Attempt] = {}
        #: Seconds that the decision took of which `observe` is told next.
        self._route_s = 0.0

    def close(self) -> None:
        """Export what is left, for `CLOSE_S_MAX` at most; blocks."""
        # OpenTelemetry's own limit is for the queue, not for the export that is under way.
        closing = Thread(target=self._provider.shutdown, name="spans", daemon=True)
        closing.start()
        closing.join(CLOSE_S_MAX)

    # --- from the HTTP side -------------------------------------------------------------------------------------------

    def wrap(self, application: Any) -> Any:
        """Return the ASGI application with a span around each POST: requests for generations."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "POST":
                await application(scope, receive, send)
                return
            asked, headers = self._begin(scope)
            token = _ASKED.set(asked)
            try:
                await application({**scope, "headers": headers}, receive, send)
            finally:
                _ASKED.reset(token)
                if asked is not None:
                    self._end(asked)

        return traced

    def _begin(self, scope: Scope) -> tuple[_Asked | None, HeaderList]:
        """Open a request's span; return None for it if it is not recorded, and the headers with its own name and context.

        With them the gateway that a request is passed on to continues the trace, or leaves it out as well.
        """
        given: HeaderList = scope["headers"]
        began_s = self._clock()
        zero_ns = time.time_ns() - round(began_s * 1e9)
        parent = self._propagator.extract(_carrier(given), context=Context())
        span = self._tracer.start_span("POST", parent, SpanKind.SERVER, start_time=_unix_ns(zero_ns, began_s))
        context = set_span_in_context(span, Context())
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context)
        name = request_id_of(dict(given).get(b"x-request-id"))
        own = [(b"x-request-id", name), *((key.encode(), value.encode()) for key, value in carrier.items())]
        replaced = {b"x-request-id", b"traceparent", b"tracestate"}
        headers = [*(pair for pair in given if pair[0] not in replaced), *own]
        if not span.is_recording():
            return None, headers
        span.set_attributes({"http.request.method": "POST", "weft.request.id": name.decode()})
        return _Asked(span, context, zero_ns, scope["path"]), headers

    def _end(self, asked: _Asked) -> None:
        # Without an answer of our own another gateway has served it: a path that is served.
        if not asked.answered:
            asked.span.update_name(f"POST {asked.path}")
            asked.span.set_attributes({"http.route": asked.path, "weft.passed_on": True})
        asked.span.end(_unix_ns(asked.zero_ns, self._clock()))

    def answered(self, model: str, endpoint: str, status: int, tenant: TenantId) -> None:
        """Say what a request was and how it ended."""
        self._metrics.answered(model, endpoint, status, tenant)
        asked = _ASKED.get()
        if asked is None:
            return
        asked.answered = True
        span = asked.span
        attributes: Attributes = {"http.response.status_code": status, "weft.tenant": tenant}
        if endpoint != UNKNOWN_ENDPOINT:
            span.update_name(f"POST {endpoint}")
            attributes["http.route"] = endpoint
        if model != UNKNOWN_MODEL:
            attributes |= {
                "gen_ai.operation.name": _OPERATIONS.get(endpoint, _OPERATION),
                "gen_ai.provider.name": "weft",
                "gen_ai.request.model": model,
                "gen_ai.usage.input_tokens": asked.input_tokens,
                "gen_ai.usage.cache_read.input_tokens": asked.cached_tokens,
                "gen_ai.usage.output_tokens": asked.output_tokens,
            }
        span.set_attributes(attributes)
        if status >= 500:
            span.set_attribute("error.type", str(status))
            span.set_status(StatusCode.ERROR)

    @property
    def clock(self) -> Callable[[], float]:
        """That of the metrics."""
        return self._metrics.clock

    def open_turn(self, model: ModelName, service_class: ServiceClass, arrived_s: float) -> Watch:
        """Pass on: tokens are counted, not traced."""
        return self._metrics.open_turn(model, service_class, arrived_s)

    # --- from the driver ----------------------------------------------------------------------------------------------

    def routed(self, seconds: float) -> None:
        """A decision took this long; `observe` is told next which."""
        self._metrics.routed(seconds)
        self._route_s = seconds

    def moved(self, node: NodeId, source: str, target: str, size_bytes: int, seconds: float) -> None:
        """Pass on."""
        self._metrics.moved(node, source, target, size_bytes, seconds)

    def refused(self, node: NodeId, calls: int) -> None:
        """Pass on."""
        self._metrics.refused(node, calls)

    def malformed(self, node: NodeId) -> None:
        """Pass on."""
        self._metrics.malformed(node)

    def follows(self, request: RequestId) -> bool:
        """Return whether a generation's spans are recorded, so that nodes are asked for their times."""
        return request in self._attempts

    def computed(self, node: NodeId, request: RequestId, began_s_ago: float) -> None:
        """A node has just computed its part of a prompt; one that only completes what another computed is not of interest."""
        attempt = self._attempts.get(request)
        if attempt is not None and attempt.routed_s is not None and node == attempt.computes:
            attempt.prefill_began_s, attempt.prefill_ended_s = self._since(attempt.routed_s[1], began_s_ago)

    def fetched(self, node: NodeId, request: RequestId, began_s_ago: float) -> None:
        """A node has just got blocks of a prompt from another."""
        attempt = self._attempts.get(request)
        if attempt is not None and attempt.routed_s is not None and node in (attempt.computes, attempt.generates):
            attempt.transfers.append((node, *self._since(attempt.routed_s[1], began_s_ago)))

    def _since(self, earliest_s: float, seconds: float) -> tuple[float, float]:
        """Return when something began that took until now; whatever a node says, no sooner than it was asked for."""
        now = self._clock()
        return min(max(earliest_s, now - seconds), now), now

    def observe(self, now: float, event: ClusterEvent, commands: Sequence[ClusterCommand]) -> None:
        """Take in what happened and what the cluster ordered for it."""
        self._metrics.observe(now, event, commands)
        arrived = isinstance(event, RequestArrived)
        if arrived:
            self._on_arrived(event.request)
        if not self._attempts:
            return
        match event:
            case NodeReported(node):
                self._on_reported(node, event.first_tokens, event.ended)
            case NodeLost(node, _):
                for attempt in self._attempts.values():
                    self._on_part_failed(attempt, node, "node_lost")
            case RequestAbandoned(request, output_tokens):
                self._over(request, output_tokens, "abandoned")
            case _:
                pass
        for command in commands:
            self._on_command(command, event, self._route_s if arrived else 0.0)

    def _on_arrived(self, request: Request) -> None:
        asked = _ASKED.get()
        if asked is not None:
            asked.input_tokens += request.prompt_tokens
            self._attempts[request.id] = _Attempt(asked, request, 1, self._clock() - self._route_s)

    def _on_command(self, command: ClusterCommand, event: ClusterEvent, route_s: float) -> None:
        match command:
            case Assign(node, assignment, why):
                attempt = self._attempts.get(request_of(assignment.request))
                if attempt is not None:
                    self._on_assigned(attempt, node, assignment.role, why, route_s)
            case Restart(request, _) | Resume(request, _):
                attempt = self._attempts.get(request)
                if attempt is not None:
                    self._start_over(attempt, "node_lost" if isinstance(event, NodeLost) else "node_failed")
            case Complete(request, ended, cached_tokens):
                self._over(request, ended.output_tokens, ended.reason.value, cached_tokens=cached_tokens)
            case Refuse() | Abort():
                self._over(command.request, 0, FinishReason.FAILED.value, error=command.code)
            case _:
                pass

    def _on_assigned(self, attempt: _Attempt, node: NodeId, role: Role, why: Scores | None, route_s: float) -> None:
        if attempt.routed_s is None:
            now = self._clock()
            attempt.routed_s, attempt.why = (max(attempt.queued_s, now - route_s), now), why
        if role is Role.GENERATE:
            attempt.generates = node
        attempt.computes = attempt.computes or node

    def _on_reported(self, node: NodeId, first_tokens: Iterable[FirstToken], ended: Iterable[Ended]) -> None:
        for first in first_tokens:
            attempt = self._attempts.get(request_of(first.request))
            if attempt is not None and attempt.generates == node:
                attempt.first_token_s = self._clock()
                if attempt.cached_tokens is None:
                    attempt.cached_tokens = max(attempt.request.prompt_tokens - first.computed_tokens, 0)
        for part in ended:
            attempt = self._attempts.get(request_of(part.request))
            if attempt is None:
                continue
            if part.reason is FinishReason.PREFILLED and attempt.computes == node:
                attempt.prefill_ended_s = attempt.prefill_ended_s or self._clock()
            elif part.reason is not FinishReason.PREFILLED and attempt.generates != node:
                self._on_part_failed(attempt, node, "node_failed")

    def _on_part_failed(self, attempt: _Attempt, node: NodeId, error: str) -> None:
        """A node that was to compute a prompt for another will not: the other does, with what it got."""
        waits = attempt.first_token_s is None and attempt.prefill_ended_s is None
        if node == attempt.computes and node != attempt.generates and attempt.routed_s is not None and waits:
            began_s = attempt.prefill_began_s or attempt.routed_s[1]
            self._tell(attempt, "prefill", began_s, self._clock(), {"weft.node": node}, error)
            attempt.computes, attempt.prefill_began_s = attempt.generates, None

    def _start_over(self, attempt: _Attempt, error: str) -> None:
        now = self._clock()
        self._tell_all(attempt, now, {}, error)
        asked, request = attempt.asked, attempt.request
        former = attempt.cached_tokens
        self._attempts[request.id] = _Attempt(asked, request, attempt.number + 1, now, cached_tokens=former)

    def _over(
        self, request: RequestId, output_tokens: int, finish: str, error: str | None = None, cached_tokens: int | None = None
    ) -> None:
        """A generation has ended."""
        attempt = self._attempts.pop(request, None)
        if attempt is None:
            return
        asked = attempt.asked
        asked.output_tokens += output_tokens
        asked.cached_tokens += (attempt.cached_tokens or 0) if cached_tokens is None else cached_tokens
        ends: Attributes = {"weft.finish": finish, "gen_ai.usage.output_tokens": output_tokens}
        self._tell_all(attempt, self._clock(), ends, error)

    # --- to OpenTelemetry ---------------------------------------------------------------------------------------------

    def _tell_all(self, attempt: _Attempt, now: float, ends: Attributes, error: str | None) -> None:
        """Record the spans of an attempt that ended now; the one that it ended in has the error."""
        if attempt.routed_s is None:
            self._tell(attempt, "queue", attempt.queued_s, now, {}, error)
            return
        deciding_s, routed_s = attempt.routed_s
        self._tell(attempt, "queue", attempt.queued_s, deciding_s)
        self._tell(attempt, "route", deciding_s, routed_s, _route_attributes(attempt.why))
        prompted_s = now if attempt.first_token_s is None else attempt.first_token_s
        ended_s = min(attempt.prefill_ended_s or prompted_s, prompted_s)
        unfinished = error if attempt.prefill_ended_s is None and attempt.first_token_s is None else None
        began_s = min(attempt.prefill_began_s or routed_s, ended_s)
        self._tell(attempt, "prefill", began_s, ended_s, {"weft.node": attempt.computes or ""}, unfinished)
        for node, fetch_began_s, fetch_ended_s in attempt.transfers:
            self._tell(attempt, "transfer", fetch_began_s, fetch_ended_s, {"weft.node": node})
        if attempt.first_token_s is not None:
            ends = {"weft.node": attempt.generates or "", **ends}
            self._tell(attempt, "decode", attempt.first_token_s, now, ends, error)

    def _tell(
        self,
        attempt: _Attempt,
        name: str,
        began_s: float,
        ended_s: float,
        more: Attributes | None = None,
        error: str | None = None,
    ) -> None:
        asked = attempt.asked
        attributes: Attributes = {"weft.generation": attempt.request.id, "weft.attempt": attempt.number, **(more or {})}
        if error is not None:
            attributes["error.type"] = error
        span = self._tracer.start_span(name, asked.context, attributes=attributes, start_time=_unix_ns(asked.zero_ns, began_s))
        if error is not None:
            span.set_status(StatusCode.ERROR)
        span.end(_unix_ns(asked.zero_ns, ended_s))


def _route_attributes(why: Scores | None) -> Attributes:
    if why is None:
        return {}
    return {
        "weft.route.policy": why.policy,
        "weft.route.candidates": why.candidates,
        "weft.route.cached_tokens": why.hit_tokens,
        "weft.route.ttft_s": why.predicted_ttft_s,
    }


def _carrier(headers: HeaderList) -> dict[str, str | list[str]]:
    """Return a request's trace context as OpenTelemetry reads it: as W3C says, more than one parent is none."""
    parents = [value.decode("latin-1") for name, value in headers if name == b"traceparent"]
    states = [value.decode("latin-1") for name, value in headers if name == b"tracestate"]
    return {"traceparent": parents[0], "tracestate": states} if len(parents) == 1 else {}


def _unix_ns(zero_ns: int, at_s: float) -> int:
    return zero_ns + round(at_s * 1e9)
