"""Clicks and boxes for a mask, as a person would place them; batches of them for training."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from export.tiny.scenes import Kind, Scene, scene_from_seed
from export.tiny.textures import TextureBank

POSITIVE, NEGATIVE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, NOT_A_POINT = 1, 0, 2, 3, -1
KIND_WEIGHT = {Kind.OBJECT: 1.0, Kind.PART: 0.25, Kind.REGION: 0.25}
LOW_RES_STRIDE = 4
_SCENE_ATTEMPT_STRIDE = 1_000_000_007


@dataclass(frozen=True)
class Batch:
    """B scenes with P prompts each, for one training step.

    `images` uint8 [B, s, s, 3]; `valid_sizes` int64 [B, 2] (height, width); `targets` uint8 [B, P, s/4, s/4], the share
    of each low-resolution cell that the mask covers, 255 for all; `coords` float32 [B, P, 2, 2], x and y in pixels of
    the two prompt tokens; `labels` int64 [B, P, 2].
    """

    images: NDArray[np.uint8]
    valid_sizes: NDArray[np.int64]
    targets: NDArray[np.uint8]
    coords: NDArray[np.float32]
    labels: NDArray[np.int64]


def batch_from_seed(seed: int, side: int, count: int, prompts: int, bank: TextureBank) -> Batch:
    """Draw `count` scenes of `side` pixels with `prompts` prompts each; the same arguments give the same batch."""
    rng = np.random.default_rng((seed, 1))
    scenes = [scene_with_masks(seed * count + i, side, bank) for i in range(count)]
    low = side // LOW_RES_STRIDE
    targets = np.zeros((count, prompts, low, low), np.uint8)
    coords = np.zeros((count, prompts, 2, 2), np.float32)
    labels = np.zeros((count, prompts, 2), np.int64)
    for b, scene in enumerate(scenes):
        for p, index in enumerate(chosen_masks(rng, scene, prompts)):
            mask = scene.masks[index]
            targets[b, p] = cv2.resize(mask.astype(np.uint8) * 255, (low, low), interpolation=cv2.INTER_AREA)
            coords[b, p], labels[b, p] = _first_prompt(rng, mask)
    images = np.stack([scene.image for scene in scenes])
    return Batch(images, np.array([scene.valid_size for scene in scenes]), targets, coords, labels)


def scene_with_masks(seed: int, side: int, bank: TextureBank) -> Scene:
    """Draw scenes until one has something to be asked for."""
    while True:
        scene = scene_from_seed(seed, side, bank)
        if len(scene.masks):
            return scene
        seed += _SCENE_ATTEMPT_STRIDE


def chosen_masks(rng: np.random.Generator, scene: Scene, count: int) -> NDArray[np.int64]:
    """Draw `count` mask indices, objects first, parts and regions less often; repeated when there are too few."""
    weights = np.array([KIND_WEIGHT[Kind(kind)] for kind in scene.kinds])
    return rng.choice(len(weights), count, replace=len(weights) < count, p=weights / weights.sum())


def innermost_click(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the pixel (x, y) farthest from the mask's edge; bool [h, w], not empty."""
    distance = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, cv2.DIST_MASK_3)
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return float(x) - 1, float(y) - 1


def tight_box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Return x0, y0, x1, y1 of the outermost pixels of a mask bool [h, w]."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return float(x), float(y), float(x + width - 1), float(y + height - 1)


def _first_prompt(rng: np.random.Generator, mask: NDArray[np.bool_]) -> tuple[NDArray[np.float32], tuple[int, int]]:
    x0, y0, x1, y1 = tight_box(mask)
    if rng.random() < 0.45:  # noqa: PLR2004
        side = np.array([x1 - x0, y1 - y0, x1 - x0, y1 - y0])
        noise = np.clip(rng.normal(0, rng.uniform(0, 0.1), 4) * side, -20, 20)  # the paper's: 10 %, 20 px at most
        corners = np.clip(np.array([x0, y0, x1, y1]) + noise, 0, len(mask) - 1)
        return corners.astype(np.float32).reshape(2, 2), (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)
    top, left = int(y0), int(x0)
    inside = mask[top : int(y1) + 1, left : int(x1) + 1]
    if rng.random() < 0.5:  # noqa: PLR2004
        depth = cv2.distanceTransform(np.pad(inside.astype(np.uint8), 1), cv2.DIST_L2, cv2.DIST_MASK_3)[1:-1, 1:-1]
        inside = depth >= rng.uniform(0.3, 1.0) * depth.max()
    ys, xs = np.nonzero(inside)
    pick = rng.integers(len(ys))
    return np.array([[left + xs[pick], top + ys[pick]], [0, 0]], np.float32), (POSITIVE, NOT_A_POINT)
