"""Weights of a model's real shapes, for benchmarks: what they hold does not change what arithmetic costs."""

import torch

from export.architecture import Architecture
from export.checkpoint import expected_shapes
from export.weights import Weights


def random_weights(shape: Architecture) -> Weights:
    """Return weights small enough for activations to stay finite in half precision; scales of norms are 1."""
    torch.manual_seed(0)
    return Weights(
        {
            key: torch.ones(size) if "norm" in key and key.endswith("weight") else torch.randn(size) * 0.02
            for key, size in expected_shapes(shape).items()
        }
    )
