"""Who calls, before the message is read; errors to gRPC statuses, by the table; and what is told of each call."""

import asyncio
import inspect
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest

from service.admission.permits import Permits
from service.auth import Authoriser
from service.call import Call, current_request_id, note_tenant
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
from service.rpc.receipt import Receipt
from service.rpc.wire import message_from_bytes
from service.status import STATUS, message_of, retry_after_s_of, status_of

log = logging.getLogger(__name__)

DOMAIN = "sam"
SERVICE_PREFIX = "/sam.v1."
REQUEST_ID = "x-request-id"
CANCELLED_IN_S = 0.05  # after its message ended, a call whose client left
STRANGERS_MESSAGES = 4  # of the largest, that health checks and reflection, which take tiny ones, may hold


class _Status(grpc.Status):  # type: ignore[misc] # grpc has no types
    """What `ServicerContext.abort_with_status` takes."""

    def __init__(
        self, code: grpc.StatusCode, details: str, trailing_metadata: tuple[tuple[str, str | bytes], ...]
    ) -> None:
        self.code = code
        self.details = details
        self.trailing_metadata = trailing_metadata


def status_from_error(error: BaseException) -> grpc.Status:
    """Return the gRPC status for `error`: code and sentence, ErrorInfo with the reason, RetryInfo and pushback."""
    status, message = status_of(error), message_of(error, current_request_id())
    field = error.field if isinstance(error, SegmentError) else ""
    info = error_details_pb2.ErrorInfo(reason=status.reason, domain=DOMAIN, metadata={"field": field} if field else {})
    rich = status_pb2.Status(code=status.grpc.value[0], message=message)
    rich.details.add().Pack(info)
    trailers: list[tuple[str, str | bytes]] = [(REQUEST_ID, current_request_id())]
    retry_after_s = retry_after_s_of(error)
    if retry_after_s is not None:
        wait_ms = math.ceil(1000 * retry_after_s)
        delay = Duration(seconds=wait_ms // 1000, nanos=wait_ms % 1000 * 1_000_000)
        rich.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        trailers.append(("grpc-retry-pushback-ms", str(wait_ms)))
    trailers.append(("grpc-status-details-bin", rich.SerializeToString()))
    return _Status(status.grpc, message, tuple(trailers))


def _nothing(method: str) -> Message:
    """Return a question about nothing there is, of health checks or reflection."""
    question: Message = ServerReflectionRequest()
    if method.startswith("/grpc.health."):
        question = HealthCheckRequest(service="(unreadable)")
    return question


def _outcome_of_cancelled(context: grpc.aio.ServicerContext) -> tuple[str, grpc.StatusCode]:
    """Return what became of a call that gRPC cancels: its client left, or its deadline has passed."""
    left_s = context.time_remaining()
    if left_s is None or left_s > 0:
        return CANCELLED, grpc.StatusCode.CANCELLED
    status = STATUS[DeadlineExceededError]
    return status.reason, status.grpc


class RequestObserver(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc has no types
    """Finds out who calls, turns errors into statuses, and tells of each call by method and outcome.

    `under_way` are the tasks of requests: gRPC ends each when its answer is written.
    """

    def __init__(self, authoriser: Authoriser, observer: Observer, gate: Gate, max_message_bytes: int) -> None:
        self._authoriser = authoriser
        self._observer = observer
        self._gate = gate
        self.under_way: set[asyncio.Task[Any]] = set()
        self._receipt = Receipt(gate.permits.body, max_message_bytes, gate.max_deadline_s)
        strangers = Permits(1, max_bytes=STRANGERS_MESSAGES * max_message_bytes)
        self._strangers_receipt = Receipt(strangers.body, max_message_bytes, gate.max_deadline_s)

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
            return self._for_strangers(details.method, handler)
        self._note_task()
        headers = {name: value for name, value in details.invocation_metadata or () if isinstance(value, str)}
        call, route = self._observer.begin("grpc", headers), details.method.rpartition("/")[2]
        try:
            note_tenant(self._authoriser.tenant_of(headers.get("authorization")))
            self._gate.check_open()
        except (UnauthenticatedError, DrainingError) as error:
            return grpc.stream_unary_rpc_method_handler(self._refused(call, route, error))
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
            self.under_way.add(task)
            task.add_done_callback(self.under_way.discard)

    def _observed(
        self, call: Call, route: str, handler: grpc.RpcMethodHandler
    ) -> Callable[[object, grpc.aio.ServicerContext], Awaitable[Message | None]]:
        """Return the handler, observed; one that streams writes its messages itself and returns none."""
        handle = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def observed(_: object, context: grpc.aio.ServicerContext) -> Message | None:
            async with self._telling(call, route, context):
                data = await self._receipt.message(context, call.tenant)
                if data is None:
                    await asyncio.sleep(CANCELLED_IN_S)
                    raise InvalidPromptError("the call has no message", field="body")
                with self._gate.permits.body() as grow_body_to:
                    grow_body_to(len(data), call.tenant)
                    request = message_from_bytes(data, handler.request_deserializer)
                    answer: Message | None = await handle(request, context)
                return answer

        return observed

    def _for_strangers(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        """Return the handler of a method that asks for no key, with its messages received as ours are.

        What cannot be read is taken for a question about nothing there is. gRPC itself would answer with the
        exception's class and text, and leave a traceback in the log.
        """
        nothing = _nothing(method)
        handle = handler.unary_unary or handler.unary_stream or handler.stream_stream  # the kinds that there are

        async def message(context: grpc.aio.ServicerContext) -> Message | None:
            data = await self._strangers_receipt.message(context)
            try:
                return None if data is None else handler.request_deserializer(data)
            except DecodeError:
                return nothing

        async def messages(context: grpc.aio.ServicerContext) -> AsyncIterator[Message]:
            while (each := await message(context)) is not None:
                yield each

        async def answered(_: object, context: grpc.aio.ServicerContext) -> None:
            try:
                asked = messages(context) if handler.request_streaming else await message(context) or nothing
                answers = handle(asked, context)
                if inspect.isasyncgen(answers):
                    async for answer in answers:
                        await context.write(answer)
                elif (answer := await answers) is not None:
                    await context.write(answer)
            except SegmentError as error:
                await context.abort_with_status(status_from_error(error))

        return grpc.stream_stream_rpc_method_handler(answered, response_serializer=handler.response_serializer)

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
            self._observer.end(call, route, outcome, code.name)
        await context.abort_with_status(failure)
