"""Failures that no request alone can provoke, injected for real, told alike over both transports."""

import asyncio
import concurrent.futures
import os
import signal
import time

import grpc
import httpx
import pytest

from service.auth import Authoriser
from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from tests import plain_http
from tests.conformance.callers import Failure, GrpcCaller, RestCaller
from tests.fakes import FakeBackend
from tests.in_process import serving
from tests.running import RunningService, free_settings, triton_alone, triton_under

CLICK = {"prompts": [{"points": [[1, 1, 1]]}]}


def test_a_frozen_triton_costs_deadlines_then_refusals_and_recovers_by_itself(cat: bytes) -> None:
    """Each request ends at its deadline; beyond the waiting room it is refused at once. Ours would be started again."""
    small = {"SAM_WORKERS": "1", "SAM_MAX_CONCURRENCY": "1", "SAM_MAX_WAIT_S": "5", "SAM_LOG_LEVEL": "error"}
    settings = free_settings() | small
    with (
        triton_alone(settings["SAM_TRITON_URL"], settings["SAM_TRITON_METRICS_PORT"]) as starter,
        RunningService.start(embedded=False, **settings) as service,
    ):
        triton = triton_under(starter)
        callers = [RestCaller(service.url), GrpcCaller(service.grpc_address)]
        callers[0].embed("cat", cat)
        os.kill(triton, signal.SIGSTOP)
        try:
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                at_work = pool.submit(callers[0].embed, "late", cat, 4.0)
                time.sleep(0.5)
                waiting = pool.submit(callers[1].embed, "later", cat + b"!", 2.0)  # its turn does not come in time
                time.sleep(0.5)
                for probing in (RestCaller(service.url), GrpcCaller(service.grpc_address)):
                    refused = probing.embed("one-more", cat)
                    probing.close()
                    assert isinstance(refused, Failure)
                    assert (refused.reason, refused.retry) == ("overloaded", True)
            assert [each.result().reason for each in (waiting, at_work)] == ["deadline_exceeded"] * 2
        finally:
            os.kill(triton, signal.SIGCONT)
        service.wait_for("/readyz", 200)
        for caller in callers:
            assert not isinstance(caller.segment("cat", CLICK), Failure)
            caller.close()


def test_without_triton_the_gateway_lives_is_not_ready_and_says_why(cat: bytes) -> None:
    with RunningService.launch(embedded=False, SAM_LOG_LEVEL="error") as service:
        service.wait_for("/healthz", 200)
        assert plain_http.get(f"{service.url}/readyz").json() == {"status": "model_unavailable"}
        for caller in (RestCaller(service.url), GrpcCaller(service.grpc_address)):
            failure = caller.embed("a", cat)
            caller.close()
            assert isinstance(failure, Failure)
            assert (failure.reason, failure.retry) == ("model_unavailable", True)


def test_an_unknown_error_tells_clients_nothing_over_either_transport(
    cat: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    http, rpc = asyncio.run(_embed_with_a_broken_backend(cat))
    assert (http.status_code, http.json()["reason"]) == (500, "internal")
    assert rpc.code() is grpc.StatusCode.INTERNAL
    assert rpc.details() == http.json()["detail"]
    assert "request-7" in rpc.details()
    assert "secret" not in http.text + rpc.details() + str(rpc.trailing_metadata())
    assert "secret" in caplog.text


async def _embed_with_a_broken_backend(photo: bytes) -> tuple[httpx.Response, grpc.aio.AioRpcError]:
    backend = FakeBackend()
    async with serving(backend, Authoriser({})) as (app, channel):
        backend.error = RuntimeError("secret /etc/path")  # type: ignore[assignment] # what no backend may raise
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            http = await client.put("/v1/images/a", content=photo, headers={"x-request-id": "request-7"})
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.SegmentAnythingStub(channel).EmbedImage(
                pb.EmbedImageRequest(image_id="a", image=photo), metadata=(("x-request-id", "request-7"),)
            )
    return http, caught.value
