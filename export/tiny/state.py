"""The weights in training and all that goes with them, as flat tensors that several processes share and update."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import SamModel

BETAS = (0.9, 0.98)
EPSILON = 1e-8
CLIP_NORM = 1.0
AVERAGE_DECAY = 0.9985
TENSORS = ("weights", "average", "first", "second", "counters")


@dataclass(frozen=True)
class SharedState:
    """Everything that a stopped run needs to go on.

    `weights`, their moving `average`, Adam's `first` and `second` moments: float32 [n], the trained parameters in the
    order of `trained_parameters`. `counters` int64 [2 + processes]: updates made, images seen, batches drawn by each
    process.
    """

    weights: Tensor
    average: Tensor
    first: Tensor
    second: Tensor
    counters: Tensor

    @property
    def step(self) -> int:
        """Updates made so far."""
        return int(self.counters[0])


@dataclass(frozen=True)
class Trainee:
    """One process's view: a model whose parameters are slices of the shared weights, and its own flat gradient."""

    model: SamModel
    shared: SharedState
    gradient: Tensor
    decayed: int


def fresh_state(model: SamModel, processes: int) -> SharedState:
    """Start from a model's weights."""
    weights = torch.cat([parameter.detach().flatten() for parameter in _in_order(model)])
    zeros = torch.zeros_like(weights)
    counters = torch.zeros(2 + processes, dtype=torch.int64)
    return _in_shared_memory(SharedState(weights, weights.clone(), zeros, zeros.clone(), counters))


def resumed_state(path: Path) -> SharedState:
    """Go on from a file that `save_state` wrote, with the same first model and as many processes."""
    saved = torch.load(path, weights_only=True)
    return _in_shared_memory(SharedState(*(saved[name] for name in TENSORS)))


def save_state(shared: SharedState, path: Path) -> None:
    """Write the state in one piece: a stop in the middle of writing loses nothing."""
    partial = path.with_suffix(".partial")
    torch.save({name: getattr(shared, name).clone() for name in TENSORS}, partial)
    partial.replace(path)


def bound_trainee(shared: SharedState, model: SamModel) -> Trainee:
    """Lay the model over the shared weights; its frozen random frequencies, like its seed, belong to them."""
    gradient = torch.zeros_like(shared.weights)
    parameters = _in_order(model)
    sizes = [parameter.numel() for parameter in parameters]
    slices = zip(parameters, torch.split(shared.weights, sizes), torch.split(gradient, sizes), strict=True)
    for parameter, weight, slope in slices:
        parameter.data = weight.view_as(parameter)
        parameter.grad = slope.view_as(parameter)
    decayed = sum(parameter.numel() for name, parameter in trained_parameters(model) if _decays(name, parameter))
    return Trainee(model, shared, gradient, decayed)


def apply_gradient(trainee: Trainee, rate: float, weight_decay: float, images: int) -> None:
    """Make one AdamW update in place, then clear the gradient.

    Processes do not wait for each other (Hogwild, https://arxiv.org/abs/1106.5730): an update made between another's
    forward pass and its update is kept, and the rare overlap of two writes loses a part of one.
    """
    shared, gradient = trainee.shared, trainee.gradient
    gradient *= (CLIP_NORM / (gradient.norm() + 1e-6)).clamp(max=1.0)
    shared.counters[0] += 1
    shared.counters[1] += images
    step = shared.step
    shared.first.lerp_(gradient, 1 - BETAS[0])
    shared.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    scale = (shared.second / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
    shared.weights[: trainee.decayed].mul_(1 - rate * weight_decay)
    shared.weights.addcdiv_(shared.first, scale, value=-rate / (1 - BETAS[0] ** step))
    shared.average.lerp_(shared.weights, 1 - min(AVERAGE_DECAY, step / (step + 10)))
    gradient.zero_()


def averaged_weights(trainee: Trainee) -> dict[str, Tensor]:
    """Return the moving average under the model's state-dict names."""
    weights = dict(trainee.model.state_dict())
    named = trained_parameters(trainee.model)
    sizes = [parameter.numel() for _, parameter in named]
    for (name, parameter), piece in zip(named, torch.split(trainee.shared.average, sizes), strict=True):
        weights[name] = piece.view_as(parameter)
    return weights


def trained_parameters(model: SamModel) -> list[tuple[str, torch.nn.Parameter]]:
    """List what is trained: first the matrices, which decay, then vectors and tables; frequencies stay as drawn."""
    named = [(name, p) for name, p in model.named_parameters() if not name.endswith("positional_embedding")]
    return sorted(named, key=lambda pair: not _decays(*pair))


def _in_order(model: SamModel) -> list[torch.nn.Parameter]:
    model.shared_image_embedding.positional_embedding.requires_grad_(False)  # noqa: FBT003
    return [parameter for _, parameter in trained_parameters(model)]


def _decays(name: str, parameter: Tensor) -> bool:
    table = "embed" in name or "rel_pos" in name or "_token" in name.rsplit(".", 1)[0]
    return parameter.ndim > 1 and not table


def _in_shared_memory(state: SharedState) -> SharedState:
    for name in TENSORS:
        getattr(state, name).share_memory_()
    return state
