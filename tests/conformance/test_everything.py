"""Everything-mode over REST and over gRPC, against the real service: the same records, the same reasons."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.everything import MAX_GRID_POINTS
from service.status import STATUS
from tests.conformance.callers import Caller, Failure, GrpcCaller, RestCaller
from tests.running import RunningService

# The bundled model rates its masks low: at these thresholds it finds dozens.
LOW = {"points_per_side": 8, "pred_iou_thresh": 0.4, "stability_score_thresh": 0.7}


@pytest.fixture(scope="module")
def callers(service: RunningService, coffee: bytes) -> Iterator[list[Caller]]:
    rest, rpc = RestCaller(service.url), GrpcCaller(service.grpc_address)
    rest.embed("everything", coffee)
    yield [rest, rpc]
    rest.close()
    rpc.close()


def same(callers: list[Caller], call: Callable[[Caller], Any]) -> Any:  # noqa: ANN401 - whatever the call answers
    first, second = (call(caller) for caller in callers)
    assert first == second
    return first


@pytest.mark.parametrize(
    "body",
    [
        LOW,
        LOW | {"points_per_batch": 10},
        LOW | {"box_nms_thresh": 1.0, "stability_score_offset": 2.0},
        LOW | {"min_mask_region_area": 200},
        {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.5, "point_grids": [[[0.5, 0.5], [0.25, 0.75], [1, 0]]]},
        {"points_per_side": 1, "pred_iou_thresh": 1.0},
    ],
    ids=lambda body: " ".join(sorted(body)),
)
def test_records_are_equal(callers: list[Caller], body: dict[str, Any]) -> None:
    answer = same(callers, lambda caller: caller.everything("everything", body))
    assert (answer["image_id"], answer["size"], answer["cache"]) == ("everything", [400, 600], "memory")
    assert bool(answer["records"]) == (body["pred_iou_thresh"] < 1)
    for record in answer["records"]:
        assert record["predicted_iou"] >= body["pred_iou_thresh"]
        assert record["stability_score"] >= body["stability_score_thresh"]
        assert record["crop_box"] == [0, 0, 600, 400]


def test_crops_need_the_bytes_once(callers: list[Caller], cat: bytes) -> None:
    body = LOW | {"points_per_side": 4, "crop_n_layers": 1}
    rest, rpc = callers
    for ours, theirs in ((rest, rpc), (rpc, rest)):
        ours.embed("crops", cat)
        failure = same(callers, lambda caller: caller.everything("crops", body))
        assert (failure.reason, failure.field) == ("image_not_cached", "image")
        assert "bytes" in failure.message
        first = ours.everything_in_bytes(cat, body, "crops")
        assert first["cache"] == "miss"
        assert theirs.everything_in_bytes(cat, body, "crops") == {**first, "cache": "memory"}
        assert same(callers, lambda caller: caller.everything("crops", body)) == {**first, "cache": "memory"}
        assert ours.delete("crops") == {}


def test_one_shot_answers_are_equal_and_the_image_can_be_asked_again(callers: list[Caller], astronaut: bytes) -> None:
    rest, rpc = callers
    first = rest.everything_in_bytes(astronaut, LOW)
    assert rpc.everything_in_bytes(astronaut, LOW)["records"] == first["records"]
    assert same(callers, lambda caller: caller.everything(first["image_id"], LOW))["records"] == first["records"]


BAD_PARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "no points": ({"points_per_side": 0}, "points_per_side"),
    "too many points": ({"points_per_side": 65}, "points_per_side"),
    "batch": ({"points_per_batch": 65}, "points_per_batch"),
    "predicted IoU": ({"pred_iou_thresh": 1.5}, "pred_iou_thresh"),
    "nan": ({"pred_iou_thresh": math.nan}, "pred_iou_thresh"),
    "stability": ({"stability_score_thresh": -0.5}, "stability_score_thresh"),
    "offset": ({"stability_score_offset": 0}, "stability_score_offset"),
    "box nms": ({"box_nms_thresh": math.inf}, "box_nms_thresh"),
    "layers": ({"crop_n_layers": 4}, "crop_n_layers"),
    "crop nms": ({"crop_nms_thresh": 2}, "crop_nms_thresh"),
    "overlap": ({"crop_overlap_ratio": 1}, "crop_overlap_ratio"),
    "factor": ({"crop_n_points_downscale_factor": 0}, "crop_n_points_downscale_factor"),
    "a layer without points": (
        {"points_per_side": 2, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2},
        "crop_n_points_downscale_factor",
    ),
    "region": ({"min_mask_region_area": 1_000_001}, "min_mask_region_area"),
    "both": ({"points_per_side": 2, "point_grids": [[[0.5, 0.5]]]}, "points_per_side"),
    "grids": ({"point_grids": [[[0.5, 0.5]], [[0.5, 0.5]]]}, "point_grids"),
    "many grids": ({"point_grids": [[[0.5, 0.5]]] * 5}, "point_grids"),
    "an empty grid": ({"point_grids": [[]]}, "point_grids[0]"),
    "a large grid": ({"point_grids": [[[0.5, 0.5]] * (MAX_GRID_POINTS + 1)]}, "point_grids[0]"),
    "a point outside": ({"point_grids": [[[0.5, 0.5], [-0.5, 0.5]]]}, "point_grids[0][1]"),
}


@pytest.mark.parametrize(("body", "field"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS)
def test_bad_parameters_name_field_and_bound(callers: list[Caller], body: dict[str, Any], field: str) -> None:
    failure = same(callers, lambda caller: caller.everything("everything", body))
    assert isinstance(failure, Failure)
    assert (failure.reason, failure.field, failure.retry) == ("invalid_prompt", field, False)
    assert field in failure.message


def test_other_errors_are_the_table_s(callers: list[Caller], coffee: bytes) -> None:
    rows = {status.reason: status for status in STATUS.values()}
    cases: dict[str, Callable[[Caller], Any]] = {
        "invalid_prompt": lambda caller: caller.everything("everything", {"points_per_side": 65}),
        "invalid_image_id": lambda caller: caller.everything(".dot", LOW),
        "image_not_cached": lambda caller: caller.everything("never-seen", LOW),
        "unsupported_image": lambda caller: caller.everything_in_bytes(b"", LOW, "everything"),
        "image_too_large": lambda caller: caller.everything_in_bytes(coffee + bytes(32 * 1024 * 1024), LOW),
        "digest_mismatch": lambda caller: caller.everything("everything", LOW, if_match="sha256:0"),
    }
    for reason, call in cases.items():
        assert same(callers, call).reason == reason
        assert callers[0].code == rows[reason].http
        assert callers[1].code == rows[reason].grpc
    refused = same(callers, lambda caller: caller.everything_in_bytes(coffee, LOW, "new", if_match="*"))
    assert refused.reason == "digest_mismatch"
