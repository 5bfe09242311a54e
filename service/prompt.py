"""Prompts: what a caller may ask, checked, and turned into the decoder's tensors. Pure."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidPromptError
from service.tensors import (
    LABEL_BACKGROUND,
    LABEL_BOX_BOTTOM_RIGHT,
    LABEL_BOX_TOP_LEFT,
    LABEL_FOREGROUND,
    LABEL_NOT_A_POINT,
    LABEL_PADDING,
    PROMPT_BUCKETS,
    TOKEN_BUCKETS,
)

MAX_PROMPTS = 256
MAX_POINTS = TOKEN_BUCKETS[-1] - 2  # a box takes two tokens


@dataclass(frozen=True, slots=True)
class Point:
    """A click at (x, y), pixels of the original image; `label` 1 is foreground, 0 background."""

    x: float
    y: float
    label: int = LABEL_FOREGROUND


@dataclass(frozen=True, slots=True)
class Box:
    """A box from (x0, y0) to (x1, y1), pixels of the original image, x right and y down."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True, slots=True)
class Prompt:
    """One object to segment: points, a box, or both."""

    points: tuple[Point, ...] = ()
    box: Box | None = None

    @property
    def is_ambiguous(self) -> bool:
        """Whether this is a lone point, which may mean a part or the whole; the original then offers candidates."""
        return len(self.points) == 1 and self.box is None

    @property
    def token_count(self) -> int:
        """Tokens the decoder needs: one a point, and two for a box or one "not a point" in its stead."""
        return len(self.points) + (2 if self.box else 1)


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Tensors of several prompts on one image, padded to buckets.

    `coords` is FP32 [P, N, 2] in input pixels, `labels` INT32 [P, N]; the first `count` of P are real.
    """

    coords: NDArray[np.float32]
    labels: NDArray[np.int32]
    count: int


def check_counts(prompts: int, points: Iterable[int]) -> None:
    """Raise `InvalidPromptError` if there are too few or many `prompts`, or too many of the `points` of one.

    Transports call it before they convert what they received: a conversion takes microseconds an item, and megabytes of
    empty prompts would hold up the event loop for seconds. `points` is read only where `prompts` is within bounds.
    """
    if not 1 <= prompts <= MAX_PROMPTS:
        raise InvalidPromptError(f"prompts holds {prompts} items; 1..{MAX_PROMPTS} are allowed", field="prompts")
    for index, count in enumerate(points):
        if count > MAX_POINTS:
            field = f"prompts[{index}].points"
            raise InvalidPromptError(f"{field} holds {count} points; at most {MAX_POINTS} are allowed", field=field)


def check_prompts(prompts: Sequence[Prompt], size: tuple[int, int]) -> None:
    """Raise `InvalidPromptError`, naming field and bound, unless all prompts fit an image of `size` (height, width)."""
    check_counts(len(prompts), (len(prompt.points) for prompt in prompts))
    for index, prompt in enumerate(prompts):
        _check_prompt(prompt, f"prompts[{index}]", size)


def _check_prompt(prompt: Prompt, field: str, size: tuple[int, int]) -> None:
    if not prompt.points and prompt.box is None:
        raise InvalidPromptError(f"{field} is empty; give it points, a box, or both", field=field)
    height, width = size
    for index, point in enumerate(prompt.points):
        _check_coordinate(point.x, width, f"{field}.points[{index}].x", "width")
        _check_coordinate(point.y, height, f"{field}.points[{index}].y", "height")
        if point.label not in (LABEL_BACKGROUND, LABEL_FOREGROUND):
            where = f"{field}.points[{index}].label"
            raise InvalidPromptError(f"{where} is {point.label}; it must be 1 (foreground) or 0", field=where)
    if prompt.box is not None:
        _check_box(prompt.box, f"{field}.box", size)


def _check_box(box: Box, field: str, size: tuple[int, int]) -> None:
    height, width = size
    for name, value, bound, side in (
        ("x0", box.x0, width, "width"),
        ("y0", box.y0, height, "height"),
        ("x1", box.x1, width, "width"),
        ("y1", box.y1, height, "height"),
    ):
        _check_coordinate(value, bound, f"{field}.{name}", side)
    if box.x0 >= box.x1 or box.y0 >= box.y1:
        raise InvalidPromptError(f"{field} is empty; it must have x0 < x1 and y0 < y1", field=field)


def _check_coordinate(value: float, bound: int, field: str, side: str) -> None:
    if not (math.isfinite(value) and 0 <= value <= bound):
        raise InvalidPromptError(f"{field} is {value:g}; it must be within 0..{bound}, the image's {side}", field=field)


def batches_from_prompts(prompts: Sequence[Prompt], scale: tuple[float, float]) -> Iterator[PromptBatch]:
    """Yield the prompts, in order, as padded tensors; `scale` is (x, y): input pixels per pixel of the original."""
    for start in range(0, len(prompts), PROMPT_BUCKETS[-1]):
        yield _batch_from_prompts(prompts[start : start + PROMPT_BUCKETS[-1]], scale)


def _batch_from_prompts(prompts: Sequence[Prompt], scale: tuple[float, float]) -> PromptBatch:
    rows = _bucket_of(len(prompts), PROMPT_BUCKETS)
    tokens = _bucket_of(max(prompt.token_count for prompt in prompts), TOKEN_BUCKETS)
    coords = np.zeros((rows, tokens, 2), np.float32)
    labels = np.full((rows, tokens), LABEL_PADDING, np.int32)
    labels[len(prompts) :, 0] = LABEL_NOT_A_POINT  # a padding prompt attends to something, so that it stays finite
    for row, prompt in enumerate(prompts):
        triples = [(point.x, point.y, point.label) for point in prompt.points]
        if box := prompt.box:
            triples += [(box.x0, box.y0, LABEL_BOX_TOP_LEFT), (box.x1, box.y1, LABEL_BOX_BOTTOM_RIGHT)]
        else:
            triples.append((0.0, 0.0, LABEL_NOT_A_POINT))
        table = np.array(triples, np.float64)
        coords[row, : len(triples)] = table[:, :2] * scale
        labels[row, : len(triples)] = table[:, 2]
    return PromptBatch(coords, labels, len(prompts))


def _bucket_of(count: int, buckets: tuple[int, ...]) -> int:
    return next(bucket for bucket in buckets if bucket >= count)
