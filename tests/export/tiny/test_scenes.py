"""Scenes and prompts: the same seed gives the same data, and the masks are what the picture shows."""

import numpy as np
import pytest

from export.tiny.coins import labelled_coins
from export.tiny.prompts import BOX_TOP_LEFT, POSITIVE, batch_from_seed, innermost_click, tight_box
from export.tiny.scenes import MIN_AREA, Kind, scene_from_seed
from export.tiny.shapes import random_mask
from export.tiny.textures import HELD_OUT_IMAGES, TRAINING_IMAGES, TextureBank, load_bank

SEEDS = range(12)


@pytest.fixture(scope="module")
def bank() -> TextureBank:
    return load_bank(("brick.png", "grass.png"))


def test_a_seed_always_gives_the_same_scene(bank: TextureBank) -> None:
    first, again, other = (scene_from_seed(seed, 128, bank) for seed in (5, 5, 6))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.masks, again.masks)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_are_large_enough_and_inside_the_picture(bank: TextureBank, seed: int) -> None:
    scene = scene_from_seed(seed, 192, bank)
    height, width = scene.valid_size
    assert scene.image.shape == (192, 192, 3)
    assert max(height, width) == 192
    assert not scene.image[height:].any()
    assert not scene.image[:, width:].any()
    assert not scene.masks[:, height:].any()
    assert not scene.masks[:, :, width:].any()
    assert (scene.masks.sum(axis=(1, 2)) >= MIN_AREA * 192**2).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_objects_hide_each_other_and_regions(bank: TextureBank, seed: int) -> None:
    scene = scene_from_seed(seed, 192, bank)
    whole = scene.masks[scene.kinds != Kind.PART]
    assert whole.sum(axis=0).max(initial=0) <= 1


def test_outlines_touch_all_four_sides_of_their_box() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        mask = random_mask(rng, 40) > 0
        assert max(mask.shape) <= 40
        assert mask[0].any()
        assert mask[-1].any()
        assert mask[:, 0].any()
        assert mask[:, -1].any()


def test_a_scene_under_64_pixels_is_refused(bank: TextureBank) -> None:
    with pytest.raises(ValueError, match="64 pixels"):
        scene_from_seed(0, 32, bank)


def test_batches_repeat_and_every_prompt_fits_its_mask(bank: TextureBank) -> None:
    batch, again = (batch_from_seed(3, 128, 3, 6, bank) for _ in range(2))
    assert np.array_equal(batch.images, again.images)
    assert np.array_equal(batch.coords, again.coords)
    assert batch.targets.shape == (3, 6, 32, 32)
    for target, coords, labels in zip(
        batch.targets.reshape(-1, 32, 32), batch.coords.reshape(-1, 2, 2), batch.labels.reshape(-1, 2), strict=True
    ):
        assert target.any()
        if labels[0] == POSITIVE:
            x, y = (coords[0] // 4).astype(int)
            assert target[y, x] > 0
        else:
            assert labels[0] == BOX_TOP_LEFT
            assert (coords[0] <= coords[1]).all()


def test_the_innermost_click_and_the_tight_box_of_a_known_mask() -> None:
    mask = np.zeros((20, 30), bool)
    mask[4:13, 10:19] = True
    assert innermost_click(mask) == (14, 8)
    assert tight_box(mask) == (10, 4, 18, 12)


def test_evaluation_pictures_are_not_trained_on() -> None:
    photographs = {"coins.png", "astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg"}
    photographs |= {"motorcycle_left.png", "motorcycle_right.png"}
    assert not photographs & {*TRAINING_IMAGES, *HELD_OUT_IMAGES}
    assert not set(TRAINING_IMAGES) & set(HELD_OUT_IMAGES)


def test_the_reference_labels_24_coins() -> None:
    assert labelled_coins().masks.shape == (24, 303, 384)
