"""ONNX Runtime sessions for tests."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


class Session:
    """An ONNX file under ONNX Runtime; `is_rounded=False` gives FP16 outputs as the FP32 they are rounded from."""

    def __init__(self, path: Path, *, is_rounded: bool = True) -> None:
        model = onnx.load(path)
        self._names = [output.name for output in model.graph.output]
        if not is_rounded:
            _skip_final_casts(model)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"]
        self._session = ort.InferenceSession(
            model.SerializeToString(), options, providers=providers, disabled_optimizers=["SkipLayerNormFusion"]
        )
        self._inputs = {tensor.name for tensor in self._session.get_inputs()}

    def __call__(self, **feeds: NDArray[Any]) -> Arrays:
        used = {name: np.ascontiguousarray(array) for name, array in feeds.items() if name in self._inputs}
        return dict(zip(self._names, self._session.run(None, used), strict=True))


def _skip_final_casts(model: onnx.ModelProto) -> None:
    producers = {name: node for node in model.graph.node for name in node.output}
    for output in model.graph.output:
        node = producers[output.name]
        if output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16:
            assert node.op_type == "Cast", f"{output.name} comes from {node.op_type}"
            output.name = node.input[0]
            output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
