"""Masks and prompts drawn over a picture. Pure."""

import io
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from service.image import MAX_SIDE, ImageLimits
from service.image_header import read_header
from service.picture import rgb_from_file

OPACITY = 0.5
MASK_COLOUR = (30, 144, 255)
FOREGROUND_COLOUR, BACKGROUND_COLOUR, BOX_COLOUR = (0, 200, 0), (220, 0, 0), (255, 200, 0)
GOLDEN_RATIO = 0.618034  # steps of it around the colour circle never come close to an earlier one
MARK_PART = 1 / 80  # radius of a point's mark, of the picture's longer side


class Canvas:
    """A picture, UINT8 [height, width, 3], as a person sees it (EXIF orientation applied), to draw over."""

    def __init__(self, data: bytes) -> None:
        limits = ImageLimits(len(data), MAX_SIDE * MAX_SIDE)
        read_header(data, limits)
        self._pixels = np.array(rgb_from_file(io.BytesIO(data), limits))

    def fill(self, mask: NDArray[np.bool_], colour: Sequence[int] = MASK_COLOUR) -> None:
        """Tint the pixels of a mask, bool [height, width], and draw its edge."""
        tint = np.array(colour, np.float32)
        self._pixels[mask] = ((1 - OPACITY) * self._pixels[mask] + OPACITY * tint).astype(np.uint8)
        self._pixels[_edge_of(mask)] = tint

    def picture(
        self, points: Iterable[tuple[float, float, int]] = (), box: tuple[float, float, float, float] | None = None
    ) -> Image.Image:
        """Return what was drawn, with the prompt's points (x, y, label) and box (x0, y0, x1, y1) marked on it."""
        picture = Image.fromarray(self._pixels)
        draw = ImageDraw.Draw(picture)
        radius = max(3.0, max(picture.size) * MARK_PART)
        if box is not None:
            draw.rectangle(box, outline=BOX_COLOUR, width=max(1, round(radius / 3)))
        for x, y, label in points:
            colour = FOREGROUND_COLOUR if label else BACKGROUND_COLOUR
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline="white", width=2)
        return picture


def colours(count: int) -> list[tuple[int, int, int]]:
    """Return colours of which neighbours in the list are easy to tell apart."""
    hues = [round(255 * (index * GOLDEN_RATIO % 1)) for index in range(count)]
    circle = Image.fromarray(np.array([[(hue, 200, 240) for hue in hues]], np.uint8), "HSV") if hues else None
    return [tuple(pixel) for pixel in np.asarray(circle.convert("RGB"))[0].tolist()] if circle else []


def _edge_of(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pixels of `mask` that have a neighbour outside of it, above, below, left or right."""
    inside = np.pad(mask, 1)
    return np.asarray(mask & ~(inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]))
