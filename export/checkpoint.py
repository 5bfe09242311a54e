"""Checkpoints: weights in, a transformers `SamModel` out, with the digest that names it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import SamModel

from export.spec import ModelSpec
from export.tiny.config import sam_tiny_config


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded model (FP32, eager attention, eval mode) and `digest`, "sha256:<hex>" of its weight file."""

    model: SamModel
    digest: str


def sha256_of(path: Path) -> str:
    """Return "sha256:<hex>" of a file, read in pieces."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def load_checkpoint(spec: ModelSpec, source: str) -> Checkpoint:
    """Load `source` as `spec`'s architecture."""
    path = Path(source)
    config = sam_tiny_config()
    config._attn_implementation = "eager"  # noqa: SLF001 - the only way before construction
    with torch.device("meta"):
        model = SamModel(config)
    weights = {key: value.float() for key, value in load_file(path).items()}
    shared = weights["shared_image_embedding.positional_embedding"]
    weights.setdefault("prompt_encoder.shared_embedding.positional_embedding", shared)
    model.load_state_dict(weights, strict=True, assign=True)
    return Checkpoint(model.eval(), sha256_of(path))
