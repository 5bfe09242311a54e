"""How gRPC calls begin and end, over a real channel: refused unread, held to a deadline, left by their clients."""

import asyncio
import io
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2
from PIL import Image

from service.admission.permits import Permits
from service.admission.rates import Rates
from service.auth import ANONYMOUS, Authoriser
from service.rpc import server as server_module
from service.rpc.pb import segment_anything_pb2 as pb
from tests.fakes import FakeBackend
from tests.in_process import running, serving
from tests.raw_http2 import call, connection, message

Result = TypeVar("Result")
METHOD = "/sam.v1.SegmentAnything/"
OPEN = Authoriser({})


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 60))


def photograph() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("method", ["EmbedImage", "Segment", "SegmentEverything"])
def test_who_asks_too_often_is_refused_unread(method: str) -> None:
    """The message never comes."""
    rates = Rates([ANONYMOUS], rate=0.01, burst=1)
    rates.take(ANONYMOUS)

    async def work() -> tuple[grpc.StatusCode, str]:
        async with serving(FakeBackend(), OPEN, rates) as (_, channel):
            asked = channel.stream_stream(METHOD + method)(timeout=10)
            return await asked.code(), await asked.details()

    code, details = run(work())
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "requests per second" in details


def test_a_question_of_a_stranger_that_is_too_long_is_no_question_and_not_repeated() -> None:
    """Reflection's answers hold their questions: of any length, for clients that need no key and read nothing."""

    async def work() -> reflection_pb2.ServerReflectionResponse:
        async with serving(FakeBackend(), OPEN) as (_, channel):
            ask = channel.stream_stream(
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            asked = ask(iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol="x" * 100_000)]))
            return await anext(aiter(asked))

    answer = run(work())
    assert answer.ByteSize() < 1_000
    assert answer.HasField("error_response")


def large_answer() -> bytes:
    """Return a request for an answer that is larger than what flow control lets go unread."""
    prompts = [pb.Prompt(points=[pb.Point(x=30, y=30, label=1)])] * 256
    return pb.SegmentRequest(image_id="a", prompts=prompts, include_logits=True, multimask=True).SerializeToString()


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - a set, which tells nobody
        await asyncio.sleep(0.02)


async def outcome_of_a_click(channel: grpc.aio.Channel) -> str:
    click = pb.SegmentRequest(image_id="a", prompts=[pb.Prompt(points=[pb.Point(x=30, y=30, label=1)])])
    try:
        await channel.unary_unary(METHOD + "Segment")(click.SerializeToString(), timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def test_answers_that_are_not_taken_leave_a_tenant_no_further_ones() -> None:
    """Until they are: a client that asks and does not read costs a worker what its requests may hold, and no more."""

    async def work() -> list[str]:
        permits = Permits(8, max_bytes=300_000)
        async with (
            running(FakeBackend(), OPEN, permits=permits) as servers,
            grpc.aio.insecure_channel(servers.grpc_address) as channel,
        ):
            requests = servers.rpc.requests
            embed = channel.unary_unary(METHOD + "EmbedImage")
            await embed(pb.EmbedImageRequest(image_id="a", image=photograph()).SerializeToString())
            await until(lambda: not requests.answering)
            with connection(servers.grpc_address) as unread:
                unread.sendall(call(1, METHOD.encode() + b"Segment") + message(1, large_answer()))
                await until(lambda: bool(requests.answering) and not requests.under_way)
                outcomes = [await outcome_of_a_click(channel)]
            await until(lambda: not requests.answering)
            return [*outcomes, await outcome_of_a_click(channel)]

    assert run(work()) == ["RESOURCE_EXHAUSTED", "OK"]


def test_a_client_that_does_not_take_its_answer_does_not_hold_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "TAKE_S", 0.5)

    async def work() -> float:
        async with running(FakeBackend(), OPEN) as servers:
            async with grpc.aio.insecure_channel(servers.grpc_address) as channel:
                embed = channel.unary_unary(METHOD + "EmbedImage")
                await embed(pb.EmbedImageRequest(image_id="a", image=photograph()).SerializeToString())
            with connection(servers.grpc_address) as unread:
                unread.sendall(call(1, METHOD.encode() + b"Segment") + message(1, large_answer()))
                await asyncio.sleep(0.5)  # long enough for the answer to be made
                began_s = time.monotonic()
                await servers.rpc.stop(60)
                return time.monotonic() - began_s

    assert 0.5 <= run(work()) < 10
