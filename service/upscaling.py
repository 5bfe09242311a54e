"""From low-res logits to the edges of the mask in the original image, without the pixels in between. Pure.

The original (`Sam.postprocess_masks`) interpolates twice, to the encoder's input and from there to the original image,
and asks of each pixel whether its value is above 0. Between two rows of the input the values of one column lie on a
straight line, so that all there is to know is where that line crosses 0. So only columns are interpolated, and only in
the window that the mask reaches; rows are solved for. 12 million pixels take as long as their outline.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

MARGIN = 2  # low-res rows: one may be lifted above 0 by its neighbour, the other keeps wrong values at the cut away
HALF_SIGN_BITS = 0x7000_0000  # where a sign-extended FP16, moved to the place of an FP32, repeats its sign
HALF_TO_SINGLE = np.float32(2.0**112)  # their exponents' biases are 15 and 127
FROM_INFINITY = 65536.0


@dataclass(frozen=True, slots=True)
class Frame:
    """Where low-res logits lie: input side S, picture (height, width) inside the input, original (height, width)."""

    input_size: int
    valid_size: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Window:
    """The part of a mask's interpolated columns that has to be computed.

    `rows` and `columns` are of the low-res logits, `of_input` and `of_original` the columns that come out of these.
    """

    rows: slice
    columns: slice
    of_input: slice
    of_original: slice


def float32_from_float16(values: NDArray[np.float16]) -> NDArray[np.float32]:
    """Return `values` as FP32, by their bits: NumPy takes four times as long.

    Infinities become the finite `FROM_INFINITY`, and what is not a number becomes larger than that, of either sign.
    """
    bits = values.view(np.int16).astype(np.int32) << 13
    bits &= ~HALF_SIGN_BITS
    return np.asarray(bits.view(np.float32) * HALF_TO_SINGLE, np.float32)


def edges_from_logits(logits: NDArray[np.float32], frame: Frame) -> NDArray[np.int64]:
    """Return the edges (see `service.rle`) of the mask that `logits` [4G, 4G] are, in the original image."""
    height = frame.size[0]
    window = _mask_window(logits, frame)
    if window is None:
        return np.empty(0, np.int64)
    columns, first_row = _interpolated_columns(logits, window, frame)
    inside = columns > 0
    flips = np.flatnonzero(inside[:, 1:] != inside[:, :-1])
    column, row = np.divmod(flips, max(columns.shape[1] - 1, 1))
    before, after = (columns[column, row + step].astype(np.float64) for step in (0, 1))
    crossing = (first_row + row + before / (before - after) + 0.5) * (height / frame.valid_size[0]) - 0.5
    # Down to `crossing` a mask that ends there has its pixels, and from it, without it, one that begins has them.
    pixel = np.where(before > 0, np.ceil(crossing), np.floor(crossing) + 1).clip(0, height).astype(np.int64)
    at_top, at_bottom = (np.flatnonzero(inside[:, side]) * height for side in (0, -1))
    edges = np.concatenate((column * height + pixel, at_top, at_bottom + height))
    edges.sort()
    if (edges[1:] == edges[:-1]).any():  # an end and a beginning in one place are none
        places, counts = np.unique(edges, return_counts=True)
        edges = places[counts % 2 == 1]
    return np.asarray(edges + window.of_original.start * height, np.int64)


def _mask_window(logits: NDArray[np.float32], frame: Frame) -> _Window | None:
    """Return the window that the mask is in, with a margin; None if it is empty."""
    side = logits.shape[0]
    per_row = frame.input_size // side
    rows, columns = (min(valid // per_row + 2, side) for valid in frame.valid_size)
    inside = logits[:rows, :columns] > 0
    of_rows = np.flatnonzero(inside.any(axis=1))
    if not of_rows.size:
        return None
    of_columns = np.flatnonzero(inside.any(axis=0))
    # Interpolating a part gives what interpolating the whole does only where columns of both fall on the same places.
    valid_width, width = frame.valid_size[1], frame.size[1]
    parts = math.gcd(valid_width, width)
    input_step, original_step = valid_width // parts, width // parts
    first = max(int(of_columns[0]) - MARGIN, 0) * per_row // input_step
    last = min(-(-(int(of_columns[-1]) + 1 + MARGIN) * per_row // input_step), parts)
    start, stop = first * input_step, last * input_step
    return _Window(
        rows=slice(max(int(of_rows[0]) - MARGIN, 0), min(int(of_rows[-1]) + 1 + MARGIN, side)),
        columns=slice(max(start // per_row - MARGIN, 0), min(-(-stop // per_row) + MARGIN, side)),
        of_input=slice(start, stop),
        of_original=slice(first * original_step, last * original_step),
    )


def _interpolated_columns(
    logits: NDArray[np.float32], window: _Window, frame: Frame
) -> tuple[NDArray[np.float32], int]:
    """Return FP32 [width, n]: columns of the original, rows of the input; and which input row the first of the n is."""
    per_row = frame.input_size // logits.shape[0]
    first_row, first_column = window.rows.start * per_row, window.columns.start * per_row
    band = np.ascontiguousarray(logits[window.rows, window.columns].T)
    full = cv2.resize(band, (band.shape[1] * per_row, band.shape[0] * per_row), interpolation=cv2.INTER_LINEAR)
    from_column, to_column = window.of_input.start - first_column, window.of_input.stop - first_column
    valid = full[from_column:to_column, : frame.valid_size[0] - first_row]
    width = window.of_original.stop - window.of_original.start
    columns = cv2.resize(valid, (valid.shape[1], width), interpolation=cv2.INTER_LINEAR)
    return np.asarray(columns, np.float32), first_row
