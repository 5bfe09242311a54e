"""Composition root of a worker: builds the core, starts HTTP and gRPC, keeps probing the model, drains on a signal."""

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service.admission.permits import Permits
from service.admission.rates import Rates
from service.auth import Authoriser, parse_api_keys
from service.cache.embeddings import EmbeddingCache
from service.cache.index import Limits
from service.cache.redis import RedisLevel
from service.errors import SegmentError
from service.image import ImageLimits, trust_own_limits
from service.metrics import Metrics
from service.ports import bound_socket
from service.rest.app import create_app
from service.rpc.server import RpcServer
from service.segmenter import Segmenter
from service.settings import Settings
from service.triton import TritonBackend

log = logging.getLogger(__name__)

LATE_WRITE_S = 30.0  # how long after its deadline Triton could still write the embedding of an encode it had begun
MAX_LEASE_S = 5.0
REDIS_TTL_S = 86400.0  # in the second level, when SAM_CACHE_TTL_S sets none: Redis must be able to forget
RENEW_EVERY_S = 2.0
ADAPT_EVERY_S = 0.25
ADAPT_TIMEOUT_S = 1.0
PROBE_TIMEOUT_S = 10.0
FIRST_CANARY_S = 0.5  # how long to wait for it before saying, on open ports, that there is none
PROBE_EVERY_S = 2.0
PROBE_EVERY_UNREADY_S = 0.2


class _HttpServer(uvicorn.Server):
    """Uvicorn without its signal handlers: signals are ours, for both servers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture nothing."""
        yield


async def serve(
    settings: Settings, *, on_ready: Callable[[], None], open_when_ready: bool = False, rates_fd: int | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `on_ready` is called once, when the first canary came through.

    HTTP and gRPC share their ports with other workers; that nobody else has them is the supervisor's business. With
    `open_when_ready` this worker takes no connections before it can answer: others do meanwhile. `rates_fd` is where it
    shares the tenants' rate limits with them.

    Raises:
        StartError: a port is taken, or there is no room for the cache.
    """
    stop, ready = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    trust_own_limits()
    metrics = Metrics(CollectorRegistry())
    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(_connected(settings))
        store = await stack.enter_async_context(_second_level(settings, metrics))
        cache = _cache(settings, metrics, store)
        stack.callback(cache.close)
        authoriser = _authoriser(settings)
        rates = _rates(settings, authoriser, metrics, rates_fd)
        segmenter = _segmenter(settings, backend, cache, metrics, rates)
        rpc = _rpc_server(settings, segmenter, authoriser, metrics)
        http = _http_server(create_app(segmenter, authoriser, metrics), settings.drain_s)
        http_socket = stack.enter_context(
            bound_socket(settings.host, settings.http_port, "HTTP", "SAM_HTTP_PORT", reuse_port=True)
        )
        await stack.enter_async_context(_in_background(_keep_renewing(cache)))
        await stack.enter_async_context(_in_background(_keep_adapting(segmenter)))
        probing = await stack.enter_async_context(_in_background(_keep_probing(segmenter, rpc, ready)))
        await _first_of(stop, ready, failing=probing, timeout_s=None if open_when_ready else FIRST_CANARY_S)
        await stack.enter_async_context(_serving_requests(segmenter, http, http_socket, rpc, settings))
        await _first_of(stop, ready, failing=probing)
        if ready.is_set():
            on_ready()
        await _first_of(stop, failing=probing)


def _rpc_server(settings: Settings, segmenter: Segmenter, authoriser: Authoriser, metrics: Metrics) -> RpcServer:
    return RpcServer(
        segmenter,
        authoriser,
        metrics,
        host=settings.host,
        port=settings.grpc_port,
        connection_age_s=settings.grpc_connection_age_s,
        connection_grace_s=settings.default_deadline_s,
    )


@asynccontextmanager
async def _second_level(settings: Settings, metrics: Metrics) -> AsyncIterator[RedisLevel | None]:
    """Connect to Redis, lazily and whether or not it is there; None when none is configured."""
    url = settings.redis_url.get_secret_value()
    if not url:
        yield None
        return
    secret = settings.cache_secret.get_secret_value().encode()
    level = RedisLevel(url, secret=secret, ttl_s=settings.cache_ttl_s or REDIS_TTL_S, observer=metrics)
    try:
        yield level
    finally:
        await level.close()


def _cache(settings: Settings, metrics: Metrics, store: RedisLevel | None) -> EmbeddingCache:
    limits = Limits(
        claim_s=settings.default_deadline_s + LATE_WRITE_S,
        lease_s=min(settings.default_deadline_s, MAX_LEASE_S),
        ttl_s=settings.cache_ttl_s,
        tenant_share=settings.tenant_cache_share,
    )
    return EmbeddingCache(
        name=settings.arena_name,
        max_bytes=settings.cache_bytes,
        limits=limits,
        observer=metrics,
        store=store,
        workers=settings.workers,
    )


def _rates(settings: Settings, authoriser: Authoriser, metrics: Metrics, rates_fd: int | None) -> Rates:
    return Rates(
        authoriser.tenants,
        rate=settings.tenant_rate,
        burst=settings.tenant_burst,
        buckets_fd=rates_fd,
        observer=metrics,
    )


def _segmenter(
    settings: Settings, backend: TritonBackend, cache: EmbeddingCache, metrics: Metrics, rates: Rates
) -> Segmenter:
    permits = Permits(
        settings.max_concurrency,
        max_wait_s=settings.max_wait_s,
        max_bytes=settings.max_bytes_in_flight,
        observer=metrics,
    )
    return Segmenter(
        backend=backend,
        cache=cache,
        permits=permits,
        rates=rates,
        limits=ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
        max_deadline_s=settings.default_deadline_s,
        secret=settings.cache_secret.get_secret_value().encode(),
        on_done=metrics.observe,
    )


def _authoriser(settings: Settings) -> Authoriser:
    authoriser = Authoriser(parse_api_keys(settings.api_keys.get_secret_value()))
    if authoriser.is_open:
        log.warning("auth.open SAM_API_KEYS is not set: anybody who reaches the ports may call, as one tenant")
    return authoriser


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


@asynccontextmanager
async def _connected(settings: Settings) -> AsyncIterator[TritonBackend]:
    backend = TritonBackend(settings.triton_url, shared_memory=settings.triton_transport == "shm")
    try:
        yield backend
    finally:
        await backend.close()


@asynccontextmanager
async def _serving_requests(
    segmenter: Segmenter, http: _HttpServer, http_socket: socket.socket, rpc: RpcServer, settings: Settings
) -> AsyncIterator[None]:
    """Serve HTTP and gRPC during the block; then retire, take no new work and let what is under way finish."""
    serving = asyncio.create_task(http.serve(sockets=[http_socket]))
    await rpc.start()
    try:
        yield
    finally:
        log.info("server.draining")
        segmenter.retiring = True
        await rpc.set_ready(ready=False)
        await asyncio.sleep(settings.drain_delay_s)
        segmenter.draining = True
        http.should_exit = True
        await asyncio.gather(rpc.stop(settings.drain_s), serving)


@asynccontextmanager
async def _in_background(work: Coroutine[None, None, None]) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _keep_probing(segmenter: Segmenter, rpc: RpcServer, ready: asyncio.Event) -> None:
    """Send canaries for ever; tell health checks and the log when readiness changes, and `ready` the first time."""
    was_ready, told = False, ""
    log.info("model.awaited")
    while True:
        try:
            await segmenter.probe(PROBE_TIMEOUT_S)
        except SegmentError as error:
            if was_ready:
                log.warning("model.unready %s cause=%s", error.message, error.__cause__)
            elif error.message != told:
                log.info("model.awaited %s", error.message)
            told = error.message
        if segmenter.ready != was_ready:
            was_ready = segmenter.ready
            await rpc.set_ready(ready=was_ready)
        if was_ready and not ready.is_set():
            ready.set()
            log.info("model.ready %s", segmenter.model.identity)
        await asyncio.sleep(PROBE_EVERY_S if was_ready else PROBE_EVERY_UNREADY_S)


async def _keep_adapting(segmenter: Segmenter) -> None:
    """Follow the model's queue, and tell how full the service is."""
    while True:
        await asyncio.sleep(ADAPT_EVERY_S)
        await segmenter.adapt(ADAPT_TIMEOUT_S)


async def _keep_renewing(cache: EmbeddingCache) -> None:
    """Hold on to the worker's slots for answers, also while the model does not answer."""
    while True:
        await asyncio.sleep(RENEW_EVERY_S)
        cache.renew()


async def _first_of(*events: asyncio.Event, failing: asyncio.Task[None], timeout_s: float | None = None) -> None:
    """Return when one of `events` is set, or after `timeout_s`; raise what the task `failing` raises, should it end."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait([*waits, failing], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            failing.result()
    finally:
        for wait in waits:
            wait.cancel()
