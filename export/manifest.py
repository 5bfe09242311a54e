"""What is known about a built graph, kept as JSON beside it. Standard library only."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

FILE_NAME = "manifest.json"
_TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx_cu13_bindings")
_PIECE_BYTES = 1 << 20


class ManifestError(Exception):
    """A built graph does not fit this machine or its own manifest; the message says how."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """How a graph came about.

    Attributes:
        model, graph: e.g. "sam-vit-h", "sam_encoder".
        checkpoint: "sha256:<hex>" of the weights.
        onnx: "sha256:<hex>" of the ONNX file.
        precision: "fp32" or "fp16".
        engine: "sha256:<hex>" of the TensorRT engine; empty for an ONNX file that is served itself.
        builder: "tensorrt 11.1.0" or "tensorrt_rtx 1.7.1.116"; empty likewise.
        targets: compute capabilities the engine was built for, e.g. ["8.6"].
        gpu: name of the GPU it was built on, empty when none was needed.
        profile: input name -> smallest, usual and largest shape.
        tools: package -> version.
        verification: what `python -m export verify` measured.
    """

    model: str
    graph: str
    checkpoint: str
    onnx: str
    precision: str
    engine: str = ""
    builder: str = ""
    targets: list[str] = field(default_factory=list)
    gpu: str = ""
    profile: dict[str, list[list[int]]] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    verification: dict[str, float] = field(default_factory=dict)


def sha256_of(*paths: Path) -> str:
    """Return "sha256:<hex>" of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    return f"sha256:{digest.hexdigest()}"


def tool_versions() -> dict[str, str]:
    """Return the versions of the installed tools that shape a graph."""
    installed = {}
    for name in _TOOLS:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `folder`/manifest.json."""
    text = json.dumps(asdict(manifest), indent=2, sort_keys=True)
    (folder / FILE_NAME).write_text(f"{text}\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read `folder`/manifest.json; raises ManifestError when it is not there or not readable."""
    path = folder / FILE_NAME
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ManifestError(f"{folder} has no {FILE_NAME}: build it with `python -m export all`") from error
    except (ValueError, TypeError) as error:
        raise ManifestError(f"{path} is no manifest: {error}") from error


def check_fits(manifest: Manifest, builder: str, compute_capability: str) -> None:
    """Raise ManifestError unless an engine runs under `builder` on a GPU of `compute_capability` ("8.6")."""
    if manifest.builder != builder:
        raise ManifestError(
            f"{manifest.graph} was built with {manifest.builder}; here is {builder}: build it again here"
        )
    if compute_capability not in manifest.targets:
        built_for = " and ".join(manifest.targets)
        raise ManifestError(
            f"{manifest.graph} was built for compute capability {built_for}; this GPU has {compute_capability}"
        )
