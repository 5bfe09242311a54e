"""The figures of the model card: held-out scenes and scikit-image's coins."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import SamModel

from export.tiny.coins import labelled_coins
from export.tiny.config import INPUT_SIZE
from export.tiny.inference import Answer, EmbeddedImage, embed, segment
from export.tiny.prompts import (
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    NEGATIVE,
    NOT_A_POINT,
    POSITIVE,
    chosen_masks,
    innermost_click,
    scene_with_masks,
    tight_box,
)
from export.tiny.textures import HELD_OUT_IMAGES, load_bank

FIRST_HELD_OUT_SEED = 4_000_000_000_000  # training counts up from 80,000,000
PROMPTS_PER_SCENE = 8
CORRECTIONS = 3
GOOD_IOU = 0.75
Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class Figure:
    """One line of the table: what was measured, the value, and the target of the issue."""

    name: str
    value: float
    target: float
    of: int | None = None


@dataclass
class _Tally:
    """IoU per prompt, and (predicted, true) pairs of every candidate."""

    click: list[float] = field(default_factory=list)
    oracle: list[float] = field(default_factory=list)
    box: list[float] = field(default_factory=list)
    corrected: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    true: list[float] = field(default_factory=list)


def scene_figures(model: SamModel, count: int) -> list[Figure]:
    """Measure on `count` unseen scenes of the serving size, with surfaces from images that training never used."""
    bank = load_bank(HELD_OUT_IMAGES, seed=1)
    tally = _Tally()
    for index in range(count):
        seed = FIRST_HELD_OUT_SEED + index
        scene = scene_with_masks(seed, INPUT_SIZE, bank)
        height, width = scene.valid_size
        picked = chosen_masks(np.random.default_rng(seed), scene, min(PROMPTS_PER_SCENE, len(scene.masks)))
        image = embed(model, scene.image[:height, :width])
        _measure(model, image, scene.masks[picked][:, :height, :width], tally)
    return [
        Figure("one click, mean IoU", float(np.mean(tally.click)), 0.75),
        Figure("one click, best of 3, mean IoU", float(np.mean(tally.oracle)), 0.83),
        Figure("box, mean IoU", float(np.mean(tally.box)), 0.85),
        Figure("after three corrective clicks, mean IoU", float(np.mean(tally.corrected)), 0.85),
        Figure("predicted against true IoU, Pearson", float(np.corrcoef(tally.predicted, tally.true)[0, 1]), 0.6),
    ]


def coin_figures(model: SamModel) -> list[Figure]:
    """Count the coins found with IoU of 0.75 at least, from a tight box (mask 0) and from one click at the centre."""
    coins = labelled_coins()
    image = embed(model, coins.image)
    boxes = segment(model, image, *box_prompts(coins.masks))
    clicks = segment(model, image, *click_prompts(np.array([centre_of_box(mask) for mask in coins.masks], np.float32)))
    count = len(coins.masks)
    by_box = overlaps(boxes.masks[:, 0], coins.masks)
    by_click = overlaps(best_rated(clicks), coins.masks)
    return [
        Figure("coins found from a box", float((by_box >= GOOD_IOU).sum()), 18, count),
        Figure("coins found from one click", float((by_click >= GOOD_IOU).sum()), 12, count),
        Figure("coins, box, mean IoU", float(by_box.mean()), GOOD_IOU),
        Figure("coins, one click, mean IoU", float(by_click.mean()), GOOD_IOU),
    ]


def table_rows(figures: list[Figure]) -> Iterator[str]:
    """Write the figures as a Markdown table, line by line."""
    yield "| figure | measured | target | |"
    yield "|---|---|---|---|"
    for figure in figures:
        measured = f"{figure.value:.3f}" if figure.of is None else f"{figure.value:.0f} of {figure.of}"
        target = f"{figure.target:.2f}" if figure.of is None else f"{figure.target:.0f}"
        yield f"| {figure.name} | {measured} | {target} | {'reached' if figure.value >= figure.target else 'short'} |"


def click_prompts(clicks: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Turn pixels [N, 2] into lone positive clicks, with the token that says no box follows."""
    coords = np.stack([clicks, np.zeros_like(clicks)], axis=1)
    return coords, np.tile(np.array([POSITIVE, NOT_A_POINT]), (len(clicks), 1))


def box_prompts(masks: Masks) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Turn masks bool [N, h, w] into their tight boxes as prompts."""
    coords = np.array([tight_box(mask) for mask in masks], np.float32).reshape(-1, 2, 2)
    return coords, np.tile(np.array([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]), (len(masks), 1))


def centre_of_box(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the middle (x, y) of a mask's bounding box."""
    x0, y0, x1, y1 = tight_box(mask)
    return (x0 + x1) / 2, (y0 + y1) / 2


def best_rated(answer: Answer) -> Masks:
    """Choose the candidate (1 to 3) with the highest predicted IoU: bool [N, h, w]."""
    return np.asarray(answer.masks[np.arange(len(answer.masks)), answer.scores[:, 1:].argmax(1) + 1])


def overlaps(found: Masks, wanted: Masks) -> NDArray[np.float64]:
    """Intersection over union of bool masks [..., h, w]: [...]."""
    both = (found & wanted).sum(axis=(-2, -1))
    return np.asarray(both / np.maximum(1, (found | wanted).sum(axis=(-2, -1))), np.float64)


def _measure(model: SamModel, image: EmbeddedImage, wanted: Masks, tally: _Tally) -> None:
    boxes = segment(model, image, *box_prompts(wanted))
    tally.box.extend(overlaps(boxes.masks[:, 0], wanted))
    coords, labels = click_prompts(np.array([innermost_click(mask) for mask in wanted], np.float32))
    clicks = segment(model, image, coords, labels)
    every = overlaps(clicks.masks[:, 1:], wanted[:, None])
    found = best_rated(clicks)
    tally.click.extend(overlaps(found, wanted))
    tally.oracle.extend(every.max(axis=1))
    tally.predicted.extend(clicks.scores[:, 1:].ravel())
    tally.true.extend(every.ravel())
    best = torch.from_numpy(clicks.scores[:, 1:].argmax(1) + 1)
    previous = clicks.logits[torch.arange(len(best)), best]
    for _ in range(CORRECTIONS):
        corrections = [_corrective_click(*pair) for pair in zip(found, wanted, strict=True)]
        coords = np.concatenate([np.array([c[0] for c in corrections], np.float32)[:, None], coords], axis=1)
        labels = np.concatenate([np.array([c[1] for c in corrections])[:, None], labels], axis=1)
        answer = segment(model, image, coords, labels, previous.clamp(-32, 32))
        found, previous = answer.masks[:, 0], answer.logits[:, 0]
    tally.corrected.extend(overlaps(found, wanted))


def _corrective_click(found: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> tuple[tuple[float, float], int]:
    """Click in the middle of the thickest error, or of the thing itself when there is none."""
    wrong = found != wanted
    if not wrong.any():
        return innermost_click(wanted), POSITIVE
    missed, extra = (_thickness(wrong & side) for side in (wanted, ~wanted))
    return (
        (innermost_click(wrong & wanted), POSITIVE) if missed >= extra else (innermost_click(wrong & ~wanted), NEGATIVE)
    )


def _thickness(region: NDArray[np.bool_]) -> float:
    return float(cv2.distanceTransform(np.pad(region.astype(np.uint8), 1), cv2.DIST_L2, cv2.DIST_MASK_3).max())
