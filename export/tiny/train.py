"""The training loop: resumable, seeded step by step, with a moving average of the weights and a loss curve."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import SamModel

from export.tiny.config import INPUT_SIZE
from export.tiny.interaction import Progress, interactive_loss
from export.tiny.network import save_weights, untrained_model
from export.tiny.prompts import Batch, batch_from_seed
from export.tiny.textures import TRAINING_IMAGES, TextureBank, load_bank

AVERAGE_DECAY = 0.9985
REPORT_EVERY = 20


@dataclass(frozen=True)
class Recipe:
    """How to train. `steps` is the length of the whole schedule; steps from `full_size_from` on use full-size images."""

    steps: int
    full_size_from: int
    images: int = 8
    full_size_images: int = 4
    prompts: int = 8
    small_side: int = 256
    peak_rate: float = 5e-4
    warm_up: int = 300
    weight_decay: float = 0.02
    seed: int = 1
    save_every: int = 200

    def side(self, step: int) -> int:
        """Image side in pixels at this step."""
        return INPUT_SIZE if step >= self.full_size_from else self.small_side

    def count(self, step: int) -> int:
        """Images in this step's batch."""
        return self.full_size_images if step >= self.full_size_from else self.images

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine to 1 % at `steps`."""
        if step < self.warm_up:
            return self.peak_rate * (step + 1) / self.warm_up
        done = min(1.0, (step - self.warm_up) / max(1, self.steps - self.warm_up))
        return self.peak_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class State:
    """Everything that a stopped run needs to go on."""

    model: SamModel
    average: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: int
    images: int


class _Batches(Dataset[Batch]):
    """Batch number i is made from i alone, so a resumed run sees what an unbroken one would have seen."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._bank: TextureBank | None = None

    def __len__(self) -> int:
        return self._recipe.steps

    def __getitem__(self, step: int) -> Batch:
        if self._bank is None:
            cv2.setNumThreads(0)
            self._bank = load_bank(TRAINING_IMAGES)
        recipe = self._recipe
        seed = recipe.seed * 10_000_000 + step
        return batch_from_seed(seed, recipe.side(step), recipe.count(step), recipe.prompts, self._bank)


def fresh_state(recipe: Recipe) -> State:
    """Start from the initialisation."""
    model = untrained_model(recipe.seed)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return State(model, average, _optimizer(model, recipe), 0, 0)


def resumed_state(recipe: Recipe, path: Path) -> State:
    """Go on from a file that `save_state` wrote; the schedule may have been changed in between."""
    state = fresh_state(recipe)
    saved = torch.load(path, weights_only=True)
    state.model.load_state_dict(saved["model"])
    state.average = saved["average"]
    state.optimizer.load_state_dict(saved["optimizer"])
    state.step, state.images = saved["step"], saved["images"]
    return state


def save_state(state: State, path: Path) -> None:
    """Write the state in one piece: a stop in the middle of writing loses nothing."""
    saved: dict[str, Any] = {
        "model": state.model.state_dict(),
        "average": state.average,
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "images": state.images,
    }
    partial = path.with_suffix(".partial")
    torch.save(saved, partial)
    partial.replace(path)


def train(recipe: Recipe, folder: Path) -> State:
    """Train from `folder`/state.pt, or from nothing, to the end of the recipe.

    Leaves in `folder`: state.pt, sam-tiny.safetensors (averaged weights) every `save_every` steps, loss.csv.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "state.pt"
    state = resumed_state(recipe, path) if path.exists() else fresh_state(recipe)
    print(f"{asdict(recipe)} from step {state.step}", flush=True)
    batches = DataLoader(
        _Batches(recipe), batch_size=None, sampler=range(state.step, recipe.steps), num_workers=1, prefetch_factor=6
    )
    recent: list[Progress] = []
    started = time.monotonic()
    for batch in batches:
        recent.append(one_step(state, batch, recipe))
        if state.step % REPORT_EVERY == 0:
            _report(state, recent, recipe, folder, (time.monotonic() - started) / REPORT_EVERY)
            recent, started = [], time.monotonic()
        if state.step % recipe.save_every == 0 or state.step == recipe.steps:
            save_state(state, path)
            save_weights(state.average, folder / "sam-tiny.safetensors")
    return state


def one_step(state: State, batch: Batch, recipe: Recipe) -> Progress:
    """Take one optimizer step on a batch and fold the weights into their average."""
    torch.manual_seed(recipe.seed * 10_000_000 + state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.rate(state.step)
    with torch.autocast("cpu", torch.bfloat16):
        loss, progress = interactive_loss(state.model, batch)
    state.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    state.optimizer.step()
    state.step += 1
    state.images += len(batch.images)
    decay = min(AVERAGE_DECAY, state.step / (state.step + 10))
    current = state.model.state_dict()
    torch._foreach_lerp_([state.average[name] for name in current], list(current.values()), 1 - decay)  # noqa: SLF001
    return progress


def _optimizer(model: SamModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; no decay for vectors and tables, and the random frequencies stay as drawn."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if name.endswith("positional_embedding"):
            parameter.requires_grad_(False)  # noqa: FBT003
        elif parameter.ndim > 1 and "embed" not in name and "rel_pos" not in name and "token" not in name.split(".")[-2]:
            matrices.append(parameter)
        else:
            others.append(parameter)
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.98), fused=True)


def _report(state: State, recent: list[Progress], recipe: Recipe, folder: Path, step_s: float) -> None:
    mean = [sum(values) / len(recent) for values in zip(*(asdict(p).values() for p in recent), strict=True)]
    curve = folder / "loss.csv"
    if not curve.exists():
        curve.write_text("step,images,side,rate,loss,first_single_iou,first_oracle_iou,corrected_iou,step_s\n")
    row = [state.step, state.images, recipe.side(state.step - 1), f"{recipe.rate(state.step - 1):.2e}"]
    row += [f"{value:.4f}" for value in mean] + [f"{step_s:.2f}"]
    with curve.open("a") as file:
        file.write(",".join(str(value) for value in row) + "\n")
    print(
        f"step {state.step}/{recipe.steps} images {state.images} loss {mean[0]:.3f} "
        f"IoU single {mean[1]:.3f} oracle {mean[2]:.3f} corrected {mean[3]:.3f} {step_s:.2f} s/step",
        flush=True,
    )
