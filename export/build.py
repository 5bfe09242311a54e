"""The steps between a checkpoint and a served model, each a folder in and a folder out."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from export.checkpoint import Checkpoint, Notify
from export.engine_from_onnx import Builder, EngineError, build_engine
from export.manifest import FILE_NAME, Manifest, read_manifest, sha256_of, tool_versions, write_manifest
from export.onnx_from_torch import Precision, export_onnx, module_for
from export.repository_from_spec import MODEL_FILES, render, write_repository
from export.spec import ModelSpec, Runtime, graph_specs


def export_graphs(checkpoint: Checkpoint, precision: Precision, folder: Path, notify: Notify) -> None:
    """Write `folder`/<graph>/model.onnx and manifest.json for each graph of the checkpoint's model."""
    model = checkpoint.model
    for graph in graph_specs(model.geometry):
        target = folder / graph.name
        target.mkdir(parents=True, exist_ok=True)
        path = target / "model.onnx"
        notify(f"{graph.name}: tracing and writing {precision} ONNX")
        export_onnx(graph, module_for(graph, checkpoint.weights, model.architecture, precision), path)
        files = sorted(target.glob("model.onnx*"))
        digest = sha256_of(*files)
        write_manifest(
            Manifest(model.name, graph.name, checkpoint.digest, digest, precision, tools=tool_versions()), target
        )
        notify(f"{graph.name}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")


def build_engines(
    model: ModelSpec, builder: Builder, source: Path, folder: Path, targets: Sequence[str], notify: Notify
) -> None:
    """Build `folder`/<graph>/model.plan from `source`/<graph>/model.onnx, with a manifest each.

    `targets` are compute capabilities for TensorRT-RTX; empty means this machine's GPU.

    Raises:
        EngineError: no target is named and there is no GPU, or TensorRT refuses a graph.
    """
    gpu, capability = ("", "") if targets else require_gpu()
    if builder.flavour == "tensorrt_rtx":
        targets = targets or [capability]
    for graph in graph_specs(model.geometry):
        target = folder / graph.name
        target.mkdir(parents=True, exist_ok=True)
        notify(f"{graph.name}: building with {builder.name} (minutes for a large encoder)")
        engine = build_engine(builder, graph, source / graph.name / "model.onnx", targets)
        path = target / MODEL_FILES["tensorrt"]
        path.write_bytes(engine.content)
        manifest = replace(
            read_manifest(source / graph.name),
            engine=sha256_of(path),
            builder=builder.name,
            targets=list(targets) or [capability],
            gpu=gpu,
            profile=engine.profile,
            tools=tool_versions(),
        )
        write_manifest(manifest, target)
        notify(f"{graph.name}: {len(engine.content) / 1e6:.1f} MB")


def install(model: ModelSpec, runtime: Runtime, source: Path, repository: Path) -> None:
    """Copy verified graphs from `source`/<graph>/ into a Triton repository, configurations included."""
    digests = set()
    for graph in graph_specs(model.geometry):
        target = repository / graph.name / "1"
        target.mkdir(parents=True, exist_ok=True)
        digests.add(read_manifest(source / graph.name).checkpoint)
        for file in source.joinpath(graph.name).iterdir():
            if file.name.startswith(MODEL_FILES[runtime]) or file.name == FILE_NAME:
                shutil.copyfile(file, target / file.name)
    if len(digests) != 1:
        raise ValueError(f"{source} mixes graphs of different checkpoints: {sorted(digests)}")
    write_repository(render(model, digests.pop(), runtime), repository)


def require_gpu() -> tuple[str, str]:
    """Return this GPU's name and compute capability, e.g. ("NVIDIA L4", "8.9"); raises EngineError without one."""
    if not torch.cuda.is_available():
        raise EngineError(
            "there is no GPU here (or torch is a CPU build); without one, `engine --tensorrt tensorrt_rtx` "
            "builds for a named --compute-capability"
        )
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}"
