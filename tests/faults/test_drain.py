"""Drain loses nothing: gateways are ended under load, one after the other, and clients that obey notice nothing.

To obey is: on `draining`, `overloaded` or `model_unavailable`, and when a connection is refused or lost, ask again
after the wait that was told, at the other gateway. Every call of the API may be repeated.
"""

import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.cache.files import discard_arenas
from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from tests.faults.conftest import Report
from tests.running import RunningService, free_ports, free_settings, triton_alone

DRAIN_S = 10
PATIENCE_S = 60.0  # of a client, for one answer
MAX_BACKOFF_S = 0.5
PAUSE_S = 0.03  # of a client, after each answer
BODY = {"prompts": [{"points": [[100, 100, 1]]}]}
CLICK = pb.Prompt(points=[pb.Point(x=100, y=100, label=1)])
COME_BACK = (429, 503)
COME_BACK_GRPC = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


@pytest.fixture(scope="module")
def triton() -> Iterator[str]:
    """Yield the address of a Triton that outlives the gateways."""
    port, metrics_port = free_ports(2)
    with triton_alone(f"127.0.0.1:{port}", str(metrics_port)):
        yield f"127.0.0.1:{port}"


class Gateway:
    """One gateway that is ended and started again, on the same ports, with the same cache."""

    def __init__(self, triton: str) -> None:
        self.settings = {**free_settings(), "SAM_TRITON_URL": triton, "SAM_DRAIN_S": str(DRAIN_S)}
        self._running: AbstractContextManager[RunningService] | None = None
        self.service: RunningService | None = None

    def start(self) -> None:
        self._running = RunningService.launch(embedded=False, keep_cache=True, **self.settings, SAM_LOG_LEVEL="error")
        self.service = self._running.__enter__()
        self.service.wait_for("/readyz", 200)
        self.service.wait_for_workers()

    def end(self) -> float:
        """SIGTERM it; return how long it took to end. That it ends with 0 and leaves no process is checked too."""
        assert self._running is not None
        began_s = time.monotonic()
        self._running.__exit__(None, None, None)
        return time.monotonic() - began_s

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings['SAM_HTTP_PORT']}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.settings['SAM_GRPC_PORT']}"


@pytest.fixture
def gateways(triton: str, cat: bytes) -> Iterator[list[Gateway]]:
    both = [Gateway(triton), Gateway(triton)]
    with ExitStack() as stack:
        for gateway in both:
            gateway.start()
            stack.callback(discard_arenas, f"sam-{gateway.settings['SAM_HTTP_PORT']}")
            stack.callback(gateway.end)
            httpx.put(f"{gateway.url}/v1/images/cat", content=cat).raise_for_status()
        yield both


class Clients:
    """Clients in threads of their own, which go on until told to stop."""

    def __init__(self, gateways: list[Gateway]) -> None:
        self._gateways = gateways
        self._stop = threading.Event()
        self._connections = ExitStack()
        self.outcomes: Counter[str] = Counter()
        self.repeats: Counter[str] = Counter()

    def run(self, ask: Callable[[int], tuple[str, float | None]]) -> threading.Thread:
        """Keep asking; `ask` takes the number of the gateway to ask and returns an outcome, and when to come back."""

        def keep_asking() -> None:
            where = 0
            while not self._stop.is_set():
                patience_s = time.monotonic() + PATIENCE_S
                outcome, wait_s = ask(where)
                while wait_s is not None and time.monotonic() < patience_s:
                    self.repeats[outcome] += 1
                    time.sleep(min(wait_s, MAX_BACKOFF_S))
                    where = 1 - where
                    outcome, wait_s = ask(where)
                self.outcomes[outcome] += 1
                time.sleep(PAUSE_S)

        thread = threading.Thread(target=keep_asking)
        thread.start()
        return thread

    def stop(self, threads: list[threading.Thread]) -> None:
        self._stop.set()
        for thread in threads:
            thread.join()
        self._connections.close()

    def over_http(self, method: str, path: Callable[[], str], **body: object) -> threading.Thread:
        clients = [
            self._connections.enter_context(httpx.Client(base_url=gateway.url, timeout=30))
            for gateway in self._gateways
        ]

        def ask(where: int) -> tuple[str, float | None]:
            try:
                answer = clients[where].request(method, path(), **body)
            except httpx.TransportError as error:
                return type(error).__name__, 0.1
            if answer.status_code in COME_BACK:
                return answer.json()["reason"], float(answer.headers["retry-after"])
            return ("ok", None) if answer.is_success else (answer.text, None)

        return self.run(ask)

    def over_grpc(self) -> threading.Thread:
        channels = [
            self._connections.enter_context(grpc.insecure_channel(gateway.grpc_address)) for gateway in self._gateways
        ]
        stubs = [pb_grpc.SegmentAnythingStub(channel) for channel in channels]

        def ask(where: int) -> tuple[str, float | None]:
            try:
                stubs[where].Segment(pb.SegmentRequest(image_id="cat", prompts=[CLICK]), timeout=30)
            except grpc.RpcError as error:
                pushback = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
                outcome = f"{error.code().name}{'' if pushback else ', no connection'}"
                return outcome, int(pushback or 100) / 1000 if error.code() in COME_BACK_GRPC else None
            return "ok", None

        return self.run(ask)


def test_gateways_that_are_ended_under_load_lose_no_request(
    gateways: list[Gateway], cat: bytes, report: Report, *, full: bool
) -> None:
    clients, numbers = Clients(gateways), itertools.count()
    threads = [
        *(clients.over_http("POST", lambda: "/v1/images/cat/masks", json=BODY) for _ in range(2)),
        clients.over_http("PUT", lambda: f"/v1/images/new-{next(numbers)}", content=cat),
        *(clients.over_grpc() for _ in range(2)),
    ]
    rounds, longest_s = 50 if full else 3, 0.0
    try:
        for number in range(rounds):
            time.sleep(0.5)
            gateway = gateways[number % 2]
            longest_s = max(longest_s, gateway.end())
            gateway.start()
    finally:
        clients.stop(threads)
    failed = clients.outcomes.total() - clients.outcomes["ok"]
    report(
        "drain loses nothing",
        f"{rounds} SIGTERMs: 0 failed requests, 0 orphans, exit within the grace",
        f"{failed} of {clients.outcomes.total()} failed, {clients.repeats.total()} repeats, "
        f"longest exit {longest_s:.1f} s of {DRAIN_S}",
    )
    assert set(clients.outcomes) == {"ok"}
    assert clients.outcomes["ok"] > 10 * rounds
    assert clients.repeats  # the clients did meet gateways that were going or gone
    assert not full or longest_s < DRAIN_S


def test_for_a_while_after_sigterm_requests_are_answered_by_a_gateway_that_says_it_is_going(
    triton: str, cat: bytes
) -> None:
    """So that balancers look elsewhere before a connection is refused."""
    with (
        RunningService.start(
            embedded=False, SAM_TRITON_URL=triton, SAM_DRAIN_DELAY_S="3", SAM_LOG_LEVEL="error"
        ) as service,
        httpx.Client(base_url=service.url) as kept,
        closing(grpc.insecure_channel(service.grpc_address)) as channel,
    ):
        assert "connection" not in kept.put("/v1/images/cat", content=cat).raise_for_status().headers
        health = health_pb2_grpc.HealthStub(channel)
        os.kill(service.process.pid, signal.SIGTERM)
        service.wait_for("/readyz", 503)
        answer = kept.post("/v1/images/cat/masks", json=BODY)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert httpx.get(f"{service.url}/readyz").json() == {"status": "draining"}
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as draining:
            keep_asking(pb_grpc.SegmentAnythingStub(channel))
        assert draining.value.code() is grpc.StatusCode.UNAVAILABLE
        assert dict(draining.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        assert code_of_a_call_without_a_message(channel) is grpc.StatusCode.UNAVAILABLE
        assert service.process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            kept.get("/readyz")


def keep_asking(stub: pb_grpc.SegmentAnythingStub) -> None:
    for number in itertools.count():
        try:
            stub.Segment(pb.SegmentRequest(image_id="cat", prompts=[CLICK]))
        except grpc.RpcError:
            assert number > 0
            raise
        time.sleep(0.02)


def code_of_a_call_without_a_message(channel: grpc.Channel) -> grpc.StatusCode:
    done = threading.Event()

    def unsent() -> Iterator[bytes]:
        done.wait(10)
        yield b""

    with pytest.raises(grpc.RpcError) as caught:
        channel.stream_unary("/sam.v1.SegmentAnything/EmbedImage")(unsent(), timeout=5)
    done.set()
    code: grpc.StatusCode = caught.value.code()
    return code
