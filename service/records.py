"""Everything-mode's masks: from the decoder's logits to the records that stay. Pure.

What the original's `SamAutomaticMaskGenerator` does with its candidates, in its order: thresholds on predicted IoU and
stability, no masks that a crop's edge cuts off, suppression of duplicates within and between crops, small regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from service.everything import Crop, Parameters
from service.mask import bbox_of
from service.regions import holes_filled, islands_dropped
from service.rle import binary_from_edges, binary_from_rle_counts, edges_from_binary, rle_counts_from_edges
from service.upscaling import Frame, edges_from_logits

EDGE_PX = 20.0  # masks that come as near to a crop's edge are cut off there

Corners = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Record:
    """One mask of the whole image, as SA-1B's annotations have it.

    `counts` are COCO's compressed run lengths, `area` in pixels, `corners` the first and last column and row (x0, y0,
    x1, y1), `point` the (x, y) it was found by, `crop` where.
    """

    counts: bytes
    area: int
    corners: Corners
    predicted_iou: float
    stability_score: float
    point: tuple[float, float]
    crop: Crop

    @property
    def bbox(self) -> Corners:
        """(x, y, width, height) as the original has it: last minus first, one less than COCO's width and height."""
        x0, y0, x1, y1 = self.corners
        return x0, y0, x1 - x0, y1 - y0

    @property
    def crop_box(self) -> Corners:
        """(x, y, width, height) of the crop."""
        height, width = self.crop.size
        return self.crop.x0, self.crop.y0, width, height


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the decoder's masks that is worth a look: low-res `logits` FP16 [4G, 4G] of a crop, and how it was found.

    `point` is in pixels of the crop.
    """

    logits: NDArray[np.float16]
    predicted_iou: float
    point: tuple[float, float]


def candidates_from_output(
    masks: NDArray[np.float16], scores: NDArray[np.float32], points: NDArray[np.float64], parameters: Parameters
) -> list[Candidate]:
    """Return those of three candidates a point whose predicted IoU is above the threshold, point by point.

    `masks` FP16 [P, 4, 4G, 4G] and `scores` FP32 [P, 4] are the decoder's, `points` FP64 [n, 2] the first n of its P.
    """
    wanted = scores[: len(points), 1:]
    above = wanted > parameters.pred_iou_thresh if parameters.pred_iou_thresh > 0 else np.ones(wanted.shape, np.bool_)
    return [
        Candidate(masks[row, 1 + column], float(wanted[row, column]), (float(points[row, 0]), float(points[row, 1])))
        for row, column in np.argwhere(above)
    ]


def records_from_candidates(
    candidates: Sequence[Candidate], crop: Crop, frame: Frame, size: tuple[int, int], parameters: Parameters
) -> list[Record]:
    """Return the records of those candidates that are stable, not empty and not cut off by the crop's edge.

    `frame` is the crop's, `size` the whole image's (height, width).
    """
    found = (_record_from_candidate(candidate, crop, frame, size, parameters) for candidate in candidates)
    return [record for record in found if record is not None]


def _record_from_candidate(
    candidate: Candidate, crop: Crop, frame: Frame, size: tuple[int, int], parameters: Parameters
) -> Record | None:
    logits = candidate.logits.astype(np.float32)
    stability = stability_score(logits, frame, parameters.stability_score_offset)
    if stability < parameters.stability_score_thresh:
        return None
    edges = edges_from_logits(logits, frame)
    x, y, width, height = bbox_of(edges, crop.size)
    corners = (crop.x0 + x, crop.y0 + y, crop.x0 + x + width - 1, crop.y0 + y + height - 1)
    if not width or is_cut_off(corners, crop, size):
        return None
    return Record(
        counts=rle_counts_from_edges(_uncropped(edges, crop, size), size),
        area=area_of(edges),
        corners=corners,
        predicted_iou=candidate.predicted_iou,
        stability_score=stability,
        point=(candidate.point[0] + crop.x0, candidate.point[1] + crop.y0),
        crop=crop,
    )


def _uncropped(edges: NDArray[np.int64], crop: Crop, size: tuple[int, int]) -> NDArray[np.int64]:
    """Return the edges, in the whole image, of a mask with these edges in the crop."""
    if crop.size == size:
        return edges
    whole = np.zeros(size, np.bool_)
    whole[crop.y0 : crop.y1, crop.x0 : crop.x1] = binary_from_edges(edges, crop.size)
    return edges_from_binary(whole)


def area_of(edges: NDArray[np.int64]) -> int:
    """Return the pixels of a mask with these edges (see `service.rle`)."""
    return int((edges[1::2] - edges[::2]).sum())


def stability_score(logits: NDArray[np.float32], frame: Frame, offset: float) -> float:
    """Return the IoU of the masks of the crop's size that low-res `logits` [4G, 4G] give at +`offset` and -`offset`.

    0 where both are empty.
    """
    union = area_of(edges_from_logits(logits + offset, frame))
    return area_of(edges_from_logits(logits - offset, frame)) / union if union else 0.0


def is_cut_off(corners: Corners, crop: Crop, size: tuple[int, int]) -> bool:
    """Whether a mask comes near an edge of its crop that is not near the same edge of the image (height, width)."""
    edges = zip(corners, crop[:4], (0, 0, size[1], size[0]), strict=True)
    return any(abs(corner - cut) <= EDGE_PX < abs(corner - edge) for corner, cut, edge in edges)


def without_duplicates(records: Sequence[Record], scores: Sequence[float], max_iou: float) -> list[Record]:
    """Return the records by falling score, without those whose box's IoU with a better one's is above `max_iou`.

    Of equal scores the earlier record is better. Boxes are between corners, so that one pixel's is empty, and
    arithmetic is in FP32: both as in the original.
    """
    boxes = np.array([record.corners for record in records], np.float32).reshape(-1, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = np.argsort(-np.array(scores, np.float32), kind="stable")
    kept: list[int] = []
    while left.size:
        best, left = int(left[0]), left[1:]
        kept.append(best)
        begin, end = np.maximum(boxes[left, :2], boxes[best, :2]), np.minimum(boxes[left, 2:], boxes[best, 2:])
        shared = np.maximum(end - begin, 0).prod(axis=1)
        union = areas[left] + areas[best] - shared
        iou = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
        left = left[iou.astype(np.float64) <= max_iou]
    return [records[index] for index in kept]


def without_duplicates_in_crop(records: Sequence[Record], parameters: Parameters) -> list[Record]:
    """Return a crop's records by falling predicted IoU, without duplicates."""
    return without_duplicates(records, [record.predicted_iou for record in records], parameters.box_nms_thresh)


def without_duplicates_between_crops(records: Sequence[Record], parameters: Parameters) -> list[Record]:
    """Return the records, those of smaller crops first, without duplicates."""
    scores = [1 / (record.crop.size[0] * record.crop.size[1]) for record in records]
    return without_duplicates(records, scores, parameters.crop_nms_thresh)


def without_small_regions(record: Record, size: tuple[int, int], min_area_px: float) -> Record:
    """Return the record with its mask's small holes filled and small islands dropped; itself if there are none."""
    binary, is_filled = holes_filled(binary_from_rle_counts(record.counts, size), min_area_px)
    binary, is_trimmed = islands_dropped(binary, min_area_px)
    if not (is_filled or is_trimmed):
        return record
    edges = edges_from_binary(binary)
    x, y, width, height = bbox_of(edges, size)
    return replace(
        record,
        counts=rle_counts_from_edges(edges, size),
        area=area_of(edges),
        corners=(x, y, x + width - 1, y + height - 1),
    )


def without_new_duplicates(before: Sequence[Record], after: Sequence[Record], parameters: Parameters) -> list[Record]:
    """Return the records `after` small regions went, unchanged ones first, without those that became duplicates."""
    scores = [float(old is new) for old, new in zip(before, after, strict=True)]
    return without_duplicates(after, scores, max(parameters.box_nms_thresh, parameters.crop_nms_thresh))
