"""The health protocol's servicer, over a real channel."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from service.rpc.health import HealthServicer

NOT_SERVING, SERVING = HealthCheckResponse.NOT_SERVING, HealthCheckResponse.SERVING
KNOWN = HealthCheckRequest(service="known")
Result = TypeVar("Result")


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 30))


@asynccontextmanager
async def served(max_watchers: int = 10) -> AsyncIterator[tuple[HealthServicer, health_pb2_grpc.HealthStub]]:
    health, server = HealthServicer({"", "known"}, max_watchers), grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield health, health_pb2_grpc.HealthStub(channel)
    finally:
        await server.stop(0)


async def refusal_of(call: grpc.aio.Call) -> tuple[grpc.StatusCode, str]:
    """Return the code and the reason with which a watch ended."""
    trailers, info = dict(await call.trailing_metadata()), error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details[0].Unpack(info)
    return await call.code(), info.reason


@pytest.mark.parametrize("name", ["", "known"])
def test_a_check_says_how_a_service_is(name: str) -> None:
    async def work() -> list[int]:
        async with served() as (health, stub):
            answers = []
            for ready in (None, True, False):
                if ready is not None:
                    health.set_ready(ready=ready)
                answers.append((await stub.Check(HealthCheckRequest(service=name))).status)
            return answers

    assert run(work()) == [NOT_SERVING, SERVING, NOT_SERVING]


def test_a_check_of_an_unknown_service_finds_none() -> None:
    async def work() -> grpc.StatusCode:
        async with served() as (_, stub):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Check(HealthCheckRequest(service="unknown"))
            return caught.value.code()

    assert run(work()) is grpc.StatusCode.NOT_FOUND


def test_a_watcher_of_an_unknown_service_is_told_so_once_and_stays() -> None:
    async def work() -> None:
        async with served() as (health, stub):
            call = stub.Watch(HealthCheckRequest(service="unknown"))
            assert (await call.read()).status == HealthCheckResponse.SERVICE_UNKNOWN
            following = asyncio.create_task(call.read())
            health.set_ready(ready=True)
            await asyncio.wait([following], timeout=0.3)
            assert not following.done()
            health.drain()
            with pytest.raises(grpc.aio.AioRpcError):
                await following
            assert await refusal_of(call) == (grpc.StatusCode.UNAVAILABLE, "draining")

    run(work())


def test_watchers_hear_every_change_whoever_leaves_and_comes() -> None:
    async def work() -> list[int]:
        async with served() as (health, stub):
            stays, leaves = stub.Watch(KNOWN), stub.Watch(KNOWN)
            heard = [(await stays.read()).status]
            await leaves.read()
            leaves.cancel()
            await asyncio.sleep(0.2)
            for ready in (True, False):
                health.set_ready(ready=ready)
                heard.append((await stays.read()).status)
                assert (await stub.Watch(KNOWN).read()).status == heard[-1]
            return heard

    assert run(work()) == [NOT_SERVING, SERVING, NOT_SERVING]


def test_a_watch_ends_with_the_server_after_the_last_word() -> None:
    async def work() -> None:
        async with served() as (health, stub):
            health.set_ready(ready=True)
            call = stub.Watch(KNOWN)
            assert (await call.read()).status == SERVING
            health.drain()
            assert (await call.read()).status == NOT_SERVING
            assert await refusal_of(call) == (grpc.StatusCode.UNAVAILABLE, "draining")
            late = stub.Watch(KNOWN)
            assert (await late.read()).status == NOT_SERVING
            assert await refusal_of(late) == (grpc.StatusCode.UNAVAILABLE, "draining")

    run(work())


def test_one_watcher_too_many_is_refused_with_a_reason_until_another_leaves() -> None:
    async def work() -> None:
        async with served(max_watchers=1) as (_, stub):
            first = stub.Watch(KNOWN)
            await first.read()
            assert await refusal_of(stub.Watch(KNOWN)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded")
            first.cancel()
            await asyncio.sleep(0.2)
            assert (await stub.Watch(KNOWN).read()).status == NOT_SERVING

    run(work())
