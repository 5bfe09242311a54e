"""A state dict seen through a prefix."""

from collections.abc import Mapping

from torch import Tensor


class Weights:
    """The tensors of a state dict whose keys start with `prefix`, read as FP32.

    Keys are transformers' `SamModel`'s; `weights.at("mlp")["lin1.weight"]` is `weights["mlp.lin1.weight"]`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self._tensors = tensors
        self._prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor, FP32, detached; raises KeyError with the full key."""
        return self._tensors[self._prefix + name].detach().float()

    def at(self, name: str) -> "Weights":
        """Return the view one level down."""
        return Weights(self._tensors, f"{self._prefix}{name}.")
