"""Two Ray nodes with different resources: pools, and halves of one, land where they are asked for; KV and activations cross."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.served import ROOT, NotServing, Served, owner_of_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

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
#: Two attention ranks of which each host has room for one, with FFN ranks beside the one and away from the other.
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
attention = 2
ffn = 2
across_hosts = true
resources = {{ right = 1 }}
"""
#: Seconds within which a group must serve again.
HEALED_S = 60
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


def test_halves_on_two_hosts_write_the_tokens_of_whole_layers_and_come_back_together(
    serve: Callable[..., Served], hosts: dict[str, Any], tmp_path: Path
) -> None:
    halves = serve(write(tmp_path, "halves", HALVES), "--address", hosts["address"])
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
