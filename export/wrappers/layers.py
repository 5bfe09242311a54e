"""Layers shared by the graphs, re-expressed for export: channels last, normalisation in FP32, no control flow.

Half precision keeps its matrix products and element-wise work in FP16, and LayerNorm and softmax in FP32: SAM in pure
FP16 gives garbage because LayerNorm's variance overflows (segment-anything#540, fixed the same way in #696).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.weights import Weights


class Norm(nn.Module):
    """LayerNorm over the last axis, computed in FP32 whatever the input's precision; returns the input's precision."""

    def __init__(self, source: Weights, eps: float) -> None:
        super().__init__()
        self.weight = nn.Buffer(source["weight"])
        self.bias = nn.Buffer(source["bias"])
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)


class Affine(nn.Module):
    """y = x @ weight + bias over the last axis, with `weight` stored [in, out] so that no Transpose is exported."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight.to(dtype).contiguous())
        self.bias = None if bias is None else nn.Buffer(bias.to(dtype))

    @classmethod
    def linear(cls, source: Weights, dtype: torch.dtype) -> "Affine":
        """Take over a linear layer."""
        return cls(source["weight"].t(), source["bias"], dtype)

    @classmethod
    def strided(cls, source: Weights, dtype: torch.dtype) -> "Affine":
        """Take over a convolution whose stride is its kernel's side, [out, in, k, k], as a product over `patches`."""
        weight = source["weight"]
        return cls(weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]), source["bias"], dtype)

    @classmethod
    def strided_transposed(cls, source: Weights, dtype: torch.dtype) -> "Affine":
        """Take over a transposed convolution, stride = kernel 2, [in, out, 2, 2]: 4*out columns, (row, column, out)."""
        weight = source["weight"]
        return cls(weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1), source["bias"].repeat(4), dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x @ self.weight
        return y if self.bias is None else y + self.bias


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis in FP32; returns the precision of `scores`."""
    return torch.softmax(scores.float(), dim=-1).to(scores.dtype)


def positional_encoding(coords: Tensor, gaussian: Tensor) -> Tensor:
    """Random Fourier features of points (SAM paper, appendix A; `PositionEmbeddingRandom` of the original).

    Args:
        coords: FP32 [..., 2], (x, y) scaled to 0..1.
        gaussian: FP32 [2, C/2].

    Returns:
        FP32 [..., C]. FP16 could not tell neighbouring pixels of a 1024-pixel image apart.
    """
    angles = 2 * math.pi * ((2 * coords - 1) @ gaussian)
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)


def patches(x: Tensor, grid: int, size: int) -> Tensor:
    """Cut [B, grid*size, grid*size, C] into [B, grid*grid, size*size*C]: a strided convolution becomes one product."""
    channels = x.shape[-1]
    x = x.reshape(-1, grid, size, grid, size, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, grid * grid, size * size * channels)
