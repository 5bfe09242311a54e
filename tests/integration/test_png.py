"""`accept: image/png`: one mask as a picture, and what is known of it in headers."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from tests import plain_http
from tests.running import RunningService

BOX = {"box": [100, 50, 500, 350]}


@pytest.fixture(scope="module")
def url(service: RunningService, coffee: bytes) -> str:
    url = f"{service.url}/v1/images/png"
    plain_http.put(url, content=coffee).raise_for_status()
    return f"{url}/masks"


@pytest.mark.parametrize("options", [{}, {"format": "none"}, {"multimask": False}, {"min_region_area": 50}])
def test_the_picture_is_the_mask_and_headers_say_the_rest(url: str, options: dict[str, Any]) -> None:
    body = {"prompts": [BOX], **options}
    answer = plain_http.post(url, json=body, headers={"accept": "image/png"})
    wanted = plain_http.post(url, json=body | {"format": "rle"}).json()
    (mask,) = wanted["results"][0]["masks"]
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), coco.decode(mask["rle"]) > 0)
    headers = answer.headers
    assert float(headers["x-sam-score"]) == pytest.approx(mask["score"], abs=1e-4)
    assert float(headers["x-sam-stability"]) == pytest.approx(mask["stability"], abs=1e-4)
    assert [int(number) for number in headers["x-sam-bbox"].split(",")] == mask["bbox"]
    assert int(headers["x-sam-area"]) == mask["area"]
    assert (headers["x-image-id"], headers["x-sam-model"]) == ("png", wanted["model"])
    assert headers["x-sam-cache"] == "memory"
    assert [part.split(";dur=")[0] for part in headers["server-timing"].split(", ")] == list(wanted["timings_ms"])


def test_a_one_shot_request_may_ask_for_it_too(service: RunningService, coffee: bytes) -> None:
    answer = plain_http.post(
        f"{service.url}/v1/masks",
        files={"image": coffee},
        data={"request": '{"prompts": [{"box": [100, 50, 500, 350]}]}'},
        headers={"accept": "image/png"},
    )
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (600, 400)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/png", "image/png"),
        ("IMAGE/PNG; q=0.5, */*", "image/png"),
        ("image/png, application/json;q=0.9", "image/png"),
        ("image/png;q=0.8, application/json", "application/json"),
        ("image/png;q=0", "application/json"),
        ("image/png;q=much", "application/json"),
        ("image/*", "application/json"),
        ("*/*", "application/json"),
        ("", "application/json"),
        ("text/html;;q,,", "application/json"),
    ],
)
def test_who_names_it_gets_it(url: str, accept: str, kind: str) -> None:
    answer = plain_http.post(url, json={"prompts": [BOX]}, headers={"accept": accept})
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)


@pytest.mark.parametrize(
    "body", [{"prompts": [BOX, BOX]}, {"prompts": [BOX], "multimask": True}, {"prompts": [BOX], "include_logits": True}]
)
def test_more_than_one_mask_is_no_picture(url: str, body: dict[str, Any]) -> None:
    answer = plain_http.post(url, json=body, headers={"accept": "image/png"})
    problem = answer.json()
    assert (answer.status_code, problem["reason"], problem["field"]) == (422, "invalid_prompt", "accept")
    assert "one mask" in problem["detail"]


def test_a_negative_region_area_is_refused(url: str) -> None:
    """Which gRPC, whose number has no sign, cannot say."""
    problem = plain_http.post(url, json={"prompts": [BOX], "min_region_area": -1}).json()
    assert (problem["reason"], problem["field"]) == ("invalid_prompt", "min_region_area")
