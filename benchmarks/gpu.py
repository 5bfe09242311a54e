"""Encoder and decoder on the GPU, by batch: `python -m benchmarks.gpu`.

Real shapes of ViT-B, L and H with random weights: torch in FP32, torch in FP16 and compiled, and TensorRT where it is
installed (its engines are built here, which takes minutes). A share of the FLOP limit is of what the GPU's maker states
for dense products: FP32 without tensor cores, FP16 with them. Times are of whole calls, inputs being on the GPU.

With `--address`, the gRPC of a service whose Triton runs on this GPU, also the time of a cached prompt end to end.
Without a GPU it measures sam-tiny in FP32 on the CPU, which shows that it works, and says so.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.callers import Target
from benchmarks.closed_loop import Loop, run
from benchmarks.engine_run import EngineRun
from benchmarks.figures import Sheet, arguments
from benchmarks.gpu_rates import dense_tflops
from benchmarks.random_weights import random_weights
from export.engine_from_onnx import EngineError, build_engine, find_builder
from export.onnx_from_torch import TORCH_DTYPES, export_onnx, module_for
from export.spec import MODELS, AxisRange, GraphSpec, graph_spec
from export.weights import Weights
from service.tensors import DECODER_MODEL, ENCODER_MODEL

BATCHES = (1, 2, 4, 8, 16, 32)
VITS = ("sam-vit-b", "sam-vit-l", "sam-vit-h")
SIZES = {"P": 1, "N": 2}  # of a click: one prompt of two tokens
Run = Callable[[], object]


def main() -> None:
    """Measure what this machine can run."""
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    if device.type == "cpu":
        print("There is no GPU here (or torch is a CPU build): sam-tiny in FP32 on the CPU shows that this works.")
        options.models, options.batches = ["sam-tiny"], options.batches[:2]
    sheet = Sheet("gpu")
    for model in options.models:
        shape = MODELS[model].architecture
        weights = random_weights(shape)
        for graph in (graph_spec(shape.geometry, each) for each in (ENCODER_MODEL, DECODER_MODEL)):
            title = f"{model} {graph.name.removeprefix('sam_')} on {name} by images"
            flops = flops_of(graph, module_for(graph, weights, shape, "fp32", "projected").to(device), device)
            for case, runs in variants(model, graph, weights, device):
                for batch in options.batches:
                    ms = median_ms(runs(batch), device, options.seconds)
                    figures = {"ms": ms, "images/s": 1000 * batch / ms}
                    limit = limit_of(name, case)
                    if limit:
                        figures["% of the limit"] = 100 * flops * batch / (ms / 1000) / limit
                    sheet.add(title, case, figures, at=batch)
    if options.address:
        outcome = asyncio.run(run(Target("gRPC", options.address, channels=1), Loop(1, 10.0)))
        sheet.add("A cached prompt, one caller, Triton on the GPU", "gRPC", outcome.figures())
    sheet.publish(options.csv)


def parse() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = arguments("gpu", __doc__)
    parser.add_argument("--models", nargs="+", choices=VITS, default=list(VITS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement (default: %(default)s)")
    parser.add_argument("--address", help="host:port of a running service's gRPC")
    options = parser.parse_args()
    if options.quick:
        options.seconds = 0.2
    return options


def variants(
    model: str, graph: GraphSpec, weights: Weights, device: torch.device
) -> Iterator[tuple[str, Callable[[int], Run]]]:
    """Yield each way to run a graph: its name, and what makes a run of so many images."""
    shape = MODELS[model].architecture
    on_gpu = device.type == "cuda"
    yield "torch FP32", torch_runs(graph, module_for(graph, weights, shape, "fp32", "projected").to(device), device)
    if not on_gpu:
        return
    half = module_for(graph, weights, shape, "fp16")
    yield "torch FP16, compiled", torch_runs(graph, torch.compile(half.to(device), dynamic=False), device)
    try:
        builder = find_builder("tensorrt")
    except EngineError as error:
        print(f"no TensorRT: {error}")
        return
    wide = replace(graph, images=AxisRange(1, 8, max(BATCHES)))
    with tempfile.TemporaryDirectory(prefix="sam-gpu-") as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(graph, half.cpu(), path)
        engine = build_engine(builder, wide, path)
    yield "TensorRT FP16", lambda batch: EngineRun(builder, graph, engine, inputs_of(graph, batch, device))


def torch_runs(graph: GraphSpec, module: Callable[..., object], device: torch.device) -> Callable[[int], Run]:
    """Return what makes a run of so many images."""

    def run_of(batch: int) -> Run:
        inputs = inputs_of(graph, batch, device)

        def once() -> object:
            with torch.inference_mode():
                return module(*inputs.values())

        return once

    return run_of


def inputs_of(graph: GraphSpec, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Return tensors of the graph's shapes for so many images, a click on each."""
    dims = {
        tensor.name: [batch, *(SIZES[d] if isinstance(d, str) else d for d in tensor.dims)] for tensor in graph.inputs
    }
    return {
        tensor.name: torch.ones(dims[tensor.name], dtype=TORCH_DTYPES[tensor.dtype], device=device)
        for tensor in graph.inputs
    }


def flops_of(graph: GraphSpec, module: nn.Module, device: torch.device) -> int:
    """Return the floating-point operations of one image: two for each product that is added up."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(*inputs_of(graph, 1, device).values())
    return int(counter.get_total_flops())


def limit_of(gpu: str, case: str) -> float | None:
    """Return the FLOP/s that the GPU's maker states; None of one that is not in the table."""
    rates = dense_tflops(gpu)
    if rates is None:
        return None
    fp32, fp16 = rates
    return 1e12 * (fp32 if case.endswith("FP32") else fp16)


def median_ms(once: Run, device: torch.device, seconds: float) -> float:
    """Return the median time of a call; the first few, in which a GPU's kernels are made and chosen, are left out."""
    times_ms: list[float] = []
    for _ in range(3 if device.type == "cuda" else 1):
        once()
    end_s = time.perf_counter() + seconds
    while len(times_ms) < 3 or time.perf_counter() < end_s:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began_s = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times_ms.append(1000 * (time.perf_counter() - began_s))
    return statistics.median(times_ms)


if __name__ == "__main__":
    main()
