"""Surfaces for the synthetic scenes: photographs cut into swatches, noise, stripes, gradients and plain colour."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import skimage.data
import skimage.io
from numpy.typing import NDArray

Pixels = NDArray[np.float32]  # [h, w, 3] RGB, 0..255

# All of them lie inside scikit-image's wheel, with their licences in its data/README.txt. The photographs that
# evaluation uses (coins, astronaut, camera, chelsea, coffee, motorcycle, rocket) are in neither list.
TRAINING_IMAGES = (
    "brick.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "retina.jpg",
    "color.png",
    "text.png",
    "clock_motion.png",
    "microaneurysms.png",
)
HELD_OUT_IMAGES = ("cell.png", "moon.png", "page.png")
MAX_SIDE = 640
NOISE_SIDE = 512


@dataclass(frozen=True)
class TextureBank:
    """Source images (uint8 [h, w, 3]) and fractal noise maps (float32 [512, 512], 0..1)."""

    images: tuple[NDArray[np.uint8], ...]
    noises: tuple[NDArray[np.float32], ...]


def bundled_image(name: str) -> NDArray[np.uint8]:
    """Read one of scikit-image's bundled images as RGB, uint8 [h, w, 3]."""
    image = skimage.io.imread(Path(skimage.data.__file__).parent / name)
    if image.ndim == 2:  # noqa: PLR2004  (grey)
        image = np.repeat(image[..., None], 3, axis=2)
    return np.ascontiguousarray(image[..., :3])


def load_bank(names: tuple[str, ...], seed: int = 0) -> TextureBank:
    """Read the images (no side over 640 px) and make eight noise maps, from smooth clouds to sand."""
    images = []
    for name in names:
        image = bundled_image(name)
        scale = min(1.0, MAX_SIDE / max(image.shape[:2]))
        images.append(_uint8(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)))
    rng = np.random.default_rng(seed)
    return TextureBank(tuple(images), tuple(_fractal_noise(rng, slope) for slope in np.linspace(0.6, 2.4, 8)))


def surface(rng: np.random.Generator, shape: tuple[int, int], bank: TextureBank, tone: Pixels, spread: float) -> Pixels:
    """Return a random surface, float32 [h, w, 3] of 0..255.

    `tone` (float32 [3]) is the colour of the scene; colours are drawn around it with standard deviation
    `spread` levels, so a small spread makes objects that hardly differ from what is behind them.
    """
    first, second = (colour_near(rng, tone, spread) for _ in range(2))
    kind = rng.choice(5, p=[0.22, 0.2, 0.28, 0.18, 0.12])
    if kind == 0:
        return np.broadcast_to(first, (*shape, 3)).astype(np.float32)
    if kind == 2:  # noqa: PLR2004
        return _photograph(rng, shape, bank, first, spread)
    if kind == 1:
        blend = _ramp(rng, shape)
    elif kind == 3:  # noqa: PLR2004
        blend = _noise(rng, shape, bank)
    else:
        blend = _pattern(rng, shape)
    if rng.random() < 0.5:  # noqa: PLR2004
        second = first + (second - first) * 0.4
    return first + blend[..., None] * (second - first)


def colour_near(rng: np.random.Generator, tone: Pixels, spread: float) -> Pixels:
    """Draw a colour, float32 [3]: brightness and hue vary around `tone` by `spread` levels."""
    colour = tone + rng.normal(0, spread) + rng.normal(0, spread * 0.5, 3)
    return np.clip(colour, 4, 250).astype(np.float32)


def _photograph(
    rng: np.random.Generator, shape: tuple[int, int], bank: TextureBank, colour: Pixels, spread: float
) -> Pixels:
    image = bank.images[rng.integers(len(bank.images))]
    zoom = np.exp(rng.uniform(np.log(0.4), np.log(2.0)))
    height, width = (int(np.clip(side / zoom, 8, limit)) for side, limit in zip(shape, image.shape[:2], strict=True))
    y, x = (int(rng.integers(limit - side + 1)) for side, limit in zip((height, width), image.shape[:2], strict=True))
    crop = image[y : y + height, x : x + width]
    if rng.random() < 0.5:  # noqa: PLR2004
        crop = crop[:, ::-1]
    swatch = cv2.resize(crop, shape[::-1], interpolation=cv2.INTER_LINEAR).astype(np.float32)
    if rng.random() < 0.6:  # noqa: PLR2004  (its own colours would give the source away)
        mean = swatch.mean(axis=(0, 1))
        swatch = colour + (swatch - mean) * np.float32(rng.uniform(0.2, 1.0) * min(1.0, spread / 40))
    return np.clip(swatch, 0, 255)


def _ramp(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    angle = rng.uniform(0, 2 * np.pi)
    y = np.linspace(-0.5, 0.5, shape[0], dtype=np.float32)[:, None] * np.float32(np.sin(angle))
    x = np.linspace(-0.5, 0.5, shape[1], dtype=np.float32)[None] * np.float32(np.cos(angle))
    return np.asarray(np.clip(0.5 + x + y, 0, 1), dtype=np.float32)


def _noise(rng: np.random.Generator, shape: tuple[int, int], bank: TextureBank) -> NDArray[np.float32]:
    field = bank.noises[rng.integers(len(bank.noises))]
    y, x = (int(rng.integers(NOISE_SIDE - side + 1)) for side in shape)
    return field[y : y + shape[0], x : x + shape[1]]


def _pattern(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 28)
    y = np.arange(shape[0], dtype=np.float32)[:, None] * np.float32(2 * np.pi / period)
    x = np.arange(shape[1], dtype=np.float32)[None] * np.float32(2 * np.pi / period)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    wave = np.sin(along) if rng.random() < 0.5 else np.sin(along) * np.sin(across)  # noqa: PLR2004
    if rng.random() < 0.5:  # noqa: PLR2004
        wave = np.tanh(wave * 4)
    return np.asarray(0.5 + 0.5 * wave, dtype=np.float32)


def _fractal_noise(rng: np.random.Generator, slope: float) -> NDArray[np.float32]:
    frequency = np.hypot(np.fft.fftfreq(NOISE_SIDE)[:, None], np.fft.rfftfreq(NOISE_SIDE)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.normal(size=(NOISE_SIDE, NOISE_SIDE))) / frequency**slope
    field = np.fft.irfft2(spectrum)
    low, high = np.percentile(field, (1, 99))
    return np.asarray(np.clip((field - low) / (high - low), 0, 1), np.float32)


def _uint8(image: object) -> NDArray[np.uint8]:
    return np.asarray(image, dtype=np.uint8)
