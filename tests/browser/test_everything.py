"""Everything-mode on the demo page."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import Response, expect
from pycocotools import mask as coco

from tests.browser.demo import Demo


def is_everything(response: Response) -> bool:
    return response.url.endswith("/everything")


@pytest.fixture
def everything(demo: Demo) -> list[dict[str, object]]:
    """Ask for everything on the page, and return the server's records."""
    with demo.page.expect_response(is_everything) as caught:
        demo.page.click("#everything")
        demo.expect_status("Looking for everything")
    records: list[dict[str, object]] = caught.value.json()["records"]
    demo.expect_status(f"of {len(records)} things shown")
    return records


def test_everything_is_shown_picked_from_and_kept(
    demo: Demo, everything: list[dict[str, object]], tmp_path: Path
) -> None:
    demo.keep_screenshot("page-everything")
    least = float(demo.page.locator("#least").input_value())
    shown = [record for record in everything if record["predicted_iou"] >= least]
    demo.expect_status(f"{len(shown)} of {len(everything)} things")
    assert 0 < len(shown) < len(everything)
    assert demo.fact("Encoder") == "skipped (in memory)"
    expect(demo.page.locator("#save-png")).to_be_disabled()
    masks = [coco.decode(record["segmentation"]).astype(bool) for record in shown]
    picked = min(range(len(shown)), key=lambda index: shown[index]["area"])
    y, x = (int(each) for each in sorted(zip(*masks[picked].nonzero(), strict=True))[masks[picked].sum() // 2])
    demo.click(x + 0.5, y + 0.5)
    demo.expect_status(f"{shown[picked]['area']:,} pixels")
    expect(demo.page.locator("#save-png")).to_be_enabled()
    with demo.page.expect_download() as download:
        demo.page.click("#save-coco")
    download.value.save_as(tmp_path / "coco.json")
    kept = json.loads((tmp_path / "coco.json").read_text())["annotations"]
    assert [each["segmentation"] for each in kept] == [record["segmentation"] for record in shown]
    assert [each["bbox"] for each in kept] == [list(coco.toBbox(each["segmentation"])) for each in kept]


def test_the_slider_shows_more_or_less_without_asking_again(demo: Demo, everything: list[dict[str, object]]) -> None:
    asked: list[str] = []
    demo.page.on("request", lambda request: asked.append(request.url))
    for least in ("0", "0.4"):
        demo.page.locator("#least").fill(least)
        count = sum(record["predicted_iou"] >= float(least) for record in everything)
        demo.expect_status(f"{count} of {len(everything)} things")
    assert asked == []


def test_escape_leaves_and_clicks_are_clicks_again(demo: Demo, everything: list[dict[str, object]]) -> None:
    assert everything
    demo.page.keyboard.press("Escape")
    demo.expect_status("Cleared")
    expect(demo.page.locator("#ratings")).to_be_hidden()
    demo.answer_to(lambda: demo.click(154, 198), points=1)


def test_escape_stops_a_search_under_way(demo: Demo) -> None:
    with demo.page.expect_event("requestfailed", is_everything):
        demo.page.click("#everything")
        demo.expect_status("Looking for everything")
        demo.page.keyboard.press("Escape")
    demo.expect_status("Cleared")
