"""Graphs for the export tests: the committed tiny ones, and a shallow ViT-B of full width exported once."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.architecture import SAM_TINY, Architecture
from export.build import export_graphs
from export.checkpoint import Checkpoint, default_source, load_checkpoint
from export.engine_from_onnx import Builder, EngineError, find_builder
from export.onnx_from_torch import Precision, export_onnx, module_for
from export.photographs import Photograph, bundled_photographs
from export.repository_from_spec import default_repository
from export.spec import MODELS, ModelSpec, graph_specs
from export.weights import Weights
from service.tensors import DECODER_MODEL, ENCODER_MODEL, REFINER_MODEL
from tests.export.original import load_weights, original_sam
from tests.export.sessions import Session

# Everything of ViT-B but its depth: one windowed block, one global one.
SHALLOW_VIT_B = Architecture(1024, width=768, depth=2, heads=12, window=14, global_blocks=(1,))


def skip_or_fail(reason: str) -> None:
    """Skip on a developer's machine; in CI a missing piece is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True, slots=True)
class Pair:
    """The original with some weights, and our FP32 graphs with the same."""

    shape: Architecture
    original: Any
    weights: Weights
    folder: Path
    encoder: Session
    decoder: Session
    refiner: Session


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Checkpoint:
    model = MODELS["sam-tiny"]
    return load_checkpoint(model, default_source(model), lambda _: None)


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Checkpoint) -> Pair:
    """The committed graphs of the bundled model."""
    sam = original_sam(SAM_TINY)
    load_weights(sam, tiny_checkpoint.weights)
    folder = default_repository("cpu")
    paths = (folder / name / "1" / "model.onnx" for name in (ENCODER_MODEL, DECODER_MODEL, REFINER_MODEL))
    sessions = (Session(path, is_rounded=False) for path in paths)
    return Pair(SAM_TINY, sam, tiny_checkpoint.weights, folder, *sessions)


@pytest.fixture(scope="session")
def shallow_model() -> ModelSpec:
    return ModelSpec("shallow-vit-b", SHALLOW_VIT_B, "none")


@pytest.fixture(scope="session")
def shallow(shallow_model: ModelSpec, tmp_path_factory: pytest.TempPathFactory, exported: Callable[..., Path]) -> Pair:
    """Random ViT-B weights, through Meta's checkpoint format and our loader."""
    sam = original_sam(SHALLOW_VIT_B)
    path = tmp_path_factory.mktemp("meta") / "shallow.pth"
    torch.save(sam.state_dict(), path)
    weights = load_checkpoint(shallow_model, str(path), lambda _: None).weights
    path.unlink()
    folder = exported(SHALLOW_VIT_B, weights, "fp32")
    names = (ENCODER_MODEL, DECODER_MODEL, REFINER_MODEL)
    sessions = (Session(folder / name / "model.onnx", is_rounded=False) for name in names)
    return Pair(SHALLOW_VIT_B, sam, weights, folder, *sessions)


@pytest.fixture(scope="session")
def shallow_fp16(shallow: Pair, exported: Callable[..., Path]) -> Path:
    """The same weights as strongly typed FP16 graphs."""
    return exported(SHALLOW_VIT_B, shallow.weights, "fp16")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export the three graphs of some weights; returns the folder with <graph>/model.onnx."""

    def export(shape: Architecture, weights: Weights, precision: Precision) -> Path:
        folder = tmp_path_factory.mktemp(f"{shape.width}-{precision}")
        for graph in graph_specs(shape.geometry):
            (folder / graph.name).mkdir()
            export_onnx(graph, module_for(graph, weights, shape, precision), folder / graph.name / "model.onnx")
        return folder

    return export


@pytest.fixture(scope="session")
def tiny_fp16(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m export onnx --precision fp16` writes for the bundled model."""
    folder = tmp_path_factory.mktemp("tiny-fp16")
    export_graphs(tiny_checkpoint, "fp16", folder, lambda _: None)
    return folder


@pytest.fixture(scope="session")
def builder() -> Builder:
    """TensorRT-RTX, which needs no GPU to build."""
    try:
        return find_builder("tensorrt_rtx")
    except EngineError as error:
        skip_or_fail(str(error))
        raise


@pytest.fixture(scope="session")
def tiny_photographs() -> list[Photograph]:
    return bundled_photographs(SAM_TINY.input_size)


def relative_error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Norm of the difference over the norm of what was wanted."""
    difference = found.astype(np.float64) - wanted.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted.astype(np.float64)))
