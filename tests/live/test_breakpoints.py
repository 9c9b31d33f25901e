"""Breakpoints of Anthropic's API over gateways and a real node: what is before them stays, and what is behind need not."""

from typing import Any

import pytest

from orchestrator.wire import cache_pb2
from tests.live.serving import run
from tests.live.test_hints import LONG, Gateway, gateways, session

pytestmark = pytest.mark.slow

MARK = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}
ASKED = "What follows is of no further interest to anybody who comes after this. " * 4


async def ask(gateway: Gateway, messages: list[Any], system: list[Any] | None = None, name: str = "") -> dict[str, int]:
    """Have a turn served and return its usage, which must add up."""
    headers = {"x-api-key": "sk-a", "anthropic-version": "2023-06-01"} | ({"x-session-id": name} if name else {})
    body = {"model": "default", "max_tokens": 1, "messages": messages, "system": system or []}
    usage = (await gateway.http.post("/v1/messages", json=body, headers=headers)).raise_for_status().json()["usage"]
    prompt = {name: body[name] for name in ("model", "messages", "system")}
    counted = (await gateway.http.post("/v1/messages/count_tokens", json=prompt, headers=headers)).json()["input_tokens"]
    parts = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    assert sum(usage[part] for part in parts) == counted
    return usage


def text(words: str, mark: Any = None) -> dict[str, Any]:
    return {"type": "text", "text": words} | ({"cache_control": mark} if mark else {})


def user(words: str, mark: Any = None) -> dict[str, Any]:
    return {"role": "user", "content": [text(words, mark)]}


def test_what_a_breakpoint_marks_survives_a_flood_and_what_is_behind_does_not() -> None:
    async def scenario() -> None:
        async with gateways() as (_, (gateway,)):
            system = [text(LONG, HOUR)]
            first = await ask(gateway, [user(ASKED)], system)
            created = first["cache_creation_input_tokens"]
            assert created == first["cache_creation"]["ephemeral_1h_input_tokens"] > 0
            assert first["input_tokens"] > 16
            await gateway.flood()
            again = await ask(gateway, [user(ASKED)], system)
            assert again["cache_read_input_tokens"] == created
            assert again["input_tokens"] == first["input_tokens"]
            # Nothing of it is kept where nobody asked for that.
            other = [text(f"Otherwise. {LONG}")]
            await ask(gateway, [user(ASKED)], other)
            await gateway.flood()
            assert (await ask(gateway, [user(ASKED)], other))["cache_read_input_tokens"] == 0

    run(scenario)


def test_a_lease_moves_with_a_conversation_that_names_no_session() -> None:
    async def scenario() -> None:
        async with gateways() as (_, (gateway,)):
            messages: list[Any] = [user(LONG, MARK)]
            first = await ask(gateway, messages)
            messages = [user(LONG), {"role": "assistant", "content": "So."}, user(ASKED, MARK)]
            second = await ask(gateway, messages)
            assert second["cache_read_input_tokens"] >= first["cache_creation_input_tokens"] - 16
            # One that goes on from the first otherwise has a lease of its own.
            await ask(gateway, [user(LONG), {"role": "assistant", "content": "No."}, user(ASKED, MARK)])
            chat = cache_pb2.Prompt(chat_json='{"model": "default", "messages": [{"role": "user", "content": "' + LONG + '"}]}')
            leases = (await gateway.lookup(cache_pb2.Target(prompt=chat))).leases
            assert len(leases) == 2
            assert {lease.session for lease in leases} == {""}

    run(scenario)


def test_a_session_has_a_lease_for_each_of_the_two_times() -> None:
    async def scenario() -> None:
        async with gateways() as (_, (gateway,)):
            for number in range(3):
                messages = [user(ASKED), {"role": "assistant", "content": "So."}] * number + [user(LONG, MARK)]
                await ask(gateway, messages, [text(LONG, HOUR)], "s")
                leases = (await gateway.lookup(session("s"))).leases
                assert sorted(lease.ttl_s > 300 for lease in leases) == [False, True]
                long, short = sorted(leases, key=lambda lease: -lease.ttl_s)
                assert long.blocks < short.blocks

    run(scenario)


def test_a_quota_that_is_spent_creates_nothing() -> None:
    async def scenario() -> None:
        async with gateways() as (_, (gateway,)):
            # A tenant of two has half of half the node's 128 blocks of 16 tokens.
            usages = [await ask(gateway, [user(f"{number} {LONG}", MARK)], name=f"s{number}") for number in range(6)]
            assert sum(usage["cache_creation_input_tokens"] for usage in usages) == 32 * 16
            assert usages[-1]["cache_creation_input_tokens"] == 0

    run(scenario)
