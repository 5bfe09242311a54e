"""What an upload says it is, read from its first bytes without decoding: format, size, one picture or many. Pure.

This runs before any codec sees the bytes, in microseconds and without allocating anything of the picture's size: a bomb
costs what its header costs. Whatever passes here is decoded elsewhere, by a process that may die of it.
"""

import re
from dataclasses import dataclass
from itertools import islice
from mmap import mmap
from struct import unpack_from

from service.errors import UnsupportedImageError
from service.image import ImageLimits, animated, check_size, damaged, too_many_bytes, too_many_parts

MAX_SEGMENTS = 1024  # of a JPEG before its first scan; a photograph's profile and depth map are some hundred
MAX_CHUNKS = 8704  # in a PNG, or looked at in a WebP; 32 MiB in 4 KiB, the least that encoders make, are 8,192
MAX_SCANS = 100  # of a JPEG; a progressive photograph has about ten, and as many in what is appended to it

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; the three are tables and a reserve
JPEG_ALONE = frozenset({0x00, 0x01, *range(0xD0, 0xD8)})  # markers without a length
JPEG_SCAN, JPEG_FILL = 0xDA, 0xFF
MAX_SEARCH_BYTES = 4 * 1024 * 1024  # for a JPEG's end: 3 ms where it is missing; the decoder misses it, too
JPEG_SCAN_START = re.compile(b"\xff\xda")  # twice as fast over a long file as looking for the two bytes
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_CHUNK_BYTES = 12  # length, kind and checksum around a chunk's data
WEBP_ANIMATED = 0x02
WEBP_SIZE_MASK = 0x3FFF


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Format, and size in pixels as stored: before the EXIF orientation is applied."""

    format: str
    width: int
    height: int


def read_header(data: bytes, limits: ImageLimits) -> ImageHeader:
    """Return what `data` says of itself. Its first bytes decide which format it is: what else it may be is ignored.

    Raises:
        ImageTooLargeError: bytes, side or pixels above a limit.
        UnsupportedImageError: no JPEG, PNG or WebP, an animation, or visibly damaged or cut short.
    """
    if len(data) > limits.max_bytes:
        raise too_many_bytes(limits.max_bytes)
    if not data:
        raise UnsupportedImageError("the body is empty; send the bytes of a JPEG, PNG or WebP", field="image")
    if data.startswith(JPEG_START):
        name, size_of = "JPEG", _size_of_jpeg
    elif data.startswith(PNG_START):
        name, size_of = "PNG", _size_of_png
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        name, size_of = "WEBP", _size_of_webp
    else:
        raise UnsupportedImageError("the bytes are not a JPEG, PNG or WebP image", field="image")
    width, height, complete = size_of(data)
    check_size(width, height, limits)
    if not complete or min(width, height) < 1:
        raise damaged()
    return ImageHeader(name, width, height)


def has_too_many_scans(data: bytes | mmap) -> bool:
    """Whether a JPEG has more scans than any picture needs: each is a pass over all pixels, and may be ten bytes long.

    It takes up to 1 ms for each MiB: this is for a decode process, before it decodes.
    """
    is_jpeg = data[: len(JPEG_START)] == JPEG_START
    return is_jpeg and next(islice(JPEG_SCAN_START.finditer(data), MAX_SCANS, None), None) is not None


def _size_of_jpeg(data: bytes) -> tuple[int, int, bool]:
    """Return width, height and whether it seems to have an end, from the first frame header (ITU T.81, annex B).

    The end is looked for in files of up to 4 MiB: that takes time in the worker.
    """
    at, size = 2, None
    for _ in range(MAX_SEGMENTS):
        at = data.find(JPEG_FILL, at)  # decoders overlook what lies between segments
        if not 0 < at < len(data) - 4:
            break
        marker = data[at + 1]
        if marker == JPEG_FILL or marker in JPEG_ALONE:
            at += 1 if marker == JPEG_FILL else 2
            continue
        if marker in JPEG_FRAMES and at + 9 <= len(data) and size is None:
            size = unpack_from(">HH", data, at + 5)
        if marker == JPEG_SCAN:
            break
        at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    else:
        raise too_many_parts(f"{MAX_SEGMENTS} segments")
    if size is None:
        raise damaged()
    height, width = size
    return width, height, len(data) - at > MAX_SEARCH_BYTES or data.rfind(JPEG_END, at) > 0


def _size_of_png(data: bytes) -> tuple[int, int, bool]:
    """Return width, height and whether the pixels' chunks are all there (W3C PNG, 5 and 11)."""
    at, has_pixels, complete = len(PNG_START), False, True
    if data[at : at + 8] != b"\0\0\0\x0dIHDR" or len(data) < at + PNG_CHUNK_BYTES + 13:
        raise damaged()
    width, height = unpack_from(">II", data, at + 8)
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            break
        length, kind = unpack_from(">I4s", data, at)
        if kind == b"IEND":
            break
        if kind == b"acTL" and not has_pixels and int.from_bytes(data[at + 8 : at + 12], "big") > 1:
            raise animated()
        has_pixels |= kind == b"IDAT"
        at += PNG_CHUNK_BYTES + length
        if at > len(data) and (kind == b"IDAT" or not has_pixels):
            complete = False
    else:
        raise too_many_parts(f"{MAX_CHUNKS} chunks")
    return width, height, has_pixels and complete


def _size_of_webp(data: bytes) -> tuple[int, int, bool]:
    """Return width, height and whether all announced bytes are there (RFC 9649)."""
    if len(data) < 30:  # noqa: PLR2004 - up to the end of any first chunk's size
        raise damaged()
    complete = 8 + int.from_bytes(data[4:8], "little") <= len(data)
    kind = data[12:16]
    if kind == b"VP8X":
        if data[20] & WEBP_ANIMATED and _has_frames(data):
            raise animated()
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L" and data[20] == 0x2F:  # noqa: PLR2004 - its signature
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & WEBP_SIZE_MASK), 1 + (bits >> 14 & WEBP_SIZE_MASK)
    elif kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (side & WEBP_SIZE_MASK for side in unpack_from("<HH", data, 26))
    else:
        raise damaged()
    return width, height, complete


def _has_frames(data: bytes) -> bool:
    """Whether a WebP holds more than one frame; one alone is a still."""
    at, frames = 12, 0
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data) or frames > 1:
            break
        kind, length = unpack_from("<4sI", data, at)
        frames += kind == b"ANMF"
        at += 8 + length + length % 2
    return frames > 1
