"""Layers shared by the graphs, re-expressed for export: channels last, normalisation in FP32, no control flow.

Half precision keeps its matrix products and element-wise work in FP16, and LayerNorm and softmax in FP32: SAM in pure
FP16 gives garbage because LayerNorm's variance overflows (segment-anything#540, fixed the same way in #696).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """LayerNorm over the last axis, computed in FP32 whatever the input's precision; returns the input's precision."""

    def __init__(self, source: nn.LayerNorm, eps: float) -> None:
        super().__init__()
        self.weight = nn.Buffer(source.weight.detach().float())
        self.bias = nn.Buffer(source.bias.detach().float())
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)


class Affine(nn.Module):
    """y = x @ weight + bias over the last axis, with `weight` stored [in, out] so that no Transpose is exported."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight.detach().to(dtype).contiguous())
        self.bias = None if bias is None else nn.Buffer(bias.detach().to(dtype))

    @classmethod
    def from_linear(cls, source: nn.Linear, dtype: torch.dtype) -> "Affine":
        """Copy a linear layer."""
        return cls(source.weight.t(), source.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
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


def patch_weight(weight: Tensor) -> Tensor:
    """Convolution kernel [out, in, k, k] with stride k as a matrix [k*k*in, out] for `patches`."""
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])
