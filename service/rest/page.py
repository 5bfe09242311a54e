"""The demo page at `/`: files of this package, with headers that keep everything else out."""

from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.staticfiles import StaticFiles

page = APIRouter(include_in_schema=False)
files = StaticFiles(directory=Path(__file__).parent / "static", check_dir=False)  # an import touches no disk

HEADERS = {
    "cache-control": "no-cache",  # an ETag is asked for each time: after an upgrade no file is older than another
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@page.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """Answer with the page."""
    return await static("index.html", request)


@page.api_route("/static/{path:path}", methods=["GET", "HEAD"])
async def static(path: str, request: Request) -> Response:
    """Answer with a file of the page, or 304 if the browser has it."""
    response = await files.get_response(path, request.scope)
    response.headers.update(HEADERS)
    return response
