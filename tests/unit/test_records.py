"""Everything-mode's choice among masks, against the original package's own functions."""

from collections.abc import Sequence

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco

from service.everything import Crop, Parameters
from service.mask import binary_from_logits
from service.records import (
    Candidate,
    Record,
    candidates_from_output,
    is_cut_off,
    records_from_candidates,
    stability_score,
    without_duplicates,
    without_duplicates_between_crops,
    without_new_duplicates,
    without_small_regions,
)
from service.rle import binary_from_rle_counts, rle_counts_from_binary
from service.upscaling import Frame
from tests.export.original import original_amg
from tests.export.original_generator import batched_nms

AMG = original_amg()
ALL = Parameters(pred_iou_thresh=0, stability_score_thresh=0)
WHOLE = Crop(0, 0, 60, 40, 0)


def record(x0: int, y0: int, x1: int, y1: int, predicted_iou: float = 0.9, crop: Crop = WHOLE) -> Record:
    binary = np.zeros((40, 60), np.bool_)
    binary[y0 : y1 + 1, x0 : x1 + 1] = True
    area = int(binary.sum())
    return Record(rle_counts_from_binary(binary), area, (x0, y0, x1, y1), predicted_iou, 1.0, (x0, y0), crop)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    x0, y0 = draw(st.integers(0, 59)), draw(st.integers(0, 39))
    return x0, y0, draw(st.integers(x0, 59)), draw(st.integers(y0, 39))


@given(st.lists(st.tuples(boxes(), st.sampled_from([0.1, 0.5, 0.5001, 0.9])), max_size=12), st.floats(0, 1))
@example([((0, 0, 1, 1), 0.1)] * 10, float(np.nextafter(1, 0)))  # a threshold that FP32 cannot tell from 1
def test_duplicates_go_as_with_torchvision_s_nms(
    found: Sequence[tuple[tuple[int, int, int, int], float]], max_iou: float
) -> None:
    records = [record(*box, predicted_iou=score) for box, score in found]
    corners = torch.tensor([each.corners for each in records]).reshape(-1, 4).float()
    scores = torch.tensor([score for _, score in found])
    kept = batched_nms(corners, scores, torch.zeros(len(records)), max_iou)
    ours = without_duplicates(records, [score for _, score in found], max_iou)
    assert [id(each) for each in ours] == [id(records[index]) for index in kept]


def test_of_two_crops_the_smaller_one_s_mask_stays() -> None:
    small = Crop(0, 0, 30, 20, 1)
    large_find, small_find, other = record(5, 5, 20, 15), record(5, 5, 20, 14, crop=small), record(40, 20, 50, 30)
    kept = without_duplicates_between_crops([large_find, other, small_find], Parameters())
    assert kept == [small_find, other]


@given(boxes(), boxes(), st.integers(1, 200), st.integers(1, 200))
def test_masks_at_a_crop_s_edge_are_found_as_by_the_original(
    box: tuple[int, int, int, int], crop_box: tuple[int, int, int, int], scale: int, margin: int
) -> None:
    x0, y0, x1, y1 = (scale * corner for corner in crop_box)
    size = (40 * scale + margin, 60 * scale + margin)
    crop = Crop(x0, y0, x1 + 1, y1 + 1, 1)
    corners = tuple(scale * corner for corner in box)
    inside = torch.tensor([corners]) - torch.tensor([[x0, y0, x0, y0]])
    expected = AMG.is_box_near_crop_edge(inside, list(crop[:4]), [0, 0, size[1], size[0]])
    assert is_cut_off(corners, crop, size) == bool(expected[0])


@given(arrays(np.float32, (16, 16), elements=st.floats(-8, 8, width=16)), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_stability_score_is_the_original_s_and_0_where_that_is_no_number(logits: np.ndarray, offset: float) -> None:
    frame = Frame(64, (48, 64), (75, 100))
    full = cv2.resize(logits, (64, 64), interpolation=cv2.INTER_LINEAR)
    picture = cv2.resize(full[:48], (100, 75), interpolation=cv2.INTER_LINEAR)
    expected = float(AMG.calculate_stability_score(torch.from_numpy(picture)[None], 0.0, offset)[0])
    tolerance = 3 / max(np.count_nonzero(picture > -offset), 3)  # pixels whose value is that of the threshold
    assert stability_score(logits, frame, offset) == pytest.approx(
        0.0 if np.isnan(expected) else expected, abs=tolerance
    )


def disc(x: float, y: float, radius: float) -> np.ndarray:
    """Low-res logits [16, 16] of a disc in units of low-res pixels."""
    rows, columns = np.mgrid[:16, :16] + 0.5
    return (radius - np.hypot(columns - x, rows - y)).astype(np.float16)


def test_only_the_three_candidates_above_the_threshold_of_real_prompts_are_looked_at() -> None:
    masks = np.zeros((4, 4, 16, 16), np.float16)
    masks[..., 0, 0] = np.arange(16).reshape(4, 4)
    scores = np.array([[1.0, 0.9, 0.1, 0.7], [1.0, 0.5, 0.51, 0.2], [1, 1, 1, 1], [1, 1, 1, 1]], np.float32)
    points = np.array([[1.0, 2.0], [3.0, 4.0]])
    found = candidates_from_output(masks, scores, points, Parameters(pred_iou_thresh=0.5))
    assert [float(each.logits[0, 0]) for each in found] == [1, 3, 6]
    assert [each.point for each in found] == [(1.0, 2.0), (1.0, 2.0), (3.0, 4.0)]
    assert len(candidates_from_output(masks, scores, points, ALL)) == 6


def test_a_record_of_a_crop_lies_where_the_crop_does() -> None:
    crop, size = Crop(40, 20, 104, 84, 1), (200, 300)
    frame = Frame(64, (64, 64), crop.size)
    candidate = Candidate(disc(8, 8, 2), 0.75, (32.0, 32.0))
    (found,) = records_from_candidates([candidate], crop, frame, size, ALL)
    expected = np.zeros(size, np.bool_)
    expected[20:84, 40:104] = binary_from_logits(disc(8, 8, 2).astype(np.float32), frame)
    binary = binary_from_rle_counts(found.counts, size)
    np.testing.assert_array_equal(binary, expected)
    assert found.area == expected.sum()
    rle = {"size": list(size), "counts": found.counts}
    x, y, width, height = coco.toBbox(rle)
    assert found.bbox == (x, y, width - 1, height - 1)
    assert found.crop_box == (40, 20, 64, 64)
    assert found.point == (72.0, 52.0)
    boxes_of_original = AMG.batched_mask_to_box(torch.from_numpy(expected)[None])
    assert list(found.corners) == boxes_of_original[0].tolist()


@pytest.mark.parametrize(
    ("logits", "parameters"),
    [
        (np.full((16, 16), -0.5, np.float16), ALL),  # empty
        (disc(8, 8, 2), Parameters(stability_score_thresh=0.9)),
        (disc(1, 8, 1.5), ALL),  # 20 pixels of its crop's left edge
    ],
    ids=["empty", "unstable", "cut off"],
)
def test_masks_that_are_of_no_use_make_no_records(logits: np.ndarray, parameters: Parameters) -> None:
    crop = Crop(100, 100, 164, 164, 1)
    frame = Frame(64, (64, 64), crop.size)
    assert records_from_candidates([Candidate(logits, 1.0, (32, 32))], crop, frame, (300, 300), parameters) == []


@given(arrays(np.bool_, st.just((12, 17))), st.sampled_from([1, 3, 6, 50]))
def test_small_regions_go_as_in_the_original(binary: np.ndarray, min_area_px: int) -> None:
    if not binary.any():
        return
    x, y, width, height = (int(each) for each in coco.toBbox(coco.encode(np.asfortranarray(binary, np.uint8))))
    before = Record(
        rle_counts_from_binary(binary), int(binary.sum()), (x, y, x + width - 1, y + height - 1), 1, 1, (0, 0), WHOLE
    )
    expected, is_filled = AMG.remove_small_regions(binary, min_area_px, "holes")
    expected, is_trimmed = AMG.remove_small_regions(expected, min_area_px, "islands")
    after = without_small_regions(before, (12, 17), min_area_px)
    assert (after is before) == (not (is_filled or is_trimmed))
    np.testing.assert_array_equal(binary_from_rle_counts(after.counts, (12, 17)), expected)
    assert after.area == expected.sum()
    assert list(after.corners) == AMG.batched_mask_to_box(torch.from_numpy(expected)[None])[0].tolist()


def test_where_cleaning_made_duplicates_the_unchanged_mask_stays() -> None:
    before = [record(5, 5, 20, 15), record(5, 5, 20, 14), record(40, 20, 50, 30)]
    changed = record(5, 5, 20, 15, predicted_iou=0.99)
    kept = without_new_duplicates(before, [changed, before[1], before[2]], Parameters(crop_nms_thresh=0.5))
    assert kept == [before[1], before[2]]
