"""The strongly typed FP16 graphs, run on the CPU, segment photographs as FP32 does."""

from pathlib import Path

import numpy as np

from export.candidates import OnnxCandidate, TorchReference
from export.checkpoint import Checkpoint
from export.photographs import Photograph, bundled_photographs
from export.spec import graph_specs
from export.verify import Floors, verify
from service.tensors import EMBEDDING, ENCODER_MODEL
from tests.export.conftest import SHALLOW_VIT_B, Pair
from tests.export.sessions import Session


def test_tiny_in_half_precision_passes_the_gate(
    tiny_checkpoint: Checkpoint, tiny_fp16: Path, tiny_photographs: list[Photograph]
) -> None:
    """Embedding cosine >= 0.9999, mask IoU >= 0.998 on average and >= 0.99 everywhere, on seven photographs."""
    graphs = graph_specs(tiny_checkpoint.model.geometry)
    candidate = OnnxCandidate(graphs, tiny_fp16)
    report = verify(TorchReference(tiny_checkpoint), candidate, tiny_photographs, Floors(0.9999, 0.998, 0.99))
    assert report.passes, report.table()


def test_vit_b_encoder_in_half_precision_keeps_the_embedding(shallow: Pair, shallow_fp16: Path) -> None:
    """Full width, two blocks, random weights: cosine >= 0.9999."""
    photograph = bundled_photographs(SHALLOW_VIT_B.input_size)[1]
    feeds = {"image": photograph.image, "valid_size": photograph.valid_size}
    wanted = shallow.encoder(**feeds)[EMBEDDING].astype(np.float64).ravel()
    found = Session(shallow_fp16 / ENCODER_MODEL / "model.onnx")(**feeds)[EMBEDDING].astype(np.float64).ravel()
    assert found @ wanted / (np.linalg.norm(found) * np.linalg.norm(wanted)) >= 0.9999
