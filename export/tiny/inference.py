"""Masks of an image of any size from sam-tiny's weights, as the service makes them, in plain PyTorch."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import SamModel

from export.tiny.config import INPUT_SIZE
from export.tiny.network import decode, encode


@dataclass(frozen=True)
class EmbeddedImage:
    """An encoded image: its embedding [1, C, G, G] and how it was fitted into the square input."""

    embedding: Tensor
    scale: float
    valid_size: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Answer:
    """Four masks per prompt, bool [N, 4, h, w], their predicted IoU [N, 4] and low-resolution logits [N, 4, 4G, 4G]."""

    masks: NDArray[np.bool_]
    scores: NDArray[np.float32]
    logits: Tensor


def embed(model: SamModel, image: NDArray[np.uint8]) -> EmbeddedImage:
    """Encode an RGB image uint8 [h, w, 3]: longest side to the input size, top left, padding after normalising."""
    height, width = image.shape[:2]
    scale = INPUT_SIZE / max(height, width)
    valid = max(1, round(height * scale)), max(1, round(width * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    square = np.zeros((INPUT_SIZE, INPUT_SIZE, 3), np.uint8)
    square[: valid[0], : valid[1]] = cv2.resize(image, valid[::-1], interpolation=method)
    with torch.inference_mode():
        embedding = encode(model, torch.from_numpy(square)[None], torch.tensor([valid]))
    return EmbeddedImage(embedding, scale, valid, (height, width))


def segment(
    model: SamModel,
    image: EmbeddedImage,
    coords: NDArray[np.float32],
    labels: NDArray[np.int64],
    previous: Tensor | None = None,
) -> Answer:
    """Answer N prompts: x, y float32 [N, T, 2] in pixels of the image, labels int64 [N, T], logits [N, 4G, 4G].

    A prompt without a box needs the token -1 (not a point) that the original adds.
    """
    count = len(coords)
    given = None if previous is None else (previous[:, None], torch.ones(count, dtype=torch.bool))
    with torch.inference_mode():
        points = torch.from_numpy(coords * np.float32(image.scale))
        embeddings = image.embedding.expand(count, -1, -1, -1)
        logits, scores = decode(model, embeddings, points, torch.from_numpy(labels), given)
        masks = [masks_from_logits(one, image.valid_size, image.size) for one in logits]
    return Answer(np.stack(masks), scores.numpy(), logits)


def masks_from_logits(logits: Tensor, valid_size: tuple[int, int], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Upscale logits [k, 4G, 4G] to the input, cut off the padding, resize to the image: bool [k, h, w]."""
    full = torch.nn.functional.interpolate(logits[None], (INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)
    cut = full[..., : valid_size[0], : valid_size[1]]
    if valid_size != size:
        cut = torch.nn.functional.interpolate(cut, size, mode="bilinear", align_corners=False)
    return np.asarray((cut[0] > 0).numpy(), bool)
