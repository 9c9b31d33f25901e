"""Who may speak on the channels inside a cluster: gateways to nodes and stores, nodes to each other, stores, FFN ranks, drafters.

Reaching a port proves nothing. Every call carries a token, made from the cluster's secret for one kind of caller and one node
or store, so that a peer's token opens no gateway's stream and one node's none of another's; and the number of the protocol it
speaks. With certificates channels are mutual TLS besides: without, tokens can be read off the network, so that network must be
trusted.

See also: `codec.py` for what is said on the channels.
"""

import hashlib
import hmac
import os
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import grpc
import grpc.aio

from orchestrator.core.config import ConfigError, TlsConfig
from orchestrator.core.types import NodeId, RankName, StoreId
from orchestrator.wire import codec

#: Raised by every change after which an older process would misunderstand a newer one.
PROTOCOL = 5
TOKEN_METADATA, PROTOCOL_METADATA = "weft-token", "weft-protocol"
_LABEL = b"weft channel\0"
_SEAL_BYTES = hashlib.sha256().digest_size

Metadata = tuple[tuple[str, str], ...]


class Caller(StrEnum):
    """Who calls: the kind of token."""

    GATEWAY = "gateway"
    PEER = "peer"
    #: A node, and a gateway, to a store.
    ATTACHED = "attached node"
    STORE_GATEWAY = "store's gateway"
    #: An attention rank, to an FFN rank.
    RANK = "attention rank"
    #: A node, to a process that drafts for it.
    DRAFTED = "node that is drafted for"


class Refused(StrEnum):
    """Why a call was not served; labels of a metric."""

    TOKEN = "token"
    PROTOCOL = "protocol"
    NODE = "node"
    MALFORMED = "malformed"


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files' contents: who is believed, and what one's own side shows."""

    ca: bytes
    chain: bytes
    key: bytes
    #: The name that every process's certificate bears; empty: the host's own.
    name: str

    def context(self, server: bool) -> ssl.SSLContext:
        """Return either side's settings for connections that are no gRPC channels."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.ca.decode())
        # Python reads a key from files alone: this one is in memory, and gone at once.
        descriptor = os.memfd_create("weft-tls", os.MFD_CLOEXEC)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(self.key + b"\n" + self.chain)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        return context


class Trust:
    """What a process knows of its cluster; the same in all of them.

    Args:
        secret: the cluster's; must not be empty.
        certificates: for mutual TLS; None for plain channels.
    """

    def __init__(self, secret: bytes, certificates: Certificates | None = None) -> None:
        assert secret, "a cluster without a secret lets everybody in"
        self._secret = secret
        self._certificates = certificates

    def metadata(self, caller: Caller, node: NodeId | StoreId | RankName) -> Metadata:
        """Return what a call to a node, a store, an FFN rank or a process that drafts must carry."""
        return (
            (codec.NODE_METADATA, node),
            (PROTOCOL_METADATA, str(PROTOCOL)),
            (TOKEN_METADATA, self._token(caller, node)),
        )

    def problem(
        self, caller: Caller, node: NodeId | StoreId | RankName, metadata: Iterable[tuple[str, str | bytes]]
    ) -> tuple[Refused, str] | None:
        """Return why a call is not to be served by who was called, None if it is. Takes as long for any wrong token."""
        given = {name: value for name, value in metadata if isinstance(value, str)}
        expected = self._token(caller, node)
        if not hmac.compare_digest(given.get(TOKEN_METADATA, "").encode(), expected.encode()):
            return Refused.TOKEN, f"the {caller}'s token is missing or wrong"
        spoken = given.get(PROTOCOL_METADATA)
        if spoken != str(PROTOCOL):
            return (
                Refused.PROTOCOL,
                f"protocol {PROTOCOL} is spoken here, not {spoken or 'an unnamed one'}: restart the older side",
            )
        return None

    def open_channel(self, address: str) -> grpc.aio.Channel:
        """Return a channel to a node, not connected yet."""
        if self._certificates is None:
            return grpc.aio.insecure_channel(address, options=codec.CHANNEL_OPTIONS)
        shown = self._certificates
        named = (("grpc.ssl_target_name_override", shown.name),) if shown.name else ()
        credentials = grpc.ssl_channel_credentials(shown.ca, shown.key, shown.chain)
        return grpc.aio.secure_channel(address, credentials, options=(*codec.CHANNEL_OPTIONS, *named))

    def listen(self, server: grpc.aio.Server, address: str) -> int:
        """Have a server listen and return its port; with certificates callers must show theirs too. Raises `RuntimeError`."""
        if self._certificates is None:
            return server.add_insecure_port(address)
        shown = self._certificates
        credentials = grpc.ssl_server_credentials([(shown.key, shown.chain)], shown.ca, require_client_auth=True)
        return server.add_secure_port(address, credentials)

    def secured(self, connection: socket.socket, called: str | None = None) -> socket.socket:
        """Return a connection, no gRPC channel, as those are: with certificates both sides show theirs, without it is plain.

        `called` is the address that was connected to; None: the other side connected. Raises `OSError`.
        """
        if self._certificates is None:
            return connection
        name = None if called is None else self._certificates.name or called
        return self._certificates.context(server=called is None).wrap_socket(
            connection, server_side=called is None, server_hostname=name
        )

    def sealed(self, data: bytes) -> bytes:
        """Return bytes with a seal in front that only this cluster's processes can make."""
        return self._seal(data) + data

    def unsealed(self, data: bytes) -> bytes | None:
        """Return the bytes behind a seal, None if it is not this cluster's."""
        seal, rest = data[:_SEAL_BYTES], data[_SEAL_BYTES:]
        return rest if hmac.compare_digest(seal, self._seal(rest)) else None

    def _seal(self, data: bytes) -> bytes:
        return hmac.new(self._secret, b"weft seal\0" + data, hashlib.sha256).digest()

    def _token(self, caller: Caller, node: NodeId | StoreId | RankName) -> str:
        return hmac.new(self._secret, _LABEL + f"{caller}\0{node}".encode(), hashlib.sha256).hexdigest()


def read_trust(secret: str, tls: TlsConfig) -> Trust:
    """Return what a cluster file says, with its certificates read. Raises `ConfigError` naming the field."""
    if not tls.cert:
        return Trust(secret.encode())
    ca, chain, key = (read_pem(getattr(tls, name), f"cluster.tls.{name}") for name in ("ca", "cert", "key"))
    return Trust(secret.encode(), Certificates(ca, chain, key, tls.name))


def read_pem(path: str, where: str) -> bytes:
    """Return a PEM file's content. Raises `ConfigError` naming the field it stands in."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(where, f"{path}: {error.strerror}") from None
    if b"-----BEGIN " not in content:
        raise ConfigError(where, f"{path}: holds no PEM block")
    return content
