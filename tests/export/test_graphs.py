"""The ONNX files keep the contract of DESIGN.md, "Tensors", and what TensorRT needs of a strongly typed graph."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from export import onnx_from_torch
from export.architecture import SAM_TINY, Architecture
from export.meta_keys import sam_keys_from_meta
from export.onnx_from_torch import export_onnx, module_for
from export.repository_from_spec import default_repository
from export.spec import graph_spec, graph_specs
from export.weights import Weights
from service.tensors import DECODER_MODEL, EMBEDDING, ENCODER_MODEL, REFINER_MODEL
from tests.export.conftest import SHALLOW_VIT_B, Pair
from tests.export.original import original_sam
from tests.export.sessions import Session

GRAPHS = (ENCODER_MODEL, DECODER_MODEL, REFINER_MODEL)
TYPES = {"UINT8": TensorProto.UINT8, "INT32": TensorProto.INT32, "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT}


def described(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)


@pytest.fixture(params=["fp32", "fp16"])
def tiny_graphs(request: pytest.FixtureRequest, tiny_fp16: Path) -> dict[str, onnx.ModelProto]:
    served = default_repository("cpu")
    folders = {name: served / name / "1" if request.param == "fp32" else tiny_fp16 / name for name in GRAPHS}
    return {name: onnx.load(folder / "model.onnx") for name, folder in folders.items()}


@pytest.mark.parametrize("name", GRAPHS)
def test_tensors_are_those_of_the_contract(tiny_graphs: dict[str, onnx.ModelProto], name: str) -> None:
    spec, graph = graph_spec(SAM_TINY.geometry, name), tiny_graphs[name].graph
    assert [described(value) for value in graph.input] == [
        (tensor.name, TYPES[tensor.dtype], ("B", *tensor.dims)) for tensor in spec.inputs
    ]
    found = {value.name: described(value) for value in graph.output}
    for tensor in spec.outputs:
        _, dtype, dims = found[tensor.name]
        assert dtype == TYPES[tensor.dtype]
        assert dims == ("B", *tensor.dims)


@pytest.mark.parametrize("name", GRAPHS)
def test_nothing_repeats_the_embedding_or_selects_masks(tiny_graphs: dict[str, onnx.ModelProto], name: str) -> None:
    operators = {node.op_type for node in tiny_graphs[name].graph.node}
    assert not operators & {"Tile", "OneHot", "NonZero", "ArgMax", "TopK", "ScatterND", "If", "Loop", "Resize"}
    assert all(node.domain == "" for node in tiny_graphs[name].graph.node)


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor in the graph."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {weight.name: weight.data_type for weight in inferred.initializer}


@pytest.mark.parametrize("name", GRAPHS)
def test_half_precision_keeps_norms_softmax_and_positions_in_fp32(tiny_fp16: Path, name: str) -> None:
    model = onnx.load(tiny_fp16 / name / "model.onnx")
    types = element_types(model)
    sensitive = {"LayerNormalization", "Softmax", "Sin", "Cos"}
    found: Counter[tuple[str, int]] = Counter()
    for node in model.graph.node:
        if node.op_type in sensitive | {"MatMul", "Conv", "Gelu"}:
            found[node.op_type, types[node.input[0]]] += 1
    assert all(dtype == TensorProto.FLOAT for kind, dtype in found if kind in sensitive)
    assert found["MatMul", TensorProto.FLOAT] <= 1  # the positional encoding's
    assert found["MatMul", TensorProto.FLOAT16] > 20
    assert not [kind for kind, dtype in found if kind in {"Conv", "Gelu"} and dtype != TensorProto.FLOAT16]


def test_half_precision_weights_are_stored_once_and_in_half(tiny_fp16: Path) -> None:
    weights = onnx.load(tiny_fp16 / ENCODER_MODEL / "model.onnx").graph.initializer
    fp32_bytes = sum(np.prod(w.dims) * 4 for w in weights if w.data_type == TensorProto.FLOAT)
    fp16_bytes = sum(np.prod(w.dims) * 2 for w in weights if w.data_type == TensorProto.FLOAT16)
    assert fp32_bytes < 0.01 * fp16_bytes
    assert fp16_bytes < 1.2 * 2 * 4.1e6  # parameters of the encoder, and little beside them


def test_packed_weights_are_exactly_the_checkpoints(tiny: Pair) -> None:
    """The committed FP32 graphs store as FP16 what FP16 holds exactly, and nothing else."""
    model = onnx.load(default_repository("cpu") / ENCODER_MODEL / "1" / "model.onnx")
    stored = [numpy_helper.to_array(w) for w in model.graph.initializer if w.data_type == TensorProto.FLOAT16]
    wanted = tiny.weights["vision_encoder.layers.0.mlp.lin1.weight"].numpy().T
    assert any(array.shape == wanted.shape and np.array_equal(array.astype(np.float32), wanted) for array in stored)


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_from_torch, "_MAX_PROTOBUF_BYTES", 100_000)
    shape = Architecture(128, 64, depth=2, heads=2, window=4, global_blocks=(1,), channels=32, decoder_heads=2)
    weights = Weights(sam_keys_from_meta(original_sam(shape).state_dict()))
    spec, path = graph_spec(shape.geometry, ENCODER_MODEL), tmp_path / "model.onnx"
    module = module_for(spec, weights, shape, "fp32")
    export_onnx(spec, module, path)
    assert (tmp_path / "model.onnx.data").stat().st_size > 2 * path.stat().st_size
    image, valid_size = np.full((1, 128, 128, 3), 90, np.uint8), np.array([[128, 100]], np.int32)
    found = Session(path)(image=image, valid_size=valid_size)[EMBEDDING]
    with torch.inference_mode():
        wanted = module(torch.from_numpy(image), torch.from_numpy(valid_size)).numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-3)


def test_geometry_of_the_large_models_is_one() -> None:
    """ViT-B, L and H share their tensors, so one decoder profile serves all."""
    assert SHALLOW_VIT_B.geometry.mask_size == 256
    assert {graph.name for graph in graph_specs(SHALLOW_VIT_B.geometry)} == set(GRAPHS)
