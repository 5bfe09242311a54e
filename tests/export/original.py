"""The original segment-anything 1.0 package as the reference, on weights of our choosing."""

import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.architecture import CHANNELS_EPS, ENCODER_EPS, Architecture
from export.meta_keys import sam_keys_from_meta
from export.weights import Weights
from service.tensors import (
    LABEL_BOX_BOTTOM_RIGHT,
    LABEL_BOX_TOP_LEFT,
    LABEL_NOT_A_POINT,
    PATCH_SIZE,
)

assert ENCODER_EPS == CHANNELS_EPS == 1e-6


def stand_in_for_torchvision() -> None:
    """Let `import segment_anything` pass: torchvision's wheels do not register their operators with a CPU torch.

    The package imports four functions for resizing and box suppression, none of which the model itself uses.
    """
    names = {
        "torchvision": (),
        "torchvision.ops": (),
        "torchvision.ops.boxes": ("batched_nms", "box_area"),
        "torchvision.transforms": (),
        "torchvision.transforms.functional": ("resize", "to_pil_image"),
    }
    for name, functions in names.items():
        module = sys.modules.setdefault(name, ModuleType(name))
        for function in functions:
            setattr(module, function, None)


def original_module(name: str) -> Any:
    """Import a module of the original package, e.g. "utils.amg"."""
    stand_in_for_torchvision()
    try:
        return import_module(f"segment_anything.{name}")
    finally:
        for stand_in in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[stand_in]  # others look for a real one


def original_amg() -> Any:
    """Return the module of the functions that the original's automatic mask generator is made of."""
    return original_module("utils.amg")


def original_sam(shape: Architecture, seed: int = 0) -> Any:
    """Build the original's `Sam` of any architecture, weights as PyTorch initialises them, positions not zero."""
    modeling = original_module("modeling")
    torch.manual_seed(seed)
    grid = (shape.grid, shape.grid)
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            depth=shape.depth,
            embed_dim=shape.width,
            img_size=shape.input_size,
            norm_layer=partial(nn.LayerNorm, eps=ENCODER_EPS),
            num_heads=shape.heads,
            patch_size=PATCH_SIZE,
            use_rel_pos=True,
            global_attn_indexes=shape.global_blocks,
            window_size=shape.window,
            out_chans=shape.channels,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=shape.channels,
            image_embedding_size=grid,
            input_image_size=(shape.input_size, shape.input_size),
            mask_in_chans=16,
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=shape.channels,
            transformer=modeling.TwoWayTransformer(
                depth=2, embedding_dim=shape.channels, mlp_dim=shape.decoder_mlp, num_heads=shape.decoder_heads
            ),
            iou_head_hidden_dim=shape.iou_hidden,
        ),
    )
    with torch.no_grad():
        for name, parameter in sam.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.normal_(std=0.2)
    return sam.eval()


def load_weights(sam: Any, weights: Weights) -> None:
    """Fill the original with a checkpoint kept under transformers' names."""
    state = sam.state_dict()
    names = {name: next(iter(sam_keys_from_meta({name: tensor}))) for name, tensor in state.items()}
    sam.load_state_dict({name: weights[key] for name, key in names.items()}, strict=True)


@dataclass(frozen=True, slots=True)
class Prompts:
    """P prompts of one image: FP32 points [P, n, 2] with INT32 labels [P, n], FP32 boxes [P, 4], masks [P, 4G, 4G]."""

    points: NDArray[np.float32]
    labels: NDArray[np.int32]
    boxes: NDArray[np.float32] | None = None
    masks: NDArray[np.float16] | None = None

    def tokens(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Return coords [1, P, N, 2] and labels [1, P, N] by the contract: points, then corners or one non-point."""
        count = len(self.points)
        if self.boxes is None:
            coords = np.concatenate([self.points, np.zeros((count, 1, 2), np.float32)], 1)
            extra = np.full((count, 1), LABEL_NOT_A_POINT, np.int32)
        else:
            coords = np.concatenate([self.points, self.boxes.reshape(count, 2, 2)], 1)
            extra = np.tile(np.array([[LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT]], np.int32), (count, 1))
        return coords[None], np.concatenate([self.labels, extra], 1)[None]


def random_prompts(
    shape: Architecture, count: int, clicks: int, seed: int, *, has_box: bool, has_mask: bool
) -> Prompts:
    """Draw prompts anywhere in the input."""
    side, mask_side = shape.input_size, 4 * shape.grid
    random = np.random.default_rng(seed)
    corners = np.sort(random.uniform(0, side, (count, 2, 2)), axis=1).reshape(count, 4)
    coarse = random.normal(0, 6, (count, mask_side // 16, mask_side // 16))
    return Prompts(
        random.uniform(0, side, (count, clicks, 2)).astype(np.float32),
        random.integers(0, 2, (count, clicks)).astype(np.int32),
        corners.astype(np.float32) if has_box else None,
        coarse.repeat(16, 1).repeat(16, 2).astype(np.float16) if has_mask else None,
    )


def original_embedding(sam: Any, image: NDArray[np.uint8], valid_size: NDArray[np.int32]) -> NDArray[np.float32]:
    """Encode images [B, S, S, 3] one by one, each cut to its valid size, as the original's predictor does."""
    embeddings = []
    for picture, (height, width) in zip(image, valid_size, strict=True):
        pixels = torch.from_numpy(picture[:height, :width].copy()).permute(2, 0, 1).float()
        with torch.inference_mode():
            embeddings.append(sam.image_encoder(sam.preprocess(pixels)[None]))
    found: NDArray[np.float32] = torch.cat(embeddings).numpy()
    return found


def original_masks(
    sam: Any, embedding: NDArray[np.floating[Any]], prompts: Prompts
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Decode the prompts of one embedding [C, G, G] -> all four masks [P, 4, 4G, 4G] and predicted IoUs [P, 4]."""
    with torch.inference_mode():
        sparse, dense = sam.prompt_encoder(
            points=(torch.from_numpy(prompts.points), torch.from_numpy(prompts.labels))
            if prompts.points.size
            else None,
            boxes=_tensor(prompts.boxes),
            masks=None if prompts.masks is None else torch.from_numpy(prompts.masks).float()[:, None],
        )
        masks, scores = sam.mask_decoder.predict_masks(
            image_embeddings=torch.from_numpy(embedding.astype(np.float32))[None],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
    return masks.numpy(), scores.numpy()


def _tensor(array: NDArray[np.float32] | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)
