"""Channels to the service: how they are opened, and the pool that calls go over, blocking or asyncio."""

import itertools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from service.client.conversations import Call
from service.errors import UnauthenticatedError
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc

OPTIONS = (
    # Equal channels would share one connection; a connection stays with the worker that accepted it.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),  # many masks with their logits are many megabytes
    # A gateway that restarts is back in seconds: gRPC's own 20 s and more between looks would outlast deadlines.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


@dataclass(frozen=True, slots=True)
class Tls:
    """How to check the service's certificate: PEM of the authorities (None: the usual ones), and a client's own pair.

    `server_name` is the name that the certificate must have, if it is not the target's.
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where the service is and who calls; an API key travels in the clear unless there is `tls`."""

    address: str
    api_key: str | None
    tls: Tls | None
    channels: int

    def __post_init__(self) -> None:
        if self.api_key is not None and not _fits_in_metadata(self.api_key):
            error = UnauthenticatedError("the API key has characters that no key has", field="authorization")
            error.reason = "unauthenticated"
            raise error

    def channel(self, library: ModuleType) -> Any:  # noqa: ANN401 - grpc has no types
        """Open a channel of `grpc` or of `grpc.aio`."""
        if self.tls is None:
            return library.insecure_channel(self.address, options=OPTIONS)
        credentials = grpc.ssl_channel_credentials(
            self.tls.root_certificates, self.tls.private_key, self.tls.certificate_chain
        )
        name = self.tls.server_name
        options = (*OPTIONS, ("grpc.ssl_target_name_override", name)) if name else OPTIONS
        return library.secure_channel(self.address, credentials, options=options)


class Pool:
    """A few channels, of `grpc` or `grpc.aio`, taken in turn; safe to share between threads."""

    def __init__(self, library: ModuleType, target: Target) -> None:
        self._target = target
        self.channels = [target.channel(library) for _ in range(target.channels)]
        self._methods = itertools.cycle([_methods_of(channel) for channel in self.channels])

    def start(self, call: Call) -> Any:  # noqa: ANN401 - a message, or what one awaits or iterates
        """Make the call over the next channel; what it returns is `grpc`'s or `grpc.aio`'s."""
        metadata = []
        if call.image_id and _fits_in_metadata(call.image_id):  # what does not, the service refuses in its own words
            metadata.append(("x-image-id", call.image_id))  # load balancers hash on it
        if self._target.api_key:
            metadata.append(("authorization", f"Bearer {self._target.api_key}"))
        return next(self._methods)[call.method](call.request, timeout=call.timeout_s, metadata=metadata)


def _fits_in_metadata(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _methods_of(channel: Any) -> dict[str, Any]:  # noqa: ANN401 - grpc has no types
    stubs = (pb_grpc.SegmentAnythingStub(channel), health_pb2_grpc.HealthStub(channel))  # type: ignore[no-untyped-call]
    return {name: method for stub in stubs for name, method in vars(stub).items()}
