"""One TensorRT engine with its tensors on the GPU, to be run again and again."""

from typing import Any

import torch
from torch import Tensor

from export.engine_from_onnx import Builder, Engine, EngineError
from export.onnx_from_torch import TORCH_DTYPES
from export.spec import GraphSpec


class EngineRun:
    """Called, it runs the engine once on `inputs`, on torch's current stream; it does not wait for the end."""

    def __init__(self, builder: Builder, graph: GraphSpec, engine: Engine, inputs: dict[str, Tensor]) -> None:
        trt = builder.module
        self._engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(engine.content)
        if self._engine is None:
            raise EngineError(f"{builder.name} does not load its own engine of {graph.name}")
        self._context: Any = self._engine.create_execution_context()
        self._tensors = dict(inputs)
        for name, tensor in inputs.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
        for output in graph.outputs:
            shape = tuple(self._context.get_tensor_shape(output.name))
            self._tensors[output.name] = torch.empty(shape, dtype=TORCH_DTYPES[output.dtype], device="cuda")
        for name, tensor in self._tensors.items():
            self._context.set_tensor_address(name, tensor.data_ptr())

    def __call__(self) -> None:
        """Run once."""
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise EngineError("TensorRT did not run")
