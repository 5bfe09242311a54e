"""Pictures, mutated: bytes changed, taken out, doubled, swapped, set to what parsers stumble over. Seeded."""

from collections.abc import Iterator
from random import Random

import numpy as np
from PIL import Image

from tests.bombs import animation, half_red, saved

INTERESTING = (b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff")


def originals() -> list[bytes]:
    """Small pictures of each format and of the kinds that each decoder has code of its own for."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        saved(noise, "JPEG"),
        saved(noise, "JPEG", progressive=True, exif=exif),
        saved(noise.convert("CMYK"), "JPEG", subsampling=2),
        saved(noise.convert("L"), "JPEG", restart_marker_blocks=1),
        saved(half_red(), "MPO", save_all=True, append_images=[half_red(8, 6)]),
        saved(noise, "PNG"),
        saved(noise.convert("P"), "PNG", exif=exif),
        saved(noise.convert("1"), "PNG"),
        saved(noise.convert("RGBA"), "PNG"),
        saved(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"),
        animation("PNG"),
        saved(noise, "WEBP"),
        saved(noise.convert("RGBA"), "WEBP", lossless=True, exif=exif),
        saved(noise.convert("RGBA"), "WEBP", icc_profile=bytes(200)),
        animation("WEBP"),
    ]


def mutants(count: int, seed: int) -> Iterator[bytes]:
    random, pictures = Random(seed), originals()  # noqa: S311 - to be repeated, not to be secret
    for _ in range(count):
        data = bytearray(random.choice(pictures))
        for _ in range(random.choice((1, 1, 2, 4, 16))):
            _mutate(data, random)
        yield bytes(data)


def _mutate(data: bytearray, random: Random) -> None:
    # Where a header is, more goes wrong.
    at = random.randrange(min(len(data), random.choice((64, len(data))))) if data else 0
    length = random.choice((1, 2, 4, 16, 256))
    match random.randrange(7):
        case 0:
            data[at : at + 1] = bytes([random.randrange(256)])
        case 1:
            data[at : at + 1] = bytes([(data[at] if data else 0) ^ 1 << random.randrange(8)])
        case 2:
            value = random.choice(INTERESTING)
            data[at : at + len(value)] = value
        case 3:
            del data[at : at + length]
        case 4:
            data[at:at] = data[at : at + length]
        case 5:
            source = random.randrange(len(data)) if data else 0
            data[at : at + length] = data[source : source + length]
        case _:
            del data[at:]
