"""The harnesses' client against a real gateway and node: beside OpenAI's, through reflection, and from the command line."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from grpc_requests import Client as ReflectingClient

from orchestrator.cli.main import main
from orchestrator.harness import words
from orchestrator.harness.channels import CallRefused, KeyRefused, Unreachable
from orchestrator.harness.client import AsyncCacheClient, CacheClient
from orchestrator.harness.sessions import AsyncSession, Session
from orchestrator.harness.words import Outcome, Tier
from tests.live.serving import run
from tests.live.test_hints import LONG, Gateway, gateways

SERVICE = "weft.cache.v1.CacheControl"
SESSION = {"id": "s"}
TARGET = {"session": SESSION}
#: Every verb about one session as generic clients write it; none takes from a later one what that needs.
VERBS: dict[str, dict[str, Any]] = {
    "pin": {"target": TARGET, "tier": "TIER_HBM", "ttl_s": 60},
    "retain": {"target": TARGET, "priority": 90},
    "prefetch": {"target": TARGET},
    "demote": {"target": TARGET, "tier": "TIER_CPU"},
    "share": {"target": TARGET},
    "fork": {"parent": SESSION, "children": ["c"]},
    "tool_started": {"session": SESSION, "tool_class": "bash"},
    "tool_finished": {"session": SESSION},
    "unpin": {"target": TARGET},
    "evict": {"target": TARGET},
    "supersede": {"session": SESSION, "keep_tokens": 16},
    "end_session": {"session": SESSION},
}


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Gateway, str, str]]:
    """Serve; yields the gateway, its base URL and its gRPC address."""
    async with gateways() as (_, (gateway,)):
        yield gateway, str(gateway.http.base_url), gateway.front.status()["grpc_address"]


async def aside(work: Callable[[], Any]) -> Any:
    """Run what blocks while the gateway on this loop answers it."""
    return await asyncio.to_thread(work)


def chat(client: openai.OpenAI, text: str) -> int:
    """Have a turn served; return its cached tokens."""
    answer = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": text}], max_tokens=2, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


@pytest.mark.slow
def test_a_session_rides_along_an_openai_client() -> None:
    async def scenario() -> None:
        async with serving() as (_, url, address):

            def agent() -> None:
                with CacheClient(address, "sk-a") as cache, openai.OpenAI(base_url=f"{url}/v1", api_key="sk-a") as client:
                    main_agent = Session(cache, "main")
                    assert chat(main_agent.riding(client), LONG) == 0
                    pinned = main_agent.pin(ttl_s=60)
                    assert pinned.done
                    assert pinned.tier is Tier.HBM
                    # Tools run on, whoever hears of it.
                    with main_agent.tool_call("bash", expected_s=3):
                        pass
                    first, second = main_agent.fork(2)
                    assert first.headers == {"x-session-id": first.name, "x-parent-session-id": "main"}
                    assert first.lookup().tokens == second.lookup().tokens == pinned.tokens
                    assert chat(first.riding(client), LONG) >= pinned.tokens - 16
                    found = main_agent.lookup()
                    assert found.held_tokens(Tier.HBM) == pinned.tokens
                    assert [one.verb for one in found.effects] == ["pin", "tool_started", "tool_finished", "fork"]
                    assert found.effects[0].found_tokens == found.effects[3].found_tokens >= pinned.tokens - 16
                    assert main_agent.compacted(16).reason == "leased"
                    assert main_agent.unpin().outcome is Outcome.APPLIED
                    assert main_agent.compacted(16).outcome is Outcome.APPLIED
                    assert main_agent.prefetch().tier is Tier.HBM
                    assert main_agent.end().outcome is Outcome.APPLIED
                    assert main_agent.lookup().outcome is Outcome.MISSING

            await aside(agent)

    run(scenario)


@pytest.mark.slow
def test_a_session_on_asyncio_does_the_same() -> None:
    async def scenario() -> None:
        async with serving() as (gateway, _, address), AsyncCacheClient(address, "sk-a") as cache:
            session = AsyncSession(cache, "s")
            await gateway.turn("s", LONG)
            pinned = await session.pin(60)
            async with session.tool_call("bash"):
                pass
            (child,) = await session.fork(1)
            assert (await child.lookup()).tokens == pinned.tokens
            (residency,) = await cache.lookup(session.target, hashes=True)
            assert [one.id for one in residency.leases] == [pinned.lease]
            (of_blocks,) = await cache.lookup(words.blocks(residency.hashes))
            assert of_blocks.tokens == pinned.tokens
            (price,) = await cache.quote(words.pin(session.target, ttl_s=10))
            assert (price.byte_s, price.byte_s_left) == (pinned.size_bytes * 10, None)
            events = cache.watch(session.target)
            first = await anext(events)
            assert first.residency is not None
            await session.unpin()
            change = await anext(events)
            assert change.lease is not None
            assert (change.lease.change, change.lease.reason) == ("ended", "unpinned")
            await events.aclose()  # type: ignore[attr-defined]
            assert (await session.compacted()).done
            assert (await session.prefetch()).tier is Tier.HBM
            assert (await session.end()).done

    run(scenario)


def test_an_anthropic_client_carries_the_session_as_well() -> None:
    with CacheClient("127.0.0.1:1") as cache:
        session = Session(cache, "s", parent="p")
        with session.riding(anthropic.Anthropic(api_key="key")) as client:
            assert client.default_headers["x-session-id"] == "s"
            assert client.default_headers["x-parent-session-id"] == "p"


@pytest.mark.slow
def test_what_goes_wrong_is_told_by_its_kind_and_a_tool_call_goes_on() -> None:
    async def scenario() -> None:
        async with serving() as (_, _, address):

            def agent() -> None:
                with CacheClient(address, "nobody") as cache, pytest.raises(KeyRefused):
                    cache.lookup(words.session("s"))
                with CacheClient(address, "sk-a") as cache, pytest.raises(CallRefused):
                    cache.apply(*[words.unpin(words.session("s"))] * 65)
                with CacheClient("127.0.0.1:1", timeout_s=1.0) as cache:
                    with pytest.raises(Unreachable):
                        cache.lookup(words.session("s"))
                    done = False
                    with Session(cache, "s").tool_call("bash"):
                        done = True
                    assert done

            await aside(agent)

    run(scenario)


def test_a_client_on_asyncio_is_told_the_same_of_what_goes_wrong() -> None:
    async def scenario() -> None:
        async with AsyncCacheClient("127.0.0.1:1") as cache:
            with pytest.raises(Unreachable):
                await cache.lookup(words.session("s"))
            with pytest.raises(Unreachable):
                await anext(cache.watch(words.session("s")))
            done = False
            async with AsyncSession(cache, "s").tool_call("bash"):
                done = True
            assert done

    run(scenario)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_generic_client_finds_every_verb_by_reflection() -> None:
    async def scenario() -> None:
        async with serving() as (gateway, _, address):
            await gateway.turn("s", LONG)

            def ask() -> list[dict[str, Any]]:
                client = ReflectingClient.get_by_endpoint(address)
                assert SERVICE in client.service_names
                key = [("authorization", "Bearer sk-a")]
                actions = [{"action_id": verb, verb: fields} for verb, fields in VERBS.items()]
                message = {"message_id": "m", "actions": actions}
                answer = client.request(SERVICE, "Apply", message, metadata=key)
                again = client.request(SERVICE, "Apply", message, metadata=key)
                lookup = client.request(SERVICE, "Lookup", {"targets": [{"session": {"id": "c"}}]}, metadata=key)
                quote = client.request(SERVICE, "Quote", {"actions": actions[:1]}, metadata=key)
                return [answer, again, lookup, quote]

            answer, again, lookup, quote = await aside(ask)
            outcomes = {one["action_id"]: one["outcome"] for one in answer["results"]}
            assert outcomes["pin"] in ("OUTCOME_APPLIED", "OUTCOME_DEFERRED")
            done = ("prefetch", "fork", "tool_started", "tool_finished", "unpin", "evict", "end_session")
            assert {outcomes[verb] for verb in done} == {"OUTCOME_APPLIED"}
            unsupported = ("demote", "share")
            assert {outcomes[verb] for verb in unsupported} == {"OUTCOME_UNSUPPORTED"}
            # What was done is done once; the parent has ended meanwhile, and its targets with it.
            assert "OUTCOME_APPLIED" not in {one["outcome"] for one in again["results"]}
            assert lookup["residencies"][0]["outcome"] == "OUTCOME_APPLIED"
            assert quote["prices"][0]["result"]["outcome"] == "OUTCOME_MISSING"

    run(scenario)


@pytest.mark.slow
def test_the_command_asks_and_says_what_became_of_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving() as (gateway, _, address):
            await gateway.turn("s", LONG)
            place = ["--address", address, "--key", "sk-a"]

            async def weft(*arguments: str) -> tuple[int, str, str]:
                code = await aside(lambda: main(["cache", *arguments, *place]))
                said = capsys.readouterr()
                return code, said.out, said.err

            code, out, _ = await weft("pin", "--session", "s", "--ttl", "60", "--json")
            pinned = json.loads(out)
            assert (code, pinned["tier"], pinned["ttl_s"]) == (0, "hbm", 60.0)
            code, out, _ = await weft("lookup", "--session", "s")
            assert code == 0
            assert "both-0" in out
            assert pinned["lease"] in out
            code, out, _ = await weft("lookup", "--lease", pinned["lease"], "--json")
            hashes = json.loads(out)["hashes"]
            assert (code, len(hashes)) == (0, pinned["blocks"])
            assert (await weft("lookup", "--blocks", ",".join(hashes)))[0] == 0
            code, out, _ = await weft("quote", "--session", "s", "--tokens", "0:32")
            assert "2 blocks, 32 tokens" in out
            code, out, _ = await weft("prefetch", "--session", "s", "--tier", "hbm", "--deadline", "20")
            assert (code, "on hbm" in out) == (0, True)
            code, _, err = await weft("evict", "--session", "s")
            assert (code, err) == (1, "weft: rejected: a lease covers all of it; unpin it first\n")
            assert (await weft("unpin", "--lease", pinned["lease"]))[0] == 0
            assert (await weft("evict", "--session", "s"))[0] == 0
            code, _, err = await weft("demote", "--session", "s", "--tier", "cpu")
            assert code == 1
            assert err.startswith("weft: unsupported: ")
            body = tmp_path / "body.json"
            body.write_text(json.dumps({"model": "default", "messages": [{"role": "system", "content": LONG}]}))
            assert (await weft("pin", "--chat", str(body)))[0] == 0
            prompt = tmp_path / "prompt.txt"
            prompt.write_text(LONG)
            assert (await weft("pin", "--text", str(prompt), "--model", "default"))[0] == 0
            assert (await weft("prefetch", "--text", str(prompt)))[0] == 2

    run(scenario)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--blocks", "xyz"], "--blocks: must be hashes in hexadecimal"),
        (["--chat", "/nowhere/body.json"], "--chat: /nowhere/body.json: No such file"),
        (["--lease", "l", "--tokens", "0:5"], "--tokens: only of a session or a prompt"),
        (["--session", "s", "--key", "file:/nowhere"], "--key: "),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "pin", *arguments]) == 2
    err = capsys.readouterr().err
    assert problem in err
    assert err.count("\n") == 1


def test_nobody_there_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "lookup", "--session", "s", "--address", "127.0.0.1:1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("weft: 127.0.0.1:1: ")
    assert err.count("\n") == 1
