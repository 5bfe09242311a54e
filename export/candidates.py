"""What can be verified: three graphs as they will be served, run by ONNX Runtime or by TensorRT."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from export.checkpoint import Checkpoint
from export.engine_from_onnx import Builder, EngineError
from export.manifest import check_fits, read_manifest
from export.onnx_from_torch import TORCH_DTYPES, module_for
from export.repository_from_spec import MODEL_FILES
from export.spec import GraphSpec, graph_specs

Arrays = dict[str, NDArray[Any]]


class Candidate(Protocol):
    """Runs a graph by name: input name -> array in, output name -> array out; batch axis included."""

    def __call__(self, graph: str, feeds: Arrays) -> Arrays:
        """Run one graph."""
        ...


class TorchReference:
    """The FP32 modules in the original's form, which everything is compared to; on the GPU if there is one."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        shape = checkpoint.model.architecture
        self._graphs: dict[str, GraphSpec] = {graph.name: graph for graph in graph_specs(shape.geometry)}
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._modules: dict[str, nn.Module] = {
            name: module_for(graph, checkpoint.weights, shape, "fp32", "projected").to(self._device)
            for name, graph in self._graphs.items()
        }

    def __call__(self, graph: str, feeds: Arrays) -> Arrays:
        """Run one graph."""
        spec = self._graphs[graph]
        inputs = (torch.from_numpy(feeds[tensor.name]).to(self._device) for tensor in spec.inputs)
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            answer = self._modules[graph](*inputs)
        outputs = answer if isinstance(answer, tuple) else (answer,)
        return {tensor.name: out.cpu().numpy() for tensor, out in zip(spec.outputs, outputs, strict=True)}


class OnnxCandidate:
    """ONNX files under ONNX Runtime on the CPU: `folder`/<graph>/[1/]model.onnx."""

    def __init__(self, graphs: tuple[GraphSpec, ...], folder: Path) -> None:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._sessions = {
            graph.name: ort.InferenceSession(
                str(graph_folder(folder, graph.name) / "model.onnx"),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["SkipLayerNormFusion"],
            )
            for graph in graphs
        }

    def __call__(self, graph: str, feeds: Arrays) -> Arrays:
        """Run one graph."""
        session = self._sessions[graph]
        outputs = session.run(None, feeds)
        return {tensor.name: out for tensor, out in zip(session.get_outputs(), outputs, strict=True)}


class EngineCandidate:
    """TensorRT engines on this machine's GPU: `folder`/<graph>/[1/]model.plan.

    Raises:
        ManifestError: an engine was built for another GPU or another TensorRT.
        EngineError: there is no GPU, or TensorRT does not load an engine.
    """

    def __init__(self, graphs: tuple[GraphSpec, ...], folder: Path, builder: Builder) -> None:
        if not torch.cuda.is_available():
            raise EngineError(
                "engines can only be run, and so verified, on a machine with a GPU and a CUDA build of torch"
            )
        major, minor = torch.cuda.get_device_capability()
        trt = builder.module
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._graphs = {graph.name: graph for graph in graphs}
        self._contexts: dict[str, Any] = {}
        for name in self._graphs:
            place = graph_folder(folder, name)
            check_fits(read_manifest(place), builder.name, f"{major}.{minor}")
            engine = runtime.deserialize_cuda_engine((place / MODEL_FILES["tensorrt"]).read_bytes())
            if engine is None:
                raise EngineError(f"{builder.name} does not load {place / MODEL_FILES['tensorrt']}")
            self._contexts[name] = engine.create_execution_context()

    def __call__(self, graph: str, feeds: Arrays) -> Arrays:
        """Run one graph."""
        context, spec = self._contexts[graph], self._graphs[graph]
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).cuda() for name, array in feeds.items()}
        for name, tensor in tensors.items():
            context.set_input_shape(name, tuple(tensor.shape))
        for output in spec.outputs:
            shape = tuple(context.get_tensor_shape(output.name))
            tensors[output.name] = torch.empty(shape, dtype=TORCH_DTYPES[output.dtype], device="cuda")
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream):
            raise EngineError(f"TensorRT did not run {graph}")
        stream.synchronize()
        return {output.name: tensors[output.name].cpu().numpy() for output in spec.outputs}


def graph_folder(folder: Path, graph: str) -> Path:
    """Return where a graph's files lie: `folder`/<graph>/1 in a Triton repository, else `folder`/<graph>."""
    versioned = folder / graph / "1"
    return versioned if versioned.is_dir() else folder / graph
