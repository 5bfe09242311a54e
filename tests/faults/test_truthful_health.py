"""Truthful health: a dead or frozen model is unready in 2 s, its service back by itself; the rest answers meanwhile.

Embedded mode, as it is started by a person, and a Triton of its own, as in production. Faults are signals by pid.
"""

import concurrent.futures
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import httpx
import pytest

from tests import plain_http
from tests.faults.conftest import Report
from tests.running import SHM, RunningService, free_settings, stubs_of, triton_alone, triton_under
from tests.watching import NEEDS_NO_MODEL, Watch, serving, watching

PROMISE = "truthful health"
Json = dict[str, Any]
CLICK: Json = {"prompts": [{"points": [[100, 100, 1]]}]}
HEAVY = {"prompts": [{"points": [[x, y, 1]]} for x in range(10, 170, 20) for y in range(10, 170, 20)], "format": "rle"}
UNREADY_S, BACK_S = 2.0, 10.0
LOADED_S = 15.0  # what a busy machine may take for either
MEANWHILE_S = 5.0


def send(number: signal.Signals, *pids: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def die_leaving(triton: int, stubs: list[int]) -> None:
    """Kill a Triton whose stubs cannot notice it: they hold on to what they share with it, its output for example."""
    send(signal.SIGSTOP, *stubs)
    send(signal.SIGKILL, triton)


FAULTS: dict[str, Callable[[int], None]] = {
    "decoder killed": lambda triton: send(signal.SIGKILL, *stubs_of(triton, "sam_decoder")),
    "decoder frozen": lambda triton: send(signal.SIGSTOP, *stubs_of(triton, "sam_decoder")),
    "encoder killed": lambda triton: send(signal.SIGKILL, *stubs_of(triton, "sam_encoder")),
    "encoder frozen": lambda triton: send(signal.SIGSTOP, *stubs_of(triton, "sam_encoder")),
    "refiner killed": lambda triton: send(signal.SIGKILL, *stubs_of(triton, "sam_refiner")),
    "refiner frozen": lambda triton: send(signal.SIGSTOP, *stubs_of(triton, "sam_refiner")),
    "Triton frozen": lambda triton: send(signal.SIGSTOP, triton),
    "Triton killed": lambda triton: send(signal.SIGKILL, triton),
}
SELDOM_ASKED = ("encoder", "refiner")  # while idle; at once when an upload, or a prompt with a mask, comes to nothing
# Of a Triton that is not ours, the other instance goes on: some prompts are answered, and canaries are among them.
FAULTS_OF_OURS = FAULTS | {
    "one decoder of two killed": lambda triton: send(signal.SIGKILL, stubs_of(triton, "sam_decoder")[0]),
    "one decoder of two frozen": lambda triton: send(signal.SIGSTOP, stubs_of(triton, "sam_decoder")[0]),
    "Triton killed, a model left over": lambda triton: die_leaving(triton, stubs_of(triton, "sam_decoder")),
}


def report_meanwhile(watch: Watch, fault: str, report: Report) -> None:
    """Check that what needs no model was answered all the time."""
    answered = sum(code in (200, grpc.StatusCode.OK) for _, code, _ in watch.meanwhile)
    slowest_s, slowest = max((took_s, path) for path, _, took_s in watch.meanwhile)
    measured = f"{answered} of {len(watch.meanwhile)}, {1000 * slowest_s:.0f} ms at most ({slowest})"
    report(PROMISE, f"{fault}: metadata and /healthz answer meanwhile", measured)
    assert answered == len(watch.meanwhile) >= len(NEEDS_NO_MODEL) + 1
    assert slowest_s < MEANWHILE_S


def until(holds: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"it did not come to pass within {timeout_s} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def embedded(cat: bytes) -> Iterator[RunningService]:
    """A service of two workers with its own Triton, behind a secret that only they know; one image is cached."""
    with RunningService.start(SAM_WORKERS="2", SAM_TRITON_SECRET="", SAM_LOG_LEVEL="error") as service:
        plain_http.put(f"{service.url}/v1/images/cat", content=cat).raise_for_status()
        yield service


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Inject every fault in the full form; in the short one, each of the promise's once."""
    if "fault" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full", default=False)
        ours = "embedded" in metafunc.fixturenames
        ours_short = [
            "decoder killed",
            "one decoder of two frozen",
            "Triton killed",
            "Triton killed, a model left over",
        ]
        short = ours_short if ours else ["Triton frozen"]
        metafunc.parametrize("fault", list(FAULTS_OF_OURS if ours else FAULTS) if full else short)


def test_a_dead_or_frozen_model_is_unready_and_comes_back_by_itself(
    embedded: RunningService, fault: str, report: Report, *, full: bool
) -> None:
    regions = len(embedded.shared_memory())
    measured = [suffer(embedded, fault, report) for _ in range(3 if full else 1)]
    unready_s, back_s, whole_s = (max(each) for each in zip(*measured, strict=True))
    with suppress(AssertionError):
        until(lambda: len(embedded.shared_memory()) == regions, 10)
    leaked = len(embedded.shared_memory()) - regions
    report_times(fault, unready_s, back_s, f" ({whole_s:.1f} s after the fault)", report, full=full)
    report(PROMISE, f"{fault}: no leaked shared memory", f"{leaked:+d} regions, of {regions}", kept=leaked == 0)
    assert leaked == 0


def report_times(fault: str, unready_s: float, back_s: float, after: str, report: Report, *, full: bool) -> None:
    longest_unready_s, longest_back_s = (UNREADY_S, BACK_S) if full else (LOADED_S, LOADED_S)
    in_time, back_in_time = unready_s <= longest_unready_s, back_s <= longest_back_s
    report(PROMISE, f"{fault}: unready <= {UNREADY_S:g} s", f"{unready_s:.2f} s", kept=in_time)
    report(PROMISE, f"{fault}: ready <= {BACK_S:g} s after Triton is", f"{back_s:.2f} s{after}", kept=back_in_time)
    assert in_time
    assert back_in_time


def suffer(service: RunningService, fault: str, report: Report) -> tuple[float, float, float]:
    """Inject the fault, and return how long it took to be unready, to be ready after Triton was, and in all."""
    old, misses = service.triton_pid(), service.metrics()["sam_cache_misses_total"]
    mask = mask_of(plain_http.post(f"{service.url}/v1/images/cat/masks", json=CLICK))
    with watching(service) as watch:
        time.sleep(0.3)
        began_s = time.monotonic()
        FAULTS_OF_OURS[fault](old)
        until(watch.noticed, 30)
        refused = plain_http.post(f"{service.url}/v1/images/cat/masks", json=CLICK, timeout=30)
        until(lambda: watch.triton_up_s and watch.ready_again_s(), 90)
    again_s = watch.ready_again_s()
    assert again_s is not None
    # Refused at once and with a hint; while only the encoder or the refiner is dead, a click is answered.
    assert refused.status_code in (200, 503)
    assert refused.status_code == 200 or int(refused.headers["retry-after"]) > 0
    report_meanwhile(watch, fault, report)
    assert service.triton_pid() != old
    answer = plain_http.post(f"{service.url}/v1/images/cat/masks", json=CLICK)
    assert (answer.json()["cache"], mask_of(answer)) == ("memory", mask)
    assert service.metrics()["sam_cache_misses_total"] == misses
    return watch.unready_s() - began_s, max(0.0, again_s - watch.triton_up_s), again_s - began_s


def mask_of(answer: httpx.Response) -> list[int]:
    """Return where the one mask is: its last pixels depend on what it was batched with."""
    (result,) = answer.raise_for_status().json()["results"]
    return [round(side, -1) for side in result["masks"][0]["bbox"]]


def test_a_busy_model_is_neither_unready_nor_killed(embedded: RunningService, report: Report, *, full: bool) -> None:
    """More than it can do, for a while: canaries wait in the queue behind everybody's prompts."""
    triton, until_s = embedded.triton_pid(), time.monotonic() + (20 if full else 4)
    codes: list[int] = []

    def press() -> None:
        with httpx.Client(base_url=embedded.url, timeout=60) as client:
            while time.monotonic() < until_s:
                codes.append(client.post("/v1/images/cat/masks", json=HEAVY).status_code)

    with watching(embedded) as watch, concurrent.futures.ThreadPoolExecutor(24) as pool:
        for pressing in [pool.submit(press) for _ in range(24)]:
            pressing.result()
    unready = sum(code != 200 for _, code in watch.readiness)
    report(PROMISE, "overloaded, not dead: 0 unready", f"{unready} of {len(watch.readiness)}, {len(codes)} requests")
    assert unready == 0
    assert set(codes) <= {200, 429}
    assert embedded.triton_pid() == triton


def test_a_triton_of_its_own_that_is_dead_or_frozen_is_noticed_and_taken_up_again(
    cat: bytes, fault: str, report: Report, *, full: bool
) -> None:
    """Nobody restarts it but the test, as an orchestrator would."""
    settings = free_settings()
    triton = (settings["SAM_TRITON_URL"], settings["SAM_TRITON_METRICS_PORT"])
    with ExitStack() as running:
        pid = running.enter_context(triton_alone(*triton))
        with RunningService.start(embedded=False, **{**settings, "SAM_LOG_LEVEL": "error"}) as service:
            plain_http.put(f"{service.url}/v1/images/cat", content=cat).raise_for_status()
            masked = masked_click(service)
            with watching(service) as watch:
                began_s = time.monotonic()
                FAULTS[fault](triton_under(pid))
                if fault.startswith(SELDOM_ASKED):
                    fault += asked_in_vain(service, fault, cat, masked)
                    began_s = time.monotonic()
                until(watch.noticed, 30)
                if fault.startswith(SELDOM_ASKED):  # unready, and yet of use
                    plain_http.post(f"{service.url}/v1/images/cat/masks", json=CLICK).raise_for_status()
                time.sleep(1)
            unready_s = watch.unready_s() - began_s
            report_meanwhile(watch, f"{fault}, not ours", report)
            if fault == "Triton frozen":
                os.kill(triton_under(pid), signal.SIGCONT)
                since = "SIGCONT"
            else:
                since = "a new one said so"
                running.close()
                running.enter_context(triton_alone(*triton))
                until(lambda: serving(triton[0]), 60)
            began_s = time.monotonic()
            service.wait_for("/readyz", 200)
            back_s = time.monotonic() - began_s
            answer = plain_http.post(f"{service.url}/v1/images/cat/masks", json=CLICK).raise_for_status().json()
            assert answer["cache"] == "memory"
    report_times(f"{fault}, not ours", unready_s, back_s, f" after {since}", report, full=full)


def asked_in_vain(service: RunningService, fault: str, cat: bytes, masked: Json) -> str:
    """Ask for what only the model at fault does, which is a reason to look after it, and say what became of that."""
    with suppress(httpx.ReadTimeout):
        if fault.startswith("encoder"):
            plain_http.put(f"{service.url}/v1/images/other", content=cat + b"0", timeout=1)
        else:
            plain_http.post(f"{service.url}/v1/images/cat/masks", json=masked, timeout=1)
    return f", {'an upload' if fault.startswith('encoder') else 'a mask input'} was given up or failed"


def masked_click(service: RunningService) -> Json:
    """Return a click that goes with the mask of an earlier answer, so that the refiner answers it."""
    answer = plain_http.post(f"{service.url}/v1/images/cat/masks", json={**CLICK, "include_logits": True})
    logits = answer.raise_for_status().json()["results"][0]["masks"][0]["logits"]
    masked = {"prompts": [{**CLICK["prompts"][0], "mask_input": logits}]}
    plain_http.post(f"{service.url}/v1/images/cat/masks", json=masked).raise_for_status()
    return masked


def test_shared_memory_of_a_service_that_was_killed_whole_is_swept_by_the_next_one(
    tmp_path_factory: pytest.TempPathFactory, report: Report
) -> None:
    folder = tmp_path_factory.mktemp("temporary")
    with RunningService.launch(TMPDIR=str(folder), expected_code=-signal.SIGKILL) as service:
        service.wait_for("/readyz", 200)
        service.process.send_signal(signal.SIGSTOP)
        for pid in [*service.worker_pids(), service.triton_pid()]:
            os.kill(pid, signal.SIGKILL)
        service.process.kill()
        service.process.wait()
        assert list(folder.glob("sam-metrics-*"))
        left = list(SHM.glob(f"sam_triton_{service.process.pid}_*"))
        with RunningService.launch(TMPDIR=str(folder)) as following:
            following.wait_for("/readyz", 200)
            leaked = [region for region in left if region.exists()]
            figure = "all killed: no leaked shared memory after the next start"
            report(PROMISE, figure, f"{len(leaked)} of {len(left)} regions", kept=not leaked)
            assert not leaked
            assert len(list(folder.glob("sam-metrics-*"))) == len(list(folder.glob("sam-triton-*"))) == 1
    assert not list(folder.glob("sam-*"))
