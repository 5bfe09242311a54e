"""The README's gallery: ten prompts on photographs that sam-tiny never saw, answered by the running service.

`python -m benchmarks.gallery` writes docs/images/gallery.jpg and prints what the model thinks of each mask. The prompts
were chosen by looking at the photographs, before any mask was seen, and stay as they are.
"""

import argparse
import io
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import httpx
import numpy as np
import skimage
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from tests.running import ROOT, RunningService

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
OUTPUT = ROOT / "docs" / "images" / "gallery.jpg"
TILE, COLUMNS = (300, 300), 5
TINT, EDGE, MARK = (30, 144, 255), (255, 255, 255), (255, 214, 10)


class Case(NamedTuple):
    """A thing that is asked for, by one click (x, y) or one box (x0, y0, x1, y1) in pixels."""

    photograph: str
    thing: str
    prompt: tuple[int, ...]

    def body(self) -> dict[str, Any]:
        """Return the request's prompt."""
        return {"points": [[*self.prompt, 1]]} if len(self.prompt) == 2 else {"box": self.prompt}


CASES = (
    Case("astronaut.png", "face, click", (225, 130)),
    Case("astronaut.png", "patch, box", (130, 345, 212, 428)),
    Case("astronaut.png", "helmet, box", (278, 342, 511, 511)),
    Case("coffee.png", "coffee, click", (285, 144)),
    Case("coffee.png", "saucer, box", (76, 12, 482, 390)),
    Case("coffee.png", "spoon, click", (364, 282)),
    Case("chelsea.png", "eye, box", (133, 80, 212, 150)),
    Case("chelsea.png", "nose, click", (268, 238)),
    Case("rocket.jpg", "rocket, box", (304, 120, 340, 414)),
    Case("coins.png", "coin, click", (334, 45)),
)


def main() -> None:
    """Ask, draw, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "-o", "--output", type=Path, default=OUTPUT, help="where the picture goes (default: the README's)"
    )
    output = parser.parse_args().output
    rows = -(-len(CASES) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE[0], rows * TILE[1]), "white")
    with RunningService.start() as service, httpx.Client(base_url=service.url, timeout=60) as client:
        for index, case in enumerate(CASES):
            answer = answer_to(client, case)
            print(f"{case.photograph:14} {case.thing:14} predicted IoU {answer['score']:.2f}  {answer['area']} px")
            tile = drawn(case, coco.decode(answer["rle"]).astype(bool), answer["score"])
            sheet.paste(tile, (index % COLUMNS * TILE[0], index // COLUMNS * TILE[1]))
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output, quality=85)


def answer_to(client: httpx.Client, case: Case) -> dict[str, Any]:
    """Return the service's mask for a prompt; the photograph is sent as PNG, whatever its file is."""
    photograph = io.BytesIO()
    Image.open(PHOTOGRAPHS / case.photograph).convert("RGB").save(photograph, "PNG")
    client.put(f"/v1/images/{case.photograph}", content=photograph.getvalue()).raise_for_status()
    response = client.post(f"/v1/images/{case.photograph}/masks", json={"prompts": [case.body()]}).raise_for_status()
    mask: dict[str, Any] = response.json()["results"][0]["masks"][0]
    return mask


def drawn(case: Case, mask: np.ndarray, score: float) -> Image.Image:
    """Return a tile: the photograph, the mask in blue with a white edge, the prompt in yellow, and what it is."""
    pixels = np.asarray(Image.open(PHOTOGRAPHS / case.photograph).convert("RGB")).copy()
    pixels[mask] = (0.45 * pixels[mask] + 0.55 * np.array(TINT)).astype(np.uint8)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(pixels, outlines, -1, EDGE, 2)
    if len(case.prompt) == 2:
        cv2.circle(pixels, case.prompt, 7, (0, 0, 0), -1)
        cv2.circle(pixels, case.prompt, 5, MARK, -1)
    else:
        cv2.rectangle(pixels, case.prompt[:2], case.prompt[2:], MARK, 3)
    photograph = Image.fromarray(pixels)
    photograph.thumbnail((TILE[0] - 6, TILE[1] - 24))
    tile = Image.new("RGB", TILE, "white")
    tile.paste(photograph, (3, 20))
    ImageDraw.Draw(tile).text((4, 4), f"{case.thing}   (predicted IoU {score:.2f})", fill="black")
    return tile


if __name__ == "__main__":
    main()
