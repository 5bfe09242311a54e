"""Small holes and islands of masks, a known flaw of the model's: filled and dropped. Pure."""

import cv2
import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 8  # pixels that touch at a corner are connected, as the original has it


def holes_filled(binary: NDArray[np.bool_], min_area_px: float) -> tuple[NDArray[np.bool_], bool]:
    """Return `binary` [height, width] with its holes of fewer than `min_area_px` pixels filled, and whether any was.

    As the original's `remove_small_regions` in its mode "holes": what is outside the mask counts as one too.
    """
    regions, areas = _regions_of(~binary)
    small = areas < min_area_px
    if not small.any():
        return binary, False
    return np.concatenate(([True], small))[regions], True


def islands_dropped(binary: NDArray[np.bool_], min_area_px: float) -> tuple[NDArray[np.bool_], bool]:
    """Return `binary` [height, width] without its islands of fewer than `min_area_px` pixels, and whether any went.

    As the original's `remove_small_regions` in its mode "islands": where all are small, the largest stays.
    """
    regions, areas = _regions_of(binary)
    large = areas >= min_area_px
    if large.all():
        return binary, False
    if not large.any():
        large[np.argmax(areas)] = True
    return np.concatenate(([False], large))[regions], True


def _regions_of(binary: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return each pixel's region, 0 where `binary` is not set, and the areas in pixels of the regions 1, 2, ..."""
    _, regions, statistics, _ = cv2.connectedComponentsWithStats(
        np.ascontiguousarray(binary).view(np.uint8), connectivity=NEIGHBOURS, ltype=cv2.CV_32S
    )
    return np.asarray(regions, np.int32), np.asarray(statistics[1:, cv2.CC_STAT_AREA], np.int32)
