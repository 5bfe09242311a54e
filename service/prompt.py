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
MAX_MASK_INPUTS = 64  # of a request: 128 KiB each, where the model is the original


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
    """One object to segment: points, a box, the low-res logits of an earlier answer to refine, or several of these.

    `mask_input` is FP16, little-endian, rows of a square of side 4G.
    """

    points: tuple[Point, ...] = ()
    box: Box | None = None
    mask_input: bytes | None = None

    @property
    def is_ambiguous(self) -> bool:
        """Whether this is a lone point, which may mean a part or the whole; the original then offers candidates."""
        return len(self.points) == 1 and self.box is None and self.mask_input is None

    def tokens(self) -> list[tuple[float, float, int]]:
        """Return (x, y, label) of what the decoder attends to, as the original's prompt encoder makes it.

        The points, and after them a box's corners, or one "not a point" in its stead. A mask alone has none.
        """
        found: list[tuple[float, float, int]] = [(point.x, point.y, point.label) for point in self.points]
        if box := self.box:
            found += [(box.x0, box.y0, LABEL_BOX_TOP_LEFT), (box.x1, box.y1, LABEL_BOX_BOTTOM_RIGHT)]
        elif found:
            found.append((0.0, 0.0, LABEL_NOT_A_POINT))
        return found


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Tensors of several prompts on one image, padded to buckets.

    `coords` is FP32 [P, N, 2] in input pixels, `labels` INT32 [P, N], `masks` FP16 [P, 4G, 4G], or None where no prompt
    has a mask input. `places` says which of the caller's prompts the first rows are; the others are padding.
    """

    coords: NDArray[np.float32]
    labels: NDArray[np.int32]
    masks: NDArray[np.float16] | None
    places: tuple[int, ...]


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


def check_prompts(prompts: Sequence[Prompt], size: tuple[int, int], mask_size: int) -> None:
    """Raise `InvalidPromptError`, naming field and bound, unless all prompts fit.

    They must fit an image of `size` (height, width), and a model whose low-res logits have the side `mask_size`.
    """
    check_counts(len(prompts), (len(prompt.points) for prompt in prompts))
    check_mask_count(sum(prompt.mask_input is not None for prompt in prompts))
    for index, prompt in enumerate(prompts):
        _check_prompt(prompt, f"prompts[{index}]", size)
        if prompt.mask_input is not None:
            _check_mask_input(prompt.mask_input, f"prompts[{index}].mask_input", mask_size)


def check_mask_count(masks: int) -> None:
    """Raise `InvalidPromptError` if so many prompts of a request cannot have a mask input."""
    if masks > MAX_MASK_INPUTS:
        raise InvalidPromptError(
            f"{masks} prompts have a mask_input; at most {MAX_MASK_INPUTS} of a request may", field="prompts"
        )


def mask_input_nbytes(mask_size: int) -> int:
    """Return how many bytes a mask input has, of a model whose low-res logits have that side."""
    return 2 * mask_size * mask_size


def _check_mask_input(data: bytes, field: str, mask_size: int) -> None:
    nbytes = mask_input_nbytes(mask_size)
    if len(data) != nbytes:
        form = f"{nbytes} bytes, FP16 of {mask_size} x {mask_size}"
        raise InvalidPromptError(f"{field} must hold {form}: the logits of an earlier answer", field=field)
    if not np.isfinite(np.frombuffer(data, "<f2")).all():
        raise InvalidPromptError(f"{field} holds values that are not finite", field=field)


def _check_prompt(prompt: Prompt, field: str, size: tuple[int, int]) -> None:
    if not prompt.points and prompt.box is None and prompt.mask_input is None:
        raise InvalidPromptError(f"{field} is empty; give it points, a box, or a mask_input", field=field)
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
    """Yield the prompts as padded tensors, in as few batches as may be; those with a mask input are kept apart.

    `scale` is (x, y): input pixels per pixel of the original.
    """
    for has_mask in (False, True):
        places = [place for place, prompt in enumerate(prompts) if (prompt.mask_input is not None) == has_mask]
        for start in range(0, len(places), PROMPT_BUCKETS[-1]):
            some = places[start : start + PROMPT_BUCKETS[-1]]
            yield _batch_from_prompts([prompts[place] for place in some], tuple(some), scale)


def _batch_from_prompts(prompts: Sequence[Prompt], places: tuple[int, ...], scale: tuple[float, float]) -> PromptBatch:
    listed = [prompt.tokens() for prompt in prompts]
    rows = _bucket_of(len(prompts), PROMPT_BUCKETS)
    columns = _bucket_of(max(map(len, listed)), TOKEN_BUCKETS)
    coords = np.zeros((rows, columns, 2), np.float32)
    labels = np.full((rows, columns), LABEL_PADDING, np.int32)
    labels[len(prompts) :, 0] = LABEL_NOT_A_POINT  # a padding prompt attends to something, so that it stays finite
    for row, tokens in enumerate(listed):
        table = np.array(tokens, np.float64).reshape(-1, 3)
        coords[row, : len(tokens)] = table[:, :2] * scale
        labels[row, : len(tokens)] = table[:, 2]
    return PromptBatch(coords, labels, _masks_from_prompts(prompts, rows), places)


def _masks_from_prompts(prompts: Sequence[Prompt], rows: int) -> NDArray[np.float16] | None:
    """Return the mask inputs FP16 [rows, 4G, 4G], of padding zeros."""
    given = [np.frombuffer(prompt.mask_input, "<f2") for prompt in prompts if prompt.mask_input is not None]
    if not given:
        return None
    side = math.isqrt(given[0].size)
    masks = np.zeros((rows, side, side), np.float16)
    masks[: len(given)] = np.stack(given).reshape(-1, side, side)
    return masks


def _bucket_of(count: int, buckets: tuple[int, ...]) -> int:
    return next(bucket for bucket in buckets if bucket >= count)
