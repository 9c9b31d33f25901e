"""Processes killed at random moments under many streams: all end with exactly the tokens that they would have had.

Nodes, FFN ranks, those that keep a beat, a store, and another gateway, whose own streams alone may break. ROUNDS=25 in the
environment kills so many times instead of a few.
"""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.served import Served, command_of, descendants, owner_of_port

pytestmark = [pytest.mark.slow]

STREAMS = 32
OUTPUT_TOKENS = 96
#: Pieces of the streams that began first, after which a node dies at the latest.
PIECES_MAX = STREAMS * OUTPUT_TOKENS // 4
#: Seconds within which a killed node must be back, and in which a round must be over. A group that keeps a beat is four processes
#: that load torch one after the other: 15 to 35 s where four others want each of two cores, over a minute where seven do.
HEALED_S, ROUND_S = 180.0, 120.0
ROUNDS = {"decode": 3, "prefill": 3, "aggregated": 3, "attention": 2, "ffn": 2, "beat": 2, "store": 3, "gateway": 3}
ROUNDS_ASKED = int(os.environ.get("ROUNDS", "0"))
#: Victims whose streams go on elsewhere.
RESUMED = ("decode", "aggregated", "attention", "ffn", "beat")
#: Streams that must at least have been other gateways' when one was killed.
SURVIVORS_MIN = STREAMS // 8

POOL = """
[[pools]]
name = "{name}"
kind = "{kind}"
nodes = {nodes}
[pools.engine]
block_tokens = 16
blocks = {blocks}
threads = 1
[pools.scheduler]
step_tokens_max = 512
[pools.profile]
step_s = 0.004
prefill_token_s = 0.0001
"""
#: Two groups of an attention rank, which is a node, and an FFN rank.
SPLIT = """
[pools.split]
threads = 1
"""
#: An attention rank and an FFN rank that keep a beat, long enough for a machine that has other things to do, for whoever there is
#: a slot; all others have their tokens from the decode pool.
BEAT = """
[limits]
service_class = "cadence"
[[pools]]
name = "cadence"
kind = "lpx"
[pools.engine]
block_tokens = 16
blocks = 1024
threads = 1
context_tokens_max = 1024
[pools.scheduler]
step_tokens_max = 64
sequences_max = 8
[pools.profile]
beat_s = 0.1
[pools.split]
threads = 1
imbalance_max = 0
"""
HEAD = """
[gateway]
count = {gateways}
http_port = 0
grpc_port = 0
[router]
disaggregation_tokens_min = 0
"""
#: What the nodes forget is loaded from it.
STORE = """
[store]
cpu_bytes = 268435456
"""


def pool(name: str, kind: str, nodes: int, blocks: int = 1024) -> str:
    return POOL.format(name=name, kind=kind, nodes=nodes, blocks=blocks)


ONE = HEAD.format(gateways=1)
APART = ONE + pool("prefill", "prefill", 1) + pool("decode", "decode", 2)
GROUPS = ONE + pool("attention", "aggregated", 2) + SPLIT
LAYOUTS = {
    "decode": APART,
    "prefill": APART,
    "aggregated": ONE + pool("aggregated", "aggregated", 2),
    "attention": GROUPS,
    "ffn": GROUPS,
    "beat": APART + BEAT,
    "store": ONE + STORE + pool("aggregated", "aggregated", 2, blocks=256),
    "gateway": HEAD.format(gateways=2) + pool("aggregated", "aggregated", 2),
}
#: Ways of asking; each stream has one of them.
WAYS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.8, "seed": 12, "top_p": 0.9, "frequency_penalty": 0.8, "presence_penalty": 0.5},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 1.0, "seed": 13, "n": 2},
    {"temperature": 0, "frequency_penalty": 1.0},
]
#: Streams of this way end with a text that they are known to come to.
STOPPING = 5


@dataclass(frozen=True)
class Answer:
    """What a client has of one stream, all its choices together."""

    texts: dict[int, str]
    tokens: list[str]
    finish: dict[int, str]
    usage: tuple[int, int]
    #: The number of the gateway that served it.
    gateway: str = field(compare=False)


class Pieces:
    """Counts what comes of all streams, and wakes who waits for the so-manieth, or for the first end if that comes sooner."""

    def __init__(self, wanted: int) -> None:
        self.count = 0
        self.wanted = wanted
        self.reached = asyncio.Event()

    def add(self) -> None:
        self.count += 1
        if self.count >= self.wanted:
            self.reached.set()


def body_of(number: int, stop: str | None) -> dict[str, Any]:
    source = Random(number)
    prompt = [64 + source.randrange(400) for _ in range(source.randrange(40, 400))]
    asked = {"model": "default", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, **WAYS[number % len(WAYS)]}
    asked |= {"stop": [stop]} if stop is not None else {}
    return asked | {"stream": True, "stream_options": {"include_usage": True}}


async def stream(client: httpx.AsyncClient, url: str, body: dict[str, Any], pieces: Pieces, mortal: str) -> Answer:
    """Read one stream to its end; an error in it fails the test, unless it is one of a gateway that is to be killed."""
    texts: dict[int, str] = {}
    finish: dict[int, str] = {}
    tokens: list[str] = []
    usage = (0, 0)
    session = {"x-session-id": f"stream-{sum(body['prompt'])}"}
    async with client.stream("POST", f"{url}/v1/completions", json=body, headers=session) as answer:
        assert answer.status_code == 200, await answer.aread()
        gateway = answer.headers["x-weft-gateway"]
        with contextlib.suppress(httpx.TransportError) if gateway == mortal else contextlib.nullcontext():
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[len("data: ") :])
                if "error" in event:
                    assert gateway == mortal, event
                    break
                for choice in event["choices"]:
                    pieces.add()
                    texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
                    tokens += (choice.get("logprobs") or {}).get("tokens", [])
                    if choice["finish_reason"]:
                        finish[choice["index"]] = choice["finish_reason"]
                if event.get("usage"):
                    usage = event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]
    pieces.reached.set()
    return Answer(texts, tokens, finish, usage, gateway)


async def read_all(
    url: str, bodies: list[dict[str, Any]], pieces: Pieces, at: Callable[[], object] | None = None, mortal: str = ""
) -> list[Answer]:
    """Read all streams; half of them begin when so many pieces of the others have come, and then something happens.

    Streams of the gateway whose number is `mortal` may break.
    """
    limits = httpx.Limits(max_connections=2 * STREAMS)
    async with httpx.AsyncClient(trust_env=False, timeout=ROUND_S, limits=limits) as client:
        half = STREAMS // 2
        running = [asyncio.create_task(stream(client, url, body, pieces, mortal)) for body in bodies[:half]]
        if at is not None:
            await pieces.reached.wait()
        running += [asyncio.create_task(stream(client, url, body, pieces, mortal)) for body in bodies[half:]]
        if at is not None:
            await asyncio.sleep(0)  # the later half is on its way
            at()
        return await asyncio.gather(*running)


def resumed(served: Served) -> float:
    page = httpx.get(f"{served.url}/metrics", trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return sum(one.value for one in samples if one.name == "weft_resumed_requests_total")


def process_of(served: Served, victim: str) -> int:
    """Return a process that has most to do: of a pool's nodes, or an FFN rank of such a node; the store; the other gateway."""
    if victim == "gateway":
        return owner_of_port(int(served.urls[1].rpartition(":")[2]))
    if victim == "store":
        return store_of(served)
    if victim == "beat":
        [rank] = [pid for pid in descendants(served.process.pid) if "workers.engines.beat.rank" in command_of(pid)]
        return rank
    pool = "attention" if victim == "ffn" else victim
    node = max((node for node in served.status()["nodes"] if node["pool"] == pool), key=lambda node: node["running"])
    process = owner_of_port(int(node["address"].rpartition(":")[2]))
    if victim != "ffn":
        return process
    ranks = [pid for pid in descendants(served.process.pid) if command_of(pid).startswith("ray::FfnProcess")]
    [rank] = [pid for pid in ranks if shared_memory(pid) & shared_memory(process)]
    return rank


def store_of(served: Served) -> int:
    """Return the process of the only store, 0 while there is none."""
    found = [pid for pid in descendants(served.process.pid) if command_of(pid).startswith("ray::StoreProcess")]
    return found[0] if found else 0


def shared_memory(process: int) -> set[str]:
    """Return the inodes of memory that a process shares with others."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:weft-kv" in line}


def starts(served: Served) -> dict[str, int]:
    """Return the incarnation of every node."""
    return {node["node"]: node["incarnation"] for node in served.status()["nodes"]}


def undisturbed(served: Served) -> tuple[list[dict[str, Any]], list[Answer]]:
    """Return what is to be asked, and what is answered to it where nothing happens."""
    free = asyncio.run(read_all(served.url, [body_of(number, None) for number in range(STREAMS)], Pieces(1)))
    bodies: list[dict[str, Any]] = []
    for number, answer in enumerate(free):
        text, stops = answer.texts[0], number % len(WAYS) == STOPPING
        bodies.append(body_of(number, text[len(text) * 3 // 4 :][:3] if stops else None))
    expected = asyncio.run(read_all(served.url, bodies, Pieces(1)))
    for number, answer in enumerate(expected):
        reason = "stop" if number % len(WAYS) == STOPPING else "length"
        assert set(answer.finish.values()) == {reason}, f"stream {number} ended with {answer.finish}"
    return bodies, expected


def fire(served: Served, bodies: list[dict[str, Any]], expected: list[Answer], victim: str, random: Random) -> None:
    """Let one round happen, and see that it changed nothing."""
    before, store = starts(served), store_of(served)
    mortal = "1" if victim == "gateway" else ""
    pieces = Pieces(random.randrange(1, PIECES_MAX))

    async def round_() -> list[Answer]:
        return await read_all(served.url, bodies, pieces, lambda: os.kill(process_of(served, victim), signal.SIGKILL), mortal)

    found = asyncio.run(round_())
    surviving = [number for number, answer in enumerate(found) if answer.gateway != mortal]
    assert len(surviving) >= SURVIVORS_MIN
    differing = [number for number in surviving if found[number] != expected[number]]
    told = f"after {pieces.wanted} pieces" + "".join(f": {found[one]} is not {expected[one]}" for one in differing[:1])
    assert differing == [], told
    if victim == "gateway":
        await_gateways(served)
    elif victim == "store":
        served.until(lambda status: bool(status["stores"]) and store_of(served) not in (0, store), within_s=HEALED_S)
    else:
        served.until(lambda _: sum(starts(served)[node] > before[node] for node in before) == 1, within_s=HEALED_S)
    served.until(lambda status: all(node["up"] for node in status["nodes"]), within_s=HEALED_S)


def await_gateways(served: Served) -> None:
    """Wait until each gateway serves and knows all."""
    for url in served.urls:
        served.until(lambda status: status["ready"] and status["gateways"] == len(served.urls), HEALED_S, url)


@pytest.mark.timeout(600 + 150 * ROUNDS_ASKED)
@pytest.mark.parametrize(
    "victim",
    ["decode", "prefill", "aggregated", "attention", pytest.param("ffn", marks=pytest.mark.ray), "beat", "store", "gateway"],
)
def test_no_stream_loses_or_changes_a_token_when_a_process_is_killed(
    serve: Callable[..., Served], tmp_path: Path, victim: str
) -> None:
    cluster = tmp_path / "cluster.toml"
    cluster.write_text(LAYOUTS[victim])
    served = serve(cluster)
    served.until(lambda status: status["ready"] and all(node["up"] for node in status["nodes"]), within_s=60)
    await_gateways(served)
    bodies, expected = undisturbed(served)
    random = Random(victim)
    for _ in range(ROUNDS_ASKED or ROUNDS[victim]):
        fire(served, bodies, expected, victim, random)
    assert (resumed(served) > 0) == (victim in RESUMED)
    served.until_idle(within_s=30)
