"""What a client asks: prompts, and the parameters of everything-mode."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from service.client.masks import bytes_from_logits
from service.errors import InvalidPromptError
from service.rpc.pb import segment_anything_pb2 as pb

POINT_LENGTHS = (2, 3)
BOX_LENGTH = 4


@dataclass(frozen=True, eq=False)
class Prompt:
    """One object to segment: points, a box, or both, in pixels of the image, x right and y down.

    `points` are (x, y), or (x, y, label) with label 1 for foreground and 0 for background; `box` is (x0, y0, x1, y1);
    `mask_input` is `Mask.logits` of an earlier answer on this image, which the prompt refines.
    """

    points: Iterable[Sequence[float]] = ()
    box: Sequence[float] | None = None
    mask_input: NDArray[np.floating[Any]] | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """How prompts are answered; the fields are those of the request."""

    multimask: bool | None = None
    include_logits: bool = False
    min_region_area: int = 0


class EverythingParameters(TypedDict, total=False):
    """Parameters of the original's `SamAutomaticMaskGenerator`; those left out have its defaults."""

    points_per_side: int
    points_per_batch: int
    pred_iou_thresh: float
    stability_score_thresh: float
    stability_score_offset: float
    box_nms_thresh: float
    crop_n_layers: int
    crop_nms_thresh: float
    crop_overlap_ratio: float
    crop_n_points_downscale_factor: int
    point_grids: Sequence[NDArray[np.floating[Any]]]
    min_mask_region_area: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far everything-mode is: `batches` of points decoded of `batches_in_all`, `masks` found so far."""

    batches: int
    batches_in_all: int
    masks: int


def segment_request(image_id: str, prompts: Iterable[Prompt], options: Options) -> pb.SegmentRequest:
    """Return the request for masks, as run lengths, on a cached image."""
    with _refusing_what_no_message_holds():
        return pb.SegmentRequest(
            image_id=image_id,
            prompts=[_pb_from_prompt(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)],
            multimask=options.multimask,  # type: ignore[arg-type] # None leaves it unset
            format=pb.MASK_FORMAT_RLE,
            include_logits=options.include_logits,
            min_region_area=options.min_region_area,
        )


def everything_request(image_id: str, parameters: EverythingParameters) -> pb.SegmentEverythingRequest:
    """Return the request for masks of everything in a cached image."""
    scalars: dict[str, Any] = {**parameters}
    grids = scalars.pop("point_grids", None) or ()
    with _refusing_what_no_message_holds():
        message = pb.SegmentEverythingRequest(image_id=image_id, **scalars)
        message.point_grids.extend(pb.PointGrid(xy=np.asarray(grid, np.float64).ravel()) for grid in grids)
        return message


@contextmanager
def _refusing_what_no_message_holds() -> Iterator[None]:
    """Turn protobuf's complaints about a value, e.g. a negative count, into an invalid prompt."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise _invalid(f"a value cannot be sent: {error}", "") from error


def _pb_from_prompt(prompt: Prompt, field: str) -> pb.Prompt:
    message = pb.Prompt()
    for index, point in enumerate(prompt.points):
        if len(point) not in POINT_LENGTHS:
            where = f"{field}.points[{index}]"
            raise _invalid(f"{where} has {len(point)} numbers; a point is (x, y) or (x, y, label)", where)
        message.points.add(x=point[0], y=point[1], label=int(point[2]) if len(point) > POINT_LENGTHS[0] else 1)
    if prompt.box is not None:
        if len(prompt.box) != BOX_LENGTH:
            raise _invalid(f"{field}.box has {len(prompt.box)} numbers; a box is (x0, y0, x1, y1)", f"{field}.box")
        x0, y0, x1, y1 = prompt.box
        message.box.CopyFrom(pb.Box(x0=x0, y0=y0, x1=x1, y1=y1))
    if prompt.mask_input is not None:
        message.mask_input = bytes_from_logits(prompt.mask_input)
    return message


def _invalid(message: str, field: str) -> InvalidPromptError:
    error = InvalidPromptError(message, field=field)
    error.reason = "invalid_prompt"
    return error
