"""A gateway serves with a certificate, and passes requests on to others that have the same one, and to no others."""

import asyncio
import ssl
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import httpx
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from orchestrator.core.cluster.sessions import owner_of
from orchestrator.core.types import GatewayId, SessionId
from orchestrator.live.health import HealthServer
from orchestrator.live.text.models import ModelText
from tests.live.scripted import MODEL, serve

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def files(folder: Path, authority: trustme.CA) -> dict[str, str]:
    folder.mkdir()
    signed = authority.issue_cert("127.0.0.1", "localhost")
    signed.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    signed.private_key_pem.write_to_path(folder / "key.pem")
    return {"cert": str(folder / "cert.pem"), "key": str(folder / "key.pem")}


def believing(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_requests_are_served_and_passed_on_with_tls(text: ModelText, tmp_path: Path) -> None:
    async def run() -> None:
        authority = trustme.CA()
        ours = files(tmp_path / "ours", authority)
        async with AsyncExitStack() as stack:
            pair = [await stack.enter_async_context(serve(text, number, **ours)) for number in (0, 1)]
            client = await stack.enter_async_context(httpx.AsyncClient(verify=believing(authority)))
            for one in pair:
                one.gateway.join({GatewayId(number): other.url for number, other in enumerate(pair)})
            owners = []
            for number in range(8):
                session = f"agent-{number}"
                answer = await client.post(f"{pair[0].url}/v1/chat/completions", json=BODY, headers={"x-session-id": session})
                assert answer.status_code == 200
                owners.append(int(answer.headers["x-weft-gateway"]))
                assert owners[-1] == owner_of(SessionId(session), (GatewayId(0), GatewayId(1)))
            assert set(owners) == {0, 1}

    asyncio.run(run())


def test_a_peer_with_another_certificate_gets_nothing(text: ModelText, tmp_path: Path) -> None:
    async def run() -> None:
        authority = trustme.CA()
        ours, theirs = files(tmp_path / "ours", authority), files(tmp_path / "theirs", trustme.CA())
        async with AsyncExitStack() as stack:
            one = await stack.enter_async_context(serve(text, 0, **ours))
            other = await stack.enter_async_context(serve(text, 1, **theirs))
            client = await stack.enter_async_context(httpx.AsyncClient(verify=believing(authority)))
            one.gateway.join({GatewayId(0): one.url, GatewayId(1): other.url})
            for number in range(8):
                headers = {"x-session-id": f"agent-{number}"}
                answer = await client.post(f"{one.url}/v1/chat/completions", json=BODY, headers=headers)
                assert (answer.status_code, answer.headers["x-weft-gateway"]) == (200, "0")
            assert not other.driver.turns

    asyncio.run(run())


def test_the_grpc_port_serves_with_it_too(tmp_path: Path) -> None:
    authority = trustme.CA()
    ours = files(tmp_path / "ours", authority)
    certificate = Path(ours["key"]).read_bytes(), Path(ours["cert"]).read_bytes()

    async def run() -> None:
        server = HealthServer(certificate)
        port = await server.start("127.0.0.1", 0)
        credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        await server.stop()

    asyncio.run(run())
