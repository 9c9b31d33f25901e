"""The gateway over raw HTTP: clients that go away, sessions and their owners, headers, health, draining."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from orchestrator.core.cluster.sessions import owner_of
from orchestrator.core.types import GatewayId, ModelName, ServiceClass, SessionId
from orchestrator.live.http.exchange import CLIENT_GONE
from orchestrator.live.text.models import ModelText
from orchestrator.profiles.fields import CheckpointError
from tests.builders import some
from tests.live.scripted import MODEL, TENANTS, Script, Served, play, serve

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi there"}]}
CHAT = "/v1/chat/completions"


def counted(served: Served, status: int) -> bool:
    return f'weft_requests_total{{endpoint="{CHAT}",model="{MODEL}",status="{status}",tenant="default"}}' in (
        served.metrics.render().decode()
    )


def prompt_text(served: Served, place: int = 0) -> str:
    tokens = list(memoryview(served.driver.turns[place].prompt.tokens).cast("I"))
    return served.driver.text.tokenizer.decode(tokens, skip_special_tokens=False)


def test_the_time_to_the_first_token_counts_from_the_arrival_and_not_from_the_end_of_what_is_asked(text: ModelText) -> None:
    async def run() -> None:
        async with serve(text) as served:
            now, parts = [0.0], [json.dumps(BODY).encode(), b" "]
            served.metrics.clock = lambda: now[0]

            async def receive() -> dict[str, Any]:
                if not parts:
                    await asyncio.Event().wait()  # the client stays
                now[0] += 1.5
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

            async def send(message: Any) -> None:
                pass

            await served.gateway({"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive, send)
            shown = served.metrics.render().decode()
            assert f'weft_ttft_seconds_sum{{class="standard",model="{MODEL}",pool="none"}} 3.0' in shown

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [[None], ["some text", None]])
def test_a_client_that_goes_away_frees_its_turns_at_once(text: ModelText, stream: bool, steps: list[str | None]) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        served.driver.script = lambda turn: Script(steps)
        request = asyncio.create_task(client.post(CHAT, json={**BODY, "stream": stream, "n": 2}))
        await served.driver.started.wait()
        await served.driver.streams[0].waiting.wait()
        request.cancel()
        for turn in served.driver.streams:
            await asyncio.wait_for(turn.cancelled.wait(), 5)
        assert len(served.driver.streams) == 2
        assert await served.gateway.drain(5)
        assert counted(served, CLIENT_GONE)

    play(text, talk)


def test_two_hundred_streams_cancelled_in_the_middle_leave_no_turn_behind(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        served.driver.script = lambda turn: Script(["a", None])

        async def leave() -> None:
            async with client.stream("POST", CHAT, json={**BODY, "stream": True}) as answer:
                async for line in answer.aiter_lines():
                    if '"content":"a"' in line:
                        return

        for _ in range(4):
            await asyncio.gather(*(leave() for _ in range(50)))
        assert await served.gateway.drain(10)
        assert sum(turn.cancelled.is_set() for turn in served.driver.streams) == 200

    play(text, talk)


def test_sixty_four_streams_at_once_each_get_their_own_tokens(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        served.driver.script = lambda turn: Script([f"{turn.sampling.seed} ", *"abcdefgh"])

        async def ask(seed: int) -> str:
            answer = await client.post(CHAT, json={**BODY, "stream": True, "seed": seed})
            events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
            assert answer.text.endswith("data: [DONE]\n\n")
            return "".join(event["choices"][0]["delta"].get("content", "") for event in events)

        assert await asyncio.gather(*(ask(seed) for seed in range(64))) == [f"{seed} abcdefgh" for seed in range(64)]

    play(text, talk)


def test_request_ids_are_echoed_or_made(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        given = await client.post(CHAT, json=BODY, headers={"X-Request-Id": "mine-1"})
        made = await client.post(CHAT, json=BODY)
        long = await client.post(CHAT, json=BODY, headers={"X-Request-Id": "x" * 500})
        assert given.headers["x-request-id"] == "mine-1"
        assert len(made.headers["x-request-id"]) == len(long.headers["x-request-id"]) == 32
        assert given.headers["x-weft-gateway"] == "0"

    play(text, talk)


@pytest.mark.parametrize(
    ("headers", "body", "session"),
    [
        ({}, {}, None),
        ({}, {"prompt_cache_key": "key"}, "key"),
        ({}, {"prompt_cache_key": "key", "nvext": {"agent_context": {"session_id": "agent"}}}, "agent"),
        ({"x-session-id": "header"}, {"prompt_cache_key": "key"}, "header"),
        ({"X-Correlation-ID": "late", "X-Claude-Code-Agent-Id": "child", "x-claude-code-session-id": "main"}, {}, "child"),
        ({"X-Dynamo-Session-ID": "first", "session_id": "second"}, {}, "first"),
    ],
)
def test_sessions_are_found_in_order_of_precedence(
    text: ModelText, headers: dict[str, str], body: Any, session: str | None
) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        assert (await client.post(CHAT, json={**BODY, **body}, headers=headers)).status_code == 200
        assert served.driver.turns[0].session == session

    play(text, talk)


def test_hints_in_the_body_are_honoured(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        hints = {"service_tier": "flex", "priority": 3, "cache_salt": "pepper", "user": 7, "metadata": {"a": None}}
        await client.post(CHAT, json={**BODY, **hints})
        await client.post(CHAT, json={**BODY, "priority": 3, "nvext": {"agent_hints": {"priority": 9, "osl": 4}}})
        salted, plain = served.driver.turns
        assert (salted.service_class, salted.priority) == (ServiceClass.BATCH, 3)
        assert (plain.service_class, plain.priority) == (ServiceClass.STANDARD, 9)
        assert salted.prompt.tokens == plain.prompt.tokens
        assert salted.prompt.hash_root != plain.prompt.hash_root

    play(text, talk)


def test_messages_of_every_harness_are_understood(text: ModelText) -> None:
    billing = "x-anthropic-billing-header: cc_version=1; nonce=abc\nYou are helpful."
    marked = {"type": "text", "text": "one ", "cache_control": {"type": "ephemeral"}}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    messages = [
        {"role": "developer", "content": billing},
        {"role": "user", "content": [marked, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "result"},
    ]

    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        assert (await client.post(CHAT, json={"model": MODEL, "messages": messages})).status_code == 200
        shown = prompt_text(served)
        assert shown.startswith("<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\none two<|im_end|>\n")
        assert '{"name": "f", "arguments": {"x": 1}}' in shown
        assert "None" not in shown
        picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        refused = await client.post(CHAT, json={"model": MODEL, "messages": picture})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")

    play(text, talk)


def test_the_other_endpoints(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        assert (await client.get("/live")).status_code == 200
        assert (await client.get("/ready")).status_code == 200
        served.driver.ready = False
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 503
        await client.post(CHAT, json=BODY)
        assert counted(served, 200)
        metrics = await client.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert "weft_requests_total" in metrics.text
        assert (await client.get("/status")).json() == {"nodes": []}
        unknown = await client.get("/v1/nothing")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_url")
        assert (await client.get(CHAT)).status_code == 405

    play(text, talk)


def test_draining_refuses_what_is_new_and_waits_for_what_runs(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        served.driver.script = lambda turn: Script([None])
        running = asyncio.create_task(client.post(CHAT, json=BODY))
        await served.driver.started.wait()
        assert not await served.gateway.drain(0.01)
        refused = await client.post(CHAT, json=BODY)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        # A client's next request goes elsewhere.
        assert refused.headers["connection"] == "close"
        assert (await client.get("/ready")).headers["connection"] == "close"
        assert not served.gateway.ready
        # Another gateway passed this on before it heard of the drain.
        served.driver.script = lambda turn: Script(["late"])
        assert (await client.post(CHAT, json=BODY, headers={"x-weft-forwarded": "1"})).status_code == 200
        running.cancel()
        assert await served.gateway.drain(5)

    play(text, talk)


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelText.load(tmp_path, "none")


def foreign_session(gateways: int, owner: int) -> str:
    return next(name for name in map(str, range(1000)) if owner_of(SessionId(name), numbers(gateways)) == owner)


def numbers(gateways: int) -> list[GatewayId]:
    return [GatewayId(number) for number in range(gateways)]


def peers_of(gateways: Sequence[Served]) -> dict[GatewayId, str]:
    return {GatewayId(number): one.url for number, one in enumerate(gateways)}


def test_sessions_are_spread_and_stay_when_a_gateway_is_added() -> None:
    owners = [owner_of(SessionId(f"session {number}"), numbers(3)) for number in range(3000)]
    assert {owner: 900 < owners.count(owner) < 1100 for owner in numbers(3)} == dict.fromkeys(numbers(3), True)
    later = [owner_of(SessionId(f"session {number}"), numbers(4)) for number in range(3000)]
    assert all(new in (old, 3) for old, new in some(zip(owners, later, strict=True)))


def test_only_the_sessions_of_a_gateway_that_is_away_move() -> None:
    sessions = [SessionId(f"session {number}") for number in range(300)]
    owners = [owner_of(session, numbers(3)) for session in sessions]
    meanwhile = [owner_of(session, [GatewayId(0), GatewayId(2)]) for session in sessions]
    assert all(new == old for old, new in some(zip(owners, meanwhile, strict=True)) if old != 1)
    assert {new for old, new in zip(owners, meanwhile, strict=True) if old == 1} == {0, 2}


@pytest.mark.parametrize("stream", [False, True])
def test_a_session_is_served_by_its_owner_whichever_gateway_is_asked(text: ModelText, stream: bool) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            gateways = [await stack.enter_async_context(serve(text, number)) for number in range(2)]
            for one in gateways:
                one.gateway.join(peers_of(gateways))
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=gateways[0].url))
            headers = {"x-session-id": foreign_session(2, 1), "x-request-id": "through"}
            answer = await client.post(CHAT, json={**BODY, "stream": stream}, headers=headers)
            assert answer.status_code == 200
            assert '"finish_reason":"stop"' in answer.text
            assert answer.headers["x-weft-gateway"] == "1"
            assert answer.headers["x-request-id"] == "through"
            assert [len(one.driver.turns) for one in gateways] == [0, 1]
            await client.post(CHAT, json=BODY, headers={"x-session-id": foreign_session(2, 0)})
            await client.post(CHAT, json=BODY)
            assert [len(one.driver.turns) for one in gateways] == [2, 1]
            looped = {**headers, "x-weft-forwarded": "1"}
            assert (await client.post(CHAT, json=BODY, headers=looped)).headers["x-weft-gateway"] == "0"
            wrong = await client.post(CHAT, json={**BODY, "temperature": -1}, headers=headers)
            assert wrong.status_code == 400

    asyncio.run(run())


def test_a_client_that_leaves_a_proxied_request_frees_it_on_the_owner(text: ModelText) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            gateways = [await stack.enter_async_context(serve(text, number)) for number in range(2)]
            for one in gateways:
                one.gateway.join(peers_of(gateways))
            gateways[1].driver.script = lambda turn: Script(["some", None])
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=gateways[0].url))
            headers = {"x-session-id": foreign_session(2, 1)}
            request = asyncio.create_task(client.post(CHAT, json={**BODY, "stream": True}, headers=headers))
            await gateways[1].driver.started.wait()
            await gateways[1].driver.streams[0].waiting.wait()
            request.cancel()
            await asyncio.wait_for(gateways[1].driver.streams[0].cancelled.wait(), 5)

    asyncio.run(run())


def test_an_owner_that_cannot_be_reached_costs_the_affinity_and_not_the_request(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        served.gateway.join({GatewayId(0): served.url, GatewayId(1): "http://127.0.0.1:9"})
        answer = await client.post(CHAT, json=BODY, headers={"x-session-id": foreign_session(2, 1)})
        assert (answer.status_code, answer.headers["x-weft-gateway"]) == (200, "0")

    play(text, talk)


def test_small_answers_wait_for_no_acknowledgement(text: ModelText) -> None:
    """On asyncio's loop, which tests use, as on uvloop's."""

    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        await client.get("/health")
        (connection,) = served.gateway._server._server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    play(text, talk)


def test_a_tenant_cannot_push_out_another_ones_prompts(text: ModelText) -> None:
    async def talk(client: httpx.AsyncClient, served: Served) -> None:
        def ask(key: str, content: str) -> Awaitable[httpx.Response]:
            body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
            return client.post(CHAT, json=body, headers={"authorization": f"Bearer {key}"})

        await ask("sk-good", "mine " * 500)
        for number in range(12):
            await ask("sk-other", f"{number} " * 1000)
        prompts = {tenant: len(one) for tenant, one in served.intake.models[ModelName(MODEL)].prompts.items()}
        assert prompts == {"acme": 1, "globex": 4}

    play(text, talk, tenants=TENANTS, prompts_cached_max=8)
