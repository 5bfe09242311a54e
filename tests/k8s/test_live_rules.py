"""Rules and dashboard on a real Prometheus that scrapes the running service under load; a fault fires its alert."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import yaml

from tests.k8s.prometheus import Prometheus, running_prometheus
from tests.k8s.rendered import K8S
from tests.running import RunningService

ELSEWHERE = re.compile(r"^(kube_|envoy_)")  # of other exporters
WORDS = re.compile(r"\b(?:sam|nv)[a-z0-9_:]*[a-z0-9]\b")
NOT_NAMES = {"sam_encoder", "sam_decoder", "sam_refiner", "sam_", "sam"}


@pytest.fixture(scope="module")
def loaded(coffee: bytes) -> Iterator[RunningService]:
    """A service that answers prompts all the time."""
    with RunningService.start(SAM_DEFAULT_DEADLINE_S="5") as running:
        stop = threading.Event()
        caller = threading.Thread(target=call, args=(running.url, coffee, stop))
        caller.start()
        try:
            yield running
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
def prometheus(loaded: RunningService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with running_prometheus(loaded, tmp_path_factory.mktemp("prometheus")) as running:
        deadline = time.monotonic() + 60
        while not running.query("sam:cache_hit_ratio:rate10m") or not running.query("sam:queued_requests:sum"):
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


def test_a_model_that_stands_still_fires_its_alert(prometheus: Prometheus, loaded: RunningService) -> None:
    os.kill(loaded.triton_pid(), signal.SIGSTOP)
    try:
        prometheus.wait_until_firing("SamModelUnready", 60)
    finally:
        os.kill(loaded.triton_pid(), signal.SIGCONT)
