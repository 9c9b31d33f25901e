"""A cluster under fire: killed processes, cancelled streams, drains. Real Ray, real engines, the default cluster."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import openai
import pytest

from orchestrator.cli.cluster_file import LOCAL_CLUSTER
from tests.e2e.served import NotServing, Served, command_of, descendants, owner_of_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

#: Seconds within which a killed process must serve again.
HEALED_S = 15.0


@asynccontextmanager
async def client_of(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    limits = httpx.Limits(max_connections=512)
    async with (
        httpx.AsyncClient(trust_env=False, limits=limits, timeout=60) as http,
        openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, http_client=http) as client,
    ):
        yield client


async def complete(client: openai.AsyncOpenAI, prompt: list[int], tokens: int) -> tuple[str, int]:
    """Stream a completion. Returns its text and the tokens it is said to have."""
    options = {"include_usage": True}
    stream = await client.completions.create(
        model="default", prompt=prompt, max_tokens=tokens, temperature=0, stream=True, stream_options=options,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    text, counted = "", 0
    async for chunk in stream:
        text += "".join(choice.text for choice in chunk.choices)
        counted = chunk.usage.completion_tokens if chunk.usage else counted
    return text, counted


def prompt(number: int, tokens: int = 60) -> list[int]:
    """Return token ids that differ from prompt to prompt from their first block on."""
    return [64 + (number * 37 + index * (number + 1)) % 400 for index in range(tokens)]


def pid_of(served: Served, node: str) -> int:
    return owner_of_port(int(served.node(node)["address"].rpartition(":")[2]))


@pytest.fixture
def default(serve: Callable[..., Served]) -> Served:
    served = serve(LOCAL_CLUSTER)
    served.until(lambda status: status["ready"] and all(node["up"] for node in status["nodes"]), within_s=30)
    return served


def test_64_concurrent_streams_each_deliver_exactly_their_tokens(default: Served) -> None:
    async def run() -> None:
        async with client_of(default) as client:
            lengths = [8 + number % 25 for number in range(64)]
            alone = [await complete(client, prompt(number), length) for number, length in enumerate(lengths)]
            together = await asyncio.gather(*(complete(client, prompt(number), length) for number, length in enumerate(lengths)))
        assert together == alone
        assert [count for _, count in together] == lengths

    asyncio.run(run())
    default.until_idle()


def test_200_cancelled_streams_leave_every_block_free(default: Served) -> None:
    async def abandon(client: httpx.AsyncClient, number: int) -> None:
        body = {"model": "default", "prompt": prompt(number, 200), "max_tokens": 4000, "ignore_eos": True, "stream": True}
        async with client.stream("POST", f"{default.url}/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            chunks = answer.aiter_raw()
            for _ in range(number % 3):
                await anext(chunks)

    async def run() -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            for first in range(0, 200, 40):
                await asyncio.gather(*(abandon(client, number) for number in range(first, first + 40)))

    asyncio.run(run())
    default.until_idle()


@pytest.mark.parametrize("victim", [pytest.param("decode-0", marks=pytest.mark.ray), "prefill-0"])
def test_a_killed_node_is_back_in_time_and_no_request_hangs(default: Served, victim: str) -> None:
    done: list[int] = []
    failures: list[str] = []
    healed: list[float] = []
    ended: asyncio.Queue[int] = asyncio.Queue()

    async def load(client: openai.AsyncOpenAI, number: int, until: asyncio.Event) -> None:
        turn = 0
        while not until.is_set():
            turn += 1
            try:
                async with asyncio.timeout(60):
                    text, count = await complete(client, prompt(number * 1000 + turn, 300), 20)
                assert count == 20, text
                done.append(number)
            except openai.APIError as error:
                failures.append(str(error))
            ended.put_nowait(number)

    async def more_end(count: int) -> None:
        while not ended.empty():
            ended.get_nowait()
        for _ in range(count):
            await ended.get()

    async def run() -> None:
        async with client_of(default) as client:
            until = asyncio.Event()
            loads = [asyncio.create_task(load(client, number, until)) for number in range(8)]
            await more_end(16)
            before = default.node(victim)["incarnation"]
            os.kill(pid_of(default, victim), signal.SIGKILL)
            killed = time.monotonic()
            await asyncio.to_thread(
                default.until,
                lambda status: any(
                    node["node"] == victim and node["up"] and node["incarnation"] > before for node in status["nodes"]
                ),
                within_s=60,
            )
            healed.append(time.monotonic() - killed)
            await more_end(16)
            until.set()
            await asyncio.gather(*loads)

    asyncio.run(run())
    default.until_idle()
    assert healed[0] < HEALED_S
    # What the victim had begun went on elsewhere.
    assert failures == []
    assert len(done) > 20


def test_a_killed_gateway_comes_back_on_its_port(default: Served) -> None:
    port = int(default.url.rpartition(":")[2])
    os.kill(owner_of_port(port), signal.SIGKILL)
    default.until(lambda status: status["ready"], within_s=HEALED_S)

    async def run() -> None:
        async with client_of(default) as client:
            assert (await complete(client, prompt(1), 8))[1] == 8

    asyncio.run(run())


def test_a_killed_controller_takes_the_cluster_over_again_and_goes_on_healing(default: Served) -> None:
    controllers = [pid for pid in descendants(default.process.pid) if "ray::Controller" in command_of(pid)]
    assert len(controllers) == 1
    os.kill(controllers[0], signal.SIGKILL)
    before = default.node("decode-0")["incarnation"]
    os.kill(pid_of(default, "decode-0"), signal.SIGKILL)
    default.until(lambda _: default.node("decode-0")["incarnation"] > before, within_s=2 * HEALED_S)
    assert default.stop() == 0


def test_sigterm_lets_what_runs_end_and_takes_nothing_new(default: Served) -> None:
    async def run() -> tuple[str, int]:
        async with client_of(default) as client:
            running = asyncio.create_task(complete(client, prompt(1), 1500))
            await asyncio.to_thread(default.until, lambda status: any(node["running"] for node in status["nodes"]), within_s=10)
            default.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(default.until, lambda status: not status["ready"], within_s=10)
            with pytest.raises(openai.APIStatusError) as refused:
                await complete(client, prompt(2), 8)
            assert refused.value.status_code == 503
            assert "retry-after" in refused.value.response.headers
            return await running

    assert asyncio.run(run())[1] == 1500
    assert default.stop() == 0


def test_a_second_cluster_on_the_same_port_ends_with_one_clear_line(default: Served, tmp_path: Path) -> None:
    port = default.url.rpartition(":")[2]
    with pytest.raises(NotServing) as caught:
        Served(LOCAL_CLUSTER, ("--http-port", port), tmp_path / "second.log")
    assert caught.value.code == 1
    assert caught.value.errors == f"weft: gateway-0: HTTP cannot listen on 127.0.0.1:{port}: Address already in use\n"
