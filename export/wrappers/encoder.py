"""The image encoder as a graph: bytes in, embedding out.

Relative positions are folded into the head dimension, so that TensorRT sees plain attention and fuses it:

    softmax(s q.k + q.Rh[row] + q.Rw[col])  =  softmax([s q | q.Rh | q.Rw] . [k | onehot(row) | onehot(col)])

which is exact: a one-hot row selects one term and adds zeros. What it buys, for one ViT-B image at 1024 pixels: as a
separate addition, each of the four global blocks moves its 12 x 4096 x 4096 FP16 scores (403 MB) about six times,
9.7 GB an image, 32 ms at an L4's 300 GB/s, four times the 8 ms its arithmetic takes. As an additive mask of a fused
kernel the scores are written once and read once, 3.2 GB, 11 ms. Folded, they never leave the chip; the price is 64 ->
192 columns in both products of the global blocks, 206 GMAC more on top of 486: 3.4 ms at an L4's 121 TFLOP/s.

TensorRT fuses (seen with TensorRT-RTX 1.7, SM80 to SM120) when the value is as wide as query and key, so FP16 graphs
pad it with zeros; with 64 columns beside 192 the same pattern is left unfused. FP32 graphs, for CPUs, do not pad.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.architecture import CHANNELS_EPS, ENCODER_EPS, Architecture
from export.weights import Weights
from export.wrappers.layers import Affine, Norm, patches, softmax
from service.tensors import PATCH_SIZE

# ImageNet's mean and standard deviation on the 0..255 scale, as in the original's `build_sam`.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
_ALIGNMENT = 8  # fused attention wants head sizes divisible by this


def _relative_table(rel_pos: Tensor, size: int, width: int) -> Tensor:
    """Gather [2*size-1, D] into the constant [size, D, width]: row q, column k holds rel_pos[q - k + size - 1]."""
    index = torch.arange(size)[:, None] - torch.arange(size)[None, :] + size - 1
    return F.pad(rel_pos[index].permute(0, 2, 1), (0, width - size))


class Attention(nn.Module):
    """Self-attention over `size` x `size` tokens with decomposed relative positions folded into the head dimension."""

    def __init__(self, source: Weights, heads: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.size = size
        self.width = -(-size // _ALIGNMENT) * _ALIGNMENT
        self.is_padded = dtype == torch.float16
        self.qkv = Affine.linear(source.at("qkv"), dtype)
        self.proj = Affine.linear(source.at("proj"), dtype)
        self.rel_rows = nn.Buffer(_relative_table(source["rel_pos_h"], size, self.width).to(dtype))
        self.rel_columns = nn.Buffer(_relative_table(source["rel_pos_w"], size, self.width).to(dtype))
        one_hot = F.pad(torch.eye(size, dtype=dtype), (0, self.width - size))
        rows = one_hot[:, None, :].expand(size, size, self.width)
        columns = one_hot[None, :, :].expand(size, size, self.width)
        self.positions = nn.Buffer(torch.cat([rows, columns], -1).reshape(1, 1, size * size, 2 * self.width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, size*size, width] -> the same."""
        tokens, channels = self.size * self.size, x.shape[-1]
        head = channels // self.heads
        qkv = self.qkv(x).reshape(-1, tokens, 3, self.heads, head).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        by_row = query.reshape(-1, self.heads, self.size, self.size, head)
        rows = (by_row @ self.rel_rows).reshape(-1, self.heads, tokens, self.width)
        columns = (by_row.transpose(2, 3) @ self.rel_columns).transpose(2, 3)
        columns = columns.reshape(-1, self.heads, tokens, self.width)
        query = torch.cat([query * head**-0.5, rows, columns], -1)
        key = torch.cat([key, self.positions.expand(key.shape[0], self.heads, tokens, 2 * self.width)], -1)
        if self.is_padded:
            value = F.pad(value, (0, 2 * self.width))
        attended = (softmax(query @ key.transpose(-1, -2)) @ value)[..., :head]
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(-1, tokens, channels))
        return projected


class Block(nn.Module):
    """One transformer block over a `grid` x `grid` map, attending within windows of side `window`, or globally (0)."""

    def __init__(self, source: Weights, shape: Architecture, window: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.grid = shape.grid
        self.window = window
        self.norm1 = Norm(source.at("layer_norm1"), ENCODER_EPS)
        self.attention = Attention(source.at("attn"), shape.heads, window or shape.grid, dtype)
        self.norm2 = Norm(source.at("layer_norm2"), ENCODER_EPS)
        self.mlp_in = Affine.linear(source.at("mlp.lin1"), dtype)
        self.mlp_out = Affine.linear(source.at("mlp.lin2"), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, grid, grid, width] -> the same."""
        normed = self.norm1(x)
        x = x + (self._windowed(normed) if self.window else self._global(normed))
        updated: Tensor = x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x))))
        return updated

    def _global(self, x: Tensor) -> Tensor:
        flat: Tensor = self.attention(x.reshape(-1, self.grid * self.grid, x.shape[-1]))
        return flat.reshape(-1, self.grid, self.grid, x.shape[-1])

    def _windowed(self, x: Tensor) -> Tensor:
        """Attend within windows; a ragged edge is padded with zeros that do attend, as in the original."""
        window, channels = self.window, x.shape[-1]
        count = -(-self.grid // window)
        margin = count * window - self.grid
        if margin:
            x = F.pad(x, (0, 0, 0, margin, 0, margin))
        x = x.reshape(-1, count, window, count, window, channels).permute(0, 1, 3, 2, 4, 5)
        x = self.attention(x.reshape(-1, window * window, channels))
        x = x.reshape(-1, count, count, window, window, channels).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, count * window, count * window, channels)
        return x[:, : self.grid, : self.grid] if margin else x


class ImageEncoder(nn.Module):
    """UINT8 image [B, S, S, 3] and INT32 valid_size [B, 2] (h, w) -> FP16 embedding [B, C, G, G].

    Args:
        weights: of the whole model.
        shape: its architecture.
        dtype: precision of the products; torch.float32 or torch.float16.
    """

    def __init__(self, weights: Weights, shape: Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        source = weights.at("vision_encoder")
        self.dtype = dtype
        self.grid = shape.grid
        self.mean = nn.Buffer(torch.tensor(PIXEL_MEAN))
        self.std = nn.Buffer(torch.tensor(PIXEL_STD))
        self.pixels = nn.Buffer(torch.arange(shape.input_size, dtype=torch.int32))
        self.patch_embed = Affine.strided(source.at("patch_embed.projection"), dtype)
        self.pos_embed = nn.Buffer(source["pos_embed"].to(dtype))
        windows = [0 if index in shape.global_blocks else shape.window for index in range(shape.depth)]
        layers = enumerate(windows)
        self.blocks = nn.ModuleList(Block(source.at(f"layers.{i}"), shape, window, dtype) for i, window in layers)
        neck = source.at("neck")
        self.neck1 = Affine(neck["conv1.weight"][:, :, 0, 0].t(), None, dtype)
        self.neck_norm1 = Norm(neck.at("layer_norm1"), CHANNELS_EPS)
        self.neck2 = nn.Buffer(neck["conv2.weight"].to(dtype))
        self.neck_norm2 = Norm(neck.at("layer_norm2"), CHANNELS_EPS)

    def forward(self, image: Tensor, valid_size: Tensor) -> Tensor:
        x = self.patch_embed(patches(self._normalised(image, valid_size), self.grid, PATCH_SIZE))
        x = x.reshape(-1, self.grid, self.grid, x.shape[-1]) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.neck_norm1(self.neck1(x)).permute(0, 3, 1, 2)
        x = F.conv2d(x, self.neck2, padding=1).permute(0, 2, 3, 1)
        embedding: Tensor = self.neck_norm2(x).permute(0, 3, 1, 2).to(torch.float16)
        return embedding

    def _normalised(self, image: Tensor, valid_size: Tensor) -> Tensor:
        """Normalise; outside `valid_size` the result is exactly 0: the original pads after normalising."""
        rows = self.pixels[None, :] < valid_size[:, 0:1]
        columns = self.pixels[None, :] < valid_size[:, 1:2]
        inside = (rows[:, :, None] & columns[:, None, :])[..., None]
        pixels = (image.to(torch.float32) - self.mean) / self.std
        return torch.where(inside, pixels, torch.zeros((), dtype=torch.float32)).to(self.dtype)
