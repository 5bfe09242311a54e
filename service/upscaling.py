"""From low-res logits to the edges of the mask in the original image, without the pixels in between. Pure.

The original (`Sam.postprocess_masks`) interpolates twice, to the encoder's input and from there to the original image,
and asks of each pixel whether its value is above 0. Between two rows of the input the values of one column lie on a
straight line, so that all there is to know is where that line crosses 0. So only columns are interpolated, and only in
the rows that the mask reaches; rows are solved for. 12 million pixels take as long as their outline.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

MARGIN = 2  # low-res rows: one may be lifted above 0 by its neighbour, the other keeps wrong values at the cut away


@dataclass(frozen=True, slots=True)
class Frame:
    """Where low-res logits lie: input side S, picture (height, width) inside the input, original (height, width)."""

    input_size: int
    valid_size: tuple[int, int]
    size: tuple[int, int]


def edges_from_logits(logits: NDArray[np.float32], frame: Frame) -> NDArray[np.int64]:
    """Return the edges (see `service.rle`) of the mask that `logits` [4G, 4G] are, in the original image."""
    height = frame.size[0]
    rows = _mask_rows(logits, frame)
    if rows.start == rows.stop:
        return np.empty(0, np.int64)
    columns, first_row = _columns_of_input(logits, rows, frame)
    inside = columns > 0
    flips = np.flatnonzero(inside[:, 1:] != inside[:, :-1])
    column, row = np.divmod(flips, max(columns.shape[1] - 1, 1))
    before, after = (columns[column, row + step].astype(np.float64) for step in (0, 1))
    crossing = (first_row + row + before / (before - after) + 0.5) * (height / frame.valid_size[0]) - 0.5
    # Down to `crossing` a mask that ends there has its pixels, and from it, without it, one that begins has them.
    pixel = np.where(before > 0, np.ceil(crossing), np.floor(crossing) + 1).clip(0, height).astype(np.int64)
    at_top, at_bottom = (np.flatnonzero(inside[:, side]) * height for side in (0, -1))
    edges = np.concatenate((column * height + pixel, at_top, at_bottom + height))
    places, counts = np.unique(edges, return_counts=True)
    return np.asarray(places[counts % 2 == 1], np.int64)  # an end and a beginning in one place are none


def _mask_rows(logits: NDArray[np.float32], frame: Frame) -> range:
    """Return the low-res rows that the mask is in, with a margin; none if it is empty."""
    per_row = frame.input_size // logits.shape[0]
    rows, columns = (min(side // per_row + 2, logits.shape[0]) for side in frame.valid_size)
    found = np.flatnonzero((logits[:rows, :columns] > 0).any(axis=1))
    if not found.size:
        return range(0)
    return range(max(int(found[0]) - MARGIN, 0), min(int(found[-1]) + 1 + MARGIN, logits.shape[0]))


def _columns_of_input(logits: NDArray[np.float32], rows: range, frame: Frame) -> tuple[NDArray[np.float32], int]:
    """Return FP32 [width, n]: columns of the original, rows of the input; and which input row the first of the n is."""
    per_row = frame.input_size // logits.shape[0]
    valid_height, valid_width = frame.valid_size
    first_row = rows.start * per_row
    band = np.ascontiguousarray(logits[rows.start : rows.stop].T)
    full = cv2.resize(band, (len(rows) * per_row, frame.input_size), interpolation=cv2.INTER_LINEAR)
    valid = full[:valid_width, : valid_height - first_row]
    columns = cv2.resize(valid, (valid.shape[1], frame.size[1]), interpolation=cv2.INTER_LINEAR)
    return np.asarray(columns, np.float32), first_row
