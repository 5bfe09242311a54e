"""Images as the core handles them: bytes, their digest and limits, and the encoder's input. Pure; no codec is here."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from service.errors import ImageTooLargeError, UnsupportedImageError

if TYPE_CHECKING:  # a decode process imports this file, and has no use for numpy's 14 MB
    import numpy as np
    from numpy.typing import NDArray

MAX_SIDE = 16384

# Part of every cache key: raise it when the same bytes would lead to other encoder input.
PREPROCESSING_VERSION = 1


Box = tuple[int, int, int, int]  # x0, y0, and x1, y1 without: a part of a picture, in pixels


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Bounds checked before anything is decoded."""

    max_bytes: int
    max_pixels: int


@dataclass(frozen=True, slots=True)
class EncoderInput:
    """What the encoder takes: `pixels` UINT8 [S, S, 3]; the picture is its top-left `valid_size` (height, width)."""

    pixels: "NDArray[np.uint8]"
    valid_size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """`size` (height, width) of a picture as a person sees it, or of a part, and the encoder's input made of it."""

    size: tuple[int, int]
    placed: EncoderInput


class Decoder(Protocol):
    """Turns bytes whose header was read into the encoder's input; `service.decoding` does, in processes of its own."""

    async def decode(self, data: bytes, input_size: int, box: Box | None = None) -> DecodedImage:
        """Decode a JPEG, PNG or WebP and place it, or what the box holds of it, on a canvas of S x S, the input size.

        Raises:
            ImageTooLargeError: side or pixels above a limit.
            UnsupportedImageError: it cannot be decoded, or not within the time and memory that a picture may cost.
        """


def digest_of(data: bytes) -> str:
    """Return the content digest of an upload, "sha256:<hex>"."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def valid_size_of(size: tuple[int, int], input_size: int) -> tuple[int, int]:
    """Return the (height, width) that a picture of `size` has when its longest side is resized to `input_size`."""
    scale = input_size / max(size)
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def check_size(width: int, height: int, limits: ImageLimits) -> None:
    """Raise `ImageTooLargeError` if a picture of this size is not to be decoded."""
    if max(width, height) > MAX_SIDE:
        raise ImageTooLargeError(f"the image is {width}x{height} pixels; {MAX_SIDE} a side are allowed", field="image")
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"the image has more than {limits.max_pixels} pixels; send a smaller one", field="image"
        )


def too_many_bytes(max_bytes: int) -> ImageTooLargeError:
    """Return the error for an upload above `max_bytes`; transports raise it while the bytes still arrive."""
    return ImageTooLargeError(f"the image has more than {max_bytes} bytes; send a smaller one", field="image")


def damaged() -> UnsupportedImageError:
    """Return the error for bytes that begin like a picture and do not go on like one."""
    return UnsupportedImageError("the image is truncated or damaged and cannot be decoded", field="image")


def too_many_parts(bound: str) -> UnsupportedImageError:
    """Return the error for a file of more parts than pictures have, each of which costs time to decode."""
    return UnsupportedImageError(
        f"the image has more than {bound}; save it anew, as a plain JPEG or PNG", field="image"
    )


def animated() -> UnsupportedImageError:
    """Return the error for more than one picture in a file."""
    return UnsupportedImageError("the image is animated; send a single frame", field="image")
