"""As many photographs as a benchmark asks for, and how popular each is."""

import io
import random
from functools import cache
from itertools import accumulate

import numpy as np
from PIL import Image
from skimage import data

SCENES = (data.coffee, data.astronaut, data.chelsea)


@cache
def photograph(number: int, size: tuple[int, int] = (480, 640)) -> bytes:
    """Return one of many photographs of `size` (height, width), as a JPEG file: pieces of a few real ones."""
    rng = np.random.default_rng(number)
    whole = Image.fromarray(SCENES[number % len(SCENES)]())  # type: ignore[no-untyped-call]
    width = int(rng.integers(200, min(whole.size)))
    left, top = (int(rng.integers(0, side - width + 1)) for side in whole.size)
    buffer = io.BytesIO()
    piece = whole.crop((left, top, left + width, top + width * 3 // 4))
    piece.resize(size[::-1]).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class Popularity:
    """Numbers 0 to `count` - 1 by Zipf's law: how often number n comes is proportional to 1 / (n + 1)."""

    def __init__(self, count: int) -> None:
        self._numbers = range(count)
        self._weights = list(accumulate(1 / (number + 1) for number in self._numbers))

    def one(self, chance: random.Random) -> int:
        """Draw a number."""
        return chance.choices(self._numbers, cum_weights=self._weights)[0]
