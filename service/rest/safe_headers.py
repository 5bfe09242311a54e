"""The headers of every answer."""

from starlette.datastructures import MutableHeaders

from service.call import current_request_id

# Where the route says nothing else: an answer is not to be guessed at, framed or embedded by another site.
SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def add_headers(headers: MutableHeaders) -> None:
    """Add to an answer the current call's request id, and the safe headers that its route has not set."""
    headers["x-request-id"] = current_request_id()
    for name, value in SAFE_HEADERS.items():
        headers.setdefault(name, value)
