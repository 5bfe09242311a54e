"""gRPC's errors to the domain's: by the reason that the service gave, or by the bare status when it gave none."""

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2

from service.errors import DeadlineExceededError, SegmentError
from service.status import STATUS

DOMAIN = "sam"
KINDS: dict[str, type[SegmentError]] = {status.reason: kind for kind, status in STATUS.items()}
PUSHBACK = "grpc-retry-pushback-ms"
DETAILS = "grpc-status-details-bin"


class UnreachableError(SegmentError):
    """Nobody answers at the target, or the connection was lost."""

    reason = "unreachable"
    retry_after_s: float | None = 0.0  # at once is not too early


class ServiceError(SegmentError):
    """An error that the service, or something before it, gave and that has no kind of its own; see `reason`."""


def error_from_rpc(failure: grpc.RpcError) -> SegmentError:
    """Return what `failure` means, with gRPC's error as its cause."""
    details = _details_of(failure)
    info = error_details_pb2.ErrorInfo()
    if any(each.Unpack(info) for each in details) and info.domain == DOMAIN:
        error = KINDS.get(info.reason, ServiceError)(failure.details(), field=info.metadata.get("field", ""))
        error.reason = info.reason
        error.retry_after_s = retry_after_s_of(failure)
    else:
        error = _error_from_bare_status(failure)
    error.__cause__ = failure
    return error


def retry_after_s_of(failure: grpc.RpcError) -> float | None:
    """Return how long the service asks to wait: by gRPC's pushback (a negative one says never), else by RetryInfo."""
    pushback = _trailers_of(failure).get(PUSHBACK)
    if pushback is not None:
        return int(pushback) / 1000 if str(pushback).isdecimal() else None
    info = error_details_pb2.RetryInfo()
    if any(each.Unpack(info) for each in _details_of(failure)):
        return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return None


def _error_from_bare_status(failure: grpc.RpcError) -> SegmentError:
    """Return the error of a status without our details: gRPC's own, or that of a proxy."""
    match failure.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            error: SegmentError = DeadlineExceededError("the deadline passed before the service answered")
            error.reason = STATUS[DeadlineExceededError].reason
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:  # we cancel nothing: the other side went away
            error = UnreachableError(f"the service cannot be reached: {failure.details()}")
        case code:
            error = ServiceError(f"{code.name}: {failure.details()}")
            error.reason = code.name.lower()
            error.retry_after_s = retry_after_s_of(failure)
    return error


def _details_of(failure: grpc.RpcError) -> list[Any]:
    data = _trailers_of(failure).get(DETAILS)
    return list(status_pb2.Status.FromString(data).details) if isinstance(data, bytes) else []


def _trailers_of(failure: grpc.RpcError) -> dict[str, str | bytes]:
    return dict(failure.trailing_metadata() or ())
