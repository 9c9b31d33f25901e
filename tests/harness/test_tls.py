"""The cache API with a certificate: by reflection, by the client that blocks and by the one for asyncio; and who is refused."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme
from grpc_requests import Client as ReflectingClient

from orchestrator.harness import words
from orchestrator.harness.channels import KeyRefused, Unreachable
from orchestrator.harness.client import AsyncCacheClient, CacheClient
from orchestrator.harness.words import Outcome, Tier
from tests.harness.test_harness import SERVICE, VERBS
from tests.live.serving import run
from tests.live.test_hints import LONG, Gateway, config_of, gateways

README = Path(__file__).parents[2] / "orchestrator" / "README.md"


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[Gateway, str, bytes]]:
    """Serve with a certificate and a turn done; yields the gateway, its gRPC address, and what to believe."""
    authority = trustme.CA()
    signed = authority.issue_cert("127.0.0.1", "localhost")
    cert, key = folder / "cert.pem", folder / "key.pem"
    signed.cert_chain_pems[0].write_to_path(cert)
    signed.private_key_pem.write_to_path(key)
    config = config_of()
    config = replace(config, gateway=replace(config.gateway, cert=str(cert), key=str(key)))
    believed = authority.cert_pem.bytes()
    async with gateways(config=config, certificates=believed) as (_, (gateway,)):
        await gateway.turn("s", LONG)
        yield gateway, gateway.front.status()["grpc_address"], believed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_generic_client_finds_every_verb_over_tls(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (_, address, believed):

            def ask() -> list[Any]:
                client = ReflectingClient.get_by_endpoint(address, ssl=True, credentials={"root_certificates": believed})
                key = [("authorization", "Bearer sk-a")]
                message = {"message_id": "m", "actions": [{"action_id": verb, verb: fields} for verb, fields in VERBS.items()]}
                answer = client.request(SERVICE, "Apply", message, metadata=key)
                child = client.request(SERVICE, "Lookup", {"targets": [{"session": {"id": "c"}}]}, metadata=key)
                return [answer, child]

            answer, child = await asyncio.to_thread(ask)
            outcomes = {one["action_id"]: one["outcome"] for one in answer["results"]}
            # There is no store, and no other node.
            unsupported = {"demote", "share"}
            assert {verb for verb, outcome in outcomes.items() if outcome == "OUTCOME_UNSUPPORTED"} == unsupported
            done = {"pin", "prefetch", "fork", "tool_started", "tool_finished", "unpin", "evict", "end_session"}
            assert {outcomes[verb] for verb in done} <= {"OUTCOME_APPLIED", "OUTCOME_DEFERRED"}
            assert child["residencies"][0]["outcome"] == "OUTCOME_APPLIED"

    run(scenario)


def shown() -> list[tuple[str, str, dict[str, Any]]]:
    """Return the calls that the documentation shows with grpcurl: their header, method and message."""
    calls = re.findall(r"grpcurl -plaintext -H '(.+?)' -d '(.+?)' \\\n\s+\S+ (\S+)\n", README.read_text(), re.DOTALL)
    return [(header, method, json.loads(message)) for header, message, method in calls]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_the_documentation_asks_with_grpcurl_is_answered_over_tls(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (gateway, address, believed):
            await gateway.turn("my-session", LONG)

            def ask() -> dict[str, Any]:
                client = ReflectingClient.get_by_endpoint(address, ssl=True, credentials={"root_certificates": believed})
                answers: dict[str, Any] = {}
                for header, method, message in shown():
                    name, _, value = header.replace("KEY", "sk-a").partition(": ")
                    service, _, call = method.partition("/")
                    answers[call] = client.request(service, call, message, metadata=[(name, value)])
                return answers

            answers = await asyncio.to_thread(ask)
            (pinned,) = answers["Apply"]["results"]
            assert (pinned["outcome"], pinned["tier"], pinned["ttl_s"]) == ("OUTCOME_APPLIED", "TIER_HBM", 600.0)
            (found,) = answers["Lookup"]["residencies"]
            assert [one["lease"] for one in found["leases"]] == [pinned["lease"]]
            assert [one["tier"] for one in found["holdings"]] == ["TIER_HBM"]

    run(scenario)


@pytest.mark.slow
def test_both_clients_work_over_tls_and_who_is_not_believed_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as (_, address, believed):

            def blocking() -> None:
                with CacheClient(address, "sk-a", believed) as cache:
                    (pinned,) = cache.apply(words.pin(words.session("s"), ttl_s=60))
                    assert (pinned.done, pinned.tier) == (True, Tier.HBM)
                    (found,) = cache.lookup(words.session("s"))
                    assert [one.id for one in found.leases] == [pinned.lease]
                with CacheClient(address, "nobody", believed) as cache, pytest.raises(KeyRefused):
                    cache.lookup(words.session("s"))
                # Without TLS, and with TLS that believes another authority.
                for certificates in (None, trustme.CA().cert_pem.bytes()):
                    with CacheClient(address, "sk-a", certificates, timeout_s=2.0) as cache, pytest.raises(Unreachable):
                        cache.lookup(words.session("s"))

            await asyncio.to_thread(blocking)
            async with AsyncCacheClient(address, "sk-a", believed) as cache:
                (price,) = await cache.quote(words.pin(words.session("s"), ttl_s=10))
                assert price.byte_s
                (unpinned,) = await cache.apply(words.unpin(words.session("s")))
                assert unpinned.outcome is Outcome.APPLIED
            async with AsyncCacheClient(address, "nobody", believed) as cache:
                with pytest.raises(KeyRefused):
                    await cache.lookup(words.session("s"))
            for certificates in (None, trustme.CA().cert_pem.bytes()):
                async with AsyncCacheClient(address, "sk-a", certificates, timeout_s=2.0) as cache:
                    with pytest.raises(Unreachable):
                        await cache.lookup(words.session("s"))

    run(scenario)
