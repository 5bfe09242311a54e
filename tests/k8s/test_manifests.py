"""Every rendered object is valid, and the manifests agree with each other and with the gateway's code."""

from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.settings import Settings
from tests.k8s.rendered import (
    ALONE,
    K8S,
    OVERLAYS,
    TARGETS,
    bytes_of,
    containers_of,
    kustomizations,
    objects_of,
    one,
    pod_of,
)

VERSIONS = ("1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
SCHEMAS = Path(__file__).with_name("schemas")
MARGIN_S = 5
TRITON_END_S = 30  # --exit-timeout-secs in model_repository/serve.sh

targets = pytest.mark.parametrize("target", TARGETS)


@targets
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_in_every_supported_version(target: str, version: str) -> None:
    """Strictly: unknown fields are errors, and so is an object for which there is no schema."""
    for each in objects_of(target):
        own = SCHEMAS / f"{each['apiVersion'].partition('/')[0]}_{each['kind']}.yaml"
        if own.exists():
            jsonschema.validate(each["spec"], yaml.safe_load(own.read_text()))
        else:
            kubernetes_validate.validate(each, version, strict=True)


@targets
def test_settings_are_the_gateway_s(target: str) -> None:
    known = {f"SAM_{name.upper()}" for name in Settings.model_fields}
    configured = one(target, "ConfigMap", "sam-settings")["data"]
    gateway = containers_of(pod_of(target))["gateway"]
    named = {each["name"] for each in gateway.get("env", []) if not each["name"].startswith("OTEL_")}
    assert set(configured) | named <= known
    Settings(**{name.removeprefix("SAM_").lower(): value for name, value in configured.items()})


def test_with_tracing_gateway_and_triton_send_spans_to_one_collector_and_may_reach_it() -> None:
    containers = containers_of(pod_of("components/tracing"))
    endpoints = {
        each["value"]
        for name in ("gateway", "triton")
        for each in containers[name]["env"]
        if each["name"] == "OTEL_EXPORTER_OTLP_ENDPOINT"
    }
    (endpoint,) = endpoints
    egress = one("components/tracing", "NetworkPolicy", "sam")["spec"]["egress"]
    assert int(endpoint.rpartition(":")[2]) in {port["port"] for rule in egress for port in rule["ports"]}


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
            if "httpGet" in container.get(probe, {}):
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
    asked = {name: gateway[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    paths = {
        name: each["httpGet"]["path"] if "httpGet" in each else each["exec"]["command"][-1]
        for name, each in asked.items()
    }
    assert paths == {"startup": "/healthz", "readiness": "/readyz", "liveness": "/healthz"}


@pytest.mark.parametrize("path", [str(path.relative_to(K8S)) for path in kustomizations()])
def test_every_file_is_used(path: str) -> None:
    """What lies beside a kustomization is named in it."""
    kustomization = K8S / path
    text = kustomization.read_text()
    for file in kustomization.parent.glob("*.yaml"):
        assert file == kustomization or file.name in text, f"{file} is not used"


def test_every_component_is_rendered() -> None:
    """In an overlay, or on the base alone."""
    used = {
        name.removeprefix("../../")
        for overlay in OVERLAYS
        for name in yaml.safe_load((K8S / overlay / "kustomization.yaml").read_text()).get("components", [])
    }
    assert used | set(ALONE) == {str(path.parent.relative_to(K8S)) for path in K8S.glob("components/*/kust*")}


def recorded() -> set[str]:
    """Return the names of the recording rules."""
    groups = yaml.safe_load((K8S / "components/monitoring/rules.yaml").read_text())["spec"]["groups"]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


@targets
def test_the_scaler_asks_for_what_is_recorded(target: str) -> None:
    """KEDA's queries are names of recording rules, but for the one that must see callers when there is no pod."""
    kinds = {each["kind"] for each in objects_of(target)}
    if "ScaledObject" not in kinds:
        return
    assert "PrometheusRule" in kinds
    scaler = one(target, "ScaledObject", "sam")["spec"]
    queries = {trigger["name"]: trigger["metadata"]["query"] for trigger in scaler["triggers"]}
    assert {query for name, query in queries.items() if name != "callers"} <= recorded()
    assert ("callers" in queries) == (scaler["minReplicaCount"] == 0)


def test_with_scale_to_zero_only_callers_keep_a_pod() -> None:
    """KEDA goes to zero when no trigger is above its activation threshold and none fails."""
    triggers = one("overlays/scale-to-zero", "ScaledObject", "sam")["spec"]["triggers"]
    for trigger in triggers:
        by_callers = trigger["name"] == "callers"
        assert (float(trigger["metadata"]["activationThreshold"]) < 1) == by_callers
        assert trigger["metadata"]["ignoreNullValues"] == ("false" if by_callers else "true")


@targets
def test_a_scaler_has_the_number_of_pods_to_itself(target: str) -> None:
    """The manifest's number and the scaler's would fight at every `kubectl apply`."""
    deployment = one(target, "Deployment", "sam")
    scaled = [each for each in objects_of(target) if each["kind"] in {"ScaledObject", "HorizontalPodAutoscaler"}]
    assert len(scaled) <= 1
    for each in scaled:
        assert each["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        assert each["spec"]["scaleTargetRef"].get("kind", "Deployment") == "Deployment"
        assert each["metadata"]["namespace"] == deployment["metadata"]["namespace"]
    assert ("replicas" in deployment["spec"]) == (not scaled)


def test_prometheus_adapter_s_rules_give_the_hpa_the_recorded_totals() -> None:
    """A total has no label `namespace`: the adapter must not ask for it, and the HPA must not select by labels."""
    asked = one("components/hpa", "HorizontalPodAutoscaler", "sam")["spec"]["metrics"]
    rules = yaml.safe_load((K8S / "components/hpa/adapter-rules.yaml").read_text())["externalRules"]
    assert {rule["name"]["as"] for rule in rules} == {metric["external"]["metric"]["name"] for metric in asked}
    assert all(set(metric["external"]["metric"]) == {"name"} for metric in asked)
    for rule in rules:
        assert rule["seriesQuery"] == rule["metricsQuery"]
        assert rule["seriesQuery"] in recorded()
        assert rule["resources"] == {"namespaced": False}


def test_hpa_and_keda_scale_by_the_same_rules() -> None:
    keda = yaml.safe_load((K8S / "components/keda/scaledobject.yaml").read_text())["spec"]
    hpa = yaml.safe_load((K8S / "components/hpa/hpa.yaml").read_text())["spec"]
    rules = yaml.safe_load((K8S / "components/hpa/adapter-rules.yaml").read_text())["externalRules"]
    assert hpa["behavior"] == keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (keda["minReplicaCount"], keda["maxReplicaCount"])
    queries = {rule["name"]["as"]: rule["metricsQuery"] for rule in rules}
    asked = {
        queries[metric["external"]["metric"]["name"]]: metric["external"]["target"]["averageValue"]
        for metric in hpa["metrics"]
    }
    assert {query: number_of(value) for query, value in asked.items()} == {
        trigger["metadata"]["query"]: float(trigger["metadata"]["threshold"]) for trigger in keda["triggers"]
    }


def number_of(quantity: str) -> float:
    """Return a Kubernetes quantity as a number."""
    return float(quantity.removesuffix("m")) / 1000 if quantity.endswith("m") else float(quantity)
