"""Errors to gRPC statuses, by the table; and one line of metrics a call."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from service.admission.permits import Permits
from service.errors import DeadlineExceededError, SegmentError
from service.logs import log_failure
from service.metrics import CANCELLED, OK, Metrics
from service.rpc.wire import message_from_bytes
from service.status import STATUS, message_of, retry_after_s_of, status_of

log = logging.getLogger(__name__)

DOMAIN = "sam"
SERVICE_PREFIX = "/sam.v1."


class _Status(grpc.Status):  # type: ignore[misc] # grpc has no types
    """What `ServicerContext.abort_with_status` takes."""

    def __init__(
        self, code: grpc.StatusCode, details: str, trailing_metadata: tuple[tuple[str, str | bytes], ...]
    ) -> None:
        self.code = code
        self.details = details
        self.trailing_metadata = trailing_metadata


def status_from_error(error: BaseException) -> grpc.Status:
    """Return the gRPC status for `error`: code and sentence, ErrorInfo with the reason, RetryInfo and pushback."""
    status, message = status_of(error), message_of(error)
    field = error.field if isinstance(error, SegmentError) else ""
    info = error_details_pb2.ErrorInfo(reason=status.reason, domain=DOMAIN, metadata={"field": field} if field else {})
    rich = status_pb2.Status(code=status.grpc.value[0], message=message)
    rich.details.add().Pack(info)
    trailers: list[tuple[str, str | bytes]] = []
    retry_after_s = retry_after_s_of(error)
    if retry_after_s is not None:
        wait_ms = math.ceil(1000 * retry_after_s)
        delay = Duration(seconds=wait_ms // 1000, nanos=wait_ms % 1000 * 1_000_000)
        rich.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        trailers.append(("grpc-retry-pushback-ms", str(wait_ms)))
    trailers.append(("grpc-status-details-bin", rich.SerializeToString()))
    return _Status(status.grpc, message, tuple(trailers))


class RequestObserver(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc has no types
    """Turns errors into statuses and counts each call by method and outcome."""

    def __init__(self, metrics: Metrics, permits: Permits) -> None:
        self._metrics = metrics
        self._permits = permits

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        """Wrap the handler of one of our methods, which take one message each; leave health and reflection alone."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(SERVICE_PREFIX):
            return handler
        wrap = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        return wrap(
            self._observed(details.method.rpartition("/")[2], handler),
            response_serializer=handler.response_serializer,
        )

    def _observed(
        self, route: str, handler: grpc.RpcMethodHandler
    ) -> Callable[[bytes, grpc.aio.ServicerContext], Awaitable[Message | None]]:
        """Return the handler, observed; one that streams writes its messages itself and returns none."""
        handle = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def observed(data: bytes, context: grpc.aio.ServicerContext) -> Message | None:
            start_s, outcome = monotonic(), OK
            try:
                with self._permits.body() as grow_body_to:
                    grow_body_to(len(data))
                    request = message_from_bytes(data, handler.request_deserializer)
                    answer: Message | None = await handle(request, context)
                return answer  # noqa: TRY300 - what is below is for failures
            except asyncio.CancelledError:
                left_s = context.time_remaining()  # gRPC itself cancels a call whose deadline has passed
                outcome = CANCELLED if left_s is None or left_s > 0 else STATUS[DeadlineExceededError].reason
                raise
            except Exception as error:  # noqa: BLE001 - the one place of this transport where errors end
                outcome = status_of(error).reason
                log_failure(log, error)
                failure = status_from_error(error)
            finally:
                self._metrics.request("grpc", route, outcome, monotonic() - start_s)
            await context.abort_with_status(failure)
            raise AssertionError("abort_with_status returned")

        return observed
