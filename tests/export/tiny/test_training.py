"""The training loop learns, reaches every weight, and goes on where it stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export.tiny.interaction import interactive_loss, iou, mask_loss, with_correction
from export.tiny.network import load_model, save_weights
from export.tiny.prompts import Batch, batch_from_seed
from export.tiny.state import (
    BETAS,
    CLIP_NORM,
    Trainee,
    apply_gradient,
    averaged_weights,
    bound_trainee,
    fresh_state,
    resumed_state,
    save_state,
    trained_parameters,
)
from export.tiny.textures import load_bank
from export.tiny.train import Recipe, one_step, train

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


@pytest.fixture
def trainee() -> Trainee:
    return bound_trainee(fresh_state(RECIPE.first_model(), RECIPE.processes), RECIPE.first_model())


def test_a_batch_overfits_a_little(trainee: Trainee, batch: Batch) -> None:
    losses = [one_step(trainee, batch, RECIPE).loss for _ in range(25)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert trainee.shared.counters.tolist() == [25, 50, 25]


def test_gradients_reach_every_trained_weight(trainee: Trainee, batch: Batch) -> None:
    torch.manual_seed(3)
    loss, _ = interactive_loss(trainee.model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    missing = {name for name, p in trained_parameters(trainee.model) if p.grad is None or not p.grad.any()}
    assert not missing
    frozen = [name for name, p in trainee.model.named_parameters() if not p.requires_grad]
    assert frozen == ["shared_image_embedding.positional_embedding"]


def test_updates_are_adamws(trainee: Trainee) -> None:
    """The flat update equals torch's AdamW with clipping, weights in groups as trained_parameters orders them."""
    weights = trainee.shared.weights
    matrices, others = (
        torch.nn.Parameter(part.clone()) for part in (weights[: trainee.decayed], weights[trainee.decayed :])
    )
    groups = [{"params": [matrices], "weight_decay": 0.1}, {"params": [others], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=BETAS)
    torch.manual_seed(0)
    for scale in (1e-4, 10.0):
        gradient = torch.randn_like(weights) * scale
        trainee.gradient.copy_(gradient)
        apply_gradient(trainee, 1e-2, 0.1, images=1)
        matrices.grad, others.grad = gradient[: trainee.decayed].clone(), gradient[trainee.decayed :].clone()
        torch.nn.utils.clip_grad_norm_([matrices, others], CLIP_NORM)
        reference.step()
    expected = torch.cat([matrices, others]).detach()
    assert torch.allclose(weights, expected, atol=1e-5)
    assert torch.equal(torch.cat([p.flatten() for _, p in trained_parameters(trainee.model)]), weights)


def test_a_resumed_run_takes_the_same_steps(trainee: Trainee, batch: Batch, tmp_path: Path) -> None:
    for _ in range(2):
        one_step(trainee, batch, RECIPE)
    save_state(trainee.shared, tmp_path / "state.pt")
    resumed = bound_trainee(resumed_state(tmp_path / "state.pt"), RECIPE.first_model())
    assert resumed.shared.step == 2
    assert one_step(resumed, batch, RECIPE) == one_step(trainee, batch, RECIPE)
    assert torch.equal(resumed.shared.average, trainee.shared.average)


def test_a_run_can_start_from_a_checkpoint(trainee: Trainee, tmp_path: Path) -> None:
    save_weights(averaged_weights(trainee), tmp_path / "first.safetensors")
    recipe = replace(RECIPE, seed=RECIPE.seed + 1, start=tmp_path / "first.safetensors", one_round_until=100)
    again = bound_trainee(fresh_state(recipe.first_model(), recipe.processes), recipe.first_model())
    assert torch.equal(again.shared.weights, trainee.shared.weights.half().float())
    frequencies = [t.model.shared_image_embedding.positional_embedding for t in (again, trainee)]
    assert torch.equal(frequencies[0], frequencies[1].half().float())
    assert recipe.rounds(0) == 3, "there is something to correct at once"


def test_two_processes_train_and_leave_weights_state_and_curve(tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=44, one_round_until=44, processes=2, images=1, prompts=2, save_every=10)
    train(recipe, tmp_path)
    assert {"state.pt", "loss.csv", "sam-tiny.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    updates, images, first, second = resumed_state(tmp_path / "state.pt").counters.tolist()
    assert updates >= 44
    assert first + second == pytest.approx(images, abs=2)
    load_model(tmp_path / "sam-tiny.safetensors")


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
    small, full = 256, 384
    assert [recipe.side(399, 400), recipe.side(400, 401), recipe.side(400, 404)] == [small, small, full]
    assert recipe.side(500, 501) == full
