"""Torch modules to ONNX files."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from export.architecture import Architecture
from export.spec import Dim, GraphSpec
from export.weights import Weights
from export.wrappers.decoder import Form, MaskDecoder, MaskRefiner
from export.wrappers.encoder import ImageEncoder
from service.tensors import DECODER_MODEL, ENCODER_MODEL

Precision = Literal["fp32", "fp16"]
OPSET = 20  # has Gelu; LayerNormalization came with 17
TORCH_DTYPES = {"UINT8": torch.uint8, "INT32": torch.int32, "FP16": torch.float16, "FP32": torch.float32}
_PRECISIONS: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
# FP32 graphs are for CPUs, where the decoder's absorbed form is twice as fast; see export.wrappers.attention.
_FORMS: dict[Precision, Form] = {"fp32": "absorbed", "fp16": "projected"}
_TRACE_SIZES: dict[str, int] = {"B": 2, "P": 3, "N": 4}  # any sizes that differ: axes are told apart by size
_MIN_PACKED_ELEMENTS = 256
_MAX_PROTOBUF_BYTES = 1_800_000_000  # protobuf ends at 2 GiB; larger weights lie in a file beside the graph


def module_for(
    graph: GraphSpec, weights: Weights, shape: Architecture, precision: Precision, form: Form | None = None
) -> nn.Module:
    """Return the module that computes `graph`; `form` of the decoder's attention defaults to the precision's."""
    dtype = _PRECISIONS[precision]
    if graph.name == ENCODER_MODEL:
        return ImageEncoder(weights, shape, dtype).eval()
    kind = MaskDecoder if graph.name == DECODER_MODEL else MaskRefiner
    return kind(weights, shape, dtype, form or _FORMS[precision]).eval()


def export_onnx(graph: GraphSpec, module: nn.Module, path: Path) -> None:
    """Write `module` to `path` (.onnx) with the tensor names and dynamic axes of `graph`.

    Weights over 1.8 GB go to `path` + ".data" beside it.
    """
    axes = {name: torch.export.Dim(name, min=1) for name in _TRACE_SIZES}
    arguments = tuple(_example(tensor.dims, TORCH_DTYPES[tensor.dtype]) for tensor in graph.inputs)
    shapes = tuple(
        {0: axes["B"]} | {i + 1: axes[d] for i, d in enumerate(tensor.dims) if not isinstance(d, int)}
        for tensor in graph.inputs
    )
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module,
            arguments,
            input_names=[tensor.name for tensor in graph.inputs],
            output_names=[tensor.name for tensor in graph.outputs],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model = program.model_proto
    _forget_origin(model)
    pack_weights(model)
    is_large = sum(len(weight.raw_data) for weight in model.graph.initializer) > _MAX_PROTOBUF_BYTES
    onnx.save(model, path, save_as_external_data=is_large, location=f"{path.name}.data")


def _forget_origin(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes beside each node: stack traces, with the paths of the machine it ran on."""
    graph = model.graph
    items: list[Any] = [graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]
    for item in items:
        del item.metadata_props[:]


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says about itself (missing torchvision, its own deprecations)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _example(dims: tuple[Dim, ...], dtype: torch.dtype) -> Tensor:
    return torch.ones([_TRACE_SIZES["B"], *(d if isinstance(d, int) else _TRACE_SIZES[d] for d in dims)], dtype=dtype)


def pack_weights(model: onnx.ModelProto) -> None:
    """Store as FP16, with a Cast, every FP32 weight that FP16 holds exactly; ONNX Runtime folds the Casts on loading.

    Lossless, and half the file for a checkpoint whose weights were rounded to FP16.
    """
    casts = []
    for weight in model.graph.initializer:
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
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
