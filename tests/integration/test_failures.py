"""Failures that no request alone can provoke, injected for real, told alike over both transports."""

import asyncio
import concurrent.futures
import os
import signal
import time

import grpc
import httpx
import pytest
from prometheus_client import CollectorRegistry

from service.admission.permits import Permits
from service.auth import Authoriser
from service.cache.embeddings import EmbeddingCache
from service.cache.index import Limits
from service.image import ImageLimits
from service.metrics import Metrics
from service.rest.app import create_app
from service.rpc.pb import segment_anything_pb2 as pb
from service.rpc.pb import segment_anything_pb2_grpc as pb_grpc
from service.rpc.server import RpcServer
from service.segmenter import Segmenter
from tests.arenas import arena_name
from tests.conformance.callers import Failure, GrpcCaller, RestCaller
from tests.fakes import FakeBackend
from tests.running import RunningService, free_ports

CLICK = {"prompts": [{"points": [[1, 1, 1]]}]}


def test_a_frozen_triton_costs_deadlines_then_refusals_and_recovers_by_itself(cat: bytes) -> None:
    """Each request ends at its deadline; beyond the waiting room it is refused at once."""
    with RunningService.start(
        SAM_WORKERS="1", SAM_MAX_CONCURRENCY="1", SAM_MAX_WAIT_S="5", SAM_LOG_LEVEL="error"
    ) as service:
        callers = [RestCaller(service.url), GrpcCaller(service.grpc_address)]
        callers[0].embed("cat", cat)
        os.kill(service.triton_pid(), signal.SIGSTOP)
        try:
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                late = [pool.submit(caller.embed, "late", cat + bytes(n), 3.0) for n, caller in enumerate(callers)]
                time.sleep(0.5)
                for probing in (RestCaller(service.url), GrpcCaller(service.grpc_address)):
                    refused = probing.embed("one-more", cat)
                    probing.close()
                    assert isinstance(refused, Failure)
                    assert (refused.reason, refused.retry) == ("overloaded", True)
            assert [future.result().reason for future in late] == ["deadline_exceeded"] * 2
        finally:
            os.kill(service.triton_pid(), signal.SIGCONT)
        for caller in callers:
            assert not isinstance(caller.segment("cat", CLICK), Failure)
            caller.close()


def test_without_triton_the_gateway_lives_is_not_ready_and_says_why() -> None:
    with RunningService.launch(embedded=False, SAM_LOG_LEVEL="error") as service:
        service.wait_for("/healthz", 200)
        assert httpx.get(f"{service.url}/readyz").json() == {"status": "model_unavailable"}
        for caller in (RestCaller(service.url), GrpcCaller(service.grpc_address)):
            failure = caller.embed("a", b"any")
            caller.close()
            assert isinstance(failure, Failure)
            assert (failure.reason, failure.retry) == ("model_unavailable", True)


def test_an_unknown_error_tells_clients_nothing_over_either_transport(
    cat: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with arena_name() as name:
        http, rpc = asyncio.run(_embed_with_a_broken_backend(cat, name))
    assert (http.status_code, http.json()["reason"]) == (500, "internal")
    assert rpc.code() is grpc.StatusCode.INTERNAL
    assert rpc.details() == http.json()["detail"]
    assert "secret" not in http.text + rpc.details() + str(rpc.trailing_metadata())
    assert "secret" in caplog.text


async def _embed_with_a_broken_backend(photo: bytes, name: str) -> tuple[httpx.Response, grpc.aio.AioRpcError]:
    backend, metrics = FakeBackend(), Metrics(CollectorRegistry())
    segmenter = Segmenter(
        backend=backend,
        cache=EmbeddingCache(name=name, max_bytes=1_000_000, limits=Limits(60, 0), observer=metrics),
        permits=Permits(1),
        limits=ImageLimits(1_000_000, 1_000_000),
        max_deadline_s=5,
        secret=b"",
        on_done=metrics.observe,
    )
    await segmenter.probe(1)
    backend.error = RuntimeError("secret /etc/path")  # type: ignore[assignment] # what no backend may raise
    (port,) = free_ports(1)
    server = RpcServer(segmenter, Authoriser({}), metrics, host="127.0.0.1", port=port)
    await server.start()
    try:
        transport = httpx.ASGITransport(create_app(segmenter, Authoriser({}), metrics), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            http = await client.put("/v1/images/a", content=photo)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await pb_grpc.SegmentAnythingStub(channel).EmbedImage(pb.EmbedImageRequest(image_id="a", image=photo))
    finally:
        await server.stop(0)
    return http, caught.value
