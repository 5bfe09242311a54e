"""The training loop learns, reaches every weight, and goes on where it stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export.tiny.interaction import interactive_loss, iou, mask_loss, with_correction
from export.tiny.prompts import Batch, batch_from_seed
from export.tiny.textures import load_bank
from export.tiny.train import Recipe, fresh_state, one_step, resumed_state, save_state, train

RECIPE = Recipe(
    steps=40,
    mixed_from=1_000,
    full_size_from=1_000,
    one_round_until=0,
    processes=1,
    images=2,
    prompts=4,
    small_side=128,
    warm_up=5,
)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batch_from_seed(2, 128, 2, 4, load_bank(("brick.png",)))


def test_a_batch_overfits_a_little(batch: Batch) -> None:
    state = fresh_state(RECIPE)
    losses = [one_step(state, batch, RECIPE).loss for _ in range(40)]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert state.images == 80


def test_gradients_reach_every_trained_weight(batch: Batch) -> None:
    model = fresh_state(RECIPE).model
    torch.manual_seed(3)
    loss, _ = interactive_loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    missing = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not missing
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "shared_image_embedding.positional_embedding",
        "prompt_encoder.shared_embedding.positional_embedding",
    }


def test_a_resumed_run_takes_the_same_steps(batch: Batch, tmp_path: Path) -> None:
    unbroken = fresh_state(RECIPE)
    for _ in range(2):
        one_step(unbroken, batch, RECIPE)
    save_state(unbroken, tmp_path / "state.pt")
    resumed = resumed_state(RECIPE, tmp_path / "state.pt")
    assert resumed.step == 2
    assert one_step(resumed, batch, RECIPE) == one_step(unbroken, batch, RECIPE)
    for name, tensor in unbroken.average.items():
        assert torch.equal(tensor, resumed.average[name]), name


def test_two_processes_train_and_leave_weights_state_and_curve(tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=20, processes=2, images=1, prompts=2, save_every=20)
    train(recipe, tmp_path)
    assert {"state.pt", "loss.csv", "sam-tiny.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert resumed_state(recipe, tmp_path / "state.pt").images == 40
    assert (tmp_path / "loss.csv").read_text().splitlines()[1].startswith("20,40,128,")


def test_a_perfect_mask_costs_next_to_nothing_and_an_empty_one_much() -> None:
    target = torch.zeros(1, 16, 16)
    target[:, 4:12, 4:12] = 1
    right = (target * 40 - 20)[:, None].repeat(1, 4, 1, 1)
    best, overlap = mask_loss(right, torch.ones(1, 4), target)
    worst, _ = mask_loss(torch.full_like(right, -20), torch.ones(1, 4), target)
    assert best < 0.01
    assert worst > 4
    assert torch.equal(overlap, torch.ones(1, 4))


def test_corrective_clicks_fall_into_the_error_with_the_right_label() -> None:
    torch.manual_seed(0)
    target = torch.zeros(2, 16, 16)
    target[0, 2:8, 2:8] = 1
    logits = torch.full((2, 16, 16), -5.0)
    logits[1, 9:14, 9:14] = 5
    coords, labels = with_correction(torch.zeros(2, 2, 2), torch.tensor([[1, -1], [1, -1]]), logits, target)
    assert labels[:, 0].tolist() == [1, 0]
    assert 7.5 <= coords[0, 0].min() <= coords[0, 0].max() <= 31.5
    assert 35.5 <= coords[1, 0].min() <= coords[1, 0].max() <= 55.5


def test_iou_of_two_empty_masks_is_one() -> None:
    empty = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert iou(empty, empty).item() == 1
    assert iou(empty, ~empty).item() == 0


def test_the_learning_rate_warms_up_and_decays_to_one_percent() -> None:
    recipe = Recipe(steps=1_000, mixed_from=400, full_size_from=500)
    assert recipe.rate(0) < recipe.rate(299) == pytest.approx(recipe.peak_rate)
    assert recipe.rate(999) == pytest.approx(0.01 * recipe.peak_rate, rel=0.01)
    assert [recipe.side(step) for step in (0, 400, 401, 404, 499, 500, 501)] == [256, 384, 256, 384, 256, 384, 384]
