"""Composition root of a worker: builds the core, starts HTTP and gRPC, keeps probing the model, drains on a signal."""

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from prometheus_client import CollectorRegistry

from service.admission.contract import Lane
from service.admission.elsewhere import Elsewhere
from service.admission.permits import Permits
from service.admission.rates import Rates
from service.auth import Authoriser, parse_api_keys
from service.backend import Backend
from service.cache.embeddings import EmbeddingCache
from service.cache.index import Limits
from service.cache.redis import TTL_JITTER, RedisLevel
from service.cache.room import LATE_WRITE_S
from service.canaries import Canaries
from service.decoding import DecodePool
from service.gate import Gate
from service.image import ImageLimits
from service.metrics import Metrics
from service.neighbours import Neighbours
from service.observer import Observer
from service.ports import bound_socket
from service.rest.app import create_app
from service.rest.server import HttpServer
from service.rpc.server import RpcServer
from service.segmenter import Segmenter
from service.settings import Settings
from service.tls import TlsFiles, tls_files
from service.tracing import tracer_from_environment
from service.triton import TritonBackend
from service.upkeep import Telling, keep_adapting, keep_probing, keep_renewing, keep_telling

log = logging.getLogger(__name__)

MAX_LEASE_S = 5.0
REDIS_TTL_S = 86400.0  # in the second level, when SAM_CACHE_TTL_S sets none: Redis must be able to forget
QUIET_S = 0.3  # so long without a new call, while draining, and none is on its way
FIRST_CANARY_S = 0.5  # how long to wait for it before saying, on open ports, that there is none

Connect = Callable[[Settings], AbstractAsyncContextManager[Backend]]


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[TritonBackend]:
    """Yield the model behind the Triton that `settings` name."""
    backend = TritonBackend(
        settings.triton_url,
        shared_memory=settings.triton_transport == "shm",
        secret=settings.triton_secret.get_secret_value(),
    )
    try:
        yield backend
    finally:
        await backend.close()


async def serve(
    settings: Settings,
    *,
    on_ready: Callable[[Callable[[], bool]], None],
    connect: Connect = connected,
    open_when_ready: bool = False,
    neighbours: Neighbours | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    `on_ready` is called once, when the first canary came through, with what tells from then on if the model answers.
    `connect` opens what computes: Triton, or for a measurement of the gateway alone what costs nothing.

    HTTP and gRPC share their ports with other workers; that nobody else has them is the supervisor's business. With
    `open_when_ready` this worker takes no connections before it can answer: its `neighbours` do meanwhile.

    Raises:
        StartError: a port is taken, TLS files cannot be used, or there is no room for the cache.
    """
    neighbours = neighbours or Neighbours()
    stop, ready = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    metrics = Metrics(CollectorRegistry())
    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(connect(settings))
        store = await stack.enter_async_context(_second_level(settings, metrics))
        cache = _cache(settings, metrics, store)
        stack.callback(cache.close)
        limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
        decoder = DecodePool(settings.decode_processes, limits, metrics.decode_process_lost)
        await stack.enter_async_context(decoder.running())
        observer = Observer(metrics, await stack.enter_async_context(tracer_from_environment()))
        authoriser = _authoriser(settings)
        rates = _rates(settings, authoriser.tenants, metrics, neighbours.rates_fd)
        permits = _permits(settings, authoriser.tenants, rates, metrics, neighbours)
        canaries = Canaries(neighbours.canaries_fd)
        segmenter = _segmenter(settings, backend, cache, decoder, permits, rates, observer=observer, canaries=canaries)
        tls = tls_files(settings)
        rpc = _rpc_server(settings, segmenter, authoriser, observer, tls)
        http = HttpServer(create_app(segmenter, authoriser, observer), observer, settings.drain_s, tls)
        http_socket = stack.enter_context(
            bound_socket(settings.host, settings.http_port, "HTTP", "SAM_HTTP_PORT", reuse_port=True)
        )
        telling = Telling(segmenter, rpc, metrics)
        upkeep = [
            await stack.enter_async_context(_in_background(work))
            for work in (
                keep_renewing(cache, segmenter, metrics),
                keep_adapting(segmenter),
                keep_probing(segmenter, telling, ready),
                keep_telling(telling),
            )
        ]
        await _first_of(stop, ready, failing=upkeep, timeout_s=None if open_when_ready else FIRST_CANARY_S)
        await stack.enter_async_context(_serving_requests(segmenter, http, http_socket, rpc, settings))
        await _first_of(stop, ready, failing=upkeep)
        if ready.is_set():
            on_ready(lambda: segmenter.model_answers)
        await _first_of(stop, failing=upkeep)


def _rpc_server(
    settings: Settings, segmenter: Segmenter, authoriser: Authoriser, observer: Observer, tls: TlsFiles | None
) -> RpcServer:
    return RpcServer(
        segmenter,
        authoriser,
        observer,
        host=settings.host,
        port=settings.grpc_port,
        connection_age_s=settings.grpc_connection_age_s,
        connection_grace_s=settings.default_deadline_s,
        credentials=tls.server_credentials() if tls else None,
    )


@asynccontextmanager
async def _second_level(settings: Settings, metrics: Metrics) -> AsyncIterator[RedisLevel | None]:
    """Connect to Redis, lazily and whether or not it is there; None when none is configured."""
    url = settings.redis_url.get_secret_value()
    if not url:
        yield None
        return
    secret = settings.cache_secret.get_secret_value().encode()
    level = RedisLevel(url, secret=secret, ttl_s=_redis_ttl_s(settings), observer=metrics)
    try:
        yield level
    finally:
        await level.close()


def _redis_ttl_s(settings: Settings) -> float:
    return settings.cache_ttl_s or REDIS_TTL_S


def _cache(settings: Settings, metrics: Metrics, store: RedisLevel | None) -> EmbeddingCache:
    limits = Limits(
        claim_s=settings.default_deadline_s + LATE_WRITE_S,
        lease_s=min(settings.default_deadline_s, MAX_LEASE_S),
        ttl_s=settings.cache_ttl_s,
        tenant_share=settings.tenant_cache_share,
        keeps_s=_redis_ttl_s(settings) * (1 + TTL_JITTER) if store else 0.0,
    )
    return EmbeddingCache(
        name=settings.arena_name,
        max_bytes=settings.cache_bytes,
        limits=limits,
        observer=metrics,
        store=store,
        workers=settings.workers,
    )


def _rates(settings: Settings, tenants: Collection[str], metrics: Metrics, rates_fd: int | None) -> Rates:
    return Rates(tenants, rate=settings.tenant_rate, burst=settings.tenant_burst, buckets_fd=rates_fd, observer=metrics)


def _permits(
    settings: Settings, tenants: Collection[str], rates: Rates, metrics: Metrics, neighbours: Neighbours
) -> Permits:
    return Permits(
        settings.max_concurrency,
        max_wait_s=settings.max_wait_s,
        max_bytes=settings.max_bytes_in_flight,
        active_tenants=lambda: rates.active,
        elsewhere={
            Lane.PROMPT: Elsewhere(tenants, neighbours.worker, settings.workers, neighbours.prompts_fd),
            Lane.ENCODE: Elsewhere(tenants, neighbours.worker, settings.workers, neighbours.encodes_fd),
        },
        observer=metrics,
    )


def _segmenter(  # noqa: PLR0913 - what it is composed of
    settings: Settings,
    backend: Backend,
    cache: EmbeddingCache,
    decoder: DecodePool,
    permits: Permits,
    rates: Rates,
    *,
    observer: Observer,
    canaries: Canaries,
) -> Segmenter:
    return Segmenter(
        backend=backend,
        cache=cache,
        decoder=decoder,
        permits=permits,
        rates=rates,
        limits=decoder.limits,
        max_deadline_s=settings.default_deadline_s,
        secret=settings.cache_secret.get_secret_value().encode(),
        on_done=observer.answered,
        observer=observer.metrics,
        canaries=canaries,
        mask_threads=settings.decode_processes,
    )


def _authoriser(settings: Settings) -> Authoriser:
    authoriser = Authoriser(parse_api_keys(settings.api_keys.get_secret_value()))
    if authoriser.is_open:
        log.warning("auth.open SAM_API_KEYS is not set: anybody who reaches the ports may call, as one tenant")
    return authoriser


@asynccontextmanager
async def _serving_requests(
    segmenter: Segmenter, http: HttpServer, http_socket: socket.socket, rpc: RpcServer, settings: Settings
) -> AsyncIterator[None]:
    """Serve HTTP and gRPC during the block; then retire, take no new work and let what is under way finish."""
    serving = asyncio.create_task(http.serve(sockets=[http_socket]))
    await rpc.start()
    try:
        yield
    finally:
        log.info("server.draining")
        segmenter.gate.retiring = True
        rpc.set_ready(ready=False)
        await asyncio.sleep(settings.drain_delay_s)
        segmenter.gate.draining = True
        http.should_exit = True
        await asyncio.gather(_stop_when_quiet(rpc, segmenter.gate, settings.drain_s), serving)


async def _stop_when_quiet(rpc: RpcServer, gate: Gate, drain_s: float) -> None:
    """Stop gRPC within `drain_s`, when nobody comes any more: calls that it has and did not begin, it would cancel.

    Until then who comes is told when to come again, and with that holds back all further calls.
    """
    now_s = asyncio.get_running_loop().time
    end_s, turned_away = now_s() + drain_s, -1
    while gate.turned_away != turned_away and now_s() < end_s - drain_s / 2:
        turned_away = gate.turned_away
        await asyncio.sleep(QUIET_S)
    await rpc.stop(max(0.0, end_s - now_s()))


@asynccontextmanager
async def _in_background(work: Coroutine[None, None, None]) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _first_of(
    *events: asyncio.Event, failing: Sequence[asyncio.Task[None]], timeout_s: float | None = None
) -> None:
    """Return when one of `events` is set, or after `timeout_s`; raise what any of the tasks `failing` raises.

    None of them ends by itself: a worker without one of them looks well and is not, and is better replaced.
    """
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait([*waits, *failing], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in failing:
            if task.done():
                task.result()
    finally:
        for wait in waits:
            wait.cancel()
