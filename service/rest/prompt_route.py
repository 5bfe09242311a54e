"""The route that is called for every click, without the framework's way to an endpoint's parameters and back.

The endpoint is declared like any other, for OpenAPI. Here it is called with what the same functions make of the same
request, and its answer is written as it is: the framework's own way is a third of the time that such a request takes.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from pydantic import ValidationError

from service.admission.contract import Lane
from service.call import current_tenant
from service.rest import deadline
from service.rest.json_body import JSON, is_json
from service.rest.masks import png_wanted
from service.rest.parameters import if_match_of, image_ref_of, segmenter_of
from service.rest.problems import not_an_object, problem_from_validation
from service.rest.schemas import SegmentAnswer, SegmentBody
from service.rest.tenants import TenantRoute


class PromptRoute(TenantRoute):
    """A route whose endpoint takes `ref`, `body`, `core`, `deadline_s`, `if_match` and `as_png`."""

    def unguarded_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what calls the endpoint."""

        async def handle(request: Request) -> Response:
            answer: SegmentAnswer | Response = await self.endpoint(**await _parameters_of(request))
            if isinstance(answer, SegmentAnswer):
                return Response(answer.model_dump_json(exclude_none=True), media_type=JSON)
            return answer

        return handle


async def _parameters_of(request: Request) -> dict[str, Any]:
    """Return the endpoint's parameters; the body is read last, and not at all if there is no room for its request."""
    headers, core, tenant = request.headers, await segmenter_of(request), current_tenant()
    parameters = {
        "core": core,
        "ref": await image_ref_of(tenant, request.path_params["image_id"], headers.get("x-image-id")),
        "deadline_s": await deadline.deadline_of(headers.get(deadline.HEADER)),
        "if_match": await if_match_of(headers.getlist("if-match") or None),
        "as_png": await png_wanted(headers.get("accept")),
    }
    core.gate.check_room(Lane.PROMPT, tenant)
    return {**parameters, "body": await _body_of(request)}


async def _body_of(request: Request) -> SegmentBody:
    data = await request.body()
    if not is_json(request.headers.get("content-type", "")):
        raise not_an_object()
    try:
        return SegmentBody.model_validate_json(data)
    except ValidationError as error:
        raise problem_from_validation(error.errors()) from error
