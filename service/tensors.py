"""Names and constants of the tensor contract shared by the gateway, the exporter and the model repository.

Shapes depend on the model's geometry: input side S, grid G = S / 16, channels C. The geometry is data, carried by each
Triton model's configuration; see `Geometry`.
"""

from dataclasses import dataclass

ENCODER_MODEL = "sam_encoder"
DECODER_MODEL = "sam_decoder"
REFINER_MODEL = "sam_refiner"

IMAGE = "image"  # UINT8 [S, S, 3], RGB, resized to longest side S, placed top-left
VALID_SIZE = "valid_size"  # INT32 [2], (height, width) of the resized image inside the S x S input
EMBEDDING = "embedding"  # FP16 [C, G, G]
POINT_COORDS = "point_coords"  # FP32 [P, N, 2], (x, y) in input pixels
POINT_LABELS = "point_labels"  # INT32 [P, N], one of the LABEL_ constants
MASK_INPUT = "mask_input"  # FP16 [P, 4G, 4G], low-res logits of an earlier answer
LOW_RES_MASKS = "low_res_masks"  # FP16 [P, 4, 4G, 4G]
IOU_SCORES = "iou_scores"  # FP32 [P, 4]

PATCH_SIZE = 16
MASKS_PER_PROMPT = 4  # mask token 0 is the single-mask output, 1..3 are the three candidates

LABEL_BACKGROUND = 0
LABEL_FOREGROUND = 1
LABEL_BOX_TOP_LEFT = 2
LABEL_BOX_BOTTOM_RIGHT = 3
LABEL_NOT_A_POINT = -1  # the original's padding token, added exactly once when there is no box; it attends
LABEL_PADDING = -2  # inert: masked out of attention

# P and N are padded up to one of these so that Triton, which merges only equal shapes, can batch.
PROMPT_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
TOKEN_BUCKETS = (2, 4, 8, 16, 32, 64)

# Priorities of requests in Triton's queues; one that states none has the first.
PRIORITY_FIRST = 1
PRIORITY_LAST = 2

# Keys of `parameters` in each config.pbtxt: how the gateway learns which model a Triton serves.
PARAMETER_MODEL = "sam.model"  # e.g. "sam-tiny"
PARAMETER_DIGEST = "sam.digest"  # "sha256:<hex>" of the checkpoint


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the tensors' shapes depend on: `input_size` S, `grid_size` G and `channels` C."""

    input_size: int
    grid_size: int
    channels: int

    @property
    def mask_size(self) -> int:
        """Side of the low-res masks, 4G."""
        return 4 * self.grid_size
