"""components/tls and components/mtls: the gateway starts on what they mount, and their probes find it."""

import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from service.probe import TIMEOUT_S
from tests.k8s.rendered import containers_of, pod_of
from tests.running import START_S, RunningService

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
AUTHORITY, STRANGER = trustme.CA(), trustme.CA()


def gateway_of(component: str) -> dict[str, Any]:
    gateway: dict[str, Any] = containers_of(pod_of(f"components/{component}"))["gateway"]
    return gateway


def mounted(component: str, folder: Path, authority: trustme.CA = AUTHORITY) -> dict[str, str]:
    """Write the Secret's files as they are mounted; return the settings, which name them there."""
    issued = authority.issue_cert("sam.sam.svc")
    issued.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    issued.private_key_pem.write_to_path(folder / "tls.key")
    authority.cert_pem.write_to_path(folder / "ca.crt")
    gateway = gateway_of(component)
    (mount,) = [each for each in gateway["volumeMounts"] if each["name"] == "tls"]
    named = {each["name"]: each["value"] for each in gateway["env"] if each["name"].startswith("SAM_TLS_")}
    for value in named.values():
        assert value.startswith(f"{mount['mountPath']}/")
    return {name: str(folder / Path(value).name) for name, value in named.items()}


def kubelet_asks(running: RunningService, probe: dict[str, Any]) -> int:
    """Do what the kubelet does for an `httpGet`: it trusts any certificate and shows none."""
    asked = probe["httpGet"]
    assert asked["port"] == "http"
    context = ssl._create_unverified_context()  # noqa: S323
    port = running.settings["SAM_HTTP_PORT"]
    return httpx.get(f"{asked['scheme'].lower()}://127.0.0.1:{port}{asked['path']}", verify=context).status_code


def exit_code_of(running: RunningService, probe: dict[str, Any]) -> int:
    """Run the very command of an `exec` probe, with the settings that the container has."""
    python, *arguments = probe["exec"]["command"]
    assert python == "/opt/sam/bin/python3"
    assert probe["timeoutSeconds"] > TIMEOUT_S
    environment = {**os.environ, **running.settings, "SAM_HOST": "0.0.0.0"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


def wait_until_passes(running: RunningService, probe: dict[str, Any]) -> None:
    deadline = time.monotonic() + START_S
    while exit_code_of(running, probe) != 0:
        assert running.process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A gateway with mutual TLS and its Triton; live, but perhaps not yet ready."""
    settings = mounted("mtls", tmp_path_factory.mktemp("mtls"))
    with RunningService.launch(**settings) as running:
        wait_until_passes(running, gateway_of("mtls")["startupProbe"])
        yield running


def test_under_mutual_tls_readiness_is_found_from_inside(mutual: RunningService) -> None:
    wait_until_passes(mutual, gateway_of("mtls")["readinessProbe"])


def test_under_mutual_tls_the_kubelet_is_not_let_in(mutual: RunningService) -> None:
    """Which is why these probes are commands."""
    assert all("httpGet" not in gateway_of("mtls")[name] for name in PROBES)
    with pytest.raises(httpx.TransportError):
        kubelet_asks(mutual, gateway_of("tls")["livenessProbe"])


def test_a_certificate_that_clients_may_not_show_fails_the_probe(tmp_path: Path, mutual: RunningService) -> None:
    """As when `ca.crt` is of another authority than the one that signed the pods' own."""
    other = RunningService(mutual.process, mutual.settings | mounted("mtls", tmp_path, STRANGER))
    assert exit_code_of(other, gateway_of("mtls")["livenessProbe"]) == 1


def test_under_tls_the_kubelet_asks_by_https(tmp_path: Path) -> None:
    """A gateway without a model is live and not ready, from outside and from inside."""
    settings, probes = mounted("tls", tmp_path), gateway_of("tls")
    assert "SAM_TLS_CLIENT_CA" not in settings
    with RunningService.launch(embedded=False, SAM_LOG_LEVEL="error", **settings) as running:
        wait_until_passes(running, gateway_of("mtls")["startupProbe"])
        assert [kubelet_asks(running, probes[name]) for name in PROBES] == [200, 503, 200]
        assert [exit_code_of(running, gateway_of("mtls")[name]) for name in PROBES] == [0, 1, 0]
