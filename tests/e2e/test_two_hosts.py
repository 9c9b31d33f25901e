"""Two Ray nodes with different resources: pools land where they are asked for, and KV crosses between them by Ray."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
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
