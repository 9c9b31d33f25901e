"""Two Ray nodes with different resources: pools, and halves of one, land where they are asked for; KV and activations cross."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.served import ROOT, NotServing, Served, owner_of_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ENGINE = """
[pools.engine]
block_tokens = 16
blocks = 512
threads = 1
"""
APART = f"""
[cluster]
name = "apart"
[router]
disaggregation_tokens_min = 1
[[pools]]
name = "prefill"
kind = "prefill"
resources = {{ left = 1 }}
transport = "ray"
{ENGINE}
[[pools]]
name = "decode"
kind = "decode"
nodes = 2
resources = {{ right = 1 }}
transport = "ray"
{ENGINE}
"""
TOGETHER = f"""
[[pools]]
name = "workers"
kind = "aggregated"
{ENGINE}
"""
#: Two attention ranks, in one group or two, of which each host has room for one: FFN ranks are beside the one and away from the
#: other.
HALVES = f"""
[cluster]
name = "halves"
[store]
cpu_bytes = 33554432
[[pools]]
name = "halves"
kind = "aggregated"
nodes = 2
cpus = 0.6
{ENGINE}
[pools.split]
attention = ATTENTION
ffn = FFN
across_hosts = true
resources = {{ right = 1 }}
"""
#: Seconds within which a group must serve again, and answers come.
HEALED_S = 180
#: Answers that are under way when a rank is lost, and tokens of each.
STREAMS, LONG_TOKENS = 8, 150
NOWHERE = APART.replace('"apart"', '"nowhere"').replace("right = 1", "lpx = 1")


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.e2e.two_hosts"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.stdin.close()
        process.wait(60)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def answers(served: Served) -> list[str]:
    """Return greedy continuations of some prompts of 5 to 700 tokens."""
    served.until(lambda status: status["ready"] and all(node["up"] for node in status["nodes"]), within_s=30)
    texts: list[str] = []
    with httpx.Client(base_url=served.url, trust_env=False, timeout=60) as client:
        for number, length in enumerate((5, 33, 160, 700, 700)):
            prompt = [64 + (number * 31 + index * 7) % 400 for index in range(length)]
            body = {"model": "default", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
            texts.append(client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"])
    return texts


def moved_bytes(served: Served) -> float:
    page = httpx.get(f"{served.url}/metrics", trust_env=False).text
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("weft_kv_moved_bytes_total{"))


def links(served: Served) -> dict[str, list[int]]:
    """Return how many FFN ranks each node reaches, by either way."""
    page = httpx.get(f"{served.url}/metrics", trust_env=False).text
    found: dict[str, list[int]] = {"shm": [], "tcp": []}
    for line in page.splitlines():
        if line.startswith("weft_afd_links{"):
            found["shm" if 'transport="shm"' in line else "tcp"].append(int(float(line.split()[-1])))
    return {way: sorted(counts) for way, counts in found.items()}


def ffn_ranks_on(raylet: int) -> list[int]:
    """Return the processes of a host that are FFN ranks."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::FfnProcess") and parent_of(int(folder.name)) == raylet:
                found.append(int(folder.name))
    return found


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("way", [pytest.param("address", marks=pytest.mark.ray), "client"])
def test_pools_land_where_they_are_asked_for_and_tokens_cross_unchanged(
    serve: Callable[..., Served], hosts: dict[str, Any], tmp_path: Path, way: str
) -> None:
    apart = serve(write(tmp_path, "apart", APART), "--address", hosts[way])
    texts = answers(apart)
    for node, side in (("prefill-0", "left"), ("decode-0", "right"), ("decode-1", "right")):
        process = owner_of_port(int(apart.node(node)["address"].rpartition(":")[2]))
        assert parent_of(process) == hosts["raylets"][side], node
    assert moved_bytes(apart) > 0
    # The name is taken for as long as it runs.
    with pytest.raises(NotServing) as caught:
        serve(tmp_path / "apart.toml", "--address", hosts[way])
    assert caught.value.code == 1
    assert caught.value.errors == 'weft: a cluster named "apart" runs there already; --attach takes it over\n'
    assert apart.stop() == 0
    together = serve(write(tmp_path, "together", TOGETHER))
    assert answers(together) == texts


def halves_of(attention: int, ffn: int) -> str:
    return HALVES.replace("ATTENTION", str(attention)).replace("FFN", str(ffn))


def stream(served: Served, number: int, begun: threading.Event) -> str:
    """Return a long greedy continuation; `begun` is set once some of it has come."""
    prompt = [64 + (number * 17 + index * 5) % 400 for index in range(40 + number)]
    body = {"model": "default", "prompt": prompt, "max_tokens": LONG_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    text = ""
    with (
        httpx.Client(trust_env=False, timeout=HEALED_S) as client,
        client.stream("POST", f"{served.url}/v1/completions", json=body) as answer,
    ):
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                begun.set()
    return text


def streams(served: Served, meanwhile: Callable[[], None] = lambda: None) -> list[str]:
    """Return continuations that are written side by side, and do something once all have begun."""
    begun = [threading.Event() for _ in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as pool:
        writing = [pool.submit(stream, served, number, begun[number]) for number in range(STREAMS)]
        for one in begun:
            assert one.wait(HEALED_S)
        meanwhile()
        return [one.result() for one in writing]


def test_a_group_of_two_hosts_writes_the_tokens_of_whole_layers_and_comes_back_whole(
    serve: Callable[..., Served], hosts: dict[str, Any], tmp_path: Path
) -> None:
    halves = serve(write(tmp_path, "halves", halves_of(2, 2)), "--address", hosts["address"])
    texts = answers(halves)
    assert links(halves) == {"shm": [0, 2], "tcp": [0, 2]}
    sides = [parent_of(owner_of_port(int(halves.node(f"halves-{node}")["address"].rpartition(":")[2]))) for node in range(2)]
    assert sorted(sides) == sorted(hosts["raylets"].values())
    assert {one["store"] for one in halves.status()["stores"]} == {"store-0", "store-1"}
    ranks = ffn_ranks_on(hosts["raylets"]["right"])
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGKILL)
    halves.until(lambda status: not any(node["up"] for node in status["nodes"]), HEALED_S)
    halves.until(lambda status: all(node["up"] for node in status["nodes"]), HEALED_S)
    assert answers(halves) == texts
    assert not set(ffn_ranks_on(hosts["raylets"]["right"])) & set(ranks)
    assert halves.stop() == 0
    together = serve(write(tmp_path, "together", TOGETHER))
    assert answers(together) == texts


def test_requests_of_a_group_that_loses_a_rank_on_another_host_go_on_in_another(
    serve: Callable[..., Served], hosts: dict[str, Any], tmp_path: Path
) -> None:
    halves = serve(write(tmp_path, "halves", halves_of(1, 1)), "--address", hosts["address"])
    halves.until(lambda status: status["ready"] and all(node["up"] for node in status["nodes"]), HEALED_S)
    assert links(halves) == {"shm": [0, 1], "tcp": [0, 1]}
    texts = streams(halves)
    ranks = ffn_ranks_on(hosts["raylets"]["right"])
    assert len(ranks) == 2
    for number, rank in enumerate(ranks, start=1):
        assert streams(halves, lambda lost=rank: os.kill(lost, signal.SIGKILL)) == texts
        halves.until(lambda status: all(node["up"] for node in status["nodes"]), HEALED_S)
        assert resumed(halves) >= number
    assert halves.stop() == 0


def resumed(served: Served) -> float:
    page = httpx.get(f"{served.url}/metrics", trust_env=False).text
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("weft_resumed_requests_total{"))


def test_what_no_node_offers_ends_with_one_clear_line(
    serve: Callable[..., Served], hosts: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(NotServing) as caught:
        serve(write(tmp_path, "nowhere", NOWHERE), "--address", hosts["address"])
    assert caught.value.code == 1
    assert caught.value.errors == (
        "weft: pool decode: 2 processes asking for {lpx: 1} each cannot be placed; "
        "the cluster offers {CPU: 2, left: 4, right: 4}\n"
    )
