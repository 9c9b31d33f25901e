"""Attacks on channels inside a cluster, by somebody who reaches its ports and has the public proto: all refused and counted."""

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme

from orchestrator.core.config import ClusterConfig, ConfigError, TlsConfig
from orchestrator.core.types import GatewayId, NodeId, request_id
from orchestrator.wire import node_pb2, node_pb2_grpc
from orchestrator.wire.trust import PROTOCOL_METADATA, TOKEN_METADATA, Caller, Metadata, Trust, read_trust
from tests.live.serving import Cluster, cluster, finish, run, split, turn
from workers.engines.checkpoint import default_model_path
from workers.memory import NAME, PeerMemory, PeerUnmappable, SharedArena

SECRET = b"the cluster's"
HELLO = node_pb2.GatewayFrame(hello=node_pb2.Hello(gateway=0, incarnation=9))
FETCH = node_pb2.FetchFrame(
    request=node_pb2.FetchRequest(request=1, hashes=bytes(32), tokens=32, block_bytes=64, transports=["shm"])
)
#: An attacker's and a real caller's way to speak: plain, or with certificates.
PLAIN, MUTUAL = "plain", "mutual TLS"


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return default_model_path()


@pytest.fixture(params=[PLAIN, MUTUAL])
def trust(request: pytest.FixtureRequest, tmp_path: Path) -> Trust:
    return read_trust(SECRET.decode(), certificates(tmp_path) if request.param == MUTUAL else TlsConfig())


def certificates(folder: Path) -> TlsConfig:
    """Return the files of an authority and of a certificate that it has signed."""
    folder.mkdir(exist_ok=True)
    authority = trustme.CA()
    signed = authority.issue_cert("127.0.0.1", "weft.internal")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    signed.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    signed.private_key_pem.write_to_path(folder / "key.pem")
    return TlsConfig(*(str(folder / f"{name}.pem") for name in ("ca", "cert", "key")), "weft.internal")


def forged(metadata: Metadata, **changes: str | None) -> Metadata:
    """Return a call's metadata with a value changed or taken away."""
    keys = {"token": TOKEN_METADATA, "protocol": PROTOCOL_METADATA}
    found = dict(metadata) | {keys[name]: value for name, value in changes.items() if value is not None}
    return tuple(
        (key, value) for key, value in found.items() if changes.get({v: k for k, v in keys.items()}.get(key, ""), "") is not None
    )


async def refusal(call: grpc.aio.StreamStreamCall, first: object) -> grpc.StatusCode:
    """Say something on a stream; return how it ends. Fails if anything comes back."""
    try:
        await call.write(first)
        answer = await asyncio.wait_for(call.read(), 5)
    except grpc.aio.AioRpcError as error:
        return error.code()
    assert answer is grpc.aio.EOF, f"an attacker was answered: {answer}"
    return await call.code()


async def serves(served: Cluster) -> None:
    """See that the cluster still answers, by both nodes."""
    got = await finish(served.driver.start(turn(range(200), 5)))
    assert len(got.tokens) == 5
    assert served.driver.ready
    assert not served.failures


def test_whoever_has_no_token_is_nobody(model_dir: Path, trust: Trust) -> None:
    async def scenario() -> None:
        async with cluster(split(), model_dir, trust=trust) as served:
            await serves(served)
            attacks = 0

            async def attack(method: Any, metadata: Metadata, first: object) -> grpc.StatusCode:
                nonlocal attacks
                while True:
                    attacks += 1
                    code = await refusal(method(metadata=metadata), first)
                    # What was refused before its first word was out ends here as INTERNAL: the word has yet to be heard.
                    if code is not grpc.StatusCode.INTERNAL:
                        return code

            for node, address in served.addresses.items():
                real = trust.metadata(Caller.GATEWAY, node)
                other = NodeId("decode-0" if node != "decode-0" else "prefill-0")
                peers = trust.metadata(Caller.PEER, node)
                async with trust.open_channel(address) as channel:
                    stub = node_pb2_grpc.NodeStub(channel)
                    unauthenticated = grpc.StatusCode.UNAUTHENTICATED
                    for metadata, code in (
                        (forged(real, token=None), unauthenticated),
                        (forged(real, token=""), unauthenticated),
                        (forged(real, token="0" * 64), unauthenticated),
                        (forged(real, token=dict(peers)[TOKEN_METADATA]), unauthenticated),  # a peer's
                        (forged(real, token=dict(trust.metadata(Caller.GATEWAY, other))[TOKEN_METADATA]), unauthenticated),
                        (
                            forged(real, token=dict(Trust(b"guessed").metadata(Caller.GATEWAY, node))[TOKEN_METADATA]),
                            unauthenticated,
                        ),
                        (forged(real, protocol="1"), grpc.StatusCode.FAILED_PRECONDITION),
                        (forged(real, protocol=None), grpc.StatusCode.FAILED_PRECONDITION),
                        (trust.metadata(Caller.GATEWAY, NodeId("nobody")), grpc.StatusCode.NOT_FOUND),
                    ):
                        # Posing as gateway 0 would end its requests, and a resync would list every hash.
                        assert await attack(stub.Connect, metadata, HELLO) is code, metadata
                    for metadata in (forged(peers, token=None), forged(peers, token=dict(real)[TOKEN_METADATA])):
                        assert await attack(stub.Fetch, metadata, FETCH) is unauthenticated
            await serves(served)
            told: dict[NodeId, int] = {}
            served.observed.refused = told.__setitem__  # type: ignore[method-assign]
            for _ in range(100):
                if sum(told.values()) >= attacks:
                    break
                await serves(served)
            assert sum(told.values()) == attacks

    run(scenario, 60)


def test_without_a_certificate_of_the_clusters_nothing_is_heard(model_dir: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        trust = read_trust(SECRET.decode(), certificates(tmp_path / "ours"))
        foreign = read_trust(SECRET.decode(), certificates(tmp_path / "theirs"))
        async with cluster(split(), model_dir, trust=trust) as served:
            for node, address in served.addresses.items():
                for outsider in (Trust(SECRET), foreign):
                    async with outsider.open_channel(address) as channel:
                        call = node_pb2_grpc.NodeStub(channel).Connect(metadata=outsider.metadata(Caller.GATEWAY, node))
                        assert await refusal(call, HELLO) is grpc.StatusCode.UNAVAILABLE
            await serves(served)

    run(scenario, 60)


NONSENSE: dict[str, node_pb2.GatewayFrame] = {
    "no hello": node_pb2.GatewayFrame(cancels=[1]),
    "a gateway beyond all": node_pb2.GatewayFrame(hello=node_pb2.Hello(gateway=1 << 31)),
}


@pytest.mark.parametrize("frame", NONSENSE.values(), ids=NONSENSE)
def test_a_stream_that_begins_with_nonsense_ends_alone(model_dir: Path, frame: node_pb2.GatewayFrame) -> None:
    async def scenario() -> None:
        trust = Trust(SECRET)
        async with cluster(split(), model_dir, trust=trust) as served:
            node, address = next(iter(served.addresses.items()))
            async with trust.open_channel(address) as channel:
                call = node_pb2_grpc.NodeStub(channel).Connect(metadata=trust.metadata(Caller.GATEWAY, node))
                assert await refusal(call, frame) is grpc.StatusCode.INVALID_ARGUMENT
            await serves(served)

    run(scenario)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": b"123"},
        {"role": 0},
        {"hash_root": b"short"},
        {"outlook": node_pb2.Outlook(context=1, ages_s=[1.0])},
        {"hashes": b"x" * 15},
        {"request": request_id(GatewayId(5), 1)},
    ],
)
def test_a_submit_that_means_nothing_fails_alone(model_dir: Path, changes: dict[str, object]) -> None:
    async def scenario() -> None:
        trust = Trust(SECRET)
        async with cluster(split(), model_dir, trust=trust) as served:
            good = {
                "request": request_id(GatewayId(1), 1), "role": node_pb2.ROLE_GENERATE, "tokens": bytes(40),
                "hash_root": bytes(16), "output_tokens_max": 4,
            }  # fmt: skip
            submit = node_pb2.Submit(**{**good, **changes})  # type: ignore[arg-type]
            for node, address in served.addresses.items():
                async with trust.open_channel(address) as channel:
                    call = node_pb2_grpc.NodeStub(channel).Connect(metadata=trust.metadata(Caller.GATEWAY, node))
                    await call.write(node_pb2.GatewayFrame(hello=node_pb2.Hello(gateway=1, incarnation=3)))
                    assert isinstance(await call.read(), node_pb2.NodeFrame)
                    await call.write(node_pb2.GatewayFrame(submits=[submit]))
                    call.cancel()
            await serves(served)

    run(scenario)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/proc/self/fd/0", "/proc/1/fd/../../../etc/passwd", "/proc/1/fd/1\n", "", "/proc/01/fd/1", "/dev/zero"],
)
def test_no_path_but_a_nodes_own_memory_is_opened(path: str) -> None:
    arena = SharedArena(64)
    memory = arena.place([0])
    memory.path = path
    with pytest.raises(PeerUnmappable, match="is no place where nodes keep blocks"):
        PeerMemory(4).view(memory)
    arena.close()


@pytest.mark.parametrize(("name", "seal", "problem"), [("other", True, "not a node's memory"), (NAME, False, "not sealed")])
def test_memory_that_another_made_is_not_mapped(name: str, seal: bool, problem: str) -> None:
    arena = SharedArena(64)
    memory = arena.place([0])
    descriptor = os.memfd_create(name, os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 64 + len(memory.cookie))
    memory.path = f"/proc/{os.getpid()}/fd/{descriptor}"
    with pytest.raises(PeerUnmappable, match=problem):
        PeerMemory(4).view(memory)
    os.close(descriptor)
    arena.close()


def test_our_own_memory_cannot_shrink_and_is_mapped() -> None:
    arena = SharedArena(64)
    assert PeerMemory(4).view(arena.place([0])).nbytes == 64
    with pytest.raises(PermissionError):
        os.truncate(arena.path, 1)
    arena.close()


def test_a_reference_that_no_node_sealed_is_not_looked_at() -> None:
    ours, theirs = Trust(SECRET), Trust(b"guessed")
    assert ours.unsealed(ours.sealed(b"reference")) == b"reference"
    sealed = ours.sealed(b"reference")
    for forgery in (b"", b"reference", theirs.sealed(b"reference"), sealed[:-1] + b"x", b"x" + sealed[1:]):
        assert ours.unsealed(forgery) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ca": ""}, "ca, cert and key must be given together"),
        ({"key": "/nowhere/key.pem"}, "cluster.tls.key: /nowhere/key.pem: No such file or directory"),
    ],
)
def test_certificates_that_cannot_be_used_are_one_clear_line(tmp_path: Path, changes: dict[str, str], problem: str) -> None:
    made = certificates(tmp_path)
    fields = {name: getattr(made, name) for name in ("ca", "cert", "key")}
    with pytest.raises(ConfigError, match=problem):
        read_trust("secret", TlsConfig(**{**fields, **changes}))


def test_a_cluster_file_may_name_certificates() -> None:
    tls = {"ca": "a", "cert": "b", "key": "c", "name": "weft.internal"}
    config = ClusterConfig.from_mapping({"cluster": {"tls": tls}, "pools": [{"name": "p", "kind": "aggregated"}]})
    assert config.cluster.tls == TlsConfig("a", "b", "c", "weft.internal")
