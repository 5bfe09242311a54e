"""The demo page in a real browser, on the coins: the photograph that it opens with."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Request, expect
from pycocotools import mask as coco

from service.__main__ import SAMPLE
from tests import plain_http
from tests.browser.demo import Demo, mask_of, prompt_of
from tests.running import RunningService

COIN = (154, 198)  # x, y of the centre of one
COIN_AREA = range(300, 3000)
BESIDE = (184, 222)  # between coins
LOWER_PART = (154, 208)  # on the coin, away from the mark of the click
NEIGHBOUR = (212, 196)

PNG_AND_RLE = """async ({ body, path, counts, size }) => {
    const { maskFromRle } = await import("/static/rle.js");
    const headers = { "content-type": "application/json" };
    const response = await fetch(path, { method: "POST", headers, body: JSON.stringify({ ...body, format: "png" }) });
    const { png } = (await response.json()).results[0].masks[0];
    const bytes = Uint8Array.from(atob(png), (character) => character.charCodeAt(0));
    const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
    const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
    const context = canvas.getContext("2d");
    context.drawImage(bitmap, 0, 0);
    const pixels = context.getImageData(0, 0, bitmap.width, bitmap.height).data;
    const mask = maskFromRle({ size, counts });
    const differing = mask.filter((value, index) => value !== pixels[4 * index] >> 7).length;
    return { differing, set: mask.reduce((sum, value) => sum + value, 0), length: mask.length };
}"""

SAMPLED = """async ([rle, columns, rows]) => {
    const { maskFromRle } = await import("/static/rle.js");
    return [...maskFromRle(rle, columns, rows)];
}"""

ERROR_OF_RLE = """async (counts) => {
    const { maskFromRle } = await import("/static/rle.js");
    try {
        return maskFromRle({ size: [303, 384], counts }).length;
    } catch (error) {
        return error.name;
    }
}"""


def test_the_first_sample_is_encoded_before_anybody_asks(demo: Demo, service: RunningService) -> None:
    image_id = f"sha256-{hashlib.sha256(SAMPLE.read_bytes()).hexdigest()}"
    assert plain_http.get(f"{service.url}/v1/images/{image_id}").json()["size"] == [303, 384]
    demo.expect_photograph(384, 303)
    assert demo.page.locator("[data-sample=coins]").get_attribute("aria-pressed") == "true"


def test_a_click_on_a_coin_gives_that_coin_without_running_the_encoder(demo: Demo) -> None:
    beside = demo.pixel(*BESIDE)
    answer = demo.answer_to(lambda: demo.click(*COIN), points=1)
    mask = mask_of(answer)
    assert mask[COIN[1], COIN[0]]
    assert mask.sum() in COIN_AREA
    assert not mask[NEIGHBOUR[1], NEIGHBOUR[0]]
    assert demo.is_tinted(*LOWER_PART) == mask[LOWER_PART[1], LOWER_PART[0]]
    assert demo.pixel(*BESIDE) == beside
    assert answer["cache"] == "memory"
    assert demo.fact("Encoder") == "skipped (in memory)"
    assert demo.fact("Decoder").endswith("ms")
    demo.keep_screenshot("page")
    demo.expect_status(f"Mask of {mask.sum():,} pixels")


def test_the_pages_run_lengths_mean_what_the_servers_png_shows(demo: Demo) -> None:
    """`rle.js` against the PNG of the same prompt, pixel by pixel: a coin, and all but a coin."""
    for point in ([*COIN, 1], [2, 300, 1]):
        body = {"prompts": [{"points": [point]}]}
        path = f"v1/images/sha256-{hashlib.sha256(SAMPLE.read_bytes()).hexdigest()}/masks"
        answer = plain_http.post(f"{demo.page.url}{path}", json=body).json()
        rle = answer["results"][0]["masks"][0]["rle"]
        compared = demo.page.evaluate(PNG_AND_RLE, {"body": body, "path": path, **rle})
        assert compared == {"differing": 0, "set": int(coco.area(rle)), "length": 303 * 384}


def test_run_lengths_are_enlarged_and_reduced_as_nearest_neighbours(demo: Demo) -> None:
    answer = plain_http.post(
        f"{demo.page.url}v1/images/sha256-{hashlib.sha256(SAMPLE.read_bytes()).hexdigest()}/masks",
        json={"prompts": [{"points": [[*COIN, 1]]}]},
    ).json()
    mask = mask_of(answer)
    for columns, rows in ((768, 606), (1000, 800), (192, 101)):
        sampled = demo.page.evaluate(SAMPLED, [answer["results"][0]["masks"][0]["rle"], columns, rows])
        x = ((np.arange(columns) + 0.5) * 384 / columns).astype(int)
        y = ((np.arange(rows) + 0.5) * 303 / rows).astype(int)
        assert (np.array(sampled).reshape(rows, columns) == mask[np.ix_(y, x)]).all()


def test_broken_run_lengths_are_refused(demo: Demo) -> None:
    """Neither characters that are none of COCO's nor runs of another image's size are drawn."""
    for counts in ("0 0", "00", ""):
        refused = """async (counts) => (await import("/static/rle.js"))
            .maskFromRle.bind(null, { size: [303, 384], counts })"""
        attempt = (
            f"async (counts) => {{ try {{ (await ({refused})(counts))(); return ''; }} catch (e) {{ return e.name }} }}"
        )
        assert demo.page.evaluate(attempt, counts) == "RangeError"


def test_shift_click_takes_away_and_undo_goes_back_without_asking(demo: Demo) -> None:
    first = demo.answer_to(lambda: demo.click(*COIN), points=1)
    asked: list[dict[str, object]] = []
    demo.page.on("request", lambda request: asked.append(prompt_of(request)) if request.post_data else None)
    demo.answer_to(lambda: demo.click(*BESIDE, shift=True), points=2)
    assert [point[2] for point in asked[-1]["points"]] == [1, 0]
    assert asked[-1]["points"][1] == pytest.approx([*BESIDE, 0], abs=1)
    asked.clear()
    demo.page.click("#undo")
    demo.expect_status(f"Mask of {mask_of(first).sum():,} pixels")
    demo.page.keyboard.press("Control+z")
    demo.expect_status("Nothing is marked")
    assert not demo.is_tinted(*LOWER_PART)
    expect(demo.page.locator("#undo")).to_be_disabled()
    assert asked == []


def test_the_switch_makes_plain_clicks_take_away(demo: Demo) -> None:
    demo.answer_to(lambda: demo.click(*COIN), points=1)
    demo.page.locator("label", has_text="remove").click()
    with demo.page.expect_request(lambda request: request.url.endswith("/masks")) as caught:
        demo.click(*BESIDE)
    assert [point[2] for point in prompt_of(caught.value)["points"]] == [1, 0]


def test_a_box_gives_what_is_in_it_and_a_click_refines_it(demo: Demo) -> None:
    with demo.page.expect_request(lambda request: "box" in (request.post_data or "")) as caught:
        answer = demo.answer_to(lambda: demo.drag(172, 216, 134, 178), boxes=1)
    assert prompt_of(caught.value)["box"] == pytest.approx([134, 178, 172, 216], abs=1)
    mask = mask_of(answer)
    assert mask[COIN[1], COIN[0]]
    assert mask.sum() in COIN_AREA
    assert demo.is_tinted(*COIN)
    expect(demo.page.locator("#candidates")).to_be_hidden()
    demo.answer_to(lambda: demo.click(*COIN), points=1, boxes=1)
    demo.page.click("#clear")
    expect(demo.page.locator("#clear")).to_be_disabled()
    assert not demo.is_tinted(*COIN)


def test_tab_goes_through_the_candidates_and_then_on_to_the_buttons(demo: Demo) -> None:
    answer = demo.answer_to(lambda: demo.click(*COIN), points=1)
    assert len(answer["results"][0]["masks"]) == 3
    pressed = demo.page.locator("#choices [aria-pressed=true]")
    for number in (2, 3):
        demo.page.keyboard.press("Tab")
        expect(pressed).to_contain_text(f"{number} · ")
        demo.expect_status(f"Candidate {number} of 3")
        expect(demo.page.locator("#canvas")).to_be_focused()
    drawn = demo.page.locator("#canvas").screenshot()
    demo.page.keyboard.press("c")
    expect(pressed).to_contain_text("1 · ")
    assert demo.page.locator("#canvas").screenshot() != drawn
    demo.page.keyboard.press("c")
    demo.page.keyboard.press("c")
    demo.page.keyboard.press("Tab")
    expect(demo.page.locator("#canvas")).not_to_be_focused()
    demo.page.locator("#choices button").nth(1).click()
    expect(pressed).to_contain_text("2 · ")


def test_the_keyboard_alone_is_enough(demo: Demo) -> None:
    """Tab to the photograph, move the crosshair, place both kinds of points, draw a box, undo, clear."""
    for _ in range(20):
        if demo.page.evaluate("document.activeElement.id") == "canvas":
            break
        demo.page.keyboard.press("Tab")
    expect(demo.page.locator("#canvas")).to_be_focused()
    for key, times in (("ArrowLeft", 5), ("ArrowDown", 6), ("Shift+ArrowRight", 2)):  # from 192, 151.5 in steps of 8
        for _ in range(times):
            demo.page.keyboard.press(key)
    with demo.page.expect_request(lambda request: '"multimask":true' in (request.post_data or "")) as caught:
        answer = demo.answer_to(lambda: demo.page.keyboard.press("Enter"), points=1)
    assert prompt_of(caught.value)["points"] == [[154, 199.5, 1]]
    assert mask_of(answer).sum() in COIN_AREA
    for _ in range(4):
        demo.page.keyboard.press("ArrowDown")
    answered = demo.answer_to(lambda: demo.page.keyboard.press("Shift+Enter"), points=2)
    assert answered["cache"] == "memory"
    demo.page.keyboard.press("Escape")
    demo.expect_status("Cleared")
    demo.page.keyboard.press("b")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowUp", "ArrowUp"):
        demo.page.keyboard.press(key)
    demo.answer_to(lambda: demo.page.keyboard.press("Enter"), boxes=1)
    demo.page.keyboard.press("Control+z")
    demo.expect_status("Nothing is marked")


def test_hovering_shows_what_a_click_would_give_one_request_at_a_time(demo: Demo) -> None:
    asked: list[Request] = []
    under_way: set[Request] = set()
    together: list[int] = []

    def begin(request: Request) -> None:
        asked.append(request)
        under_way.add(request)
        together.append(len(under_way))

    def end(request: Request) -> None:
        under_way.discard(request)

    demo.page.on("request", begin)
    demo.page.on("requestfinished", end)
    demo.page.on("requestfailed", end)
    demo.page.mouse.move(*demo.on_screen(20, 20))
    demo.page.mouse.move(*demo.on_screen(*COIN), steps=60)
    demo.page.wait_for_timeout(1000)
    assert demo.is_tinted(*LOWER_PART)
    assert max(together) == 1
    assert 1 < len(asked) < 60, "one request for each movement, or for none"
    assert prompt_of(asked[-1])["points"] == [pytest.approx([*COIN, 1], abs=1)]
    demo.page.mouse.move(5, 5)
    demo.page.wait_for_timeout(300)
    assert not demo.is_tinted(*LOWER_PART)


def test_the_mask_can_be_kept_as_png_and_as_coco(demo: Demo, tmp_path: Path) -> None:
    expect(demo.page.locator("#save-png")).to_be_disabled()
    mask = mask_of(demo.answer_to(lambda: demo.click(*COIN), points=1))
    for button in ("#save-png", "#save-coco"):
        with demo.page.expect_download() as download:
            demo.page.click(button)
        download.value.save_as(tmp_path / download.value.suggested_filename)
    kept = np.asarray(Image.open(tmp_path / "coins-mask.png").convert("L"))
    assert ((kept == 255) == mask).all()
    assert set(np.unique(kept)) == {0, 255}
    data = json.loads((tmp_path / "coins-coco.json").read_text())
    (image,), (annotation,) = data["images"], data["annotations"]
    assert (image["file_name"], image["width"], image["height"]) == ("coins.jpg", 384, 303)
    assert (coco.decode(annotation["segmentation"]).astype(bool) == mask).all()
    assert (annotation["area"], annotation["image_id"]) == (mask.sum(), image["id"])


def test_another_sample_is_opened_and_its_prompts_are_its_own(demo: Demo) -> None:
    demo.answer_to(lambda: demo.click(*COIN), points=1)
    demo.page.click("[data-sample=coffee]")
    demo.expect_photograph(600, 400)
    expect(demo.page.locator("#candidates")).to_be_hidden()
    answer = demo.answer_to(lambda: demo.click(300, 150), points=1)
    assert answer["size"] == [400, 600]


def test_on_a_phone_taps_long_presses_and_drags_work_and_nothing_is_cut_off(
    visit: Callable[..., Demo], service: RunningService
) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 3}
    demo = visit(service, **phone)
    demo.expect_status("Ready")
    assert demo.page.evaluate("document.documentElement.scrollWidth") <= 390
    demo.answer_to(lambda: demo.page.touchscreen.tap(*demo.on_screen(*COIN)), points=1)
    assert demo.is_tinted(*LOWER_PART)
    finger = demo.page.context.new_cdp_session(demo.page)

    def touch(kind: str, *place: float) -> None:
        points = [{"x": place[0], "y": place[1]}] if place else []
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    with demo.page.expect_request(lambda request: request.url.endswith("/masks")) as caught:
        touch("touchStart", *demo.on_screen(*BESIDE))
        demo.page.wait_for_timeout(700)
        touch("touchEnd")
    assert [point[2] for point in prompt_of(caught.value)["points"]] == [1, 0]
    demo.expect_status("Mask of")
    demo.keep_screenshot("page-phone")
    demo.page.locator("#clear").tap()
    with demo.page.expect_request(lambda request: "box" in (request.post_data or "")):
        touch("touchStart", *demo.on_screen(134, 178))
        touch("touchMove", *demo.on_screen(150, 200))
        touch("touchMove", *demo.on_screen(172, 216))
        touch("touchEnd")
    demo.expect_status("Mask of")
