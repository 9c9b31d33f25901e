"""The example of an agent that programs its cache, as it is shipped: each turn's cached tokens are what they must be."""

from dataclasses import dataclass, replace

import httpx
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.core.config import (
    CachePolicy,
    ClusterConfig,
    ClusterSettings,
    EngineConfig,
    PoolConfig,
    RouterConfig,
    SchedulerConfig,
    StoreConfig,
)
from orchestrator.core.types import CostProfile, PoolKind
from orchestrator.harness.example import Report, Script, Told, main
from orchestrator.harness.example import run as run_example
from tests.builders import SECRET
from tests.harness.overheard import Overheard, reckon
from tests.live.serving import run
from tests.live.test_hints import gateways
from workers.engines.checkpoint import default_model_path

BLOCK_TOKENS = 16
#: Short turns: a few words of the system's, of a tool's, of others'.
SCRIPT = Script(system_words=40, tool_words=12, other_words=60, answer_tokens=5, tool_s=0.01)
#: Blocks that all of it fits into, and those that the longest prompt just fits into.
ROOMY, NARROW = 1024, 144


#: What computing costs; and what it costs for a block of the host's memory to be awaited however busy this machine is.
QUICK, SLOW = CostProfile(step_s=0.002, prefill_token_s=0.0001), CostProfile(step_s=0.01, prefill_token_s=0.0005)


def cluster_of(*kinds: PoolKind, tiers: bool = False) -> ClusterConfig:
    """Return a cluster of a node of each kind; with tiers what idled longest leaves the node's memory for the host's."""
    blocks, profile, cache = (NARROW, SLOW, CachePolicy.LRU) if tiers else (ROOMY, QUICK, CachePolicy.VALUE)
    store = StoreConfig(cpu_bytes=1 << 24) if tiers else None
    engine = EngineConfig(name="profiled", block_tokens=BLOCK_TOKENS, blocks=blocks)
    scheduler = SchedulerConfig(step_tokens_max=512, sequences_max=16, cache=cache)
    pools = tuple(PoolConfig(name=kind, kind=kind, engine=engine, scheduler=scheduler, profile=profile) for kind in kinds)
    router = RouterConfig(disaggregation_tokens_min=0)
    config = ClusterConfig(pools=pools, router=router, store=store, cluster=ClusterSettings(secret=SECRET))
    return replace(config, gateway=replace(config.gateway, http_port=0, grpc_port=0))


@dataclass(frozen=True)
class Ran:
    """What the example says of itself, what went over the wire, and what the gateway says of where cached tokens came from."""

    report: Report
    overheard: Overheard
    cached_tokens: dict[str, float]


async def example(config: ClusterConfig) -> Ran:
    """Run the example against a cluster."""
    overheard = Overheard()
    async with (
        gateways(config=config) as (_, (gateway,)),
        Told(gateway.front.status()["grpc_address"]) as cache,
        httpx.AsyncClient(transport=overheard, timeout=60) as http,
    ):
        client = AsyncOpenAI(base_url=f"{gateway.http.base_url}/v1", api_key="none", http_client=http, max_retries=0)
        report = await run_example(SCRIPT, client, cache)
        page = (await gateway.http.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    tiers = {one.labels["tier"]: one.value for one in samples if one.name == "weft_cached_tokens_total" and one.value}
    return Ran(report, overheard, tiers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "tiers"),
    [
        (cluster_of(PoolKind.AGGREGATED), {"hbm"}),
        (cluster_of(PoolKind.PREFILL, PoolKind.DECODE), {"hbm", "peer"}),
        (cluster_of(PoolKind.AGGREGATED, tiers=True), {"hbm", "cpu"}),
    ],
    ids=["one node", "prefill and decode", "host memory below"],
)
def test_cached_tokens_are_right_on_every_turn(config: ClusterConfig, tiers: set[str]) -> None:
    async def scenario() -> None:
        ran = await example(config)
        exchanges = reckon(ran.overheard.exchanges, default_model_path(), BLOCK_TOKENS)
        assert [one.cached_tokens for one in exchanges if one.certain] == [one.least_tokens for one in exchanges if one.certain]
        assert [one for one in exchanges if not one.least_tokens <= one.cached_tokens <= one.most_tokens] == []
        # Only helpers that begin side by side may or may not find each other's first block.
        assert sum(not one.certain for one in exchanges) <= SCRIPT.helpers
        assert ran.cached_tokens.keys() == tiers

    run(scenario)


def test_a_cluster_that_is_not_there_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:1", "--grpc", "127.0.0.1:1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("example: 127.0.0.1:1: ")
    assert err.count("\n") == 1
