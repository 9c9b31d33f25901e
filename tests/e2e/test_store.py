"""KV outlives nodes and clusters: a killed node, a restart of everything; the same tokens, and not computed again."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.served import Served, owner_of_port

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]

BLOCK_TOKENS, SEGMENT = 16, 4
PROMPT = [64 + (index * 37) % 400 for index in range(40 * BLOCK_TOKENS + 5)]
CLUSTER = f"""
[gateway]
http_port = 0
grpc_port = 0
[store]
cpu_bytes = 67108864
cmx = "file://FOLDER"
segment_blocks = {SEGMENT}
[[pools]]
name = "all"
kind = "aggregated"
[pools.engine]
block_tokens = {BLOCK_TOKENS}
blocks = 128
threads = 1
[pools.profile]
step_s = 0.004
prefill_token_s = 0.0005
"""


def complete(served: Served) -> tuple[str, int]:
    """Return what the model says after the prompt, and how much of the prompt was not computed."""
    body = {"model": "default", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, trust_env=False, timeout=60).raise_for_status().json()
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def cached_by_tier(served: Served) -> dict[str, float]:
    page = httpx.get(f"{served.url}/metrics", trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return {one.labels["tier"]: one.value for one in samples if one.name == "weft_cached_tokens_total" and one.value}


def store_of(status: dict[str, Any]) -> dict[str, Any]:
    return next(iter(status["stores"]), {"slots": {"cached": 0}, "segments": 0})


def test_a_prompt_outlives_its_node_in_cpu_and_everything_in_cmx(serve: Callable[..., Served], tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.toml"
    cluster.write_text(CLUSTER.replace("FOLDER", str(tmp_path / "cmx")))
    served = serve(cluster)
    served.until(lambda status: status["ready"] and bool(status["stores"]), within_s=30)
    text, cached = complete(served)
    assert cached == 0
    served.until(lambda status: store_of(status)["slots"]["cached"] >= 40 and store_of(status)["segments"] >= 10, within_s=30)
    os.kill(owner_of_port(int(served.node("all-0")["address"].rpartition(":")[2])), signal.SIGKILL)
    served.until(lambda status: any(node["up"] and node["restarts"] for node in status["nodes"]), within_s=60)
    assert complete(served) == (text, 40 * BLOCK_TOKENS)
    assert cached_by_tier(served) == {"cpu": 40 * BLOCK_TOKENS}
    # What its pool has now needs no loading.
    assert complete(served) == (text, 40 * BLOCK_TOKENS)
    assert served.stop() == 0
    served = serve(cluster)
    served.until(lambda status: status["ready"] and store_of(status)["segments"] >= 10, within_s=30)
    assert complete(served) == (text, 40 * BLOCK_TOKENS)
    assert cached_by_tier(served) == {"cmx": 40 * BLOCK_TOKENS}
    assert served.stop() == 0
    assert served.log.read_text() == ""
