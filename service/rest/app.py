"""The HTTP application: routes, error handlers, and the one middleware that counts and bounds requests."""

import asyncio
import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi_offline import FastAPIOffline
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.auth import Authoriser
from service.errors import DrainingError, InvalidPromptError, SegmentError
from service.image import too_many_bytes
from service.logs import log_failure
from service.metrics import CANCELLED, OK
from service.observer import Observer
from service.rest.json_body import check_json, is_json
from service.rest.page import page
from service.rest.presence import LEFT, ClientPresence
from service.rest.problems import Refused, problem, problem_from_error, problem_from_validation
from service.rest.routes import encodes, health, prompts, router
from service.rest.safe_headers import add_headers
from service.rest.schemas import Problem
from service.segmenter import Segmenter
from service.status import INTERNAL, STATUS, status_of

log = logging.getLogger(__name__)

MULTIPART_OVERHEAD_BYTES = 1024 * 1024
OUTCOME = "sam.outcome"  # where the error handlers leave the reason for the middleware
CLIENT_CLOSED_REQUEST = 499  # nginx's code; nobody is there to read it
DRAINING = STATUS[DrainingError]
METHODS = frozenset({"GET", "HEAD", "PUT", "POST", "DELETE"})  # others are counted as one: there are dozens


def create_app(segmenter: Segmenter, authoriser: Authoriser, observer: Observer) -> FastAPI:
    """Return the application around one core."""
    app = FastAPIOffline(
        title="Segment Anything",
        summary="Encode an image once, then turn clicks and boxes into masks.",
        redoc_url=None,
        version="1",
        redirect_slashes=False,  # to where a Host header says, which is anybody's word
    )
    app.state.segmenter = segmenter
    app.state.authoriser = authoriser
    app.include_router(prompts)  # first: routes are tried in this order
    app.include_router(encodes)
    app.include_router(router)
    app.include_router(health)
    app.include_router(page)
    app.add_exception_handler(SegmentError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_error)
    app.add_middleware(RequestObserver, observer=observer, segmenter=segmenter)
    app.add_middleware(ClientPresence)  # around the other, which counts those that it ends
    _document_problems(app)
    return app


class RequestObserver:
    """Bounds each request's body while it arrives, and tells of each answer by route and outcome."""

    def __init__(self, app: ASGIApp, observer: Observer, segmenter: Segmenter) -> None:
        self._app = app
        self._observer = observer
        self._segmenter = segmenter
        self._max_image_bytes = segmenter.limits.max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, status, received, commas = Headers(scope=scope), 500, 0, 0
        call = self._observer.begin("http", headers)
        as_json = is_json(headers.get("content-type", ""))
        max_bytes = self._max_image_bytes + MULTIPART_OVERHEAD_BYTES
        announced = min(int(headers.get("content-length", 0)), max_bytes)

        async def bounded_receive() -> Message:
            nonlocal received, commas
            grow_body_to(announced, call.tenant)
            message = await receive()
            received += len(message.get("body", b""))
            if as_json:
                commas += message.get("body", b"").count(b",")
                check_json(received, commas)
            elif received > max_bytes:
                raise too_many_bytes(self._max_image_bytes)
            grow_body_to(received, call.tenant)
            return message

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                add_headers(MutableHeaders(scope=message))
                if self._segmenter.gate.retiring:  # the next request of this connection is better sent elsewhere
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            with self._segmenter.gate.permits.body() as grow_body_to:
                await self._app(scope, bounded_receive, noting_send)
        except asyncio.CancelledError:  # the client went away, which is its right; or the drain's time is up
            left = LEFT in scope
            scope[OUTCOME], status = (CANCELLED, CLIENT_CLOSED_REQUEST) if left else (DRAINING.reason, DRAINING.http)
            raise
        except BaseException as error:  # unknown errors are answered, and logged, further out
            scope[OUTCOME] = status_of(error).reason
            raise
        finally:
            outcome = scope.get(OUTCOME) or (OK if status < 400 else f"http_{status}")  # noqa: PLR2004 - HTTP's own bound
            route = getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if scope["method"] in METHODS else "OTHER"
            self._observer.end(call, f"{method} {route}", outcome, str(status))


async def _on_disconnect(request: Request, _: Exception) -> Response:
    """Count a client that went away during a long request; that is its right, and no line in the log."""
    request.scope[OUTCOME] = CANCELLED
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_error(request: Request, error: Exception) -> Response:
    status = status_of(error)
    request.scope[OUTCOME] = status.reason
    answer = problem_from_error(error)
    if status is INTERNAL:  # answered outside all middleware, raised again by the framework, and logged by the server
        add_headers(answer.headers)
    else:
        log_failure(log, error)
    return answer


async def _on_validation_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise TypeError from error
    return await _on_error(request, problem_from_validation(error.errors()))


async def _on_refused(request: Request, error: Exception) -> Response:
    if not isinstance(error, Refused):
        raise TypeError from error
    request.scope[OUTCOME] = error.reason
    return problem(error.status_code, error.reason, error.detail)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Answer for the framework's own errors: unknown routes, wrong methods, broken multipart."""
    if not isinstance(error, HTTPException):
        raise TypeError from error
    if isinstance(error.__context__, SegmentError):  # raised while the framework read the body
        return await _on_error(request, error.__context__)
    reasons = {404: "not_found", 405: "method_not_allowed"}
    if error.status_code not in reasons:
        return await _on_error(request, InvalidPromptError("the body cannot be read", field="body"))
    reason = request.scope[OUTCOME] = reasons[error.status_code]
    return problem(error.status_code, reason, "there is nothing here; see /docs", headers=dict(error.headers or {}))


def _document_problems(app: FastAPI) -> None:
    """Put the problem document into OpenAPI, where the routes' error answers refer to it."""
    schema = app.openapi()
    schema["components"]["schemas"]["Problem"] = Problem.model_json_schema()
    for path in schema["paths"].values():
        for operation in path.values():
            answers = operation["responses"]
            answers.get("422", {}).get("content", {}).pop("application/json", None)
    for unused in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(unused, None)
