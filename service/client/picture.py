"""Images on the client's side: what may be given as one, and what the service says of it."""

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.errors import UnsupportedImageError
from service.rpc.pb import segment_anything_pb2 as pb

# A file's path; the bytes of a JPEG, PNG or WebP; or pixels, UINT8 [height, width, 3] (RGB) or [height, width] (grey).
ImageSource = str | os.PathLike[str] | bytes | NDArray[np.uint8]

CACHE_LEVELS = {
    pb.CACHE_LEVEL_UNSPECIFIED: "",
    pb.CACHE_LEVEL_MEMORY: "memory",
    pb.CACHE_LEVEL_MISS: "miss",
    pb.CACHE_LEVEL_REDIS: "redis",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that the service has encoded.

    `digest` is that of the bytes, "sha256:<hex>"; `size` (height, width) in pixels; `model` name@digest; `cache` where
    the embedding came from when it was uploaded: "miss" (the encoder ran), "memory" or "redis". `data`, the bytes
    themselves, is kept to send them again should the service have dropped the image.
    """

    image_id: str
    digest: str
    size: tuple[int, int]
    model: str
    cache: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model being served: `embedding_shape` is (channels, rows, columns), `mask_size` low-res logits' side."""

    name: str
    digest: str
    input_size: int
    embedding_shape: tuple[int, ...]
    max_prompts: int
    max_points: int
    mask_size: int


def data_from_source(source: ImageSource) -> bytes:
    """Return the bytes to upload: a file's or the given ones as they are, pixels as a PNG.

    Raises:
        OSError: the file cannot be read.
        UnsupportedImageError: the array is not UINT8 of one of the two shapes.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, np.ndarray):
        return _png_from_pixels(source)
    return Path(source).read_bytes()


def _png_from_pixels(pixels: NDArray[Any]) -> bytes:
    is_grey, is_rgb = pixels.ndim == 2, pixels.ndim == 3 and pixels.shape[2] == 3  # noqa: PLR2004 - axes and channels
    if pixels.dtype != np.uint8 or not (is_grey or is_rgb) or not pixels.size:
        error = UnsupportedImageError(
            f"an array must be uint8 [height, width, 3] or [height, width], not {pixels.dtype} {list(pixels.shape)}",
            field="image",
        )
        error.reason = "unsupported_image"
        raise error
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def picture_from_pb(message: pb.EmbedImageResponse, data: bytes) -> Picture:
    """Return the image that was uploaded as `data`."""
    image = message.image
    size = (image.size.height, image.size.width)
    return Picture(image.image_id, image.digest, size, image.model, CACHE_LEVELS[message.cache], data)


def facts_from_pb(message: pb.GetModelResponse) -> ModelFacts:
    """Return the facts of the model being served."""
    return ModelFacts(
        name=message.name,
        digest=message.digest,
        input_size=message.input_size,
        embedding_shape=tuple(message.embedding_shape),
        max_prompts=message.max_prompts,
        max_points=message.max_points,
        mask_size=message.mask_size,
    )
