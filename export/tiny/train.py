"""The training loop: resumable, seeded step by step, with a moving average of the weights and a loss curve.

Each process computes with one thread on its share of the batch, and gradients are averaged. On two cores that is
faster than one process with two threads, and on a busy machine by far: threads of one operator wait for each other.
"""

import math
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader, Dataset
from transformers import SamModel

from export.tiny.config import INPUT_SIZE
from export.tiny.interaction import KEPT_IN_ROUND, Progress, interactive_loss
from export.tiny.network import save_weights, untrained_model
from export.tiny.prompts import Batch, batch_from_seed
from export.tiny.textures import TRAINING_IMAGES, TextureBank, load_bank

AVERAGE_DECAY = 0.9985
REPORT_EVERY = 20
FULL_SIZE_EVERY = 4


@dataclass(frozen=True)
class Recipe:
    """How to train.

    `steps` is the whole schedule. Images are small at first, from step `mixed_from` on every fourth batch has full
    size, from `full_size_from` on all have. Counts of images are per process and step.
    """

    steps: int
    mixed_from: int
    full_size_from: int
    processes: int = 2
    one_round_until: int = 800  # there is nothing to correct before the first masks appear
    images: int = 2
    prompts: int = 8
    small_side: int = 256
    peak_rate: float = 5e-4
    warm_up: int = 300
    weight_decay: float = 0.02
    seed: int = 1
    save_every: int = 200

    def side(self, step: int) -> int:
        """Image side in pixels at this step."""
        full = step >= self.full_size_from or (step >= self.mixed_from and step % FULL_SIZE_EVERY == 0)
        return INPUT_SIZE if full else self.small_side

    def rounds(self, step: int) -> int:
        """Prompting rounds of this step."""
        return 1 if step < self.one_round_until else len(KEPT_IN_ROUND)

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
    """A process's batch number i is made from i alone: a resumed run sees what an unbroken one would have seen."""

    def __init__(self, recipe: Recipe, rank: int) -> None:
        self._recipe, self._rank = recipe, rank
        self._bank: TextureBank | None = None

    def __len__(self) -> int:
        return self._recipe.steps

    def __getitem__(self, step: int) -> Batch:
        if self._bank is None:
            cv2.setNumThreads(0)
            self._bank = load_bank(TRAINING_IMAGES)
        recipe = self._recipe
        seed = step_seed(recipe, step, self._rank)
        return batch_from_seed(seed, recipe.side(step), recipe.images, recipe.prompts, self._bank)


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


def train(recipe: Recipe, folder: Path) -> None:
    """Train from `folder`/state.pt, or from nothing, to the end of the recipe.

    Leaves in `folder`: state.pt, sam-tiny.safetensors (averaged weights) every `save_every` steps, loss.csv.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        spawn(_train_share, (recipe, folder, f"file://{meeting}/ranks"), recipe.processes)  # type: ignore[no-untyped-call]


def one_step(state: State, batch: Batch, recipe: Recipe, rank: int = 0) -> Progress:
    """Take one optimizer step, with the gradients of all processes, and fold the weights into their average."""
    torch.manual_seed(step_seed(recipe, state.step, rank))
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.rate(state.step)
    with torch.autocast("cpu", torch.bfloat16):
        loss, progress = interactive_loss(state.model, batch, recipe.rounds(state.step))
    state.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if distributed.is_initialized():
        _average_gradients(state.model)
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    state.optimizer.step()
    state.step += 1
    state.images += len(batch.images) * recipe.processes
    decay = min(AVERAGE_DECAY, state.step / (state.step + 10))
    current = state.model.state_dict()
    torch._foreach_lerp_([state.average[name] for name in current], list(current.values()), 1 - decay)
    return progress


def step_seed(recipe: Recipe, step: int, rank: int) -> int:
    """Return the one number that a process's scenes, prompts and clicks of a step depend on."""
    return (recipe.seed * 10_000_000 + step) * recipe.processes + rank


def _train_share(rank: int, recipe: Recipe, folder: Path, meeting: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=recipe.processes)
    path = folder / "state.pt"
    state = resumed_state(recipe, path) if path.exists() else fresh_state(recipe)
    batches = DataLoader(
        _Batches(recipe, rank),
        batch_size=None,
        sampler=range(state.step, recipe.steps),
        num_workers=1,
        prefetch_factor=6,
    )
    if rank == 0:
        _say(f"{asdict(recipe)} from step {state.step}")
    recent: list[Progress] = []
    started = time.monotonic()
    for batch in batches:
        recent.append(one_step(state, batch, recipe, rank))
        if rank:
            continue
        if state.step % REPORT_EVERY == 0:
            _report(state, recent, recipe, folder, (time.monotonic() - started) / REPORT_EVERY)
            recent, started = [], time.monotonic()
        if state.step % recipe.save_every == 0 or state.step == recipe.steps:
            save_state(state, path)
            save_weights(state.average, folder / "sam-tiny.safetensors")
    distributed.barrier()
    distributed.destroy_process_group()


def _average_gradients(model: SamModel) -> None:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    sizes = [gradient.numel() for gradient in gradients]
    pieces = zip(torch.split(flat, sizes), gradients, strict=True)
    torch._foreach_copy_(gradients, [piece.view_as(gradient) for piece, gradient in pieces])


def _optimizer(model: SamModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; no decay for vectors and tables, and the random frequencies stay as drawn."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if name.endswith("positional_embedding"):
            parameter.requires_grad_(False)  # noqa: FBT003
        elif (
            parameter.ndim > 1 and "embed" not in name and "rel_pos" not in name and "token" not in name.split(".")[-2]
        ):
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
    _say(
        f"step {state.step}/{recipe.steps} images {state.images} loss {mean[0]:.3f} "
        f"IoU single {mean[1]:.3f} oracle {mean[2]:.3f} corrected {mean[3]:.3f} {step_s:.2f} s/step"
    )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
