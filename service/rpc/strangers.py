"""Methods that ask for no key, health checks and reflection: what they are sent is bounded, and read with care."""

import inspect
from collections.abc import AsyncIterator

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest

from service.admission.permits import Permits
from service.errors import SegmentError
from service.rpc.receipt import Receipt
from service.rpc.statuses import status_from_error

MAX_QUESTION_BYTES = 64 * 1024  # reflection's answers hold all of their questions
MESSAGES_AT_ONCE = 4  # of the largest that C-core takes, of all strangers together


class Strangers:
    """Makes handlers that receive messages as those of our own methods do, out of room of their own.

    Args:
        max_message_bytes: What C-core takes at most.
        max_s: How long a message may take.
    """

    def __init__(self, max_message_bytes: int, max_s: float) -> None:
        permits = Permits(1, max_bytes=MESSAGES_AT_ONCE * max_message_bytes)
        self._receipt = Receipt(permits.body, max_message_bytes, max_s)

    def handler(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        """Return the handler of a method, to gRPC one that takes and gives a stream of messages."""
        handle = handler.unary_unary or handler.unary_stream or handler.stream_stream  # the kinds that there are

        async def messages(context: grpc.aio.ServicerContext) -> AsyncIterator[Message]:
            while (each := await self._question(method, handler, context)) is not None:
                yield each

        async def answered(_: object, context: grpc.aio.ServicerContext) -> None:
            try:
                if handler.request_streaming:
                    answers = handle(messages(context), context)
                else:
                    answers = handle(await self._question(method, handler, context) or _nothing(method), context)
                if inspect.isasyncgen(answers):
                    async for answer in answers:
                        await context.write(answer)
                elif (answer := await answers) is not None:
                    await context.write(answer)
            except SegmentError as error:
                await context.abort_with_status(status_from_error(error))

        return grpc.stream_stream_rpc_method_handler(answered, response_serializer=handler.response_serializer)

    async def _question(
        self, method: str, handler: grpc.RpcMethodHandler, context: grpc.aio.ServicerContext
    ) -> Message | None:
        """Return the next message, None at the end.

        What is too long or cannot be read is taken for a question about nothing there is. gRPC itself would answer the
        latter with the exception's class and text, and leave a traceback in the log.
        """
        data = await self._receipt.message(context)
        if data is None:
            return None
        if len(data) > MAX_QUESTION_BYTES:
            return _nothing(method)
        try:
            question: Message = handler.request_deserializer(data)
        except DecodeError:
            return _nothing(method)
        return question


def _nothing(method: str) -> Message:
    """Return a question about nothing there is, of health checks or reflection."""
    question: Message = ServerReflectionRequest()
    if method.startswith("/grpc.health."):
        question = HealthCheckRequest(service="(unreadable)")
    return question
