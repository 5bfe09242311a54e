"""Masks: from the decoder's logits to what a caller can use. Pure."""

import io
from dataclasses import dataclass
from enum import StrEnum

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.rle import rle_counts_from_binary

STABILITY_OFFSET = 1.0  # the original's `calculate_stability_score`: IoU of the masks at logits +1 and -1


class MaskFormat(StrEnum):
    """How a mask is written: COCO's compressed run lengths, or a bilevel PNG."""

    RLE = "rle"
    PNG = "png"


@dataclass(frozen=True, slots=True)
class Frame:
    """Where low-res logits lie: input side S, picture (height, width) inside the input, original (height, width)."""

    input_size: int
    valid_size: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Mask:
    """One mask of the original image's size.

    `data` is COCO's compressed counts or a PNG, by `format`; `score` is the predicted IoU; `stability` the stability
    score of the low-res logits; `bbox` COCO's (x, y, width, height); `area` in pixels.
    """

    format: MaskFormat
    data: bytes
    size: tuple[int, int]
    score: float
    stability: float
    bbox: tuple[int, int, int, int]
    area: int


def chosen_candidates(scores: NDArray[np.float32], *, multimask: bool | None, is_ambiguous: bool) -> list[int]:
    """Return the indices, of the decoder's four masks, to answer with.

    True: the three candidates, best first. False: the single-mask output (token 0). None: the original's rule
    (`SamOnnxModel.select_masks`): the best candidate for a lone point, which is ambiguous, else token 0.
    """
    if multimask is False or (multimask is None and not is_ambiguous):
        return [0]
    best_first = 1 + np.argsort(-scores[1:], kind="stable")
    return [int(index) for index in (best_first if multimask else best_first[:1])]


def masks_from_logits(
    logits: NDArray[np.float16], scores: NDArray[np.float32], chosen: list[int], frame: Frame, mask_format: MaskFormat
) -> tuple[Mask, ...]:
    """Turn the `chosen` of one prompt's low-res `logits` [4, 4G, 4G] and `scores` [4] into masks, in that order."""
    return tuple(mask_from_logits(logits[index], float(scores[index]), frame, mask_format) for index in chosen)


def mask_from_logits(logits: NDArray[np.float16], score: float, frame: Frame, mask_format: MaskFormat) -> Mask:
    """Turn low-res `logits` [4G, 4G] into a mask of the original's size."""
    values = logits.astype(np.float32)
    binary = binary_from_logits(values, frame)
    encode = {MaskFormat.RLE: rle_counts_from_binary, MaskFormat.PNG: png_from_binary}[mask_format]
    return Mask(
        format=mask_format,
        data=encode(binary),
        size=frame.size,
        score=score,
        stability=stability_of(values, frame),
        bbox=bbox_of(binary),
        area=int(np.count_nonzero(binary)),
    )


def binary_from_logits(logits: NDArray[np.float32], frame: Frame) -> NDArray[np.bool_]:
    """Upscale `logits` [4G, 4G] and threshold: bool [height, width]."""
    return np.asarray(upscaled_from_logits(logits, frame) > 0)


def upscaled_from_logits(logits: NDArray[np.float32], frame: Frame) -> NDArray[np.float32]:
    """Upscale `logits` [4G, 4G] as the original does (`Sam.postprocess_masks`): FP32 [height, width].

    Two bilinear steps: to the input, cropped to the picture, then to the original size.
    """
    full = cv2.resize(logits, (frame.input_size, frame.input_size), interpolation=cv2.INTER_LINEAR)
    valid_height, valid_width = frame.valid_size
    height, width = frame.size
    picture = cv2.resize(full[:valid_height, :valid_width], (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(picture, np.float32)


def stability_of(logits: NDArray[np.float32], frame: Frame) -> float:
    """Return the stability score of low-res `logits` [4G, 4G] inside the picture; 0 when nothing is near the mask."""
    per_pixel = logits.shape[0] / frame.input_size
    rows, columns = (max(1, round(side * per_pixel)) for side in frame.valid_size)
    valid = logits[:rows, :columns]
    union = int(np.count_nonzero(valid > -STABILITY_OFFSET))
    return int(np.count_nonzero(valid > STABILITY_OFFSET)) / union if union else 0.0


def bbox_of(binary: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return COCO's (x, y, width, height) of the set pixels; zeros for an empty mask."""
    rows = np.flatnonzero(binary.any(axis=1))
    if not rows.size:
        return (0, 0, 0, 0)
    columns = np.flatnonzero(binary.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return (x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1)


def png_from_binary(binary: NDArray[np.bool_]) -> bytes:
    """Return a bilevel PNG, white on black."""
    buffer = io.BytesIO()
    Image.fromarray(binary).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
