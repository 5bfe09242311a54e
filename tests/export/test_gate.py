"""The gate lets a faithful model pass, says what is wrong with any other, and then installs nothing."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export import commands, photographs
from export.__main__ import main
from export.candidates import Arrays, Candidate, OnnxCandidate, TorchReference
from export.checkpoint import Checkpoint
from export.engine_from_onnx import EngineError, find_builder
from export.manifest import read_manifest
from export.photographs import Photograph
from export.repository_from_spec import default_repository
from export.spec import graph_specs
from export.verify import Floors, Report, verify
from service.tensors import DECODER_MODEL, EMBEDDING, ENCODER_MODEL, LOW_RES_MASKS, REFINER_MODEL

GRAPHS = (ENCODER_MODEL, DECODER_MODEL, REFINER_MODEL)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Checkpoint) -> TorchReference:
    return TorchReference(tiny_checkpoint)


@pytest.fixture(scope="module")
def served(tiny_checkpoint: Checkpoint) -> OnnxCandidate:
    return OnnxCandidate(graph_specs(tiny_checkpoint.model.geometry), default_repository("cpu"))


@pytest.fixture(autouse=True)
def _two_bundled_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands look at two photographs here, not seven: enough for every check, and quicker."""
    monkeypatch.setattr(photographs, "BUNDLED", photographs.BUNDLED[:2])


@pytest.fixture
def two(tiny_photographs: list[Photograph]) -> list[Photograph]:
    return tiny_photographs[:2]


class Broken:
    """A candidate whose answers `spoil` changes: (graph, answers) -> answers."""

    def __init__(self, sound: Candidate) -> None:
        self.sound = sound

    def spoil(self, graph: str, answers: Arrays) -> Arrays:
        raise NotImplementedError

    def __call__(self, graph: str, feeds: Arrays) -> Arrays:
        return self.spoil(graph, self.sound(graph, feeds))


class NotANumber(Broken):
    def spoil(self, graph: str, answers: Arrays) -> Arrays:
        if graph == DECODER_MODEL:
            answers[LOW_RES_MASKS][0, 3, :, 5, 5] = np.nan
        return answers


class AlwaysTheSameEmbedding(Broken):
    def __init__(self, sound: Candidate) -> None:
        super().__init__(sound)
        self.first: Arrays | None = None

    def spoil(self, graph: str, answers: Arrays) -> Arrays:
        if graph != ENCODER_MODEL:
            return answers
        self.first = self.first or answers
        return self.first


class OneCallBehind(Broken):
    """Answers a decode with the answer before it, as a stale CUDA graph does."""

    def __init__(self, sound: Candidate) -> None:
        super().__init__(sound)
        self.calls = 0
        self.previous: Arrays | None = None

    def spoil(self, graph: str, answers: Arrays) -> Arrays:
        if graph != DECODER_MODEL:
            return answers
        self.calls += 1
        answer = self.previous if self.previous is not None and self.calls == 5 else answers
        self.previous = answers
        return answer


class Drifting(Broken):
    def spoil(self, graph: str, answers: Arrays) -> Arrays:
        if graph == REFINER_MODEL:
            answers[LOW_RES_MASKS] = answers[LOW_RES_MASKS] + np.float16(
                0.2 * answers[LOW_RES_MASKS].astype(np.float32).std()
            )
        return answers


class Noisy(Broken):
    def spoil(self, graph: str, answers: Arrays) -> Arrays:
        if graph == ENCODER_MODEL:
            noise = np.random.default_rng(0).normal(0, 0.05, answers[EMBEDDING].shape)
            answers[EMBEDDING] = (answers[EMBEDDING] * (1 + noise)).astype(np.float16)
        return answers


def judge(reference: Candidate, candidate: Candidate, photographs: list[Photograph]) -> Report:
    return verify(reference, candidate, photographs, Floors())


def test_the_served_model_passes(reference: Candidate, served: Candidate, two: list[Photograph]) -> None:
    report = judge(reference, served, two)
    assert report.passes, report.table()
    assert report.figures()["iou_min"] > 0.999


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (NotANumber, "astronaut.png: the answer is not finite"),
        (AlwaysTheSameEmbedding, "astronaut.png and coffee.png get the same embedding"),
        (OneCallBehind, "decoding two images in turn gives an image another answer than before"),
        (Drifting, "mean mask IoU"),
        (Noisy, "embedding cosine"),
    ],
)
def test_each_trap_is_found_and_named(
    reference: Candidate, served: Candidate, two: list[Photograph], broken: type[Broken], sentence: str
) -> None:
    report = judge(reference, broken(served), two)
    assert not report.passes
    assert any(sentence in failure for failure in report.failures), report.table()
    assert f"FAILED: {report.failures[0]}" in report.table()


def perturbed_copy(folder: Path) -> Path:
    """Copy the committed graphs with the decoder's largest weight scaled: the manifest fits, the masks do not."""
    for name in GRAPHS:
        shutil.copytree(default_repository("cpu") / name / "1", folder / name)
    path = folder / DECODER_MODEL / "model.onnx"
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda weight: len(weight.raw_data))
    largest.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(largest) * np.float16(1.5), largest.name))
    onnx.save(model, path)
    return folder


def test_the_command_exits_with_1_and_a_table_below_the_floor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = perturbed_copy(tmp_path / "onnx")
    assert main(["verify", "--model", "sam-tiny", "--onnx", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "worst prompt" in printed
    assert "FAILED: " in printed


def test_the_command_reads_the_users_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.jpg").write_text("no image")
    arguments = ["verify", "--model", "sam-tiny", "--images", str(tmp_path / "notes.jpg")]
    assert main(arguments) == 1
    assert "notes.jpg cannot be read as an image" in capsys.readouterr().err


def test_graphs_of_another_checkpoint_are_refused(
    tmp_path: Path, tiny_checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = perturbed_copy(tmp_path / "onnx")
    manifest = folder / ENCODER_MODEL / "manifest.json"
    manifest.write_text(manifest.read_text().replace(tiny_checkpoint.digest, "sha256:0"))
    assert main(["verify", "--model", "sam-tiny", "--onnx", str(folder)]) == 1
    assert "was made from another checkpoint (sha256:0)" in capsys.readouterr().err


def copy_committed_graphs(_checkpoint: Checkpoint, _precision: str, folder: Path, _notify: object) -> None:
    """Stand in for the export itself, which takes half a minute and has its own tests."""
    for name in GRAPHS:
        shutil.copytree(default_repository("cpu") / name / "1", folder / name)


@pytest.mark.parametrize("floor", [0.99, 1.1], ids=["above the floor", "below the floor"])
def test_all_installs_what_passes_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], floor: float
) -> None:
    monkeypatch.setattr(commands, "export_graphs", copy_committed_graphs)
    monkeypatch.setattr(commands, "Floors", lambda: Floors(iou_mean=floor))
    repository = tmp_path / "repository"
    arguments = ["all", "--model", "sam-tiny", "--runtime", "cpu", "--repository", str(repository)]
    code = main([*arguments, "--store", str(tmp_path / "store")])
    printed = capsys.readouterr().out
    if floor > 1:
        assert code == 1
        assert "nothing was installed" in printed
        assert not repository.exists()
        return
    assert code == 0
    for name in GRAPHS:
        assert read_manifest(repository / name / "1").verification["iou_mean"] > 0.99
        committed = default_repository("cpu") / name
        for file in ("config.pbtxt", "1/model.py", "1/model.onnx"):
            assert (repository / name / file).read_bytes() == (committed / file).read_bytes()
    monkeypatch.setattr(commands, "export_graphs", None)
    shutil.rmtree(repository)
    assert main([*arguments, "--store", str(tmp_path / "store")]) == 0, "what is in the store is not built again"
    assert (repository / GRAPHS[0] / "1" / "model.onnx").exists()


def test_a_missing_tensorrt_is_told_before_the_long_steps(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        find_builder("tensorrt")
    except EngineError:
        assert main(["all", "--model", "sam-vit-h", "--runtime", "tensorrt", "--checkpoint", "/nowhere"]) == 1
        assert "tensorrt is not installed" in capsys.readouterr().err
