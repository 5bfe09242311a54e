"""The prompt encoder and mask decoder as one graph, batched over images and over prompts of an image.

Against the original (segment-anything 1.0, `MaskDecoder.predict_masks`): no `repeat_interleave` (a prompt's copy of the
image appears only once it differs), channels stay last, the scale sits on the query, padding tokens are masked out of
attention, and all four masks are returned. The arithmetic is the original's, its LayerNorm epsilon included:
transformers' `SamMaskDecoder` uses 1e-6 where the original's two-way transformer uses PyTorch's 1e-5.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SamModel
from transformers.models.sam.modeling_sam import SamFeedForward, SamMaskDecoder, SamTwoWayAttentionBlock

from export.wrappers.attention import INERT, Projected, ProjectedImageToToken, ProjectedTokenToImage
from export.wrappers.layers import Affine, Norm
from export.wrappers.prompts import MaskPrompt, SparsePrompt, dense_positions
from service.tensors import LABEL_PADDING, MASKS_PER_PROMPT

TRANSFORMER_EPS = 1e-5


class TwoWayBlock(nn.Module):
    """One layer of the two-way transformer: tokens read tokens, then the image, then the image reads the tokens."""

    def __init__(self, source: SamTwoWayAttentionBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.is_first = source.skip_first_layer_pe
        self.self_attention = Projected(source.self_attn, dtype)
        self.norm1 = Norm(source.layer_norm1, TRANSFORMER_EPS)
        self.token_to_image = ProjectedTokenToImage(source.cross_attn_token_to_image, dtype)
        self.norm2 = Norm(source.layer_norm2, TRANSFORMER_EPS)
        self.mlp_in = Affine.from_linear(source.mlp.lin1, dtype)
        self.mlp_out = Affine.from_linear(source.mlp.lin2, dtype)
        self.norm3 = Norm(source.layer_norm3, TRANSFORMER_EPS)
        self.image_to_token = ProjectedImageToToken(source.cross_attn_image_to_token, dtype)
        self.norm4 = Norm(source.layer_norm4, TRANSFORMER_EPS)

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
    """Linear layers with ReLU between them, `branches` of them side by side on the last axis but one.

    [..., branches, in] -> [..., branches, out]: the four hypernetworks are three batched products, not twelve.
    """

    def __init__(self, sources: list[SamFeedForward], dtype: torch.dtype) -> None:
        super().__init__()
        columns = zip(*([s.proj_in, *s.layers, s.proj_out] for s in sources), strict=True)
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for column in columns:
            weight = torch.stack([layer.weight.detach().t() for layer in column]).to(dtype)
            bias = torch.stack([layer.bias.detach()[None] for layer in column]).to(dtype)
            self.weights.append(nn.Parameter(weight, requires_grad=False))
            self.biases.append(nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., None, :]
        last = len(self.weights) - 1
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight + bias
            x = F.relu(x) if index < last else x
        return x[..., 0, :]


class Upscaler(nn.Module):
    """The two stride-2 transposed convolutions, and the products with the mask tokens' hypernetworks.

    A transposed convolution whose stride is its kernel is one product per position, so channels stay last and only the
    finished masks are rearranged.
    """

    def __init__(self, source: SamMaskDecoder, grid: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.grid = grid
        self.up1 = self._as_product(source.upscale_conv1, dtype)
        self.norm = Norm(source.upscale_layer_norm, source.upscale_layer_norm.eps)
        self.up2 = self._as_product(source.upscale_conv2, dtype)

    @staticmethod
    def _as_product(source: nn.ConvTranspose2d, dtype: torch.dtype) -> Affine:
        weight = source.weight.permute(0, 2, 3, 1).reshape(source.weight.shape[0], -1)
        return Affine(weight, None if source.bias is None else source.bias.repeat(4), dtype)

    def forward(self, image: Tensor, hyper: Tensor) -> Tensor:
        """Image [B, P, L, C] and hyper [B, P, 4, C/8] -> masks [B, P, 4, 4G, 4G]."""
        images, prompts, grid = image.shape[0], image.shape[1], self.grid
        x = self.up1(image).reshape(images, prompts, 4 * grid * grid, -1)
        x = F.gelu(self.norm(x))
        x = F.gelu(self.up2(x)).reshape(images, prompts, 16 * grid * grid, -1)
        x = (x @ hyper.transpose(-1, -2)).reshape(-1, grid, grid, 2, 2, 2, 2, MASKS_PER_PROMPT)
        x = x.permute(0, 7, 1, 3, 5, 2, 4, 6)
        return x.reshape(images, prompts, MASKS_PER_PROMPT, 4 * grid, 4 * grid)


class MaskDecoder(nn.Module):
    """`sam_decoder`: embedding, points -> low-res masks and predicted IoU (shapes: DESIGN.md, "Tensors").

    Args:
        sam: the model whose weights are copied.
        dtype: precision of the products; torch.float32 or torch.float16.
    """

    def __init__(self, sam: SamModel, dtype: torch.dtype) -> None:
        super().__init__()
        source = sam.mask_decoder
        self.dtype = dtype
        self.grid = sam.config.vision_config.image_size // sam.config.vision_config.patch_size
        self.sparse = SparsePrompt(sam)
        self.no_mask = nn.Buffer(sam.prompt_encoder.no_mask_embed.weight.detach().to(dtype))
        self.positions = nn.Buffer(dense_positions(sam, self.grid).to(dtype))
        self.output_tokens = nn.Buffer(torch.cat([source.iou_token.weight, source.mask_tokens.weight]).detach())
        self.blocks = nn.ModuleList(TwoWayBlock(layer, dtype) for layer in source.transformer.layers)
        self.final_attention = ProjectedTokenToImage(source.transformer.final_attn_token_to_image, dtype)
        self.final_norm = Norm(source.transformer.layer_norm_final_attn, TRANSFORMER_EPS)
        self.hypernetworks = Mlp(list(source.output_hypernetworks_mlps), dtype)
        self.iou_head = Mlp([source.iou_prediction_head], dtype)
        self.upscaler = Upscaler(source, self.grid, dtype)

    def forward(self, embedding: Tensor, point_coords: Tensor, point_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return low_res_masks FP16 [B, P, 4, 4G, 4G] and iou_scores FP32 [B, P, 4]."""
        return self.decode(self.image_of(embedding) + self.no_mask, point_coords, point_labels)

    def image_of(self, embedding: Tensor) -> Tensor:
        """FP16 [B, C, G, G] -> [B, 1, G*G, C]."""
        return embedding.to(self.dtype).flatten(2).transpose(1, 2)[:, None]

    def decode(self, image: Tensor, point_coords: Tensor, point_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Decode an image that already carries its dense prompt, [B, P or 1, G*G, C]."""
        prompt, bias = self._tokens(point_coords, point_labels)
        tokens = prompt
        for block in self.blocks:
            tokens, image = block(tokens, image, prompt, self.positions, bias)
        read = self.final_attention(tokens + prompt, image + self.positions, image)
        tokens = self.final_norm(tokens + read)
        hyper = self.hypernetworks(tokens[:, :, 1 : 1 + MASKS_PER_PROMPT])
        iou = self.iou_head(tokens[:, :, 0:1])[:, :, 0]
        return self.upscaler(image, hyper).to(torch.float16), iou.to(torch.float32)

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

    def __init__(self, sam: SamModel, dtype: torch.dtype) -> None:
        super().__init__(sam, dtype)
        self.dense = MaskPrompt(sam, dtype)

    def forward(  # type: ignore[override]
        self, embedding: Tensor, point_coords: Tensor, point_labels: Tensor, mask_input: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what `MaskDecoder` returns; mask_input is FP16 [B, P, 4G, 4G]."""
        return self.decode(self.image_of(embedding) + self.dense(mask_input), point_coords, point_labels)
