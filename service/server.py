"""Composition root: builds the core, starts HTTP, gRPC and metrics, keeps probing the model, and drains on a signal."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    start_http_server,
)

from service.cache.embeddings import EmbeddingCache
from service.errors import SegmentError, StartError
from service.image import ImageLimits, trust_own_limits
from service.metrics import Metrics
from service.permits import Permits
from service.rest.app import create_app
from service.rpc.server import RpcServer
from service.segmenter import Segmenter
from service.settings import Settings
from service.triton import TritonBackend
from service.triton_process import TritonProcess

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 10.0
PROBE_EVERY_S = 2.0
PROBE_EVERY_UNREADY_S = 0.2


class _HttpServer(uvicorn.Server):
    """Uvicorn without its signal handlers: signals are ours, for both servers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture nothing."""
        yield


async def serve(settings: Settings, *, embedded: bool, on_ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `on_ready` is called once, when the first canary came through.

    Raises:
        StartError: a port is taken, or (embedded) the local Triton does not start or ends by itself.
    """
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    trust_own_limits()
    registry = _registry()
    metrics = Metrics(registry)
    async with AsyncExitStack() as stack:
        http_socket = stack.enter_context(_listening(settings.host, settings.http_port))
        stack.enter_context(_serving_metrics(settings.host, settings.metrics_port, registry))
        triton = await stack.enter_async_context(_local_triton(settings)) if embedded else None
        backend = await stack.enter_async_context(_connected(settings.triton_url))
        segmenter = _segmenter(settings, backend, metrics)
        rpc = RpcServer(segmenter, metrics, settings.host, settings.grpc_port)
        http = _http_server(create_app(segmenter, metrics), settings.drain_s)
        await stack.enter_async_context(_serving_requests(segmenter, http, http_socket, rpc, settings.drain_s))
        await stack.enter_async_context(_in_background(_keep_probing(segmenter, rpc, on_ready)))
        await _until_stopped(stop, triton)


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
        registry.register(collector)
    return registry


def _segmenter(settings: Settings, backend: TritonBackend, metrics: Metrics) -> Segmenter:
    cache = EmbeddingCache(settings.cache_bytes)
    metrics.watch_cache(cache)
    return Segmenter(
        backend=backend,
        cache=cache,
        permits=Permits(settings.max_concurrency),
        limits=ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
        max_deadline_s=settings.default_deadline_s,
        on_done=metrics.observe,
    )


def _http_server(app: FastAPI, drain_s: float) -> _HttpServer:
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(drain_s)),
    )
    return _HttpServer(config)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise StartError(f"HTTP cannot listen on {host}:{port}; set SAM_HTTP_PORT to a free port") from error
        yield listener


@contextmanager
def _serving_metrics(host: str, port: int, registry: CollectorRegistry) -> Iterator[None]:
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise StartError(f"metrics cannot listen on {host}:{port}; set SAM_METRICS_PORT to a free port") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@asynccontextmanager
async def _local_triton(settings: Settings) -> AsyncIterator[TritonProcess]:
    triton = TritonProcess(Path(settings.model_repository), settings.triton_url, settings.triton_metrics_port)
    try:
        await triton.start()
        yield triton
    finally:
        await triton.stop()


@asynccontextmanager
async def _connected(triton_url: str) -> AsyncIterator[TritonBackend]:
    backend = TritonBackend(triton_url)
    try:
        yield backend
    finally:
        await backend.close()


@asynccontextmanager
async def _serving_requests(
    segmenter: Segmenter, http: _HttpServer, http_socket: socket.socket, rpc: RpcServer, drain_s: float
) -> AsyncIterator[None]:
    """Serve HTTP and gRPC during the block; then take no new work and let what is under way finish."""
    serving = asyncio.create_task(http.serve(sockets=[http_socket]))
    await rpc.start()
    try:
        yield
    finally:
        log.info("server.draining")
        segmenter.draining = True
        await rpc.set_ready(ready=False)
        http.should_exit = True
        await asyncio.gather(rpc.stop(drain_s), serving)


@asynccontextmanager
async def _in_background(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _keep_probing(segmenter: Segmenter, rpc: RpcServer, on_ready: Callable[[], None]) -> None:
    """Send canaries for ever; tell health checks and the log when readiness changes."""
    was_ready, announced = False, False
    log.info("model.awaited")
    while True:
        try:
            await segmenter.probe(PROBE_TIMEOUT_S)
        except SegmentError as error:
            if was_ready:
                log.warning("model.unready %s cause=%s", error.message, error.__cause__)
        if segmenter.ready != was_ready:
            was_ready = segmenter.ready
            await rpc.set_ready(ready=was_ready)
        if was_ready and not announced:
            announced = True
            log.info("model.ready %s", segmenter.model.identity)
            on_ready()
        await asyncio.sleep(PROBE_EVERY_S if was_ready else PROBE_EVERY_UNREADY_S)


async def _until_stopped(stop: asyncio.Event, triton: TritonProcess | None) -> None:
    """Return on a signal.

    Raises:
        StartError: the local Triton ended by itself.
    """
    stopping = asyncio.create_task(stop.wait())
    ending = asyncio.create_task(triton.wait()) if triton else None
    try:
        await asyncio.wait({stopping, ending} if ending else {stopping}, return_when=asyncio.FIRST_COMPLETED)
        if ending and ending.done() and not stop.is_set():
            raise StartError(f"the local Triton ended with exit code {ending.result()}; its own words are above")
    finally:
        for task in (stopping, ending):
            if task:
                task.cancel()
