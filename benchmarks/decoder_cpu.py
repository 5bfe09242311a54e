"""The mask decoder on one CPU thread: the original's graph beside ours, real SAM shapes, same ONNX Runtime.

Run: python -m benchmarks.decoder_cpu [--rounds 30]

The original is the package's own `SamOnnxModel`, run as far as its low-res masks (its upscaling to the image's size is
the gateway's work here). CPU time, rounds interleaved, smallest of each graph: other work on the machine disturbs all
of them alike. Weights are random; arithmetic and shapes are ViT-B/L/H's, whose decoders are the same.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from export.architecture import Architecture
from export.meta_keys import sam_keys_from_meta
from export.onnx_from_torch import export_onnx, module_for
from export.spec import graph_spec
from export.weights import Weights
from service.tensors import DECODER_MODEL
from tests.export.original import original_module, original_sam  # the reference that the tests use

SHAPE = Architecture(1024, width=96, depth=1, heads=2, window=14, global_blocks=(0,))  # the encoder is not run
OURS = ["SkipLayerNormFusion"]  # what the served model disables
ORIGINAL_OUTPUTS = ["iou_predictions", "low_res_masks"]
OUR_OUTPUTS = ["iou_scores", "low_res_masks"]


def session(path: Path, disabled_optimizers: list[str]) -> ort.InferenceSession:
    """Open on one thread that does not spin."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled_optimizers
    )


def export_original(sam: Any, path: Path) -> None:  # noqa: ANN401
    """Export the package's own `SamOnnxModel` as its script does: TorchScript exporter, opset 17."""
    example = {name: torch.from_numpy(array) for name, array in original_feeds().items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            original_module("utils.onnx").SamOnnxModel(sam, return_single_mask=False).eval(),
            tuple(example.values()),
            str(path),
            input_names=list(example),
            output_names=["masks", *ORIGINAL_OUTPUTS],
            dynamic_axes={"point_coords": {1: "num_points"}, "point_labels": {1: "num_points"}},
            opset_version=17,
            dynamo=False,
        )


def our_feeds() -> dict[str, NDArray[Any]]:
    """One click on one random embedding."""
    random = np.random.default_rng(0)
    return {
        "embedding": random.normal(0, 0.3, (1, 256, 64, 64)).astype(np.float16),
        "point_coords": random.uniform(0, 1024, (1, 1, 2, 2)).astype(np.float32),
        "point_labels": np.array([[[1, -1]]], np.int32),
    }


def original_feeds() -> dict[str, NDArray[Any]]:
    """The same click for the original's graph."""
    ours = our_feeds()
    return {
        "image_embeddings": ours["embedding"].astype(np.float32),
        "point_coords": ours["point_coords"][0],
        "point_labels": ours["point_labels"][0].astype(np.float32),
        "mask_input": np.zeros((1, 1, 256, 256), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array([1024, 1024], np.float32),
    }


def timed_run(
    graph: ort.InferenceSession, outputs: list[str], feeds: dict[str, NDArray[Any]]
) -> tuple[float, list[Any]]:
    """Run only what `outputs` need; returns the CPU time in milliseconds and the outputs."""
    options = ort.RunOptions()
    options.only_execute_path_to_fetches = True
    started = time.process_time()
    answer = graph.run(outputs, feeds, options)
    return (time.process_time() - started) * 1e3, answer


def main() -> None:
    """Export, compare, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decoder_cpu", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    sam = original_sam(SHAPE)
    weights = Weights(sam_keys_from_meta(sam.state_dict()))
    spec = graph_spec(SHAPE.geometry, DECODER_MODEL)
    ours, theirs = our_feeds(), original_feeds()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_original(sam, folder / "original.onnx")
        for form in ("projected", "absorbed"):
            export_onnx(spec, module_for(spec, weights, SHAPE, "fp32", form), folder / f"{form}.onnx")
        runs = {
            "original graph, ONNX Runtime's defaults": (
                session(folder / "original.onnx", []),
                ORIGINAL_OUTPUTS,
                theirs,
            ),
            "original graph, our session options": (session(folder / "original.onnx", OURS), ORIGINAL_OUTPUTS, theirs),
            "ours, projected form": (session(folder / "projected.onnx", OURS), OUR_OUTPUTS, ours),
            "ours, absorbed form (what cpu/ serves)": (session(folder / "absorbed.onnx", OURS), OUR_OUTPUTS, ours),
        }
    best = dict.fromkeys(runs, float("inf"))
    answers: dict[str, list[Any]] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            elapsed_ms, answers[name] = timed_run(*run)
            best[name] = min(best[name], elapsed_ms)
    report(best, answers, rounds)


def report(best: dict[str, float], answers: dict[str, list[Any]], rounds: int) -> None:
    """Print the table; differences are from the original graph."""
    first = next(iter(best))
    print(f"ONNX Runtime {ort.__version__}, 1 thread, 1 image, 1 click, CPU time, smallest of {rounds} runs\n")
    print(f"{'graph':<42}{'ms':>7}{'speed-up':>10}{'IoU scores':>12}{'logits/range':>14}")
    wanted_scores, wanted_masks = (array.reshape(4, -1) for array in answers[first])
    for name, (scores, masks) in answers.items():
        score_error = np.abs(scores.reshape(4, -1) - wanted_scores).max()
        mask_error = np.abs(masks.reshape(4, -1) - wanted_masks).max() / np.ptp(wanted_masks)
        print(f"{name:<42}{best[name]:>7.1f}{best[first] / best[name]:>9.2f}x{score_error:>12.1e}{mask_error:>14.1e}")
    print("\nLast columns: largest difference from the original graph. Our logits are rounded to FP16 when they leave.")


if __name__ == "__main__":
    main()
