"""Protobuf messages from and to the core's values."""

from dataclasses import replace

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

from service.answers import EmbedResult, IfMatch, ImageRecord, Model, SegmentRequest, SegmentResult, Timings
from service.cache.contract import CacheLevel
from service.mask import Mask, MaskFormat, MaskOutput, unknown_format
from service.prompt import MAX_POINTS, MAX_PROMPTS, Box, Point, Prompt, check_counts, check_mask_count
from service.rpc.pb import segment_anything_pb2 as pb

FORMATS = {
    pb.MASK_FORMAT_UNSPECIFIED: MaskFormat.RLE,
    pb.MASK_FORMAT_RLE: MaskFormat.RLE,
    pb.MASK_FORMAT_PNG: MaskFormat.PNG,
    pb.MASK_FORMAT_POLYGON: MaskFormat.POLYGON,
    pb.MASK_FORMAT_NONE: MaskFormat.NONE,
}
LEVELS = {
    CacheLevel.MEMORY: pb.CACHE_LEVEL_MEMORY,
    CacheLevel.MISS: pb.CACHE_LEVEL_MISS,
    CacheLevel.REDIS: pb.CACHE_LEVEL_REDIS,
}


def request_from_pb(message: pb.SegmentRequest) -> SegmentRequest:
    """Return the core's request."""
    check_counts(len(message.prompts), (len(prompt.points) for prompt in message.prompts))
    check_mask_count(sum(prompt.HasField("mask_input") for prompt in message.prompts))
    if message.format not in FORMATS:
        raise unknown_format()
    return SegmentRequest(
        prompts=_prompts_from_pb(message.prompts),
        multimask=message.multimask if message.HasField("multimask") else None,
        output=_output_from_pb(message),
        if_match=if_match_from_pb(message),
    )


def _output_from_pb(message: pb.SegmentRequest) -> MaskOutput:
    output = MaskOutput(FORMATS[message.format], message.include_logits, message.min_region_area)
    if message.HasField("polygon_tolerance"):
        return replace(output, polygon_tolerance_px=message.polygon_tolerance)
    return output


def if_match_from_pb(
    message: pb.EmbedImageRequest | pb.DeleteImageRequest | pb.SegmentRequest | pb.SegmentEverythingRequest,
) -> IfMatch:
    """Return what must be cached: one digest, any ("*"), or whatever is."""
    return (message.if_match,) if message.HasField("if_match") else None


def _prompts_from_pb(messages: RepeatedCompositeFieldContainer[pb.Prompt]) -> tuple[Prompt, ...]:
    return tuple(
        Prompt(
            tuple(Point(point.x, point.y, point.label) for point in message.points),
            Box(message.box.x0, message.box.y0, message.box.x1, message.box.y1) if message.HasField("box") else None,
            message.mask_input if message.HasField("mask_input") else None,
        )
        for message in messages
    )


def pb_from_embed_result(result: EmbedResult) -> pb.EmbedImageResponse:
    """Return the answer to an upload."""
    return pb.EmbedImageResponse(
        image=pb_from_image(result.image),
        created=result.created,
        cache=LEVELS[result.cache],
        timings=pb_from_timings(result.timings),
    )


def pb_from_result(result: SegmentResult) -> pb.SegmentResponse:
    """Return the masks."""
    return pb.SegmentResponse(
        image=pb_from_image(result.image),
        cache=LEVELS[result.cache],
        results=[pb.Result(masks=[_pb_from_mask(mask) for mask in masks]) for masks in result.results],
        timings=pb_from_timings(result.timings),
    )


def pb_from_image(image: ImageRecord) -> pb.Image:
    """Return what is known of a cached image."""
    height, width = image.size
    return pb.Image(
        image_id=image.image_id,
        digest=image.digest,
        size=pb.Size(height=height, width=width),
        model=image.model,
        embedding_bytes=image.nbytes,
    )


def pb_from_model(model: Model) -> pb.GetModelResponse:
    """Return the model's facts."""
    side = model.geometry.grid_size
    return pb.GetModelResponse(
        name=model.name,
        digest=model.digest,
        input_size=model.geometry.input_size,
        embedding_shape=[model.geometry.channels, side, side],
        max_prompts=MAX_PROMPTS,
        max_points=MAX_POINTS,
        mask_size=model.geometry.mask_size,
    )


def _pb_from_mask(mask: Mask) -> pb.Mask:
    x, y, width, height = mask.bbox
    message = pb.Mask(
        score=mask.score,
        stability=mask.stability,
        bbox=pb.BoundingBox(x=x, y=y, width=width, height=height),
        area=mask.area,
        logits=mask.logits,
    )
    match mask.format:
        case MaskFormat.RLE:
            message.rle_counts = mask.data
        case MaskFormat.PNG:
            message.png = mask.data
        case MaskFormat.POLYGON:
            polygons = [pb.Polygon(rings=[pb.Ring(xy=ring) for ring in polygon]) for polygon in mask.polygons]
            message.polygons.CopyFrom(pb.MultiPolygon(polygons=polygons))
    return message


def pb_from_timings(timings: Timings) -> pb.Timings:
    """Return milliseconds, to the microsecond."""
    stages = ("queue", "encode", "decode", "masks", "total")
    return pb.Timings(**{f"{stage}_ms": round(1000 * getattr(timings, f"{stage}_s"), 3) for stage in stages})
