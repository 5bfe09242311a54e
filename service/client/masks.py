"""What a client gets: masks of prompts, and the records of everything-mode. Decoded when they are looked at."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.rle import binary_from_rle_counts
from service.rpc.pb import segment_anything_pb2 as pb

LOGITS_DTYPE = np.dtype("<f2")
BoundingBox = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class _RunLengths:
    """A mask of an image of `size` (height, width), as COCO's compressed `counts`."""

    size: tuple[int, int]
    counts: bytes = field(repr=False)

    @cached_property
    def array(self) -> NDArray[np.bool_]:
        """The mask, bool [height, width]; decoded at the first use and kept."""
        return binary_from_rle_counts(self.counts, self.size)

    @property
    def rle(self) -> dict[str, Any]:
        """COCO's run-length dictionary, ready for JSON and pycocotools."""
        return {"size": list(self.size), "counts": self.counts.decode()}


@dataclass(frozen=True, eq=False)
class Mask(_RunLengths):
    """One mask of a prompt.

    `score` is the predicted IoU, `stability` the stability score, `bbox` COCO's (x, y, width, height), `area` in
    pixels; `logits` are low-res, FP16 [4G, 4G], if they were asked for: what `mask_input` of a further prompt takes.
    """

    score: float
    stability: float
    bbox: BoundingBox
    area: int
    logits: NDArray[np.float16] | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Record(_RunLengths):
    """One mask of everything-mode, as the original's `SamAutomaticMaskGenerator` describes it.

    `point_coords` is the point (x, y) that it was found by; `crop_box` (x, y, width, height) where it was looked for.
    """

    area: int
    bbox: BoundingBox
    predicted_iou: float
    point_coords: tuple[float, float]
    stability_score: float
    crop_box: BoundingBox

    @property
    def annotation(self) -> dict[str, Any]:
        """The record as SA-1B's annotations have it, ready for JSON."""
        return {
            "segmentation": self.rle,
            "area": self.area,
            "bbox": list(self.bbox),
            "predicted_iou": self.predicted_iou,
            "point_coords": [list(self.point_coords)],
            "stability_score": self.stability_score,
            "crop_box": list(self.crop_box),
        }


def masks_from_pb(message: pb.SegmentResponse) -> list[list[Mask]]:
    """Return for each prompt its masks, best first."""
    size = (message.image.size.height, message.image.size.width)
    return [[_mask_from_pb(mask, size) for mask in result.masks] for result in message.results]


def _mask_from_pb(message: pb.Mask, size: tuple[int, int]) -> Mask:
    return Mask(
        size=size,
        counts=message.rle_counts,
        score=message.score,
        stability=message.stability,
        bbox=_box_from_pb(message.bbox),
        area=message.area,
        logits=_logits_from_bytes(message.logits) if message.HasField("logits") else None,
    )


def record_from_pb(message: pb.Record, size: tuple[int, int]) -> Record:
    """Return a record of an image of `size` (height, width)."""
    return Record(
        size=size,
        counts=message.rle_counts,
        area=message.area,
        bbox=_box_from_pb(message.bbox),
        predicted_iou=message.predicted_iou,
        point_coords=(message.point_x, message.point_y),
        stability_score=message.stability_score,
        crop_box=_box_from_pb(message.crop_box),
    )


def bytes_from_logits(logits: NDArray[np.floating[Any]]) -> bytes:
    """Return low-res logits [4G, 4G] as `mask_input` has them."""
    return np.ascontiguousarray(logits, LOGITS_DTYPE).tobytes()


def _logits_from_bytes(data: bytes) -> NDArray[np.float16]:
    side = math.isqrt(len(data) // LOGITS_DTYPE.itemsize)
    return np.frombuffer(data, LOGITS_DTYPE).reshape(side, side)


def _box_from_pb(message: pb.BoundingBox) -> BoundingBox:
    return (message.x, message.y, message.width, message.height)
