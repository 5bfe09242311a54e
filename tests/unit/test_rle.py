import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco

from service.rle import binary_from_edges, binary_from_rle_counts, edges_from_binary, rle_counts_from_binary

binaries = arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40)))


@given(binaries)
def test_rle_is_byte_for_byte_what_pycocotools_writes(binary: np.ndarray) -> None:
    assert rle_counts_from_binary(binary) == coco.encode(np.asfortranarray(binary, np.uint8))["counts"]


@given(binaries)
def test_edges_are_an_even_number_in_order_and_make_the_mask_again(binary: np.ndarray) -> None:
    edges = edges_from_binary(binary)
    assert edges.size % 2 == 0
    assert (np.diff(edges) > 0).all()
    assert (edges[1::2] - edges[::2]).sum() == binary.sum()
    np.testing.assert_array_equal(binary_from_edges(edges, binary.shape), binary)


def test_rle_of_long_runs_is_what_pycocotools_writes() -> None:
    """Runs above 2^25 need six characters."""
    binary = np.zeros((9000, 4001), np.bool_)
    binary[8999, 4000] = binary[3, 2] = True
    assert rle_counts_from_binary(binary) == coco.encode(np.asfortranarray(binary, np.uint8))["counts"]
    np.testing.assert_array_equal(binary_from_rle_counts(rle_counts_from_binary(binary), (9000, 4001)), binary)


@given(binaries)
def test_counts_read_back_the_same(binary: np.ndarray) -> None:
    np.testing.assert_array_equal(binary_from_rle_counts(rle_counts_from_binary(binary), binary.shape), binary)


@given(st.binary(max_size=40) | st.text("0123456789:;<=>?@ABCPQRSTo", max_size=20).map(str.encode))
def test_other_bytes_are_refused_or_read_as_pycocotools_would_write_them(counts: bytes) -> None:
    try:
        binary = binary_from_rle_counts(counts, (6, 7))
    except ValueError:
        return
    again = coco.encode(np.asfortranarray(binary, np.uint8))["counts"]
    np.testing.assert_array_equal(binary_from_rle_counts(again, (6, 7)), binary)


@pytest.mark.parametrize("counts", [b"", b"1", b"p", b"o" * 30, b"\x00"])
def test_counts_of_no_such_mask_are_refused(counts: bytes) -> None:
    with pytest.raises(ValueError, match=r"run|pixels"):
        binary_from_rle_counts(counts, (6, 7))
