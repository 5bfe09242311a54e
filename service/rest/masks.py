"""The two forms in which masks are answered: JSON, and the PNG itself for whoever asks for one mask as `image/png`."""

import asyncio
import base64
from typing import Annotated, Any

from fastapi import Header
from fastapi.responses import Response

from service.answers import IfMatch, SegmentRequest, SegmentResult
from service.errors import InvalidPromptError
from service.mask import Mask, MaskFormat
from service.rest import schemas
from service.rest.json_body import JSON
from service.rest.packing import packed_from_bytes
from service.segmenter import Segmenter

PNG = "image/png"
STAGES = ("queue", "encode", "decode", "masks", "total")

PNG_HEADERS = {
    "x-image-id": "The image's id.",
    "x-sam-model": "name@digest of the model that answered.",
    "x-sam-cache": "Where the embedding came from; miss: the encoder ran.",
    "x-sam-score": "Predicted IoU, about 0 to 1.",
    "x-sam-stability": "Stability score of the low-res logits, 0 to 1.",
    "x-sam-bbox": "COCO's x,y,width,height in pixels; zeros if empty.",
    "x-sam-area": "Pixels of the mask.",
    "server-timing": "Milliseconds per stage: queue, encode, decode, masks, total.",
}

# For OpenAPI: the other form of a 200.
PNG_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "JSON; or, to a request with `accept: image/png` for one mask, the mask itself: a bilevel PNG "
        "of the original image's size, white on black, with these headers.",
        "content": {PNG: {"schema": {"type": "string", "format": "binary"}}},
        "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in PNG_HEADERS.items()},
    }
}


async def png_wanted(
    accept: Annotated[
        str | None,
        Header(
            description="`image/png`: answer with the PNG itself, score and the like in headers; for one prompt, "
            "without `multimask: true` and `include_logits` (else 422), whatever `format` says. Anything else: JSON."
        ),
    ] = None,
) -> bool:
    """Return whether the caller names PNG, and not JSON before it (RFC 9110, 12.5.1; wildcards mean JSON)."""
    weights = dict(_range_from_text(text) for text in (accept or "").lower().split(","))
    return weights.get(PNG, 0.0) > 0 and weights[PNG] >= weights.get(JSON, 0.0)


def _range_from_text(text: str) -> tuple[str, float]:
    kind, *parameters = (part.strip() for part in text.split(";"))
    try:
        return kind, float(dict(part.partition("=")[::2] for part in parameters).get("q", "1"))
    except ValueError:
        return kind, 0.0


async def request_from_body(
    body: schemas.SegmentBody, core: Segmenter, if_match: IfMatch, *, as_png: bool
) -> SegmentRequest:
    """Return the core's request."""
    if as_png:
        if len(body.prompts) != 1 or body.multimask or body.include_logits:
            raise InvalidPromptError(
                "accept: image/png is for one mask: send one prompt, without multimask true and include_logits",
                field="accept",
            )
        body = body.model_copy(update={"format": MaskFormat.PNG})
    mask_size = core.model.geometry.mask_size
    if body.has_mask_inputs:  # megabytes to inflate, off the event loop
        return await asyncio.to_thread(body.to_request, if_match, mask_size)
    return body.to_request(if_match, mask_size)


async def answer_from_result(result: SegmentResult, *, as_png: bool) -> schemas.SegmentAnswer | Response:
    """Return the answer in the form that was asked for."""
    if as_png:
        return _png_from_result(result)
    if any(mask.logits is not None for masks in result.results for mask in masks):  # to deflate, off the event loop
        return await asyncio.to_thread(body_from_result, result)
    return body_from_result(result)


def _png_from_result(result: SegmentResult) -> Response:
    ((mask,),) = result.results
    timings = result.timings
    values = (
        result.image.image_id,
        result.image.model,
        result.cache,
        f"{mask.score:.6g}",
        f"{mask.stability:.6g}",
        ",".join(map(str, mask.bbox)),
        str(mask.area),
        ", ".join(f"{stage};dur={1000 * getattr(timings, f'{stage}_s'):.3f}" for stage in STAGES),
    )
    return Response(mask.data, headers=dict(zip(PNG_HEADERS, values, strict=True)), media_type=PNG)


def body_from_result(result: SegmentResult) -> schemas.SegmentAnswer:
    """Return the answer's body."""
    return schemas.SegmentAnswer(
        image_id=result.image.image_id,
        size=result.image.size,
        model=result.image.model,
        cache=result.cache,
        results=[schemas.ResultBody(masks=[_body_from_mask(mask) for mask in masks]) for masks in result.results],
        timings_ms=schemas.timings_body(result.timings),
    )


def _body_from_mask(mask: Mask) -> schemas.MaskBody:
    rle = schemas.RleBody(size=mask.size, counts=mask.data.decode()) if mask.format is MaskFormat.RLE else None
    polygons = [[list(ring) for ring in polygon] for polygon in mask.polygons]
    return schemas.MaskBody(
        rle=rle,
        png=base64.b64encode(mask.data).decode() if mask.format is MaskFormat.PNG else None,
        polygons=polygons if mask.format is MaskFormat.POLYGON else None,
        logits=None if mask.logits is None else packed_from_bytes(mask.logits),
        score=mask.score,
        stability=mask.stability,
        bbox=mask.bbox,
        area=mask.area,
    )
