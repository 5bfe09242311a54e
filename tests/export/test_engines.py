"""Real TensorRT-RTX engines, built without a GPU, from every graph; and everything TensorRT may refuse."""

import re
from pathlib import Path

import onnx
import pytest
import torch
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc import model_config_pb2

from export.architecture import SAM_TINY, SAM_VIT_B
from export.build import build_engines
from export.candidates import EngineCandidate
from export.engine_from_onnx import Builder, EngineError, build_engine, find_builder, profile_shapes
from export.manifest import ManifestError, check_fits, read_manifest, sha256_of
from export.meta_keys import sam_keys_from_meta
from export.onnx_from_torch import export_onnx, module_for
from export.repository_from_spec import render
from export.spec import MODELS, graph_spec, graph_specs
from export.weights import Weights
from service.tensors import DECODER_MODEL, ENCODER_MODEL, PROMPT_BUCKETS, REFINER_MODEL, TOKEN_BUCKETS
from tests.export.conftest import SHALLOW_VIT_B, Pair
from tests.export.original import original_sam

GRAPHS = (ENCODER_MODEL, DECODER_MODEL, REFINER_MODEL)
TARGETS = ["8.0", "8.6", "8.9", "12.0"]
FUSED = rb"_gemm_mha_v2_0x[0-9a-f]+"  # TensorRT's fused attention kernels


@pytest.fixture(scope="module")
def tiny_engines(builder: Builder, tiny_fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    build_engines(MODELS["sam-tiny"], builder, tiny_fp16, folder, ["8.6"], lambda _: None)
    return folder


@pytest.mark.parametrize("name", GRAPHS)
def test_tiny_engines_build_and_carry_a_manifest(tiny_engines: Path, tiny_fp16: Path, name: str) -> None:
    manifest = read_manifest(tiny_engines / name)
    assert manifest.engine == sha256_of(tiny_engines / name / "model.plan")
    assert manifest.onnx == sha256_of(tiny_fp16 / name / "model.onnx")
    assert manifest.builder.startswith("tensorrt_rtx ")
    assert (manifest.precision, manifest.targets, manifest.model) == ("fp16", ["8.6"], "sam-tiny")
    assert manifest.profile == profile_shapes(graph_spec(SAM_TINY.geometry, name))
    assert manifest.tools["torch"]


@pytest.mark.parametrize("name", GRAPHS)
def test_engines_take_what_their_triton_configuration_promises(tiny_engines: Path, name: str) -> None:
    """Names, types and shapes are checked at the build; here the profile against the rendered configuration."""
    text = render(MODELS["sam-tiny"], "sha256:0", "tensorrt")[f"{name}/config.pbtxt"]
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    profile = read_manifest(tiny_engines / name).profile
    assert {tensor.name for tensor in config.input} == set(profile)
    for tensor in config.input:
        smallest, _, largest = profile[tensor.name]
        assert largest[0] == config.max_batch_size
        assert all(dim in {-1, size} for dim, size in zip(tensor.dims, largest[1:], strict=True))
        for warmup in config.model_warmup:
            sizes = [warmup.batch_size, *warmup.inputs[tensor.name].dims]
            assert all(low <= size <= high for low, size, high in zip(smallest, sizes, largest, strict=True))


@pytest.mark.parametrize("name", [DECODER_MODEL, REFINER_MODEL])
def test_full_size_decoders_build_for_every_target(builder: Builder, shallow_fp16: Path, name: str) -> None:
    """ViT-B, L and H have the same decoder."""
    path = shallow_fp16 / name / "model.onnx"
    engine = build_engine(builder, graph_spec(SAM_VIT_B.geometry, name), path, TARGETS)
    assert len(engine.content) > path.stat().st_size


def test_full_size_vit_b_encoder_builds_for_every_target(builder: Builder, tmp_path: Path) -> None:
    weights = Weights(sam_keys_from_meta(original_sam(SAM_VIT_B).state_dict()))
    spec, path = graph_spec(SAM_VIT_B.geometry, ENCODER_MODEL), tmp_path / "model.onnx"
    export_onnx(spec, module_for(spec, weights, SAM_VIT_B, "fp16"), path)
    engine = build_engine(builder, spec, path, TARGETS)
    assert len(engine.content) > path.stat().st_size > 170e6


def test_attention_is_fused(builder: Builder, shallow: Pair, shallow_fp16: Path, tmp_path: Path) -> None:
    """And would not be if the value were narrower than the folded query, which shows that this test can fail."""
    spec = graph_spec(SHALLOW_VIT_B.geometry, ENCODER_MODEL)
    module = module_for(spec, shallow.weights, SHALLOW_VIT_B, "fp16")
    for block in module.get_submodule("blocks").children():
        block.get_submodule("attention").is_padded = False  # type: ignore[assignment]
    export_onnx(spec, module, tmp_path / "narrow.onnx")
    padded, narrow = (
        set(re.findall(FUSED, build_engine(builder, spec, path, ["8.6"]).content))
        for path in (shallow_fp16 / ENCODER_MODEL / "model.onnx", tmp_path / "narrow.onnx")
    )
    assert padded
    assert not narrow


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("model", sorted(MODELS))
def test_profiles_reach_every_bucket(model: str, name: str) -> None:
    spec = graph_spec(MODELS[model].geometry, name)
    for tensor in spec.inputs:
        for dim in tensor.dims:
            buckets = {"P": PROMPT_BUCKETS, "N": TOKEN_BUCKETS}.get(dim, (dim,))  # type: ignore[call-overload]
            assert spec.axis(dim).smallest <= min(buckets)
            assert spec.axis(dim).largest == max(buckets)


def identity(path: Path, operator: str, dtype: int = TensorProto.FLOAT16, domain: str = "") -> Path:
    """Write a graph with the encoder's names whose only node is of type `operator`."""
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", 512, 512, 3])
    output = helper.make_tensor_value_info("embedding", dtype, ["B", 512, 512, 3])
    node = helper.make_node(operator, ["image"], ["embedding"], domain=domain, **({"to": dtype} if not domain else {}))
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("unheard.of", 1)]
    graph = helper.make_graph([node], "identity", [image], [output])
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def refusal(builder: Builder, path: Path, targets: list[str]) -> str:
    with pytest.raises(EngineError) as caught:
        build_engine(builder, graph_spec(SAM_TINY.geometry, ENCODER_MODEL), path, targets)
    return str(caught.value)


def test_a_graph_that_does_not_parse_fails_the_build(builder: Builder, tmp_path: Path) -> None:
    sentence = refusal(builder, identity(tmp_path / "x.onnx", "Mystery", domain="unheard.of"), ["8.6"])
    assert "cannot parse sam_encoder" in sentence
    assert "Mystery" in sentence


def test_a_graph_with_other_tensors_fails_the_build(builder: Builder, tmp_path: Path) -> None:
    assert "sam_encoder has inputs" in refusal(builder, identity(tmp_path / "x.onnx", "Cast"), ["8.6"])


def test_an_unknown_compute_capability_is_refused_with_the_known_ones(builder: Builder, tiny_fp16: Path) -> None:
    sentence = refusal(builder, tiny_fp16 / ENCODER_MODEL / "model.onnx", ["6.1"])
    assert "does not know compute capability 6.1; it knows" in sentence
    assert "86" in sentence


def test_without_a_gpu_and_without_a_target_there_is_a_sentence(
    builder: Builder, tiny_fp16: Path, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineError, match="there is no GPU here"):
        build_engines(MODELS["sam-tiny"], builder, tiny_fp16, tmp_path, [], lambda _: None)


def test_a_missing_tensorrt_is_named() -> None:
    try:
        find_builder("tensorrt")
    except EngineError as error:
        assert "tensorrt is not installed" in str(error) or "is too old" in str(error)  # noqa: PT017


def test_an_engine_for_another_machine_is_refused(tiny_engines: Path, builder: Builder) -> None:
    manifest = read_manifest(tiny_engines / ENCODER_MODEL)
    check_fits(manifest, builder.name, "8.6")
    with pytest.raises(ManifestError, match=r"built for compute capability 8\.6; this GPU has 9\.0"):
        check_fits(manifest, builder.name, "9.0")
    with pytest.raises(ManifestError, match=r"was built with tensorrt_rtx .*; here is tensorrt 11\.1\.0"):
        check_fits(manifest, "tensorrt 11.1.0", "8.6")


def test_an_engine_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ManifestError, match="is no manifest"):
        read_manifest(tmp_path)


def test_running_engines_needs_a_gpu(tiny_engines: Path, builder: Builder) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineError, match="on a machine with a GPU"):
        EngineCandidate(graph_specs(SAM_TINY.geometry), tiny_engines, builder)
