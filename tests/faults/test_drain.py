"""Drain loses nothing: gateways are ended under load, one after the other, and clients that obey notice nothing.

To obey is what balancers and good clients do. Ask again, at the other gateway and after the wait that was told, when an
answer says so (`draining`, `overloaded`, `model_unavailable`), or when no connection was made. Leave a gateway whose
answer says `connection: close`, or whose health says NOT_SERVING. A connection that ends with a request on it says
nothing of this: such a request is lost, though its client asks again.
"""

import itertools
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from enum import StrEnum
from typing import NamedTuple

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.cache.files import discard_arenas
from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from service.rpc.server import SERVICE
from tests import plain_http
from tests.faults.conftest import Report
from tests.running import RunningService, free_ports, free_settings, triton_alone

DRAIN_S = 10
DRAIN_DELAY_S = 0.5  # until ports close: what balancers need to notice, which these clients do with their next answer
PATIENCE_S = 60.0  # of a client, for one answer
MAX_BACKOFF_S = 0.5
PAUSE_S = 0.03  # of a client, after each answer
BODY = {"prompts": [{"points": [[100, 100, 1]]}]}
CLICK = pb.Prompt(points=[pb.Point(x=100, y=100, label=1)])
COME_BACK = ("draining", "overloaded", "model_unavailable")
BALANCED = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": SERVICE}}
RECONNECT = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200)]


class Kind(StrEnum):
    """What became of a request, sent once."""

    OK = "ok"
    TOLD = "told"  # it was not begun, and the client knows: by an answer, or because no connection was made
    LOST = "lost"  # the connection ended with the request on it
    FAILED = "failed"


class Outcome(NamedTuple):
    """Of one request: `wait_s` until it is sent again, `leave` when the answer says that the gateway is going."""

    kind: Kind
    words: str = ""
    wait_s: float = 0.1
    leave: bool = False


@pytest.fixture(scope="module")
def triton() -> Iterator[str]:
    """Yield the address of a Triton that outlives the gateways."""
    port, metrics_port = free_ports(2)
    with triton_alone(f"127.0.0.1:{port}", str(metrics_port)):
        yield f"127.0.0.1:{port}"


class Gateway:
    """One gateway of two workers that is ended and started again, on the same ports, with the same cache."""

    def __init__(self, triton: str) -> None:
        self.settings = {
            **free_settings(),
            "SAM_WORKERS": "2",
            "SAM_TRITON_URL": triton,
            "SAM_DRAIN_S": str(DRAIN_S),
            "SAM_DRAIN_DELAY_S": str(DRAIN_DELAY_S),
            "SAM_LOG_LEVEL": "error",
        }
        self.url = f"http://127.0.0.1:{self.settings['SAM_HTTP_PORT']}"
        self.grpc_address = f"127.0.0.1:{self.settings['SAM_GRPC_PORT']}"
        self._running: AbstractContextManager[RunningService] | None = None

    def start(self) -> None:
        self._running = RunningService.launch(embedded=False, keep_cache=True, **self.settings)
        service = self._running.__enter__()
        service.wait_for("/readyz", 200)
        service.wait_for_workers()

    def end(self) -> float:
        """SIGTERM it; return how long it took to end. That it ends with 0 and leaves no process is checked too."""
        assert self._running is not None
        began_s = time.monotonic()
        self._running.__exit__(None, None, None)
        return time.monotonic() - began_s


@pytest.fixture
def gateways(triton: str, cat: bytes) -> Iterator[list[Gateway]]:
    both = [Gateway(triton), Gateway(triton)]
    with ExitStack() as stack:
        for gateway in both:
            gateway.start()
            stack.callback(discard_arenas, f"sam-{gateway.settings['SAM_HTTP_PORT']}")
            stack.callback(gateway.end)
            plain_http.put(f"{gateway.url}/v1/images/cat", content=cat).raise_for_status()
        yield both


class Clients:
    """Clients in threads of their own, which go on until told to stop."""

    def __init__(self, gateways: list[Gateway]) -> None:
        self._gateways = gateways
        self._stop = threading.Event()
        self._connections = ExitStack()
        self.answered: list[Outcome] = []
        self.repeated: list[Outcome] = []

    def count(self, kind: Kind) -> int:
        return sum(outcome.kind is kind for outcome in (*self.answered, *self.repeated))

    def words(self, kind: Kind) -> str:
        found = Counter(outcome.words for outcome in (*self.answered, *self.repeated) if outcome.kind is kind)
        return ", ".join(f"{count} {words}" for words, count in found.most_common()) or "none"

    def run(self, ask: Callable[[int], Outcome]) -> threading.Thread:
        """Keep asking; `ask` takes the number of the gateway to ask."""

        def keep_asking() -> None:
            where = 0
            while not self._stop.is_set():
                patience_s = time.monotonic() + PATIENCE_S
                outcome = ask(where)
                while outcome.kind in (Kind.TOLD, Kind.LOST) and time.monotonic() < patience_s:
                    self.repeated.append(outcome)
                    time.sleep(min(outcome.wait_s, MAX_BACKOFF_S))
                    where = 1 - where
                    outcome = ask(where)
                self.answered.append(outcome)
                where = 1 - where if outcome.leave else where
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
        urls = [gateway.url for gateway in self._gateways]
        clients = [self._connections.enter_context(httpx.Client(base_url=url, timeout=30)) for url in urls]

        def ask(where: int) -> Outcome:
            try:
                answer = clients[where].request(method, path(), **body)
            except httpx.ConnectError:
                return Outcome(Kind.TOLD, "no connection over HTTP")
            except httpx.TransportError as error:
                return Outcome(Kind.LOST, f"{type(error).__name__}: {error}")
            leave = answer.headers.get("connection") == "close"
            if answer.is_success:
                return Outcome(Kind.OK, leave=leave)
            reason = answer.json()["reason"]
            if reason in COME_BACK:
                return Outcome(Kind.TOLD, reason, float(answer.headers["retry-after"]))
            return Outcome(Kind.FAILED, answer.text)

        return self.run(ask)

    def over_grpc(self) -> threading.Thread:
        """Ask one gateway until it says that it has no more room for calls, then the other."""
        stubs = [self._stub(gateway.grpc_address, RECONNECT) for gateway in self._gateways]
        return self.run(lambda where: outcome_of_call(stubs[where]))

    def over_balanced_grpc(self) -> threading.Thread:
        """Have gRPC itself share calls out to the gateways whose health is SERVING."""
        target = "ipv4:" + ",".join(gateway.grpc_address for gateway in self._gateways)
        stub = self._stub(target, [*RECONNECT, ("grpc.service_config", json.dumps(BALANCED))])
        return self.run(lambda _: outcome_of_call(stub, wait_for_ready=True))

    def _stub(self, target: str, options: Sequence[tuple[str, object]]) -> pb_grpc.SegmentAnythingStub:
        return pb_grpc.SegmentAnythingStub(self._connections.enter_context(grpc.insecure_channel(target, options)))


def outcome_of_call(stub: pb_grpc.SegmentAnythingStub, *, wait_for_ready: bool = False) -> Outcome:
    request = pb.SegmentRequest(image_id="cat", prompts=[CLICK])
    try:
        stub.Segment(request, timeout=30, wait_for_ready=wait_for_ready)
    except grpc.RpcError as error:
        code, details = error.code(), error.details()
        pushback = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
        if pushback:
            return Outcome(Kind.TOLD, f"{code.name} with pushback", int(pushback) / 1000)
        if code is not grpc.StatusCode.UNAVAILABLE:
            return Outcome(Kind.FAILED, f"{code.name}: {details}")
        if details.startswith("failed to connect"):
            return Outcome(Kind.TOLD, "no connection over gRPC")
        return Outcome(Kind.LOST, f"{code.name}: {details}")
    return Outcome(Kind.OK)


def test_gateways_that_are_ended_under_load_lose_no_request(
    gateways: list[Gateway], cat: bytes, report: Report, *, full: bool
) -> None:
    clients, numbers = Clients(gateways), itertools.count()
    threads = [
        *(clients.over_http("POST", lambda: "/v1/images/cat/masks", json=BODY) for _ in range(2)),
        clients.over_http("PUT", lambda: f"/v1/images/new-{next(numbers)}", content=cat),
        clients.over_grpc(),
        clients.over_balanced_grpc(),
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
    left = sum(outcome.leave for outcome in clients.answered)
    report(
        "drain loses nothing",
        f"{rounds} SIGTERMs: 0 failed or lost requests, 0 orphans, exit within the grace",
        f"{clients.count(Kind.FAILED)} of {len(clients.answered)} failed, lost: {clients.words(Kind.LOST)}, "
        f"told to come back: {clients.words(Kind.TOLD)}, told to leave: {left}, longest exit {longest_s:.1f} s of "
        f"{DRAIN_DELAY_S:g} + {DRAIN_S}",
    )
    assert clients.count(Kind.FAILED) == 0, clients.words(Kind.FAILED)
    assert clients.count(Kind.LOST) == 0, clients.words(Kind.LOST)
    assert {outcome.kind for outcome in clients.answered} == {Kind.OK}
    assert clients.count(Kind.OK) > 10 * rounds
    assert left >= (rounds if full else 1)  # whoever came before the ports closed was told
    assert "UNAVAILABLE with pushback" in clients.words(Kind.TOLD)
    assert not full or longest_s < DRAIN_DELAY_S + DRAIN_S


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
        assert plain_http.get(f"{service.url}/readyz").json() == {"status": "draining"}
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
