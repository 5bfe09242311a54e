"""Base and overlays as `kubectl kustomize` renders them, and the base with each component that no overlay has."""

import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.running import ROOT
from tests.system_packages import require

K8S = ROOT / "k8s"
BASE = "base"
OVERLAYS = tuple(str(path.parent.relative_to(K8S)) for path in sorted(K8S.glob("overlays/*/kustomization.yaml")))
ALONE = tuple(f"components/{name}" for name in ("hpa", "mig", "mtls", "tls", "tracing"))
TARGETS = (BASE, *OVERLAYS, *ALONE)

Object = dict[str, Any]


@cache
def text_of(target: str) -> str:
    """Return the YAML of one of `TARGETS`; a component is put on the base."""
    require("kubectl", "kubectl")
    if target not in ALONE:
        return rendered(K8S / target)
    with tempfile.TemporaryDirectory() as folder:
        above = Path(os.path.relpath(K8S, Path(folder).resolve()))  # absolute paths are not taken
        kustomization = {"namespace": "sam", "resources": [str(above / BASE)], "components": [str(above / target)]}
        Path(folder, "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return rendered(Path(folder))


def rendered(kustomization: Path) -> str:
    """Return the YAML of a folder with a kustomization."""
    return subprocess.run(["kubectl", "kustomize", kustomization], capture_output=True, text=True, check=True).stdout


def objects_of(target: str) -> list[Object]:
    """Return the objects of `base` or of an overlay."""
    return [each for each in yaml.safe_load_all(text_of(target)) if each]


def one(target: str, kind: str, name: str) -> Object:
    """Return the object of that kind and name; names that carry a hash are given without it."""
    (found,) = [
        each for each in objects_of(target) if each["kind"] == kind and unhashed(each["metadata"]["name"]) == name
    ]
    return found


def unhashed(name: str) -> str:
    """Return a generated name without its hash."""
    return re.sub(r"-[a-z0-9]{10}$", "", name)


def pod_of(target: str) -> Object:
    """Return the spec of the serving pods."""
    pod: Object = one(target, "Deployment", "sam")["spec"]["template"]["spec"]
    return pod


def containers_of(pod: Object) -> dict[str, Object]:
    """Return all containers of a pod by name, init containers too."""
    return {each["name"]: each for each in [*pod.get("initContainers", []), *pod["containers"]]}


def bytes_of(quantity: str) -> int:
    """Return a Kubernetes quantity of memory in bytes."""
    for unit, shift in (("Gi", 30), ("Mi", 20), ("Ki", 10)):
        if quantity.endswith(unit):
            return int(quantity.removesuffix(unit)) << shift
    return int(quantity)


def kustomizations() -> list[Path]:
    """Return every kustomization of this repository."""
    return sorted(K8S.rglob("kustomization.yaml"))
