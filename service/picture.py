"""Pictures as Pillow handles them: bytes to RGB pixels, and those to the encoder's square. Pure.

Only a decode process imports this: what the codecs do with bytes of strangers is its risk, not a worker's.

The resize is the original's (`ResizeLongestSide`: PIL, bilinear with antialiasing), so that pixels, and with them
masks, are the same as there.
"""

import struct
import zlib
from typing import IO

from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from service.image import ImageLimits, animated, check_size, damaged, valid_size_of

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_TEXT_BYTES = 1024 * 1024  # of a PNG's texts, which are of no use here but are inflated all the same

# What Pillow's decoders raise on damaged files, and on pictures that do not fit into the process's memory.
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, MemoryError),
    *(struct.error, zlib.error, UnidentifiedImageError, Image.DecompressionBombError),
)


def trust_own_limits() -> None:
    """Set Pillow's limits, which are the process's, to ours. Called once, at the process's start."""
    Image.MAX_IMAGE_PIXELS = None  # ours are checked before, and by `rgb_from_file`; Pillow would warn below them
    PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES


def rgb_from_file(file: IO[bytes], limits: ImageLimits) -> Image.Image:
    """Return an RGB picture, turned as a person sees it (EXIF orientation applied).

    Grey, palette, CMYK and 16-bit images become RGB; an alpha channel is dropped. Of an MPO file, a phone's JPEG with a
    preview appended, the first picture is the photograph.

    Raises:
        ImageTooLargeError: side or pixels above a limit, found in the header.
        UnsupportedImageError: not a JPEG, PNG or WebP still, or damaged.
    """
    try:
        with Image.open(file, formats=FORMATS) as picture:
            check_size(picture.width, picture.height, limits)
            if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
                raise animated()
            ImageOps.exif_transpose(picture, in_place=True)
            return _rgb_from_picture(picture)
    except DECODE_ERRORS as error:
        raise damaged() from error


def _rgb_from_picture(picture: Image.Image) -> Image.Image:
    if picture.mode == "I;16":  # Pillow's own conversion clips at 255 instead of scaling: take each high byte
        return Image.frombytes("L", picture.size, picture.tobytes("raw", "I;16")[1::2]).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def letterboxed(picture: Image.Image, input_size: int) -> Image.Image:
    """Return an RGB `picture` with its longest side resized to `input_size` S, top-left on a black S x S canvas."""
    height, width = valid_size_of((picture.height, picture.width), input_size)
    canvas = Image.new("RGB", (input_size, input_size))
    canvas.paste(picture.resize((width, height), Image.Resampling.BILINEAR))
    return canvas
