"""Masks: from the decoder's logits to what a caller can use. Pure."""

import math
import struct
import zlib
from dataclasses import dataclass
from enum import StrEnum

import cv2
import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidPromptError, ModelUnavailableError
from service.polygon import Polygon, polygons_from_edges
from service.regions import holes_filled, islands_dropped
from service.rle import binary_from_edges, edges_from_binary, rle_counts_from_edges
from service.upscaling import FROM_INFINITY, Frame, edges_from_logits, float32_from_float16

STABILITY_OFFSET = 1.0  # the original's `calculate_stability_score`: IoU of the masks at logits +1 and -1
MAX_REGION_AREA_PX = 1_000_000
MAX_POLYGON_TOLERANCE_PX = 100.0
QUICK_VALUES = 600_000  # three masks of 640 x 480 for an encoder of 384, one for an encoder of 1024


class MaskFormat(StrEnum):
    """How a mask is written: COCO's compressed run lengths, a bilevel PNG, polygons, or not at all."""

    RLE = "rle"
    PNG = "png"
    POLYGON = "polygon"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class MaskOutput:
    """What a caller wants of each mask.

    `include_logits`: the low-res logits too. `min_region_area_px`: holes and islands of fewer pixels go.
    `polygon_tolerance_px`: how far a polygon may be from the mask's edge.
    """

    format: MaskFormat = MaskFormat.RLE
    include_logits: bool = False
    min_region_area_px: int = 0
    polygon_tolerance_px: float = 1.0


DEFAULT_OUTPUT = MaskOutput()


@dataclass(frozen=True, slots=True)
class Mask:
    """One mask of the original image's size.

    `data` is COCO's compressed counts or a PNG, by `format`, and empty where it is neither; `polygons` are in pixels;
    `score` is the predicted IoU; `stability` the stability score of the low-res logits; `bbox` COCO's
    (x, y, width, height); `area` in pixels; `logits`, where asked for, the decoder's own, which `Prompt.mask_input`
    takes: FP16, little-endian, rows of a square of side 4G.
    """

    format: MaskFormat
    data: bytes
    polygons: tuple[Polygon, ...]
    size: tuple[int, int]
    score: float
    stability: float
    bbox: tuple[int, int, int, int]
    area: int
    logits: bytes | None = None


def unknown_format() -> InvalidPromptError:
    """Return the error for a format that is none."""
    *others, last = MaskFormat
    return InvalidPromptError(f"format must be {', '.join(others)} or {last}", field="format")


def check_output(output: MaskOutput) -> None:
    """Raise `InvalidPromptError`, naming field and bound, unless the output can be given."""
    if not 0 <= output.min_region_area_px <= MAX_REGION_AREA_PX:
        field, bound = "min_region_area", f"within 0..{MAX_REGION_AREA_PX} pixels"
        raise InvalidPromptError(f"{field} is {output.min_region_area_px}; it must be {bound}", field=field)
    tolerance_px = output.polygon_tolerance_px
    if not (math.isfinite(tolerance_px) and 0 <= tolerance_px <= MAX_POLYGON_TOLERANCE_PX):
        field, bound = "polygon_tolerance", f"within 0..{MAX_POLYGON_TOLERANCE_PX:g} pixels"
        raise InvalidPromptError(f"{field} is {tolerance_px:g}; it must be {bound}", field=field)


def chosen_candidates(scores: NDArray[np.float32], *, multimask: bool | None, is_ambiguous: bool) -> list[int]:
    """Return the indices, of the decoder's four masks, to answer with.

    True: the three candidates, best first. False: the single-mask output (token 0). None: the original's rule
    (`SamOnnxModel.select_masks`): the best candidate for a lone point, which is ambiguous, else token 0.
    """
    if multimask is False or (multimask is None and not is_ambiguous):
        return [0]
    best_first = sorted(range(1, scores.size), key=scores.tolist().__getitem__, reverse=True)
    return best_first if multimask else best_first[:1]


def is_quick(frame: Frame, count: int, output: MaskOutput) -> bool:
    """Return whether `count` masks are made in about a millisecond: a thread would take longer to come to it.

    Under load a thread waits up to 5 ms for its turn with the interpreter, and makes the event loop wait as long for
    its own. What takes time is to interpolate so many values.
    """
    values = count * frame.size[1] * frame.valid_size[0]
    is_short = output.format in (MaskFormat.RLE, MaskFormat.NONE) and not output.min_region_area_px
    return is_short and values <= QUICK_VALUES


def masks_from_logits(
    logits: NDArray[np.float16], scores: NDArray[np.float32], chosen: list[int], frame: Frame, output: MaskOutput
) -> tuple[Mask, ...]:
    """Turn the `chosen` of one prompt's low-res `logits` [4, 4G, 4G] and `scores` [4] into masks, in that order."""
    return tuple(mask_from_logits(logits[index], float(scores[index]), frame, output) for index in chosen)


def mask_from_logits(logits: NDArray[np.float16], score: float, frame: Frame, output: MaskOutput) -> Mask:
    """Turn low-res `logits` [4G, 4G] into a mask of the original's size.

    Raises:
        ModelUnavailableError: the model computed what is not a number, as FP16 does when it overflows.
    """
    values = float32_from_float16(logits)
    if not (math.isfinite(score) and values.max() <= FROM_INFINITY and values.min() >= -FROM_INFINITY):
        raise ModelUnavailableError("the model's answer holds values that are not numbers")
    edges = edges_from_logits(values, frame)
    if output.min_region_area_px:
        edges = _cleaned(edges, frame.size, output.min_region_area_px)
    bbox = bbox_of(edges, frame.size)
    data, polygons = b"", tuple[Polygon, ...]()
    match output.format:
        case MaskFormat.RLE:
            data = rle_counts_from_edges(edges, frame.size)
        case MaskFormat.PNG:
            data = png_from_edges(edges, frame.size)
        case MaskFormat.POLYGON:
            polygons = polygons_from_edges(edges, frame.size[0], output.polygon_tolerance_px)
    return Mask(
        format=output.format,
        data=data,
        polygons=polygons,
        size=frame.size,
        score=score,
        stability=stability_of(values, frame),
        bbox=bbox,
        area=int((edges[1::2] - edges[::2]).sum()),
        logits=logits.astype("<f2").tobytes() if output.include_logits else None,
    )


def _cleaned(edges: NDArray[np.int64], size: tuple[int, int], min_area_px: int) -> NDArray[np.int64]:
    """Fill holes, then drop islands, of fewer pixels than that: the original's order.

    Only in the columns of the mask, and in so many beside it that they alone have `min_area_px`, or are all there are:
    with more, what lies outside the mask would be no smaller for it.
    """
    height, width = size
    x, _, mask_width, _ = bbox_of(edges, size)
    margin = math.ceil(min_area_px / height)
    left, right = max(x - margin, 0), min(x + mask_width + margin, width)
    filled, was_filled = holes_filled(binary_from_edges(edges - left * height, (height, right - left)), min_area_px)
    kept, were_dropped = islands_dropped(filled, min_area_px)
    return edges_from_binary(kept) + left * height if was_filled or were_dropped else edges


def binary_from_logits(logits: NDArray[np.float32], frame: Frame) -> NDArray[np.bool_]:
    """Upscale `logits` [4G, 4G] and threshold: bool [height, width], in column order."""
    return binary_from_edges(edges_from_logits(logits, frame), frame.size)


def stability_of(logits: NDArray[np.float32], frame: Frame) -> float:
    """Return the stability score of low-res `logits` [4G, 4G] inside the picture; 0 when nothing is near the mask."""
    per_pixel = logits.shape[0] / frame.input_size
    rows, columns = (max(1, round(side * per_pixel)) for side in frame.valid_size)
    valid = logits[:rows, :columns]
    union = int(np.count_nonzero(valid > -STABILITY_OFFSET))
    return int(np.count_nonzero(valid > STABILITY_OFFSET)) / union if union else 0.0


def bbox_of(edges: NDArray[np.int64], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return COCO's (x, y, width, height) of a mask with these edges; zeros if it is empty."""
    if not edges.size:
        return (0, 0, 0, 0)
    first_x, first_y = np.divmod(edges[::2], size[0])
    last_x, last_y = np.divmod(edges[1::2] - 1, size[0])
    x, y, end_x, end_y = int(first_x[0]), int(first_y.min()), int(last_x[-1]) + 1, int(last_y.max()) + 1
    if (first_x != last_x).any():  # from the bottom of one column on to the top of the next
        y, end_y = 0, size[0]
    return (x, y, end_x - x, end_y - y)


def png_from_edges(edges: NDArray[np.int64], size: tuple[int, int]) -> bytes:
    """Return a mask with these edges as a bilevel PNG, white on black (https://www.w3.org/TR/png-3/)."""
    height, width = size
    x, _, columns, _ = bbox_of(edges, size)
    picture = np.zeros(size, np.uint8)
    if columns:
        part = binary_from_edges(edges - x * height, (height, columns)).T
        picture[:, x : x + columns] = cv2.transpose(part.view(np.uint8))
    unfiltered = np.zeros((height, 1), np.uint8)
    rows = np.concatenate((unfiltered, np.packbits(picture, axis=1)), axis=1)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # one bit a pixel, grey
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
