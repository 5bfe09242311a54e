"""The decoder's attention layers, in two forms that compute the same thing.

`Projected*` projects both sides, as the original does: right where products are cheap, on a GPU.
`Absorbed*` folds the image-side projections into the few tokens, as multi-head latent attention does: with 7 tokens and
4096 image positions the ten 4096 x 256 x 128 products of a prompt vanish, 1.81 -> 1.04 GMAC. It wins up to about 16
tokens, which is what prompts have.

Tokens are [B, P, T, C]. The image is [B, P or 1, L, C]: until a prompt has written to it, all prompts share one row.
`bias` is [B, P, 1, 1, T], 0 for a token and `INERT` for padding. "Placed" means: with positions added.
"""

import torch
from torch import Tensor, nn

from export.weights import Weights
from export.wrappers.layers import Affine, softmax

# Far below any score, finite in FP16, and exp() of it is exactly 0 in FP32: a padding token's weight is exactly 0.
INERT = -30000.0


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, P, T, heads*d] -> [B, P, heads, T, d]."""
    return x.reshape(x.shape[0], x.shape[1], x.shape[2], heads, -1).transpose(2, 3)


def join_heads(x: Tensor) -> Tensor:
    """[B, P, heads, T, d] -> [B, P, T, heads*d]."""
    x = x.transpose(2, 3)
    return x.reshape(x.shape[0], x.shape[1], x.shape[2], -1)


class Projected(nn.Module):
    """Multi-head attention as the original computes it, except that the query is scaled before the first product."""

    def __init__(self, source: Weights, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.query = Affine.linear(source.at("q_proj"), dtype)
        self.key = Affine.linear(source.at("k_proj"), dtype)
        self.value = Affine.linear(source.at("v_proj"), dtype)
        self.out = Affine.linear(source.at("out_proj"), dtype)
        self.scale = (source["q_proj.weight"].shape[0] // heads) ** -0.5

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """[B, P, T, C], [B, P, U, C] twice, bias [B, P, 1, 1, U] -> [B, P, T, C]."""
        query = split_heads(self.query(queries) * self.scale, self.heads)
        key = split_heads(self.key(keys), self.heads)
        value = split_heads(self.value(values), self.heads)
        scores = query @ key.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        read: Tensor = self.out(join_heads(softmax(scores) @ value))
        return read


class ProjectedTokenToImage(Projected):
    """Tokens read the image: (placed tokens, placed image, image) -> update of the tokens."""

    def forward(self, placed_tokens: Tensor, placed: Tensor, image: Tensor) -> Tensor:
        return self.attend(placed_tokens, placed, image, None)


class ProjectedImageToToken(Projected):
    """The image reads the tokens: (placed image, placed tokens, tokens, bias) -> update of the image."""

    def forward(self, placed: Tensor, placed_tokens: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
        return self.attend(placed, placed_tokens, tokens, bias)


def _per_head(weight: Tensor, heads: int) -> Tensor:
    """[heads*d, C] -> [heads, d, C]."""
    return weight.reshape(heads, -1, weight.shape[1])


class AbsorbedTokenToImage(nn.Module):
    """`ProjectedTokenToImage` with the key's projection applied to the query, and the value's to what was read.

    The key's bias adds the same to every score of a query and so drops out of the softmax; the value's adds itself
    once, because the weights sum to 1.
    """

    def __init__(self, source: Weights, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        scale = (source["q_proj.weight"].shape[0] // heads) ** -0.5
        self.query = Affine(source["q_proj.weight"].t() * scale, source["q_proj.bias"] * scale, dtype)
        self.key = nn.Buffer(_per_head(source["k_proj.weight"], heads).to(dtype))
        self.value = nn.Buffer(_per_head(source["v_proj.weight"], heads).transpose(1, 2).contiguous().to(dtype))
        out = source["out_proj.weight"].t()
        self.out = Affine(out, source["v_proj.bias"] @ out + source["out_proj.bias"], dtype)

    def forward(self, placed_tokens: Tensor, placed: Tensor, image: Tensor) -> Tensor:
        images, prompts, tokens, channels = placed_tokens.shape
        query = split_heads(self.query(placed_tokens), self.heads) @ self.key
        scores = query.reshape(images, prompts, self.heads * tokens, channels) @ placed.transpose(-1, -2)
        read = (softmax(scores) @ image).reshape(images, prompts, self.heads, tokens, channels)
        update: Tensor = self.out(join_heads(read @ self.value))
        return update


class AbsorbedImageToToken(nn.Module):
    """`ProjectedImageToToken` with the query's projection applied to the keys, and the output's to the values.

    Both products with the image are then one matrix product over all heads: [heads*T, C] x [C, L] and back. The
    output's bias rides on the values, an equal share per head: each head's weights sum to 1. Scores lie with the image
    last and the softmax runs across T in vector operations, which takes a third of the time of 8*L rows of 7.
    """

    def __init__(self, source: Weights, heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        scale = (source["q_proj.weight"].shape[0] // heads) ** -0.5
        self.key = Affine.linear(source.at("k_proj"), dtype)
        self.value = Affine.linear(source.at("v_proj"), dtype)
        self.query = nn.Buffer(_per_head(source["q_proj.weight"] * scale, heads).to(dtype))
        self.query_bias = nn.Buffer((source["q_proj.bias"] * scale).reshape(heads, -1, 1).to(dtype))
        self.out = nn.Buffer(_per_head(source["out_proj.weight"].t(), heads).to(dtype))
        self.out_bias = nn.Buffer((source["out_proj.bias"] / heads).to(dtype))

    def forward(self, placed: Tensor, placed_tokens: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
        images, prompts, count, channels = tokens.shape
        rows, length = self.heads * count, placed.shape[2]
        key = split_heads(self.key(placed_tokens), self.heads)
        value = split_heads(self.value(tokens), self.heads) @ self.out + self.out_bias
        offset = key @ self.query_bias + bias.transpose(-1, -2)
        absorbed = (key @ self.query).reshape(images, prompts, rows, channels)
        scores = absorbed @ placed.transpose(-1, -2) + offset.reshape(images, prompts, rows, 1)
        scores = scores.reshape(images, prompts, self.heads, count, length).float()
        powers = torch.exp(scores - scores.amax(-2, keepdim=True))
        weights = (powers / powers.sum(-2, keepdim=True)).to(tokens.dtype).reshape(images, prompts, rows, length)
        return weights.transpose(-1, -2) @ value.reshape(images, prompts, rows, channels)
