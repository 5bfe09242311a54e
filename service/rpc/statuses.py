"""Errors to gRPC statuses, by the table."""

import math

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from service.call import current_request_id
from service.errors import SegmentError
from service.status import message_of, retry_after_s_of, status_of

DOMAIN = "sam"
REQUEST_ID = "x-request-id"


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
    status, message = status_of(error), message_of(error, current_request_id())
    field = error.field if isinstance(error, SegmentError) else ""
    info = error_details_pb2.ErrorInfo(reason=status.reason, domain=DOMAIN, metadata={"field": field} if field else {})
    rich = status_pb2.Status(code=status.grpc.value[0], message=message)
    rich.details.add().Pack(info)
    trailers: list[tuple[str, str | bytes]] = [(REQUEST_ID, current_request_id())]
    retry_after_s = retry_after_s_of(error)
    if retry_after_s is not None:
        wait_ms = math.ceil(1000 * retry_after_s)
        delay = Duration(seconds=wait_ms // 1000, nanos=wait_ms % 1000 * 1_000_000)
        rich.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        trailers.append(("grpc-retry-pushback-ms", str(wait_ms)))
    trailers.append(("grpc-status-details-bin", rich.SerializeToString()))
    return _Status(status.grpc, message, tuple(trailers))
