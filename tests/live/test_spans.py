"""Traces: what became of a request and when, under the name that logs and journals have, in the trace that its client began."""

import asyncio
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

from orchestrator.cli.main import main
from orchestrator.core.commands import Abort, Assign, ClusterCommand, Complete, Refuse, Restart, Resume, Scores
from orchestrator.core.config import ClusterConfig, ConfigError, TraceConfig
from orchestrator.core.events import (
    Assigned,
    ClusterEvent,
    Ended,
    FirstToken,
    NodeLost,
    NodeReported,
    RequestAbandoned,
    RequestArrived,
    Resumed,
)
from orchestrator.core.types import (
    Assignment,
    FinishReason,
    GatewayId,
    Load,
    ModelName,
    NodeId,
    PoolName,
    Request,
    RequestId,
    Role,
    TenantId,
    attempt_id,
)
from orchestrator.live import spans as spans_module
from orchestrator.live.front import Front, Membership, NodePlace
from orchestrator.live.http.gateway import Gateway
from orchestrator.live.intake import Intake
from orchestrator.live.metrics import Metrics
from orchestrator.live.spans import Spans, open_spans
from orchestrator.live.tracing import traces_opener
from orchestrator.wire.journal import read_journal
from orchestrator.wire.logs import REQUEST
from tests.builders import SECRET
from tests.live.scripted import TENANTS, Script, ScriptedDriver, make_config, make_model
from tests.live.serving import cluster, run, split
from workers.engines.checkpoint import default_model_path, fingerprint

NAME = "client-7f3a"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PHASES = ("queue", "route", "prefill", "transfer", "decode")
CHAT = "/v1/chat/completions"
P, D, E = NodeId("prefill-0"), NodeId("decode-0"), NodeId("decode-1")
ONE = RequestId(1)
AGAIN = attempt_id(ONE, 1)


@dataclass
class Traced:
    """A gateway's traces on a clock that the test sets, and what was exported of them."""

    share: float = 1.0
    now: float = 0.0
    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)

    def __post_init__(self) -> None:
        provider = TracerProvider(sampler=ParentBasedTraceIdRatio(self.share), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.metrics = Metrics(GatewayId(0), 1, {P: PoolName("prefill"), D: PoolName("decode"), E: PoolName("decode")})
        self.spans = Spans(provider, self.metrics, lambda: self.now)

    def ask(self, story: Any, *headers: tuple[bytes, bytes], status: int = 200, path: str = CHAT, passed_on: bool = False) -> Any:
        """Have a request answered during which `story(self)` happens; return the scope that the gateway saw."""
        seen: dict[str, Any] = {}

        async def application(scope: Any, receive: Any, send: Any) -> None:
            seen.update(scope)
            story(self)
            if not passed_on:
                self.spans.answered("default", path, status, TenantId("acme"))

        scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
        asyncio.run(self.spans.wrap(application)(scope, None, None))
        return seen

    def at(self, now: float, event: ClusterEvent, *commands: ClusterCommand) -> None:
        self.now = now
        self.spans.observe(now, event, commands)

    def arrives(self, now: float, *commands: ClusterCommand, route_s: float = 0.25) -> None:
        self.spans.routed(route_s)
        self.at(now, RequestArrived(Request(ONE, ModelName("default"), TenantId("acme"), 40, (), 8, name=NAME)), *commands)

    @property
    def root(self) -> ReadableSpan:
        (root,) = [span for span in self.exporter.get_finished_spans() if span.name.startswith("POST")]
        return root

    @property
    def phases(self) -> list[tuple[str, float, float]]:
        """Every span within the request: its name and when it was, on the test's clock."""
        zero = self.root.start_time
        assert zero is not None
        return [
            (span.name, ((span.start_time or 0) - zero) / 1e9, ((span.end_time or 0) - zero) / 1e9)
            for span in self.exporter.get_finished_spans()
            if span is not self.root
        ]

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]


def assign(node: NodeId, role: Role = Role.GENERATE) -> Assign:
    return Assign(node, Assignment(ONE, role, 40, (), 8, name=NAME), Scores("predicted-time", 16, 0.5, candidates=3))


def both() -> tuple[Assign, Assign]:
    return assign(P, Role.PREFILL), assign(D)


def report(node: NodeId, first: int | None = None, ended: FinishReason | None = None) -> NodeReported:
    firsts = () if first is None else (FirstToken(ONE, first),)
    ends = () if ended is None else (Ended(ONE, ended, 8, 24),)
    return NodeReported(node, Load(), firsts, ends)


def complete() -> Complete:
    return Complete(ONE, Ended(ONE, FinishReason.LENGTH, 8, 24), 16, 16)


def texts(spans: Sequence[ReadableSpan]) -> str:
    return " ".join(span.to_json() for span in spans)


# --- what became of a request, on a clock of the test's -----------------------------------------------------------------


def test_a_request_has_its_phases_when_gateway_and_nodes_say_they_were() -> None:
    traced = Traced()

    def story(traced: Traced) -> None:
        traced.arrives(1.0, *both())
        assert traced.spans.follows(ONE)
        traced.now = 3.0
        traced.spans.computed(P, ONE, 1.5)  # it waited on its node for half a second
        traced.at(3.0, report(P, ended=FinishReason.PREFILLED))
        traced.now = 3.5
        traced.spans.fetched(D, ONE, 1.0)
        traced.now = 4.0
        traced.spans.computed(D, ONE, 0.25)  # the prompt's last token, once more
        traced.at(4.0, report(D, first=24))
        traced.at(6.0, report(D, ended=FinishReason.LENGTH), complete())

    traced.ask(story, (b"x-request-id", NAME.encode()))
    assert traced.phases == [
        ("queue", 0.75, 0.75),
        ("route", 0.75, 1.0),
        ("prefill", 1.5, 3.0),
        ("transfer", 2.5, 3.5),
        ("decode", 4.0, 6.0),
    ]
    root, whole = traced.root, traced.exporter.get_finished_spans()
    assert {span.parent.span_id for span in whole if span.parent is not None} == {root.context.span_id}
    assert dict(root.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "weft",
        "gen_ai.request.model": "default",
        "gen_ai.usage.input_tokens": 40,
        "gen_ai.usage.cache_read.input_tokens": 16,
        "gen_ai.usage.output_tokens": 8,
        "weft.request.id": NAME,
        "weft.tenant": "acme",
    }
    assert root.name == f"POST {CHAT}"
    nodes = {span.name: (span.attributes or {}).get("weft.node") for span in whole}
    assert (nodes["prefill"], nodes["transfer"], nodes["decode"]) == (P, D, D)
    assert not traced.spans.follows(ONE)


def test_a_request_that_waits_for_room_is_in_the_queue_until_it_is_routed() -> None:
    traced = Traced()

    def story(traced: Traced) -> None:
        traced.arrives(1.0)
        traced.at(5.0, report(E), assign(D))
        traced.at(6.0, report(D, first=40))
        traced.at(7.0, report(D, ended=FinishReason.STOP), complete())

    traced.ask(story)
    assert traced.phases == [("queue", 0.75, 5.0), ("route", 5.0, 5.0), ("prefill", 5.0, 6.0), ("decode", 6.0, 7.0)]


def test_a_request_whose_node_dies_shows_both_attempts() -> None:
    traced = Traced()

    def story(traced: Traced) -> None:
        traced.arrives(1.0, *both())
        traced.at(2.0, NodeLost(D, "killed"), Restart(ONE, "killed: a text of the node's"), assign(E))
        traced.at(3.0, report(E, first=24))
        traced.at(4.0, report(E, ended=FinishReason.LENGTH), complete())

    traced.ask(story)
    assert traced.phases == [
        *[("queue", 0.75, 0.75), ("route", 0.75, 1.0), ("prefill", 1.0, 2.0)],
        *[("queue", 2.0, 2.0), ("route", 2.0, 2.0), ("prefill", 2.0, 3.0), ("decode", 3.0, 4.0)],
    ]
    first, second = traced.named("prefill")
    assert ((first.attributes or {})["weft.attempt"], (second.attributes or {})["weft.attempt"]) == (1, 2)
    assert (first.attributes or {})["error.type"] == "node_lost"
    assert "error.type" not in (second.attributes or {})
    assert (second.attributes or {})["weft.node"] == E
    assert "a text of the node's" not in texts(traced.exporter.get_finished_spans())


def test_a_request_that_goes_on_elsewhere_shows_both_attempts_and_what_the_first_found() -> None:
    traced = Traced()

    def story(traced: Traced) -> None:
        traced.arrives(1.0, assign(D))
        traced.at(2.0, report(D, first=24))
        traced.at(3.0, NodeLost(D, "killed"), Resume(ONE, "killed"))
        traced.at(3.0, Resumed(ONE, 5, ()), replace(assign(E), assignment=replace(assign(E).assignment, request=AGAIN)))
        traced.at(4.0, NodeReported(E, Load(), (FirstToken(AGAIN, 40),)))
        traced.at(5.0, RequestAbandoned(ONE, 9))

    traced.ask(story)
    assert [phase for phase, _, _ in traced.phases] == ["queue", "route", "prefill", "decode"] * 2
    lost, on = traced.named("decode")
    assert ((lost.attributes or {})["weft.node"], (on.attributes or {})["weft.node"]) == (D, E)
    assert ((lost.attributes or {})["weft.attempt"], (on.attributes or {})["weft.attempt"]) == (1, 2)
    assert (lost.attributes or {})["error.type"] == "node_lost"
    assert "error.type" not in (on.attributes or {})
    [whole] = [span for span in traced.exporter.get_finished_spans() if span.parent is None]
    assert (whole.attributes or {})["gen_ai.usage.cache_read.input_tokens"] == 16


@pytest.mark.parametrize("dies", [True, False])
def test_a_prefill_that_fails_is_shown_and_done_by_the_node_that_generates(dies: bool) -> None:
    traced = Traced()

    def story(traced: Traced) -> None:
        traced.arrives(1.0, *both())
        traced.at(2.0, NodeLost(P, "killed") if dies else report(P, ended=FinishReason.FAILED))
        traced.now = 4.0
        traced.spans.computed(D, ONE, 1.5)
        traced.at(4.0, report(D, first=40))
        traced.at(5.0, report(D, ended=FinishReason.LENGTH), complete())

    traced.ask(story)
    assert [one for one in traced.phases if one[0] == "prefill"] == [("prefill", 1.0, 2.0), ("prefill", 2.5, 4.0)]
    failed, done = traced.named("prefill")
    assert (failed.attributes or {})["error.type"] == ("node_lost" if dies else "node_failed")
    assert (done.attributes or {})["weft.node"] == D


@pytest.mark.parametrize(
    ("ends", "phases", "error"),
    [
        ([Refuse(ONE, 503, "no_room", "held too long")], ["queue"], "no_room"),
        ([assign(D), Abort(ONE, 504, "deadline_exceeded", "too late")], ["queue", "route", "prefill"], "deadline_exceeded"),
    ],
)
def test_a_request_that_is_ended_says_in_which_phase_and_why(ends: list[ClusterCommand], phases: list[str], error: str) -> None:
    traced = Traced()

    def story(traced: Traced) -> None:
        traced.arrives(1.0)
        for moment, command in enumerate(ends):
            traced.at(2.0 + moment, report(E), command)

    traced.ask(story, status=503)
    assert [name for name, _, _ in traced.phases] == phases
    errors = [(span.name, (span.attributes or {}).get("error.type")) for span in traced.exporter.get_finished_spans()]
    assert [one for one in errors if one[1]] == [(phases[-1], error), (f"POST {CHAT}", "503")]


def test_what_a_client_gave_up_ends_there_with_the_tokens_that_came() -> None:
    traced = Traced()

    def story(traced: Traced) -> None:
        traced.arrives(1.0, assign(D))
        traced.at(2.0, report(D, first=24))
        traced.at(3.0, RequestAbandoned(ONE, 5))
        traced.at(9.0, report(D, ended=FinishReason.LENGTH))

    traced.ask(story)
    assert traced.phases[-1] == ("decode", 2.0, 3.0)
    tokens = [(traced.root.attributes or {})[f"gen_ai.usage.{name}_tokens"] for name in ("input", "cache_read.input", "output")]
    assert tokens == [40, 16, 5]


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -5.0, 1e300])
def test_whatever_a_node_says_of_its_times_stays_within_what_the_gateway_knows(seconds: float) -> None:
    traced = Traced()

    def story(traced: Traced) -> None:
        traced.arrives(1.0, *both())
        traced.now = 2.0
        traced.spans.computed(P, ONE, seconds)
        traced.spans.fetched(D, ONE, seconds)
        traced.at(2.0, report(D, first=24))
        traced.at(3.0, report(D, ended=FinishReason.LENGTH), complete())

    traced.ask(story)
    within = [1.0 <= begin <= end <= 2.0 for name, begin, end in traced.phases if name in ("prefill", "transfer")]
    assert within == [True, True]


# --- traces that others began -------------------------------------------------------------------------------------------


def nothing(traced: Traced) -> None:
    """Say that nothing more happens to a request."""


def header(value: str) -> tuple[bytes, bytes]:
    return b"traceparent", value.encode()


def test_a_trace_that_the_client_began_goes_on_whatever_the_share() -> None:
    traced = Traced(share=0.0)
    scope = traced.ask(nothing, header(f"00-{TRACE}-{PARENT}-01"), (b"tracestate", b"vendor=1"))
    root = traced.root
    assert root.parent is not None
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)
    # Who the request is passed on to continues from here.
    passed = dict(scope["headers"])
    assert passed[b"traceparent"].decode() == f"00-{TRACE}-{root.context.span_id:016x}-01"
    assert passed[b"tracestate"] == b"vendor=1"


@pytest.mark.parametrize("given", [[header(f"00-{TRACE}-{PARENT}-00")], []])
def test_what_is_not_sampled_is_not_traced_here_nor_where_it_is_passed_on_to(given: list[tuple[bytes, bytes]]) -> None:
    traced = Traced(share=1.0 if given else 0.0)
    followed: list[bool] = []

    def story(traced: Traced) -> None:
        traced.arrives(1.0, assign(D))
        followed.append(traced.spans.follows(ONE))

    scope = traced.ask(story, *given)
    assert followed == [False]
    assert traced.exporter.get_finished_spans() == ()
    flags = dict(scope["headers"])[b"traceparent"].rpartition(b"-")[2]
    assert not int(flags, 16) & 1
    # It is counted all the same.
    assert traced.metrics.flight(ONE) is not None
    assert b'weft_requests_total{endpoint="/v1/chat/completions"' in traced.metrics.render()


@pytest.mark.parametrize(
    "given",
    [
        [header(f"00-{'0' * 32}-{PARENT}-01")],
        [header(f"00-{TRACE}-{'0' * 16}-01")],
        [header(f"ff-{TRACE}-{PARENT}-01")],
        [header(f"00-{TRACE}-{PARENT}-01-more")],
        [header(f"00-{TRACE.upper()}-{PARENT}-01")],
        [header(f"00-{TRACE[1:]}-{PARENT}-01")],
        [header("")],
        [(b"traceparent", b"\xff\xfe\x00")],
        [header(f"00-{TRACE}-{PARENT}-01"), header(f"00-{TRACE}-{PARENT}-01")],
    ],
)
def test_a_malformed_parent_is_as_none(given: list[tuple[bytes, bytes]]) -> None:
    traced = Traced()
    traced.ask(nothing, *given, (b"tracestate", b"vendor=1"))
    assert traced.root.parent is None
    assert f"{traced.root.context.trace_id:032x}" != TRACE


def test_what_another_gateway_answers_is_named_by_its_path() -> None:
    traced = Traced()
    scope = traced.ask(nothing, passed_on=True)
    root = traced.root
    attributes = root.attributes or {}
    assert (root.name, attributes["weft.passed_on"]) == (f"POST {CHAT}", True)
    # Both gateways call it by one name.
    assert dict(scope["headers"])[b"x-request-id"].decode() == attributes["weft.request.id"]


def test_only_posts_have_spans() -> None:
    traced = Traced()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        assert scope["headers"] == []

    for scope in ({"type": "http", "method": "GET", "path": "/metrics", "headers": []}, {"type": "lifespan", "headers": []}):
        asyncio.run(traced.spans.wrap(application)(scope, None, None))
    assert traced.exporter.get_finished_spans() == ()


# --- over HTTP ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_that_a_client_wrote_gets_into_a_span(tmp_path: Path) -> None:
    traced = Traced()

    async def scenario() -> None:
        driver = ScriptedDriver(make_model(tmp_path), lambda turn: Script(("an answer",)))
        told = traced.spans
        config = make_config(TENANTS)
        intake = Intake(config, {ModelName("tiny"): driver.text}, b"s")
        gateway = Gateway(config, GatewayId(0), intake, driver, told, lambda: b"", dict, None, told.wrap)
        port = await gateway.start("127.0.0.1", 0)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "sesame"}], "user": "sesame"}
            key = {"authorization": "Bearer sk-good", "x-request-id": NAME, "x-session-id": "sesame"}
            answer = await client.post(CHAT, json=body, headers=key)
            assert answer.headers["x-request-id"] == NAME
            await client.post(CHAT, json=body | {"model": "sesame"}, headers=key)
            await client.post(CHAT, json=body | {"messages": "sesame"}, headers=key)
            await client.post(CHAT, json=body, headers={"authorization": "Bearer sesame"})
            await client.post("/v1/sesame", json=body, headers=key)
        await gateway.stop()

    run(scenario)
    whole = traced.exporter.get_finished_spans()
    found = sorted((span.name, (span.attributes or {})["http.response.status_code"]) for span in whole)
    assert found == [("POST", 404), *[(f"POST {CHAT}", status) for status in (200, 400, 401, 404)]]
    assert not re.search("sesame|sk-good|an answer", texts(whole))


@pytest.mark.slow
def test_a_requests_name_leads_from_logs_and_journals_to_its_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(spans_module, "OTLPSpanExporter", lambda *_, **__: exporter)
    config = split()
    config = replace(
        config,
        cluster=replace(config.cluster, journal=str(tmp_path), secret=SECRET),
        gateway=replace(config.gateway, http_port=0, grpc_port=0),
        trace=TraceConfig("http://nowhere"),
    )

    async def scenario() -> None:
        async with cluster(config, default_model_path()) as served:
            url, front = await open_front(config, served)
            body = {"model": "default", "prompt": list(range(200)), "max_tokens": 5, "ignore_eos": True}
            headers = {"x-request-id": NAME, "traceparent": f"00-{TRACE}-{PARENT}-01"}
            async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
                (await client.post("/v1/completions", json=body, headers=headers)).raise_for_status()
            await served.idle()
            await front.stop()

    with caplog.at_level(logging.DEBUG, "weft"):
        run(scenario)
    about = [record for record in caplog.records if vars(record).get(REQUEST) == NAME]
    assert {record.name for record in about} == {"weft.gateway", "weft.driver", "weft.node"}
    assert {vars(record)["node"] for record in about if record.name == "weft.node"} == {P, D}
    numbers = {vars(record)["number"] for record in about if record.name == "weft.node"}
    assert names_in(tmp_path) == {"gateway": {NAME}, "node-prefill-0": {NAME}, "node-decode-0": {NAME}}

    whole = exporter.get_finished_spans()
    (root,) = (span for span in whole if span.name == "POST /v1/completions")
    assert (root.attributes or {})["weft.request.id"] == NAME
    assert {f"{span.context.trace_id:032x}" for span in whole} == {TRACE}
    found = {span.name: span for span in whole if span is not root}
    assert sorted(found) == sorted(PHASES)
    assert len(whole) == 1 + len(PHASES)
    assert {(span.attributes or {})["weft.generation"] for span in found.values()} == numbers
    # Nested, and in order.
    starts = [found[name].start_time or 0 for name in PHASES]
    ends = [found[name].end_time or 0 for name in PHASES]
    assert starts == sorted(starts)
    assert ends == sorted(ends)
    assert (root.start_time or 0) <= starts[0]
    assert ends[-1] <= (root.end_time or 0)
    assert (root.attributes or {})["gen_ai.usage.output_tokens"] == 5


async def open_front(config: ClusterConfig, served: Any) -> tuple[str, Front]:
    """Serve a gateway on a cluster's nodes; return its URL once it is ready, and itself."""
    folder = default_model_path()
    pools = {node: PoolName(node.rsplit("-", 1)[0]) for node in served.servers}
    names = {"default": fingerprint(folder)}
    front = Front(config, GatewayId(1), "127.0.0.1", 0, {"default": folder}, names, pools, served.failures.append)
    places = tuple(NodePlace(node, pools[node], address) for node, address in served.addresses.items())
    address = await front.start(Membership(1, places))
    async with httpx.AsyncClient(base_url=address.url, trust_env=False) as client:
        while (await client.get("/ready")).status_code != httpx.codes.OK:
            pass
    return address.url, front


def names_in(folder: Path) -> dict[str, set[str]]:
    """Return the names of requests in each process's journal."""
    found: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.journal.gz")):
        for entry in read_journal(path).entries:
            match entry.event:
                case RequestArrived(request):
                    found.setdefault("gateway", set()).add(request.name)
                case Assigned(assignment):
                    found.setdefault(path.name.rsplit("-", 1)[0], set()).add(assignment.name)
                case _:
                    pass
    return found


# --- the collector ------------------------------------------------------------------------------------------------------


class Collector(BaseHTTPRequestHandler):
    """Takes OTLP over HTTP."""

    taken: ClassVar[list[tuple[str, ExportTraceServiceRequest]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.taken.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_collector_gets_spans_by_service_and_gateway(slash: str) -> None:
    Collector.taken.clear()
    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005})
    thread.start()
    traced = Traced()
    config = TraceConfig(f"http://127.0.0.1:{server.server_port}{slash}", service="agents")
    traced.spans = open_spans(config, GatewayId(3), traced.metrics)
    traced.ask(nothing)
    traced.spans.close()
    server.shutdown()
    thread.join()
    server.server_close()
    ((path, taken),) = Collector.taken
    assert path == "/v1/traces"
    (of_gateway,) = taken.resource_spans
    resource = {one.key: one.value.string_value for one in of_gateway.resource.attributes}
    assert (resource["service.name"], resource["service.instance.id"]) == ("agents", "gateway-3")
    assert [span.name for span in of_gateway.scope_spans[0].spans] == [f"POST {CHAT}"]


def test_a_collector_that_is_not_there_costs_the_spans_and_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans_module, "EXPORT_S_MAX", 0.05)
    traced = Traced()
    with socket.socket() as nobody, caplog.at_level(logging.WARNING, "weft"):
        nobody.bind(("127.0.0.1", 0))
        config = TraceConfig(f"http://127.0.0.1:{nobody.getsockname()[1]}")
        traced.spans = open_spans(config, GatewayId(0), traced.metrics)
        traced.ask(lambda traced: traced.arrives(1.0, assign(D)))
        traced.spans.close()
    assert "Failed to export" in caplog.text


# --- without OpenTelemetry ----------------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have OpenTelemetry's SDK not installed."""
    monkeypatch.delitem(sys.modules, "orchestrator.live.spans")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)


@pytest.mark.usefixtures("bare")
def test_traces_without_the_extra_are_refused_with_what_to_install() -> None:
    assert traces_opener(TraceConfig()) is None
    with pytest.raises(ConfigError, match=r"^trace.endpoint: traces need opentelemetry\S+, which is not .* 'weft\[otel\]'$"):
        traces_opener(TraceConfig("http://collector:4318"))


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("verb", ["serve", "up"])
def test_a_cluster_file_that_asks_for_them_is_refused_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    path = tmp_path / "traced.toml"
    path.write_text("[[pools]]\nname = 'a'\nkind = 'decode'\n[trace]\nendpoint = 'http://collector:4318'\n")
    assert main([verb, "--cluster", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"weft: {path}:5: trace.endpoint: traces need opentelemetry")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_all_else_runs_without_the_extra() -> None:
    program = "import sys; sys.modules['opentelemetry.sdk'] = None; import orchestrator.cli.main, orchestrator.fleet.actors"
    subprocess.run([sys.executable, "-c", program], check=True)
