"""Two tenants with one prompt: whichever tier has it for the one, the other finds nothing, sees nothing and changes nothing."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.core.config import CostProfile, StoreConfig
from orchestrator.core.types import GatewayId, NodeId
from orchestrator.live.front import HostStore, Membership, NodePlace
from orchestrator.wire import cache_pb2
from tests.live.serving import BLOCK_TOKENS, Cluster, run
from tests.live.test_hints import LONG, POOL, B, Gateway, config_of, gateways, pin, session

NODE = NodeId("both-0")
SEGMENT = 4
#: Whole segments, and a little more.
BLOCKS = 2 * SEGMENT
PROMPT_TOKENS = BLOCKS * BLOCK_TOKENS
TIERS = {"hbm": cache_pb2.TIER_HBM, "cpu": cache_pb2.TIER_CPU, "cmx": cache_pb2.TIER_CMX}
#: Computing takes long enough for the host's memory and cmx to be worth waiting for.
SLOW = CostProfile(step_s=0.01, prefill_token_s=0.002)


def prompt(tier: str) -> list[int]:
    """Return what both tenants ask for while it is in a tier; no two tiers' prompts share a block."""
    return Random(tier).choices(range(64, 464), k=PROMPT_TOKENS + 5)


@dataclass
class Shared:
    """A cluster that two tenants use, whose node and store can be started anew."""

    served: Cluster
    gateway: Gateway
    lives: int = 1

    async def ask(self, tier: str, key: str) -> int:
        """Return how many tokens of a tier's prompt were not computed for a tenant."""
        body = {"model": "default", "prompt": prompt(tier), "max_tokens": 2, "ignore_eos": True}
        headers = {"authorization": f"Bearer {key}", "x-session-id": tier}
        answer = await self.gateway.http.post("/v1/completions", json=body, headers=headers)
        return answer.raise_for_status().json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    async def cached(self) -> dict[str, float]:
        """Return the tokens of all tenants that were not computed, by tier."""
        page = (await self.gateway.http.get("/metrics", headers={"x-api-key": "sk-a"})).text
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
        found = [one for one in samples if one.name == "weft_cached_tokens_total" and one.value]
        return {one.labels["tier"]: one.value for one in found}

    async def until_only_in(self, tier: str, name: str) -> None:
        """Wait until a session of the first tenant is believed to be whole in a tier, and in none above."""
        above = list(TIERS.values())[: list(TIERS).index(tier)]
        while True:
            holdings = (await self.gateway.lookup(session(name))).holdings
            whole = any(one.tier == TIERS[tier] and one.blocks == BLOCKS for one in holdings)
            if whole and not any(one.tier in above for one in holdings):
                return

    async def renew(self, store: bool) -> None:
        """End the node, and the store if so asked, and start them anew with nothing in memory."""
        self.lives += 1
        await self.served.kill_node(NODE)
        if store:
            assert self.served.store is not None
            await self.served.store.stop()
            await self.served.start_store()
        await self.served.start_node(NODE, self.lives)
        assert self.served.place is not None
        places = (NodePlace(NODE, POOL, self.served.addresses[NODE]),)
        stores = (HostStore(self.served.place.id, self.served.place.address),)
        await self.gateway.front.set_members(
            Membership(self.lives, places, {GatewayId(1): str(self.gateway.http.base_url)}, stores)
        )


@asynccontextmanager
async def shared(cmx: Path) -> AsyncIterator[Shared]:
    """Start a cluster with all tiers; each tier's prompt has been asked for by the first tenant."""
    config = config_of()
    pools = tuple(replace(pool, profile=SLOW) for pool in config.pools)
    store = StoreConfig(cpu_bytes=1 << 24, cmx=f"file://{cmx}", segment_blocks=SEGMENT)
    async with gateways(config=replace(config, pools=pools, store=store)) as (served, (gateway,)):
        used = Shared(served, gateway)
        for tier in TIERS:
            assert await used.ask(tier, "sk-a") == 0
        yield used


async def untouched(gateway: Gateway, name: str, lease: str) -> None:
    """Try everything on another tenant's session, blocks and lease: nothing is seen, and nothing comes of it."""
    mine = await gateway.lookup(session(name), hashes=True)
    blocks = cache_pb2.Target(blocks=cache_pb2.Blocks(hashes=mine.hashes))
    assert (await gateway.lookup(blocks)).blocks == BLOCKS
    missing, rejected = cache_pb2.OUTCOME_MISSING, cache_pb2.OUTCOME_REJECTED
    asked = cache_pb2.Target(prompt=cache_pb2.Prompt(text=LONG, model="default"))
    for target, outcome in ((session(name), missing), (cache_pb2.Target(lease=lease), missing), (blocks, rejected)):
        seen = await gateway.lookup(target, B)
        assert (seen.outcome, seen.blocks, list(seen.holdings), list(seen.leases), list(seen.hashes)) == (outcome, 0, [], [], [])
        actions = [
            pin(target),
            cache_pb2.Action(unpin=cache_pb2.Unpin(target=target)),
            cache_pb2.Action(retain=cache_pb2.Retain(target=target, priority=1)),
            cache_pb2.Action(evict=cache_pb2.Evict(target=target)),
            cache_pb2.Action(prefetch=cache_pb2.Prefetch(target=target, tier=cache_pb2.TIER_HBM)),
            cache_pb2.Action(demote=cache_pb2.Demote(target=target, tier=cache_pb2.TIER_CMX)),
            cache_pb2.Action(share=cache_pb2.Share(target=target)),
        ]
        results = await gateway.apply(*actions, key=B)
        assert [(one.outcome, one.blocks) for one in results] == [(outcome, 0)] * len(actions)
    one = cache_pb2.Session(id=name)
    others = [
        cache_pb2.Action(fork=cache_pb2.Fork(parent=one, children=["mine"])),
        cache_pb2.Action(supersede=cache_pb2.Supersede(session=one, keep_tokens=0)),
        cache_pb2.Action(tool_started=cache_pb2.ToolStarted(session=one, tool_class="bash", expected_s=1)),
        cache_pb2.Action(tool_finished=cache_pb2.ToolFinished(session=one)),
        cache_pb2.Action(end_session=cache_pb2.EndSession(session=one)),
        pin(asked, lease=lease),
    ]
    results = await gateway.apply(*others, key=B)
    assert {one.outcome for one in results} == {missing}, results
    assert (await gateway.lookup(session("mine"), B)).outcome == missing
    after = await gateway.lookup(session(name), hashes=True)
    for residency in (mine, after):
        for one in residency.leases:
            one.ClearField("ttl_s")
    assert after == mine
    assert (await gateway.lookup(cache_pb2.Target(lease=lease))).outcome == cache_pb2.OUTCOME_APPLIED


@pytest.mark.slow
def test_the_same_prompt_of_another_tenant_hits_nothing_in_any_tier(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with shared(tmp_path / "cmx") as used:
            # In cmx as well, before anything is ended.
            for tier in TIERS:
                while not any(one.tier == cache_pb2.TIER_CMX for one in (await used.gateway.lookup(session(tier))).holdings):
                    pass
            for tier, lowest in TIERS.items():
                if tier != "hbm":
                    await used.renew(store=tier == "cmx")
                await used.until_only_in(tier, tier)
                before = await used.cached()
                (leased,) = await used.gateway.apply(pin(session(tier), tier=lowest))
                assert leased.lease, leased
                await untouched(used.gateway, tier, leased.lease)
                assert await used.ask(tier, "sk-b") == 0
                assert await used.cached() == before
                assert await used.ask(tier, "sk-a") == PROMPT_TOKENS
                assert await used.cached() == before | {tier: PROMPT_TOKENS}

    run(scenario)
