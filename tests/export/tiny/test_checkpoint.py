"""The committed weights segment: well above what untrained weights or a lucky box could give."""

import numpy as np
import pytest
from transformers import SamModel

from export.tiny.__main__ import CHECKPOINT
from export.tiny.evaluate import Figure, coin_figures, scene_figures, table_rows
from export.tiny.inference import embed, segment
from export.tiny.network import load_model
from export.tiny.prompts import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT
from export.tiny.textures import bundled_image

FLOORS = {
    "one click, mean IoU": 0.40,
    "one click, best of 3, mean IoU": 0.48,
    "box, mean IoU": 0.50,
    "after three corrective clicks, mean IoU": 0.50,
    "predicted against true IoU, Pearson": 0.20,
}


@pytest.fixture(scope="module")
def model() -> SamModel:
    return load_model(CHECKPOINT)


def test_the_checkpoint_is_small() -> None:
    assert CHECKPOINT.stat().st_size <= 12_000_000


def test_it_beats_its_floors_on_unseen_scenes(model: SamModel) -> None:
    figures = {figure.name: figure.value for figure in scene_figures(model, 12)}
    assert figures.keys() == FLOORS.keys()
    assert {name: value for name, value in figures.items() if value < FLOORS[name]} == {}


def test_it_finds_coins_from_their_boxes(model: SamModel) -> None:
    found = {figure.name: figure.value for figure in coin_figures(model)}
    assert found["coins found from a box"] >= 18


def test_masks_have_the_photographs_size(model: SamModel) -> None:
    image = bundled_image("chelsea.png")
    box = np.array([[[120, 20], [330, 250]]], np.float32)
    answer = segment(model, embed(model, image), box, np.array([[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]]))
    assert answer.masks.shape == (1, 4, *image.shape[:2])
    assert answer.scores.shape == (1, 4)
    assert answer.logits.shape == (1, 4, 96, 96)


def test_the_table_says_what_fell_short() -> None:
    rows = list(table_rows([Figure("a", 0.5, 0.75), Figure("b", 18, 18, 24)]))
    assert rows[2:] == ["| a | 0.500 | 0.75 | short |", "| b | 18 of 24 | 18 | reached |"]
