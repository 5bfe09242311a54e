"""Prompts as tensors: sparse tokens from points and box corners, a dense map from an earlier mask."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SamModel

from export.wrappers.layers import Affine, Norm, patch_weight, positional_encoding
from service.tensors import LABEL_FOREGROUND, LABEL_PADDING


class SparsePrompt(nn.Module):
    """FP32 point_coords [B, P, N, 2] in input pixels and INT32 point_labels [B, P, N] -> FP32 tokens [B, P, N, C].

    Labels as in `service.tensors`; a padding label gives a zero token (attention masks it out as well).
    """

    def __init__(self, sam: SamModel) -> None:
        super().__init__()
        source = sam.prompt_encoder
        self.side = float(sam.config.vision_config.image_size)
        self.gaussian = nn.Buffer(sam.shared_image_embedding.positional_embedding.detach().float())
        kinds = [torch.zeros_like(source.not_a_point_embed.weight), source.not_a_point_embed.weight]
        kinds += [source.point_embed[label].weight for label in range(LABEL_FOREGROUND + 3)]
        self.kinds = nn.Buffer(torch.cat(kinds).detach().float())

    def forward(self, coords: Tensor, labels: Tensor) -> Tensor:
        placed = positional_encoding((coords + 0.5) / self.side, self.gaussian)
        placed = torch.where((labels >= 0)[..., None], placed, torch.zeros((), dtype=torch.float32))
        return placed + F.embedding(labels.long() - LABEL_PADDING, self.kinds)


def dense_positions(sam: SamModel, grid: int) -> Tensor:
    """Positional encoding of every grid cell's centre, FP32 [G*G, C], a constant of the graph."""
    centres = (torch.arange(grid, dtype=torch.float32) + 0.5) / grid
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    coords = torch.stack([columns, rows], -1).reshape(grid * grid, 2)
    return positional_encoding(coords, sam.shared_image_embedding.positional_embedding.detach().float())


class MaskPrompt(nn.Module):
    """FP16 mask_input [B, P, 4G, 4G], low-res logits -> dense prompt [B, P, G*G, C] in `dtype`.

    The original's two strided convolutions, as products over 2x2 patches so that channels stay last.
    """

    def __init__(self, sam: SamModel, dtype: torch.dtype) -> None:
        super().__init__()
        source = sam.prompt_encoder.mask_embed
        self.dtype = dtype
        self.grid = sam.config.vision_config.image_size // sam.config.vision_config.patch_size
        self.conv1 = Affine(patch_weight(source.conv1.weight), source.conv1.bias, dtype)
        self.norm1 = Norm(source.layer_norm1, source.layer_norm1.eps)
        self.conv2 = Affine(patch_weight(source.conv2.weight), source.conv2.bias, dtype)
        self.norm2 = Norm(source.layer_norm2, source.layer_norm2.eps)
        self.conv3 = Affine(patch_weight(source.conv3.weight), source.conv3.bias, dtype)

    def forward(self, mask_input: Tensor) -> Tensor:
        images, prompts, grid = mask_input.shape[0], mask_input.shape[1], self.grid
        # rows and columns of the low-res mask split into (cell, patch of the second, patch of the first convolution)
        x = mask_input.to(self.dtype).reshape(-1, grid, 2, 2, grid, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
        x = F.gelu(self.norm1(self.conv1(x.reshape(-1, grid * grid, 4, 4))))
        x = F.gelu(self.norm2(self.conv2(x.reshape(-1, grid * grid, 4 * x.shape[-1]))))
        return self.conv3(x).reshape(images, prompts, grid * grid, -1)
