"""The bundled model through the running service, on a real photograph it was never trained on: coins."""

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco

from export.tiny.coins import Coins, labelled_coins
from tests import plain_http
from tests.conftest import encoded
from tests.running import RunningService

GOOD_IOU = 0.75


@pytest.fixture(scope="module")
def coins(service: RunningService) -> Coins:
    labelled = labelled_coins()
    data = encoded(labelled.image, "PNG")
    plain_http.put(f"{service.url}/v1/images/coins", content=data).raise_for_status()
    return labelled


def ious(service: RunningService, coins: Coins, prompts: list[dict[str, list[object]]]) -> NDArray[np.float64]:
    """Return the IoU of the answer to each prompt with the coin it is about."""
    answer = plain_http.post(f"{service.url}/v1/images/coins/masks", json={"prompts": prompts}, timeout=60)
    found = [
        coco.decode(result["masks"][0]["rle"]).astype(bool) for result in answer.raise_for_status().json()["results"]
    ]
    pairs = zip(found, coins.masks, strict=True)
    return np.array([np.count_nonzero(mask & coin) / np.count_nonzero(mask | coin) for mask, coin in pairs])


def test_a_box_around_a_coin_gives_that_coin(service: RunningService, coins: Coins) -> None:
    boxes = []
    for coin in coins.masks:
        rows, columns = np.nonzero(coin)
        boxes.append([int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1])
    assert np.count_nonzero(ious(service, coins, [{"box": box} for box in boxes]) >= GOOD_IOU) >= 18


def test_a_click_on_a_coin_gives_about_that_coin(service: RunningService, coins: Coins) -> None:
    centres = [np.argwhere(coin).mean(axis=0) for coin in coins.masks]
    clicks = [{"points": [[float(column), float(row), 1]]} for row, column in centres]
    assert ious(service, coins, clicks).mean() >= 0.65
