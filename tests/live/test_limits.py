"""A tenant's limits over two real gateways that share its sessions."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from orchestrator.core.config import ClusterConfig, ClusterSettings, TenantConfig
from orchestrator.core.types import CostProfile, GatewayId, NodeId, PoolName
from orchestrator.live.front import Front, Membership, NodePlace
from tests.builders import SECRET
from tests.live.serving import Cluster, cluster, run, together
from workers.engines.checkpoint import default_model_path, fingerprint

POOL = PoolName("both")
KEY = {"Authorization": "Bearer key"}
#: Nothing ends by itself: a step takes an hour.
ENDLESS = CostProfile(step_s=3600.0)


def limited() -> ClusterConfig:
    config = together(profile=ENDLESS)
    gateway = replace(config.gateway, count=2, http_port=0, grpc_port=0)
    tenants = (TenantConfig("t", ("key",), requests_max=5),)
    return replace(config, cluster=ClusterSettings(secret=SECRET), gateway=gateway, tenants=tenants)


async def start(stack: AsyncExitStack, config: ClusterConfig, folder: Path, served: Cluster) -> tuple[list[Front], list[str]]:
    """Start two gateways that know the node and each other."""
    names, pools = {"default": fingerprint(folder)}, {NodeId(node): POOL for node in served.addresses}
    fronts = [
        Front(config, GatewayId(number), "127.0.0.1", 0, {"default": folder}, names, pools, served.failures.append)
        for number in (0, 1)
    ]
    urls: list[str] = []
    for front in fronts:
        urls.append((await front.start()).url)
        stack.push_async_callback(front.stop)
    await tell(fronts, served, 1, {GatewayId(number): url for number, url in enumerate(urls)})
    async with httpx.AsyncClient(trust_env=False) as client:
        for url in urls:
            while (await client.get(f"{url}/ready")).status_code != httpx.codes.OK:
                pass
    return fronts, urls


async def tell(fronts: list[Front], served: Cluster, serial: int, gateways: dict[GatewayId, str]) -> None:
    places = tuple(NodePlace(node, POOL, address) for node, address in served.addresses.items())
    for front in fronts:
        await front.set_members(Membership(serial, places, gateways))


def under_way(front: Front) -> int:
    counts = front.status()["requests"]["default"]
    return counts["running"] + counts["waiting"]


@pytest.mark.slow
def test_a_limit_holds_over_two_gateways_and_is_one_gateways_alone_when_the_other_is_gone() -> None:
    async def scenario() -> None:
        folder = default_model_path()
        async with cluster(limited(), folder) as served, AsyncExitStack() as stack:
            fronts, urls = await start(stack, limited(), folder, served)
            client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=60, headers=KEY))
            ended: list[httpx.Response] = []

            async def ask(serial: int, url: str) -> None:
                body = {"model": "default", "prompt": f"{serial}", "max_tokens": 9, "ignore_eos": True}
                ended.append(await client.post(f"{url}/v1/completions", json=body, headers={"x-session-id": f"session {serial}"}))

            async def ask_until(count: int, refused: int, urls: list[str], first: int) -> None:
                """Ask with `count` sessions at once, until so many are refused; the others stay under way."""
                ended.clear()
                tasks.extend(asyncio.ensure_future(ask(first + serial, urls[serial % len(urls)])) for serial in range(count))
                while len(ended) < refused:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=0.1)
                    tasks[:] = [task for task in tasks if not task.done()]

            tasks: list[asyncio.Task[None]] = []
            await ask_until(30, 25, urls, 0)
            assert Counter(answer.status_code for answer in ended) == {429: 25}
            assert {answer.json()["error"]["code"] for answer in ended} == {"tenant_requests_max"}
            assert [under_way(front) for front in fronts] == [3, 2]

            await tell(fronts, served, 2, {GatewayId(0): urls[0]})
            await ask_until(10, 8, urls[:1], 100)
            assert under_way(fronts[0]) == 5
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario)
