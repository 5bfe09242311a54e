"""The mask's edges in the original image, against torch doing what the original does."""

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.rle import binary_from_edges
from service.upscaling import Frame, edges_from_logits, float32_from_float16

torch = pytest.importorskip("torch")


def original_logits(logits: np.ndarray, frame: Frame) -> np.ndarray:
    """`Sam.postprocess_masks`: to the input, cropped to the picture, to the original size."""
    interpolate = torch.nn.functional.interpolate
    full = interpolate(torch.from_numpy(logits)[None, None], (frame.input_size,) * 2, mode="bilinear")
    valid = full[..., : frame.valid_size[0], : frame.valid_size[1]]
    return interpolate(valid, frame.size, mode="bilinear")[0, 0].numpy()


def original_binary(logits: np.ndarray, frame: Frame) -> np.ndarray:
    return original_logits(logits, frame) > 0


def frame_of(mask_size: int, size: tuple[int, int]) -> Frame:
    """Where `service.image.letterbox` puts an image of that size."""
    scale = 4 * mask_size / max(size)
    return Frame(4 * mask_size, (max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))), size)


def blobs(mask_size: int, cells: int, seed: int, offset: float) -> np.ndarray:
    """Smooth logits, as the decoder rounds them; above 0 in places, by `offset` in more or fewer."""
    coarse = np.random.default_rng(seed).normal(offset, 1, (cells, cells)).astype(np.float32)
    smooth = 8 * cv2.resize(coarse, (mask_size, mask_size), interpolation=cv2.INTER_CUBIC)
    return smooth.astype(np.float16).astype(np.float32)


sizes = st.tuples(st.integers(1, 700), st.integers(1, 700))


@settings(max_examples=150, deadline=None)
@given(sizes, st.sampled_from([16, 32, 96]), st.integers(2, 12), st.integers(0, 10**6), st.floats(-2, 2))
@example((5, 407), 32, 11, 916, 1.367848404952876)  # a column of five equal ones
def test_masks_are_the_original_s(size: tuple[int, int], mask_size: int, cells: int, seed: int, offset: float) -> None:
    """But where the original's own rounding decides, which is in a pixel or two, or as many lines of equal ones."""
    frame, logits = frame_of(mask_size, size), blobs(mask_size, cells, seed, offset)
    found, original = binary_from_edges(edges_from_logits(logits, frame), size), original_logits(logits, frame)
    differs = found != (original > 0)
    assert (np.abs(original[differs]) <= 1e-6 * np.abs(logits).max()).all()
    assert min(np.count_nonzero(differs.any(axis)) for axis in (0, 1)) <= 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [(3000, 4000), (4032, 3024)])
def test_at_12_million_pixels_two_may_differ(size: tuple[int, int], seed: int) -> None:
    """Where torch's single-precision coordinates round to the other side; more on masks of very many pieces."""
    frame, logits = frame_of(256, size), blobs(256, 3 + 2 * seed, seed, -0.5)
    edges = edges_from_logits(logits, frame)
    found = binary_from_edges(edges, size)
    assert found.any()
    assert np.count_nonzero(found != original_binary(logits, frame)) <= max(2, edges.size // 3000)


@settings(deadline=None)
@given(sizes, st.integers(0, 10**6), st.integers(0, 31), st.integers(0, 31), st.integers(1, 3))
def test_islands_of_a_few_logits_are_found_wherever_they_are(
    size: tuple[int, int], seed: int, row: int, column: int, side: int
) -> None:
    logits = -np.random.default_rng(seed).uniform(1, 9, (32, 32)).astype(np.float32)
    logits[row : row + side, column : column + side] = 5
    frame = frame_of(32, size)
    found = binary_from_edges(edges_from_logits(logits, frame), size)
    assert np.count_nonzero(found != original_binary(logits, frame)) <= 1


@settings(deadline=None)
@given(sizes, st.integers(0, 10**6))
def test_edges_ascend_and_lie_in_the_image(size: tuple[int, int], seed: int) -> None:
    """Also of noise, where a run may begin and end in the same place."""
    logits = np.random.default_rng(seed).normal(size=(24, 24)).astype(np.float32)
    edges = edges_from_logits(logits, frame_of(24, size))
    assert edges.size % 2 == 0
    assert (np.diff(edges) > 0).all()
    assert not edges.size or (edges[0] >= 0 and edges[-1] <= size[0] * size[1])


@pytest.mark.parametrize("value", [0.0, -1.0, 1.0])
def test_all_or_nothing(value: float) -> None:
    frame = frame_of(16, (30, 40))
    edges = edges_from_logits(np.full((16, 16), value, np.float32), frame)
    assert edges.tolist() == ([0, 1200] if value > 0 else [])


def test_half_floats_are_converted_exactly() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    found = float32_from_float16(finite)
    assert found.dtype == np.float32
    assert (found.view(np.uint32) == finite.astype(np.float32).view(np.uint32)).all()  # with the sign of zero
    assert float32_from_float16(np.array([np.inf, -np.inf], np.float16)).tolist() == [65536, -65536]


@pytest.mark.parametrize("size", [(300, 400), (301, 401), (400, 300)])
def test_what_lies_beside_the_mask_does_not_matter(size: tuple[int, int]) -> None:
    """Where widths have a common measure only the mask's columns are computed; the mask is the same."""
    frame, logits = frame_of(96, size), np.full((96, 96), -3, np.float32)
    logits[30:50, 40:60] = 4
    alone = edges_from_logits(logits, frame)
    logits[2, 2] = 4  # so that the columns before it must be computed too
    both = edges_from_logits(logits, frame)
    assert alone.size
    assert set(alone.tolist()) < set(both.tolist())
