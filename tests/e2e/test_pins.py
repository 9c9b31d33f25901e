"""What is pinned stays: under a flood of twenty times the cache, and whichever process of the cluster is killed."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.core.hints import Outcome
from orchestrator.core.types import Tier
from orchestrator.harness import words
from orchestrator.harness.client import CacheClient
from orchestrator.harness.words import Residency, Result
from tests.e2e.served import Served, command_of, descendants, owner_of_port
from workers.engines.checkpoint import create_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

BLOCK_TOKENS, SEGMENT = 64, 4
#: A node's cache.
BLOCKS = 400
#: What is pinned: whole blocks, and a little more.
PINNED_TOKENS = 160 * BLOCK_TOKENS
FLOOD_TOKENS = 2000
#: Seconds within which a killed process must serve again.
HEALED_S = 60
CLUSTER = f"""
[gateway]
count = GATEWAYS
http_port = 0
grpc_port = 0
[models.default]
path = "FOLDER/model"
[store]
cpu_bytes = 16777216
cmx = "file://FOLDER/cmx"
segment_blocks = {SEGMENT}
[[pools]]
name = "all"
kind = "aggregated"
[pools.engine]
block_tokens = {BLOCK_TOKENS}
blocks = {BLOCKS}
threads = 1
[pools.profile]
step_s = 0.004
prefill_token_s = 0.0005
"""


def tokens(seed: int, count: int) -> list[int]:
    """Return a prompt that shares no block with that of another seed."""
    return Random(seed).choices(range(64, 464), k=count)


PINNED, OTHER = tokens(1, PINNED_TOKENS + 5), tokens(2, PINNED_TOKENS + 5)


class Used:
    """A cluster as its clients use it."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self._flooded = 0

    def ask(self, prompt: list[int], session: str, url: str = "") -> tuple[str, int]:
        """Return what the model says after a prompt, and how many of its tokens were not computed."""
        body = {"model": "default", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        headers = {"x-session-id": session}
        asked = httpx.post(f"{url or self.served.url}/v1/completions", json=body, headers=headers, trust_env=False, timeout=60)
        answer = asked.raise_for_status().json()
        return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    def flood(self, times: int) -> None:
        """Have so many times the cache asked for by prompts that nobody pins."""
        first = self._flooded
        self._flooded += times * BLOCKS * BLOCK_TOKENS // FLOOD_TOKENS
        with ThreadPoolExecutor(8) as threads:
            asked = [
                threads.submit(self.ask, tokens(1000 + number, FLOOD_TOKENS), f"flood {number}")
                for number in range(first, self._flooded)
            ]
        assert {one.result()[1] for one in asked} == {0}

    def until(self, holds: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until every gateway sees something in the status."""
        for url in self.served.urls:
            self.served.until(holds, HEALED_S, url)

    def until_up(self) -> None:
        """Wait until every gateway knows every other, a store and the nodes."""

        def up(status: dict[str, Any]) -> bool:
            known = status["gateways"] == len(self.served.urls) and bool(status["stores"])
            return status["ready"] and known and all(node["up"] for node in status["nodes"])

        self.until(up)

    def cache(self, url: str = "") -> CacheClient:
        """Return a client of a gateway, the first unless another is named."""
        return CacheClient(self.served.status(url)["grpc_address"])

    def pin(self, session: str, ttl_s: float = 3600.0) -> Result:
        """Pin a session's context in hbm."""
        with self.cache() as cache:
            (result,) = cache.apply(words.pin(words.session(session), ttl_s=ttl_s))
        assert (result.outcome, result.tokens) == (Outcome.APPLIED, PINNED_TOKENS), result
        return result

    def unpin(self, lease: str) -> None:
        with self.cache() as cache:
            (result,) = cache.apply(words.unpin(words.lease(lease)))
        assert result.outcome is Outcome.APPLIED, result

    def where(self, target: words.Target) -> list[Residency]:
        """Return what each gateway says of a target."""
        said: list[Residency] = []
        for url in self.served.urls:
            with self.cache(url) as cache:
                said += cache.lookup(target)
        return said

    def until_leased(self, lease: str) -> None:
        """Wait until every gateway tells of a lease."""
        ends = time.monotonic() + HEALED_S
        while not all(lease in [one.id for one in residency.leases] for residency in self.where(words.lease(lease))):
            assert time.monotonic() < ends, self.where(words.lease(lease))
            time.sleep(0.1)

    def cached(self) -> dict[str, float]:
        """Return the tokens that were not computed, by tier, over all gateways that are up."""
        found: dict[str, float] = {}
        for url in self.served.urls:
            for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", trust_env=False).text):
                for sample in family.samples:
                    if sample.name == "weft_cached_tokens_total":
                        found[sample.labels["tier"]] = found.get(sample.labels["tier"], 0.0) + sample.value
        return found

    def kill_node(self) -> None:
        """Kill the only node, and wait until the next one serves."""
        before = self.served.node("all-0")["incarnation"]
        os.kill(owner_of_port(int(self.served.node("all-0")["address"].rpartition(":")[2])), signal.SIGKILL)
        self.until(lambda status: any(node["up"] and node["incarnation"] > before for node in status["nodes"]))

    def kill(self, actor: str) -> None:
        """Kill the process of an actor class; there must be one."""
        (process,) = [pid for pid in descendants(self.served.process.pid) if f"ray::{actor}" in command_of(pid)]
        os.kill(process, signal.SIGKILL)


@pytest.fixture
def started(serve: Callable[..., Served], tmp_path: Path) -> Callable[..., Used]:
    """Starts a cluster of so many gateways."""

    def start(gateways: int) -> Used:
        sizes = {"layers": 2, "hidden": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "intermediate": 128}
        create_checkpoint(tmp_path / "model", "qwen3", 1, **sizes)
        cluster = tmp_path / "cluster.toml"
        cluster.write_text(CLUSTER.replace("FOLDER", str(tmp_path)).replace("GATEWAYS", str(gateways)))
        used = Used(serve(cluster))
        used.until_up()
        return used

    return start


def test_a_pinned_prefix_of_10k_tokens_survives_a_flood_of_20_times_the_cache(started: Callable[..., Used]) -> None:
    used = started(1)
    text, _ = used.ask(PINNED, "s")
    used.ask(OTHER, "other")
    pinned = used.pin("s")
    used.flood(20)
    (where,) = used.where(words.lease(pinned.lease))
    assert where.held_tokens(Tier.HBM) == PINNED_TOKENS
    before = used.cached()
    assert used.ask(PINNED, "s") == (text, PINNED_TOKENS)
    assert used.cached() == before | {"hbm": before.get("hbm", 0.0) + PINNED_TOKENS}
    (other,) = used.where(words.session("other"))
    assert other.held_tokens(Tier.HBM) == other.held_tokens(Tier.CPU) == 0
    used.unpin(pinned.lease)
    used.flood(3)
    (where,) = used.where(words.session("s"))
    assert where.held_tokens(Tier.HBM) == where.held_tokens(Tier.CPU) == 0
    assert used.served.stop() == 0


def test_pins_and_what_is_in_cpu_survive_whichever_process_is_killed(started: Callable[..., Used]) -> None:
    used = started(2)
    text, _ = used.ask(PINNED, "s")
    pinned = used.pin("s")
    used.until_leased(pinned.lease)
    whole = PINNED_TOKENS // BLOCK_TOKENS
    used.until(lambda status: sum(store["segments"] for store in status["stores"]) >= whole // SEGMENT)

    # The node: what it held is in cpu, and pinned there as well as in what the next one holds.
    used.kill_node()
    used.until_leased(pinned.lease)
    used.flood(2)
    before = used.cached()
    assert used.ask(PINNED, "s") == (text, PINNED_TOKENS)
    assert used.cached() == before | {"cpu": before.get("cpu", 0.0) + PINNED_TOKENS}
    used.flood(2)
    assert [one.held_tokens(Tier.HBM) for one in used.where(words.lease(pinned.lease))] == [PINNED_TOKENS] * 2

    # A gateway, and both at once: those that hold blocks tell of leases.
    for killed in (used.served.urls[:1], used.served.urls):
        for url in killed:
            os.kill(owner_of_port(int(url.rpartition(":")[2])), signal.SIGKILL)
        used.until_up()
        used.until_leased(pinned.lease)
        assert used.ask(PINNED, "s") == (text, PINNED_TOKENS)

    # The store, after the node: nobody has the prompt in memory any more, and cmx has it.
    used.kill_node()
    used.kill("StoreProcess")
    used.served.until(lambda status: not status["stores"], HEALED_S)
    used.until(lambda status: sum(store["segments"] for store in status["stores"]) >= whole // SEGMENT)
    used.until_leased(pinned.lease)
    assert used.ask(PINNED, "s") == (text, PINNED_TOKENS)

    # The controller: its successor tells a new node of leases like any other.
    used.kill("Controller")
    used.kill_node()
    used.until_leased(pinned.lease)
    used.flood(2)
    assert used.ask(PINNED, "s") == (text, PINNED_TOKENS)
    assert used.served.stop() == 0
