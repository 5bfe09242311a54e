"""`grpc.health.v1.Health`: whether prompts can be answered, for who asks once and for who watches.

The protocol: https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

import asyncio
from collections.abc import Collection

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from service.errors import DrainingError, OverloadedError
from service.rpc.statuses import status_from_error

MAX_WATCHERS = 1000  # nobody needs a key to be one, and all are told of a change at once


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # grpc_health has no types
    """One answer for all `services`: NOT_SERVING until `set_ready` says otherwise.

    No watcher waits for another, and nobody for a watcher: one that does not read is told when it does, or never.
    """

    def __init__(self, services: Collection[str], max_watchers: int = MAX_WATCHERS) -> None:
        self._services = frozenset(services)
        self._max_watchers = max_watchers
        self._watchers = 0
        self._status = HealthCheckResponse.NOT_SERVING
        self._is_draining = False
        self._changed = asyncio.Event()

    def set_ready(self, *, ready: bool) -> None:
        """Answer so from now on; watchers are told."""
        self._status = HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def drain(self) -> None:
        """Answer NOT_SERVING from now on, and end each watch after that."""
        self._is_draining = True
        self.set_ready(ready=False)

    async def Check(self, request: HealthCheckRequest, context: grpc.aio.ServicerContext) -> HealthCheckResponse:
        """Return how a service is."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service is served here")
        return HealthCheckResponse(status=self._status)

    async def Watch(self, request: HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        """Write how a service is, and then every change of it, until the server drains."""
        if self._watchers == self._max_watchers:
            error = OverloadedError("too many watch the health of this server; check it instead, or come back later")
            await context.abort_with_status(status_from_error(error))
        self._watchers += 1
        try:
            await self._tell(request.service, context)
        except grpc.aio.InternalError as error:
            raise asyncio.CancelledError from error  # the client left while it was written to
        finally:
            self._watchers -= 1

    async def _tell(self, service: str, context: grpc.aio.ServicerContext) -> None:
        told = None
        while True:
            changed = self._changed
            status = self._status if service in self._services else HealthCheckResponse.SERVICE_UNKNOWN
            if status != told:
                await context.write(HealthCheckResponse(status=status))
                told = status
            elif self._is_draining:
                error = DrainingError("the server is shutting down; watch another, or this one again in a moment")
                await context.abort_with_status(status_from_error(error))
            else:
                await changed.wait()
