"""Prompts as tensors: sparse tokens from points and box corners, a dense map from an earlier mask."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.architecture import CHANNELS_EPS, Architecture
from export.weights import Weights
from export.wrappers.layers import Affine, Norm, positional_encoding
from service.tensors import LABEL_BOX_BOTTOM_RIGHT, LABEL_PADDING


class SparsePrompt(nn.Module):
    """FP32 point_coords [B, P, N, 2] in input pixels and INT32 point_labels [B, P, N] -> FP32 tokens [B, P, N, C].

    Labels as in `service.tensors`; a padding label gives a zero token (attention masks it out as well). Any other
    label is an error of the runtime (an index out of bounds).
    """

    def __init__(self, weights: Weights, shape: Architecture) -> None:
        super().__init__()
        source = weights.at("prompt_encoder")
        self.side = float(shape.input_size)
        self.gaussian = nn.Buffer(weights["shared_image_embedding.positional_embedding"])
        not_a_point = source["not_a_point_embed.weight"]
        corners = [source[f"point_embed.{label}.weight"] for label in range(LABEL_BOX_BOTTOM_RIGHT + 1)]
        self.kinds = nn.Buffer(torch.cat([torch.zeros_like(not_a_point), not_a_point, *corners]))

    def forward(self, coords: Tensor, labels: Tensor) -> Tensor:
        placed = positional_encoding((coords + 0.5) / self.side, self.gaussian)
        placed = torch.where((labels >= 0)[..., None], placed, torch.zeros((), dtype=torch.float32))
        return placed + F.embedding(labels.long() - LABEL_PADDING, self.kinds)


def dense_positions(weights: Weights, grid: int) -> Tensor:
    """Positional encoding of every grid cell's centre, FP32 [G*G, C], a constant of the graph."""
    centres = (torch.arange(grid, dtype=torch.float32) + 0.5) / grid
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    coords = torch.stack([columns, rows], -1).reshape(grid * grid, 2)
    return positional_encoding(coords, weights["shared_image_embedding.positional_embedding"])


class MaskPrompt(nn.Module):
    """FP16 mask_input [B, P, 4G, 4G], low-res logits -> dense prompt [B, P, G*G, C] in `dtype`.

    The original's two strided convolutions, as products over 2x2 patches so that channels stay last.
    """

    def __init__(self, weights: Weights, shape: Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        source = weights.at("prompt_encoder.mask_embed")
        self.dtype = dtype
        self.grid = shape.grid
        self.conv1 = Affine.strided(source.at("conv1"), dtype)
        self.norm1 = Norm(source.at("layer_norm1"), CHANNELS_EPS)
        self.conv2 = Affine.strided(source.at("conv2"), dtype)
        self.norm2 = Norm(source.at("layer_norm2"), CHANNELS_EPS)
        self.conv3 = Affine.strided(source.at("conv3"), dtype)

    def forward(self, mask_input: Tensor) -> Tensor:
        images, prompts, grid = mask_input.shape[0], mask_input.shape[1], self.grid
        # rows and columns of the low-res mask split into (cell, patch of the second, patch of the first convolution)
        x = mask_input.to(self.dtype).reshape(-1, grid, 2, 2, grid, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
        x = F.gelu(self.norm1(self.conv1(x.reshape(-1, grid * grid, 4, 4))))
        x = F.gelu(self.norm2(self.conv2(x.reshape(-1, grid * grid, 4 * x.shape[-1]))))
        dense: Tensor = self.conv3(x)
        return dense.reshape(images, prompts, grid * grid, -1)
