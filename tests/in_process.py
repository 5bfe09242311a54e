"""Both transports in this process, around one core whose model is a `FakeBackend`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service.admission.permits import Permits
from service.admission.rates import Rates
from service.auth import Authoriser
from service.cache.embeddings import EmbeddingCache
from service.cache.index import Limits
from service.image import ImageLimits
from service.metrics import Metrics
from service.observer import Observer
from service.rest.app import create_app
from service.rpc.server import RpcServer
from service.segmenter import Segmenter
from tests.arenas import arena_name
from tests.fakes import DecoderInProcess, FakeBackend
from tests.running import free_ports


@dataclass(frozen=True)
class Servers:
    """Both transports of one core: HTTP as an application, gRPC on a port."""

    segmenter: Segmenter
    app: FastAPI
    rpc: RpcServer
    grpc_address: str


@asynccontextmanager
async def serving(
    backend: FakeBackend, authoriser: Authoriser, rates: Rates | None = None
) -> AsyncIterator[tuple[FastAPI, grpc.aio.Channel]]:
    """Serve for the block, ready; give the HTTP application, and a channel to the gRPC server."""
    async with (
        running(backend, authoriser, rates) as servers,
        grpc.aio.insecure_channel(servers.grpc_address) as channel,
    ):
        yield servers.app, channel


@asynccontextmanager
async def running(
    backend: FakeBackend, authoriser: Authoriser, rates: Rates | None = None, permits: Permits | None = None
) -> AsyncIterator[Servers]:
    """Serve for the block, ready."""
    metrics = Metrics(CollectorRegistry())
    observer = Observer(metrics)
    with arena_name() as name:
        cache = EmbeddingCache(name=name, max_bytes=1_000_000, limits=Limits(60, 0), observer=metrics)
        segmenter = Segmenter(
            backend=backend,
            cache=cache,
            decoder=DecoderInProcess(),
            permits=permits or Permits(1),
            rates=rates,
            limits=ImageLimits(1_000_000, 1_000_000),
            max_deadline_s=5,
            secret=b"",
            on_done=observer.answered,
            observer=metrics,
        )
        await segmenter.probe(1)
        (port,) = free_ports(1)
        server = RpcServer(segmenter, authoriser, observer, host="127.0.0.1", port=port)
        await server.start()
        try:
            app = create_app(segmenter, authoriser, observer)
            yield Servers(segmenter, app, server, f"127.0.0.1:{port}")
        finally:
            await server.stop(0)
            cache.close()
