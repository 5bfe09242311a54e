"""Checkpoints of every supported kind load; anything else gets a sentence that says what was expected."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from export.architecture import SAM_TINY, Architecture
from export.checkpoint import CheckpointError, default_source, expected_shapes, load_checkpoint, sam_config
from export.meta_keys import sam_keys_from_meta
from export.spec import MODELS, ModelSpec
from export.tiny.config import sam_tiny_config
from tests.export.original import original_sam

SMALL = Architecture(128, 64, depth=2, heads=2, window=4, global_blocks=(1,), channels=32, decoder_heads=2)
MODEL = ModelSpec("small", SMALL, "none")
TINY = MODELS["sam-tiny"]


def ignore(_sentence: str) -> None:
    """Take no notice."""


@pytest.fixture
def meta_state() -> dict[str, Tensor]:
    state: dict[str, Tensor] = original_sam(SMALL).state_dict()
    return state


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> str:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return str(path)


@pytest.mark.parametrize("name", ["sam-vit-b", "sam-vit-l", "sam-vit-h"])
def test_every_key_of_metas_models_is_mapped(name: str) -> None:
    shape = MODELS[name].architecture
    with torch.device("meta"):
        state = original_sam(shape).state_dict()
    mapped = {key: tuple(tensor.shape) for key, tensor in sam_keys_from_meta(state).items()}
    assert mapped == expected_shapes(shape)


def test_metas_file_and_the_same_weights_as_safetensors_give_equal_tensors(
    tmp_path: Path, meta_state: dict[str, Tensor]
) -> None:
    torch.save(meta_state, tmp_path / "sam.pth")
    renamed = sam_keys_from_meta(meta_state)
    write_safetensors(renamed, tmp_path / "model.safetensors")
    notices: list[str] = []
    first = load_checkpoint(MODEL, str(tmp_path / "sam.pth"), notices.append)
    second = load_checkpoint(MODEL, str(tmp_path), notices.append)
    assert any("not one of Meta's three official files" in notice for notice in notices)
    for key in expected_shapes(SMALL):
        torch.testing.assert_close(first.weights[key], second.weights[key], rtol=0, atol=0)
    assert first.digest != second.digest


def test_sharded_safetensors_load(tmp_path: Path, meta_state: dict[str, Tensor]) -> None:
    renamed = sam_keys_from_meta(meta_state)
    names = sorted(renamed)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in halves.items():
        write_safetensors({key: renamed[key] for key in keys}, tmp_path / file)
    entries = ", ".join(f'"{key}": "{file}"' for file, keys in halves.items() for key in keys)
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{entries}}}}}')
    assert load_checkpoint(MODEL, str(tmp_path), ignore).digest.startswith("sha256:")


def test_the_bundled_model_is_what_the_spec_says() -> None:
    ours, theirs = sam_config(SAM_TINY), sam_tiny_config()
    for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        mine, other = (getattr(config, part).to_dict() for config in (ours, theirs))
        differing = {key for key in mine | other if mine.get(key) != other.get(key)}
        assert differing <= {"layer_norm_eps", "mlp_ratio", "mlp_dim"}, part
    checkpoint = load_checkpoint(TINY, default_source(TINY), ignore)
    assert all(checkpoint.weights[key].shape == shape for key, shape in expected_shapes(SAM_TINY).items())


def refusal(model: ModelSpec, source: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, str(source), ignore)
    return str(caught.value)


def test_another_architecture_is_named() -> None:
    sentence = refusal(MODELS["sam-vit-b"], default_source(TINY))
    assert "holds sam-tiny (width 192, 8 blocks); sam-vit-b has width 768 and 12 blocks" in sentence


def test_missing_tensors_are_counted_and_named(tmp_path: Path, meta_state: dict[str, Tensor]) -> None:
    renamed = sam_keys_from_meta(meta_state)
    del renamed["mask_decoder.iou_token.weight"]
    source = write_safetensors(renamed, tmp_path / "x.safetensors")
    assert "lacks 1 of" in refusal(MODEL, source)
    assert "mask_decoder.iou_token.weight" in refusal(MODEL, source)


def test_a_wrong_shape_is_told_with_the_right_one(tmp_path: Path, meta_state: dict[str, Tensor]) -> None:
    renamed = sam_keys_from_meta(meta_state)
    renamed["vision_encoder.pos_embed"] = torch.zeros(1, 4, 4, 64)
    sentence = refusal(MODEL, write_safetensors(renamed, tmp_path / "x.safetensors"))
    assert "vision_encoder.pos_embed has shape (1, 4, 4, 64), small needs (1, 8, 8, 64)" in sentence


def test_values_that_are_not_finite_are_refused(tmp_path: Path, meta_state: dict[str, Tensor]) -> None:
    meta_state["mask_decoder.iou_token.weight"][0, 0] = float("nan")
    torch.save(meta_state, tmp_path / "x.pth")
    assert "mask_decoder.iou_token.weight holds values that are not finite" in refusal(MODEL, tmp_path / "x.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(tmp_path: Path, meta_state: dict[str, Tensor], suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save(meta_state, path)
    else:
        write_safetensors(sam_keys_from_meta(meta_state), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "is no complete" in refusal(MODEL, path)


class Dangerous:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code ran",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Dangerous()}, tmp_path / "x.pth")
    assert "is no complete PyTorch checkpoint of plain tensors" in refusal(MODEL, tmp_path / "x.pth")
    assert "code ran" not in capsys.readouterr().out


def test_other_contents_are_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    assert "is no state dict" in refusal(MODEL, tmp_path / "list.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    assert "is no Segment Anything checkpoint" in refusal(MODEL, tmp_path / "other.pth")
    (tmp_path / "page.pth").write_text("<!doctype html>")
    assert "is no complete PyTorch checkpoint" in refusal(MODEL, tmp_path / "page.pth")


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    assert "neither a file, a folder nor a Hugging Face id" in refusal(MODEL, tmp_path / "nothing" / "x.pth")
    assert "holds no model.safetensors" in refusal(MODEL, tmp_path)


def test_an_id_that_cannot_be_downloaded_gets_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "facebook/sam-vit-base could not be downloaded" in refusal(MODEL, "facebook/sam-vit-base")
