"""Bodies of everything-mode, and their conversion from and to the core's values."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator

from service.answers import EverythingRequest, EverythingResult, IfMatch
from service.cache.contract import CacheLevel
from service.everything import BOUNDS, MAX_GRID_POINTS, POINTS_PER_SIDE, Parameters, check_grid_counts
from service.records import Record
from service.rest.schemas import IMAGE_ID, TIMINGS, RequestBody, RleBody, TimingsBody, timings_body

DEFAULTS = Parameters()
# The bundled model rates its masks low: with these thresholds it finds dozens.
EVERYTHING_EXAMPLE: dict[str, Any] = {"points_per_side": 8, "pred_iou_thresh": 0.4, "stability_score_thresh": 0.7}


def _bounded(name: str, description: str) -> Any:  # noqa: ANN401 - what pydantic's `Field` returns
    """Return a field with the core's default; its bounds are documented here and checked in the core."""
    low, high = BOUNDS[name]
    return Field(
        default=getattr(DEFAULTS, name),
        description=description,
        json_schema_extra={"minimum": low, "maximum": high},
    )


class EverythingBody(RequestBody):
    """The parameters of the original's SamAutomaticMaskGenerator, by its names and with its defaults."""

    model_config = ConfigDict(json_schema_extra={"examples": [EVERYTHING_EXAMPLE]})

    points_per_side: int | None = _bounded(
        "points_per_side",
        f"Points along one side of the grid, 1 to 64; {POINTS_PER_SIDE} if null. Not together with `point_grids`.",
    )
    points_per_batch: int = _bounded("points_per_batch", "Points decoded at once. Changes the speed, not the answer.")
    pred_iou_thresh: float = _bounded("pred_iou_thresh", "Keep masks above this predicted IoU; 0 keeps all.")
    stability_score_thresh: float = _bounded("stability_score_thresh", "Keep masks of at least this stability score.")
    stability_score_offset: float = Field(
        default=DEFAULTS.stability_score_offset,
        description="How far the stability score moves the threshold, in logits.",
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 100},
    )
    box_nms_thresh: float = _bounded(
        "box_nms_thresh", "Box IoU above which the lower-rated of two masks of a crop is dropped."
    )
    crop_n_layers: int = _bounded(
        "crop_n_layers",
        "Layers of crops beside the whole image, layer i with 4^i crops. Crops need the image's bytes, unless all are "
        "cached from a call before.",
    )
    crop_nms_thresh: float = _bounded(
        "crop_nms_thresh", "Box IoU above which the mask of the larger of two crops is dropped."
    )
    crop_overlap_ratio: float = Field(
        default=DEFAULTS.crop_overlap_ratio,
        description="How much the crops of the first layer overlap, as a part of the image's shorter side.",
        json_schema_extra={"minimum": 0, "exclusiveMaximum": 1},
    )
    crop_n_points_downscale_factor: int = _bounded(
        "crop_n_points_downscale_factor", "Layer i asks points_per_side / this^i points along a side."
    )
    point_grids: Annotated[list[list[tuple[float, float]]], FailFast()] = Field(
        default=[],
        description="Instead of `points_per_side`: the points `[x, y]` of the whole image and of each crop layer, in 0 "
        f"to 1 of a crop's width and height; 1 to {MAX_GRID_POINTS} points each.",
    )
    min_mask_region_area: int = _bounded(
        "min_mask_region_area", "Fill holes and drop islands of fewer pixels than this; 0 leaves masks as they are."
    )

    @field_validator("point_grids", mode="before")
    @classmethod
    def _counted(cls, grids: object) -> object:
        """Refuse too many grids or points before each is validated, in the core's words."""
        if isinstance(grids, list):
            check_grid_counts(len(grids), (len(grid) if isinstance(grid, list) else 1 for grid in grids))
        return grids

    def to_request(self, if_match: IfMatch) -> EverythingRequest:
        """Return the core's request."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        given["point_grids"] = tuple(tuple(grid) for grid in self.point_grids)
        return EverythingRequest(Parameters(**given), if_match)


class RecordBody(BaseModel):
    """One mask, as SA-1B's annotations have it."""

    segmentation: RleBody = Field(description="The mask, of the original image's size.")
    area: int = Field(description="Pixels of the mask.")
    bbox: tuple[int, int, int, int] = Field(
        description="[x, y, width, height] in pixels as the original has it: last column and row minus the first, so "
        "one less than COCO's width and height."
    )
    predicted_iou: float = Field(description="The model's own estimate of the mask's IoU, about 0 to 1.")
    point_coords: list[tuple[float, float]] = Field(
        description="The one point [x, y] that the mask was found by, in pixels of the original image."
    )
    stability_score: float = Field(description="Stability score of the mask in its crop's resolution, 0 to 1.")
    crop_box: tuple[int, int, int, int] = Field(
        description="[x, y, width, height] of the part of the image that the mask was found in."
    )


class EverythingAnswer(BaseModel):
    """The masks of everything in an image."""

    image_id: str = Field(description=IMAGE_ID)
    size: tuple[int, int] = Field(description="[height, width] of the original image as a person sees it.")
    model: str = Field(description="name@digest of the model that answered.")
    cache: CacheLevel = Field(description="Where the embedding came from; miss: the encoder ran, for image or crops.")
    records: list[RecordBody] = Field(description="One for each mask.")
    timings_ms: TimingsBody = Field(description=TIMINGS)


def answer_from_everything(result: EverythingResult) -> EverythingAnswer:
    """Return the answer's body."""
    return EverythingAnswer(
        image_id=result.image.image_id,
        size=result.image.size,
        model=result.image.model,
        cache=result.cache,
        records=[_body_from_record(record, result.image.size) for record in result.records],
        timings_ms=timings_body(result.timings),
    )


def _body_from_record(record: Record, size: tuple[int, int]) -> RecordBody:
    return RecordBody(
        segmentation=RleBody(size=size, counts=record.counts.decode()),
        area=record.area,
        bbox=record.bbox,
        predicted_iou=record.predicted_iou,
        point_coords=[record.point],
        stability_score=record.stability_score,
        crop_box=record.crop_box,
    )
