"""What sam-tiny's graphs take through ONNX Runtime, without Triton and gateway: `python -m benchmarks.graphs_cpu`.

The graphs and the session options are those that model_repository/cpu serves: an image on all usable cores, prompts on
one. Wall time, rounds interleaved. The targets, for two idle cores: 150 ms for one image, 15 ms for one click.
"""

import argparse
import os
import statistics
import time
from typing import Any

import numpy as np
import onnxruntime as ort

from service.tensors import DECODER_MODEL, ENCODER_MODEL, REFINER_MODEL
from tests.running import ROOT

WARM_UPS = 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.graphs_cpu", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    encoder = session(ENCODER_MODEL)
    decoder, refiner = (session(model, threads=1) for model in (DECODER_MODEL, REFINER_MODEL))  # as model.py has them
    image = encoder.get_inputs()[0].shape[1]
    feeds: dict[str, tuple[ort.InferenceSession, dict[str, Any]]] = {
        "encode an image": (encoder, {"image": pixels(image), "valid_size": np.array([[image, image]], np.int32)})
    }
    embedding = encoder.run(["embedding"], feeds["encode an image"][1])[0]
    for name, graph, prompts in (
        ("decode a click", decoder, 1),
        ("refine a click", refiner, 1),
        ("decode 64 clicks", decoder, 64),
    ):
        feeds[name] = (graph, clicks(prompts, image, embedding, refine=graph is refiner))
    taken_ms: dict[str, list[float]] = {name: [] for name in feeds}
    for _ in range(WARM_UPS + rounds):
        for name, (graph, feed) in feeds.items():
            started = time.perf_counter()
            graph.run(None, feed)
            taken_ms[name].append((time.perf_counter() - started) * 1e3)
    cores = len(os.sched_getaffinity(0))
    print(f"ONNX Runtime {ort.__version__}, {cores} cores, prompts on one, {image} px, {rounds} rounds\n")
    print(f"{'':<20}{'median ms':>10}{'fastest':>10}{'slowest':>10}")
    for name, taken in taken_ms.items():
        kept = taken[WARM_UPS:]
        print(f"{name:<20}{statistics.median(kept):>10.1f}{min(kept):>10.1f}{max(kept):>10.1f}")


def session(model: str, threads: int | None = None) -> ort.InferenceSession:
    """Open a served graph with model.py's options; on all cores, as it does for images, unless `threads` are given."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = ROOT / "model_repository" / "cpu" / model / "1" / "model.onnx"
    return ort.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["SkipLayerNormFusion"]
    )


def pixels(side: int) -> np.ndarray:
    """Return a batch of one random image; what it shows does not change what it costs."""
    return np.random.default_rng(0).integers(0, 255, (1, side, side, 3), np.uint8)


def clicks(count: int, side: int, embedding: np.ndarray, *, refine: bool) -> dict[str, np.ndarray]:
    """Return the decoder's inputs for so many clicks on one image, with low-res logits to refine if asked."""
    random = np.random.default_rng(1)
    feed = {
        "embedding": embedding,
        "point_coords": random.uniform(0, side, (1, count, 2, 2)).astype(np.float32),
        "point_labels": np.tile(np.array([1, -1], np.int32), (1, count, 1)),
    }
    low = side // 4
    return feed | ({"mask_input": random.normal(size=(1, count, low, low)).astype(np.float16)} if refine else {})


if __name__ == "__main__":
    main()
