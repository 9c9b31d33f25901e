"""The cache API over real gRPC, gateways and a real node: pins that hold, tenants that see nothing of each other, watching."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from orchestrator.core.cluster.sessions import owner_of
from orchestrator.core.config import CachePolicy, ClusterConfig, ClusterSettings, TenantConfig
from orchestrator.core.types import GatewayId, NodeId, PoolName, SessionId
from orchestrator.live.front import Front, HostStore, Membership, NodePlace
from orchestrator.wire import cache_pb2, cache_pb2_grpc
from tests.builders import SECRET
from tests.live.serving import Cluster, cluster, run, together
from workers.engines.checkpoint import default_model_path, fingerprint

POOL = PoolName("both")
TENANTS = (TenantConfig("acme", ("sk-a",)), TenantConfig("globex", ("sk-b",)))
A, B = (("authorization", "Bearer sk-a"),), (("x-api-key", "sk-b"),)
#: Over the 128 blocks of 16 tokens that the node has.
FLOOD = 40


def config_of(gateways: int = 1) -> ClusterConfig:
    """Return a cluster whose node forgets what idled longest, so that a flood pushes out whatever is not leased."""
    config = together()
    pools = tuple(replace(pool, scheduler=replace(pool.scheduler, cache=CachePolicy.LRU)) for pool in config.pools)
    config = replace(config, pools=pools)
    gateway = replace(config.gateway, count=gateways, http_port=0, grpc_port=0)
    return replace(config, cluster=ClusterSettings(secret=SECRET), gateway=gateway, tenants=TENANTS)


@dataclass
class Gateway:
    """One gateway as clients have it."""

    front: Front
    http: httpx.AsyncClient
    stub: Any

    async def apply(self, *actions: cache_pb2.Action, message: str = "", key: Any = A) -> list[cache_pb2.Result]:
        request = cache_pb2.ApplyRequest(message_id=message, actions=actions)
        return list((await self.stub.Apply(request, metadata=key)).results)

    async def lookup(self, target: cache_pb2.Target, key: Any = A, hashes: bool = False) -> cache_pb2.Residency:
        request = cache_pb2.LookupRequest(targets=[target], hashes=hashes)
        return (await self.stub.Lookup(request, metadata=key)).residencies[0]

    async def turn(self, session: str, text: str, key: str = "sk-a") -> dict[str, Any]:
        """Have a session's turn served to its end; return its usage."""
        body = {"model": "default", "messages": [{"role": "user", "content": text}], "max_tokens": 2, "ignore_eos": True}
        headers = {"authorization": f"Bearer {key}", "x-session-id": session}
        answer = await self.http.post("/v1/chat/completions", json=body, headers=headers)
        return answer.raise_for_status().json()["usage"]

    async def flood(self) -> None:
        """Push out everything that may be pushed out."""
        for number in range(FLOOD):
            await self.turn(f"flood {number}", f"{number} " * 120)

    async def held(self, target: cache_pb2.Target, blocks: int) -> None:
        """Wait until so many of a target's blocks are believed to be held."""
        while True:
            holdings = (await self.lookup(target)).holdings
            if (holdings[0].blocks if holdings else 0) == blocks:
                return


def channel_to(address: str, certificates: bytes | None) -> grpc.aio.Channel:
    """Return a channel, with TLS if certificates are to be believed."""
    if certificates is None:
        return grpc.aio.insecure_channel(address)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(certificates))


@asynccontextmanager
async def gateways(
    count: int = 1, config: ClusterConfig | None = None, certificates: bytes | None = None
) -> AsyncIterator[tuple[Cluster, list[Gateway]]]:
    """Start gateways that know a node and each other; with a certificate, clients believe those given."""
    folder: Path = default_model_path()
    config = config or config_of(count)
    async with cluster(config, folder) as served, AsyncExitStack() as stack:
        names = {"default": fingerprint(folder)}
        pools = {node: PoolName(pool.name) for pool in config.pools for node in map(pool.node_id, range(pool.nodes))}
        started: list[Gateway] = []
        urls: dict[GatewayId, str] = {}
        for number in range(count):
            # The driver of `cluster` is gateway 0.
            gateway = GatewayId(number + 1)
            front = Front(config, gateway, "127.0.0.1", 0, {"default": folder}, names, pools, served.failures.append)
            urls[gateway] = (await front.start()).url
            stack.push_async_callback(front.stop)
            channel = await stack.enter_async_context(channel_to(front.status()["grpc_address"], certificates))
            believed = certificates is None or ssl.create_default_context(cadata=certificates.decode())
            http = httpx.AsyncClient(base_url=urls[gateway], trust_env=False, timeout=60, verify=believed)
            started.append(Gateway(front, await stack.enter_async_context(http), cache_pb2_grpc.CacheControlStub(channel)))
        places = tuple(NodePlace(node, pools[node], address) for node, address in served.addresses.items())
        stores = (HostStore(served.place.id, served.place.address),) if served.place is not None else ()
        for one in started:
            await one.front.set_members(Membership(1, places, urls, stores))
        for one in started:
            while (await one.http.get("/ready")).status_code != httpx.codes.OK:
                pass
        yield served, started


def session(name: str) -> cache_pb2.Target:
    return cache_pb2.Target(session=cache_pb2.Session(id=name))


def pin(target: cache_pb2.Target, **fields: Any) -> cache_pb2.Action:
    return cache_pb2.Action(pin=cache_pb2.Pin(target=target, **fields))


LONG = "Keep this in mind, for it is what all of it begins with. " * 6


@pytest.mark.slow
def test_a_pinned_context_survives_a_flood_until_it_is_unpinned() -> None:
    async def scenario() -> None:
        async with gateways() as (_, (gateway,)):
            first = await gateway.turn("s", LONG)
            (pinned,) = await gateway.apply(pin(session("s"), ttl_s=600))
            assert pinned.outcome in (cache_pb2.OUTCOME_APPLIED, cache_pb2.OUTCOME_DEFERRED)
            await gateway.held(session("s"), pinned.blocks)
            await gateway.turn("other", "Nobody asked for this to be kept. " + LONG)
            await gateway.flood()
            assert (await gateway.lookup(session("s"))).holdings[0].blocks == pinned.blocks
            assert not (await gateway.lookup(session("other"))).holdings
            again = await gateway.turn("s", LONG)
            assert again["prompt_tokens_details"]["cached_tokens"] >= pinned.tokens - 16
            assert first["prompt_tokens_details"]["cached_tokens"] == 0
            (earned,) = (await gateway.lookup(session("s"))).effects
            assert (earned.verb, earned.lease, earned.bytes) == ("pin", pinned.lease, pinned.bytes)
            assert pinned.tokens - 16 <= earned.earned_tokens == earned.found_tokens <= pinned.tokens
            assert not (await gateway.lookup(session("other"))).effects

            unpin = cache_pb2.Action(unpin=cache_pb2.Unpin(target=cache_pb2.Target(lease=pinned.lease)))
            assert (await gateway.apply(unpin))[0].outcome == cache_pb2.OUTCOME_APPLIED
            await gateway.flood()
            assert not (await gateway.lookup(session("s"))).holdings

    run(scenario)


@pytest.mark.slow
def test_a_pin_that_has_expired_keeps_nothing() -> None:
    async def scenario() -> None:
        async with gateways() as (_, (gateway,)):
            await gateway.turn("s", LONG)
            (pinned,) = await gateway.apply(pin(session("s"), ttl_s=1))
            target = cache_pb2.Target(lease=pinned.lease)
            while (await gateway.lookup(target)).outcome != cache_pb2.OUTCOME_MISSING:
                await gateway.turn("meanwhile", "Is it over?")
            # The node's clock is another one: it may be behind by what the lease took to get there.
            await gateway.flood()
            await gateway.held(session("s"), 0)

    run(scenario)


@pytest.mark.slow
def test_the_same_message_twice_is_one_lease_and_each_verb_has_an_answer() -> None:
    async def scenario() -> None:
        async with gateways() as (_, (gateway,)):
            await gateway.turn("s", LONG)
            (first,) = await gateway.apply(pin(session("s")), message="m")
            (again,) = await gateway.apply(pin(session("s")), message="m")
            assert (again.outcome, again.lease) == (cache_pb2.OUTCOME_DUPLICATE, first.lease)
            assert len((await gateway.lookup(session("s"))).leases) == 1
            one = cache_pb2.Session(id="s")
            results = await gateway.apply(
                cache_pb2.Action(retain=cache_pb2.Retain(target=session("s"), priority=80)),
                cache_pb2.Action(prefetch=cache_pb2.Prefetch(target=session("s"), tier=cache_pb2.TIER_HBM)),
                cache_pb2.Action(demote=cache_pb2.Demote(target=session("s"), tier=cache_pb2.TIER_CPU)),
                cache_pb2.Action(share=cache_pb2.Share(target=session("s"))),
                cache_pb2.Action(tool_started=cache_pb2.ToolStarted(session=one, tool_class="bash", expected_s=3)),
                cache_pb2.Action(tool_finished=cache_pb2.ToolFinished(session=one)),
                cache_pb2.Action(fork=cache_pb2.Fork(parent=one, children=["c1", "c2"])),
                cache_pb2.Action(evict=cache_pb2.Evict(target=session("s"))),
                cache_pb2.Action(supersede=cache_pb2.Supersede(session=one, keep_tokens=16)),
                cache_pb2.Action(end_session=cache_pb2.EndSession(session=one)),
                cache_pb2.Action(),
            )
            unsupported = [cache_pb2.OUTCOME_UNSUPPORTED] * 2
            rejected, applied = cache_pb2.OUTCOME_REJECTED, cache_pb2.OUTCOME_APPLIED
            done = [applied, applied, *unsupported, *[applied] * 3, rejected, rejected, applied, rejected]
            assert [one.outcome for one in results] == done
            assert [one.action_id for one in results] == [str(number) for number in range(11)]
            assert (results[7].reason, results[10].reason) == ("leased", "invalid")
            # A child has its parent's context, the parent is gone, and its lease with it.
            assert (await gateway.lookup(session("c1"))).blocks == first.blocks
            assert (await gateway.lookup(session("s"))).outcome == cache_pb2.OUTCOME_MISSING
            page = (await gateway.http.get("/metrics", headers={"x-api-key": "sk-a"})).text
            assert 'weft_hint_actions_total{action="pin",outcome="duplicate",reason=""} 1.0' in page
            assert 'weft_hint_actions_total{action="share",outcome="unsupported",reason="no_holder"} 1.0' in page
            assert 'weft_lease_bytes{tenant="acme",tier="hbm"} 0.0' in page

    run(scenario)


@pytest.mark.slow
def test_a_tenant_can_neither_see_nor_touch_what_is_anothers() -> None:
    async def scenario() -> None:
        async with gateways() as (_, (gateway,)):
            await gateway.turn("s", LONG)
            (pinned,) = await gateway.apply(pin(session("s")))
            mine = await gateway.lookup(session("s"), hashes=True)
            lease = cache_pb2.Target(lease=pinned.lease)
            blocks = cache_pb2.Target(blocks=cache_pb2.Blocks(hashes=mine.hashes))
            assert (await gateway.lookup(blocks)).blocks == pinned.blocks
            # Sessions and leases of another are missing, blocks unknown, whatever is asked.
            for target, outcome, reason in (
                (session("s"), cache_pb2.OUTCOME_MISSING, "no_session"),
                (lease, cache_pb2.OUTCOME_MISSING, "no_lease"),
                (blocks, cache_pb2.OUTCOME_REJECTED, "unknown_blocks"),
            ):
                seen = await gateway.lookup(target, B)
                assert (seen.outcome, seen.reason, seen.blocks, list(seen.holdings)) == (outcome, reason, 0, [])
                actions = (
                    pin(target),
                    cache_pb2.Action(unpin=cache_pb2.Unpin(target=target)),
                    cache_pb2.Action(evict=cache_pb2.Evict(target=target)),
                )
                assert [(one.outcome, one.reason) for one in await gateway.apply(*actions, key=B)] == [(outcome, reason)] * 3
            body = json.dumps({"model": "default", "messages": [{"role": "user", "content": LONG}]})
            prompt = cache_pb2.Target(prompt=cache_pb2.Prompt(chat_json=body))
            assert (await gateway.lookup(prompt)).holdings[0].blocks
            assert not [*(await gateway.lookup(prompt, B)).holdings, *(await gateway.lookup(prompt, B)).leases]
            move = pin(cache_pb2.Target(prompt=cache_pb2.Prompt(text=LONG * 3, model="default")), lease=pinned.lease)
            assert (await gateway.apply(move, key=B))[0].reason == "no_lease"
            forged = cache_pb2.Target(blocks=cache_pb2.Blocks(hashes=[bytes(16)]))
            assert (await gateway.apply(pin(forged)))[0].reason == "unknown_blocks"
            # The same prompt of another tenant is another prompt.
            await gateway.turn("s", LONG, "sk-b")
            theirs = await gateway.lookup(session("s"), B, hashes=True)
            assert set(theirs.hashes).isdisjoint(mine.hashes)
            assert not theirs.leases
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await gateway.lookup(session("s"), (("authorization", "Bearer nobody"),))
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED

    run(scenario)


def foreign_session(prefix: str, owner: int) -> str:
    """Return a session's name that belongs to a gateway."""
    names = (f"{prefix} {number}" for number in range(1000))
    return next(name for name in names if owner_of(SessionId(name), (GatewayId(1), GatewayId(2))) == owner)


@pytest.mark.slow
def test_any_gateway_may_be_asked_and_leases_outlive_the_one_that_placed_them() -> None:
    async def scenario() -> None:
        async with gateways(2) as (served, (first, second)):
            name = foreign_session("s", 2)
            await first.turn(name, LONG)
            (pinned,) = await first.apply(pin(session(name), ttl_s=600))
            assert pinned.outcome in (cache_pb2.OUTCOME_APPLIED, cache_pb2.OUTCOME_DEFERRED)
            assert (await first.lookup(session(name))).leases[0].lease == pinned.lease
            quote = cache_pb2.QuoteRequest(actions=[pin(session(name), ttl_s=10)])
            (price,) = (await first.stub.Quote(quote, metadata=A)).prices
            assert (price.result.blocks, price.byte_s) == (pinned.blocks, pinned.bytes * 10)
            # The other gateway hears of it from the node, and so does whoever comes later.
            lease = cache_pb2.Target(lease=pinned.lease)
            while (await first.lookup(lease)).outcome != cache_pb2.OUTCOME_APPLIED:
                pass
            await second.front.stop()
            places = tuple(NodePlace(node, POOL, address) for node, address in served.addresses.items())
            folder = default_model_path()
            names, pools = {"default": fingerprint(folder)}, {NodeId(node): POOL for node in served.addresses}
            third = Front(config_of(2), GatewayId(3), "127.0.0.1", 0, {"default": folder}, names, pools, served.failures.append)
            await third.start(Membership(1, places))
            async with grpc.aio.insecure_channel(third.status()["grpc_address"]) as channel:
                stub: Any = cache_pb2_grpc.CacheControlStub(channel)
                request = cache_pb2.LookupRequest(targets=[lease])
                while (await stub.Lookup(request, metadata=A)).residencies[0].outcome != cache_pb2.OUTCOME_APPLIED:
                    pass
            await third.stop()

    run(scenario)


@pytest.mark.slow
def test_a_watch_tells_how_things_are_and_what_becomes_of_them() -> None:
    async def scenario() -> None:
        async with gateways() as (_, (gateway,)):
            await gateway.turn("s", LONG)
            blocks = (await gateway.lookup(session("s"))).blocks
            await gateway.held(session("s"), blocks)
            events = gateway.stub.Watch(cache_pb2.WatchRequest(targets=[session("s")]), metadata=A)
            seen: list[cache_pb2.WatchEvent] = [await events.read()]
            assert seen[0].residency.holdings[0].blocks == blocks
            (pinned,) = await gateway.apply(pin(session("s")))
            placed = await events.read()
            assert (placed.lease.change, placed.lease.lease.lease) == (cache_pb2.LeaseChange.CHANGE_PLACED, pinned.lease)
            assert (await events.read()).residency.leases[0].lease == pinned.lease
            await gateway.apply(cache_pb2.Action(unpin=cache_pb2.Unpin(target=session("s"))))
            ended = await events.read()
            assert (ended.lease.change, ended.lease.reason) == (cache_pb2.LeaseChange.CHANGE_ENDED, "unpinned")
            assert not (await events.read()).residency.leases
            await gateway.apply(cache_pb2.Action(evict=cache_pb2.Evict(target=session("s"))))
            assert not (await events.read()).residency.holdings
            events.cancel()

    run(scenario)


@pytest.mark.slow
def test_a_rendered_prefix_is_what_sessions_with_it_begin_with() -> None:
    async def scenario() -> None:
        async with gateways() as (_, (gateway,)):
            system = {"role": "system", "content": LONG}
            body = json.dumps({"model": "default", "messages": [system]})
            target = cache_pb2.Target(prompt=cache_pb2.Prompt(chat_json=body))
            (pinned,) = await gateway.apply(pin(target))
            assert (pinned.outcome, pinned.reason) == (cache_pb2.OUTCOME_DEFERRED, "not_resident")
            messages = [system, {"role": "user", "content": "Hello"}]
            asked = {"model": "default", "messages": messages, "max_tokens": 2, "ignore_eos": True}
            await gateway.http.post("/v1/chat/completions", json=asked, headers={"x-api-key": "sk-a"})
            await gateway.held(target, pinned.blocks)
            await gateway.flood()
            assert (await gateway.lookup(target)).holdings[0].blocks == pinned.blocks
            half = cache_pb2.Prompt(chat_json=body, range=cache_pb2.TokenRange(end=40))
            assert (await gateway.lookup(cache_pb2.Target(prompt=half))).tokens == 32
            wrong = cache_pb2.Target(prompt=cache_pb2.Prompt(chat_json="{"))
            assert (await gateway.apply(pin(wrong)))[0].reason == "invalid"

    run(scenario)


@pytest.mark.slow
def test_messages_beyond_the_bounds_are_refused() -> None:
    async def scenario() -> None:
        async with gateways() as (_, (gateway,)):
            for request in (
                cache_pb2.ApplyRequest(actions=[pin(session("s"))] * 65),
                cache_pb2.ApplyRequest(message_id="m" * 129),
                cache_pb2.ApplyRequest(actions=[cache_pb2.Action(action_id="a" * 129)]),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await gateway.stub.Apply(request, metadata=A)
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            calls = gateway.stub.Stream(metadata=A)
            for number in range(2):
                await calls.write(cache_pb2.ApplyRequest(message_id=str(number), actions=[pin(session("s"))]))
                answer = await calls.read()
                assert (answer.message_id, answer.results[0].reason) == (str(number), "no_session")
            await calls.done_writing()

    run(scenario)


@pytest.mark.slow
def test_hints_over_quota_hold_up_nobody() -> None:
    async def scenario() -> None:
        async with gateways() as (_, (gateway,)):
            results = []
            for number in range(6):
                await gateway.turn(f"s{number}", f"{number} is its number. {LONG}")
                results += await gateway.apply(pin(session(f"s{number}")))
            reasons = [one.reason for one in results]
            # A tenant of two has half of half the node's 128 blocks.
            assert sum(one.blocks for one in results) == 32
            assert "quota_bytes" in reasons
            assert results[-1].outcome == cache_pb2.OUTCOME_REJECTED
            await asyncio.wait_for(gateway.flood(), 60)

    run(scenario)


@pytest.mark.slow
def test_requests_over_http_keep_fork_and_end_sessions_by_what_they_carry() -> None:
    async def scenario() -> None:
        async with gateways() as (_, (gateway,)):

            async def turn(name: str, text: str, headers: dict[str, str] | None = None, **body: Any) -> None:
                messages = [{"role": "user", "content": text}]
                asked = {"model": "default", "messages": messages, "max_tokens": 2, "ignore_eos": True, **body}
                named = {"x-api-key": "sk-a", "x-session-id": name, **(headers or {})}
                (await gateway.http.post("/v1/chat/completions", json=asked, headers=named)).raise_for_status()

            await turn("s", LONG, cache_control={"type": "ephemeral", "ttl": "10m"})
            (lease,) = (await gateway.lookup(session("s"))).leases
            assert (lease.session, lease.ttl_s > 500) == ("s", True)
            # The next turn moves the lease along, it does not add one.
            await turn("s", LONG + "And more of it, so that it is longer by some blocks. " * 3, prompt_cache_retention="24h")
            (moved,) = (await gateway.lookup(session("s"))).leases
            assert (moved.lease, moved.blocks > lease.blocks, moved.ttl_s > 80_000) == (lease.lease, True, True)
            await turn("child", LONG, {"x-dynamo-parent-session-id": "s"})
            await turn("s", LONG, {"x-dynamo-session-final": "true"})
            assert (await gateway.lookup(session("s"))).outcome == cache_pb2.OUTCOME_MISSING
            assert (await gateway.lookup(cache_pb2.Target(lease=lease.lease))).outcome == cache_pb2.OUTCOME_MISSING
            page = (await gateway.http.get("/metrics", headers={"x-api-key": "sk-a"})).text
            for action in ("fork", "end_session"):
                assert f'weft_hint_actions_total{{action="{action}",outcome="applied",reason=""}} 1.0' in page

    run(scenario)
