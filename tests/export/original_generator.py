"""The original's `SamAutomaticMaskGenerator`, with what it takes from torchvision written anew.

See `tests.export.original.stand_in_for_torchvision` for why.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from export.architecture import SAM_TINY
from export.checkpoint import default_source, load_checkpoint
from export.spec import MODELS
from tests.export.original import load_weights, original_module, original_sam


def original_tiny() -> Any:
    """Return the original's `Sam` with the bundled model's weights."""
    model = MODELS["sam-tiny"]
    sam = original_sam(SAM_TINY)
    load_weights(sam, load_checkpoint(model, default_source(model), lambda _: None).weights)
    return sam


def original_generator(sam: Any, **parameters: Any) -> Any:
    """Return the original's generator around `sam`, which answers with COCO's compressed run lengths."""
    original, transforms = original_module("automatic_mask_generator"), original_module("utils.transforms")
    original.batched_nms = batched_nms
    original.box_area = box_area
    transforms.resize = resize
    transforms.to_pil_image = Image.fromarray
    return original.SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **parameters)


def batched_nms(boxes: Tensor, scores: Tensor, categories: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices that stay, best first: https://docs.pytorch.org/vision/stable/generated/torchvision.ops.nms.html."""
    assert not categories.any()  # the original has but one
    left = torch.sort(scores, stable=True, descending=True).indices
    kept = []
    while len(left):
        best, left = int(left[0]), left[1:]
        kept.append(best)
        overlaps = box_iou(boxes[best], boxes[left]).double()  # torchvision's CPU kernel compares FP32 with FP64
        left = left[~(overlaps > iou_threshold)]
    return torch.tensor(kept, dtype=torch.int64)


def box_iou(box: Tensor, others: Tensor) -> Tensor:
    """Return the IoU of a box x0, y0, x1, y1 with others [n, 4]; not a number where both are empty."""
    begin, end = torch.maximum(box[:2], others[:, :2]), torch.minimum(box[2:], others[:, 2:])
    shared = (end - begin).clamp(min=0).prod(dim=1)
    return shared / (box_area(box[None]) + box_area(others) - shared)


def box_area(boxes: Tensor) -> Tensor:
    """Return the areas of boxes [n, 4]."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (height, width) as torchvision does with Pillow's images."""
    return picture.resize(size[::-1], Image.Resampling.BILINEAR)
