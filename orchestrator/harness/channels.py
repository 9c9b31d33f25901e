"""How harnesses reach a gateway's gRPC port, and what they are told when that fails.

CacheError
 ├─ Unreachable    nobody answers there, or not in time
 ├─ KeyRefused     the key stands for nobody
 └─ CallRefused    the message is more than is taken, or means nothing
"""

from dataclasses import dataclass

import grpc
import grpc.aio

#: Seconds that a call may take.
CALL_S_MAX = 10.0
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)
_REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED)


class CacheError(Exception):
    """A call to the cache API failed; nothing can be said of what it asked for."""


class Unreachable(CacheError):
    """Nobody answers there, or not in time."""


class KeyRefused(CacheError):
    """The key stands for nobody."""


class CallRefused(CacheError):
    """A message is more than is taken, or means nothing."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """Where a gateway's gRPC port is, and how to be believed there."""

    #: HOST:PORT.
    address: str
    #: A tenant's key; empty where none is asked for.
    key: str = ""
    #: PEM of certificates that are believed: the port is served with TLS. None: plain.
    certificates: bytes | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes along with every call."""
        return (("authorization", f"Bearer {self.key}"),) if self.key else ()


def failure(error: grpc.RpcError, address: str) -> CacheError:
    """Return an error of gRPC as what it means here."""
    # Clients that block are told by a call, those of asyncio by an error that has the same to say and is none.
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError), "a call that failed tells its status"
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return KeyRefused(f"{address}: {details}")
    if code in _REFUSED:
        return CallRefused(f"{address}: {details}")
    return Unreachable(f"{address}: {details or code.name}")
