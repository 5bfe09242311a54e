"""The HTTP routes. A handler converts in, calls the `Segmenter`, converts out."""

import json
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Depends, File, Form, Request, Response, UploadFile
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from service.answers import ImageRef, Progress
from service.image import too_many_bytes
from service.rest import schemas
from service.rest.deadline import Deadline
from service.rest.everything import EVERYTHING_EXAMPLE, EverythingAnswer, EverythingBody, answer_from_everything
from service.rest.masks import PNG_ANSWER, answer_from_result, request_from_body
from service.rest.parameters import AsPng, Condition, Core, Ref, upload_ref_of
from service.rest.problems import PROBLEMS, problem_from_validation
from service.rest.prompt_route import PromptRoute
from service.rest.tenants import EncodeRoute, Tenant, TenantRoute
from service.segmenter import Segmenter

router = APIRouter(responses=PROBLEMS, route_class=TenantRoute)
encodes = APIRouter(responses=PROBLEMS, route_class=EncodeRoute)
prompts = APIRouter(responses=PROBLEMS, route_class=PromptRoute)
health = APIRouter()

IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
BINARY_BODY = {
    "requestBody": {
        "required": True,
        "description": "The bytes of a JPEG, PNG or WebP still image.",
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in IMAGE_TYPES},
    }
}


@encodes.put(
    "/v1/images/{image_id}",
    summary="Encode an image and cache it",
    status_code=201,
    response_model=schemas.EmbedAnswer,
    responses={
        200: {"description": "Cached before; encoded anew only if the bytes differ", "model": schemas.EmbedAnswer}
    },
    openapi_extra=BINARY_BODY,
)
async def put_image(
    ref: Ref, request: Request, response: Response, core: Core, deadline_s: Deadline, if_match: Condition
) -> schemas.EmbedAnswer:
    """Encode the body and keep its embedding, so that every further prompt skips the encoder."""
    result = await core.embed(ref, await _body(request, core), deadline_s, if_match=if_match)
    response.status_code = 201 if result.created else 200
    response.headers["etag"] = f'"{result.image.digest}"'
    return schemas.EmbedAnswer(
        **schemas.image_body(result.image), cache=result.cache, timings_ms=schemas.timings_body(result.timings)
    )


@router.api_route(
    "/v1/images/{image_id}", methods=["HEAD"], summary="Whether an image is cached", include_in_schema=False
)
@router.get("/v1/images/{image_id}", summary="What is known of a cached image")
async def get_image(ref: Ref, response: Response, core: Core) -> schemas.ImageBody:
    """Answer 404 `image_not_cached` when the embedding is gone."""
    image = await core.image(ref)
    response.headers["etag"] = f'"{image.digest}"'
    return schemas.ImageBody(**schemas.image_body(image))


@router.delete("/v1/images/{image_id}", summary="Forget an image", status_code=204)
async def delete_image(ref: Ref, core: Core, if_match: Condition) -> None:
    """Drop the embedding."""
    await core.delete(ref, if_match=if_match)


@prompts.post(
    "/v1/images/{image_id}/masks",
    summary="Masks for prompts on a cached image",
    response_model=schemas.SegmentAnswer,
    response_model_exclude_none=True,
    responses=PNG_ANSWER,
)
async def segment(
    ref: Ref, body: schemas.SegmentBody, core: Core, deadline_s: Deadline, if_match: Condition, as_png: AsPng
) -> schemas.SegmentAnswer | Response:
    """Run the decoder only. 404 `image_not_cached` when the embedding is gone: PUT the bytes again."""
    request = await request_from_body(body, core, if_match, as_png=as_png)
    return await answer_from_result(await core.segment(ref, request, deadline_s), as_png=as_png)


@encodes.post(
    "/v1/masks",
    summary="Image and prompts in one call",
    response_model=schemas.SegmentAnswer,
    response_model_exclude_none=True,
    responses=PNG_ANSWER,
)
async def segment_bytes(  # noqa: PLR0913 - the parts of a request
    *,
    image: Annotated[UploadFile, File(description="The bytes of a JPEG, PNG or WebP still image.")],
    request: Annotated[
        str,
        Form(
            description="JSON of the same form as the body of `/v1/images/{image_id}/masks`, of at most 1 MiB.",
            examples=['{"prompts": [{"points": [[154, 198, 1]]}]}'],
        ),
    ],
    core: Core,
    ref: Annotated[ImageRef, Depends(upload_ref_of)],
    deadline_s: Deadline,
    if_match: Condition,
    as_png: AsPng,
) -> schemas.SegmentAnswer | Response:
    """For clients that keep no ids. The answer's `image_id` can be prompted again."""
    try:
        body = schemas.SegmentBody.model_validate_json(request)
    except ValidationError as error:
        raise problem_from_validation(error.errors()) from error
    asked = await request_from_body(body, core, if_match, as_png=as_png)
    result = await core.segment_bytes(ref, await image.read(), asked, deadline_s)
    return await answer_from_result(result, as_png=as_png)


@encodes.post("/v1/images/{image_id}/everything", summary="Masks of everything in a cached image")
async def everything(
    ref: Ref,
    body: EverythingBody,
    http: Request,
    core: Core,
    deadline_s: Deadline,
    if_match: Condition,
) -> EverythingAnswer:
    """Ask a grid of points and keep the good masks, as the original's SamAutomaticMaskGenerator does."""
    asked = body.to_request(if_match)
    result = await core.everything(ref, asked, deadline_s=deadline_s, on_progress=_while_connected(http))
    return answer_from_everything(result)


@encodes.post("/v1/everything", summary="Image in, masks of everything in it out")
async def everything_in_bytes(  # noqa: PLR0913 - what a request may bring
    *,
    image: Annotated[UploadFile, File(description="The bytes of a JPEG, PNG or WebP still image.")],
    http: Request,
    core: Core,
    ref: Annotated[ImageRef, Depends(upload_ref_of)],
    deadline_s: Deadline,
    if_match: Condition,
    request: Annotated[
        str,
        Form(
            description="JSON of the same form as the body of `/v1/images/{image_id}/everything`.",
            examples=[json.dumps(EVERYTHING_EXAMPLE)],
        ),
    ] = "{}",
) -> EverythingAnswer:
    """For crops, which are cut from the image's bytes, and for clients that keep no ids."""
    try:
        asked = EverythingBody.model_validate_json(request).to_request(if_match)
    except ValidationError as error:
        raise problem_from_validation(error.errors()) from error
    watch, data = _while_connected(http), await image.read()
    result = await core.everything(ref, asked, data, deadline_s=deadline_s, on_progress=watch)
    return answer_from_everything(result)


@router.get("/v1/model", summary="The model being served")
async def get_model(core: Core, _: Tenant) -> schemas.ModelBody:
    """Name, digest and geometry."""
    return schemas.model_body(core.model)


@health.get("/healthz", summary="Liveness")
async def healthz() -> schemas.HealthBody:
    """Answer as long as the process serves, whatever the model does."""
    return schemas.HealthBody(status="ok")


@health.get("/readyz", summary="Readiness", responses={503: {"model": schemas.HealthBody}})
async def readyz(core: Core, response: Response) -> schemas.HealthBody:
    """200 once a canary has come through the model, 503 before, after a failure and while draining."""
    if core.ready:
        return schemas.HealthBody(status="ok")
    response.status_code = 503
    return schemas.HealthBody(status="draining" if core.gate.retiring else "model_unavailable")


def _while_connected(request: Request) -> Callable[[Progress], Awaitable[None]]:
    """Return what ends a long request between two of its steps when the client has left."""

    async def check(_: Progress) -> None:
        if await request.is_disconnected():
            raise ClientDisconnect

    return check


async def _body(request: Request, core: Segmenter) -> bytes:
    """Return the body, refused as soon as it announces or shows too many bytes."""
    max_bytes = core.limits.max_bytes
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_many_bytes(max_bytes)
    chunks, received = [], 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            raise too_many_bytes(max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)
