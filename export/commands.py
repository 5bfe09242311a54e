"""The commands of `python -m export` that need torch."""

import argparse
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from export.build import build_engines, export_graphs, install, require_gpu
from export.candidates import Candidate, EngineCandidate, OnnxCandidate, TorchReference, graph_folder
from export.checkpoint import Checkpoint, CheckpointError, Notify, default_source, load_checkpoint
from export.engine_from_onnx import Builder, EngineError, find_builder
from export.manifest import ManifestError, read_manifest, write_manifest
from export.photographs import PhotographError, bundled_photographs, photographs_from
from export.repository_from_spec import default_repository
from export.spec import MODELS, graph_specs
from export.store import kept, store_key
from export.verify import Floors, Report, verify

EXPECTED_ERRORS = (CheckpointError, EngineError, ManifestError, PhotographError)


def run_onnx(options: argparse.Namespace, notify: Notify) -> int:
    """Write the graphs of a checkpoint as ONNX."""
    export_graphs(_checkpoint(options, notify), options.precision, options.output, notify)
    return 0


def run_engine(options: argparse.Namespace, notify: Notify) -> int:
    """Build engines from a folder of ONNX graphs."""
    builder = find_builder(options.flavour)
    build_engines(MODELS[options.model], builder, options.onnx, options.output, options.compute_capability, notify)
    return 0


def run_verify(options: argparse.Namespace, notify: Notify) -> int:
    """Verify what is installed, or a folder of ONNX graphs; 1 below the floor."""
    folder = options.onnx or options.repository or default_repository(options.runtime)
    runs_onnx = options.runtime == "cpu" or options.onnx is not None
    report = _verified(_checkpoint(options, notify), folder, options, notify, runs_onnx=runs_onnx)
    return 0 if report.passes else 1


def run_all(options: argparse.Namespace, notify: Notify) -> int:
    """Checkpoint -> ONNX (-> engines) -> gate -> repository. Below the floor nothing is installed; returns 1."""
    is_cpu = options.runtime == "cpu"
    builder, gpu = None, ("", "")
    if not is_cpu:  # what is missing is told before the long steps
        builder = find_builder(options.flavour)
        gpu = require_gpu()
    checkpoint = _checkpoint(options, notify)
    graphs = [graph.name for graph in graph_specs(checkpoint.model.geometry)]
    key = store_key(checkpoint.model.name, checkpoint.digest, builder.name if builder else "", *gpu)
    scratch = nullcontext(str(options.store)) if options.store else tempfile.TemporaryDirectory(prefix="sam-export-")
    with (
        scratch as folder,
        kept(Path(folder), key, graphs, lambda place: _build(checkpoint, builder, place, options, notify)) as built,
    ):
        if built is None:
            notify("nothing was installed")
            return 1
        repository = options.repository or default_repository(options.runtime)
        install(checkpoint.model, options.runtime, built, repository)
    notify(f"installed {checkpoint.model.name} in {repository}")
    return 0


def _build(
    checkpoint: Checkpoint, builder: Builder | None, place: Path, options: argparse.Namespace, notify: Notify
) -> bool:
    """Fill `place` with the graphs of a checkpoint, as ONNX or, given a builder, as engines; False below the floor."""
    graphs = place if builder is None else place / "onnx"
    export_graphs(checkpoint, "fp32" if builder is None else "fp16", graphs, notify)
    if builder is not None:
        build_engines(checkpoint.model, builder, graphs, place, (), notify)
        shutil.rmtree(graphs)
    report = _verified(checkpoint, place, options, notify, runs_onnx=builder is None)
    if report.passes:
        for graph in graph_specs(checkpoint.model.geometry):
            folder = place / graph.name
            write_manifest(replace(read_manifest(folder), verification=report.figures()), folder)
    return report.passes


def _checkpoint(options: argparse.Namespace, notify: Notify) -> Checkpoint:
    model = MODELS[options.model]
    return load_checkpoint(model, options.checkpoint or default_source(model), notify)


def _verified(
    checkpoint: Checkpoint, folder: Path, options: argparse.Namespace, notify: Notify, *, runs_onnx: bool
) -> Report:
    """Compare the graphs in `folder` with the checkpoint in FP32 and tell the table."""
    shape = checkpoint.model.architecture
    graphs = graph_specs(shape.geometry)
    for graph in graphs:
        made_from = read_manifest(graph_folder(folder, graph.name)).checkpoint
        if made_from != checkpoint.digest:
            raise ManifestError(f"{folder / graph.name} was made from another checkpoint ({made_from})")
    candidate: Candidate = (
        OnnxCandidate(graphs, folder) if runs_onnx else EngineCandidate(graphs, folder, find_builder(options.flavour))
    )
    photographs = [*photographs_from(options.images, shape.input_size), *bundled_photographs(shape.input_size)]
    notify(f"verifying against FP32 on {len(photographs)} images")
    report = verify(TorchReference(checkpoint), candidate, photographs, Floors())
    notify(report.table())
    return report
