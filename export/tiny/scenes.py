"""Synthetic scenes with their masks, drawn from a seed: overlapping objects, trays of small things, cut backgrounds."""

from dataclasses import dataclass
from enum import IntEnum

import cv2
import numpy as np
from numpy.typing import NDArray

from export.tiny.camera import photographed
from export.tiny.shapes import random_mask
from export.tiny.sprites import Light, Sprite, coin_like_sprite, random_sprite
from export.tiny.textures import Pixels, TextureBank, colour_near, surface

MIN_VISIBLE = 0.25  # of an object's own area; less is hardly a thing to be asked for
MIN_AREA = 0.0025  # of the picture; on the low-resolution grid less is a handful of cells


class Kind(IntEnum):
    """What a mask is of."""

    OBJECT = 0
    PART = 1
    REGION = 2


@dataclass(frozen=True)
class Scene:
    """An image uint8 [s, s, 3], what is visible of each thing in it bool [n, s, s], and their kinds int [n].

    Outside `valid_size` (height, width) the image is padding, as a letterboxed photograph has it.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    kinds: NDArray[np.int64]
    valid_size: tuple[int, int]


def scene_from_seed(seed: int, side: int, bank: TextureBank, span: float = 1.0) -> Scene:
    """Draw a scene of `side` pixels. Sizes of things grow with `side` x `span`; the same arguments give the same scene.

    Raises:
        ValueError: `side` is under 64.
    """
    if side < 64:  # noqa: PLR2004
        raise ValueError(f"a scene needs 64 pixels at least, not {side}")
    rng = np.random.default_rng(seed)
    height, width = _valid_size(rng, side)
    tone = rng.uniform(40, 215, 3) * 0.5 + rng.uniform(40, 215) * 0.5
    light = Light(
        rng.uniform(0, 2 * np.pi), tone.astype(np.float32), float(rng.choice([25, 45, 70], p=[0.25, 0.4, 0.35]))
    )
    stage = _Stage(rng, bank, light, (height, width))
    mode = rng.random()
    if mode < 0.3:  # noqa: PLR2004
        _lay_tray(stage, side * span)
    else:
        _cut_background(stage)
        _pile_up(stage, side * span, few=mode > 0.75)  # noqa: PLR2004
    image = np.zeros((side, side, 3), np.uint8)
    image[:height, :width] = photographed(rng, stage.canvas)
    masks, kinds = stage.visible()
    padded = np.zeros((len(masks), side, side), bool)
    padded[:, :height, :width] = masks
    return Scene(image, padded, kinds, (height, width))


class _Stage:
    """The picture in the making: later things hide earlier ones."""

    def __init__(
        self, rng: np.random.Generator, bank: TextureBank, light: Light, size: tuple[int, int], capacity: int = 160
    ) -> None:
        self.rng, self.bank, self.light, self.size = rng, bank, light, size
        self.canvas: Pixels = np.array(surface(rng, size, bank, light.tone, light.spread * 0.7))
        self._masks = np.zeros((capacity, *size), bool)
        self._areas = np.zeros(capacity)
        self._kinds = np.zeros(capacity, np.int64)
        self._count = 0

    def paint_region(self, region: NDArray[np.bool_]) -> None:
        """Give a part of the background, bool [h, w], a surface of its own."""
        tone = colour_near(self.rng, self.light.tone, self.light.spread)
        self.canvas[region] = surface(self.rng, self.size, self.bank, tone, self.light.spread)[region]
        self._hide((slice(None), slice(None)), region)
        self._keep((slice(None), slice(None)), region, Kind.REGION)

    def place(self, sprite: Sprite, y: int, x: int) -> None:
        """Put a sprite with its top-left corner at (y, x), which may lie outside."""
        height, width = sprite.mask.shape
        top, left = max(0, -y), max(0, -x)
        bottom, right = min(height, self.size[0] - y), min(width, self.size[1] - x)
        if bottom - top < 3 or right - left < 3:  # noqa: PLR2004
            return
        inner = (slice(top, bottom), slice(left, right))
        outer = (slice(y + top, y + bottom), slice(x + left, x + right))
        mask = sprite.mask[inner]
        self._cast_shadow(sprite, y, x)
        self.canvas[outer][mask] = sprite.pixels[inner][mask]
        self._hide(outer, mask)
        self._keep(outer, mask, Kind.OBJECT, int(sprite.mask.sum()))
        for part in sprite.parts:
            self._keep(outer, part[inner], Kind.PART, int(part.sum()))

    def room(self, height: int, width: int) -> bool:
        """Say whether the masks still fit."""
        return self._count + 6 < len(self._masks) and min(height, width) > 0

    def visible(self) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Return the masks of which enough can be seen, and their kinds."""
        areas = self._masks[: self._count].sum(axis=(1, 2))
        seen = (areas >= MIN_AREA * max(self.size) ** 2) & (areas >= MIN_VISIBLE * self._areas[: self._count])
        return self._masks[: self._count][seen], self._kinds[: self._count][seen]

    def _hide(self, box: tuple[slice, slice], mask: NDArray[np.bool_]) -> None:
        self._masks[: self._count, box[0], box[1]] &= ~mask

    def _keep(self, box: tuple[slice, slice], mask: NDArray[np.bool_], kind: Kind, area: int = 0) -> None:
        self._masks[self._count][box] = mask
        self._areas[self._count], self._kinds[self._count] = area, kind
        self._count += 1

    def _cast_shadow(self, sprite: Sprite, y: int, x: int) -> None:
        if self.rng.random() < 0.4:  # noqa: PLR2004
            return
        reach = max(sprite.mask.shape) * self.rng.uniform(0.0, 0.12) + 1
        blur, margin = reach * 0.6 + 0.6, int(reach * 2.5) + 2
        shade = cv2.GaussianBlur(np.pad(sprite.mask, margin).astype(np.float32), (0, 0), blur)
        y0, x0 = (
            int(at + reach * turn) - margin
            for at, turn in ((y, np.sin(self.light.angle)), (x, np.cos(self.light.angle)))
        )
        top, left = max(0, -y0), max(0, -x0)
        shade = shade[top : max(0, self.size[0] - y0), left : max(0, self.size[1] - x0)]
        box = (slice(y0 + top, y0 + top + shade.shape[0]), slice(x0 + left, x0 + left + shade.shape[1]))
        self.canvas[box] *= 1 - np.float32(self.rng.uniform(0.15, 0.6)) * shade[..., None]


def _valid_size(rng: np.random.Generator, side: int) -> tuple[int, int]:
    short = side if rng.random() < 0.5 else int(side * rng.uniform(0.6, 1.0))  # noqa: PLR2004
    return (side, short) if rng.random() < 0.3 else (short, side)  # noqa: PLR2004


def _cut_background(stage: _Stage) -> None:
    """Split what is behind everything by wavy lines: sky and ground, wall and table."""
    rng, (height, width) = stage.rng, stage.size
    for _ in range(int(rng.choice(3, p=[0.45, 0.35, 0.2]))):
        angle, shift = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3)
        y = np.linspace(-0.5, 0.5, height)[:, None]
        x = np.linspace(-0.5, 0.5, width)[None]
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        wave = rng.uniform(0, 0.08) * np.sin(across * rng.uniform(3, 20) + angle)
        stage.paint_region(np.asarray(along + wave > shift))


def _pile_up(stage: _Stage, scale: float, *, few: bool) -> None:
    rng, (height, width) = stage.rng, stage.size
    low, high, count = (0.3, 0.9, rng.integers(1, 4)) if few else (0.09, 0.6, rng.integers(5, 15))
    for _ in range(int(count)):
        side = int(np.exp(rng.uniform(np.log(low), np.log(high))) * scale)
        sprite = random_sprite(rng, max(12, side), stage.bank, stage.light)
        half_h, half_w = sprite.mask.shape[0] // 2, sprite.mask.shape[1] // 2
        if stage.room(half_h, half_w):
            stage.place(sprite, int(rng.integers(height)) - half_h, int(rng.integers(width)) - half_w)


def _lay_tray(stage: _Stage, scale: float) -> None:
    """Lay out small things of one family, in loose rows or scattered: coins, seeds, cells, parts on a bench."""
    rng, (height, width) = stage.rng, stage.size
    side = float(np.exp(rng.uniform(np.log(0.08), np.log(0.24)))) * scale
    pitch, jitter, odds = side * rng.uniform(1.05, 1.6), rng.uniform(0, 0.35), rng.uniform(0.5, 1.0)
    draw = coin_like_sprite if rng.random() < 0.55 else random_sprite  # noqa: PLR2004
    family = random_mask(rng, 32) if rng.random() < 0.3 else None  # noqa: PLR2004  (one outline for all)
    for row in np.arange(pitch * rng.uniform(0.2, 0.8), height, pitch):
        for column in np.arange(pitch * rng.uniform(0.2, 0.8), width, pitch):
            if rng.random() > odds or not stage.room(1, 1):
                continue
            sprite = draw(rng, max(12, int(side * rng.uniform(0.75, 1.25))), stage.bank, stage.light)
            if family is not None:
                sprite = _recut(sprite, family)
            y = int(row + pitch * jitter * rng.uniform(-1, 1)) - sprite.mask.shape[0] // 2
            x = int(column + pitch * jitter * rng.uniform(-1, 1)) - sprite.mask.shape[1] // 2
            stage.place(sprite, y, x)


def _recut(sprite: Sprite, outline: NDArray[np.uint8]) -> Sprite:
    """Give a sprite another outline, stretched to its size."""
    shape = sprite.mask.shape
    mask = np.asarray(cv2.resize(outline, shape[::-1], interpolation=cv2.INTER_NEAREST)) > 0
    return Sprite(sprite.pixels, mask, tuple(part & mask for part in sprite.parts))
