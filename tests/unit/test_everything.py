"""Everything-mode's parameters, grids and crops, against the original package's own functions."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidPromptError
from service.everything import (
    BOUNDS,
    MAX_GRID_POINTS,
    Parameters,
    check_parameters,
    crops_of,
    grids_of,
)
from tests.export.original import original_amg

AMG = original_amg()
DEFAULTS = Parameters()


@given(st.integers(1, 64), st.integers(0, 3), st.integers(1, 4))
def test_grids_are_the_original_s(side: int, layers: int, factor: int) -> None:
    parameters = Parameters(points_per_side=side, crop_n_layers=layers, crop_n_points_downscale_factor=factor)
    if side < factor**layers:
        with pytest.raises(InvalidPromptError, match="crop_n_points_downscale_factor"):
            check_parameters(parameters)
        return
    check_parameters(parameters)
    expected = AMG.build_all_layer_point_grids(side, layers, factor)
    for ours, theirs in zip(grids_of(parameters), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 3), st.floats(0, 0.99))
def test_crops_are_the_original_s_but_for_empty_ones(height: int, width: int, layers: int, ratio: float) -> None:
    boxes, layer_of_boxes = AMG.generate_crop_boxes((height, width), layers, ratio)
    whole = [(*box, layer) for box, layer in zip(boxes, layer_of_boxes, strict=True)]
    expected = [(x0, y0, x1, y1, layer) for x0, y0, x1, y1, layer in whole if x0 < x1 and y0 < y1]
    ours = crops_of(Parameters(crop_n_layers=layers, crop_overlap_ratio=ratio), (height, width))
    assert [tuple(crop) for crop in ours] == expected
    for layer in range(layers + 1):  # each layer covers the image
        columns, rows = np.zeros(width, np.bool_), np.zeros(height, np.bool_)
        for crop in [crop for crop in ours if crop.layer == layer]:
            columns[crop.x0 : crop.x1] = rows[crop.y0 : crop.y1] = True
        assert columns.all()
        assert rows.all()


def outside(name: str) -> list[float]:
    low, high = BOUNDS[name]
    step = 1 if isinstance(getattr(DEFAULTS, name), int) or name == "points_per_side" else 0.01
    return [low - step, high + step]


BAD: list[tuple[dict[str, Any], str]] = [
    *(({name: value}, name) for name in BOUNDS for value in outside(name)),
    *(({name: math.nan}, name) for name, (_, high) in BOUNDS.items() if high == 1),
    ({"stability_score_offset": 0.0}, "stability_score_offset"),
    ({"stability_score_offset": 100.5}, "stability_score_offset"),
    ({"stability_score_offset": math.nan}, "stability_score_offset"),
    ({"crop_overlap_ratio": 1.0}, "crop_overlap_ratio"),
    ({"crop_overlap_ratio": -0.1}, "crop_overlap_ratio"),
    ({"points_per_side": 3, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2}, "crop_n_points_downscale_factor"),
    ({"points_per_side": 3, "point_grids": (((0.5, 0.5),),)}, "points_per_side"),
    ({"point_grids": (((0.5, 0.5),),), "crop_n_layers": 1}, "point_grids"),
    ({"point_grids": (((0.5, 0.5),),) * 2}, "point_grids"),
    ({"point_grids": (((0.5, 0.5),),) * 5}, "point_grids"),
    ({"point_grids": ((),)}, "point_grids[0]"),
    ({"point_grids": (((0.5, 0.5),) * (MAX_GRID_POINTS + 1),)}, "point_grids[0]"),
    ({"point_grids": (((0.5, 0.5), (0.5, 1.01)),)}, "point_grids[0][1]"),
    ({"point_grids": (((math.nan, 0.5),),)}, "point_grids[0][0]"),
]


@pytest.mark.parametrize(("change", "field"), BAD, ids=lambda case: str(case)[:60])
def test_a_bad_parameter_is_refused_with_its_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidPromptError) as caught:
        check_parameters(replace(DEFAULTS, **change))
    assert caught.value.field == field
    assert field in caught.value.message


@pytest.mark.parametrize("name", BOUNDS)
def test_the_bounds_themselves_are_allowed(name: str) -> None:
    for value in BOUNDS[name]:
        check_parameters(replace(DEFAULTS, **{name: int(value) if name != "pred_iou_thresh" else value}))


def test_the_largest_factor_is_said_to_be_one_that_is_allowed() -> None:
    parameters = Parameters(points_per_side=10, crop_n_layers=2, crop_n_points_downscale_factor=4)
    with pytest.raises(InvalidPromptError, match=r"1\.\.3 is allowed"):
        check_parameters(parameters)
    check_parameters(replace(parameters, crop_n_points_downscale_factor=3))


def test_grids_of_one_s_own_are_asked_as_they_are() -> None:
    own = (((0.0, 1.0), (0.25, 0.5)), ((0.5, 0.5),))
    parameters = Parameters(point_grids=own, crop_n_layers=1)
    check_parameters(parameters)
    assert [grid.tolist() for grid in grids_of(parameters)] == [[list(point) for point in grid] for grid in own]
