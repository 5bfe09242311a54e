"""No work for the dead: what was asked by clients that left is not begun, and costs nobody else anything.

Triton takes those that were given up out of its queue when it next looks there, and counts them as pending until then.
So what is timed is the word that they are given up, on the cable to Triton; what comes of it is counted in the model.
"""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
import httpx
import numpy as np
import pytest

from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from tests import plain_http
from tests.cable import Cable, cable_to
from tests.conftest import encoded
from tests.faults.conftest import Report
from tests.raw_http2 import call, connection, message
from tests.running import RunningService, free_settings, triton_alone
from tests.slow_models import INSTANCES, SlowModels, slow_models

PROMISE = "no work for the dead"
ENCODE_S, DECODE_S = 4.0, 1.0
EARLY_MS = -20  # clocks are read at both ends
PERMITS = 6
LATE, OWN_S = 2, 3.0
LEAVERS = 11  # more than the permits: some wait in Triton's queue, some for a permit
CANARIES = 3  # of the gateway's own, one every 2 s, while the queue is looked at

Leave = Callable[[], None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SlowModels:
    return slow_models(tmp_path_factory.mktemp("models"), max_batch=1)


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    return free_settings()


@pytest.fixture(scope="module")
def cable(models: SlowModels, settings: dict[str, str]) -> Iterator[Cable]:
    """The way to a Triton whose models can be slowed down."""
    address = settings["SAM_TRITON_URL"]
    with (
        triton_alone(address, settings["SAM_TRITON_METRICS_PORT"], models.path),
        cable_to(int(address.rpartition(":")[2])) as cable,
    ):
        yield cable


@pytest.fixture(scope="module")
def service(models: SlowModels, settings: dict[str, str], cable: Cable) -> Iterator[RunningService]:
    """A service whose models take their time, so that there is a queue to leave."""
    patient = {
        **settings,
        "SAM_TRITON_URL": f"127.0.0.1:{cable.port}",
        "SAM_MAX_CONCURRENCY": str(4 * PERMITS),  # a quarter of them for encodes
        "SAM_MAX_WAIT_S": "60",  # they wait to leave
        "SAM_LOG_LEVEL": "error",
    }
    with RunningService.start(embedded=False, **patient) as running:
        models.slow_down(decode_s=DECODE_S, encode_s=ENCODE_S)
        yield running


def pictures() -> Iterator[bytes]:
    """Pictures that nobody has sent yet."""
    generator = np.random.default_rng(time.monotonic_ns())
    while True:
        yield encoded(generator.integers(0, 255, (16, 24, 3), np.uint8), "PNG")


NEW = pictures()


def http_call(service: RunningService, method: str, path: str, body: bytes, *headers: str) -> Leave:
    sock = socket.create_connection(("127.0.0.1", int(service.settings["SAM_HTTP_PORT"])))
    lines = [f"{method} {path} HTTP/1.1", "host: me", f"content-length: {len(body)}", *headers, "", ""]
    sock.sendall("\r\n".join(lines).encode() + body)
    return sock.close


def patient_upload(service: RunningService, transport: str, image: bytes) -> Leave:
    """Begin an upload with a deadline, by a client that does not end it itself when that has passed."""
    if transport == "http":
        return http_call(service, "PUT", "/v1/images/late", image, f"x-request-timeout: {OWN_S}")
    asked = pb.EmbedImageRequest(image_id="late", image=image).SerializeToString()
    timeout = (b"grpc-timeout", f"{1000 * OWN_S:.0f}m".encode())
    stack = ExitStack()
    sock = stack.enter_context(connection(service.grpc_address))
    sock.sendall(call(1, b"/sam.v1.SegmentAnything/EmbedImage", timeout) + message(1, asked))
    return stack.close


@contextmanager
def callers(
    service: RunningService, transport: str
) -> Iterator[tuple[Callable[[str, bytes], Leave], Callable[[], Leave]]]:
    """Two functions of a transport that begin an upload, or a prompt, and return how to leave it."""
    if transport == "http":
        prompt = b'{"prompts": [{"points": [[5, 5, 1]]}]}'
        yield (
            lambda name, image: http_call(service, "PUT", f"/v1/images/{name}", image),
            lambda: http_call(service, "POST", "/v1/images/known/masks", prompt, "content-type: application/json"),
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
    return plain_http.put(f"{service.url}/v1/images/{image_id}", content=image, timeout=30)


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


@contextmanager
def encode_under_way(service: RunningService) -> Iterator[None]:
    """An upload whose encode has begun and is not over at the end of the block; it is answered."""
    with ThreadPoolExecutor() as pool:
        staying = pool.submit(upload, service, "stays", next(NEW))
        time.sleep(ENCODE_S / 4)
        yield
        assert not staying.done(), "the machine is too slow for this test: raise ENCODE_S"
        assert staying.result().status_code in (200, 201)


def queued(service: RunningService, uploads: int) -> int:
    """Return how many uploads wait in Triton's queue, once all are under way and it says that they have come."""
    seconds_until(lambda: under_way(service, "encode") >= uploads + 1)
    waiting = int(service.metrics()['sam_requests_in_flight{lane="encode"}']) - 1
    seconds_until(lambda: service.triton_count("sam_encoder", "nv_inference_pending_request_count") >= waiting > 0)
    return waiting


def reached_triton_ms(cable: Cable, before: int, count: int, since_s: float) -> float:
    """Return how long after `since_s` Triton had been told to give up `count` calls more than `before`."""
    seconds_until(lambda: len(cable.given_up_s) >= before + count)
    return 1000 * (cable.given_up_s[before + count - 1] - since_s)


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_a_deadline_that_passes_reaches_triton(
    service: RunningService,
    cable: Cable,
    transport: str,
    full: bool,  # noqa: FBT001 - pytest passes it
    report: Report,
) -> None:
    """Those who asked are still there; what is given up is their calls."""
    with encode_under_way(service), ExitStack() as asking:
        given_up = len(cable.given_up_s)
        for _ in range(LATE):
            start_s = time.monotonic()
            asking.callback(patient_upload(service, transport, next(NEW)))
        assert queued(service, LATE) == LATE
        reached_ms = reached_triton_ms(cable, given_up, LATE, start_s + OWN_S)
    in_time = EARLY_MS <= reached_ms <= 50 or not full
    figure = f"a deadline reaches Triton in <= 50 ms ({transport})"
    report(PROMISE, figure, f"{reached_ms:.0f} ms until the last of {LATE} in its queue is reset", kept=in_time)
    assert in_time


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_no_encode_begins_for_callers_that_left(
    models: SlowModels,
    service: RunningService,
    cable: Cable,
    transport: str,
    full: bool,  # noqa: FBT001 - pytest passes it
    report: Report,
) -> None:
    before = models.ran("sam_encoder")
    with callers(service, transport) as (begin_upload, _), encode_under_way(service):
        leaves = [begin_upload(f"left{number}", next(NEW)) for number in range(LEAVERS)]
        waiting, given_up, start_s = queued(service, LEAVERS), len(cable.given_up_s), time.monotonic()
        ended_ms = 1000 * leave_together(service, leaves)
        reached_ms = reached_triton_ms(cable, given_up, waiting, start_s)
        time.sleep(0.3)  # for the word to reach Triton's queue
    time.sleep(ENCODE_S / 2)
    begun = models.ran("sam_encoder") - before - 1
    in_time = reached_ms <= 50 or not full
    figure = f"leaving reaches Triton in <= 50 ms ({transport})"
    report(PROMISE, figure, f"{reached_ms:.0f} ms until the last of {waiting} in its queue is reset", kept=in_time)
    report(PROMISE, f"... and ends all work ({transport})", f"{ended_ms:.0f} ms for {LEAVERS}, as the gateway counts")
    figure = f"0 encodes start for callers that left ({transport})"
    report(PROMISE, figure, f"{begun} for {LEAVERS}", kept=begun == 0)
    assert begun == 0
    assert in_time


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
def test_a_shared_encode_survives_its_leader(
    models: SlowModels, service: RunningService, transport: str, report: Report
) -> None:
    image, before = next(NEW), models.ran("sam_encoder")
    with ThreadPoolExecutor() as pool, callers(service, transport) as (begin_upload, _):
        leave = begin_upload("shared", image)
        time.sleep(ENCODE_S / 4)
        following = pool.submit(upload, service, "shared", image)
        time.sleep(ENCODE_S / 4)
        leave_together(service, [leave])
        code = following.result().status_code
    begun = models.ran("sam_encoder") - before
    report(PROMISE, f"a shared encode survives its leader ({transport})", f"the other got {code}, of {begun} encode")
    assert code in (200, 201)
    assert begun == 1


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
