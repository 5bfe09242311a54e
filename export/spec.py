"""What is exported: the models, and the tensors, limits and profiles of each graph. Standard library only.

Everything else in this package, the committed `config.pbtxt` files included, is derived from here.
"""

from dataclasses import dataclass
from typing import Literal

from export.architecture import SAM_TINY, SAM_VIT_B, SAM_VIT_H, SAM_VIT_L, Architecture
from service.tensors import (
    DECODER_MODEL,
    EMBEDDING,
    ENCODER_MODEL,
    IMAGE,
    IOU_SCORES,
    LOW_RES_MASKS,
    MASK_INPUT,
    MASKS_PER_PROMPT,
    POINT_COORDS,
    POINT_LABELS,
    REFINER_MODEL,
    VALID_SIZE,
    Geometry,
)

Runtime = Literal["cpu", "tensorrt"]
Dim = int | Literal["P", "N"]  # P prompts per image, N tokens per prompt; the batch axis (images) is never listed


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model this project knows: its name, architecture, and where its weights come from when nobody says.

    `default_checkpoint` is a path below the repository's root, or a Hugging Face id; `official_file` and
    `official_digest` ("sha256:<hex>") are Meta's, at dl.fbaipublicfiles.com/segment_anything/.
    """

    name: str
    architecture: Architecture
    default_checkpoint: str
    official_file: str = ""
    official_digest: str = ""

    @property
    def geometry(self) -> Geometry:
        """What the tensors' shapes depend on."""
        return self.architecture.geometry


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: `dtype` in Triton's spelling (UINT8, INT32, FP16, FP32), `dims` without the batch axis."""

    name: str
    dtype: Literal["UINT8", "INT32", "FP16", "FP32"]
    dims: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class AxisRange:
    """Smallest, most usual and largest size of a dynamic axis: one optimisation profile's bounds."""

    smallest: int
    usual: int
    largest: int


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One graph: its tensors, and how far its dynamic axes reach."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    images: AxisRange
    prompts: AxisRange | None = None
    tokens: AxisRange | None = None

    def axis(self, dim: Dim) -> AxisRange:
        """Return the range of one dimension; a fixed dimension has the range (d, d, d)."""
        if isinstance(dim, int):
            return AxisRange(dim, dim, dim)
        found = self.prompts if dim == "P" else self.tokens
        if found is None:
            message = f"{self.name} has no axis {dim}"
            raise ValueError(message)
        return found


MODELS: dict[str, ModelSpec] = {
    model.name: model
    for model in (
        ModelSpec("sam-tiny", SAM_TINY, "export/tiny/sam-tiny.safetensors"),
        ModelSpec(
            "sam-vit-b",
            SAM_VIT_B,
            "facebook/sam-vit-base",
            "sam_vit_b_01ec64.pth",
            "sha256:ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        ),
        ModelSpec(
            "sam-vit-l",
            SAM_VIT_L,
            "facebook/sam-vit-large",
            "sam_vit_l_0b3195.pth",
            "sha256:3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        ),
        ModelSpec(
            "sam-vit-h",
            SAM_VIT_H,
            "facebook/sam-vit-huge",
            "sam_vit_h_4b8939.pth",
            "sha256:a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        ),
    )
}

# An encoder saturates the machine with one image: a large batch only makes the last caller wait. A decoder's cost is
# launch overhead, so it gains from batching until its activations (B x P prompts, of each instance) outgrow memory.
_ENCODER_IMAGES = AxisRange(1, 1, 4)
_DECODER_IMAGES = AxisRange(1, 2, 4)
_PROMPTS = AxisRange(1, 1, 64)
_TOKENS = AxisRange(1, 2, 64)


def graph_specs(geometry: Geometry) -> tuple[GraphSpec, GraphSpec, GraphSpec]:
    """Return the encoder's, decoder's and refiner's specification for one geometry (DESIGN.md, "Tensors")."""
    side, grid, low_res = geometry.input_size, geometry.grid_size, geometry.mask_size
    embedding = TensorSpec(EMBEDDING, "FP16", (geometry.channels, grid, grid))
    prompt = (
        embedding,
        TensorSpec(POINT_COORDS, "FP32", ("P", "N", 2)),
        TensorSpec(POINT_LABELS, "INT32", ("P", "N")),
    )
    masks = (
        TensorSpec(LOW_RES_MASKS, "FP16", ("P", MASKS_PER_PROMPT, low_res, low_res)),
        TensorSpec(IOU_SCORES, "FP32", ("P", MASKS_PER_PROMPT)),
    )
    image = (TensorSpec(IMAGE, "UINT8", (side, side, 3)), TensorSpec(VALID_SIZE, "INT32", (2,)))
    mask_input = TensorSpec(MASK_INPUT, "FP16", ("P", low_res, low_res))
    return (
        GraphSpec(ENCODER_MODEL, image, (embedding,), _ENCODER_IMAGES),
        GraphSpec(DECODER_MODEL, prompt, masks, _DECODER_IMAGES, _PROMPTS, _TOKENS),
        GraphSpec(REFINER_MODEL, (*prompt, mask_input), masks, _DECODER_IMAGES, _PROMPTS, _TOKENS),
    )


def graph_spec(geometry: Geometry, name: str) -> GraphSpec:
    """Return the specification of the graph called `name`; raises KeyError for another name."""
    return {graph.name: graph for graph in graph_specs(geometry)}[name]
