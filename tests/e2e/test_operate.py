"""A cluster that stays: up, drain, resize, rolling restart under load, changed files, killed commands, hung processes, down."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.served import command_of, owner_of_port
from tests.e2e.staying import Load, Staying

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CLUSTER = """
[cluster]
name = "staying"
hung_s = 3.0

[gateway]
count = 2
http_port = 0
grpc_port = 0

[limits]
waiting_max = 1000

[[pools]]
name = "prefill"
kind = "prefill"
nodes = 2
{common}

[[pools]]
name = "decode"
kind = "decode"
nodes = 2
{common}
"""
COMMON = """
[pools.engine]
name = "profiled"
block_tokens = 16
blocks = 4096

[pools.scheduler]
step_tokens_max = 512
sequences_max = 64

[pools.profile]
step_s = 0.005
"""


@pytest.fixture
def staying(tmp_path: Path) -> Iterator[Staying]:
    """Commands whose clusters end with the test."""
    commands = Staying(tmp_path / "state")
    yield commands
    commands.down()


def write(folder: Path, text: str = CLUSTER) -> Path:
    path = folder / "cluster.toml"
    path.write_text(text.format(common=COMMON))
    return path


def complete(url: str) -> int:
    """Return how many tokens a completion has."""
    body = {"model": "default", "prompt": [70, 71, 72] * 20, "max_tokens": 8, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, trust_env=False, timeout=60).raise_for_status()
    return answer.json()["usage"]["completion_tokens"]


def until(holds: Any, within_s: float) -> float:
    """Wait until something holds; return how long that took."""
    started = time.monotonic()
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if holds():
                return time.monotonic() - started
        assert time.monotonic() - started < within_s, "did not come about"
        time.sleep(0.1)


def test_drain_resize_and_rolling_restart_under_32_streams_cost_no_request(staying: Staying, tmp_path: Path) -> None:
    place = staying.up(write(tmp_path))
    before = {one["process"]: one["incarnation"] for one in staying.status()["processes"]}

    def operate() -> None:
        staying.weft("drain", "decode-0")
        assert staying.states()["node-decode-0"] == "drained"
        staying.weft("drain", "decode-0", "--undo")
        staying.weft("resize", "decode", "3")
        assert staying.states()["node-decode-2"] == "up"
        staying.weft("resize", "decode", "2")
        staying.weft("restart", "--all")

    load = Load(place["urls"], streams=32, tokens=48)
    asyncio.run(load.during(operate))
    assert load.failures == []
    assert load.done > 64
    after = {one["process"]: one["incarnation"] for one in staying.status()["processes"]}
    # The one that was added youngest is gone, all others are there and were started anew.
    assert sorted(after) == sorted(before)
    assert [name for name in sorted(after) if after[name] <= before[name]] == []
    assert set(staying.states().values()) == {"up"}
    assert [complete(url) for url in place["urls"]] == [8, 8]


def test_a_killed_command_leaves_the_cluster_and_down_leaves_nothing(staying: Staying, tmp_path: Path) -> None:
    path = write(tmp_path)
    place = staying.up(path)
    attached = staying.begin("serve", "--cluster", str(path), "--address", place["address"], "--attach", "--http-port", "0")
    assert attached.stdout is not None
    assert attached.stdout.readline().startswith("weft: serving")
    attached.kill()
    attached.communicate()
    assert [complete(url) for url in place["urls"]] == [8, 8]
    processes = [owner_of_port(int(url.rpartition(":")[2])) for url in place["urls"]]
    staying.weft("down")
    assert [process for process in processes if "ray::" in command_of(process)] == []
    assert "no cluster was started" in staying.weft("drain", "decode-0", code=1)


def test_a_changed_file_is_told_of_or_applied(staying: Staying, tmp_path: Path) -> None:
    path = write(tmp_path)
    place = staying.up(path)
    assert staying.up(path) == {**place, "ran": True}
    path.write_text(path.read_text().replace("waiting_max = 1000", "waiting_max = 500"))
    told = staying.weft("up", "--cluster", str(path), code=1)
    assert "limits.waiting_max 1000 -> 500" in told
    staying.up(path, "--restart")
    assert {one["process"]: one["restarts"] for one in staying.status()["processes"]} == {
        **dict.fromkeys(("node-prefill-0", "node-prefill-1", "node-decode-0", "node-decode-1"), 0),
        **dict.fromkeys(("gateway-0", "gateway-1"), 1),
    }
    path.write_text(path.read_text().replace("block_tokens = 16", "block_tokens = 32"))
    assert "a running cluster cannot change" in staying.weft("up", "--cluster", str(path), "--restart", code=1)
    assert complete(place["urls"][0]) == 8


@pytest.mark.parametrize("victim", ["node", "gateway", "controller"])
def test_what_hangs_is_replaced(staying: Staying, tmp_path: Path, victim: str) -> None:
    place = staying.up(write(tmp_path))
    url = place["urls"][0]
    if victim == "controller":
        hung = next(pid for pid in pids() if "ray::ControllerProcess" in command_of(pid))
    elif victim == "gateway":
        hung = owner_of_port(int(url.rpartition(":")[2]))
    else:
        status = httpx.get(f"{url}/status", trust_env=False).json()
        address = next(node["address"] for node in status["nodes"] if node["node"] == "decode-0")
        hung = owner_of_port(int(address.rpartition(":")[2]))
    os.kill(hung, signal.SIGSTOP)
    until(lambda: "ray::" not in command_of(hung), within_s=30)
    until(lambda: complete(url) == 8 and set(staying.states().values()) == {"up"}, within_s=60)


def pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
