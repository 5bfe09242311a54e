"""Photographs that a person brings to the demo page."""

import base64
import io

import pytest
from PIL import Image
from playwright.sync_api import Request, expect
from skimage import data

from service.__main__ import SAMPLE
from tests.browser.demo import Demo, prompt_of

SIDEWAYS = 6  # EXIF: turn by 90 degrees to the right to see it upright

GIVE = """([target, kind, bytes, name, type]) => {
    const transfer = new DataTransfer();
    const content = Uint8Array.from(atob(bytes), (character) => character.charCodeAt(0));
    transfer.items.add(new File([content], name, { type }));
    const event = kind === "paste"
        ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
        : new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.querySelector(target).dispatchEvent(event);
}"""


def sideways_photograph() -> bytes:
    """Return a JPEG of 3000 x 2000 pixels that is to be seen as one of 2000 x 3000."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = SIDEWAYS
    Image.fromarray(data.coffee()).resize((3000, 2000)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def choose(demo: Demo, name: str, mime: str, content: bytes) -> None:
    demo.page.locator("#file").set_input_files({"name": name, "mimeType": mime, "buffer": content})


def test_a_large_photograph_is_drawn_smaller_and_prompted_in_its_own_pixels_as_a_person_sees_it(demo: Demo) -> None:
    choose(demo, "mine.jpg", "image/jpeg", sideways_photograph())
    demo.expect_photograph(2000, 3000)
    bounds = demo.page.locator("#canvas").bounding_box()
    assert bounds
    assert bounds["width"] / bounds["height"] == pytest.approx(2 / 3, rel=0.01)

    def is_the_click(request: Request) -> bool:
        return '"multimask":true' in (request.post_data or "")

    with demo.page.expect_request(is_the_click) as caught:
        answer = demo.answer_to(lambda: demo.click(1500, 2500), points=1)
    assert prompt_of(caught.value)["points"] == [pytest.approx([1500, 2500, 1], abs=3)]
    assert answer["size"] == [3000, 2000]


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_photograph_may_be_dropped_or_pasted(demo: Demo, kind: str, cat: bytes) -> None:
    content = base64.b64encode(cat).decode()
    demo.page.evaluate(GIVE, ["#frame", kind, content, "chelsea.jpg", "image/jpeg"])
    expect(demo.page.locator("#canvas")).to_have_attribute("aria-label", "Photograph chelsea.jpg, 451 by 300 pixels")
    demo.expect_status("Ready")
    expect(demo.page.locator("[data-sample][aria-pressed=true]")).to_have_count(0)


def test_a_file_that_is_no_picture_is_refused_and_the_photograph_stays(demo: Demo) -> None:
    choose(demo, "notes.txt", "text/plain", b"no picture")
    demo.expect_problem("This browser cannot show notes.txt.")
    demo.answer_to(lambda: demo.click(154, 198), points=1)
    expect(demo.page.locator("#problem")).to_be_hidden()


def test_what_the_server_does_not_take_is_said_in_its_words(demo: Demo) -> None:
    demo.allowed.append("415")
    buffer = io.BytesIO()
    Image.open(SAMPLE).save(buffer, "GIF")
    with demo.page.expect_response(lambda response: response.status == 415) as refused:
        choose(demo, "coins.gif", "image/gif", buffer.getvalue())
    demo.expect_problem(refused.value.json()["detail"].rstrip(".")[1:])


def test_the_later_of_two_photographs_opened_quickly_stays(demo: Demo) -> None:
    """The first takes longer to decode; whichever is ready last, what was chosen last is shown."""
    choose(demo, "large.jpg", "image/jpeg", sideways_photograph())
    demo.page.click("[data-sample=cat]")
    demo.page.wait_for_timeout(1500)
    demo.expect_photograph(451, 300)
    expect(demo.page.locator("[data-sample=cat]")).to_have_attribute("aria-pressed", "true")
