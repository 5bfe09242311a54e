"""The Python client: encode an image once, then turn clicks and boxes into masks.

    from service.client import SegmentClient

    with SegmentClient("127.0.0.1:50051") as client:
        photo = client.image("photo.jpg")
        best = photo.segment(points=[(320, 240)])[0]
        best.array  # bool [height, width]

`AsyncSegmentClient` is the same with `await`. It needs NumPy, Pillow, gRPC and protobuf: nothing of the gateway's.
Errors are those of `service.errors`, all of them `SegmentError` with `reason`, `field` and `retry_after_s`, and
`UnreachableError` and `ServiceError` for what only a client meets.
"""

from service.client.asynchronous import AsyncImageHandle, AsyncSegmentClient
from service.client.blocking import ImageHandle, SegmentClient
from service.client.connections import Tls
from service.client.failures import ServiceError, UnreachableError
from service.client.masks import Mask, Record
from service.client.picture import ImageSource, ModelFacts, Picture
from service.client.prompts import EverythingParameters, Progress, Prompt
from service.errors import (
    DeadlineExceededError,
    DigestMismatchError,
    DrainingError,
    ImageNotCachedError,
    ImageTooLargeError,
    InvalidImageIdError,
    InvalidPromptError,
    ModelUnavailableError,
    OverloadedError,
    RateLimitedError,
    SegmentError,
    UnauthenticatedError,
    UnsupportedImageError,
)

__all__ = [
    "AsyncImageHandle",
    "AsyncSegmentClient",
    "DeadlineExceededError",
    "DigestMismatchError",
    "DrainingError",
    "EverythingParameters",
    "ImageHandle",
    "ImageNotCachedError",
    "ImageSource",
    "ImageTooLargeError",
    "InvalidImageIdError",
    "InvalidPromptError",
    "Mask",
    "ModelFacts",
    "ModelUnavailableError",
    "OverloadedError",
    "Picture",
    "Progress",
    "Prompt",
    "RateLimitedError",
    "Record",
    "SegmentClient",
    "SegmentError",
    "ServiceError",
    "Tls",
    "UnauthenticatedError",
    "UnreachableError",
    "UnsupportedImageError",
]
