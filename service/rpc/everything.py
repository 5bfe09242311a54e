"""Everything-mode's messages from and to the core's values."""

from collections.abc import Iterator

from service.answers import EverythingRequest, EverythingResult, Progress
from service.errors import InvalidPromptError
from service.everything import Parameters, PointGrid, check_grid_counts
from service.records import Corners, Record
from service.rpc.convert import LEVELS, if_match_from_pb, pb_from_image, pb_from_timings
from service.rpc.pb import segment_anything_pb2 as pb

OPTIONAL = (
    "points_per_side",
    "points_per_batch",
    "pred_iou_thresh",
    "stability_score_thresh",
    "stability_score_offset",
    "box_nms_thresh",
    "crop_n_layers",
    "crop_nms_thresh",
    "crop_overlap_ratio",
    "crop_n_points_downscale_factor",
    "min_mask_region_area",
)


def everything_from_pb(message: pb.SegmentEverythingRequest) -> EverythingRequest:
    """Return the core's request; what is unset has the core's default."""
    check_grid_counts(len(message.point_grids), (len(grid.xy) // 2 for grid in message.point_grids))
    given = {name: getattr(message, name) for name in OPTIONAL if message.HasField(name)}
    grids = tuple(_grid_from_pb(index, grid) for index, grid in enumerate(message.point_grids))
    return EverythingRequest(Parameters(**given, point_grids=grids), if_match_from_pb(message))


def _grid_from_pb(index: int, grid: pb.PointGrid) -> PointGrid:
    if len(grid.xy) % 2:
        field = f"point_grids[{index}]"
        raise InvalidPromptError(f"{field} holds an x without its y", field=field)
    return tuple(zip(grid.xy[::2], grid.xy[1::2], strict=True))


def pb_from_progress(progress: Progress) -> pb.SegmentEverythingResponse:
    """Return the message about progress."""
    return pb.SegmentEverythingResponse(
        progress=pb.Progress(batches=progress.batches, batches_in_all=progress.batches_in_all, masks=progress.masks)
    )


def pbs_from_everything(result: EverythingResult) -> Iterator[pb.SegmentEverythingResponse]:
    """Yield a message for each record, and the summary."""
    for record in result.records:
        yield pb.SegmentEverythingResponse(record=_pb_from_record(record))
    summary = pb.Summary(
        image=pb_from_image(result.image),
        cache=LEVELS[result.cache],
        records=len(result.records),
        timings=pb_from_timings(result.timings),
    )
    yield pb.SegmentEverythingResponse(summary=summary)


def _pb_from_record(record: Record) -> pb.Record:
    return pb.Record(
        rle_counts=record.counts,
        area=record.area,
        bbox=_pb_from_box(record.bbox),
        predicted_iou=record.predicted_iou,
        point_x=record.point[0],
        point_y=record.point[1],
        stability_score=record.stability_score,
        crop_box=_pb_from_box(record.crop_box),
    )


def _pb_from_box(box: Corners) -> pb.BoundingBox:
    x, y, width, height = box
    return pb.BoundingBox(x=x, y=y, width=width, height=height)
