"""Rules and dashboard on a real Prometheus that scrapes the running service under load; a fault fires its alert."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import httpx
import pytest
import yaml

from tests.k8s.prometheus import Prometheus, running_prometheus
from tests.k8s.rendered import K8S
from tests.redis_server import RedisServer
from tests.running import RunningService, free_settings, triton_alone, triton_under

ELSEWHERE = re.compile(r"^(kube_|envoy_)")  # of other exporters
WORDS = re.compile(r"\b(?:sam|nv)[a-z0-9_:]*[a-z0-9]\b")
NOT_NAMES = {"sam_encoder", "sam_decoder", "sam_refiner", "sam_", "sam"}
LAST_RECORDED = ("sam:cache_hit_ratio:rate10m", "sam:queued_requests:sum", "sam:pods_wanted_when_shedding")


class Loaded(NamedTuple):
    """A service under load, and its Triton's pid."""

    service: RunningService
    triton: int


@pytest.fixture(scope="module")
def loaded(coffee: bytes) -> Iterator[Loaded]:
    """A service that answers prompts all the time, beside a Triton that nobody starts again, as in a pod."""
    with RedisServer.run() as redis, ExitStack() as stack:
        settings = free_settings() | {"SAM_REDIS_URL": redis.url, "SAM_CACHE_SECRET": "shared"}
        address, metrics_port = settings["SAM_TRITON_URL"], settings["SAM_TRITON_METRICS_PORT"]
        starter = stack.enter_context(triton_alone(address, metrics_port))
        running = stack.enter_context(RunningService.start(embedded=False, **settings, SAM_DEFAULT_DEADLINE_S="5"))
        stop = threading.Event()
        caller = threading.Thread(target=call, args=(running.url, coffee, stop))
        caller.start()
        try:
            yield Loaded(running, triton_under(starter))
        finally:
            stop.set()
            caller.join()


def call(url: str, photograph: bytes, stop: threading.Event) -> None:
    """Upload and prompt until told to stop, through thick and thin."""
    with httpx.Client(base_url=url, timeout=10) as client:
        number = 0
        while not stop.wait(0.05):
            number += 1
            try:
                client.put(f"/v1/images/coffee-{number % 3}", content=photograph + bytes(number % 40))
                client.post(f"/v1/images/coffee-{number % 3}/masks", json={"prompts": [{"points": [[270, 200, 1]]}]})
            except httpx.TransportError:
                time.sleep(0.1)


@pytest.fixture(scope="module")
def prometheus(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with running_prometheus(loaded.service, tmp_path_factory.mktemp("prometheus")) as running:
        deadline = time.monotonic() + 60
        while not all(running.query(name) for name in LAST_RECORDED):
            assert time.monotonic() < deadline, "nothing is recorded"
            time.sleep(0.5)
        yield running


def queries() -> list[str]:
    """Return every expression of the dashboard."""
    dashboard = json.loads((K8S / "components/monitoring/dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def rules() -> list[str]:
    groups = yaml.safe_load((K8S / "components/monitoring/rules.yaml").read_text())["spec"]["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def test_every_series_that_is_named_exists(prometheus: Prometheus) -> None:
    named = {word for text in rules() + queries() for word in WORDS.findall(text)} - NOT_NAMES
    recorded = {name for name in named if ":" in name}
    exist = prometheus.names()
    assert recorded <= exist
    assert {name for name in named if not ELSEWHERE.match(name)} <= exist


@pytest.mark.parametrize("query", queries())
def test_every_query_of_the_dashboard_returns_data(prometheus: Prometheus, query: str) -> None:
    assert prometheus.query(query)


def test_nothing_fires_while_all_is_well(prometheus: Prometheus) -> None:
    assert prometheus.firing() == set()


def test_a_model_that_stands_still_fires_its_alert_until_it_is_back(prometheus: Prometheus, loaded: Loaded) -> None:
    os.kill(loaded.triton, signal.SIGSTOP)
    try:
        prometheus.wait_until_firing("SamModelUnready", 60)
    finally:
        os.kill(loaded.triton, signal.SIGCONT)
    prometheus.wait_until_quiet("SamModelUnready", 60)
