"""Image intake: bytes to the encoder's input, limits first. Pure.

The resize is the original's (`ResizeLongestSide`: PIL, bilinear with antialiasing), so that pixels, and with them
masks, are the same as there.
"""

import hashlib
import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from service.errors import ImageTooLargeError, UnsupportedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_SIDE = 16384

# Part of every cache key: raise it when the same bytes would lead to other encoder input.
PREPROCESSING_VERSION = 1

# What Pillow's decoders raise on damaged files.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Bounds checked before anything is decoded."""

    max_bytes: int
    max_pixels: int


@dataclass(frozen=True, slots=True)
class EncoderInput:
    """What the encoder takes: `pixels` UINT8 [S, S, 3]; the picture is its top-left `valid_size` (height, width)."""

    pixels: NDArray[np.uint8]
    valid_size: tuple[int, int]


def digest_of(data: bytes) -> str:
    """Return the content digest of an upload, "sha256:<hex>"."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def too_many_bytes(max_bytes: int) -> ImageTooLargeError:
    """Return the error for an upload above `max_bytes`; transports raise it while the bytes still arrive."""
    return ImageTooLargeError(f"the image has more than {max_bytes} bytes; send a smaller one", field="image")


def decode_image(data: bytes, limits: ImageLimits) -> NDArray[np.uint8]:
    """Return RGB pixels, UINT8 [height, width, 3], turned as a person sees the picture (EXIF orientation applied).

    Grey, palette, CMYK and 16-bit images become RGB; an alpha channel is dropped.

    Raises:
        ImageTooLargeError: bytes, side or pixels above a limit, found in the header.
        UnsupportedImageError: not a JPEG, PNG or WebP still, or damaged.
    """
    if len(data) > limits.max_bytes:
        raise too_many_bytes(limits.max_bytes)
    if not data:
        raise UnsupportedImageError("the body is empty; send the bytes of a JPEG, PNG or WebP", field="image")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check_header(picture, limits)
            picture.load()
            return np.asarray(_rgb_from_picture(ImageOps.exif_transpose(picture)))
    except UnidentifiedImageError as error:
        raise UnsupportedImageError("the bytes are not a JPEG, PNG or WebP image", field="image") from error
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(limits) from error
    except DECODE_ERRORS as error:
        raise UnsupportedImageError("the image is truncated or damaged and cannot be decoded", field="image") from error


def trust_own_limits() -> None:
    """Turn off Pillow's process-wide pixel limit, which would warn below ours. Called once, at the process's start."""
    Image.MAX_IMAGE_PIXELS = None


def _check_header(picture: Image.Image, limits: ImageLimits) -> None:
    if max(picture.size) > MAX_SIDE:
        raise ImageTooLargeError(f"the image is {_by(picture)} pixels; {MAX_SIDE} a side are allowed", field="image")
    if picture.width * picture.height > limits.max_pixels:
        raise _too_many_pixels(limits)
    # A phone's MPO file is a JPEG with a preview appended: its first picture is the photograph.
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
        raise UnsupportedImageError("the image is animated; send a single frame", field="image")


def _too_many_pixels(limits: ImageLimits) -> ImageTooLargeError:
    return ImageTooLargeError(f"the image has more than {limits.max_pixels} pixels; send a smaller one", field="image")


def _by(picture: Image.Image) -> str:
    return f"{picture.width}x{picture.height}"


def _rgb_from_picture(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        grey = (np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8)
        picture = Image.fromarray(grey)
    return picture.convert("RGB")


def letterbox(rgb: NDArray[np.uint8], input_size: int) -> EncoderInput:
    """Resize `rgb` [height, width, 3] to longest side `input_size` S and place it top-left on an S x S canvas."""
    height, width = rgb.shape[:2]
    scale = input_size / max(height, width)
    valid_height, valid_width = (max(1, int(side * scale + 0.5)) for side in (height, width))
    resized = Image.fromarray(rgb).resize((valid_width, valid_height), Image.Resampling.BILINEAR)
    pixels = np.zeros((input_size, input_size, 3), np.uint8)
    pixels[:valid_height, :valid_width] = np.asarray(resized)
    return EncoderInput(pixels, (valid_height, valid_width))
