"""Masks as their edges, and COCO's compressed run lengths. Pure; NumPy alone, so that clients can use it too.

The edges of a mask [height, width] are where it begins and ends, in turn, when its pixels are counted down the columns:
INT64, strictly ascending, an even number of them, from 0 to height * width.
"""

import numpy as np
from numpy.typing import NDArray

FIRST_CHARACTER = 48
MAX_CHARACTERS = 11  # of a run in an int64


def edges_from_binary(binary: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the edges of a mask, bool [height, width]."""
    flat = binary.ravel(order="F")
    inner = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return np.concatenate((np.zeros(int(flat[0]), np.int64), inner, np.full(int(flat[-1]), flat.size)))


def binary_from_edges(edges: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask, bool [height, width] in column order, that has these edges."""
    runs = _runs_from_edges(edges, size)
    return np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(size[::-1]).T


def rle_counts_from_edges(edges: NDArray[np.int64], size: tuple[int, int]) -> bytes:
    """Return COCO's compressed run-length string, readable by pycocotools: runs down the columns, zeros first."""
    runs = _runs_from_edges(edges, size)
    return _counts_string(runs if runs[-1] else runs[:-1])


def _runs_from_edges(edges: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.int64]:
    """Return the lengths of all runs, zeros first; the first and the last one may be empty."""
    runs = np.empty(edges.size + 1, np.int64)
    runs[:-1], runs[-1] = edges, size[0] * size[1]
    runs[1:] -= edges
    return runs


def rle_counts_from_binary(binary: NDArray[np.bool_]) -> bytes:
    """Return COCO's compressed run-length string of a mask, bool [height, width]."""
    return rle_counts_from_edges(edges_from_binary(binary), (binary.shape[0], binary.shape[1]))


def _counts_string(counts: NDArray[np.int64]) -> bytes:
    """Pack run lengths as COCO's `rleToString` does: differences to the run before last, 5 bits a character."""
    rest = counts.copy()
    rest[3:] -= counts[1:-2]
    alive = np.ones(rest.shape, np.bool_)
    columns = []
    while alive.any():
        digit = rest & 0x1F
        rest >>= 5
        more = alive & np.where(digit & 0x10, rest != -1, rest != 0)
        columns.append(np.where(alive, (digit | (more << 5)) + FIRST_CHARACTER, 0))
        alive = more
    characters = np.stack(columns, axis=1).astype(np.uint8)
    return characters[characters > 0].tobytes()


def binary_from_rle_counts(counts: bytes, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask, bool [height, width], of COCO's compressed `counts` for an image of `size` (height, width).

    Raises:
        ValueError: the counts do not describe a mask of that size.
    """
    runs = _runs_from_string(counts)
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"the run lengths do not describe a mask of {size[0]} x {size[1]} pixels")
    return binary_from_edges(np.cumsum(runs)[:-1], size)


def _runs_from_string(counts: bytes) -> NDArray[np.int64]:
    """Undo `_counts_string`."""
    characters = np.frombuffer(counts, np.uint8).astype(np.int64) - FIRST_CHARACTER
    ends = np.flatnonzero((characters & 0x20) == 0)
    if not ends.size or ends[-1] != characters.size - 1 or (characters >> 6).any():
        raise ValueError("not COCO's compressed run lengths")
    starts = np.concatenate(([0], ends[:-1] + 1))
    if (ends - starts).max() > MAX_CHARACTERS:
        raise ValueError("a run is longer than any image")
    position = np.arange(characters.size) - np.repeat(starts, ends - starts + 1)
    runs = np.add.reduceat((characters & 0x1F) << (5 * position), starts)
    negative = characters[ends] & 0x10 != 0
    runs -= np.where(negative, np.int64(1) << (5 * (ends - starts + 1)), 0)
    for first in (1, 2):  # from the fourth on, runs are differences to the run before last
        runs[first::2] = np.cumsum(runs[first::2])
    return runs
