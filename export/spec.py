"""What is exported: the models, and the tensors, limits and profiles of each graph. Standard library only.

Everything else in this package, the committed `config.pbtxt` files included, is derived from here.
"""

from dataclasses import dataclass
from typing import Literal

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
    """A model this project knows: its name, geometry and where its weights come from when nobody says."""

    name: str
    geometry: Geometry
    default_checkpoint: str


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


_SAM_GEOMETRY = Geometry(input_size=1024, grid_size=64, channels=256)

MODELS: dict[str, ModelSpec] = {
    model.name: model
    for model in (
        ModelSpec("sam-tiny", Geometry(input_size=512, grid_size=32, channels=128), "export/tiny/sam-tiny.safetensors"),
        ModelSpec("sam-vit-b", _SAM_GEOMETRY, "facebook/sam-vit-base"),
        ModelSpec("sam-vit-l", _SAM_GEOMETRY, "facebook/sam-vit-large"),
        ModelSpec("sam-vit-h", _SAM_GEOMETRY, "facebook/sam-vit-huge"),
    )
}

# An encoder saturates the machine with one image: a large batch only makes the last caller wait. A decoder's cost is
# launch overhead, so it gains from batching until its activations (B x P prompts) outgrow memory.
_ENCODER_IMAGES = AxisRange(1, 1, 4)
_DECODER_IMAGES = AxisRange(1, 2, 8)
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
