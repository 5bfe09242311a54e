"""The demo page as a person uses it: places are pixels of the photograph, answers are what the server sent."""

import io
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import ConsoleMessage, Page, Request, Response, expect
from pycocotools import mask as coco

from tests.running import ROOT

MAX_IMAGE_HEIGHT = 1000
IMAGES = ROOT / "docs" / "images"
PIXEL = """(canvas, [x, y]) => {
    const copy = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, -Math.floor(x * canvas.width), -Math.floor(y * canvas.height));
    return [...copy.getImageData(0, 0, 1, 1).data];
}"""


class Demo:
    """One page. `allowed` are patterns of console errors that the test is about."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.allowed: list[str] = []
        self.problems: list[str] = []
        self.foreign: list[str] = []
        self.size = (384, 303)
        page.set_default_timeout(20_000)
        page.on("console", self._note_console)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self._note_request(request, url))
        page.goto(url)

    def _note_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(re.search(each, message.text) for each in self.allowed):
            self.problems.append(message.text)

    def _note_request(self, request: Request, url: str) -> None:
        if not request.url.startswith((f"{url}/", "blob:")):
            self.foreign.append(request.url)

    def expect_status(self, text: str) -> None:
        expect(self.page.locator("#status")).to_contain_text(text, timeout=20_000)

    def expect_problem(self, text: str) -> None:
        expect(self.page.locator("#problem")).to_contain_text(text, timeout=20_000)

    def expect_photograph(self, width: int, height: int) -> None:
        """Wait until a photograph of this size is on view and encoded; from then on, places are pixels of it."""
        self.expect_status("Ready")
        assert self.fact("Photograph") == f"{width} \N{MULTIPLICATION SIGN} {height}"
        self.size = (width, height)

    def keep_screenshot(self, name: str) -> None:
        """Write docs/images/`name`.jpg for the README if SAM_SCREENSHOTS=1."""
        if os.environ.get("SAM_SCREENSHOTS") == "1":
            IMAGES.mkdir(parents=True, exist_ok=True)
            with Image.open(io.BytesIO(self.page.screenshot())) as taken:
                taken.thumbnail((taken.width, MAX_IMAGE_HEIGHT))
                taken.convert("RGB").save(IMAGES / f"{name}.jpg", quality=88)  # a PNG takes three times the bytes

    def fact(self, name: str) -> str:
        """Return an entry of the list of what it took."""
        return self.page.locator(f"#facts dt:text-is('{name}') + dd").inner_text()

    def on_screen(self, x: float, y: float) -> tuple[float, float]:
        """Return where a pixel of the photograph is in the window."""
        bounds = self.page.locator("#canvas").bounding_box()
        assert bounds
        return bounds["x"] + x / self.size[0] * bounds["width"], bounds["y"] + y / self.size[1] * bounds["height"]

    def answer_to(self, act: Callable[[], None], **prompt: int) -> dict[str, Any]:
        """Return the server's answer, after `act`, to a prompt of so many `points` and `boxes`, not to a preview."""
        with self.page.expect_response(lambda response: _is_answer(response, **prompt)) as caught:
            act()
        answer: dict[str, Any] = caught.value.json()
        assert caught.value.ok, answer
        expect(self.page.locator("#frame")).to_have_attribute("aria-busy", "false")
        return answer

    def click(self, x: float, y: float, *, shift: bool = False) -> None:
        if shift:
            self.page.keyboard.down("Shift")
        self.page.mouse.click(*self.on_screen(x, y))
        if shift:
            self.page.keyboard.up("Shift")

    def drag(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.page.mouse.move(*self.on_screen(x0, y0))
        self.page.mouse.down()
        self.page.mouse.move(*self.on_screen(x1, y1), steps=5)
        self.page.mouse.up()

    def pixel(self, x: float, y: float) -> tuple[int, int, int]:
        """Return what is drawn at a place of the photograph: red, green, blue."""
        place = [(x + 0.5) / self.size[0], (y + 0.5) / self.size[1]]
        red, green, blue, _ = self.page.locator("#canvas").evaluate(PIXEL, place)
        return red, green, blue

    def is_tinted(self, x: float, y: float) -> bool:
        """Whether a grey photograph is blue there."""
        red, _, blue = self.pixel(x, y)
        return blue > red + 30


def _is_answer(response: Response, points: int = 0, boxes: int = 0) -> bool:
    if not response.url.endswith("/masks"):
        return False
    body = response.request.post_data_json
    prompt = body["prompts"][0]
    is_preview = len(prompt["points"]) == 1 and "box" not in prompt and body["multimask"] is None
    return not is_preview and len(prompt["points"]) == points and ("box" in prompt) == bool(boxes)


def prompt_of(request: Request) -> dict[str, Any]:
    """Return the prompt that a request carries."""
    prompt: dict[str, Any] = request.post_data_json["prompts"][0]
    return prompt


def mask_of(answer: dict[str, Any], choice: int = 0) -> NDArray[np.bool_]:
    """Return a mask of an answer, bool [height, width]."""
    return coco.decode(answer["results"][0]["masks"][choice]["rle"]).astype(bool)
