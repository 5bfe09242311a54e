"""Images for verification, placed as the encoder wants them."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# Photographs in scikit-image's wheel: a person, still life, an animal, a scene, a workshop, and two in grey.
BUNDLED = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "camera.png", "coins.png")


class PhotographError(Exception):
    """An image for verification cannot be read."""


@dataclass(frozen=True, slots=True)
class Photograph:
    """`image` UINT8 [1, S, S, 3] with the picture at its top left, `valid_size` INT32 [1, 2] (h, w)."""

    name: str
    image: NDArray[np.uint8]
    valid_size: NDArray[np.int32]


def bundled_photographs(side: int) -> list[Photograph]:
    """Return scikit-image's photographs, letterboxed to `side` pixels."""
    folder = resources.files("skimage.data")
    photographs = []
    for name in BUNDLED:
        with folder.joinpath(name).open("rb") as file, Image.open(file) as image:
            photographs.append(letterboxed(name, image, side))
    return photographs


def photographs_from(paths: list[Path], side: int) -> list[Photograph]:
    """Read images of any size; raises PhotographError naming the first that is none."""
    photographs = []
    for path in paths:
        try:
            with Image.open(path) as image:
                photographs.append(letterboxed(path.name, image, side))
        except (OSError, UnidentifiedImageError) as error:
            raise PhotographError(f"{path} cannot be read as an image: {error}") from error
    return photographs


def letterboxed(name: str, image: Image.Image, side: int) -> Photograph:
    """Resize to longest side `side`, anti-aliased, and place top left, as the original's `ResizeLongestSide` does."""
    scale = side / max(image.size)
    width, height = (max(1, int(length * scale + 0.5)) for length in image.size)
    resized = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
    canvas = np.zeros((1, side, side, 3), np.uint8)
    canvas[0, :height, :width] = resized
    return Photograph(name, canvas, np.array([[height, width]], np.int32))
