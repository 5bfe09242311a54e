"""Retries cannot storm: a call to the model is made again once, when its connection broke, as a tenth of all calls."""

import concurrent.futures
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from service.upkeep import PROBE_EVERY_UNREADY_S
from tests.cable import cable_to
from tests.faults.conftest import Report
from tests.running import RunningService, free_settings, samples, triton_alone, triton_under

PROMISE = "retries cannot storm"
CLICK = {"prompts": [{"points": [[100, 100, 1]]}]}
CALLERS = 8


class Callers:
    """Clients that ask for masks of a cached image all the time, and count what they are told."""

    def __init__(self, service: RunningService) -> None:
        self._service = service
        self.codes: list[int] = []

    def ask(self, done: threading.Event) -> None:
        with httpx.Client(base_url=self._service.url, timeout=60) as client:
            while not done.is_set():
                self.codes.append(client.post("/v1/images/cat/masks", json=CLICK).status_code)

    @contextmanager
    def asking(self) -> Iterator[None]:
        done = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(CALLERS) as pool:
            asking = [pool.submit(self.ask, done) for _ in range(CALLERS)]
            try:
                yield
            finally:
                done.set()
                for each in asking:
                    each.result()


def retries(service: RunningService) -> float:
    return sum(value for name, value in service.metrics().items() if name.startswith("sam_model_retries_total"))


def test_connections_that_break_all_the_time_cost_a_tenth_more_calls_at_most(
    cat: bytes, report: Report, *, full: bool
) -> None:
    """Triton itself counts the calls: what callers asked for, what was made again, and the canaries."""
    settings = free_settings()
    metrics_port, triton_port = settings["SAM_TRITON_METRICS_PORT"], settings["SAM_TRITON_URL"].rpartition(":")[2]

    def decodes() -> float:
        found = samples(f"http://127.0.0.1:{metrics_port}/metrics")
        names = ("nv_inference_request_success", "nv_inference_request_failure")
        return sum(value for name, value in found.items() if name.startswith(names) and "sam_decoder" in name)

    with triton_alone(settings["SAM_TRITON_URL"], metrics_port), cable_to(int(triton_port)) as cable:
        broken = {**settings, "SAM_TRITON_URL": f"127.0.0.1:{cable.port}", "SAM_LOG_LEVEL": "error"}
        with RunningService.start(embedded=False, **broken) as service:
            httpx.put(f"{service.url}/v1/images/cat", content=cat).raise_for_status()
            callers, before, began_s = Callers(service), decodes(), time.monotonic()
            with callers.asking():
                while time.monotonic() - began_s < (60 if full else 6):
                    time.sleep(1)
                    cable.cut()
            took_s, calls, again = time.monotonic() - began_s, decodes() - before, retries(service)
    asked, failed = len(callers.codes), callers.codes.count(503)
    canaries = 2 + took_s / PROBE_EVERY_UNREADY_S
    report(PROMISE, "connections cut: <= 10 % extra calls", f"{again / asked:.1%} of {asked} ({failed} failed)")
    assert set(callers.codes) <= {200, 503}
    assert again > 0
    assert again <= 0.1 * asked
    assert calls <= asked + again + canaries


def test_a_triton_that_flaps_is_not_asked_more_often_for_it(cat: bytes, report: Report, *, full: bool) -> None:
    """It is killed under load and started again, as a crash loop does; callers are refused meanwhile, not kept."""
    settings = {**free_settings(), "SAM_LOG_LEVEL": "error"}
    triton = (settings["SAM_TRITON_URL"], settings["SAM_TRITON_METRICS_PORT"])
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(RunningService.launch(embedded=False, **settings))
        callers = Callers(service)
        for turn in range(4 if full else 2):
            with triton_alone(*triton) as pid:
                service.wait_for("/readyz", 200)
                if turn == 0:
                    httpx.put(f"{service.url}/v1/images/cat", content=cat).raise_for_status()
                with callers.asking():
                    time.sleep(1)
                    os.kill(triton_under(pid), signal.SIGKILL)
                    service.wait_for("/readyz", 503)
                    time.sleep(0.5)
        again, asked = retries(service), len(callers.codes)
        opened = service.metrics()['sam_model_breaker_open{model="sam_decoder"}']
    report(PROMISE, "Triton killed: <= 10 % extra calls", f"{again / asked:.1%} of {asked}")
    assert set(callers.codes) == {200, 503}
    assert again <= 0.1 * asked
    assert opened == 1
