"""What can go wrong, in the words of the domain. Codes live in `service.status`; nothing here knows a transport.

SegmentError
├── InvalidPromptError, InvalidImageIdError          the request says something that cannot be meant
├── UnsupportedImageError, ImageTooLargeError        the bytes are no picture, or too much of one
├── ImageNotCachedError, DigestMismatchError         the cache holds nothing, or other bytes, under this id
├── UnauthenticatedError                             nobody we know
├── OverloadedError, RateLimitedError                not now, or not so often
├── DeadlineExceededError                            not in time
└── ModelUnavailableError, DrainingError             nobody there to answer
"""


class SegmentError(Exception):
    """An error whose message is meant for the client.

    Args:
        message: One sentence that says what is wrong and what to do. It must hold no upstream text, path or key.
        field: The part of the request at fault, e.g. "prompts[0].box"; empty when no single field is.
        retry_after_s: When to come back, where that is known; None: what is usual for this kind.

    On the client's side an error also has what the service said of it:

    Attributes:
        reason: The stable name of this kind of error, e.g. "image_not_cached".
        retry_after_s: How long to wait before the same request can be answered; None where waiting does not help.
    """

    reason: str = ""
    retry_after_s: float | None = None

    def __init__(self, message: str, *, field: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class InvalidPromptError(SegmentError):
    """The prompts, or the options beside them, are malformed or out of bounds."""


class InvalidImageIdError(SegmentError):
    """The image id does not match the documented pattern, or two parts of the request name different ids."""


class UnsupportedImageError(SegmentError):
    """The bytes are not a JPEG, PNG or WebP still image that can be decoded."""


class ImageTooLargeError(SegmentError):
    """The image exceeds a limit on bytes, pixels or side; found before decoding."""


class ImageNotCachedError(SegmentError):
    """No embedding is cached under this id: send the bytes again."""


class DigestMismatchError(SegmentError):
    """The cached image has other bytes than the caller's `If-Match` names."""


class UnauthenticatedError(SegmentError):
    """The request carries no API key, or one that is not known."""


class OverloadedError(SegmentError):
    """Refused before any work was done because too much is under way."""


class RateLimitedError(SegmentError):
    """Refused before any work was done because this tenant asks more often than it may."""


class DeadlineExceededError(SegmentError):
    """The request's own deadline, or the default one, passed."""


class ModelUnavailableError(SegmentError):
    """Triton cannot be reached, or does not serve a usable model.

    Args:
        message: As in `SegmentError`.
        field: As in `SegmentError`.
        connection_broke: The connection was lost under the call, so that the same call may succeed on another one.
    """

    def __init__(self, message: str, *, field: str = "", connection_broke: bool = False) -> None:
        super().__init__(message, field=field)
        self.connection_broke = connection_broke


class DrainingError(SegmentError):
    """The process is shutting down and takes no new work."""


class StartError(Exception):
    """The process cannot start; for the person who starts it. The message says what to do."""
