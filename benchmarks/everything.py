"""Everything-mode through the running service beside the original's generator: `python -m benchmarks.everything`.

Both have the same CPU, the bundled model's weights and the same parameters: the default grid of 32 x 32 points, and
thresholds at which that model, which rates its masks low, finds dozens. The service is asked over HTTP with the image's
bytes, so that the first answer includes the encoder and, with crops, the crops' encodes; "again" finds them cached. The
original's part of torchvision is written anew (`tests/export/original_generator.py`). Rounds alternate between the two;
times are medians, and the ratio is the median of the rounds' ratios, so that other work on the machine disturbs both.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco

from tests.export.original_generator import original_generator, original_tiny
from tests.running import RunningService

SAMPLES = Path(__file__).parent.parent / "service" / "rest" / "static" / "samples"
LOW = {"pred_iou_thresh": 0.45, "stability_score_thresh": 0.8}
SMALL_GRID = 8
DEADLINE_S = 600.0


class Case(NamedTuple):
    """What is looked for, and where."""

    photograph: str
    parameters: dict[str, Any]

    @property
    def name(self) -> str:
        """For people."""
        layers = self.parameters.get("crop_n_layers", 0)
        side = self.parameters["points_per_side"]
        return f"{self.photograph}, {side} x {side} points" + (f", {layers} layer of crops" if layers else "")


class Round(NamedTuple):
    """Seconds, and how many of the original's records the service's match at an IoU of 0.99 or more."""

    original_s: float
    ours_s: float
    again_s: float
    records: int
    matched: int


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.everything", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each; the median is printed")
    parser.add_argument("--quick", action="store_true", help="small grids: shows that it works")
    arguments = parser.parse_args()
    side = SMALL_GRID if arguments.quick else 32
    cases = [Case(name, LOW | {"points_per_side": side}) for name in ("coffee", "coins", "astronaut")]
    cases.append(Case("coffee", LOW | {"points_per_side": side // 2, "crop_n_layers": 1}))
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {arguments.rounds} rounds")
    print(f"{'':42} {'original':>9} {'service':>9} {'':>6} {'again':>9} {'':>6}  records alike")
    sam = original_tiny()
    with RunningService.start(SAM_DEFAULT_DEADLINE_S=str(DEADLINE_S)) as service:
        for case in cases:
            print_case(case, [measure(service, sam, case) for _ in range(arguments.rounds)])


def measure(service: RunningService, sam: Any, case: Case) -> Round:  # noqa: ANN401 - the original is untyped
    """Let both answer, one after the other, the service twice; it forgets the image before."""
    path, generator = SAMPLES / f"{case.photograph}.jpg", original_generator(sam, **case.parameters)
    httpx.delete(f"{service.url}/v1/images/benchmark")
    files, form = {"image": path.read_bytes()}, {"request": json.dumps(case.parameters)}

    def ask() -> list[dict[str, Any]]:
        headers = {"x-image-id": "benchmark"}
        url = f"{service.url}/v1/everything"
        answer = httpx.post(url, files=files, data=form, headers=headers, timeout=DEADLINE_S)
        records: list[dict[str, Any]] = answer.raise_for_status().json()["records"]
        return records

    original_s, theirs = timed(lambda: generator.generate(np.asarray(Image.open(path).convert("RGB"))))
    ours_s, ours = timed(ask)
    again_s, _ = timed(ask)
    ious = coco.iou(*([record["segmentation"] for record in records] for records in (theirs, ours)), [0] * len(ours))
    return Round(original_s, ours_s, again_s, len(theirs), int(np.count_nonzero(np.max(ious, axis=1) >= 0.99)))


def timed(call: Callable[[], list[dict[str, Any]]]) -> tuple[float, list[dict[str, Any]]]:
    """Return how long the call took, and what it returned."""
    start_s = time.monotonic()
    records = call()
    return time.monotonic() - start_s, records


def print_case(case: Case, rounds: list[Round]) -> None:
    """Print one line."""
    original_s, ours_s, again_s = (statistics.median(each) for each in list(zip(*rounds, strict=True))[:3])
    faster, faster_again = (
        statistics.median(each.original_s / seconds for each, seconds in zip(rounds, taken, strict=True))
        for taken in ([each.ours_s for each in rounds], [each.again_s for each in rounds])
    )
    print(
        f"{case.name:42} {original_s:7.1f} s {ours_s:7.1f} s {faster:5.1f}x {again_s:7.1f} s {faster_again:5.1f}x"
        f"  {rounds[-1].matched} of {rounds[-1].records}",
        flush=True,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
