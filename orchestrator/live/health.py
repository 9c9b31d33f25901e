"""A gateway's gRPC port: the standard health service and server reflection, so that probes and `grpcurl` work."""

from typing import Any, cast

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection


class HealthServer:
    """Answers health checks; to be used from one event loop.

    Args:
        certificate: the key's and the certificate chain's PEM, to serve with TLS; None: plain.
    """

    def __init__(self, certificate: tuple[bytes, bytes] | None = None) -> None:
        self._certificate = certificate
        # Without the option a second server on the same port would share its connections instead of failing.
        self._server: grpc.aio.Server = cast(Any, grpc.aio).server(options=(("grpc.so_reuseport", 0),))
        # The stubs do not know the module that `health` opens for asyncio.
        self._servicer = cast(Any, health).aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        reflection.enable_server_reflection((health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

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
