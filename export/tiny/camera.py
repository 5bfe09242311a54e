"""What a camera does to a scene: uneven light, colour cast, blur, noise, compression, grey film."""

import cv2
import numpy as np
from numpy.typing import NDArray

from export.tiny.textures import Pixels


def photographed(rng: np.random.Generator, scene: Pixels) -> NDArray[np.uint8]:
    """Turn a rendered scene (float32 [h, w, 3], 0..255) into a photograph, uint8 [h, w, 3]."""
    scene = scene * _illumination(rng, scene.shape[0], scene.shape[1])
    if rng.random() < 0.5:  # noqa: PLR2004
        scene = scene * rng.uniform(0.8, 1.15, 3).astype(np.float32)
    if rng.random() < 0.3:  # noqa: PLR2004
        scene = np.repeat(scene.mean(axis=2, keepdims=True), 3, axis=2)
    scene = np.asarray(cv2.GaussianBlur(scene, (0, 0), rng.choice([0.35, 0.6, 0.9, 1.4], p=[0.3, 0.35, 0.25, 0.1])))
    if rng.random() < 0.7:  # noqa: PLR2004
        depth = 1 if rng.random() < 0.5 else 3  # noqa: PLR2004
        noise = rng.standard_normal((*scene.shape[:2], depth), dtype=np.float32)
        scene = scene + noise * np.float32(rng.uniform(1, 12))
    image = np.clip(scene, 0, 255).astype(np.uint8)
    if rng.random() < 0.4:  # noqa: PLR2004
        image = _compressed(image, int(rng.integers(35, 92)))
    return image


def _illumination(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Return a smooth gain around one, float32 [h, w, 1]: a slope and a soft spot."""
    coarse = 1 + rng.uniform(0, 0.35) * rng.uniform(-1, 1, (3, 3))
    gain = cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(gain, np.float32)[..., None]


def _compressed(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)
