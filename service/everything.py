"""Everything-mode: its parameters, and where they ask, as the original's `SamAutomaticMaskGenerator` has both. Pure."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidPromptError
from service.tensors import PROMPT_BUCKETS

POINTS_PER_SIDE = 32
MAX_POINTS_PER_SIDE = 64
MAX_GRID_POINTS = MAX_POINTS_PER_SIDE**2
MAX_LAYERS = 3

PointGrid = tuple[tuple[float, float], ...]  # (x, y), each 0..1 of a crop's width and height


@dataclass(frozen=True, slots=True)
class Parameters:
    """The original's parameters, by its names and with its defaults.

    `points_per_side` is None where nobody set it: 32, or what `point_grids` says. Of `point_grids` the first is the
    whole image's, and one each the crop layers'.
    """

    points_per_side: int | None = None
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    point_grids: tuple[PointGrid, ...] = ()
    min_mask_region_area: int = 0


# Inclusive; what has none here is checked by itself.
BOUNDS: dict[str, tuple[float, float]] = {
    "points_per_side": (1, MAX_POINTS_PER_SIDE),
    "points_per_batch": (1, PROMPT_BUCKETS[-1]),
    "pred_iou_thresh": (0, 1),
    "stability_score_thresh": (0, 1),
    "box_nms_thresh": (0, 1),
    "crop_n_layers": (0, MAX_LAYERS),
    "crop_nms_thresh": (0, 1),
    "crop_n_points_downscale_factor": (1, MAX_POINTS_PER_SIDE),
    "min_mask_region_area": (0, 1_000_000),
}


class Crop(NamedTuple):
    """A part of the image, from (x0, y0) up to but without (x1, y1) in pixels, and its layer: 0 is the whole image."""

    x0: int
    y0: int
    x1: int
    y1: int
    layer: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.y1 - self.y0, self.x1 - self.x0


def check_parameters(parameters: Parameters) -> None:
    """Raise `InvalidPromptError`, naming field and bound, unless all parameters can be meant."""
    for field in fields(parameters):
        value = getattr(parameters, field.name)
        if field.name in BOUNDS and value is not None:
            low, high = BOUNDS[field.name]
            _check(low <= value <= high, field.name, value, f"{low:g}..{high:g}")
    offset, overlap = parameters.stability_score_offset, parameters.crop_overlap_ratio
    _check(0 < offset <= 100, "stability_score_offset", offset, "above 0, up to 100")  # noqa: PLR2004 - the bound itself
    _check(0 <= overlap < 1, "crop_overlap_ratio", overlap, "0 to below 1")
    if parameters.point_grids:
        check_grid_counts(len(parameters.point_grids), map(len, parameters.point_grids))
        _check_grids(parameters)
    else:
        _check_factor(parameters)


def check_grid_counts(grids: int, points: Iterable[int]) -> None:
    """Raise `InvalidPromptError` unless there may be so many `grids`, of so many `points` each.

    Transports call it before they convert what they received; `points` is read only where `grids` is within bounds.
    """
    if grids > MAX_LAYERS + 1:
        raise InvalidPromptError(
            f"point_grids holds {grids} grids; at most {MAX_LAYERS + 1} are allowed", field="point_grids"
        )
    for index, count in enumerate(points):
        if not 1 <= count <= MAX_GRID_POINTS:
            field = f"point_grids[{index}]"
            raise InvalidPromptError(f"{field} holds {count} points; 1..{MAX_GRID_POINTS} are allowed", field=field)


def _check_grids(parameters: Parameters) -> None:
    if parameters.points_per_side is not None:
        raise InvalidPromptError(
            "points_per_side and point_grids exclude each other; send one of them", field="points_per_side"
        )
    layers = parameters.crop_n_layers + 1
    if len(parameters.point_grids) != layers:
        raise InvalidPromptError(
            f"point_grids holds {len(parameters.point_grids)} grids; crop_n_layers asks for {layers}: one for the "
            "whole image and one for each layer",
            field="point_grids",
        )
    for index, grid in enumerate(parameters.point_grids):
        for number, point in enumerate(grid):
            if not all(0 <= part <= 1 for part in point):
                field = f"point_grids[{index}][{number}]"
                raise InvalidPromptError(f"{field} is outside of 0..1", field=field)


def _check_factor(parameters: Parameters) -> None:
    """Refuse a factor that leaves the last layer without points."""
    side, factor = parameters.points_per_side or POINTS_PER_SIDE, parameters.crop_n_points_downscale_factor
    most = max(each for each in range(1, side + 1) if each**parameters.crop_n_layers <= side)
    _check(
        sides_of(parameters)[-1] >= 1,
        "crop_n_points_downscale_factor",
        factor,
        f"with these points_per_side and crop_n_layers, 1..{most}",
    )


def _check(holds: bool, name: str, value: float, bound: str) -> None:  # noqa: FBT001 - the condition itself
    if not holds:
        raise InvalidPromptError(f"{name} is {value:g}; {bound} is allowed", field=name)


def sides_of(parameters: Parameters) -> list[int]:
    """Return the points along a side of each layer's grid, the whole image's first."""
    factor, layers = parameters.crop_n_points_downscale_factor, range(parameters.crop_n_layers + 1)
    return [int((parameters.points_per_side or POINTS_PER_SIDE) / factor**layer) for layer in layers]


def grids_of(parameters: Parameters) -> list[NDArray[np.float64]]:
    """Return each layer's points, FP64 [n, 2] of (x, y) in 0..1; of a regular grid the cells' middles, row by row."""
    if parameters.point_grids:
        return [np.array(grid, np.float64) for grid in parameters.point_grids]
    grids = []
    for side in sides_of(parameters):
        middles = np.linspace(1 / (2 * side), 1 - 1 / (2 * side), side)
        rows, columns = np.meshgrid(middles, middles, indexing="ij")
        grids.append(np.stack([columns, rows], axis=-1).reshape(-1, 2))
    return grids


def crops_of(parameters: Parameters, size: tuple[int, int]) -> list[Crop]:
    """Return the whole image of `size` (height, width), then layer after layer of crops, column by column.

    Layer i has 4^i crops, which overlap by 2^(1 - i) times `crop_overlap_ratio` of the image's shorter side. Those that
    would be empty, of an image that is too small for so many, are left out.
    """
    height, width = size
    crops = [Crop(0, 0, width, height, 0)]
    for layer in range(1, parameters.crop_n_layers + 1):
        count = 2**layer
        overlap = int(parameters.crop_overlap_ratio * min(size) * (2 / count))
        columns, rows = _spans(width, count, overlap), _spans(height, count, overlap)
        crops += [Crop(x0, y0, x1, y1, layer) for x0, x1 in columns for y0, y1 in rows]
    return crops


def _spans(length: int, count: int, overlap: int) -> list[tuple[int, int]]:
    """Return begin and end of `count` pieces that cover a side of that length and overlap."""
    piece = math.ceil((overlap * (count - 1) + length) / count)
    starts = [(piece - overlap) * index for index in range(count)]
    return [(start, min(start + piece, length)) for start in starts if start < length]
