"""What the demo page does when the server forgets, refuses, is busy or is gone."""

import hashlib
from collections.abc import Callable

from playwright.sync_api import expect

from service.__main__ import SAMPLE
from tests import plain_http
from tests.browser.demo import Demo
from tests.running import RunningService, triton_alone

COIN = (154, 198)
IMAGE_ID = f"sha256-{hashlib.sha256(SAMPLE.read_bytes()).hexdigest()}"
FAILED = "Failed to load resource"  # how the browser's console tells of an answer of 400 and above, or of none


def test_a_photograph_that_the_server_forgot_is_sent_again_and_the_click_answered(
    demo: Demo, service: RunningService
) -> None:
    demo.allowed.append(f"{FAILED}.*404")
    plain_http.delete(f"{service.url}/v1/images/{IMAGE_ID}").raise_for_status()
    demo.page.keyboard.press("Tab")
    demo.page.locator("#canvas").focus()
    for key in ("b", "ArrowRight", "ArrowDown", "Enter"):  # a box: no preview meets the gap before it
        if key == "Enter":
            plain_http.delete(f"{service.url}/v1/images/{IMAGE_ID}")
        demo.page.keyboard.press(key)
    demo.expect_status("The server had forgotten the photograph; it was sent again.")
    demo.expect_status("Mask of")
    expect(demo.page.locator("#problem")).to_be_hidden()
    assert plain_http.get(f"{service.url}/v1/images/{IMAGE_ID}").status_code == 200


def test_a_service_that_is_gone_is_said_to_be_and_tried_again_when_it_is_back(visit: Callable[..., Demo]) -> None:
    with RunningService.start() as first:
        demo = visit(first)
        demo.expect_status("Ready")
    demo.allowed.append(FAILED)
    demo.drag(134, 178, 172, 216)
    demo.expect_problem("does not answer. Is it still running?")
    demo.page.click("[data-sample=cat]")
    demo.expect_problem("does not answer. Is it still running?")
    demo.drag(134, 178, 172, 216)
    expect(demo.page.locator("#again")).to_be_visible()
    with RunningService.start(**first.settings):
        demo.page.click("#again")
        demo.expect_status("it was sent again")
        assert demo.is_tinted(*COIN)


def test_a_key_is_asked_for_once_a_tab(visit: Callable[..., Demo]) -> None:
    """A wrong one is said to be wrong; no key leaves the server's sentence; a right one lasts over a reload."""
    key_digest = hashlib.sha256(b"open sesame").hexdigest()
    with RunningService.start(SAM_API_KEYS=f"alice:{key_digest}") as guarded:
        demo = visit(guarded)
        demo.allowed.append(f"{FAILED}.*401")
        dialog = demo.page.locator("#key-dialog")
        expect(dialog).to_be_visible()
        demo.page.keyboard.press("Escape")
        demo.expect_problem("Send a valid API key")
        demo.page.click("#again")
        expect(dialog).to_be_visible()
        demo.page.keyboard.type("open barley")
        demo.page.keyboard.press("Enter")
        expect(demo.page.locator("#key-text")).to_contain_text("not accepted")
        demo.page.keyboard.type("open sesame")
        demo.page.keyboard.press("Enter")
        demo.expect_status("Ready")
        demo.answer_to(lambda: demo.click(*COIN), points=1)
        demo.page.reload()
        demo.expect_status("Ready")
        expect(dialog).to_be_hidden()
        assert demo.fact("Upload") == "was cached"


def test_while_the_model_is_away_the_page_waits_as_long_as_the_server_says(visit: Callable[..., Demo]) -> None:
    """503 with Retry-After: said, waited for, and tried again, until the Triton that is just starting answers."""
    with RunningService.launch(embedded=False) as waiting:
        waiting.wait_for("/healthz", 200)
        demo = visit(waiting)
        demo.allowed.append(f"{FAILED}.*503")
        demo.expect_status("Trying again in 2 s")
        with triton_alone(waiting.settings["SAM_TRITON_URL"], waiting.settings["SAM_TRITON_METRICS_PORT"]):
            demo.expect_status("Ready")
            demo.answer_to(lambda: demo.click(*COIN), points=1)
            waiting.stop()
