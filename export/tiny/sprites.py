"""Objects for the synthetic scenes: an outline, its surface, its relief, and the parts it is made of."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from export.tiny.shapes import Mask, cropped, disc, random_mask
from export.tiny.textures import Pixels, TextureBank, surface

MIN_PART_SIDE = 10


@dataclass(frozen=True)
class Sprite:
    """One object: colours float32 [h, w, 3], its mask bool [h, w], the masks of its parts bool [h, w] each."""

    pixels: Pixels
    mask: NDArray[np.bool_]
    parts: tuple[NDArray[np.bool_], ...]


@dataclass(frozen=True)
class Light:
    """Where the light comes from (radians, in the image plane), the scene's tone [3] and its spread (levels)."""

    angle: float
    tone: Pixels
    spread: float


def random_sprite(rng: np.random.Generator, side: int, bank: TextureBank, light: Light) -> Sprite:
    """Draw an object of any outline with up to four parts, inside a square of `side` pixels."""
    return _clad(rng, random_mask(rng, side), bank, light, int(rng.choice(5, p=[0.4, 0.2, 0.2, 0.1, 0.1])))


def coin_like_sprite(rng: np.random.Generator, side: int, bank: TextureBank, light: Light) -> Sprite:
    """Draw a round thing with an embossed interior: coins, buttons, bottle caps, pills, cells."""
    mask = cropped(disc(rng, side))
    return _clad(rng, mask, bank, light, int(rng.choice(2, p=[0.8, 0.2])))


def _clad(rng: np.random.Generator, mask: Mask, bank: TextureBank, light: Light, part_count: int) -> Sprite:
    height, width = mask.shape
    own = Light(light.angle, light.tone, light.spread)
    pixels = np.array(surface(rng, (height, width), bank, own.tone, own.spread))
    parts = []
    for _ in range(part_count if min(height, width) >= 2 * MIN_PART_SIDE else 0):
        part = _part_of(rng, mask)
        pixels[part] = surface(rng, (height, width), bank, light.tone, light.spread)[part]
        parts.append(part)
    if rng.random() < 0.75:  # noqa: PLR2004
        pixels += _relief(rng, mask, light.angle)[..., None]
    if rng.random() < 0.25:  # noqa: PLR2004
        pixels += _outline(rng, mask)[..., None]
    return Sprite(pixels, mask > 0, _visible_parts(parts))


def _part_of(rng: np.random.Generator, mask: Mask) -> NDArray[np.bool_]:
    """Place a shape over the mask, or cut the mask by a line; the part is what lies inside, bool [h, w]."""
    height, width = mask.shape
    if rng.random() < 0.3:  # noqa: PLR2004
        angle, shift = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3)
        y = np.linspace(-0.5, 0.5, height)[:, None] * np.sin(angle)
        x = np.linspace(-0.5, 0.5, width)[None] * np.cos(angle)
        return np.asarray((mask > 0) & (x + y > shift))
    side = int(max(MIN_PART_SIDE, min(height, width) * rng.uniform(0.25, 0.75)))
    shape = random_mask(rng, side)
    canvas = np.zeros((height, width), bool)
    y0 = int(rng.integers(-side // 3, max(1, height - 2 * side // 3)))
    x0 = int(rng.integers(-side // 3, max(1, width - 2 * side // 3)))
    top, left = max(0, -y0), max(0, -x0)
    piece = shape[top : height - y0, left : width - x0]
    canvas[max(0, y0) : max(0, y0) + len(piece), max(0, x0) : max(0, x0) + piece.shape[1]] = piece > 0
    return canvas & (mask > 0)


def _visible_parts(parts: list[NDArray[np.bool_]]) -> tuple[NDArray[np.bool_], ...]:
    """Take from each part what later parts cover."""
    return tuple(part & ~np.any(parts[i + 1 :], axis=0) for i, part in enumerate(parts))


def _relief(rng: np.random.Generator, mask: Mask, angle: float) -> NDArray[np.float32]:
    """Light a height map from one side: rounded edges, a raised rim, an embossed motif; float32 [h, w] of levels."""
    side = max(mask.shape)
    height = cv2.GaussianBlur(mask, (0, 0), max(0.7, side * rng.uniform(0.02, 0.15))).astype(np.float32)
    if rng.random() < 0.4:  # noqa: PLR2004
        inner = cv2.erode(np.pad(mask, 1), np.ones((3, 3), np.uint8), iterations=max(1, int(side * 0.08)))[1:-1, 1:-1]
        height -= rng.uniform(0.3, 0.9) * cv2.GaussianBlur(inner, (0, 0), 0.8).astype(np.float32)
    if rng.random() < 0.5 and side >= 2 * MIN_PART_SIDE:  # noqa: PLR2004
        motif = np.zeros_like(mask)
        for _ in range(int(rng.integers(1, 4))):
            motif[_part_of(rng, mask)] ^= 255
        height += rng.uniform(0.3, 1.0) * cv2.GaussianBlur(motif, (0, 0), 0.9).astype(np.float32)
    slope = np.cos(angle) * cv2.Sobel(height, cv2.CV_32F, 1, 0) + np.sin(angle) * cv2.Sobel(height, cv2.CV_32F, 0, 1)
    return np.asarray(slope * (rng.uniform(15, 80) / (1e-3 + np.abs(slope).max())), np.float32)


def _outline(rng: np.random.Generator, mask: Mask) -> NDArray[np.float32]:
    edge = cv2.morphologyEx(np.pad(mask, 1), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))[1:-1, 1:-1]
    return np.asarray((edge > 0) * np.float32(rng.uniform(-90, 40)), np.float32)
