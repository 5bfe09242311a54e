"""How long a request may take, as its client says it."""

import math
from typing import Annotated

from fastapi import Depends, Header

from service.errors import InvalidPromptError

HEADER = "x-request-timeout"


async def deadline_of(
    x_request_timeout: Annotated[
        str | None,
        Header(
            description="Seconds this request may take, above 0; capped by the server's own deadline.", examples=["10"]
        ),
    ] = None,
) -> float | None:
    """Return the caller's deadline in seconds, or None."""
    try:
        deadline_s = None if x_request_timeout is None else float(x_request_timeout)
    except ValueError:
        deadline_s = math.nan
    if deadline_s is not None and not (math.isfinite(deadline_s) and deadline_s > 0):
        raise InvalidPromptError(f"{HEADER} must be a number of seconds above 0", field=HEADER)
    return deadline_s


Deadline = Annotated[float | None, Depends(deadline_of)]
