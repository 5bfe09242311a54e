"""Twenty-four coins, photographed, with a reference segmentation that no network had a part in."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import sobel
from skimage.segmentation import watershed

from export.tiny.textures import bundled_image

MIN_COIN_AREA_PX = 300


@dataclass(frozen=True)
class Coins:
    """The photograph, uint8 [303, 384, 3], and one mask for each coin, bool [24, 303, 384]."""

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]


def labelled_coins() -> Coins:
    """Label scikit-image's coins as its own gallery does: thresholds as markers, watershed on the edges, holes filled.

    Source: https://scikit-image.org/docs/stable/auto_examples/applications/plot_coins_segmentation.html
    """
    image = bundled_image("coins.png")
    grey = image[..., 0]
    markers = np.where(grey < 30, 1, np.where(grey > 150, 2, 0))  # noqa: PLR2004  (the gallery's thresholds)
    basins = watershed(sobel(grey), markers)  # type: ignore[no-untyped-call]  # scikit-image is half typed
    filled = ndimage.binary_fill_holes(basins - 1)
    labels, count = ndimage.label(filled)
    masks = np.stack([labels == index for index in range(1, count + 1)])
    return Coins(image, masks[masks.sum(axis=(1, 2)) >= MIN_COIN_AREA_PX])
