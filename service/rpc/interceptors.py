"""Who calls, before the message is read; what is refused before that; and what is told of each call."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message

from service.admission.contract import Lane
from service.auth import Authoriser
from service.call import Call, note_tenant
from service.errors import (
    DeadlineExceededError,
    DrainingError,
    InvalidPromptError,
    SegmentError,
    UnauthenticatedError,
)
from service.gate import Gate
from service.logs import log_failure
from service.metrics import CANCELLED, OK
from service.observer import Observer
from service.rpc.deadline import deadline_of
from service.rpc.receipt import Receipt
from service.rpc.statuses import REQUEST_ID, status_from_error
from service.rpc.strangers import Strangers
from service.rpc.wire import message_from_bytes
from service.status import STATUS, status_of

log = logging.getLogger(__name__)

SERVICE_PREFIX = "/sam.v1."
CANCELLED_IN_S = 0.05  # after its message ended, a call whose client left
# Of the methods whose messages are large, where their work is: known, and refused, before the message is read.
LANES = {"EmbedImage": Lane.ENCODE, "SegmentEverything": Lane.ENCODE, "Segment": None}


def _values_of(name: str, details: grpc.HandlerCallDetails) -> list[str]:
    """Return all values of a name in a call's metadata."""
    return [value for each, value in details.invocation_metadata or () if each == name and isinstance(value, str)]


def _outcome_of_cancelled(context: grpc.aio.ServicerContext) -> tuple[str, grpc.StatusCode]:
    """Return what became of a call that gRPC cancels: its client left, or its deadline has passed."""
    left_s = context.time_remaining()
    if left_s is None or left_s > 0:
        return CANCELLED, grpc.StatusCode.CANCELLED
    status = STATUS[DeadlineExceededError]
    return status.reason, status.grpc


class RequestObserver(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc has no types
    """Finds out who calls, turns errors into statuses, and tells of each call by method and outcome.

    `under_way` are the tasks of requests that are worked on; `answering` those and the ones whose answers are not taken
    yet: gRPC ends each task when its answer is written.
    """

    def __init__(self, authoriser: Authoriser, observer: Observer, gate: Gate, max_message_bytes: int) -> None:
        self._authoriser = authoriser
        self._observer = observer
        self._gate = gate
        self.under_way: set[asyncio.Task[Any] | None] = set()
        self.answering: set[asyncio.Task[Any] | None] = set()
        self._receipt = Receipt(gate.permits.body, max_message_bytes, gate.max_deadline_s)
        self._strangers = Strangers(max_message_bytes, gate.max_deadline_s)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        """Wrap the handler of one of our methods, which take one message each; of others only how messages are read.

        To gRPC all take a stream of messages, of which none is asked for before the handler does.
        """
        handler = await continuation(details)
        if handler is None:
            return None
        if not details.method.startswith(SERVICE_PREFIX):
            return self._strangers.handler(details.method, handler)
        headers = {name: value for name, value in details.invocation_metadata or () if isinstance(value, str)}
        call, route = self._observer.begin("grpc", headers), details.method.rpartition("/")[2]
        try:
            note_tenant(self._authoriser.tenant_of(*_values_of("authorization", details)))
            self._gate.check_open()
        except (UnauthenticatedError, DrainingError) as error:
            return grpc.stream_unary_rpc_method_handler(self._refused(call, route, error))
        self._note_task()
        wrap = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return wrap(
            self._observed(call, route, handler),
            response_serializer=handler.response_serializer,
        )

    def _note_task(self) -> None:
        task = asyncio.current_task()
        if task is not None:
            for tasks in (self.under_way, self.answering):
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    def _note_answer(self, answer: Message, tenant: str) -> None:
        """Count an answer towards its tenant's until it is written: gRPC waits for clients as long as they like."""
        task = asyncio.current_task()
        if task is not None:
            taken = self._gate.permits.answer(answer.ByteSize(), tenant)
            task.add_done_callback(lambda _: taken())

    def _observed(
        self, call: Call, route: str, handler: grpc.RpcMethodHandler
    ) -> Callable[[object, grpc.aio.ServicerContext], Awaitable[Message | None]]:
        """Return the handler, observed; one that streams writes its messages itself and returns none."""
        handle = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def observed(_: object, context: grpc.aio.ServicerContext) -> Message | None:
            async with self._telling(call, route, context), self._gate.within(deadline_of(context)):
                if route in LANES:
                    self._gate.check_room(LANES[route], call.tenant)
                data = await self._receipt.message(context, call.tenant)
                if data is None:
                    await asyncio.sleep(CANCELLED_IN_S)
                    raise InvalidPromptError("the call has no message", field="body")
                with self._gate.permits.body() as grow_body_to:
                    grow_body_to(len(data), call.tenant)
                    request = message_from_bytes(data, handler.request_deserializer)
                    answer: Message | None = await handle(request, context)
                if answer is not None:
                    self._note_answer(answer, call.tenant)
                return answer

        return observed

    def _refused(
        self, call: Call, route: str, error: SegmentError
    ) -> Callable[[Any, grpc.aio.ServicerContext], Awaitable[None]]:
        """Return a handler that answers at once: one for a stream of messages, which it does not wait for, nor read."""

        async def refused(_: object, context: grpc.aio.ServicerContext) -> None:
            async with self._telling(call, route, context):
                raise error

        return refused

    @asynccontextmanager
    async def _telling(self, call: Call, route: str, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        """Answer with the status of what the block raises; tell how it ended, the caller of its request id too."""
        outcome, code = OK, grpc.StatusCode.OK
        context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        try:
            yield
            return  # noqa: TRY300 - what is below is for failures
        except asyncio.CancelledError:
            outcome, code = _outcome_of_cancelled(context)
            raise
        except Exception as error:  # noqa: BLE001 - the one place of this transport where errors end
            status = status_of(error)
            outcome, code = status.reason, status.grpc
            log_failure(log, error)
            failure = status_from_error(error)
        finally:
            self.under_way.discard(asyncio.current_task())
            self._observer.end(call, route, outcome, code.name)
        await context.abort_with_status(failure)
