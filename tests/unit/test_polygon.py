"""Polygons: exact at tolerance 0, near at others, outlines and holes told apart by order and by orientation."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco

from service.polygon import Polygon, Ring, polygons_from_edges
from service.rle import edges_from_binary

binaries = arrays(np.bool_, st.tuples(st.integers(1, 20), st.integers(1, 20)))


def polygons_from_binary(binary: np.ndarray, tolerance_px: float) -> tuple[Polygon, ...]:
    return polygons_from_edges(edges_from_binary(binary), binary.shape[0], tolerance_px)


def area_of(ring: Ring) -> float:
    x, y = np.array(ring[::2], float), np.array(ring[1::2], float)
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def rasterised(polygons: tuple[Polygon, ...], shape: tuple[int, int]) -> np.ndarray:
    """Set the pixels whose centre lies inside an odd number of rings: a ray to the left crosses their upright lines."""
    crossings = np.zeros((shape[0], shape[1] + 1), int)
    for ring in (ring for polygon in polygons for ring in polygon):
        points = list(zip(ring[::2], ring[1::2], strict=True))
        for (x, y), (next_x, next_y) in zip(points, points[1:] + points[:1], strict=True):
            assert (x == next_x) != (y == next_y)  # along the pixels' edges
            crossings[min(y, next_y) : max(y, next_y), x] += 1
    return (np.cumsum(crossings, axis=1)[:, :-1] % 2).astype(bool)


@given(binaries)
def test_exact_rings_enclose_the_very_pixels(binary: np.ndarray) -> None:
    polygons = polygons_from_binary(binary, 0)
    np.testing.assert_array_equal(rasterised(polygons, binary.shape), binary)
    assert sum(area_of(ring) for polygon in polygons for ring in polygon) == binary.sum()


@given(binaries)
def test_each_connected_piece_is_an_outline_and_then_its_holes(binary: np.ndarray) -> None:
    polygons = polygons_from_binary(binary, 0)
    count, labels = cv2.connectedComponents(binary.view(np.uint8), connectivity=4)
    assert len(polygons) == count - 1
    pieces = {rasterised((polygon,), binary.shape).tobytes() for polygon in polygons}
    assert pieces == {(labels == label).tobytes() for label in range(1, count)}
    for outline, *holes in polygons:
        assert area_of(outline) > 0
        assert all(area_of(hole) < 0 for hole in holes)


@given(binaries, st.sampled_from([0.1, 0.5, 1, 3, 100]))
def test_simplified_rings_keep_three_points_of_the_exact_ones_and_their_orientation(
    binary: np.ndarray, tolerance_px: float
) -> None:
    exact = polygons_from_binary(binary, 0)
    for before, after in zip(exact, polygons_from_binary(binary, tolerance_px), strict=True):
        for ring, simpler in zip(before, after, strict=True):
            assert 6 <= len(simpler) <= len(ring)
            assert {*zip(simpler[::2], simpler[1::2], strict=True)} <= {*zip(ring[::2], ring[1::2], strict=True)}
            assert area_of(ring) * area_of(simpler) > 0


def test_a_ring_is_cocos_own() -> None:
    """A disc without holes, rasterised by pycocotools from its flat rings."""
    rows, columns = np.mgrid[:200, :300]
    disc = np.hypot(rows - 90, columns - 140) < 80
    ((outline,),) = polygons_from_binary(disc, 0)
    again = coco.decode(coco.frPyObjects([list(map(float, outline))], 200, 300))[..., 0]
    np.testing.assert_array_equal(again, disc)


@pytest.mark.parametrize("tolerance_px", [1, 4])
def test_a_simplified_disc_is_short_and_near(tolerance_px: float) -> None:
    rows, columns = np.mgrid[:400, :400]
    disc = np.hypot(rows - 200, columns - 200) < 180
    ((exact,),), ((fewer,),) = polygons_from_binary(disc, 0), polygons_from_binary(disc, tolerance_px)
    assert len(fewer) < len(exact) / 5
    filled = cv2.fillPoly(np.zeros(disc.shape, np.uint8), [np.array(fewer, np.int32).reshape(-1, 2)], 1) > 0
    distance = cv2.distanceTransform((~disc).view(np.uint8), cv2.DIST_L2, 5)
    inner = cv2.distanceTransform(disc.view(np.uint8), cv2.DIST_L2, 5)
    assert (distance + inner)[filled != disc].max() <= tolerance_px + 1.5
