"""One training step: a first prompt, then corrective clicks where the answer is wrong, and the loss over all rounds."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import SamModel

from export.tiny.config import INPUT_SIZE, PATCH_SIZE
from export.tiny.network import decode, encode
from export.tiny.prompts import LOW_RES_STRIDE, NOT_A_POINT, Batch

LOGIT_LIMIT = 32.0
WINDOW = 8  # patches; a small image is placed on this raster, so that the attention windows fall as they will
KEPT_IN_ROUND = (1.0, 0.5, 0.25)  # share of the prompts that go on; later rounds cost as much and teach less
NO_MASK_INPUT = 0.3  # share of later rounds without the previous logits: the service allows that as well
RUNNER_UP_WEIGHT = 0.05  # keeps mask tokens alive that never win


@dataclass(frozen=True)
class Progress:
    """What a step reports: the loss, and the mean IoU of the first round (mask 0, best of 3) and of the last."""

    loss: float
    single: float
    oracle: float
    corrected: float


def interactive_loss(model: SamModel, batch: Batch, rounds: int = len(KEPT_IN_ROUND)) -> tuple[Tensor, Progress]:
    """Run some rounds of a batch; randomness (window, choices, clicks) is torch's global generator."""
    images = torch.from_numpy(batch.images)
    corner = _random_corner(images.shape[1])
    embeddings = encode(model, images, torch.from_numpy(batch.valid_sizes), corner)
    count, prompts = batch.labels.shape[:2]
    owner = torch.arange(count).repeat_interleave(prompts)
    targets = torch.from_numpy(batch.targets).flatten(0, 1).float() / 255
    coords, labels = torch.from_numpy(batch.coords).flatten(0, 1), torch.from_numpy(batch.labels).flatten(0, 1)
    previous, losses, found = None, [], []
    for share in KEPT_IN_ROUND[:rounds]:
        if previous is not None:
            keep = torch.randperm(len(owner))[: max(1, round(share * count * prompts))]
            owner, targets, coords, labels, previous = (
                tensor[keep] for tensor in (owner, targets, coords, labels, previous)
            )
            coords, labels = with_correction(coords, labels, previous, targets)
        given = None
        if previous is not None:
            given = (previous[:, None], torch.rand(len(previous)) >= NO_MASK_INPUT)
        logits, predicted = decode(model, embeddings[owner], coords, labels, given, corner)
        with torch.autocast("cpu", enabled=False):
            loss, overlap = mask_loss(logits.float(), predicted.float(), targets)
        losses.append(loss)
        found.append(overlap)
        previous = carried_logits(logits.detach().float(), predicted.detach(), labels)
    total = torch.stack(losses).mean()
    return total, Progress(
        total.item(), found[0][:, 0].mean().item(), found[0][:, 1:].amax(1).mean().item(), found[-1][:, 0].mean().item()
    )


def mask_loss(logits: Tensor, predicted: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy + 2 x dice for mask 0 and for the best of 1..3, and the error of predicted IoU.

    `logits` [N, 4, h, w], `predicted` [N, 4], `targets` [N, h, w] of 0..1. Returns the mean loss and the IoU [N, 4].
    """
    target = targets[:, None].expand_as(logits)
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((2, 3))
    probability = logits.sigmoid()
    dice = 1 - (2 * (probability * target).sum((2, 3)) + 1) / (probability.sum((2, 3)) + target.sum((2, 3)) + 1)
    loss = entropy + 2 * dice
    overlap = iou(logits.detach() > 0, target > 0.5)  # noqa: PLR2004
    candidates = loss[:, 1:]
    masks = loss[:, 0] + candidates.amin(1) + RUNNER_UP_WEIGHT * candidates.mean(1)
    return (masks + functional.mse_loss(predicted, overlap, reduction="none").mean(1)).mean(), overlap


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of bool masks [..., h, w]: [...]; 1 where both are empty."""
    both, either = (first & second).sum((-2, -1)), (first | second).sum((-2, -1))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def carried_logits(logits: Tensor, predicted: Tensor, labels: Tensor) -> Tensor:
    """Choose what the next round is given, [N, h, w]: the best-rated candidate after a lone click, else mask 0."""
    lone_click = (labels.shape[1] == 2) & (labels[:, -1] == NOT_A_POINT)  # noqa: PLR2004
    best = torch.where(lone_click, predicted[:, 1:].argmax(1) + 1, 0)
    return logits[torch.arange(len(logits)), best].clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


def with_correction(coords: Tensor, labels: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Add a click inside the error region, negative where too much was marked; in front of the other tokens."""
    count, side = targets.shape[0], targets.shape[-1]
    clear = (targets - 0.5).abs() > 0.2  # noqa: PLR2004  (cells on the edge have no right answer)
    wrong = ((logits > 0) != (targets > 0.5)) & clear  # noqa: PLR2004
    depth = functional.avg_pool2d(wrong.float()[:, None], 5, stride=1, padding=2)[:, 0]
    weight = wrong * depth**3 + 1e-6 * (targets > 0.5) + 1e-12  # noqa: PLR2004
    cell = torch.multinomial(weight.flatten(1), 1)[:, 0]
    positive = targets.flatten(1)[torch.arange(count), cell] > 0.5  # noqa: PLR2004
    corner = torch.stack([cell % side, cell // side], dim=1) * LOW_RES_STRIDE
    click = corner + torch.rand(count, 2) * LOW_RES_STRIDE - 0.5
    return torch.cat([click[:, None], coords], dim=1), torch.cat([positive.long()[:, None], labels], dim=1)


def _random_corner(image_side: int) -> tuple[int, int]:
    room = (INPUT_SIZE - image_side) // (PATCH_SIZE * WINDOW)
    row, column = (torch.randint(room + 1, (2,)) * WINDOW).tolist()
    return row, column
