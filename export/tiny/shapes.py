"""Outlines for the synthetic scenes. Each function returns a mask, uint8 [d, d] of 0 or 255, inside its square."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint8]
Outline = Callable[[np.random.Generator, int], Mask]

_ANGLES = np.linspace(0, 2 * np.pi, 72, endpoint=False)
_LETTERS = "ABCDEFGHKLMNPRSTUVXYZ234567890&?"


def random_mask(rng: np.random.Generator, side: int) -> Mask:
    """Draw one of the outlines below, at most `side` pixels wide and high, sometimes with a hole; cropped."""
    outline = _OUTLINES[rng.choice(len(_OUTLINES), p=_ODDS)]
    mask = outline(rng, side)
    if rng.random() < 0.1:  # noqa: PLR2004
        mask = _with_hole(rng, mask)
    return cropped(mask)


def cropped(mask: Mask) -> Mask:
    """Cut a mask to the bounding box of what is set; an empty mask becomes one set pixel."""
    x, y, width, height = cv2.boundingRect(mask)
    return mask[y : y + height, x : x + width] if width else np.full((1, 1), 255, np.uint8)


def disc(rng: np.random.Generator, side: int) -> Mask:
    """Nearly round, as coins, plates, fruit and wheels are."""
    return _filled(_placed(rng, np.ones_like(_ANGLES), side, squeeze=0.85), side)


def ellipse(rng: np.random.Generator, side: int) -> Mask:
    """Draw an ellipse of any aspect down to 0.35, at any angle."""
    return _filled(_placed(rng, np.ones_like(_ANGLES), side, squeeze=0.35), side)


def blob(rng: np.random.Generator, side: int) -> Mask:
    """Draw a smooth closed curve: a few harmonics of the radius."""
    radius = np.ones_like(_ANGLES)
    for order in range(2, 8):
        radius += rng.normal(0, 0.45 / order) * np.cos(order * _ANGLES + rng.uniform(0, 2 * np.pi))
    return _filled(_placed(rng, np.clip(radius, 0.15, None), side, squeeze=0.5), side)


def petals(rng: np.random.Generator, side: int) -> Mask:
    """Draw stars, crosses, gears and flowers."""
    order = int(rng.integers(3, 10))
    wave = np.cos(order * _ANGLES)
    return _filled(
        _placed(rng, 1 + rng.uniform(0.1, 0.6) * np.clip(wave * rng.uniform(1, 4), -1, 1), side, squeeze=0.6), side
    )


def polygon(rng: np.random.Generator, side: int) -> Mask:
    """Draw a polygon of three to seven corners, often with the corners rounded off."""
    count = int(rng.integers(3, 8))
    angles = 2 * np.pi * (np.arange(count) + rng.uniform(-0.3, 0.3, count)) / count
    radius = rng.uniform(0.7, 1, count)
    points = np.stack([np.cos(angles) * radius, np.sin(angles) * radius], axis=1)
    return _rounded(rng, _filled(_fitted(rng, points, side, squeeze=0.5), side))


def slab(rng: np.random.Generator, side: int) -> Mask:
    """Draw a rectangle or trapezium: boxes, doors, cards, screens."""
    taper = rng.uniform(0.6, 1.0) if rng.random() < 0.4 else 1.0  # noqa: PLR2004
    points = np.array([[-1, -1], [1, -1], [taper, 1], [-taper, 1]], dtype=np.float64)
    return _rounded(rng, _filled(_fitted(rng, points, side, squeeze=0.25), side))


def tube(rng: np.random.Generator, side: int) -> Mask:
    """Draw a thin bent line: cables, legs, handles, branches."""
    knots = rng.uniform(-1, 1, (4, 2))
    t = np.linspace(0, 1, 24)[:, None]
    curve = (1 - t) ** 3 * knots[0] + 3 * t * (1 - t) ** 2 * knots[1] + 3 * t**2 * (1 - t) * knots[2] + t**3 * knots[3]
    thickness = max(3, round(side * rng.uniform(0.05, 0.16)))
    curve -= (curve.max(0) + curve.min(0)) / 2
    curve *= (side / 2 - thickness) / max(1e-3, np.abs(curve).max())
    mask = np.zeros((side, side), np.uint8)
    cv2.polylines(mask, [np.round(curve + side / 2).astype(np.int32)], isClosed=False, color=255, thickness=thickness)
    return mask


def letter(rng: np.random.Generator, side: int) -> Mask:
    """Draw a heavy letter or digit."""
    mask = np.zeros((64, 64), np.uint8)
    glyph = _LETTERS[rng.integers(len(_LETTERS))]
    cv2.putText(mask, glyph, (10, 52), cv2.FONT_HERSHEY_DUPLEX, 2.0, 255, int(rng.integers(5, 10)))
    turn = cv2.getRotationMatrix2D((32, 32), rng.uniform(-40, 40), 1.0)
    mask = np.asarray(cv2.warpAffine(mask, turn, (64, 64)), np.uint8)
    return _binary(cv2.resize(mask, (side, side), interpolation=cv2.INTER_LINEAR))


def creature(rng: np.random.Generator, side: int) -> Mask:
    """Draw a body with limbs and perhaps a head: one whole of unlike parts."""
    mask = np.zeros((side, side), np.uint8)
    body = rng.uniform(-0.12, 0.12, 2)
    axes = rng.uniform(0.18, 0.4, 2)
    _stamp_ellipse(mask, body, axes, rng.uniform(0, 180))
    for _ in range(int(rng.integers(1, 6))):
        angle = rng.uniform(0, 2 * np.pi)
        direction = np.array([np.cos(angle), np.sin(angle)])
        end = body + direction * rng.uniform(0.5, 0.9)
        if rng.random() < 0.3:  # noqa: PLR2004
            _stamp_ellipse(mask, body + direction * axes.max() * 1.2, rng.uniform(0.12, 0.25, 2), rng.uniform(0, 180))
        else:
            ends = [tuple(int(v) for v in _to_pixels(point, side)) for point in (body, end)]
            cv2.line(mask, ends[0], ends[1], 255, max(2, int(side * rng.uniform(0.05, 0.14))))
    return mask


def cloud(rng: np.random.Generator, side: int) -> Mask:
    """Draw a ragged patch: smooth noise under a round window, thresholded."""
    coarse = rng.random((9, 9)).astype(np.float32)
    field = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    return _binary(255 * (field + 0.9 * (1 - (x**2 + y**2) / 0.8) > rng.uniform(0.5, 0.8)))


def _placed(rng: np.random.Generator, radius: NDArray[np.float64], side: int, squeeze: float) -> NDArray[np.int32]:
    points = np.stack([np.cos(_ANGLES) * radius, np.sin(_ANGLES) * radius], axis=1)
    return _fitted(rng, points, side, squeeze)


def _fitted(rng: np.random.Generator, points: NDArray[np.float64], side: int, squeeze: float) -> NDArray[np.int32]:
    """Squeeze along one axis (down to `squeeze`), turn, and fit into the square; int32 [n, 2] for OpenCV."""
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = points * np.array([1.0, rng.uniform(squeeze, 1)]) @ turn.T
    points = points - (points.max(0) + points.min(0)) / 2
    points *= (side / 2 - 1) / np.abs(points).max()
    return np.round(points + side / 2 - 0.5).astype(np.int32)


def _filled(points: NDArray[np.int32], side: int) -> Mask:
    mask = np.zeros((side, side), np.uint8)
    cv2.fillPoly(mask, [points], 255)
    return mask


def _rounded(rng: np.random.Generator, mask: Mask) -> Mask:
    if rng.random() < 0.5:  # noqa: PLR2004
        return mask
    return _binary(cv2.GaussianBlur(mask, (0, 0), max(0.8, len(mask) * rng.uniform(0.02, 0.08))))


def _with_hole(rng: np.random.Generator, mask: Mask) -> Mask:
    side = len(mask)
    hole = np.zeros_like(mask)
    _stamp_ellipse(hole, rng.uniform(-0.2, 0.2, 2), rng.uniform(0.12, 0.35, 2), rng.uniform(0, 180))
    holed = np.where(hole > 0, 0, mask).astype(np.uint8)
    return holed if int((holed > 0).sum()) * 4 > side * side // 4 else mask


def _stamp_ellipse(mask: Mask, centre: NDArray[np.float64], axes: NDArray[np.float64], turn_deg: float) -> None:
    x, y = (int(v) for v in _to_pixels(centre, len(mask)))
    a, b = (max(1, int(v * len(mask))) for v in axes)
    cv2.ellipse(mask, (x, y), (a, b), turn_deg, 0, 360, 255, -1)


def _to_pixels(point: NDArray[np.float64], side: int) -> NDArray[np.int32]:
    return np.round((np.clip(point, -0.9, 0.9) + 1) * side / 2).astype(np.int32)


def _binary(field: object) -> Mask:
    return np.where(np.asarray(field) > 127, 255, 0).astype(np.uint8)  # noqa: PLR2004


_OUTLINES: tuple[Outline, ...] = (disc, ellipse, blob, petals, polygon, slab, tube, letter, creature, cloud)
_ODDS = (0.12, 0.1, 0.2, 0.06, 0.12, 0.14, 0.06, 0.05, 0.1, 0.05)
