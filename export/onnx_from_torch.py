"""Torch modules to ONNX files."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from transformers import SamModel

from export.spec import Dim, GraphSpec
from export.wrappers.decoder import MaskDecoder, MaskRefiner
from export.wrappers.encoder import ImageEncoder
from service.tensors import DECODER_MODEL, ENCODER_MODEL, REFINER_MODEL

OPSET = 18
_MODULES = {ENCODER_MODEL: ImageEncoder, DECODER_MODEL: MaskDecoder, REFINER_MODEL: MaskRefiner}
_TORCH_DTYPES = {"UINT8": torch.uint8, "INT32": torch.int32, "FP16": torch.float16, "FP32": torch.float32}
_TRACE_SIZES: dict[str, int] = {"B": 2, "P": 3, "N": 4}  # any sizes that differ: axes are told apart by size
_MIN_PACKED_ELEMENTS = 256


def module_for(spec: GraphSpec, sam: SamModel, dtype: torch.dtype) -> nn.Module:
    """Return the module that computes the graph `spec`, in `dtype`, eval mode."""
    return _MODULES[spec.name](sam, dtype).eval()


def export_onnx(spec: GraphSpec, module: nn.Module, path: Path) -> None:
    """Write `module` as `path` with `spec`'s tensor names and dynamic axes."""
    axes = {name: torch.export.Dim(name, min=1) for name in _TRACE_SIZES}
    arguments = tuple(_example(tensor.dims, _TORCH_DTYPES[tensor.dtype]) for tensor in spec.inputs)
    shapes = tuple(
        {0: axes["B"]} | {i + 1: axes[d] for i, d in enumerate(tensor.dims) if not isinstance(d, int)}
        for tensor in spec.inputs
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        program = torch.onnx.export(
            module,
            arguments,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = pack_weights(program.model_proto)
    onnx.save(model, path)


def _example(dims: tuple[Dim, ...], dtype: torch.dtype) -> Tensor:
    return torch.ones([_TRACE_SIZES["B"], *(d if isinstance(d, int) else _TRACE_SIZES[d] for d in dims)], dtype=dtype)


def pack_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store as FP16, with a Cast, every FP32 weight that FP16 holds exactly; ONNX Runtime folds the Casts when it loads.

    Lossless, and half the file for a checkpoint whose weights were rounded to FP16.
    """
    graph = model.graph
    casts = []
    for weight in graph.initializer:
        if weight.data_type != TensorProto.FLOAT or np.prod(weight.dims) < _MIN_PACKED_ELEMENTS:
            continue
        array = numpy_helper.to_array(weight)
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), array):
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(half, f"{name}_fp16"))
        casts.append(helper.make_node("Cast", [weight.name], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
    for index, cast in enumerate(casts):
        graph.node.insert(index, cast)
    return model
