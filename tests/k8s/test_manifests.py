"""Every rendered object is valid, and the manifests agree with each other and with the gateway's code."""

import re

import kubernetes_validate
import pytest

from service.settings import Settings
from tests.k8s.rendered import TARGETS, bytes_of, containers_of, objects_of, one, pod_of

VERSIONS = ("1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
OWN_SCHEMAS = re.compile(r"(monitoring\.coreos\.com|keda\.sh|gateway\..*|cert-manager\.io)/")
MARGIN_S = 5
TRITON_END_S = 30  # --exit-timeout-secs in model_repository/serve.sh

targets = pytest.mark.parametrize("target", TARGETS)


@targets
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_in_every_supported_version(target: str, version: str) -> None:
    """Strictly: unknown fields are errors, and so is an object for which there is no schema."""
    for each in objects_of(target):
        if not OWN_SCHEMAS.match(each["apiVersion"]):
            kubernetes_validate.validate(each, version, strict=True)


@targets
def test_settings_are_the_gateway_s(target: str) -> None:
    known = {f"SAM_{name.upper()}" for name in Settings.model_fields}
    configured = one(target, "ConfigMap", "sam-settings")["data"]
    gateway = containers_of(pod_of(target))["gateway"]
    named = {each["name"] for each in gateway.get("env", [])}
    assert set(configured) | named <= known
    Settings(**{name.removeprefix("SAM_").lower(): value for name, value in configured.items()})


@targets
def test_ports_are_the_gateway_s_and_every_named_port_exists(target: str) -> None:
    pod = pod_of(target)
    ports = {
        port["name"]: port["containerPort"] for each in containers_of(pod).values() for port in each.get("ports", [])
    }
    defaults = {name: Settings.model_fields[f"{name}_port"].default for name in ("http", "grpc", "metrics")}
    assert defaults.items() <= ports.items()
    for name in ("sam", "sam-grpc"):
        assert {port["targetPort"] for port in one(target, "Service", name)["spec"]["ports"]} <= set(ports)
    for container in containers_of(pod).values():
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container:
                assert container[probe]["httpGet"]["port"] in {port["name"] for port in container["ports"]}


@targets
def test_selectors_find_the_pods(target: str) -> None:
    labels = one(target, "Deployment", "sam")["spec"]["template"]["metadata"]["labels"]
    selectors = [one(target, "Deployment", "sam")["spec"]["selector"]["matchLabels"]]
    selectors += [one(target, "Service", name)["spec"]["selector"] for name in ("sam", "sam-grpc")]
    selectors.append(one(target, "PodDisruptionBudget", "sam")["spec"]["selector"]["matchLabels"])
    selectors.append(one(target, "NetworkPolicy", "sam")["spec"]["podSelector"]["matchLabels"])
    for selector in selectors:
        assert selector.items() <= labels.items()


@targets
def test_volumes_claims_and_configuration_exist(target: str) -> None:
    pod = pod_of(target)
    volumes = {each["name"]: each for each in pod["volumes"]}
    names = {(each["kind"], each["metadata"]["name"]) for each in objects_of(target)}
    for container in containers_of(pod).values():
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= set(volumes)
        for source in container.get("envFrom", []):
            assert ("ConfigMap", source["configMapRef"]["name"]) in names
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
    assert ("ServiceAccount", pod["serviceAccountName"]) in names
    assert ("PriorityClass", pod["priorityClassName"]) in names


@targets
def test_the_grace_period_is_long_enough_to_lose_no_request(target: str) -> None:
    """Balancers notice, requests under way end, then Triton does."""
    pod, settings = pod_of(target), one(target, "ConfigMap", "sam-settings")["data"]
    gateway = containers_of(pod)["gateway"]
    drain_s, deadline_s = float(settings["SAM_DRAIN_S"]), float(settings["SAM_DEFAULT_DEADLINE_S"])
    assert drain_s >= deadline_s
    needed_s = gateway["lifecycle"]["preStop"]["sleep"]["seconds"] + drain_s + TRITON_END_S
    assert pod["terminationGracePeriodSeconds"] >= needed_s + MARGIN_S


@targets
def test_the_arena_fits_into_shared_memory_and_that_into_the_limit(target: str) -> None:
    pod, settings = pod_of(target), one(target, "ConfigMap", "sam-settings")["data"]
    (shm,) = [each["emptyDir"] for each in pod["volumes"] if each["name"] == "shm"]
    limit = bytes_of(containers_of(pod)["gateway"]["resources"]["limits"]["memory"])
    assert shm["medium"] == "Memory"
    assert int(settings["SAM_CACHE_BYTES"]) < bytes_of(shm["sizeLimit"]) < limit


@targets
def test_containers_are_locked_down(target: str) -> None:
    pod = pod_of(target)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in containers_of(pod).values():
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]


@targets
def test_readiness_is_the_canary_and_liveness_is_not(target: str) -> None:
    gateway = containers_of(pod_of(target))["gateway"]
    assert gateway["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert gateway["livenessProbe"]["httpGet"]["path"] == "/healthz"
