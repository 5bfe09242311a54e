"""A real Prometheus that scrapes a running service, with the manifests' rules on a faster clock."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests import plain_http
from tests.k8s.rendered import K8S
from tests.running import RunningService, free_ports
from tests.system_packages import require

FASTER = 10  # a minute of the rules is six seconds here
SCRAPE = "1s"
START_S = 30.0


def faster(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rule groups whose ranges, offsets, intervals and `for` are so many times shorter."""
    seconds = {"s": 1, "m": 60, "h": 3600, "d": 86400}

    def shorter(match: re.Match[str]) -> str:
        return f"{max(1, round(int(match[2]) * seconds[match[3]] / FASTER))}s" if not match[1] else match[0]

    text = re.sub(r"(\w?)\b(\d+)(s|m|h|d)\b", shorter, json.dumps(rules))
    found: list[dict[str, Any]] = json.loads(text)
    for group in found:
        group["interval"] = SCRAPE
    return found


class Prometheus:
    """Asks one over its HTTP API."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=10)

    def close(self) -> None:
        self._client.close()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query."""
        response = self._client.get("/api/v1/query", params={"query": expression}).raise_for_status()
        found: list[dict[str, Any]] = response.json()["data"]["result"]
        return found

    def names(self) -> set[str]:
        """Return the names of all series."""
        return set(self._client.get("/api/v1/label/__name__/values").raise_for_status().json()["data"])

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        alerts = self._client.get("/api/v1/alerts").raise_for_status().json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def wait_until_firing(self, alert: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while alert not in self.firing():
            assert time.monotonic() < deadline, f"{alert} does not fire; these do: {self.firing()}"
            time.sleep(0.5)

    def wait_until_quiet(self, alert: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while alert in self.firing():
            assert time.monotonic() < deadline, f"{alert} still fires"
            time.sleep(0.5)


@contextmanager
def running_prometheus(service: RunningService, folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus for the block, scraping the gateway and its Triton as one pod."""
    require("prometheus", "prometheus")
    groups = yaml.safe_load((K8S / "components/monitoring/rules.yaml").read_text())["spec"]["groups"]
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": faster(groups)}))
    ports = (service.settings["SAM_METRICS_PORT"], service.settings["SAM_TRITON_METRICS_PORT"])
    targets = [{"targets": [f"127.0.0.1:{port}" for port in ports], "labels": {"pod": "here"}}]
    scrape = {"job_name": "sam/sam", "scrape_interval": SCRAPE, "scrape_timeout": SCRAPE, "static_configs": targets}
    (folder / "prometheus.yaml").write_text(
        yaml.safe_dump(
            {"rule_files": ["rules.yaml"], "scrape_configs": [scrape], "global": {"evaluation_interval": SCRAPE}}
        )
    )
    (port,) = free_ports(1)
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ]
    )
    prometheus = Prometheus(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + START_S
        while not _answers(port):
            assert process.poll() is None, "Prometheus ended"
            assert time.monotonic() < deadline, "Prometheus did not start"
            time.sleep(0.1)
        yield prometheus
    finally:
        prometheus.close()
        process.terminate()
        process.wait(30)


def _answers(port: int) -> bool:
    try:
        return plain_http.get(f"http://127.0.0.1:{port}/-/ready").is_success
    except httpx.TransportError:
        return False
