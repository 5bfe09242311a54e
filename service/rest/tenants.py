"""Whose a request is: found by the route, before anything of the body is read."""

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Header, Request, Response
from fastapi.routing import APIRoute

from service.admission.contract import Lane
from service.call import current_tenant, note_tenant
from service.rest import deadline

if TYPE_CHECKING:
    from service.auth import Authoriser
    from service.segmenter import Segmenter


class TenantRoute(APIRoute):
    """A route for tenants only, while the server takes work: both is known before a byte of the body is read.

    The request's deadline begins here: its body must arrive in time, too.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the framework's handler behind the check."""
        handle = self.unguarded_handler()

        async def authorised(request: Request) -> Response:
            authoriser: Authoriser = request.app.state.authoriser
            segmenter: Segmenter = request.app.state.segmenter
            note_tenant(authoriser.tenant_of(*request.headers.getlist("authorization")))
            segmenter.gate.check_open()
            deadline_s = await deadline.deadline_of(request.headers.get(deadline.HEADER))
            async with segmenter.gate.within(deadline_s):  # the body's arrival included
                response = await handle(request)
            response.headers.setdefault("cache-control", "no-store")
            return response

        return authorised

    def unguarded_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what is behind the check: the framework's handler."""
        return super().get_route_handler()


class EncodeRoute(TenantRoute):
    """A route whose requests may need the encoder: one that would be refused anyway is before its body is read."""

    def unguarded_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the framework's handler behind a look at the room there is."""
        handle = super().unguarded_handler()

        async def with_room(request: Request) -> Response:
            segmenter: Segmenter = request.app.state.segmenter
            segmenter.gate.check_room(Lane.ENCODE, current_tenant())
            return await handle(request)

        return with_room


async def tenant_of(  # not for a thread: going there and back takes longer than all else of a request's parameters
    _: Annotated[
        str | None, Header(alias="authorization", description="`Bearer <key>`, where the server asks for keys.")
    ] = None,
) -> str:
    """Return the caller's tenant, whom the route has found."""
    return current_tenant()


Tenant = Annotated[str, Depends(tenant_of)]
