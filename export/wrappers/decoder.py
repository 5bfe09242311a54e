"""The prompt encoder and mask decoder as one graph, batched over images and over prompts of an image.

Against the original (segment-anything 1.0, `MaskDecoder.predict_masks`): no `repeat_interleave` (a prompt's copy of the
image appears only once it differs), channels stay last, the scale sits on the query, padding tokens are masked out of
attention, and all four masks are returned. The arithmetic is the original's.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.architecture import CHANNELS_EPS, TRANSFORMER_EPS, Architecture
from export.weights import Weights
from export.wrappers.attention import (
    INERT,
    AbsorbedImageToToken,
    AbsorbedTokenToImage,
    Projected,
    ProjectedImageToToken,
    ProjectedTokenToImage,
)
from export.wrappers.layers import Affine, Norm
from export.wrappers.prompts import MaskPrompt, SparsePrompt, dense_positions
from service.tensors import LABEL_PADDING, MASKS_PER_PROMPT

Form = Literal["projected", "absorbed"]
_TOKEN_TO_IMAGE = {"projected": ProjectedTokenToImage, "absorbed": AbsorbedTokenToImage}
_IMAGE_TO_TOKEN = {"projected": ProjectedImageToToken, "absorbed": AbsorbedImageToToken}
_LAYERS = 2
_MLP_LAYERS = ("proj_in", "layers.0", "proj_out")


class TwoWayBlock(nn.Module):
    """One layer of the two-way transformer: tokens read tokens, then the image, then the image reads the tokens."""

    def __init__(self, source: Weights, heads: int, dtype: torch.dtype, form: Form, *, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
        self.self_attention = Projected(source.at("self_attn"), heads, dtype)
        self.norm1 = Norm(source.at("layer_norm1"), TRANSFORMER_EPS)
        self.token_to_image = _TOKEN_TO_IMAGE[form](source.at("cross_attn_token_to_image"), heads, dtype)
        self.norm2 = Norm(source.at("layer_norm2"), TRANSFORMER_EPS)
        self.mlp_in = Affine.linear(source.at("mlp.lin1"), dtype)
        self.mlp_out = Affine.linear(source.at("mlp.lin2"), dtype)
        self.norm3 = Norm(source.at("layer_norm3"), TRANSFORMER_EPS)
        self.image_to_token = _IMAGE_TO_TOKEN[form](source.at("cross_attn_image_to_token"), heads, dtype)
        self.norm4 = Norm(source.at("layer_norm4"), TRANSFORMER_EPS)

    def forward(
        self, tokens: Tensor, image: Tensor, prompt: Tensor, positions: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update tokens [B, P, T, C] and image [B, P or 1, L, C] -> ([B, P, T, C], [B, P, L, C])."""
        if self.is_first:
            tokens = self.norm1(self.self_attention.attend(tokens, tokens, tokens, bias))
        else:
            placed_tokens = tokens + prompt
            tokens = self.norm1(tokens + self.self_attention.attend(placed_tokens, placed_tokens, tokens, bias))
        placed = image + positions
        tokens = self.norm2(tokens + self.token_to_image(tokens + prompt, placed, image))
        tokens = self.norm3(tokens + self.mlp_out(F.relu(self.mlp_in(tokens))))
        image = self.norm4(image + self.image_to_token(placed, tokens + prompt, tokens, bias))
        return tokens, image


class Mlp(nn.Module):
    """Three linear layers with ReLU between them, for several branches side by side on the last axis but one.

    [..., branches, in] -> [..., branches, out]: the four hypernetworks are three batched products, not twelve.
    """

    def __init__(self, sources: list[Weights], dtype: torch.dtype) -> None:
        super().__init__()
        for index, layer in enumerate(_MLP_LAYERS):
            weight = torch.stack([source[f"{layer}.weight"].t() for source in sources])
            bias = torch.stack([source[f"{layer}.bias"][None] for source in sources])
            self.register_buffer(f"weight{index}", weight.to(dtype))
            self.register_buffer(f"bias{index}", bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., None, :]
        for index in range(len(_MLP_LAYERS)):
            x = x @ self.get_buffer(f"weight{index}") + self.get_buffer(f"bias{index}")
            x = F.relu(x) if index < len(_MLP_LAYERS) - 1 else x
        return x[..., 0, :]


class Upscaler(nn.Module):
    """The two stride-2 transposed convolutions, and the products with the mask tokens' hypernetworks.

    A transposed convolution whose stride is its kernel is one product per position, so channels stay last and only the
    finished masks are rearranged.
    """

    def __init__(self, source: Weights, grid: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.grid = grid
        self.up1 = Affine.strided_transposed(source.at("upscale_conv1"), dtype)
        self.norm = Norm(source.at("upscale_layer_norm"), CHANNELS_EPS)
        self.up2 = Affine.strided_transposed(source.at("upscale_conv2"), dtype)

    def forward(self, image: Tensor, hyper: Tensor) -> Tensor:
        """Image [B, P, L, C] and hyper [B, P, 4, C/8] -> masks [B, P, 4, 4G, 4G]."""
        images, prompts, grid = image.shape[0], image.shape[1], self.grid
        x = self.up1(image).reshape(images, prompts, 4 * grid * grid, -1)
        x = F.gelu(self.norm(x))
        x = F.gelu(self.up2(x)).reshape(images, prompts, 16 * grid * grid, -1)
        # A row of the mask is (cell row, its half, the half's half), and a column likewise.
        x = (hyper @ x.transpose(-1, -2)).reshape(-1, grid, grid, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(images, prompts, MASKS_PER_PROMPT, 4 * grid, 4 * grid)


class MaskDecoder(nn.Module):
    """`sam_decoder`: embedding, points -> low-res masks and predicted IoU (shapes: DESIGN.md, "Tensors").

    Args:
        weights: of the whole model.
        shape: its architecture.
        dtype: precision of the products; torch.float32 or torch.float16.
        form: of the attention between tokens and image, see `export.wrappers.attention`.
    """

    def __init__(self, weights: Weights, shape: Architecture, dtype: torch.dtype, form: Form = "projected") -> None:
        super().__init__()
        source = weights.at("mask_decoder")
        transformer = source.at("transformer")
        self.dtype = dtype
        self.rounded_dtype = torch.float16  # of the masks
        self.grid = shape.grid
        self.sparse = SparsePrompt(weights, shape)
        self.no_mask = nn.Buffer(weights["prompt_encoder.no_mask_embed.weight"].to(dtype))
        self.positions = nn.Buffer(dense_positions(weights, shape.grid).to(dtype))
        self.output_tokens = nn.Buffer(torch.cat([source["iou_token.weight"], source["mask_tokens.weight"]]))
        self.blocks = nn.ModuleList(
            TwoWayBlock(transformer.at(f"layers.{i}"), shape.decoder_heads, dtype, form, is_first=i == 0)
            for i in range(_LAYERS)
        )
        final = transformer.at("final_attn_token_to_image")
        self.final_attention = _TOKEN_TO_IMAGE[form](final, shape.decoder_heads, dtype)
        self.final_norm = Norm(transformer.at("layer_norm_final_attn"), TRANSFORMER_EPS)
        hypernetworks = [source.at(f"output_hypernetworks_mlps.{i}") for i in range(MASKS_PER_PROMPT)]
        self.hypernetworks = Mlp(hypernetworks, dtype)
        self.iou_head = Mlp([source.at("iou_prediction_head")], dtype)
        self.upscaler = Upscaler(source, shape.grid, dtype)

    def forward(self, embedding: Tensor, point_coords: Tensor, point_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return low_res_masks FP16 [B, P, 4, 4G, 4G] and iou_scores FP32 [B, P, 4]."""
        return self.decode(self.image_of(embedding) + self.no_mask, point_coords, point_labels)

    def image_of(self, embedding: Tensor) -> Tensor:
        """FP16 [B, C, G, G] -> [B, 1, G*G, C]."""
        return embedding.flatten(2).transpose(1, 2)[:, None].to(self.dtype)

    def decode(self, image: Tensor, point_coords: Tensor, point_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Decode an image that already carries its dense prompt, [B, P or 1, G*G, C]."""
        prompt, bias = self._tokens(point_coords, point_labels)
        tokens = prompt
        for block in self.blocks:
            tokens, image = block(tokens, image, prompt, self.positions, bias)
        answering = self.output_tokens.shape[0]  # only the IoU and mask tokens are asked for anything from here on
        tokens, prompt = tokens[:, :, :answering], prompt[:, :, :answering]
        read = self.final_attention(tokens + prompt, image + self.positions, image)
        tokens = self.final_norm(tokens + read)
        hyper = self.hypernetworks(tokens[:, :, 1:])
        iou = self.iou_head(tokens[:, :, 0:1])[:, :, 0]
        return self.upscaler(image, hyper).to(self.rounded_dtype), iou.to(torch.float32)

    def _tokens(self, coords: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens [B, P, 5+N, C] and the attention bias [B, P, 1, 1, 5+N]."""
        sparse = self.sparse(coords, labels)
        count = self.output_tokens.shape[0]
        fixed = self.output_tokens.expand(labels.shape[0], labels.shape[1], count, self.output_tokens.shape[1])
        bias = torch.where(labels == LABEL_PADDING, INERT, 0.0).to(self.dtype)
        bias = F.pad(bias, (count, 0))[:, :, None, None, :]
        return torch.cat([fixed, sparse], 2).to(self.dtype), bias


class MaskRefiner(MaskDecoder):
    """`sam_refiner`: the decoder, with an earlier answer's low-res logits as a further prompt."""

    def __init__(self, weights: Weights, shape: Architecture, dtype: torch.dtype, form: Form = "projected") -> None:
        super().__init__(weights, shape, dtype, form)
        self.dense = MaskPrompt(weights, shape, dtype)

    def forward(  # type: ignore[override]
        self, embedding: Tensor, point_coords: Tensor, point_labels: Tensor, mask_input: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what `MaskDecoder` returns; mask_input is FP16 [B, P, 4G, 4G]."""
        return self.decode(self.image_of(embedding) + self.dense(mask_input), point_coords, point_labels)
