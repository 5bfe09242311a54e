"""Errors as RFC 9457 problem documents."""

import math
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from service.call import current_request_id
from service.errors import InvalidPromptError, SegmentError
from service.mask import unknown_format
from service.rest.schemas import Problem
from service.status import INTERNAL, STATUS, message_of, retry_after_s_of, status_of

MEDIA_TYPE = "application/problem+json"
MAX_NAME_CHARACTERS = 64
REFUSAL = "sam.refusal"  # in a request's scope: the arguments of the `Refused` that ends the reading of its body

BAD_REQUEST, TOO_SLOW, HEADERS_TOO_LARGE = (400, "bad_request"), (408, "too_slow"), (431, "headers_too_large")

# What every route may answer, for OpenAPI: HTTP status -> reasons.
REASONS = [
    *((status.http, status.reason) for status in [*STATUS.values(), INTERNAL]),
    *(BAD_REQUEST, TOO_SLOW, HEADERS_TOO_LARGE),
]
PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {
        "description": ", ".join(reason for http, reason in REASONS if http == code),
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for code in sorted({http for http, _ in REASONS})
}


class Refused(HTTPException):
    """A request that is refused for how it came, not for what it is; the framework lets such errors through."""

    def __init__(self, http: int, reason: str, detail: str) -> None:
        super().__init__(http, detail)
        self.reason = reason


def problem_from_error(error: BaseException) -> JSONResponse:
    """Return the answer for `error`, by the table."""
    status = status_of(error)
    field = error.field if isinstance(error, SegmentError) else ""
    retry_after_s = retry_after_s_of(error)
    # RFC 9110, 10.2.3: whole seconds. Rounded up, so that whoever comes back then is not too early.
    headers = {} if retry_after_s is None else {"retry-after": str(math.ceil(retry_after_s))}
    if status.http == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return problem(status.http, status.reason, message_of(error, current_request_id()), field=field, headers=headers)


def problem(
    http: int, reason: str, detail: str, *, field: str = "", headers: dict[str, str] | None = None
) -> JSONResponse:
    """Return a problem document."""
    body = Problem(title=HTTPStatus(http).phrase, status=http, detail=detail, reason=reason, field=field or None)
    headers = {"cache-control": "no-store", **(headers or {})}  # a 404 may be kept by caches that are told nothing
    return JSONResponse(body.model_dump(exclude_none=True), http, headers, MEDIA_TYPE)


def problem_from_validation(errors: Iterable[Any]) -> InvalidPromptError:
    """Return our error for the first of pydantic's; the field is written like `prompts[0].box[2]`."""
    first = next(iter(errors))
    if first["type"] == "extra_forbidden":  # its name is the caller's word: of any length, and not for the log
        name = str(first["loc"][-1])[:MAX_NAME_CHARACTERS]
        return InvalidPromptError(f"{name}: there is no such field", field=_field_of(first["loc"][:-1]) or "body")
    field = _field_of(first["loc"])
    if first["type"] == "json_invalid":
        return InvalidPromptError("the body is not valid JSON", field="body")
    if field.endswith("format"):
        return unknown_format()
    if not field:
        return not_an_object()
    return InvalidPromptError(f"{field}: {first['msg']}", field=field)


def _field_of(place: Iterable[int | str]) -> str:
    field = ""
    for part in place:
        if part in ("body", "query", "path", "header") and not field:
            continue
        field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else str(part)
    return field


def not_an_object() -> InvalidPromptError:
    """Return our error for a body that is something else than the object it must be, or does not say that it is one."""
    return InvalidPromptError("the body must be a JSON object; send content-type: application/json", field="body")
