"""Holes and islands, against the original package's own `remove_small_regions`."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from service.regions import holes_filled, islands_dropped
from tests.export.original import original_amg

OURS: dict[str, Callable[[np.ndarray, float], tuple[np.ndarray, bool]]] = {
    "holes": holes_filled,
    "islands": islands_dropped,
}


AMG = original_amg()
binaries = arrays(np.bool_, st.tuples(st.integers(1, 24), st.integers(1, 24)))


@pytest.mark.parametrize("mode", OURS)
@given(binaries, st.sampled_from([0, 1, 2, 3, 5, 9, 1000]))
def test_regions_are_treated_as_the_original_does(mode: str, binary: np.ndarray, min_area_px: int) -> None:
    before = binary.copy()
    expected, expected_change = AMG.remove_small_regions(binary, min_area_px, mode)
    found, changed = OURS[mode](binary, min_area_px)
    assert found.dtype == np.bool_
    assert (changed, found.shape) == (expected_change, binary.shape)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(binary, before)


@given(binaries, st.sampled_from([1, 3, 9]))
def test_a_transposed_mask_is_treated_alike(binary: np.ndarray, min_area_px: int) -> None:
    """What the mask path has at hand; where all islands are small and equal, which one stays is a matter of order."""
    np.testing.assert_array_equal(holes_filled(binary.T, min_area_px)[0].T, holes_filled(binary, min_area_px)[0])


def test_islands_and_holes_below_the_bound_go_those_at_it_stay() -> None:
    binary = np.zeros((9, 20), np.bool_)
    binary[1:8, 1:8] = True
    binary[3, 3:5] = binary[6, 3:6] = False  # holes of 2 and 3
    binary[2, 12:14] = binary[5, 12:15] = True  # islands of 2 and 3
    filled = holes_filled(binary, 3)[0]
    assert filled[3, 3:5].all()
    assert not filled[6, 3:6].any()
    dropped = islands_dropped(binary, 3)[0]
    assert not dropped[2, 12:14].any()
    assert dropped[5, 12:15].all()
