"""Checkpoints: a file, folder or Hugging Face id in; tensors under transformers' `SamModel` keys out."""

import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import SamConfig, SamModel

from export.architecture import Architecture
from export.manifest import sha256_of
from export.meta_keys import sam_keys_from_meta
from export.spec import MODELS, ModelSpec
from export.weights import Weights

Notify = Callable[[str], None]
_HUB_ID = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")
_TIED = "prompt_encoder.shared_embedding.positional_embedding"  # the same tensor as shared_image_embedding's


class CheckpointError(Exception):
    """The checkpoint cannot be used; the message says what was found and what was expected."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights that fit `model`, and `digest`, "sha256:<hex>" of the file they came from."""

    model: ModelSpec
    weights: Weights
    digest: str


def load_checkpoint(model: ModelSpec, source: str, notify: Notify) -> Checkpoint:
    """Load `source` and check that it fits `model`.

    Args:
        model: what the weights must be of.
        source: a Meta `.pth`, a `.safetensors` file, a folder that holds one, or a Hugging Face id.
        notify: is given one sentence per long step or remarkable fact.

    Raises:
        CheckpointError: not found, unreadable, truncated, of another architecture, incomplete or not finite.
    """
    files = _weight_files(source, notify)
    notify(f"reading {', '.join(file.name for file in files)} ({sum(f.stat().st_size for f in files) / 1e6:.0f} MB)")
    digest = sha256_of(*files)
    tensors = _meta_tensors(files[0], digest, notify) if files[0].suffix in {".pth", ".pt"} else _safetensors(files)
    tensors.pop(_TIED, None)
    _check_fit(model, tensors, source)
    return Checkpoint(model, Weights(tensors), digest)


def default_source(model: ModelSpec) -> str:
    """Return where a model's weights come from when nobody says: the bundled file, or a Hugging Face id."""
    bundled = Path(__file__).resolve().parent.parent / model.default_checkpoint
    return str(bundled) if bundled.is_file() else model.default_checkpoint


def sam_config(shape: Architecture) -> SamConfig:
    """Return transformers' configuration of an architecture."""
    return SamConfig(
        vision_config={
            "image_size": shape.input_size,
            "hidden_size": shape.width,
            "num_hidden_layers": shape.depth,
            "num_attention_heads": shape.heads,
            "output_channels": shape.channels,
            "num_pos_feats": shape.channels // 2,
            "window_size": shape.window,
            "global_attn_indexes": list(shape.global_blocks),
        },
        prompt_encoder_config={"hidden_size": shape.channels, "image_size": shape.input_size},
        mask_decoder_config={
            "hidden_size": shape.channels,
            "mlp_dim": shape.decoder_mlp,
            "num_attention_heads": shape.decoder_heads,
            "iou_head_hidden_dim": shape.iou_hidden,
        },
    )


def expected_shapes(shape: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes a checkpoint of this architecture has."""
    with torch.device("meta"):
        model = SamModel(sam_config(shape))
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if key != _TIED}


def _weight_files(source: str, notify: Notify) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_in(path)
    if not _HUB_ID.fullmatch(source) or source.endswith((".pth", ".pt", ".safetensors")):
        raise CheckpointError(f"{source} is neither a file, a folder nor a Hugging Face id (owner/name)")
    notify(f"downloading {source} from Hugging Face")
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only this path goes to the network

    try:
        return _files_in(Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.safetensors.index.json"])))
    except (OSError, ValueError) as error:  # every hub error is one of these
        raise CheckpointError(f"{source} could not be downloaded: {str(error).splitlines()[0]}") from error


def _files_in(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    found = folder / "model.safetensors"
    if not found.is_file():
        raise CheckpointError(f"{folder} holds no model.safetensors; a Hugging Face folder of SAM does")
    return [found]


def _safetensors(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is no complete safetensors file: {error}") from error
    return tensors


def _meta_tensors(file: Path, digest: str, notify: Notify) -> dict[str, Tensor]:
    official = {model.official_digest: model.official_file for model in MODELS.values()}.get(digest)
    notify(f"this is Meta's {official}" if official else f"not one of Meta's three official files ({digest}); using it")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} is no complete PyTorch checkpoint of plain tensors: {reason}") from error
    tensors = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{file} is no state dict: expected names and tensors as in sam_vit_b_01ec64.pth")
    return sam_keys_from_meta(tensors)


def _check_fit(model: ModelSpec, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError with the most telling difference between `tensors` and what `model` needs."""
    shape = model.architecture
    patch = tensors.get("vision_encoder.patch_embed.projection.weight")
    if patch is None:
        raise CheckpointError(f"{source} is no Segment Anything checkpoint: it has no vision_encoder.patch_embed")
    found = (
        int(patch.shape[0]),
        len({key.split(".")[2] for key in tensors if key.startswith("vision_encoder.layers.")}),
    )
    if found != (shape.width, shape.depth):
        known = {(m.architecture.width, m.architecture.depth): m.name for m in MODELS.values()}
        raise CheckpointError(
            f"{source} holds {known.get(found, 'another model')} (width {found[0]}, {found[1]} blocks); "
            f"{model.name} has width {shape.width} and {shape.depth} blocks"
        )
    expected = expected_shapes(shape)
    missing = [key for key in expected if key not in tensors]
    if missing:
        raise CheckpointError(f"{source} lacks {len(missing)} of {len(expected)} tensors, the first is {missing[0]}")
    for key, wanted in expected.items():
        if tuple(tensors[key].shape) != wanted:
            raise CheckpointError(f"{source}: {key} has shape {tuple(tensors[key].shape)}, {model.name} needs {wanted}")
        if not torch.isfinite(tensors[key]).all():
            raise CheckpointError(f"{source}: {key} holds values that are not finite")
