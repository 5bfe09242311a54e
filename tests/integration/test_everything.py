"""Everything-mode through the running service: the original package's records, and an end when the client leaves."""

import json
import threading
import time
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
from pycocotools import mask as coco
from skimage import data

from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from service.tensors import DECODER_MODEL
from service.upkeep import PROBE_EVERY_S
from tests import plain_http
from tests.conftest import encoded
from tests.export.original_generator import original_generator, original_tiny
from tests.running import RunningService

# The bundled model rates its masks low: at these thresholds it finds dozens.
LOW = {"points_per_side": 12, "pred_iou_thresh": 0.45, "stability_score_thresh": 0.8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "coins": ("coins", LOW),
    "coffee": ("coffee", LOW),
    "astronaut": ("astronaut", LOW | {"pred_iou_thresh": 0.35}),
    "crops": ("coffee", LOW | {"points_per_side": 6, "crop_n_layers": 1, "pred_iou_thresh": 0.4}),
    "small regions": ("coins", LOW | {"points_per_side": 8, "min_mask_region_area": 60, "pred_iou_thresh": 0.35}),
}
FULL = {"points_per_side": 64, "points_per_batch": 4}  # half a minute of work, in a thousand batches


def photograph(name: str) -> np.ndarray:
    pixels = getattr(data, name)()
    return pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1)


@pytest.fixture(scope="module")
def original() -> Any:  # noqa: ANN401 - the original package is untyped
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield original_tiny()
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "parameters"), CASES.values(), ids=CASES)
def test_the_records_are_the_original_package_s(
    service: RunningService,
    original: Any,  # noqa: ANN401
    name: str,
    parameters: dict[str, Any],
) -> None:
    image = photograph(name)
    files = {"image": encoded(image, "PNG")}
    form = {"request": json.dumps(parameters)}
    answer = plain_http.post(f"{service.url}/v1/everything", files=files, data=form, timeout=60)
    ours = answer.raise_for_status().json()["records"]
    theirs = original_generator(original, **parameters).generate(image)
    assert len(theirs) >= 10
    segmentations = [[record["segmentation"] for record in records] for records in (theirs, ours)]
    ious = coco.iou(*segmentations, [0] * len(ours))
    for found in (ious.max(axis=1), ious.max(axis=0)):  # each of the original's, and no others beside them
        # Logits leave our decoder as FP16: a mask at a threshold may fall on its other side, one in a hundred at most.
        assert np.count_nonzero(found < 0.99) <= max(1, len(found) // 100)
    pairs = [(record, ours[match]) for record, match in zip(theirs, ious.argmax(axis=1), strict=True)]
    for field in ("predicted_iou", "stability_score"):
        assert np.median([abs(one[field] - other[field]) for one, other in pairs]) < 0.001
    assert np.mean([one["point_coords"] == other["point_coords"] for one, other in pairs]) >= 0.9
    assert np.mean([one["crop_box"] == other["crop_box"] for one, other in pairs]) >= 0.9
    for record in ours:
        assert record["area"] == coco.area(record["segmentation"])
        x, y, width, height = coco.toBbox(record["segmentation"])
        assert record["bbox"] == [x, y, width - 1, height - 1]


def decodes(service: RunningService) -> float:
    return service.triton_count(DECODER_MODEL)


def outcomes(service: RunningService, transport: str, route: str, outcome: str) -> float:
    series = f'sam_requests_total{{outcome="{outcome}",route="{route}",transport="{transport}"}}'
    return service.metrics().get(series, 0)


def wait_for_outcome(service: RunningService, count: float, *which: str) -> None:
    """Return when the request has ended, and the decodes too: but for canaries there are none."""
    deadline = time.monotonic() + 20
    while outcomes(service, *which) != count:
        assert time.monotonic() < deadline, f"{which}: {service.metrics()}"
        time.sleep(0.05)
    time.sleep(0.5)  # what the decoder had begun
    before, began_s = decodes(service), time.monotonic()
    time.sleep(2)
    made = decodes(service) - before
    assert made <= 2 + (time.monotonic() - began_s) / PROBE_EVERY_S


def test_cancelling_the_stream_stops_the_work(service: RunningService, cat: bytes) -> None:
    which = ("grpc", "SegmentEverything", "cancelled")
    before = outcomes(service, *which)
    with grpc.insecure_channel(service.grpc_address) as channel:
        stub = pb_grpc.SegmentAnythingStub(channel)
        stream = stub.SegmentEverything(pb.SegmentEverythingRequest(image=cat, **FULL))
        progress = [next(stream).progress.batches for _ in range(3)]
        stream.cancel()
    assert progress == [1, 2, 3]
    wait_for_outcome(service, before + 1, *which)


def test_leaving_over_http_stops_the_work(service: RunningService, cat: bytes) -> None:
    which = ("http", "POST /v1/images/{image_id}/everything", "cancelled")
    before = outcomes(service, *which)
    plain_http.put(f"{service.url}/v1/images/left", content=cat).raise_for_status()
    with pytest.raises(httpx.ReadTimeout):
        plain_http.post(f"{service.url}/v1/images/left/everything", json=FULL, timeout=1)
    wait_for_outcome(service, before + 1, *which)


def test_the_deadline_ends_the_work(service: RunningService, cat: bytes) -> None:
    which = ("http", "POST /v1/everything", "deadline_exceeded")
    before, headers = outcomes(service, *which), {"x-request-timeout": "2"}
    form = {"request": json.dumps(FULL)}
    answer = plain_http.post(
        f"{service.url}/v1/everything", files={"image": cat}, data=form, headers=headers, timeout=60
    )
    assert (answer.status_code, answer.json()["reason"]) == (504, "deadline_exceeded")
    wait_for_outcome(service, before + 1, *which)


def test_single_prompts_are_answered_meanwhile(service: RunningService, cat: bytes) -> None:
    plain_http.put(f"{service.url}/v1/images/meanwhile", content=cat).raise_for_status()
    url, done = f"{service.url}/v1/images/meanwhile", threading.Event()

    def everything() -> None:
        plain_http.post(f"{url}/everything", json=LOW | {"points_per_batch": 8}, timeout=60).raise_for_status()
        done.set()

    thread = threading.Thread(target=everything)
    thread.start()
    body = {"prompts": [{"points": [[200, 150, 1]]}]}
    answers = 0
    while not done.is_set():
        plain_http.post(f"{url}/masks", json=body, timeout=60).raise_for_status()
        answers += not done.is_set()
    thread.join()
    assert answers > 0
