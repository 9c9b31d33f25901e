"""A bounded closed-loop HTTP load client, cheap enough not to be what is measured: raw protocol, keep-alive, events counted.

One connection per concurrent client, each sending its next request when the last is answered, for a fixed time. The same
client loads every server, so that its own cost is equal; the servers' CPU is read from /proc.
"""

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import SplitResult, urlsplit

import uvloop

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
REQUEST_S_MAX = 30.0
END_OF_HEAD = b"\r\n\r\n"
END_OF_CHUNKS = b"0\r\n\r\n"
EVENT = b"data: {"
CONTENT_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Workload:
    """What each request asks for; half of a prompt's words are shared by an eighth of the prompts."""

    name: str
    prompt_words: int
    output_tokens: int
    stream: bool
    prompts: int = 256

    def bodies(self, words: Sequence[str], model: str) -> list[bytes]:
        """Return the request bodies, the same for every server."""
        chance = random.Random(11)
        half = self.prompt_words // 2
        starts = [" ".join(chance.choices(words, k=half)) for _ in range(8)]
        texts = [f"{starts[i % 8]} {' '.join(chance.choices(words, k=self.prompt_words - half))}" for i in range(self.prompts)]
        return [self._body(text, model) for text in texts]

    def _body(self, text: str, model: str) -> bytes:
        messages = [{"role": "user", "content": text}]
        body = {"model": model, "messages": messages, "max_tokens": self.output_tokens, "stream": self.stream, "ignore_eos": True}
        return json.dumps(body).encode()


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("unary1", prompt_words=32, output_tokens=1, stream=False),
        Workload("stream128", prompt_words=512, output_tokens=128, stream=True),
        Workload("long32", prompt_words=8000, output_tokens=32, stream=True, prompts=64),
    )
}


@dataclass(slots=True)
class Tally:
    """What the clients saw."""

    answered: int = 0
    failed: int = 0
    events: int = 0
    first_failure: str = ""
    ttft_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One workload at one concurrency."""

    workload: str
    concurrency: int
    seconds: float
    requests_per_s: float
    tokens_per_s: float
    events_per_request: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    server_cpu_ms_per_request: float
    server_cpu_us_per_token: float
    client_cpu_ms_per_request: float
    failed: int
    first_failure: str


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request in flight."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes) -> asyncio.Future[None]:
        """Send a request; the future ends with its answer. `status`, `events`, `first_at` and `body` then hold."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._head: bytes | None = None
        self._tail = b""
        self._left: int | None = None
        self.body = b""
        self.status = 0
        self.events = 0
        self.first_at = 0.0
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        if self._head is None:
            self._tail += data
            end = self._tail.find(END_OF_HEAD)
            if end < 0:
                return
            self._head, data, self._tail = self._tail[:end], self._tail[end + 4 :], b""
            self.status = int(self._head[9:12])
            length = CONTENT_LENGTH.search(self._head)
            self._left = int(length.group(1)) if length else None
        if self._left is not None:
            self._take_counted(data)
        elif data:
            self._take_chunked(data)

    def _take_counted(self, data: bytes) -> None:
        assert self._left is not None
        self.first_at = self.first_at or time.perf_counter()
        self._left -= len(data)
        if self.status != 200:
            self.body += data
        if self._left <= 0:
            self._done()

    def _take_chunked(self, data: bytes) -> None:
        self.first_at = self.first_at or time.perf_counter()
        window = self._tail + data
        seen = window.count(EVENT)
        self.events += seen
        last = window.rfind(EVENT)
        self._tail = window[max(last + len(EVENT) if last >= 0 else 0, len(window) - 16) :]
        if window.endswith(END_OF_CHUNKS):
            self._done()

    def _done(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionError("the server closed the connection"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def cpu_seconds(roots: Sequence[int]) -> float:
    """Return user plus system seconds of processes and all their descendants that live now."""
    used: dict[int, float] = {}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended between the listing and the reading
            continue
        used[int(entry.name)] = (int(stat[11]) + int(stat[12])) / TICKS_PER_S
        children.setdefault(int(stat[1]), []).append(int(entry.name))
    total, todo = 0.0, list(roots)
    while todo:
        process = todo.pop()
        total += used.get(process, 0.0)
        todo += children.get(process, [])
    return total


def http_requests(url: SplitResult, bodies: Iterable[bytes]) -> list[bytes]:
    """Return whole HTTP requests for the bodies."""
    head = f"POST {url.path} HTTP/1.1\r\nhost: {url.netloc}\r\ncontent-type: application/json\r\naccept: */*\r\n"
    return [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in bodies]


async def _client(url: SplitResult, requests: Sequence[bytes], start: int, until: float, tally: Tally) -> None:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, url.hostname or "", url.port or 80)
    index = start
    while (sent_at := time.perf_counter()) < until:
        try:
            await asyncio.wait_for(connection.send(requests[index % len(requests)]), REQUEST_S_MAX)
        except (OSError, TimeoutError) as error:
            tally.failed += 1
            tally.first_failure = tally.first_failure or repr(error)
            connection.close()
            _, connection = await loop.create_connection(Connection, url.hostname or "", url.port or 80)
            continue
        index += 1
        if connection.status != 200:
            tally.failed += 1
            tally.first_failure = tally.first_failure or connection.body[:200].decode("utf-8", "replace")
            continue
        tally.answered += 1
        tally.events += connection.events
        tally.ttft_s.append(connection.first_at - sent_at)
    connection.close()


async def _load(
    url: str, workload: Workload, requests: Sequence[bytes], concurrency: int, seconds: float, pids: Sequence[int]
) -> LoadResult:
    parts = urlsplit(url)
    tally = Tally()
    server, own, started = cpu_seconds(pids), time.process_time(), time.perf_counter()
    clients = [_client(parts, requests, i * 7, started + seconds, tally) for i in range(concurrency)]
    await asyncio.gather(*clients)
    took = time.perf_counter() - started
    server, own = cpu_seconds(pids) - server, time.process_time() - own
    answered = max(tally.answered, 1)
    ttft = sorted(tally.ttft_s) or [0.0]
    return LoadResult(
        workload=workload.name,
        concurrency=concurrency,
        seconds=took,
        requests_per_s=tally.answered / took,
        tokens_per_s=tally.answered * workload.output_tokens / took,
        events_per_request=tally.events / answered,
        ttft_p50_ms=ttft[len(ttft) // 2] * 1e3,
        ttft_p99_ms=ttft[int(len(ttft) * 0.99)] * 1e3,
        server_cpu_ms_per_request=server * 1e3 / answered,
        server_cpu_us_per_token=server * 1e6 / (answered * workload.output_tokens),
        client_cpu_ms_per_request=own * 1e3 / answered,
        failed=tally.failed,
        first_failure=tally.first_failure,
    )


def load(
    url: str, workload: Workload, bodies: Sequence[bytes], concurrency: int, seconds: float, pids: Sequence[int]
) -> LoadResult:
    """Load a server for some seconds and return what was seen. `pids` are the server's processes, for their CPU time."""
    requests = http_requests(urlsplit(url), bodies)
    return uvloop.run(_load(url, workload, requests, concurrency, seconds, pids))
