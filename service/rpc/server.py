"""The gRPC server: our service, standard health checking, and reflection."""

import asyncio
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.auth import Authoriser
from service.errors import StartError
from service.observer import Observer
from service.rpc.health import HealthServicer
from service.rpc.interceptors import RequestObserver
from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from service.rpc.servicer import SegmentAnythingServicer
from service.segmenter import Segmenter

SERVICE = pb.DESCRIPTOR.services_by_name["SegmentAnything"].full_name
MESSAGE_OVERHEAD_BYTES = 1024 * 1024
TAKE_S = 5.0  # for clients to take the last answers
LINGER_S = 1.0  # after that, for the end of watches to reach who reads
LOOK_EVERY_S = 0.05
NEVER_S = 86_400.0  # for gRPC's own grace: where that runs out while another call ends the server, the process crashes
REFUSED_IMAGE_FACTOR = 2  # what is larger, gRPC refuses itself: RESOURCE_EXHAUSTED, without our reason

# What others may ask of the server, in C-core's own words (grpc/impl/channel_arg_names.h).
LIMITS = [
    # Calls that came and were not looked at. Beyond the first number C-core cancels some, beyond the second all, and
    # tells neither why nor when to come back; left to itself, a thousand that come in a moment are too many for it.
    ("grpc.server.max_pending_requests", 8_192),
    ("grpc.server.max_pending_requests_hard_limit", 10_000),  # some 10 KB each
    # What has not been asked for is held at 64 KiB of each call; left to itself, C-core would let up to 128 MiB come.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: 60 KB compressed can be 60 MB, and images are already
    ("grpc.max_concurrent_streams", 256),  # more than a worker lets in at once: who is over it hears so, and waits not
    ("grpc.server_handshake_timeout_ms", 5_000),  # TLS, and what HTTP/2 begins with
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 32 * 1024),
    # Clients may look whether the connection lives, also between calls; three times too often, and it is closed.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 2),
    # And the server looks whether silent clients are still there: calls of theirs are work for nobody.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


class RpcServer:
    """gRPC on `host`:`port`, shared with other workers; `set_ready` is what health checks tell.

    With `credentials` (of `grpc.ssl_server_credentials` and its like) only over TLS.

    A client's connection stays with the worker that accepted it. So that connections spread over the workers, replaced
    ones too, each is closed at an age of `connection_age_s` (gRPC itself adds a jitter of +-10 %): the client is told,
    opens the next one, and calls under way have another `connection_grace_s`. `requests` knows those of this moment.
    """

    def __init__(  # noqa: PLR0913 - what it is composed of, by name
        self,
        segmenter: Segmenter,
        authoriser: Authoriser,
        observer: Observer,
        *,
        host: str,
        port: int,
        connection_age_s: float = 300.0,
        connection_grace_s: float = 30.0,
        credentials: Any = None,  # noqa: ANN401 - grpc has no types
    ) -> None:
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._credentials = credentials
        self._health = HealthServicer({"", SERVICE})
        max_message_bytes = REFUSED_IMAGE_FACTOR * segmenter.limits.max_bytes + MESSAGE_OVERHEAD_BYTES
        self.requests = RequestObserver(authoriser, observer, segmenter.gate, max_message_bytes)
        self._server: Any = grpc.aio.server(
            interceptors=[self.requests],
            options=[
                *LIMITS,
                ("grpc.so_reuseport", 1),  # the supervisor has made sure that only workers share the port
                ("grpc.max_connection_age_ms", round(1000 * connection_age_s)),
                ("grpc.max_connection_age_grace_ms", round(1000 * connection_grace_s)),
                ("grpc.max_receive_message_length", max_message_bytes),
            ],
        )
        pb_grpc.add_SegmentAnythingServicer_to_server(SegmentAnythingServicer(segmenter), self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> None:
        """Take connections. Health says NOT_SERVING until told otherwise.

        Raises:
            StartError: the port is taken.
        """
        try:
            if self._credentials is None:  # it listens from here on: not before it can be served
                self._server.add_insecure_port(self._address)
            else:
                self._server.add_secure_port(self._address, self._credentials)
        except RuntimeError as error:
            raise StartError(f"gRPC cannot listen on {self._address}; set SAM_GRPC_PORT to a free port") from error
        await self._server.start()

    def set_ready(self, *, ready: bool) -> None:
        """Tell health checks, of the server and of the service, whether prompts can be answered."""
        self._health.set_ready(ready=ready)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, let requests under way finish within `grace_s`, then end.

        Who does not take its answer is waited for a little. Watches of health and talks with reflection are no
        requests: nobody waits for them, and some would never end.
        """
        self._health.drain()
        stopping = asyncio.create_task(self._server.stop(NEVER_S))
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await _until_empty(self.requests.under_way, stopping)
                with suppress(TimeoutError):
                    async with asyncio.timeout(TAKE_S):
                        await _until_empty(self.requests.answering, stopping)
                await asyncio.wait([stopping], timeout=LINGER_S)
        await self._server.stop(None)
        await stopping


async def _until_empty(tasks: AbstractSet[object], stopping: asyncio.Task[None]) -> None:
    """Return when there are none of `tasks` any more, or the server has ended."""
    while tasks and not stopping.done():
        await asyncio.wait([stopping], timeout=LOOK_EVERY_S)
