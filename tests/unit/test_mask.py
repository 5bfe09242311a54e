import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco

from service.errors import InvalidPromptError, ModelUnavailableError
from service.mask import (
    MaskFormat,
    MaskOutput,
    bbox_of,
    binary_from_logits,
    check_output,
    chosen_candidates,
    is_quick,
    mask_from_logits,
    png_from_edges,
    stability_of,
)
from service.regions import holes_filled, islands_dropped
from service.rle import edges_from_binary
from service.upscaling import Frame

binaries = arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40)))


@given(binaries)
def test_bbox_is_what_pycocotools_computes(binary: np.ndarray) -> None:
    expected = coco.toBbox(coco.encode(np.asfortranarray(binary, np.uint8)))
    assert bbox_of(edges_from_binary(binary), binary.shape) == tuple(expected.astype(int))


@given(binaries)
def test_png_is_bilevel_and_reads_back_the_same(binary: np.ndarray) -> None:
    picture = Image.open(io.BytesIO(png_from_edges(edges_from_binary(binary), binary.shape)))
    assert picture.mode == "1"
    np.testing.assert_array_equal(np.asarray(picture), binary)


@pytest.mark.parametrize(
    ("multimask", "is_ambiguous", "expected"),
    [
        (True, True, [2, 3, 1]),
        (True, False, [2, 3, 1]),
        (False, True, [0]),
        (False, False, [0]),
        (None, True, [2]),
        (None, False, [0]),
    ],
)
def test_candidates_are_chosen_by_the_original_s_rule(
    multimask: bool | None,  # noqa: FBT001 - a case, not an interface
    is_ambiguous: bool,  # noqa: FBT001
    expected: list[int],
) -> None:
    scores = np.array([0.99, 0.1, 0.8, 0.3], np.float32)
    assert chosen_candidates(scores, multimask=multimask, is_ambiguous=is_ambiguous) == expected


def test_stability_looks_only_inside_the_picture() -> None:
    logits = np.full((16, 16), 9.0, np.float32)
    logits[:8] = np.repeat([2.0, 0.0], 8)
    assert stability_of(logits, Frame(64, (32, 64), (32, 64))) == pytest.approx(0.5)
    assert stability_of(np.full((16, 16), -9.0, np.float32), Frame(64, (32, 64), (32, 64))) == 0.0


def test_a_mask_describes_itself() -> None:
    logits = np.full((16, 16), -4.0, np.float16)
    logits[4:8, 4:12] = 4.0
    mask = mask_from_logits(logits, 0.75, Frame(64, (64, 64), (64, 64)), MaskOutput())
    decoded = coco.decode({"size": list(mask.size), "counts": mask.data})
    assert decoded.shape == (64, 64)
    assert mask.area == int(decoded.sum())
    assert mask.bbox == tuple(coco.toBbox({"size": [64, 64], "counts": mask.data}).astype(int))
    assert mask.score == 0.75
    assert mask.logits is None


def shape_logits(side: int, *, islands: bool = False) -> np.ndarray:
    """A disc with a hole; and crumbs in and beside it."""
    rows, columns = np.mgrid[:side, :side]
    distance = np.hypot(rows - side / 2, columns - side / 3)
    logits = np.minimum(side / 4 - distance, distance - side / 12)
    if islands:
        logits[2, -3] = 4
        logits[side // 2, side // 6] = -6
    return logits.astype(np.float16)


@given(st.sampled_from([1, 20, 150, 5000, 100_000]), st.sampled_from([(90, 120), (60, 30), (7, 128), (128, 5)]))
def test_cleaning_up_is_the_regions_own_on_the_whole_image(min_area_px: int, size: tuple[int, int]) -> None:
    frame = Frame(128, (min(128, size[0]), min(128, size[1])), size)
    logits = shape_logits(32, islands=True)
    mask = mask_from_logits(logits, 0.5, frame, MaskOutput(min_region_area_px=min_area_px))
    whole = binary_from_logits(logits.astype(np.float32), frame)
    expected = islands_dropped(holes_filled(whole, min_area_px)[0], min_area_px)[0]
    np.testing.assert_array_equal(coco.decode({"size": list(size), "counts": mask.data}), expected)
    assert (mask.area, mask.bbox) == (expected.sum(), bbox_of(edges_from_binary(expected), size))


def test_all_formats_tell_of_the_same_mask() -> None:
    frame, logits = Frame(128, (96, 128), (300, 400)), shape_logits(32)
    made = {kind: mask_from_logits(logits, 0.5, frame, MaskOutput(kind, polygon_tolerance_px=0)) for kind in MaskFormat}
    assert len({(mask.area, mask.bbox, mask.stability) for mask in made.values()}) == 1
    binary = coco.decode({"size": [300, 400], "counts": made[MaskFormat.RLE].data}).astype(bool)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(made[MaskFormat.PNG].data))), binary)
    ((outline, hole),) = made[MaskFormat.POLYGON].polygons
    filled = [coco.decode(coco.frPyObjects([list(map(float, ring))], 300, 400))[..., 0] for ring in (outline, hole)]
    np.testing.assert_array_equal(filled[0] & ~filled[1] & 1, binary)
    assert (made[MaskFormat.NONE].data, made[MaskFormat.NONE].polygons) == (b"", ())


def test_logits_are_given_as_the_decoder_made_them() -> None:
    logits = shape_logits(16)
    mask = mask_from_logits(logits, 0.5, Frame(64, (64, 64), (64, 64)), MaskOutput(include_logits=True))
    np.testing.assert_array_equal(np.frombuffer(mask.logits, "<f2").reshape(16, 16), logits)


@pytest.mark.parametrize(
    ("output", "field"),
    [
        (MaskOutput(min_region_area_px=-1), "min_region_area"),
        (MaskOutput(min_region_area_px=1_000_001), "min_region_area"),
        (MaskOutput(polygon_tolerance_px=-0.1), "polygon_tolerance"),
        (MaskOutput(polygon_tolerance_px=100.5), "polygon_tolerance"),
        (MaskOutput(polygon_tolerance_px=math.nan), "polygon_tolerance"),
    ],
)
def test_outputs_out_of_bounds_are_refused(output: MaskOutput, field: str) -> None:
    with pytest.raises(InvalidPromptError, match="within 0") as caught:
        check_output(output)
    assert caught.value.field == field


def test_what_takes_long_is_no_work_for_an_event_loop() -> None:
    small, large = Frame(1024, (768, 1024), (480, 640)), Frame(1024, (768, 1024), (3000, 4000))
    assert is_quick(small, 1, MaskOutput())
    assert is_quick(small, 1, MaskOutput(MaskFormat.NONE))
    assert not is_quick(small, 3, MaskOutput())
    assert not is_quick(large, 1, MaskOutput())
    assert not is_quick(small, 1, MaskOutput(MaskFormat.PNG))
    assert not is_quick(small, 1, MaskOutput(min_region_area_px=1))


@pytest.mark.parametrize("value", [math.nan, -math.nan])
def test_what_is_no_number_is_no_mask(value: float) -> None:
    """FP16 overflows to it, and by its bits it would be a large logit. Infinities are large ones."""
    frame = Frame(input_size=64, valid_size=(64, 64), size=(64, 64))
    logits = np.full((16, 16), -np.inf, np.float16)
    logits[4:8, 4:8] = np.inf
    assert mask_from_logits(logits, 0.5, frame, MaskOutput()).area > 0
    with pytest.raises(ModelUnavailableError):
        mask_from_logits(logits, value, frame, MaskOutput())
    logits[0, 0] = np.copysign(np.nan, value)
    with pytest.raises(ModelUnavailableError):
        mask_from_logits(logits, 0.5, frame, MaskOutput())
