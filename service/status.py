"""THE table: each domain error, its HTTP status, its gRPC code, its stable reason, and when to come back."""

from dataclasses import dataclass

from grpc import StatusCode

from service import errors


@dataclass(frozen=True, slots=True)
class Status:
    """How one kind of error is told to clients.

    `retry_after_s` is when to come back, unless the error itself knows better; None: retrying unchanged cannot help.
    """

    http: int
    grpc: StatusCode
    reason: str
    retry_after_s: float | None = None


STATUS: dict[type[errors.SegmentError], Status] = {
    errors.InvalidPromptError: Status(422, StatusCode.INVALID_ARGUMENT, "invalid_prompt"),
    errors.InvalidImageIdError: Status(422, StatusCode.INVALID_ARGUMENT, "invalid_image_id"),
    errors.ImageNotCachedError: Status(404, StatusCode.NOT_FOUND, "image_not_cached"),
    errors.UnsupportedImageError: Status(415, StatusCode.INVALID_ARGUMENT, "unsupported_image"),
    errors.ImageTooLargeError: Status(413, StatusCode.INVALID_ARGUMENT, "image_too_large"),
    errors.DigestMismatchError: Status(412, StatusCode.FAILED_PRECONDITION, "digest_mismatch"),
    errors.UnauthenticatedError: Status(401, StatusCode.UNAUTHENTICATED, "unauthenticated"),
    errors.OverloadedError: Status(429, StatusCode.RESOURCE_EXHAUSTED, "overloaded", retry_after_s=1),
    errors.RateLimitedError: Status(429, StatusCode.RESOURCE_EXHAUSTED, "rate_limited", retry_after_s=1),
    errors.DeadlineExceededError: Status(504, StatusCode.DEADLINE_EXCEEDED, "deadline_exceeded"),
    errors.ModelUnavailableError: Status(503, StatusCode.UNAVAILABLE, "model_unavailable", retry_after_s=2),
    errors.DrainingError: Status(503, StatusCode.UNAVAILABLE, "draining", retry_after_s=1),
}

INTERNAL = Status(500, StatusCode.INTERNAL, "internal")
INTERNAL_MESSAGE = "Internal error. The server's log has the details under request id {request_id}."


def status_of(error: BaseException) -> Status:
    """Return the row for `error`, looked up along its class hierarchy; unknown errors are `INTERNAL`."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return INTERNAL


def retry_after_s_of(error: BaseException) -> float | None:
    """Return when to come back: as the error itself says, else as usual for its kind; None: better not."""
    usual_s = status_of(error).retry_after_s
    own_s = error.retry_after_s if isinstance(error, errors.SegmentError) else None
    return usual_s if usual_s is None or own_s is None else own_s


def message_of(error: BaseException, request_id: str) -> str:
    """Return the sentence a client may read: the error's own when it is ours, nothing of it when it is not."""
    return error.message if isinstance(error, errors.SegmentError) else INTERNAL_MESSAGE.format(request_id=request_id)
