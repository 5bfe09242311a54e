"""A photograph in, a mask out, through the real gateway and the real Triton; the second prompt without the encoder."""

import concurrent.futures
import io
import time

import grpc
import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from service.upkeep import PROBE_EVERY_S
from tests import plain_http
from tests.conftest import encoded
from tests.running import RunningService

BODY = {"prompts": [{"points": [[270, 200, 1]], "box": [100, 50, 500, 350]}]}
PB_PROMPT = pb.Prompt(points=[pb.Point(x=270, y=200, label=1)], box=pb.Box(x0=100, y0=50, x1=500, y1=350))


def test_a_photograph_becomes_an_equal_mask_over_both_transports(service: RunningService, coffee: bytes) -> None:
    plain_http.put(f"{service.url}/v1/images/first", content=coffee).raise_for_status()
    answer = plain_http.post(f"{service.url}/v1/images/first/masks", json=BODY).raise_for_status().json()
    rle = answer["results"][0]["masks"][0]["rle"]
    over_http = coco.decode(rle)
    with grpc.insecure_channel(service.grpc_address) as channel:
        stub = pb_grpc.SegmentAnythingStub(channel)
        mask = stub.Segment(pb.SegmentRequest(image_id="first", prompts=[PB_PROMPT])).results[0].masks[0]
    over_grpc = coco.decode({"size": [400, 600], "counts": mask.rle_counts})
    assert over_http.shape == (400, 600)
    assert over_http.any()
    np.testing.assert_array_equal(over_http, over_grpc)


def test_after_one_upload_twenty_prompts_leave_the_encoder_alone(service: RunningService, astronaut: bytes) -> None:
    plain_http.put(f"{service.url}/v1/images/skip", content=astronaut).raise_for_status()
    encodes, decodes = service.triton_count("sam_encoder"), service.triton_count("sam_decoder")
    began_s = time.monotonic()
    for index in range(20):
        prompt = {"points": [[20 * index, 100, 1]]}
        answer = plain_http.post(f"{service.url}/v1/images/skip/masks", json={"prompts": [prompt]}).raise_for_status()
        assert answer.json()["cache"] == "memory"
        assert answer.json()["timings_ms"]["encode"] == 0
    assert service.triton_count("sam_encoder") == encodes
    made = service.triton_count("sam_decoder") - decodes
    canaries = 2 + (time.monotonic() - began_s) / PROBE_EVERY_S  # the readiness probe decodes too
    assert 20 <= made <= 20 + canaries


def test_concurrent_prompts_are_merged_into_batches(service: RunningService, coffee: bytes, cat: bytes) -> None:
    """Also prompts on different images: the batch axis is images."""
    for name, data in (("batch-a", coffee), ("batch-b", cat)):
        plain_http.put(f"{service.url}/v1/images/{name}", content=data).raise_for_status()
    count, executions = (service.triton_count("sam_decoder", f"nv_inference_{what}count") for what in ("", "exec_"))
    with httpx.Client(base_url=service.url) as client, concurrent.futures.ThreadPoolExecutor(16) as pool:

        def prompt(index: int) -> str:
            body = {"prompts": [{"points": [[10 + index % 200, 20, 1]]}]}
            answer = client.post(f"/v1/images/batch-{'ab'[index % 2]}/masks", json=body).raise_for_status()
            return str(answer.json()["results"][0]["masks"][0]["rle"]["counts"])

        together = list(pool.map(prompt, range(200)))
        alone = [prompt(index) for index in (0, 1, 100, 101)]
    merged = service.triton_count("sam_decoder") - count
    runs = service.triton_count("sam_decoder", "nv_inference_exec_count") - executions
    assert merged >= 204
    assert runs < merged
    agreement = [iou(together[index], single) for index, single in zip((0, 1, 100, 101), alone, strict=True)]
    assert min(agreement) > 0.999


def iou(first: str, second: str) -> float:
    """Return the IoU of two masks, given as counts, of any one image."""
    masks = [{"size": [400, 600] if len(first) else [1, 1], "counts": counts.encode()} for counts in (first, second)]
    return 1.0 if first == second else float(coco.iou(masks[:1], masks[1:], [0])[0, 0])


@pytest.mark.parametrize(
    ("image_format", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("WEBP", "RGB", {}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"exif_orientation": 6}),
        ("PNG", "RGB", {"exif_orientation": 8}),
    ],
)
def test_every_kind_of_photograph_is_taken_and_measured_as_a_person_sees_it(
    service: RunningService, cat: bytes, image_format: str, mode: str, options: dict[str, int]
) -> None:
    picture = Image.open(io.BytesIO(cat)).convert(mode)
    saving = {}
    if orientation := options.get("exif_orientation"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        saving["exif"] = exif
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **saving)
    answer = plain_http.put(f"{service.url}/v1/images/kind", content=buffer.getvalue()).raise_for_status().json()
    assert answer["size"] == ([451, 300] if orientation else [300, 451])


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 900, 3), (900, 1, 3), (17, 23, 3), (2000, 3000, 3)])
def test_any_size_comes_back_as_it_was(service: RunningService, shape: tuple[int, int, int]) -> None:
    data = encoded(np.random.default_rng(0).integers(0, 255, shape, np.uint8), "PNG", compress_level=1)
    plain_http.put(f"{service.url}/v1/images/size", content=data).raise_for_status()
    box = {"box": [0, 0, shape[1], shape[0]]}
    answer = plain_http.post(f"{service.url}/v1/images/size/masks", json={"prompts": [box]}).raise_for_status().json()
    assert coco.decode(answer["results"][0]["masks"][0]["rle"]).shape == shape[:2]


def test_metrics_count_what_happened(service: RunningService, cat: bytes) -> None:
    before = service.metrics()
    plain_http.put(f"{service.url}/v1/images/metrics", content=cat).raise_for_status()
    plain_http.put(f"{service.url}/v1/images/metrics", content=cat).raise_for_status()
    plain_http.post(f"{service.url}/v1/images/metrics/masks", json={"prompts": [{"points": [[1, 1, 1]]}] * 3})
    plain_http.post(f"{service.url}/v1/images/metrics/masks", json={"prompts": []})
    after = service.metrics()

    def rise(name: str) -> float:
        return after[name] - before.get(name, 0)

    route = 'route="POST /v1/images/{image_id}/masks",transport="http"'
    assert rise("sam_cache_misses_total") == 1
    assert rise('sam_cache_hits_total{level="memory"}') == 2
    assert rise("sam_cache_entries") == 1
    assert rise("sam_cache_bytes") >= plain_http.get(f"{service.url}/v1/images/metrics").json()["embedding_bytes"]
    assert after["sam_cache_bytes"] <= after["sam_cache_capacity_bytes"]
    assert rise("sam_prompts_total") == 3
    assert rise(f'sam_requests_total{{outcome="ok",{route}}}') == 1
    assert rise(f'sam_requests_total{{outcome="invalid_prompt",{route}}}') == 1
    assert rise(f"sam_request_seconds_count{{{route}}}") == 2
    for stage in ("queue", "encode", "decode", "masks"):
        assert rise(f'sam_stage_seconds_count{{stage="{stage}"}}') >= 1
