"""The original's `SamAutomaticMaskGenerator`, with what it takes from torchvision written anew.

See `tests.export.original.stand_in_for_torchvision` for why.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from export.architecture import SAM_TINY
from export.checkpoint import default_source, load_checkpoint
from export.spec import MODELS
from tests.export.original import load_weights, original_sam


def original_tiny() -> Any:
    """Return the original's `Sam` with the bundled model's weights."""
    model = MODELS["sam-tiny"]
    sam = original_sam(SAM_TINY)
    load_weights(sam, load_checkpoint(model, default_source(model), lambda _: None).weights)
    return sam


def original_generator(sam: Any, **parameters: Any) -> Any:
    """Return the original's generator around `sam`, which answers with COCO's compressed run lengths."""
    from segment_anything import automatic_mask_generator as original  # noqa: PLC0415 - `original_sam` was before
    from segment_anything.utils import transforms  # noqa: PLC0415

    original.batched_nms = batched_nms
    original.box_area = box_area
    transforms.resize = resize
    transforms.to_pil_image = Image.fromarray
    return original.SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **parameters)


def batched_nms(boxes: Tensor, scores: Tensor, categories: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices that stay, best first: https://docs.pytorch.org/vision/stable/generated/torchvision.ops.nms.html."""
    assert not categories.any()  # the original has but one
    left = list(torch.sort(scores, stable=True, descending=True).indices)
    kept = []
    while left:
        best = left.pop(0)
        kept.append(int(best))
        left = [each for each in left if not box_iou(boxes[best], boxes[each]) > iou_threshold]
    return torch.tensor(kept, dtype=torch.int64)


def box_iou(first: Tensor, second: Tensor) -> float:
    """Return the IoU of two boxes x0, y0, x1, y1; not a number if both are empty."""
    begin, end = torch.maximum(first[:2], second[:2]), torch.minimum(first[2:], second[2:])
    shared = (end - begin).clamp(min=0).prod()
    return float(shared / (box_area(first[None]) + box_area(second[None]) - shared))


def box_area(boxes: Tensor) -> Tensor:
    """Return the areas of boxes [n, 4]."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (height, width) as torchvision does with Pillow's images."""
    return picture.resize(size[::-1], Image.Resampling.BILINEAR)


def generate(generator: Any, image: NDArray[np.uint8]) -> list[dict[str, Any]]:
    """Return the original's records of an image, RGB [height, width, 3]."""
    records: list[dict[str, Any]] = generator.generate(image)
    return records
