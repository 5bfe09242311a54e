"""No work for the dead: what was asked by clients that left is not begun, and costs nobody else anything."""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import httpx
import numpy as np
import pytest

from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from tests.conftest import encoded
from tests.faults.conftest import Report
from tests.running import RunningService
from tests.slow_models import INSTANCES, SlowModels, slow_models

ENCODE_S, DECODE_S = 4.0, 1.0
PERMITS = 6
LEAVERS = 11  # more than the permits: some wait in Triton's queue, some for a permit
ENCODER_CANARIES = 1  # after uploads were given up
CANARIES = 3  # of the gateway's own, one every 2 s, while the queue is looked at

Leave = Callable[[], None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SlowModels:
    return slow_models(tmp_path_factory.mktemp("models"), max_batch=1)


@pytest.fixture(scope="module")
def service(models: SlowModels) -> Iterator[RunningService]:
    """A service whose models take their time, so that there is a queue to leave."""
    settings = {
        "SAM_MODEL_REPOSITORY": str(models.path),
        "SAM_MAX_CONCURRENCY": str(4 * PERMITS),  # a quarter of them for encodes
        "SAM_MAX_WAIT_S": "60",  # they wait to leave
        "SAM_LOG_LEVEL": "error",
    }
    with RunningService.start(**settings) as running:
        models.slow_down(decode_s=DECODE_S, encode_s=ENCODE_S)
        yield running


def pictures() -> Iterator[bytes]:
    """Pictures that nobody has sent yet."""
    generator = np.random.default_rng(time.monotonic_ns())
    while True:
        yield encoded(generator.integers(0, 255, (16, 24, 3), np.uint8), "PNG")


NEW = pictures()


def http_call(service: RunningService, method: str, path: str, content_type: str, body: bytes) -> Leave:
    sock = socket.create_connection(("127.0.0.1", int(service.settings["SAM_HTTP_PORT"])))
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: me\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    sock.sendall(head.encode() + body)
    return sock.close


@contextmanager
def callers(
    service: RunningService, transport: str
) -> Iterator[tuple[Callable[[str, bytes], Leave], Callable[[], Leave]]]:
    """Two functions of a transport that begin an upload, or a prompt, and return how to leave it."""
    if transport == "http":
        prompt = b'{"prompts": [{"points": [[5, 5, 1]]}]}'
        yield (
            lambda name, image: http_call(service, "PUT", f"/v1/images/{name}", "image/png", image),
            lambda: http_call(service, "POST", "/v1/images/known/masks", "application/json", prompt),
        )
        return
    with grpc.insecure_channel(service.grpc_address) as channel:
        stub = pb_grpc.SegmentAnythingStub(channel)
        click = pb.SegmentRequest(image_id="known", prompts=[pb.Prompt(points=[pb.Point(x=5, y=5, label=1)])])
        yield (
            lambda name, image: stub.EmbedImage.future(pb.EmbedImageRequest(image_id=name, image=image)).cancel,
            lambda: stub.Segment.future(click).cancel,
        )


def upload(service: RunningService, image_id: str, image: bytes) -> httpx.Response:
    return httpx.put(f"{service.url}/v1/images/{image_id}", content=image, timeout=30)


def cancelled(service: RunningService) -> float:
    return sum(value for name, value in service.metrics().items() if 'outcome="cancelled"' in name)


def ended(service: RunningService) -> float:
    """How many prompts were answered, refused or left."""
    routes = ("POST /v1/images/{image_id}/masks", "Segment")
    return sum(
        value
        for name, value in service.metrics().items()
        if name.startswith("sam_requests_total") and any(f'route="{route}"' in name for route in routes)
    )


def seconds_until(holds: Callable[[], bool], timeout_s: float = 30.0) -> float:
    start_s = time.monotonic()
    while not holds():
        assert time.monotonic() < start_s + timeout_s
        time.sleep(0.002)
    return time.monotonic() - start_s


def under_way(service: RunningService, lane: str) -> float:
    """How many requests are let in or wait to be: some are in Triton's queue then, the others in the gateway's."""
    metrics = service.metrics()
    names = ("sam_requests_in_flight", "sam_requests_waiting")
    return sum(metrics.get(f'{name}{{lane="{lane}"}}', 0.0) for name in names)


def leave_together(service: RunningService, leaves: list[Leave]) -> float:
    """Have all leave; return how long it took until the last one's work had ended."""
    before = cancelled(service)
    for leave in leaves:
        leave()
    return seconds_until(lambda: cancelled(service) >= before + len(leaves))


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_no_encode_begins_for_callers_that_left(
    models: SlowModels,
    service: RunningService,
    transport: str,
    full: bool,  # noqa: FBT001 - pytest passes it
    report: Report,
) -> None:
    before = models.ran("sam_encoder")
    with ThreadPoolExecutor() as pool, callers(service, transport) as (begin_upload, _):
        staying = pool.submit(upload, service, "stays", next(NEW))
        time.sleep(ENCODE_S / 4)  # its encode has begun
        leaves = [begin_upload(f"left{number}", next(NEW)) for number in range(LEAVERS)]
        seconds_until(lambda: under_way(service, "encode") >= LEAVERS + 1)
        took_s = leave_together(service, leaves)
        time.sleep(0.3)  # for the word to reach Triton
        assert not staying.done(), "the machine is too slow for this test: raise ENCODE_S"
        assert staying.result().status_code in (200, 201)
    time.sleep(ENCODE_S / 2)
    begun = models.ran("sam_encoder") - before - 1
    assert begun <= ENCODER_CANARIES
    assert not full or took_s < 0.05
    report(
        "no work for the dead",
        f"leaving ends all work in <= 50 ms ({transport})",
        f"{1e3 * took_s:.0f} ms for {LEAVERS}",
    )
    report("no work for the dead", f"0 encodes but a canary start for callers that left ({transport})", f"{begun}")


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_no_prompt_is_decoded_for_callers_that_left(
    models: SlowModels, service: RunningService, transport: str
) -> None:
    assert upload(service, "known", encoded(np.zeros((16, 24, 3), np.uint8), "PNG")).is_success
    before, answered, start_s = models.ran("sam_decoder"), ended(service), time.monotonic()
    with callers(service, transport) as (_, begin_prompt):
        leaves = [begin_prompt() for _ in range(LEAVERS)]
        seconds_until(lambda: under_way(service, "prompt") >= LEAVERS)
        for leave in leaves:
            leave()
        seconds_until(lambda: ended(service) == answered + LEAVERS)
    meanwhile = (time.monotonic() - start_s) / DECODE_S  # one decode at a time in each instance
    time.sleep(3 * DECODE_S)
    assert models.ran("sam_decoder") - before <= INSTANCES * (1 + meanwhile) + CANARIES


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_a_shared_encode_survives_its_leader(models: SlowModels, service: RunningService, transport: str) -> None:
    image, before = next(NEW), models.ran("sam_encoder")
    with ThreadPoolExecutor() as pool, callers(service, transport) as (begin_upload, _):
        leave = begin_upload("shared", image)
        time.sleep(ENCODE_S / 4)
        following = pool.submit(upload, service, "shared", image)
        time.sleep(ENCODE_S / 4)
        leave_together(service, [leave])
        assert following.result().status_code in (200, 201)
    assert models.ran("sam_encoder") == before + 1


def test_a_caller_that_leaves_while_sending_is_nobody_s_error(service: RunningService) -> None:
    before = cancelled(service)
    with socket.create_connection(("127.0.0.1", int(service.settings["SAM_HTTP_PORT"]))) as sock:
        sock.sendall(b"PUT /v1/images/half HTTP/1.1\r\nhost: me\r\ncontent-length: 1000\r\n\r\n" + bytes(500))
        time.sleep(0.2)
    seconds_until(lambda: cancelled(service) == before + 1)


def test_an_answer_is_never_cut_short(service: RunningService) -> None:
    """The end of an answer looks like a disconnect to whoever listens for one: nobody may be ended by it."""
    before = cancelled(service)
    with httpx.Client(base_url=service.url, timeout=30) as client:
        for _ in range(100):
            assert (
                client.post("/v1/images/nothing/masks", json={"prompts": [{"points": [[1, 1, 1]]}]}).status_code == 404
            )
    assert cancelled(service) == before
