"""What a GPU could at most encode: `python -m benchmarks.capacity` prints the table of k8s/README.md.

Arithmetic only, no measurement: the multiplications of an encoder over the dense FP16 rate in the GPU's data sheet. An
engine reaches a part of that. Ours multiplies more than the original, to move far less (export/wrappers/encoder.py).
"""

import argparse
import math

from benchmarks.gpu_rates import DENSE_TFLOPS
from export.architecture import SAM_VIT_B, SAM_VIT_H, SAM_VIT_L, Architecture
from service.tensors import PATCH_SIZE

GPUS = {"L4": "L4", "A100": "A100", "H100": "H100 and H200 (SXM)"}  # as they are called in the table
MODELS = {"ViT-B": SAM_VIT_B, "ViT-L": SAM_VIT_L, "ViT-H": SAM_VIT_H}
MLP_RATIO = 4
ALIGNMENT = 8


def encoder_macs(model: Architecture, *, folded: bool) -> int:
    """Return the multiply-adds of one image: of the original, or with relative positions folded into the heads."""
    tokens = model.grid**2
    patches = tokens * 3 * PATCH_SIZE**2 * model.width
    neck = tokens * model.width * model.channels + tokens * 9 * model.channels**2
    mlp = model.depth * 2 * tokens * MLP_RATIO * model.width**2
    whole = len(model.global_blocks) * _attention(model, 1, model.grid, folded=folded)
    count = math.ceil(model.grid / model.window) ** 2
    windows = (model.depth - len(model.global_blocks)) * _attention(model, count, model.window, folded=folded)
    return patches + neck + mlp + whole + windows


def _attention(model: Architecture, count: int, side: int, *, folded: bool) -> int:
    """Return those of one block that attends within `count` squares of `side` patches; the last ones are padded."""
    tokens = side**2
    projections = tokens * 4 * model.width**2
    positions = 2 * tokens * side * model.width
    columns = model.width + (model.heads * 2 * math.ceil(side / ALIGNMENT) * ALIGNMENT if folded else 0)
    return count * (projections + positions + 2 * tokens**2 * columns)


def main() -> None:
    """Print images a second, of our graph and in brackets of the original."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.capacity", description=(__doc__ or "").partition("\n")[0]
    ).parse_args()
    print(f"| GPU (dense FP16) | {' | '.join(MODELS)} |\n|---{'|---' * len(MODELS)}|")
    for gpu, name in GPUS.items():
        _, tflops = DENSE_TFLOPS[gpu]
        ours, original = (
            [tflops * 1e12 / 2 / encoder_macs(model, folded=folded) for model in MODELS.values()]
            for folded in (True, False)
        )
        cells = [f"{mine:.0f} ({theirs:.0f})" for mine, theirs in zip(ours, original, strict=True)]
        print(f"| {name}, {tflops:.0f} TFLOP/s | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
