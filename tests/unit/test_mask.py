import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco

from service.mask import (
    Frame,
    MaskFormat,
    bbox_of,
    binary_from_logits,
    chosen_candidates,
    mask_from_logits,
    png_from_binary,
    stability_of,
)

binaries = arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40)))


@given(binaries)
def test_bbox_is_what_pycocotools_computes(binary: np.ndarray) -> None:
    expected = coco.toBbox(coco.encode(np.asfortranarray(binary, np.uint8)))
    assert bbox_of(binary) == tuple(expected.astype(int))


@given(binaries)
def test_png_is_bilevel_and_reads_back_the_same(binary: np.ndarray) -> None:
    picture = Image.open(io.BytesIO(png_from_binary(binary)))
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


def test_upscaling_is_the_original_s_two_bilinear_steps() -> None:
    """Against torch: to the input, cropped to the picture, to the original size."""
    functional = pytest.importorskip("torch.nn.functional")
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    for frame in (Frame(128, (96, 128), (333, 444)), Frame(128, (128, 40), (64, 20)), Frame(128, (1, 128), (1, 900))):
        full = functional.interpolate(torch.from_numpy(logits)[None, None], (128, 128), mode="bilinear")
        valid = full[..., : frame.valid_size[0], : frame.valid_size[1]]
        expected = functional.interpolate(valid, frame.size, mode="bilinear")[0, 0].numpy() > 0
        assert np.count_nonzero(binary_from_logits(logits, frame) != expected) <= 2


def test_stability_looks_only_inside_the_picture() -> None:
    logits = np.full((16, 16), 9.0, np.float32)
    logits[:8] = np.repeat([2.0, 0.0], 8)
    assert stability_of(logits, Frame(64, (32, 64), (32, 64))) == pytest.approx(0.5)
    assert stability_of(np.full((16, 16), -9.0, np.float32), Frame(64, (32, 64), (32, 64))) == 0.0


def test_a_mask_describes_itself() -> None:
    logits = np.full((16, 16), -4.0, np.float16)
    logits[4:8, 4:12] = 4.0
    mask = mask_from_logits(logits, 0.75, Frame(64, (64, 64), (64, 64)), MaskFormat.RLE)
    decoded = coco.decode({"size": list(mask.size), "counts": mask.data})
    assert decoded.shape == (64, 64)
    assert mask.area == int(decoded.sum())
    assert mask.bbox == tuple(coco.toBbox({"size": [64, 64], "counts": mask.data}).astype(int))
    assert mask.score == 0.75
