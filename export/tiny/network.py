"""sam-tiny as a module: initialisation from scratch, encode and decode for training, reading and writing weights.

`encode` and `decode` call the submodules of transformers' `SamModel` directly, because its own forward cannot take
a mask per prompt, does not return all four masks, and refuses images of another size than the configured one. A test
holds them equal to `SamModel.forward`.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import SamModel

from export.tiny.config import INPUT_SIZE, PATCH_SIZE, sam_tiny_config

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
# Standard deviation of the random frequencies of the positional encoding. The original has 1 for 1024 px; what counts
# is the width of a patch in it, and at 384 px 1.5 gives the one that trained well at 256 px with 1.
FREQUENCY_STD = 1.5
_TIED = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")


def untrained_model(seed: int) -> SamModel:
    """Build the model with an initialisation that trains from scratch, which transformers' own does not.

    PyTorch's defaults for linear and convolution layers, sinusoidal absolute positions, and a positional encoding
    (shared by image and prompts) whose frequencies are not hundreds of times too high.
    """
    torch.manual_seed(seed)
    model = _bare_model()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=1.0)
        positions = _positions(model)
        positions.copy_(_sinusoids(positions.shape[1], positions.shape[-1]))
        frequencies = model.shared_image_embedding.positional_embedding
        nn.init.normal_(frequencies, std=FREQUENCY_STD)
    return model


def load_model(path: Path) -> SamModel:
    """Read weights (any float dtype) into an FP32 model in evaluation mode.

    Raises:
        RuntimeError: names or shapes do not fit this configuration.
    """
    model = _bare_model()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    model.train(mode=False)
    return model


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write weights as FP16 safetensors, under transformers' `SamModel` names."""
    halves = {name: tensor.detach().to(torch.float16).contiguous().clone() for name, tensor in weights.items()}
    save_file(halves, path, metadata={"format": "pt"})


def encode(model: SamModel, images: Tensor, valid_sizes: Tensor, corner: tuple[int, int] = (0, 0)) -> Tensor:
    """Encode square images: uint8 [B, s, s, 3] and int64 [B, 2] (height, width) to embeddings float [B, C, s/16, s/16].

    An image smaller than the model's input is treated as the window of a full one whose top-left patch is `corner`
    (row, column), so that training on small images teaches the same positions as serving uses.
    """
    mean, std = images.new_tensor(PIXEL_MEAN, dtype=torch.float32), images.new_tensor(PIXEL_STD, dtype=torch.float32)
    along = torch.arange(images.shape[1])
    inside = (along[None, :, None] < valid_sizes[:, 0, None, None]) & (
        along[None, None] < valid_sizes[:, 1, None, None]
    )
    pixels = (images.float() - mean) / std * inside[..., None]  # zero outside, as the original pads after normalising
    encoder = model.vision_encoder
    hidden = encoder.patch_embed.projection(pixels.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    hidden = hidden + _window(_positions(model), corner, hidden.shape[1])
    for layer in encoder.layers:
        hidden = layer(hidden)
    return torch.as_tensor(encoder.neck(hidden))


def decode(
    model: SamModel,
    embeddings: Tensor,
    coords: Tensor,
    labels: Tensor,
    mask_input: tuple[Tensor, Tensor] | None = None,
    corner: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """Decode N prompts, one embedding each: [N, C, g, g], x and y float [N, T, 2] in pixels, labels int64 [N, T].

    `mask_input` holds previous logits [N, 1, 4g, 4g] and, bool [N], which prompts have any. Returns logits
    [N, 4, 4g, 4g] and predicted IoU [N, 4]; mask 0 is the single-mask output, 1 to 3 the candidates.
    """
    side = embeddings.shape[-1]
    offset = coords.new_tensor((corner[1], corner[0])) * PATCH_SIZE
    sparse = embedded_prompts(model, coords + offset, labels)
    no_mask = model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    dense = no_mask.expand(len(embeddings), -1, side, side)
    if mask_input is not None:
        dense = torch.where(mask_input[1][:, None, None, None], model.prompt_encoder.mask_embed(mask_input[0]), dense)
    wide: Tensor = model.get_image_wide_positional_embeddings()  # type: ignore[no-untyped-call]
    positions = _window(wide.permute(0, 2, 3, 1), corner, side).permute(0, 3, 1, 2).expand(len(embeddings), -1, -1, -1)
    decoder = model.mask_decoder
    output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output.expand(len(embeddings), -1, -1), sparse], dim=1)[:, None]
    tokens, image = decoder.transformer(
        point_embeddings=tokens,
        image_embeddings=embeddings + dense,
        image_positional_embeddings=positions,
        attention_similarity=None,
    )
    masks = _masks_from_tokens(model, tokens[:, 0, 1:5], image[:, 0], side)
    return masks, decoder.iou_prediction_head(tokens[:, 0, 0])


def embedded_prompts(model: SamModel, coords: Tensor, labels: Tensor) -> Tensor:
    """Embed points and box corners: float [N, T, 2] in pixels, int64 [N, T] of -1..3, to [N, T, C]."""
    prompt = model.prompt_encoder
    rows = [prompt.not_a_point_embed, *prompt.point_embed]
    table = torch.cat([torch.as_tensor(row.weight) for row in rows])
    where = prompt.shared_embedding((coords + 0.5)[:, None], (INPUT_SIZE, INPUT_SIZE))[:, 0]
    return torch.where(labels[..., None] < 0, 0.0, where) + table[labels + 1]


def _masks_from_tokens(model: SamModel, mask_tokens: Tensor, image: Tensor, side: int) -> Tensor:
    """Upscale [N, g*g, C] four times and multiply with the hypernetworks' outputs: [N, 4, 4g, 4g].

    A transposed convolution of stride and kernel 2 is a matrix product per cell; keeping the channels last and the
    four sub-cells as extra axes until the end saves every large transposition.
    """
    decoder = model.mask_decoder
    count = len(image)
    norm = decoder.upscale_layer_norm
    first = _split_cells(image, decoder.upscale_conv1)  # [N, g*g, 4, C/4]
    first = decoder.activation(nn.functional.layer_norm(first, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
    second = decoder.activation(_split_cells(first, decoder.upscale_conv2))  # [N, g*g, 4, 4, C/8]
    kernels = torch.stack([mlp(mask_tokens[:, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1)
    masks: Tensor = kernels @ second.flatten(1, 3).transpose(1, 2)
    kinds = masks.shape[1]
    cells: Tensor = masks.float().reshape(count, kinds, side, side, 2, 2, 2, 2)
    return cells.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(count, kinds, side * 4, side * 4)


def _split_cells(features: Tensor, convolution: nn.ConvTranspose2d) -> Tensor:
    """Apply a transposed convolution (kernel = stride = 2) to [..., C]: [..., 4, C'], sub-cells in row-major order."""
    weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)  # [C, 4 C']
    outputs = convolution.out_channels
    return (features @ weight).reshape(*features.shape[:-1], 4, outputs) + torch.as_tensor(convolution.bias)


def _positions(model: SamModel) -> Tensor:
    """Return the absolute positions [1, G, G, hidden], which this configuration always has."""
    positions = model.vision_encoder.pos_embed
    if positions is None:
        raise TypeError("sam-tiny has absolute positions")
    return positions


def _window(table: Tensor, corner: tuple[int, int], side: int) -> Tensor:
    """Cut [1, side, side, C] out of a table [1, G, G, C]."""
    return table[:, corner[0] : corner[0] + side, corner[1] : corner[1] + side]


def _bare_model() -> SamModel:
    config = sam_tiny_config()
    config._attn_implementation = "eager"  # noqa: SLF001  (SDPA with a bias is slower on the CPU, and not exportable)
    model = SamModel(config)
    for module in model.vision_encoder.modules():
        if hasattr(module, "get_rel_pos"):
            module.get_rel_pos = _relative_positions  # type: ignore[assignment]  # torch types modules as tensors
    return model


def _relative_positions(q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
    """Take the rows of `rel_pos` [2 G - 1, c] for every pair on a line of k_size <= G patches: [q, k, c].

    transformers would stretch the table instead; cutting its middle keeps the distances' meaning in smaller images.
    For G patches the two are the same.
    """
    centre = rel_pos.shape[0] // 2
    distance = torch.arange(q_size)[:, None] - torch.arange(k_size)[None]
    return rel_pos[distance + centre]


def _sinusoids(side: int, channels: int) -> Tensor:
    """Fixed 2-D positions [1, side, side, channels]: half for rows, half for columns, wavelengths 2 to 200 patches."""
    quarter = channels // 4
    wavelengths = torch.exp(torch.linspace(math.log(2.0), math.log(200.0), quarter))
    phase = torch.arange(side)[:, None] * 2 * math.pi / wavelengths
    line = torch.cat([phase.sin(), phase.cos()], dim=1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1)[None] * 0.5


def tied_weights() -> tuple[str, str]:
    """Return the two state-dict names that hold the one positional encoding of image and prompts."""
    return _TIED
