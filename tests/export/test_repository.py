"""The committed repositories are what the spec renders, and complete: a real Triton loads and serves them."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from google.protobuf import text_format
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from export.repository_from_spec import COMMITTED_MODELS, default_repository, differences, known_digest, render
from export.spec import GraphSpec, Runtime, graph_spec, graph_specs
from service.tensors import (
    DECODER_MODEL,
    EMBEDDING,
    ENCODER_MODEL,
    IOU_SCORES,
    LOW_RES_MASKS,
    PARAMETER_DIGEST,
    PARAMETER_MODEL,
    PROMPT_BUCKETS,
    REFINER_MODEL,
    TOKEN_BUCKETS,
)
from tests.export.conftest import Pair
from tests.running import triton_ready
from tests.slow_models import replace

GRAPHS = (ENCODER_MODEL, DECODER_MODEL, REFINER_MODEL)
CASES = [(runtime, name) for runtime in COMMITTED_MODELS for name in GRAPHS]
Arrays = dict[str, NDArray[Any]]


def test_committed_files_are_what_is_rendered_without_any_installed_package() -> None:
    command = [sys.executable, "-S", "-m", "export", "repository", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_changed_file_is_shown_as_a_diff(tmp_path: Path) -> None:
    model = COMMITTED_MODELS["cpu"]
    files = render(model, known_digest(model), "cpu")
    shutil.copytree(default_repository("cpu"), tmp_path, dirs_exist_ok=True)
    assert differences(files, tmp_path) == ""
    config = tmp_path / DECODER_MODEL / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 4", "max_batch_size: 9"))
    (tmp_path / REFINER_MODEL / "1" / "model.py").unlink()
    found = differences(files, tmp_path)
    assert "-max_batch_size: 9\n+max_batch_size: 4" in found
    assert "+class TritonPythonModel:" in found


def parsed(runtime: Runtime, name: str) -> Any:
    text = (default_repository(runtime) / name / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize(("runtime", "name"), CASES)
def test_configurations_leave_nothing_to_guess(runtime: Runtime, name: str) -> None:
    config, spec = parsed(runtime, name), graph_spec(COMMITTED_MODELS[runtime].geometry, name)
    assert config.backend == {"cpu": "python", "tensorrt": "tensorrt"}[runtime]
    assert config.default_model_filename == {"cpu": "model.py", "tensorrt": "model.plan"}[runtime]
    assert config.max_batch_size == spec.images.largest
    for tensors, rendered in ((spec.inputs, config.input), (spec.outputs, config.output)):
        assert [(t.name, f"TYPE_{t.dtype}", [d if isinstance(d, int) else -1 for d in t.dims]) for t in tensors] == [
            (t.name, model_config_pb2.DataType.Name(t.data_type), list(t.dims)) for t in rendered
        ]
    assert config.HasField("dynamic_batching")
    assert [group.count for group in config.instance_group] == [1 if name == ENCODER_MODEL else 2]
    assert config.parameters[PARAMETER_MODEL].string_value == COMMITTED_MODELS[runtime].name
    assert config.parameters[PARAMETER_DIGEST].string_value == known_digest(COMMITTED_MODELS[runtime])


@pytest.mark.parametrize(("runtime", "name"), CASES)
def test_prompts_have_priorities_and_deadlines_in_their_queue_and_images_no_policy(runtime: Runtime, name: str) -> None:
    batching = parsed(runtime, name).dynamic_batching
    if name == ENCODER_MODEL:  # with any, a request that finds the one instance busy may wait for half a second
        assert not batching.ListFields()
        return
    assert (batching.priority_levels, batching.default_priority_level) == (2, 1)
    queue = batching.default_queue_policy
    assert queue.max_queue_size > 0
    assert queue.default_timeout_microseconds > 0
    assert queue.allow_timeout_override
    assert queue.timeout_action == queue.REJECT


@pytest.mark.parametrize(("runtime", "name"), CASES)
def test_every_bucket_is_warmed_up(runtime: Runtime, name: str) -> None:
    shapes = [{key: tuple(value.dims) for key, value in w.inputs.items()} for w in parsed(runtime, name).model_warmup]
    if name == ENCODER_MODEL:
        assert len(shapes) == 1
        return
    warmed = {shape["point_labels"] for shape in shapes}
    assert {tokens for _, tokens in warmed} == set(TOKEN_BUCKETS)
    assert {prompts for prompts, _ in warmed} == set(PROMPT_BUCKETS)


@pytest.fixture(scope="module")
def server() -> Iterator[triton.InferenceServerClient]:
    """A client of a real Triton that serves the committed cpu repository."""
    with served(default_repository("cpu")) as client:
        yield client


@contextmanager
def served(repository: Path) -> Iterator[triton.InferenceServerClient]:
    """Run a Triton for the block, which gets a client of it."""
    with triton_ready(repository) as (address, _), closing(triton.InferenceServerClient(address)) as client:
        yield client


def infer(server: triton.InferenceServerClient, spec: GraphSpec, feeds: Arrays) -> Arrays:
    inputs = []
    for tensor in spec.inputs:
        array = feeds[tensor.name]
        inputs.append(triton.InferInput(tensor.name, list(array.shape), tensor.dtype))
        inputs[-1].set_data_from_numpy(array)
    answer = server.infer(spec.name, inputs, client_timeout=120)
    return {tensor.name: answer.as_numpy(tensor.name) for tensor in spec.outputs}


def random_feeds(spec: GraphSpec, images: int, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    sizes = {"P": 2, "N": 4}
    types = {"UINT8": np.uint8, "INT32": np.int32, "FP16": np.float16, "FP32": np.float32}
    return {
        tensor.name: random.integers(
            0, 2, [images, *(dim if isinstance(dim, int) else sizes[dim] for dim in tensor.dims)]
        ).astype(types[tensor.dtype])
        for tensor in spec.inputs
    }


def test_triton_says_what_the_gateway_needs_to_know(server: triton.InferenceServerClient, tiny: Pair) -> None:
    geometry = tiny.shape.geometry
    config = server.get_model_config(ENCODER_MODEL).config
    assert config.parameters[PARAMETER_MODEL].string_value == "sam-tiny"
    assert list(config.input[0].dims) == [geometry.input_size, geometry.input_size, 3]
    assert list(config.output[0].dims) == [geometry.channels, geometry.grid_size, geometry.grid_size]


@pytest.mark.parametrize("name", GRAPHS)
def test_triton_answers_what_the_graph_computes(server: triton.InferenceServerClient, tiny: Pair, name: str) -> None:
    spec = graph_spec(tiny.shape.geometry, name)
    feeds = random_feeds(spec, images=2)
    wanted = {ENCODER_MODEL: tiny.encoder, DECODER_MODEL: tiny.decoder, REFINER_MODEL: tiny.refiner}[name](**feeds)
    found = infer(server, spec, feeds)
    for tensor in spec.outputs:
        assert found[tensor.name].dtype == {"FP16": np.float16, "FP32": np.float32}[tensor.dtype]
        scale = np.abs(wanted[tensor.name]).max()
        assert np.abs(found[tensor.name].astype(np.float32) - wanted[tensor.name]).max() <= 1e-3 * scale


def test_concurrent_requests_share_runs_and_a_bad_one_fails_alone(
    server: triton.InferenceServerClient, tiny: Pair
) -> None:
    spec = graph_spec(tiny.shape.geometry, DECODER_MODEL)
    before = server.get_inference_statistics(DECODER_MODEL).model_stats[0]
    feeds = [random_feeds(spec, images=1, seed=seed) for seed in range(48)]
    for bad in feeds[::12]:
        bad["point_labels"][0, 0, 0] = 99
    with ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(infer, server, spec, feed) for feed in feeds]
    for index, (feed, answer) in enumerate(zip(feeds, answers, strict=True)):
        if index % 12 == 0:
            with pytest.raises(triton.InferenceServerException, match="inference failed"):
                raise answer.exception() or AssertionError("a bad request was answered")
        else:
            wanted = tiny.decoder(**feed)
            np.testing.assert_allclose(answer.result()[IOU_SCORES], wanted[IOU_SCORES], atol=1e-5)
    after = server.get_inference_statistics(DECODER_MODEL).model_stats[0]
    assert after.execution_count - before.execution_count < after.inference_count - before.inference_count


def check_prompts(
    server: triton.InferenceServerClient, tiny: Pair, images: int, prompts: int, name: str = DECODER_MODEL
) -> None:
    spec, random = graph_spec(tiny.shape.geometry, name), np.random.default_rng(images)
    feeds = random_feeds(spec, images)
    feeds["point_coords"] = random.uniform(0, 384, (images, prompts, 4, 2)).astype(np.float32)
    feeds["point_labels"] = random.integers(0, 2, (images, prompts, 4), np.int32)
    if name == REFINER_MODEL:
        side = tiny.shape.geometry.mask_size
        feeds["mask_input"] = random.normal(0, 5, (images, prompts, side, side)).astype(np.float16)
    wanted = (tiny.decoder if name == DECODER_MODEL else tiny.refiner)(**feeds)
    found = infer(server, spec, feeds)
    assert found[LOW_RES_MASKS].shape == (images, prompts, 4, 4 * tiny.shape.grid, 4 * tiny.shape.grid)
    np.testing.assert_allclose(found[IOU_SCORES], wanted[IOU_SCORES], atol=1e-5)
    scale = np.abs(wanted[LOW_RES_MASKS]).max()
    assert np.abs(found[LOW_RES_MASKS] - wanted[LOW_RES_MASKS]).max() <= 1e-3 * scale


@pytest.mark.parametrize("name", [DECODER_MODEL, REFINER_MODEL])
@pytest.mark.parametrize(("images", "prompts"), [(1, 64), (4, 16), (3, 5), (4, 2), (3, 1), (1, 9)])
def test_many_prompts_are_answered_whole_and_in_order(
    server: triton.InferenceServerClient, tiny: Pair, images: int, prompts: int, name: str
) -> None:
    """More than one run takes: the backend runs parts on all cores and joins them."""
    check_prompts(server, tiny, images, prompts, name)


def test_tensors_of_different_numbers_of_prompts_are_refused(server: triton.InferenceServerClient, tiny: Pair) -> None:
    spec = graph_spec(tiny.shape.geometry, DECODER_MODEL)
    feeds = random_feeds(spec, images=1)
    feeds["point_labels"] = np.ones((1, 3, 4), np.int32)
    with pytest.raises(triton.InferenceServerException, match="different numbers of prompts"):
        infer(server, spec, feeds)


def test_a_lone_prompt_of_a_large_graph_is_for_the_session_on_all_cores(tiny: Pair, tmp_path: Path) -> None:
    repository = shutil.copytree(default_repository("cpu"), tmp_path / "repository")
    model = repository / DECODER_MODEL / "1" / "model.py"
    replace(model, "LARGE_GRID = 32\n", "LARGE_GRID = 1\n")  # sam-tiny's is one, then
    replace(model, "self.cores = min(cpu_limit(), MAX_PROMPTS)\n", "self.cores = 2\n")
    replace(model, "session_on(path, 1) if self.by_prompt else None", "None")  # the other one does not exist
    config = repository / DECODER_MODEL / "config.pbtxt"
    config.write_text(config.read_text().partition("model_warmup")[0])  # many prompts are for the other one
    with served(repository) as server:
        check_prompts(server, tiny, 1, 1)


def test_all_graphs_of_a_repository_name_the_same_weights() -> None:
    for runtime, model in COMMITTED_MODELS.items():
        digests = {
            parsed(runtime, graph.name).parameters[PARAMETER_DIGEST].string_value
            for graph in graph_specs(model.geometry)
        }
        assert len(digests) == 1
    assert EMBEDDING in {tensor.name for tensor in parsed("cpu", DECODER_MODEL).input}
