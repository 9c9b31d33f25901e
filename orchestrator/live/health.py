"""A gateway's gRPC port: the cache API, the standard health service and server reflection, so that probes and `grpcurl` work."""

from typing import Any, cast

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from orchestrator.live.cache_service import CacheService
from orchestrator.wire import cache_pb2, cache_pb2_grpc
from orchestrator.wire.codec import MESSAGE_BYTES_MAX


class HealthServer:
    """Answers health checks; to be used from one event loop.

    Args:
        certificate: the key's and the certificate chain's PEM, to serve with TLS; None: plain.
        cache: answers harnesses; None: nobody does.
        message_bytes_max: of a message that is read.
    """

    def __init__(
        self,
        certificate: tuple[bytes, bytes] | None = None,
        cache: CacheService | None = None,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
    ) -> None:
        self._certificate = certificate
        # Without the first option a second server on the same port would share its connections instead of failing.
        options = (("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", message_bytes_max))
        self._server: grpc.aio.Server = cast(Any, grpc.aio).server(options=options)
        # The stubs do not know the module that `health` opens for asyncio.
        self._servicer = cast(Any, health).aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        names = [health.SERVICE_NAME, reflection.SERVICE_NAME]
        if cache is not None:
            # The generated function has no types.
            cast(Any, cache_pb2_grpc).add_CacheControlServicer_to_server(cache, self._server)
            names.append(cache_pb2.DESCRIPTOR.services_by_name["CacheControl"].full_name)
        reflection.enable_server_reflection(tuple(names), self._server)

    async def start(self, host: str, port: int) -> int:
        """Listen and return the port, the given one unless that is 0. Raises `OSError` if it is taken."""
        try:
            if self._certificate is None:
                bound = self._server.add_insecure_port(f"{host}:{port}")
            else:
                credentials = grpc.ssl_server_credentials([self._certificate])
                bound = self._server.add_secure_port(f"{host}:{port}", credentials)
        except RuntimeError as error:
            raise OSError(f"gRPC cannot listen on {host}:{port}: is the port in use?") from error
        await self._server.start()
        await self.serving(True)
        return bound

    async def serving(self, up: bool) -> None:
        """Say whether requests are taken."""
        status = health_pb2.HealthCheckResponse.SERVING if up else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._servicer.set("", status)

    async def stop(self) -> None:
        """Stop listening."""
        await self._server.stop(0.5)
