"""The mask decoder on one CPU thread: the original's graph beside ours, real SAM shapes, same ONNX Runtime.

Run: python benchmarks/decoder_cpu.py [--rounds 30]

CPU time, rounds interleaved, smallest of each graph: other work on the machine disturbs all of them alike. Weights are
random; arithmetic and shapes are ViT-B/L/H's, whose decoders are the same.
"""

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "export")]

from original import original_sam  # noqa: E402 - the reference that the tests use

from export.architecture import Architecture  # noqa: E402
from export.meta_keys import sam_keys_from_meta  # noqa: E402
from export.onnx_from_torch import export_onnx, module_for  # noqa: E402
from export.spec import graph_spec  # noqa: E402
from export.weights import Weights  # noqa: E402
from service.tensors import DECODER_MODEL  # noqa: E402

SHAPE = Architecture(1024, width=96, depth=1, heads=2, window=14, global_blocks=(0,))  # the encoder is not run
OURS = ["SkipLayerNormFusion"]  # what the served model disables


class OriginalDecoder(nn.Module):
    """segment-anything 1.0's own modules: one image, one prompt, all four masks at low resolution."""

    def __init__(self, sam: Any) -> None:  # noqa: ANN401 - an untyped package
        super().__init__()
        self.prompt_encoder, self.mask_decoder = sam.prompt_encoder, sam.mask_decoder

    def forward(self, embedding: Tensor, point_coords: Tensor, point_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the points as `SamOnnxModel` does and decode."""
        encoder = self.prompt_encoder
        placed = encoder.pe_layer._pe_encoding((point_coords + 0.5) / SHAPE.input_size)  # noqa: SLF001
        labels = point_labels[..., None]
        sparse = placed * (labels != -1) + encoder.not_a_point_embed.weight * (labels == -1)
        for label in range(4):
            sparse = sparse + encoder.point_embeddings[label].weight * (labels == label)
        dense = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(1, -1, SHAPE.grid, SHAPE.grid)
        masks, scores = self.mask_decoder.predict_masks(embedding, encoder.get_dense_pe(), sparse, dense)
        return masks, scores


def session(path: Path, disabled_optimizers: list[str]) -> ort.InferenceSession:
    """Open on one thread that does not spin."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled_optimizers
    )


def export_original(sam: Any, path: Path) -> None:  # noqa: ANN401
    """Export as the original's script does, through the TorchScript exporter."""
    example = (torch.zeros(1, 256, 64, 64), torch.zeros(1, 2, 2), torch.tensor([[1, -1]], dtype=torch.int32))
    names = ["embedding", "point_coords", "point_labels"]
    axes = {"point_coords": {1: "N"}, "point_labels": {1: "N"}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = OriginalDecoder(sam).eval()
        torch.onnx.export(
            module, example, str(path), input_names=names, dynamic_axes=axes, opset_version=17, dynamo=False
        )


def measure(runs: dict[str, tuple[ort.InferenceSession, dict[str, NDArray[Any]]]], rounds: int) -> dict[str, float]:
    """Return the smallest CPU time per graph, milliseconds."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, (graph, feeds) in runs.items():
            started = time.process_time()
            graph.run(None, feeds)
            best[name] = min(best[name], (time.process_time() - started) * 1e3)
    return best


def main() -> None:
    """Export, compare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    sam = original_sam(SHAPE)
    weights = Weights(sam_keys_from_meta(sam.state_dict()))
    spec = graph_spec(SHAPE.geometry, DECODER_MODEL)
    random = np.random.default_rng(0)
    embedding = random.normal(0, 0.3, (1, 256, 64, 64)).astype(np.float16)
    coords = random.uniform(0, 1024, (1, 1, 2, 2)).astype(np.float32)
    labels = np.array([[[1, -1]]], np.int32)
    ours = {"embedding": embedding, "point_coords": coords, "point_labels": labels}
    theirs = {"embedding": embedding.astype(np.float32), "point_coords": coords[0], "point_labels": labels[0]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_original(sam, folder / "original.onnx")
        for form in ("projected", "absorbed"):
            export_onnx(spec, module_for(spec, weights, SHAPE, "fp32", form), folder / f"{form}.onnx")
        runs = {
            "original graph, ONNX Runtime's defaults": (session(folder / "original.onnx", []), theirs),
            "original graph, our session options": (session(folder / "original.onnx", OURS), theirs),
            "ours, projected form": (session(folder / "projected.onnx", OURS), ours),
            "ours, absorbed form (what cpu/ serves)": (session(folder / "absorbed.onnx", OURS), ours),
        }
        answers = {name: graph.run(None, feeds) for name, (graph, feeds) in runs.items()}
        times = measure(runs, rounds)
    first = next(iter(runs))
    print(
        f"ONNX Runtime {ort.__version__}, 1 thread, 1 image, 1 prompt, 7 tokens, CPU time, smallest of {rounds} runs\n"
    )
    print(f"{'graph':<42}{'ms':>8}{'speed-up':>10}{'IoU head':>12}")
    for name in runs:
        error = float(np.abs(answers[name][1].reshape(4) - answers[first][1].reshape(4)).max())
        print(f"{name:<42}{times[name]:>8.1f}{times[first] / times[name]:>9.2f}x{error:>12.1e}")
    print("\n'IoU head' is the largest difference of the predicted IoUs from the original graph's, FP32 on both sides.")


if __name__ == "__main__":
    main()
