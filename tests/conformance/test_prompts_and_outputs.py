"""Mask inputs and every form of output, over both transports, against the real service."""

import base64
import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from service.prompt import MAX_MASK_INPUTS
from service.regions import holes_filled, islands_dropped
from tests.conformance.callers import Caller, Failure, packed, same, unpacked

BOX = {"box": [100, 50, 500, 350]}
CLICK = {"points": [[270, 200, 1]]}
CORRECTION = {"points": [[270, 200, 1], [560, 60, 0]]}


def masks_of(callers: list[Caller], body: dict[str, Any]) -> list[list[dict[str, Any]]]:
    answer = same(callers, lambda caller: caller.segment("coffee", body), tries=4)
    assert not isinstance(answer, Failure), answer
    return [result["masks"] for result in answer["results"]]


def first_mask(callers: list[Caller], prompt: dict[str, Any], **options: object) -> dict[str, Any]:
    return masks_of(callers, {"prompts": [prompt], **options})[0][0]


def decoded(mask: dict[str, Any]) -> np.ndarray:
    return np.asarray(coco.decode(mask["rle"])).astype(bool)


@pytest.fixture(scope="module")
def side(callers: list[Caller]) -> int:
    return callers[0].model()["mask_size"]  # type: ignore[index, return-value]


@pytest.fixture(scope="module")
def logits(callers: list[Caller]) -> str:
    return first_mask(callers, BOX, include_logits=True)["logits"]


def test_logits_are_the_mask_before_it_was_upscaled(callers: list[Caller], logits: str, side: int) -> None:
    """Where they are far enough from 0, upscaling leaves their signs as they are."""
    low_res = np.frombuffer(unpacked(logits), "<f2").reshape(side, side)
    mask = decoded(first_mask(callers, BOX))
    rows, columns = (index.ravel() for index in np.mgrid[1 : side * 2 // 3 - 1, 1 : side - 1])
    certain = np.abs(low_res[rows, columns]) > 4
    places = [((index[certain] + 0.5) * 600 / side).astype(int) for index in (rows, columns)]
    assert certain.sum() > 1000
    np.testing.assert_array_equal(mask[places[0], places[1]], low_res[rows, columns][certain] > 0)


@pytest.mark.parametrize(
    "prompt", [{}, CLICK, BOX, CORRECTION, CLICK | BOX], ids=["alone", "click", "box", "two", "both"]
)
@pytest.mark.parametrize("multimask", [None, True, False])
def test_a_mask_input_goes_with_any_other_prompt_or_alone(
    callers: list[Caller],
    logits: str,
    prompt: dict[str, Any],
    multimask: bool | None,  # noqa: FBT001 - a case
) -> None:
    body = {"prompts": [{**prompt, "mask_input": logits}]}
    (masks,) = masks_of(callers, body if multimask is None else body | {"multimask": multimask})
    assert len(masks) == (3 if multimask else 1)


def test_a_correcting_click_with_a_mask_input_changes_what_it_is_given(callers: list[Caller]) -> None:
    """A box around the cup and the spoon; then a click that takes a part of the mask away."""
    first = first_mask(callers, BOX, include_logits=True)
    before = decoded(first)
    rows, columns = np.nonzero(before[60:340, 110:490])
    y, x = rows[0] + 60, columns[0] + 110  # a pixel of the mask's upper edge
    wrong = {"points": [[int(x), int(y), 0]], "mask_input": first["logits"]}
    after = decoded(first_mask(callers, BOX | wrong))
    assert (after != before).any()
    again = decoded(first_mask(callers, BOX | {"points": wrong["points"]}))
    overlap = [(mask & before).sum() / (mask | before).sum() for mask in (after, again)]
    assert after.any()
    assert overlap[0] != overlap[1]  # what it was given counts
    empty = packed(np.full(len(unpacked(first["logits"])) // 2, -20, "<f2").tobytes())
    assert decoded(first_mask(callers, BOX | wrong | {"mask_input": empty})).sum() != after.sum()


def test_prompts_with_and_without_mask_inputs_are_answered_in_their_order(callers: list[Caller], logits: str) -> None:
    prompts = [CLICK, {**CLICK, "mask_input": logits}, BOX, {**CORRECTION, "mask_input": logits}, CLICK]
    together = masks_of(callers, {"prompts": prompts})
    for prompt, masks in zip(prompts, together, strict=True):
        (alone,) = masks_of(callers, {"prompts": [prompt]})
        assert masks[0]["area"] == pytest.approx(alone[0]["area"], rel=0.005)
        assert masks[0]["score"] == pytest.approx(alone[0]["score"], abs=0.001)


def test_as_many_mask_inputs_as_are_allowed(callers: list[Caller], logits: str) -> None:
    prompt = {**CLICK, "mask_input": logits}
    assert len(masks_of(callers, {"prompts": [prompt] * MAX_MASK_INPUTS + [CLICK] * 100})) == MAX_MASK_INPUTS + 100
    failure = same(callers, lambda caller: caller.segment("coffee", {"prompts": [prompt] * (MAX_MASK_INPUTS + 1)}))
    assert (failure.reason, failure.field) == ("invalid_prompt", "prompts")
    assert str(MAX_MASK_INPUTS) in failure.message


def floats(values: np.ndarray) -> str:
    return packed(values.astype("<f2").tobytes())


@pytest.mark.parametrize(
    "mask_input",
    [
        lambda _: packed(b""),
        lambda side: floats(np.zeros(side * side - 1)),
        lambda side: floats(np.zeros(side * side + 1)),
        lambda _: packed(bytes(50_000_000)),
        lambda side: floats(np.append(np.zeros(side * side - 1), math.nan)),
        lambda side: floats(np.append(np.zeros(side * side - 1), math.inf)),
    ],
    ids=["empty", "too short", "too long", "50 MB", "nan", "infinity"],
)
def test_bad_mask_inputs_name_their_field(callers: list[Caller], side: int, mask_input: Any) -> None:  # noqa: ANN401
    body = {"prompts": [CLICK, {**CLICK, "mask_input": mask_input(side)}]}
    failure = same(callers, lambda caller: caller.segment("coffee", body))
    assert (failure.reason, failure.field) == ("invalid_prompt", "prompts[1].mask_input")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("%%%", "base64"),
        ("é", "base64"),
        (base64.b64encode(b"no zlib stream").decode(), "zlib"),
        (packed(bytes(1000))[:-8], "cut off"),
        (base64.b64encode(unpacked(packed(bytes(10)))).decode(), "zlib"),
    ],
)
def test_what_is_not_packed_is_refused_over_http(callers: list[Caller], text: str, says: str) -> None:
    failure = callers[0].segment("coffee", {"prompts": [{**CLICK, "mask_input": text}]})
    assert isinstance(failure, Failure)
    assert (failure.reason, failure.field) == ("invalid_prompt", "prompts[0].mask_input")
    assert says in failure.message


def test_all_formats_tell_of_the_same_mask(callers: list[Caller]) -> None:
    kinds = {
        kind: first_mask(callers, BOX, format=kind, polygon_tolerance=0) for kind in ("rle", "png", "polygon", "none")
    }
    facts = [{name: mask[name] for name in ("score", "stability", "bbox", "area")} for mask in kinds.values()]
    assert facts == [facts[0]] * 4
    assert kinds["none"] == facts[0]
    binary = decoded(kinds["rle"])
    picture = Image.open(io.BytesIO(base64.b64decode(kinds["png"]["png"])))
    np.testing.assert_array_equal(np.asarray(picture), binary)
    rings = [ring for polygon in kinds["polygon"]["polygons"] for ring in polygon]
    filled = [coco.decode(coco.frPyObjects([list(map(float, ring))], 400, 600))[..., 0] for ring in rings]
    np.testing.assert_array_equal(np.bitwise_xor.reduce(filled, axis=0).astype(bool), binary)


def test_polygons_are_simpler_the_more_they_may_differ(callers: list[Caller]) -> None:
    lengths = [
        sum(len(ring) for polygon in mask["polygons"] for ring in polygon)
        for mask in (
            first_mask(callers, BOX, format="polygon", polygon_tolerance=0),
            first_mask(callers, BOX, format="polygon"),
            first_mask(callers, BOX, format="polygon", polygon_tolerance=1),
            first_mask(callers, BOX, format="polygon", polygon_tolerance=20),
        )
    ]
    assert lengths[0] > lengths[1] == lengths[2] > lengths[3] > 0


@pytest.mark.parametrize("min_region_area", [1, 100, 5000])
def test_clean_up_is_of_holes_and_then_of_islands(callers: list[Caller], min_region_area: int) -> None:
    body = {"prompts": [CLICK, BOX], "multimask": True}
    for raw, clean in zip(
        masks_of(callers, body), masks_of(callers, body | {"min_region_area": min_region_area}), strict=True
    ):
        for before, after in zip(raw, clean, strict=True):
            expected = islands_dropped(holes_filled(decoded(before), min_region_area)[0], min_region_area)[0]
            np.testing.assert_array_equal(decoded(after), expected)
            assert after["area"] == expected.sum()
            assert after["bbox"] == coco.toBbox(after["rle"]).astype(int).tolist()


BAD_OUTPUTS = {
    "min_region_area": [1_000_001],
    "polygon_tolerance": [-0.5, 100.5, math.nan, math.inf],
    "format": ["bmp"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_OUTPUTS.items() for value in values])
def test_outputs_out_of_bounds_are_refused(callers: list[Caller], name: str, value: object) -> None:
    failure = same(callers, lambda caller: caller.segment("coffee", {"prompts": [CLICK], name: value}))
    assert (failure.reason, failure.field) == ("invalid_prompt", name)
