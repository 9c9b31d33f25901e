"""Prefetches into `hbm` over real gRPC: what a tenant has brought back is in a node's own memory when its next turn comes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.core.config import ClusterConfig, StoreConfig
from orchestrator.core.types import NodeId
from orchestrator.wire import cache_pb2
from tests.live.serving import Cluster, run
from tests.live.test_hints import LONG, B, Gateway, config_of, gateways, session
from tests.live.test_isolation import SEGMENT, SLOW

HBM, CPU, CMX = cache_pb2.TIER_HBM, cache_pb2.TIER_CPU, cache_pb2.TIER_CMX


def config(nodes: int = 1, store: StoreConfig | None = None) -> ClusterConfig:
    """Return a cluster whose nodes take their time to compute prompts."""
    made = config_of()
    pools = tuple(replace(pool, nodes=nodes, profile=SLOW) for pool in made.pools)
    return replace(made, pools=pools, store=store)


def prefetch(name: str, deadline_s: float = 30.0) -> cache_pb2.Action:
    wanted = cache_pb2.Prefetch(target=session(name), tier=HBM)
    return cache_pb2.Action(prefetch=wanted, deadline_s=deadline_s)


def evict(name: str, tier: int) -> cache_pb2.Action:
    return cache_pb2.Action(evict=cache_pb2.Evict(target=session(name), tier=tier))  # type: ignore[arg-type]


async def until(gateway: Gateway, name: str, done: Callable[[dict[int, int]], bool]) -> None:
    """Wait until as many of a session's blocks as are wanted are believed to be in each tier."""
    while not done({one.tier: one.blocks for one in (await gateway.lookup(session(name))).holdings}):
        pass


async def sampled(gateway: Gateway, name: str, **labels: str) -> float:
    """Return a metric's value, 0 if it has none yet."""
    page = (await gateway.http.get("/metrics", headers={"x-api-key": "sk-a"})).text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples if sample.name == name]
    return sum(one.value for one in samples if all(one.labels.get(key) == value for key, value in labels.items()))


async def found_in_hbm(gateway: Gateway, name: str, text: str) -> int:
    """Have a session's turn served, of which nothing may come from below; return its tokens that were in hbm."""
    tiers = [await sampled(gateway, "weft_cached_tokens_total", tier=tier) for tier in ("hbm", "cpu", "cmx", "peer")]
    usage = await gateway.turn(name, text)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    after = [await sampled(gateway, "weft_cached_tokens_total", tier=tier) for tier in ("hbm", "cpu", "cmx", "peer")]
    assert after == [tiers[0] + cached, *tiers[1:]]
    return cached


@pytest.mark.slow
@pytest.mark.parametrize("below", [(HBM,), (HBM, CPU)], ids=["from cpu", "from cmx"])
def test_what_was_brought_back_is_found_in_hbm_by_the_next_turn(tmp_path: Path, below: tuple[int, ...]) -> None:
    async def scenario() -> None:
        store = StoreConfig(cpu_bytes=1 << 24, cmx=f"file://{tmp_path}", segment_blocks=SEGMENT)
        async with gateways(config=config(store=store)) as (_, (gateway,)):
            await gateway.turn("s", LONG)
            blocks = (await gateway.lookup(session("s"))).blocks
            whole = blocks // SEGMENT * SEGMENT
            await until(gateway, "s", lambda held: held.get(CPU, 0) >= blocks and held.get(CMX, 0) >= whole)
            for tier in below:
                await gateway.apply(evict("s", tier))
                await until(gateway, "s", lambda held, tier=tier: tier not in held)

            (asked,) = await gateway.apply(prefetch("s"))
            brought = blocks if below == (HBM,) else whole
            assert (asked.outcome, asked.reason, asked.blocks) == (cache_pb2.OUTCOME_DEFERRED, "not_resident", brought), asked
            assert (asked.tier, asked.ttl_s) == (HBM, 30.0)
            await until(gateway, "s", lambda held: held.get(HBM, 0) == brought)
            # Of another tenant's session nothing can be had, nor of its blocks.
            mine = await gateway.lookup(session("s"), hashes=True)
            theirs = cache_pb2.Target(blocks=cache_pb2.Blocks(hashes=mine.hashes))
            results = await gateway.apply(
                prefetch("s"), cache_pb2.Action(prefetch=cache_pb2.Prefetch(target=theirs, tier=HBM)), key=B
            )
            assert [one.reason for one in results] == ["no_session", "unknown_blocks"]

            cached = await found_in_hbm(gateway, "s", LONG)
            assert cached >= (brought - 1) * 16
            (effect,) = [one for one in (await gateway.lookup(session("s"))).effects if one.verb == "prefetch"]
            assert (effect.bytes, effect.ended) == (asked.bytes, "used")
            assert effect.earned_tokens == cached // 16 * 16
            assert await sampled(gateway, "weft_prefetches_ended_total", reason="used") == 1
            assert await sampled(gateway, "weft_node_prefetch_blocks_total", event="brought") == brought
            assert await sampled(gateway, "weft_node_prefetch_blocks_total", event="used") >= brought - 1

    run(scenario)


@pytest.mark.slow
def test_what_a_node_holds_that_leaves_is_brought_to_another_one() -> None:
    async def scenario() -> None:
        async with gateways(config=config(nodes=2)) as (served, (gateway,)):
            await gateway.turn("s", LONG)
            (held,) = (await gateway.lookup(session("s"))).holdings
            leaving = NodeId(held.holder)
            assert (await gateway.apply(prefetch("s")))[0].outcome == cache_pb2.OUTCOME_APPLIED  # it is where it would be
            await drained(served, leaving)
            while (asked := (await gateway.apply(prefetch("s")))[0]).outcome == cache_pb2.OUTCOME_APPLIED:
                pass
            assert (asked.outcome, asked.blocks) == (cache_pb2.OUTCOME_DEFERRED, held.blocks), asked
            while len((await gateway.lookup(session("s"))).holdings) < 2:
                pass
            assert await found_in_hbm(gateway, "s", LONG) >= (held.blocks - 1) * 16

    run(scenario)


@pytest.mark.slow
def test_it_is_given_up_when_its_blocks_are_evicted_and_when_its_time_is_over() -> None:
    async def scenario() -> None:
        store = StoreConfig(cpu_bytes=1 << 24)
        async with gateways(config=config(store=store)) as (_, (gateway,)):
            await gateway.turn("s", LONG)
            blocks = (await gateway.lookup(session("s"))).blocks
            await until(gateway, "s", lambda held: held.get(CPU, 0) >= blocks)
            for ended, deadline_s in (("cancelled", 30.0), ("lapsed", 0.2)):
                await gateway.apply(evict("s", HBM))
                await until(gateway, "s", lambda held: HBM not in held)
                (asked,) = await gateway.apply(prefetch("s", deadline_s))
                assert asked.outcome == cache_pb2.OUTCOME_DEFERRED, asked
                if ended == "cancelled":
                    await until(gateway, "s", lambda held: held.get(HBM, 0) == blocks)
                    await gateway.apply(evict("s", HBM))
                while await sampled(gateway, "weft_prefetches_ended_total", reason=ended) < 1:
                    pass
            assert await sampled(gateway, "weft_kv_prefetched_blocks") == 0

    run(scenario)


async def drained(served: Cluster, node: NodeId) -> None:
    """Let a node tell gateways that it takes nothing new."""
    await served.servers[node].drivers[node].drain()
