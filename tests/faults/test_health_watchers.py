"""Who watches the service's health hears of every change, and stands in the way of nobody: not even by not reading."""

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from tests import plain_http
from tests.raw_http2 import DATA, END_STREAM, SETTINGS, call, connection, frame
from tests.running import RunningService, triton_ready, triton_under
from tests.slow_models import SlowModels, slow_models

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
DRAIN_S = 30
ENDED_S = 10.0  # what a busy machine may take to end, with nothing to wait for
HEARD_S = 15.0
DECODE_S = 3.0
CLICK = pb.Prompt(points=[pb.Point(x=100, y=100, label=1)])
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
INITIAL_WINDOW_SIZE = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SlowModels:
    return slow_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def triton(models: SlowModels) -> Iterator[tuple[str, int]]:
    """Yield the address and the pid of a Triton that outlives the gateways."""
    with triton_ready(models.path) as (address, pid):
        yield address, triton_under(pid)


@pytest.fixture
def service(triton: tuple[str, int], tmp_path: Path) -> Iterator[RunningService]:
    """A gateway of one worker, which in the end has left no traceback in its log."""
    settings = {"SAM_TRITON_URL": triton[0], "SAM_DRAIN_S": str(DRAIN_S), "SAM_LOG_LEVEL": "error"}
    with (tmp_path / "log").open("w") as log, RunningService.start(embedded=False, log=log, **settings) as running:
        yield running
    assert not (tmp_path / "log").read_text()


def until(holds: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"it did not come to pass within {timeout_s} s"
        time.sleep(0.02)


@dataclass
class Watcher:
    """What one client hears, over a connection of its own, and the code with which that ended."""

    statuses: list[int] = field(default_factory=list)
    code: grpc.StatusCode | None = None

    def hear(self, answers: grpc.Call) -> None:
        with suppress(grpc.RpcError):
            self.statuses.extend(answer.status for answer in answers)
        self.code = answers.code()

    def wait_for(self, *statuses: int) -> None:
        until(lambda: self.statuses == list(statuses), HEARD_S)


@contextmanager
def watching(service: RunningService) -> Iterator[Watcher]:
    """Watch during the block, from when the service was heard to serve."""
    watcher = Watcher()
    with grpc.insecure_channel(service.grpc_address, OWN_CONNECTION) as channel:
        answers = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        hearing = threading.Thread(target=watcher.hear, args=(answers,))
        hearing.start()
        try:
            watcher.wait_for(SERVING)
            yield watcher
        finally:
            answers.cancel()
            hearing.join()


@contextmanager
def watching_without_reading(service: RunningService) -> Iterator[socket.socket]:
    """Watch during the block, and leave no room for any answer."""
    message = b"\0" + struct.pack(">I", 0)
    with connection(service.grpc_address) as sock:
        sock.sendall(frame(SETTINGS, payload=struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)))
        sock.sendall(call(1, b"/grpc.health.v1.Health/Watch") + frame(DATA, 1, message, END_STREAM))
        time.sleep(0.5)
        yield sock


def checked(service: RunningService) -> int:
    with grpc.insecure_channel(service.grpc_address, OWN_CONNECTION) as channel:
        status: int = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10).status
        return status


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def ended_s(service: RunningService) -> float:
    """SIGTERM the service; return how long it took to end."""
    began_s = time.monotonic()
    assert service.stop() == 0
    return time.monotonic() - began_s


def test_a_watcher_hears_that_the_model_is_gone_though_another_has_left(
    service: RunningService, triton: tuple[str, int]
) -> None:
    with watching(service) as stays:
        with watching(service):
            pass
        with frozen(triton[1]):
            stays.wait_for(SERVING, NOT_SERVING)
        stays.wait_for(SERVING, NOT_SERVING, SERVING)


def test_a_watcher_that_does_not_read_keeps_nobody_from_the_truth(
    service: RunningService, triton: tuple[str, int]
) -> None:
    with watching(service) as other, watching_without_reading(service):
        with frozen(triton[1]):
            other.wait_for(SERVING, NOT_SERVING)
            assert checked(service) == NOT_SERVING
        other.wait_for(SERVING, NOT_SERVING, SERVING)
        assert checked(service) == SERVING


def test_a_drain_answers_what_is_under_way_and_waits_for_no_watcher(
    service: RunningService, models: SlowModels, cat: bytes
) -> None:
    """One that does not read, and one that does: it is told, and its watch ends so that it looks elsewhere."""
    plain_http.put(f"{service.url}/v1/images/cat", content=cat).raise_for_status()
    with (
        watching(service) as watcher,
        watching_without_reading(service),
        grpc.insecure_channel(service.grpc_address) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        request = pb.SegmentRequest(image_id="cat", prompts=[CLICK])
        models.slow_down(decode_s=DECODE_S)
        try:
            under_way = pool.submit(pb_grpc.SegmentAnythingStub(channel).Segment, request, timeout=DRAIN_S)
            time.sleep(DECODE_S / 3)
            took_s = ended_s(service)
        finally:
            models.slow_down()
        assert len(under_way.result().results) == 1
        until(lambda: watcher.code, HEARD_S)
        assert (watcher.statuses, watcher.code) == ([SERVING, NOT_SERVING], grpc.StatusCode.UNAVAILABLE)
    assert took_s < ENDED_S


def test_a_watcher_does_not_prolong_a_drain(service: RunningService) -> None:
    with watching(service) as watcher:
        assert ended_s(service) < ENDED_S
        until(lambda: watcher.code, HEARD_S)
        assert (watcher.statuses, watcher.code) == ([SERVING, NOT_SERVING], grpc.StatusCode.UNAVAILABLE)
