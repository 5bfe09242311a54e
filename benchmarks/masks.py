"""From low-res logits to an answer's mask: the original's path beside ours, at 2 and 12 million pixels.

Run: python -m benchmarks.masks [--rounds 31]

The original's path: two full bilinear upscales (by OpenCV), threshold, a copy in column order, run lengths by
pycocotools. Ours: `service.mask`, which solves for the mask's edges. Logits are of ViT-B/L/H's size, 256 x 256. CPU
time of one thread; rounds interleaved; the ratio is the median of the rounds' ratios: other work on the machine
disturbs both alike.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from service.mask import Mask, MaskFormat, MaskOutput, mask_from_logits
from service.upscaling import Frame

MASK_SIDE, INPUT_SIDE = 256, 1024
SIZES = {"2 MP": (1224, 1632), "12 MP": (3000, 4000)}
RADII = {"small": 14.0, "half the image": 88.0}  # low-res pixels
ORDER = random.Random(0)  # noqa: S311 - no secret
OUTPUTS = {
    "rle": MaskOutput(),
    "png": MaskOutput(MaskFormat.PNG),
    "polygon": MaskOutput(MaskFormat.POLYGON),
    "none": MaskOutput(MaskFormat.NONE),
    "rle, cleaned": MaskOutput(min_region_area_px=100),
}


def wavy_disc(radius: float) -> NDArray[np.float16]:
    """Return logits of a thing with an outline that is not straight anywhere."""
    rows, columns = np.mgrid[:MASK_SIDE, :MASK_SIDE]
    angle = np.arctan2(rows - 96, columns - 128)
    distance = np.hypot(rows - 96, columns - 128) + radius / 12 * np.sin(9 * angle)
    logits: NDArray[np.float16] = (radius - distance).clip(-20, 20).astype(np.float16)
    return logits


def original_counts(logits: NDArray[np.float16], frame: Frame) -> bytes:
    """Return run lengths as the original and pycocotools make them."""
    full = cv2.resize(logits.astype(np.float32), (INPUT_SIDE, INPUT_SIDE), interpolation=cv2.INTER_LINEAR)
    valid = full[: frame.valid_size[0], : frame.valid_size[1]]
    binary = cv2.resize(valid, frame.size[::-1], interpolation=cv2.INTER_LINEAR) > 0
    counts: bytes = coco.encode(np.asfortranarray(binary.view(np.uint8)))["counts"]
    return counts


def elapsed_ms(call: Callable[[], object]) -> float:
    """Return the CPU time that a call takes."""
    start_s = time.thread_time()
    call()
    return 1e3 * (time.thread_time() - start_s)


def differing_pixels(counts: bytes, mask: Mask) -> int:
    """Return how many pixels of two masks of one size differ."""
    first, second = (coco.decode({"size": list(mask.size), "counts": each}) for each in (counts, mask.data))
    return int(np.count_nonzero(first != second))


def measure(name: str, size: tuple[int, int], shape: str, rounds: int) -> None:
    """Print one line for each output."""
    frame, logits = Frame(INPUT_SIDE, (768, 1024), size), wavy_disc(RADII[shape])
    runs: dict[str, Callable[[], object]] = {"original": lambda: original_counts(logits, frame)}
    for kind, output in OUTPUTS.items():
        runs[kind] = lambda output=output: mask_from_logits(logits, 0.9, frame, output)  # type: ignore[misc]
    times = {kind: [] for kind in runs}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for kind in ORDER.sample(list(runs), len(runs)):  # what runs after the original finds the CPU's caches empty
            times[kind].append(elapsed_ms(runs[kind]))
    mask = mask_from_logits(logits, 0.9, frame, OUTPUTS["rle"])
    differing = differing_pixels(original_counts(logits, frame), mask)
    print(f"\n{name}, {shape} ({mask.area / (size[0] * size[1]):.0%} of it); pixels that differ: {differing}")
    print(f"  {'original, rle':<16}{statistics.median(times['original']):>8.1f} ms")
    for kind in OUTPUTS:
        ratio = statistics.median(a / b for a, b in zip(times["original"], times[kind], strict=True))
        print(f"  {'ours, ' + kind:<16}{statistics.median(times[kind]):>8.1f} ms{ratio:>8.1f}x")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    cv2.setNumThreads(1)
    print(f"OpenCV {cv2.__version__}, NumPy {np.__version__}; CPU time of 1 thread, medians of {rounds} random rounds")
    for name, size in SIZES.items():
        for shape in RADII:
            measure(name, size, shape, rounds)


if __name__ == "__main__":
    main()
