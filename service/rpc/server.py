"""The gRPC server: our service, standard health checking, and reflection."""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from service.errors import StartError
from service.metrics import Metrics
from service.rpc.interceptors import RequestObserver
from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from service.rpc.servicer import SegmentAnythingServicer
from service.segmenter import Segmenter

SERVICE = pb.DESCRIPTOR.services_by_name["SegmentAnything"].full_name
MESSAGE_OVERHEAD_BYTES = 1024 * 1024


class RpcServer:
    """gRPC on `host`:`port`; `set_ready` is what health checks tell."""

    def __init__(self, segmenter: Segmenter, metrics: Metrics, host: str, port: int) -> None:
        self._health = HealthServicer()
        self._server: Any = grpc.aio.server(
            interceptors=[RequestObserver(metrics)],
            options=[
                ("grpc.so_reuseport", 0),  # else a second server on a taken port starts, and shares its connections
                ("grpc.max_receive_message_length", segmenter.limits.max_bytes + MESSAGE_OVERHEAD_BYTES),
            ],
        )
        pb_grpc.add_SegmentAnythingServicer_to_server(SegmentAnythingServicer(segmenter), self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        try:
            self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise StartError(f"gRPC cannot listen on {host}:{port}; set SAM_GRPC_PORT to a free port") from error

    async def start(self) -> None:
        """Take connections; health says NOT_SERVING until told otherwise."""
        await self.set_ready(ready=False)
        await self._server.start()

    async def set_ready(self, *, ready: bool) -> None:
        """Tell health checks, of the server and of the service, whether prompts can be answered."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, let those under way finish within `grace_s`, then end."""
        await self._server.stop(grace_s)
