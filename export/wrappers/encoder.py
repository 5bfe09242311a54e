"""The image encoder as a graph: bytes in, embedding out.

Relative positions are folded into the head dimension so that TensorRT sees plain attention and can fuse it:

    softmax(s q.k + q.Rh[row] + q.Rw[col])  =  softmax([s q | q.Rh | q.Rw] . [k | onehot(row) | onehot(col)])

which is exact, since a one-hot row selects one term and adds zeros. What it buys, for one ViT-B image at 1024 pixels:
as an additive bias each of the four global blocks writes and reads a 12 x 4096 x 4096 score tensor about six times in
FP16, 9.7 GB an image, 32 ms at an L4's 300 GB/s, four times the 8 ms its arithmetic takes. Folded, that tensor never
leaves the chip; the price is 128 more columns in the first product, 103 GMAC on top of 486, under 2 ms there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SamModel
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionLayer

from export.wrappers.layers import Affine, Norm, patch_weight, patches, softmax

# ImageNet's mean and standard deviation on the 0..255 scale, as in the original's `build_sam`.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
_ALIGNMENT = 8  # fused attention wants head sizes divisible by this


def _relative_table(rel_pos: Tensor, size: int, width: int) -> Tensor:
    """Gather [2*size-1, D] into the constant [size, D, width]: row q, column k holds rel_pos[q - k + size - 1]."""
    index = torch.arange(size)[:, None] - torch.arange(size)[None, :] + size - 1
    table = rel_pos.detach()[index].permute(0, 2, 1)
    return F.pad(table, (0, width - size))


class Attention(nn.Module):
    """Self-attention over `size` x `size` tokens with decomposed relative positions folded into the head dimension."""

    def __init__(self, source: SamVisionAttention, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = source.num_attention_heads
        self.scale = source.scale
        self.size = size
        self.width = -(-size // _ALIGNMENT) * _ALIGNMENT
        self.qkv = Affine.from_linear(source.qkv, dtype)
        self.proj = Affine.from_linear(source.proj, dtype)
        self.rel_rows = nn.Buffer(_relative_table(source.rel_pos_h, size, self.width).to(dtype))
        self.rel_columns = nn.Buffer(_relative_table(source.rel_pos_w, size, self.width).to(dtype))
        one_hot = F.pad(torch.eye(size, dtype=dtype), (0, self.width - size))
        rows = one_hot[:, None, :].expand(size, size, self.width)
        columns = one_hot[None, :, :].expand(size, size, self.width)
        self.positions = nn.Buffer(torch.cat([rows, columns], -1).reshape(1, 1, size * size, 2 * self.width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, size*size, C] -> the same."""
        tokens, channels = self.size * self.size, x.shape[-1]
        head = channels // self.heads
        qkv = self.qkv(x).reshape(-1, tokens, 3, self.heads, head).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        by_row = query.reshape(-1, self.heads, self.size, self.size, head)
        rows = (by_row @ self.rel_rows).reshape(-1, self.heads, tokens, self.width)
        columns = (by_row.transpose(2, 3) @ self.rel_columns).transpose(2, 3)
        columns = columns.reshape(-1, self.heads, tokens, self.width)
        query = torch.cat([query * self.scale, rows, columns], -1)
        positions = self.positions.expand(key.shape[0], self.heads, tokens, 2 * self.width)
        key = torch.cat([key, positions], -1)
        attended = softmax(query @ key.transpose(-1, -2)) @ value
        return self.proj(attended.transpose(1, 2).reshape(-1, tokens, channels))


class Block(nn.Module):
    """One transformer block, over the whole grid or over windows of it (padded with zeros, as the original does)."""

    def __init__(self, source: SamVisionLayer, grid: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.grid = grid
        self.window = source.window_size
        self.norm1 = Norm(source.layer_norm1, eps)
        self.attention = Attention(source.attn, self.window or grid, dtype)
        self.norm2 = Norm(source.layer_norm2, eps)
        self.mlp_in = Affine.from_linear(source.mlp.lin1, dtype)
        self.mlp_out = Affine.from_linear(source.mlp.lin2, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, grid, grid, C] -> the same."""
        normed = self.norm1(x)
        attended = self._windowed(normed) if self.window else self._global(normed)
        x = x + attended
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x))))

    def _global(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.grid * self.grid, x.shape[-1])
        return self.attention(flat).reshape(-1, self.grid, self.grid, x.shape[-1])

    def _windowed(self, x: Tensor) -> Tensor:
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
        sam: the model whose weights are copied.
        dtype: precision of the products; torch.float32 or torch.float16.
    """

    def __init__(self, sam: SamModel, dtype: torch.dtype) -> None:
        super().__init__()
        source, config = sam.vision_encoder, sam.config.vision_config
        self.dtype = dtype
        self.patch = config.patch_size
        self.grid = config.image_size // config.patch_size
        self.mean = nn.Buffer(torch.tensor(PIXEL_MEAN))
        self.std = nn.Buffer(torch.tensor(PIXEL_STD))
        self.pixels = nn.Buffer(torch.arange(config.image_size, dtype=torch.int32))
        projection = source.patch_embed.projection
        self.patch_embed = Affine(patch_weight(projection.weight), projection.bias, dtype)
        self.pos_embed = nn.Buffer(source.pos_embed.detach().to(dtype))
        self.blocks = nn.ModuleList(Block(layer, self.grid, config.layer_norm_eps, dtype) for layer in source.layers)
        self.neck1 = Affine(source.neck.conv1.weight[:, :, 0, 0].t(), None, dtype)
        self.neck_norm1 = Norm(source.neck.layer_norm1, source.neck.layer_norm1.eps)
        self.neck2 = nn.Buffer(source.neck.conv2.weight.detach().to(dtype))
        self.neck_norm2 = Norm(source.neck.layer_norm2, source.neck.layer_norm2.eps)

    def forward(self, image: Tensor, valid_size: Tensor) -> Tensor:
        x = patches(self._normalised(image, valid_size), self.grid, self.patch)
        x = self.patch_embed(x).reshape(-1, self.grid, self.grid, self.patch_embed.weight.shape[1]) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.neck_norm1(self.neck1(x)).permute(0, 3, 1, 2)
        x = F.conv2d(x, self.neck2, padding=1).permute(0, 2, 3, 1)
        return self.neck_norm2(x).permute(0, 3, 1, 2).to(torch.float16)

    def _normalised(self, image: Tensor, valid_size: Tensor) -> Tensor:
        """Normalise; outside `valid_size` the result is exactly 0: the original pads after normalising."""
        rows = self.pixels[None, :] < valid_size[:, 0:1]
        columns = self.pixels[None, :] < valid_size[:, 1:2]
        inside = (rows[:, :, None] & columns[:, None, :])[..., None]
        pixels = (image.to(torch.float32) - self.mean) / self.std
        return torch.where(inside, pixels, torch.zeros((), dtype=torch.float32)).to(self.dtype)
