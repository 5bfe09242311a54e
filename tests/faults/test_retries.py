"""Retries cannot storm: a call to the model is made again once, when its connection broke, as a tenth of all calls.

Callers refine a mask of their own, by whose first bytes a cable before Triton knows their calls from canaries: what
comes by is what they asked for, and what was made again.
"""

import base64
import concurrent.futures
import contextlib
import os
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from service.tensors import DECODER_MODEL, REFINER_MODEL
from tests import plain_http
from tests.cable import Cable, cable_to
from tests.faults.conftest import Report
from tests.running import ROOT, RunningService, free_settings, triton_alone, triton_under
from tests.slow_models import replace, slow_models

PROMISE = "retries cannot storm"
CLICK = {"points": [[100, 100, 1]]}
CALLERS = 8
MODELS = ROOT / "model_repository" / "cpu"
FIRST = 2  # calls to Triton before callers ask: for their image, and for the mask to refine
CUT_EVERY_S = 0.05
LEAST_CALLS = 100  # a loaded machine takes longer for them
QUEUE = 2  # of a model that sheds, as Triton's configuration has it

OK = "ok"
# The sentences of answers to calls that were made; what the breaker refuses, or the gate, is no call to Triton.
BROKE = "the connection to the model server broke"
FULL = "the model's queue is full; come back in a moment"
MADE = (OK, BROKE, FULL, "the model server cannot")


class Answer(NamedTuple):
    """What a caller was told: `words` are `OK`, or the error's sentence."""

    status: int
    words: str = OK
    reason: str = ""
    retry_after_s: float = 0.0


class Callers:
    """Clients that ask for a refined mask of a cached image all the time, and take down what they are told."""

    def __init__(self, service: RunningService, photo: bytes) -> None:
        self.service = service
        self._url = f"{service.url}/v1/images/cat/masks"
        plain_http.put(f"{service.url}/v1/images/cat", content=photo).raise_for_status()
        first = {"prompts": [CLICK], "multimask": False, "include_logits": True}
        answer = plain_http.post(self._url, json=first).raise_for_status().json()
        mask_input = answer["results"][0]["masks"][0]["logits"]
        self.marker = zlib.decompress(base64.b64decode(mask_input))[:16]
        self._body: dict[str, Any] = {"prompts": [{**CLICK, "mask_input": mask_input}], "format": "none"}
        self.answers: list[Answer] = []

    def ask(self, done: threading.Event, pause_s: float) -> None:
        with httpx.Client(timeout=60) as client:
            while not done.wait(pause_s):
                self.answers.append(answer_from(client.post(self._url, json=self._body)))

    @contextmanager
    def asking(self, count: int = CALLERS, pause_s: float = 0.0) -> Iterator[None]:
        done = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            asking = [pool.submit(self.ask, done, pause_s) for _ in range(count)]
            try:
                yield
            finally:
                done.set()
                for each in asking:
                    each.result()

    @property
    def codes(self) -> set[int]:
        return {answer.status for answer in self.answers}

    @property
    def told(self) -> Counter[str]:
        return Counter(answer.words for answer in self.answers)

    @property
    def first_calls(self) -> int:
        """How many calls were made to Triton, or tried, because a caller asked, not again."""
        return sum(count for words, count in self.told.items() if words.startswith(MADE))


def answer_from(response: httpx.Response) -> Answer:
    if response.is_success:
        return Answer(response.status_code)
    problem = response.json()
    retry_after_s = float(response.headers.get("retry-after", 0))
    return Answer(response.status_code, problem["detail"], problem["reason"], retry_after_s)


def retries(service: RunningService) -> float:
    return sum(value for name, value in service.metrics().items() if name.startswith("sam_model_retries_total"))


@contextmanager
def behind_cable(cat: bytes, repository: Path = MODELS) -> Iterator[tuple[Cable, Callers]]:
    """Run a Triton, a cable to it that counts the callers' calls, and a gateway at the other end."""
    settings = free_settings()
    address, metrics_port = settings["SAM_TRITON_URL"], settings["SAM_TRITON_METRICS_PORT"]
    with triton_alone(address, metrics_port, repository), cable_to(int(address.rpartition(":")[2])) as cable:
        cabled = {**settings, "SAM_TRITON_URL": f"127.0.0.1:{cable.port}", "SAM_LOG_LEVEL": "error"}
        with RunningService.start(embedded=False, **cabled) as service:
            callers = Callers(service, cat)
            cable.marker = callers.marker
            yield cable, callers


def test_connections_that_break_all_the_time_cost_a_tenth_more_calls_at_most(
    cat: bytes, report: Report, *, full: bool
) -> None:
    """So often that most calls that break cannot be made again: their callers hear of it."""
    with behind_cable(cat) as (cable, callers):
        began_s = time.monotonic()
        with callers.asking():
            while (took_s := time.monotonic() - began_s) < 60:
                time.sleep(CUT_EVERY_S)
                cable.cut()
                if not full and took_s > 6 and callers.first_calls >= LEAST_CALLS:
                    break
        again = retries(callers.service)
    first, asked, broke = FIRST + callers.first_calls, len(cable.asked_s), callers.told[BROKE]
    report(
        PROMISE,
        "connections cut: <= 10 % extra calls",
        f"{again / first:.1%} of {first}, Triton asked {asked} times; {broke} callers heard that it broke",
    )
    assert callers.codes <= {200, 503}
    assert 0 < again <= 0.1 * first
    assert asked <= 1.1 * first
    assert broke > again, "the budget was never needed"


def test_a_triton_that_flaps_is_not_asked_more_often_for_it(cat: bytes, report: Report, *, full: bool) -> None:
    """It is killed under load and started again, as a crash loop does; callers are refused meanwhile, not kept."""
    settings = {**free_settings(), "SAM_LOG_LEVEL": "error"}
    triton = (settings["SAM_TRITON_URL"], settings["SAM_TRITON_METRICS_PORT"])
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(RunningService.launch(embedded=False, **settings))
        callers = None
        for _ in range(4 if full else 2):
            with triton_alone(*triton) as pid:
                service.wait_for("/readyz", 200)
                callers = callers or Callers(service, cat)
                enough = callers.first_calls + LEAST_CALLS // 2
                with callers.asking():
                    while callers.first_calls < enough:
                        time.sleep(0.5)
                    os.kill(triton_under(pid), signal.SIGKILL)
                    service.wait_for("/readyz", 503)
                    time.sleep(0.5)
        again = retries(service)
        opened = service.metrics()[f'sam_model_breaker_open{{model="{DECODER_MODEL}"}}']
    assert callers is not None
    first = FIRST + callers.first_calls
    refused = len(callers.answers) - callers.first_calls
    measured = f"{again / first:.1%} of {first} calls to Triton, {refused} refused by the breaker"
    report(PROMISE, "Triton killed: <= 10 % extra calls", measured)
    assert callers.codes == {200, 503}
    assert again <= 0.1 * first
    assert refused > 0
    assert opened == 1


def test_what_a_full_queue_sheds_is_not_asked_for_again(
    cat: bytes, tmp_path: Path, report: Report, *, full: bool
) -> None:
    """Triton says UNAVAILABLE, and does not count it; to callers it is an overload, and a retry would be more of it."""
    models = slow_models(tmp_path, max_batch=1)
    replace(models.path / REFINER_MODEL / "config.pbtxt", "max_queue_size: 256", f"max_queue_size: {QUEUE}")
    with behind_cable(cat, models.path) as (cable, callers):
        models.slow_down(decode_s=0.2)
        with callers.asking(12, pause_s=0.02):
            time.sleep(30 if full else 3)
        again = retries(callers.service)
    shed, first, asked = callers.told[FULL], callers.first_calls, len(cable.asked_s)
    measured = f"{again:.0f}, of {shed} that Triton shed; it was asked {asked} times for {first} calls"
    report(PROMISE, "none on shed", measured)
    assert shed > callers.told[OK] > 0
    assert again == 0
    assert asked == first
    refused = [answer for answer in callers.answers if answer.words != OK]
    assert {(answer.status, answer.reason) for answer in refused} == {(429, "overloaded")}
    assert min(answer.retry_after_s for answer in refused) > 0
