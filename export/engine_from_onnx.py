"""ONNX files to TensorRT engines: one path for `tensorrt` (10.12 and later, 11.x) and `tensorrt_rtx`.

Precision is the ONNX file's alone: networks are strongly typed, which TensorRT 11 always is and 10.12 is on request. A
TensorRT engine runs on the GPU model it was built on, under the version that built it. TensorRT-RTX builds for named
compute capabilities instead, and so also on a machine without a GPU.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from export.spec import GraphSpec, TensorSpec

Flavour = Literal["tensorrt", "tensorrt_rtx"]
_MODULES: dict[Flavour, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
_OLDEST: dict[Flavour, tuple[int, int]] = {"tensorrt": (10, 12), "tensorrt_rtx": (1, 0)}
_DTYPES = {"UINT8": "UINT8", "INT32": "INT32", "FP16": "HALF", "FP32": "FLOAT"}


class EngineError(Exception):
    """TensorRT is missing, or refuses the graph; the message carries TensorRT's own reasons."""


@dataclass(frozen=True, slots=True)
class Builder:
    """An importable TensorRT; `name` is e.g. "tensorrt_rtx 1.7.1.116"."""

    flavour: Flavour
    module: Any
    name: str


@dataclass(frozen=True, slots=True)
class Engine:
    """A serialised engine and the shapes it accepts, input -> (smallest, usual, largest)."""

    content: bytes
    profile: dict[str, list[list[int]]]


def find_builder(flavour: Flavour) -> Builder:
    """Import TensorRT.

    Raises:
        EngineError: it is not installed, or too old for strongly typed networks.
    """
    for name in _MODULES[flavour]:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        major, minor = (int(part) for part in module.__version__.split(".")[:2])
        if (major, minor) < _OLDEST[flavour]:
            oldest = ".".join(map(str, _OLDEST[flavour]))
            raise EngineError(f"{flavour} {module.__version__} is too old: strongly typed networks need {oldest}")
        return Builder(flavour, module, f"{flavour} {module.__version__}")
    where = "the Triton image carries it" if flavour == "tensorrt" else "pip install tensorrt_rtx_cu13_bindings"
    raise EngineError(f"{flavour} is not installed ({where})")


def build_engine(builder: Builder, graph: GraphSpec, onnx_path: Path, targets: Sequence[str] = ()) -> Engine:
    """Build the engine of one graph.

    Args:
        builder: from `find_builder`.
        graph: what the file must contain; its axis ranges become the optimisation profile.
        onnx_path: the graph, with external data beside it if it has any.
        targets: compute capabilities such as "8.6", for `tensorrt_rtx` only; empty means this machine's GPU.

    Raises:
        EngineError: the graph does not parse, has other tensors than `graph`, or does not build.
    """
    trt = builder.module
    log = _error_log(trt)
    native = trt.Builder(log)
    if native is None:
        raise EngineError(f"{builder.name} cannot start here: {log.reasons()}")
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows nothing else
    network = native.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_path)):
        raise EngineError(f"{builder.name} cannot parse {graph.name}: {log.reasons()}")
    check_tensors(trt, graph, network)
    config = native.create_builder_config()
    if targets:
        _aim_at(builder, config, targets)
    shapes = profile_shapes(graph)
    profile = native.create_optimization_profile()
    for name, (smallest, usual, largest) in shapes.items():
        profile.set_shape(name, smallest, usual, largest)
    config.add_optimization_profile(profile)
    plan = native.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{builder.name} cannot build {graph.name}: {log.reasons()}")
    return Engine(bytes(plan), shapes)


def profile_shapes(graph: GraphSpec) -> dict[str, list[list[int]]]:
    """Return each input's smallest, usual and largest shape, batch axis included."""
    return {tensor.name: [_shape(graph, tensor, size) for size in range(3)] for tensor in graph.inputs}


def _shape(graph: GraphSpec, tensor: TensorSpec, size: int) -> list[int]:
    ranges = [graph.images, *(graph.axis(dim) for dim in tensor.dims)]
    return [(axis.smallest, axis.usual, axis.largest)[size] for axis in ranges]


def check_tensors(trt: Any, graph: GraphSpec, network: Any) -> None:  # noqa: ANN401 - TensorRT's classes are untyped
    """Raise EngineError unless the network's inputs and outputs are `graph`'s: names, types and shapes."""
    found_inputs = [network.get_input(index) for index in range(network.num_inputs)]
    found_outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for kind, wanted, found in (("input", graph.inputs, found_inputs), ("output", graph.outputs, found_outputs)):
        expected = {t.name: _described(getattr(trt.DataType, _DTYPES[t.dtype]), t.dims) for t in wanted}
        actual = {t.name: (str(t.dtype), tuple(t.shape)) for t in found}
        if actual != expected:
            raise EngineError(f"{graph.name} has {kind}s {actual}, expected {expected}")


def _described(dtype: Any, dims: Sequence[int | str]) -> tuple[str, tuple[int, ...]]:  # noqa: ANN401
    return str(dtype), (-1, *(dim if isinstance(dim, int) else -1 for dim in dims))


def _aim_at(builder: Builder, config: Any, targets: Sequence[str]) -> None:  # noqa: ANN401
    known = getattr(builder.module, "ComputeCapability", None)
    if known is None or builder.flavour != "tensorrt_rtx":
        raise EngineError(
            f"{builder.name} builds for the GPU it runs on and cannot aim at compute capability {targets[0]}"
        )
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        capability = getattr(known, f"SM{target.replace('.', '')}", None)
        if capability is None:
            names = ", ".join(name.removeprefix("SM") for name in known.__members__ if name.startswith("SM"))
            raise EngineError(f"{builder.name} does not know compute capability {target}; it knows {names}")
        config.set_compute_capability(capability, index)


def _error_log(trt: Any) -> Any:  # noqa: ANN401
    """Return a TensorRT logger that keeps errors, so that they can be told in the exception."""

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
            if severity in {trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR}:
                self.errors.append(message)

        def reasons(self) -> str:
            return "; ".join(self.errors[:3]) or "it gave no reason"

    return ErrorLog()
