"""Files that are made to hurt whoever decodes them. Each is small; what it claims, or becomes, is not."""

import io
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image

MIB = 1024 * 1024


def saved(picture: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def half_red(width: int = 30, height: int = 20) -> Image.Image:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, pixels: bytes = b"", *before_pixels: bytes) -> bytes:
    """A grey PNG that claims a size, whatever `pixels` (compressed) hold."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + b"".join(before_pixels) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    )


def small_png(*before_pixels: bytes) -> bytes:
    """A PNG of 2 x 1 grey pixels, and chunks in front of them."""
    return png(2, 1, zlib.compress(b"\0\x55\xaa"), *before_pixels)


def zeros(nbytes: int) -> bytes:
    """`nbytes` zeros, compressed a thousandfold."""
    return zlib.compress(bytes(nbytes), 9)


def jpeg(width: int, height: int) -> bytes:
    """A real JPEG whose frame header claims another size."""
    data = bytearray(saved(half_red(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp(width: int, height: int, flags: int = 0) -> bytes:
    """An extended WebP that claims a canvas; the picture on it is small."""
    inner = saved(half_red(), "WEBP")[12:]
    canvas = bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def animation(image_format: str) -> bytes:
    frames = [half_red(), half_red().rotate(90)]
    return saved(frames[0], image_format, save_all=True, append_images=frames[1:], duration=100)


def runaway_jpeg(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last of six scans comes again and again: a small file, and much work."""
    data = saved(Image.new("L", (side, side)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last : data.rindex(b"\xff\xd9")]
    return data[:last] + scan * scans + b"\xff\xd9"


def endless_jpeg(nbytes: int) -> bytes:
    """A JPEG of so many bytes, whose end marker does not come."""
    photo = saved(half_red(), "JPEG").removesuffix(b"\xff\xd9")
    return photo + bytes(nbytes - len(photo))


@cache
def refused_unread() -> dict[str, tuple[bytes, str]]:
    """What is refused by its header alone, and the reason."""
    whole = {kind: saved(half_red(), kind) for kind in ("JPEG", "PNG", "WEBP")}
    photo = whole["JPEG"]
    return {
        "one byte": (b"\xff", "unsupported_image"),
        "a JPEG's first three bytes": (photo[:3], "unsupported_image"),
        "a PNG's signature": (whole["PNG"][:8], "unsupported_image"),
        "a WebP's first bytes": (whole["WEBP"][:12], "unsupported_image"),
        "pixel bomb, PNG": (png(50_000, 50_000, zeros(MIB)), "image_too_large"),
        "pixel bomb, PNG at its format's limit": (png(2**31 - 1, 2**31 - 1), "image_too_large"),
        "65535 a side, JPEG": (jpeg(65535, 65535), "image_too_large"),
        "65535 wide, JPEG": (jpeg(65535, 1), "image_too_large"),
        "16383 a side, WebP": (webp(16383, 16383), "image_too_large"),
        "16 million a side, WebP": (webp(2**24, 2**24), "image_too_large"),
        "no pixels, PNG": (png(0, 0), "unsupported_image"),
        "no pixels, JPEG": (jpeg(0, 0), "unsupported_image"),
        "truncated JPEG": (photo[: len(photo) * 3 // 4], "unsupported_image"),
        "truncated PNG": (whole["PNG"][:-20], "unsupported_image"),
        "truncated WebP": (whole["WEBP"][:-4], "unsupported_image"),
        "GIF": (saved(half_red(), "GIF"), "unsupported_image"),
        "BMP": (saved(half_red(), "BMP"), "unsupported_image"),
        "TIFF": (saved(half_red(), "TIFF"), "unsupported_image"),
        "animated GIF": (animation("GIF"), "unsupported_image"),
        "animated PNG": (animation("PNG"), "unsupported_image"),
        "animated WebP": (animation("WEBP"), "unsupported_image"),
        "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported_image"),
        "SVG": (
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
            "unsupported_image",
        ),
        "polyglot: a PDF that holds a JPEG": (b"%PDF-1.7\n" + photo, "unsupported_image"),
        "polyglot: a GIF that holds a JPEG": (b"GIF89a" + photo, "unsupported_image"),
        "polyglot: a script that holds a JPEG": (b"#!/bin/sh\n" + photo, "unsupported_image"),
        "endless segments before the scan, JPEG": (
            photo[: photo.index(b"\xff\xda")] + b"\xff\xfe\0\2" * 500_000 + photo[photo.index(b"\xff\xda") :],
            "unsupported_image",
        ),
        "endless chunks, PNG": (png(2, 1, b"", *[png_chunk(b"IDAT", b"")] * 100_000), "unsupported_image"),
        "endless segments, JPEG": (b"\xff\xd8" + b"\xff\xfe\0\2" * 500_000 + photo[2:], "unsupported_image"),
    }


@cache
def refused_in_a_process() -> dict[str, bytes]:
    """What looks like a picture until a decoder is at it."""
    full = zeros(MIB)
    huge = png_chunk(b"zTXt", b"text\0\0" + zeros(8 * MIB))
    many = [png_chunk(b"zTXt", b"text%d\0\0" % number + full) for number in range(64)]
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    photo = saved(Image.fromarray(noise), "JPEG")
    long_photo = saved(Image.fromarray(np.tile(noise, (40, 40, 1))), "JPEG", quality=95)
    return {
        "zTXt bomb": small_png(huge),
        "64 zTXt bombs": small_png(*many),
        "iTXt bomb": small_png(png_chunk(b"iTXt", b"text\0\1\0\0\0" + zeros(8 * MIB))),
        "iCCP bomb": small_png(png_chunk(b"iCCP", b"profile\0\0" + zeros(8 * MIB))),
        "a PNG without pixels": png(1000, 1000),
        "a PNG with too few pixels": png(1000, 1000, zlib.compress(bytes(1000))),
        "a WebP whose canvas is larger than its picture": webp(4000, 4000),
        "a scan that comes 20,000 times, JPEG": runaway_jpeg(2000, 20_000),
        "a long JPEG that is cut off": long_photo[: len(long_photo) * 3 // 4],
        "two frame headers, JPEG": photo.replace(b"\xff\xc0", b"\xff\xc0\0\x0b\x08\0\x10\0\x10\1\1\x11\0\xff\xc0", 1),
    }


def accepted() -> dict[str, bytes]:
    """What is odd, and a picture all the same."""
    photo = saved(half_red(), "JPEG")
    return {
        "a phone's MPO": saved(half_red(), "MPO", save_all=True, append_images=[half_red(8, 6)]),
        "polyglot: a JPEG with an archive behind it": photo + b"PK\3\4" + bytes(1000),
        "polyglot: a JPEG with a script in a comment": photo[:2]
        + b"\xff\xfe\0\x1b*/=1;alert('hello');//1234"
        + photo[2:],
        "a JPEG of 96 scans": runaway_jpeg(100, 90),
        "an animated PNG of one frame": saved(half_red(), "PNG", save_all=True, append_images=[]),
        "a PNG with some text": small_png(png_chunk(b"tEXt", b"Title\0" + b"a" * 10_000)),
        "one pixel": saved(half_red(1, 1), "PNG"),
        "16384 wide": saved(half_red(16384, 1), "PNG"),
    }
