"""Masks as polygons whose rings follow the edges of the pixels. Pure.

They are found from the mask's edges (see `service.rle`) alone: a polygon takes as long as its outline, however large
the mask. Pixels that touch at a corner only are two pieces, as in GIS tools; the background that meets there is one.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Ring = tuple[int, ...]  # x0, y0, x1, y1, ... in pixels, the first point not repeated
Polygon = tuple[Ring, ...]  # a piece's outline, then its holes
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Corners:
    """Where rings turn, by row and then column: each once, or twice where two pixels touch there only.

    `below_is_set` says of a ring's first corner whether it is an outline's. `along_row` and `along_column` are the
    corners at the other ends of the lines that leave each one.
    """

    x: Integers
    y: Integers
    below_is_set: NDArray[np.bool_]
    along_row: Integers
    along_column: Integers


def polygons_from_edges(edges: Integers, height: int, tolerance_px: float) -> tuple[Polygon, ...]:
    """Return the connected pieces of a mask of that height with these edges.

    With `tolerance_px` 0 the rings enclose the very pixels; else points are left out that are at most that far from the
    line between others (Douglas and Peucker). In x and y, outlines have a positive area, holes a negative.
    """
    column, top, bottom = _runs_from_edges(edges, height)
    corners = _corners_of(column, top, bottom)
    rings, ring_of = _rings_of(corners)
    width = int(column.max(initial=0)) + 2
    ends_of_runs, places = column * (height + 1) + bottom, corners.y * width + corners.x  # both ascend
    owners: list[int] = []
    pieces: dict[int, list[Ring]] = {}
    for ring in rings:
        first = ring[0]
        points = np.column_stack((corners.x[ring], corners.y[ring])).astype(np.int32)
        if corners.below_is_set[first]:
            owners.append(len(owners))
        else:  # a hole belongs to whom the ring above it belongs to
            points = points[::-1]
            x, y = corners.x[first], corners.y[first]
            run = np.searchsorted(ends_of_runs, x * (height + 1) + y)
            above = np.searchsorted(places, top[run] * width + x, side="right") - 1
            owners.append(owners[ring_of[above]])
        pieces.setdefault(owners[-1], []).append(tuple(_simplified(points, tolerance_px).ravel().tolist()))
    return tuple(tuple(piece) for piece in pieces.values())


def _runs_from_edges(edges: Integers, height: int) -> tuple[Integers, Integers, Integers]:
    """Return each run's column, first row, and the row after its last; what goes on in the next column is two runs."""
    begins, ends = edges[::2], edges[1::2]
    first, last = begins // height, (ends - 1) // height
    columns = last - first + 1
    column = np.repeat(first - np.cumsum(columns) + columns, columns) + np.arange(columns.sum())
    top = np.maximum(np.repeat(begins, columns) - column * height, 0)
    bottom = np.minimum(np.repeat(ends, columns) - column * height, height)
    return column, top, bottom


def _corners_of(column: Integers, top: Integers, bottom: Integers) -> _Corners:
    """Find the corners from runs: where one has a top or a bottom and its neighbour has not, or the other one."""
    x, y = np.tile(column, 2), np.concatenate((top, bottom))
    below_is_set = np.repeat([True, False], column.size)
    # Each line of a pixel's width ends in two points; `begins` is of the left one, from which it goes to the right.
    x, y, below_is_set = np.concatenate((x, x + 1)), np.tile(y, 2), np.tile(below_is_set, 2)
    begins = np.repeat([True, False], 2 * column.size)
    order = np.lexsort((begins, x, y))
    x, y, below_is_set, begins = (each[order] for each in (x, y, below_is_set, begins))
    meet = (x[1:] == x[:-1]) & (y[1:] == y[:-1])
    straight = meet & (below_is_set[1:] == below_is_set[:-1])
    stays = ~(np.append(straight, values=False) | np.insert(straight, 0, values=False))[: x.size]
    # Where two pixels touch: does the line from the left turn down, and not up?
    crossed = np.append(meet & below_is_set[:-1], values=False) | np.insert(meet & ~below_is_set[1:], 0, values=False)
    second = (begins ^ crossed[: x.size])[stays]
    x, y, below_is_set = x[stays], y[stays], below_is_set[stays]
    along_row = np.arange(x.size) ^ 1  # in a row, corners are by turns where a line begins and where it ends
    by_column = np.lexsort((second, y, x))
    along_column = np.empty_like(along_row)
    along_column[by_column] = by_column[along_row]
    return _Corners(x, y, below_is_set, along_row, along_column)


def _rings_of(corners: _Corners) -> tuple[list[list[int]], list[int]]:
    """Return each ring as its corners, from its topmost and then leftmost to the right, and each corner's ring."""
    along_row, along_column = corners.along_row.tolist(), corners.along_column.tolist()
    rings: list[list[int]] = []
    ring_of = [-1] * len(along_row)
    for start in range(len(along_row)):
        if ring_of[start] >= 0:
            continue
        ring: list[int] = []
        at = start
        while ring_of[at] < 0:
            end = along_row[at]
            ring_of[at] = ring_of[end] = len(rings)
            ring += (at, end)
            at = along_column[end]
        rings.append(ring)
    return rings, ring_of


def _simplified(points: NDArray[np.int32], tolerance_px: float) -> NDArray[np.int32]:
    """Drop points [n, 2] that are near the line between others; less so if the ring would collapse or turn over."""
    while tolerance_px > 0:
        fewer = np.asarray(cv2.approxPolyDP(points, tolerance_px, closed=True), np.int32)[:, 0]
        if len(fewer) > 2 and _area_of(fewer) * _area_of(points) > 0:  # noqa: PLR2004 - a ring has three points
            return fewer
        tolerance_px = tolerance_px / 2 if tolerance_px > 0.1 else 0.0  # noqa: PLR2004 - corners are a pixel apart
    return points


def _area_of(points: NDArray[np.int32]) -> float:
    """Return the signed area within a ring [n, 2] (the shoelace formula)."""
    x, y = points.astype(np.float64).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
