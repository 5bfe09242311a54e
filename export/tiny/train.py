"""The training loop: several processes with one thread each share the weights; resumable, with a loss curve.

On two cores that is faster than one process with two threads, and on a busy machine by far, where the threads of an
operator wait for each other. Each process's batches follow from the seed; how their updates interleave does not.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader, IterableDataset
from transformers import SamModel

from export.tiny.config import INPUT_SIZE
from export.tiny.interaction import KEPT_IN_ROUND, Progress, interactive_loss
from export.tiny.network import load_model, save_weights, untrained_model
from export.tiny.prompts import Batch, batch_from_seed
from export.tiny.state import (
    SharedState,
    Trainee,
    apply_gradient,
    averaged_weights,
    bound_trainee,
    fresh_state,
    resumed_state,
    save_state,
)
from export.tiny.textures import TRAINING_IMAGES, load_bank

REPORT_EVERY = 20
FULL_SIZE_EVERY = 4
PREFETCHED = 4


@dataclass(frozen=True)
class Recipe:
    """How to train.

    `steps` is the whole schedule, in updates. Images are small at first, from step `mixed_from` on every fourth batch
    has full size, from `full_size_from` on all have. `start` is a checkpoint to begin with, instead of from scratch.
    """

    steps: int
    mixed_from: int
    full_size_from: int
    processes: int = 2
    one_round_until: int = 800  # there is nothing to correct before the first masks appear
    images: int = 4
    prompts: int = 8
    small_side: int = 256
    peak_rate: float = 5e-4
    warm_up: int = 300
    weight_decay: float = 0.02
    seed: int = 1
    start: Path | None = None
    save_every: int = 100  # batches of the first process

    def side(self, step: int, number: int) -> int:
        """Image side in pixels of a process's batch `number`, drawn when `step` updates have been made."""
        full = step >= self.full_size_from or (step >= self.mixed_from and number % FULL_SIZE_EVERY == 0)
        return INPUT_SIZE if full else self.small_side

    def rounds(self, step: int) -> int:
        """Prompting rounds of this step."""
        return 1 if self.start is None and step < self.one_round_until else len(KEPT_IN_ROUND)

    def first_model(self) -> SamModel:
        """Return the model before the first update."""
        return untrained_model(self.seed) if self.start is None else load_model(self.start).train()

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine to 1 % at `steps`."""
        if step < self.warm_up:
            return self.peak_rate * (step + 1) / self.warm_up
        done = min(1.0, (step - self.warm_up) / max(1, self.steps - self.warm_up))
        return self.peak_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


class _Batches(IterableDataset[Batch]):
    """A process's batches; number i has the same scenes in an unbroken and in a resumed run of equal image sides."""

    def __init__(self, recipe: Recipe, rank: int, counters: Tensor) -> None:
        self._recipe, self._rank, self._counters = recipe, rank, counters

    def __iter__(self) -> Iterator[Batch]:
        cv2.setNumThreads(0)
        bank = load_bank(TRAINING_IMAGES)
        recipe = self._recipe
        number = int(self._counters[2 + self._rank])
        while True:
            side = recipe.side(int(self._counters[0]), number)
            yield batch_from_seed(batch_seed(recipe, number, self._rank), side, recipe.images, recipe.prompts, bank)
            number += 1


def train(recipe: Recipe, folder: Path) -> None:
    """Train from `folder`/state.pt, or from nothing, to the end of the recipe.

    Leaves in `folder`: state.pt and sam-tiny.safetensors (averaged weights), written again and again, and loss.csv.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "state.pt"
    shared = resumed_state(path) if path.exists() else fresh_state(recipe.first_model(), recipe.processes)
    _say(f"{asdict(recipe)} from step {shared.step}")
    if shared.step >= recipe.steps:
        return
    spawn(_train_share, (recipe, folder, shared), recipe.processes)  # type: ignore[no-untyped-call]


def one_step(trainee: Trainee, batch: Batch, recipe: Recipe, rank: int = 0) -> Progress:
    """Make one update from one batch."""
    shared = trainee.shared
    torch.manual_seed(batch_seed(recipe, int(shared.counters[2 + rank]), rank))
    with torch.autocast("cpu", torch.bfloat16):
        loss, progress = interactive_loss(trainee.model, batch, recipe.rounds(shared.step))
    loss.backward()  # type: ignore[no-untyped-call]
    apply_gradient(trainee, recipe.rate(shared.step), recipe.weight_decay, len(batch.images))
    shared.counters[2 + rank] += 1
    return progress


def batch_seed(recipe: Recipe, number: int, rank: int) -> int:
    """Return the one number that the scenes, prompts and clicks of a process's batch depend on."""
    return (recipe.seed * 10_000_000 + number) * recipe.processes + rank


def _train_share(rank: int, recipe: Recipe, folder: Path, shared: SharedState) -> None:
    torch.set_num_threads(1)
    trainee = bound_trainee(shared, recipe.first_model())
    dataset = _Batches(recipe, rank, shared.counters)
    batches = iter(DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=PREFETCHED))
    recent: list[Progress] = []
    started, first = time.monotonic(), shared.step
    done = False
    while not done:
        recent.append(one_step(trainee, next(batches), recipe, rank))
        number, done = int(shared.counters[2 + rank]), shared.step >= recipe.steps
        if rank == 0 and (done or number % REPORT_EVERY == 0):
            _report(shared, recent, recipe, folder, (time.monotonic() - started) / (shared.step - first))
            recent, started, first = [], time.monotonic(), shared.step
        if rank == 0 and (done or number % recipe.save_every == 0):
            _save(trainee, folder)


def _save(trainee: Trainee, folder: Path) -> None:
    save_state(trainee.shared, folder / "state.pt")
    save_weights(averaged_weights(trainee), folder / "sam-tiny.safetensors")


def _report(shared: SharedState, recent: list[Progress], recipe: Recipe, folder: Path, step_s: float) -> None:
    """Say how the first process's last batches went; the other's look the same."""
    mean = [sum(values) / len(recent) for values in zip(*(asdict(p).values() for p in recent), strict=True)]
    curve = folder / "loss.csv"
    if not curve.exists():
        curve.write_text("step,images,rate,loss,first_single_iou,first_oracle_iou,corrected_iou,step_s\n")
    step, images = shared.step, int(shared.counters[1])
    row = [f"{step}", f"{images}", f"{recipe.rate(step):.2e}", *(f"{value:.4f}" for value in mean), f"{step_s:.2f}"]
    with curve.open("a") as file:
        file.write(",".join(row) + "\n")
    _say(
        f"step {step}/{recipe.steps} images {images} loss {mean[0]:.3f} "
        f"IoU single {mean[1]:.3f} oracle {mean[2]:.3f} corrected {mean[3]:.3f} {step_s:.2f} s/step"
    )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
