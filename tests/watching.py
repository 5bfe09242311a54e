"""Watches how a service is while something happens to it: by the word of both transports, its Triton, and calls."""

import concurrent.futures
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from tests import plain_http
from tests.running import RunningService

NEEDS_NO_MODEL = ("/healthz", "/v1/images/cat", "/v1/model")


@dataclass
class Watch:
    """Asks all the time, over connections of its own, how the service is, until told to stop."""

    service: RunningService
    readiness: list[tuple[float, int]] = field(default_factory=list)
    health: list[tuple[float, int]] = field(default_factory=list)  # gRPC's, in HTTP's words
    meanwhile: list[tuple[str, int | grpc.StatusCode, float]] = field(default_factory=list)
    triton_up_s: float = 0.0

    def noticed(self) -> bool:
        """Whether both transports have said so."""
        return all(any(code == 503 for _, code in answers) for answers in (self.readiness, self.health))

    def unready_s(self) -> float:
        """Return when the last worker had noticed, and told so over both transports."""
        return max(unready_s(self.readiness), unready_s(self.health))

    def ready_again_s(self) -> float | None:
        """Return when every answer of both transports was good again, for a second at least."""
        again = [ready_again_s(answers) for answers in (self.readiness, self.health)]
        return None if None in again else max(at_s for at_s in again if at_s is not None)

    def ask(self, done: threading.Event) -> None:
        while not done.wait(0.02):
            code = plain_http.get(f"{self.service.url}/readyz", timeout=30).status_code
            self.readiness.append((time.monotonic(), code))

    def ask_health(self, done: threading.Event) -> None:
        while not done.wait(0.04):
            code = 200 if serving(self.service.grpc_address) else 503
            self.health.append((time.monotonic(), code))

    def ask_what_needs_no_model(self, done: threading.Event) -> None:
        with grpc.insecure_channel(self.service.grpc_address) as channel:
            stub = pb_grpc.SegmentAnythingStub(channel)
            while not done.wait(0.1):
                for path in NEEDS_NO_MODEL:
                    began_s = time.monotonic()
                    code = plain_http.get(self.service.url + path, timeout=30).status_code
                    self.meanwhile.append((path, code, time.monotonic() - began_s))
                began_s = time.monotonic()
                code = stub.GetModel.with_call(pb.GetModelRequest(), timeout=30)[1].code()
                self.meanwhile.append(("GetModel", code, time.monotonic() - began_s))

    def ask_triton(self, done: threading.Event) -> None:
        """Note when Triton, by its own word, is ready again, the first time after it was not."""
        was_down = False
        while not done.wait(0.05) and not self.triton_up_s:
            up = serving(self.service.settings["SAM_TRITON_URL"])
            if up and was_down:
                self.triton_up_s = time.monotonic()
            was_down = not up


def unready_s(answers: list[tuple[float, int]]) -> float:
    """Return when the last worker had noticed: after it, answers are 503 for a while."""
    codes = [code for _, code in answers]
    last = max(at for at, code in enumerate(codes) if code == 503)
    noticed = next(at for at in range(last + 1) if set(codes[at : min(at + 20, last + 1)]) == {503})
    return answers[noticed][0]


def ready_again_s(answers: list[tuple[float, int]]) -> float | None:
    """Return when every answer was 200 again, for a second at least."""
    unready = [at_s for at_s, code in answers if code == 503]
    ready = [at_s for at_s, _ in answers if unready and at_s > unready[-1]]
    return ready[0] if ready and ready[-1] - ready[0] > 1.0 else None


def serving(address: str) -> bool:
    """Whether the server there calls itself ready, by the standard protocol, over a new connection."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=0.5)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextmanager
def watching(service: RunningService) -> Iterator[Watch]:
    watch, done = Watch(service), threading.Event()
    asks = (watch.ask, watch.ask_health, watch.ask_what_needs_no_model, watch.ask_triton)
    with concurrent.futures.ThreadPoolExecutor(len(asks)) as pool:
        asking = [pool.submit(ask, done) for ask in asks]
        try:
            yield watch
        finally:
            done.set()
            for each in asking:
                each.result()
