"""The decoder's attention layers, each in two forms that compute the same thing.

`Projected*` projects both sides, as the original does: right where products are cheap, on a GPU.
`Absorbed*` folds the image-side projections into the few tokens, as multi-head latent attention does: with 7 tokens and
4096 image positions the ten 4096 x 256 x 128 products of a prompt vanish, 1.81 -> 1.04 GMAC. It wins up to about 16
tokens, which is what prompts have.

Tokens are [B, P, T, C]. The image is [B, P or 1, L, C]: until a prompt has written to it, all prompts share one row.
`bias` is [B, P, 1, 1, T], 0 for a token and `INERT` for padding.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamAttention

from export.wrappers.layers import Affine, softmax

# Far below any score, finite in FP16, and exp() of it is exactly 0 in FP32: a padding token's weight is exactly 0.
INERT = -30000.0


class TokenToImage(Protocol):
    """Tokens read the image: (tokens, image with positions, image) -> update of the tokens."""

    def __call__(self, tokens: Tensor, placed: Tensor, image: Tensor) -> Tensor: ...


class ImageToToken(Protocol):
    """The image reads the tokens: (image with positions, tokens with positions, tokens, bias) -> update of the image."""

    def __call__(self, placed: Tensor, placed_tokens: Tensor, tokens: Tensor, bias: Tensor) -> Tensor: ...


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, P, T, heads*d] -> [B, P, heads, T, d]."""
    return x.reshape(x.shape[0], x.shape[1], x.shape[2], heads, -1).transpose(2, 3)


def join_heads(x: Tensor) -> Tensor:
    """[B, P, heads, T, d] -> [B, P, T, heads*d]."""
    x = x.transpose(2, 3)
    return x.reshape(x.shape[0], x.shape[1], x.shape[2], -1)


class Projected(nn.Module):
    """Multi-head attention as the original computes it, except that the query is scaled before the first product."""

    def __init__(self, source: SamAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = source.num_attention_heads
        self.scale = (source.internal_dim // self.heads) ** -0.5
        self.query = Affine.from_linear(source.q_proj, dtype)
        self.key = Affine.from_linear(source.k_proj, dtype)
        self.value = Affine.from_linear(source.v_proj, dtype)
        self.out = Affine.from_linear(source.out_proj, dtype)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """[B, P, T, C], [B, P, U, C] twice, bias [B, P, 1, 1, U] -> [B, P, T, C]."""
        query = split_heads(self.query(queries) * self.scale, self.heads)
        key = split_heads(self.key(keys), self.heads)
        value = split_heads(self.value(values), self.heads)
        scores = query @ key.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        return self.out(join_heads(softmax(scores) @ value))


class ProjectedTokenToImage(Projected):
    """`TokenToImage` with keys and values projected from every image position."""

    def forward(self, tokens: Tensor, placed: Tensor, image: Tensor) -> Tensor:
        return self.attend(tokens, placed, image, None)


class ProjectedImageToToken(Projected):
    """`ImageToToken` with queries projected from every image position."""

    def forward(self, placed: Tensor, placed_tokens: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
        return self.attend(placed, placed_tokens, tokens, bias)
