"""Prometheus series. The core hands over one `Timings` a request, each transport one line a call; all else is here."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from service.answers import Timings
from service.cache.embeddings import CacheLevel, EmbeddingCache

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
OK = "ok"


class Metrics:
    """The gateway's series, registered with `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "sam_requests",
            "Requests answered, by transport, route and outcome (ok, or an error's reason).",
            ["transport", "route", "outcome"],
            registry=registry,
        )
        self._request_s = Histogram(
            "sam_request_seconds",
            "Time from a request's arrival to the end of its answer.",
            ["transport", "route"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._stage_s = Histogram(
            "sam_stage_seconds",
            "Time an answered request spent per stage: queue, encode, decode, masks.",
            ["stage"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._prompts = Counter("sam_prompts", "Prompts answered.", registry=registry)
        self._hits = Counter("sam_cache_hits", "Requests that found their embedding.", ["level"], registry=registry)
        self._misses = Counter("sam_cache_misses", "Requests that needed the encoder.", registry=registry)
        self._registry = registry

    def watch_cache(self, cache: EmbeddingCache) -> None:
        """Read the cache's size whenever Prometheus scrapes."""
        nbytes = Gauge("sam_cache_bytes", "Bytes of embeddings cached.", registry=self._registry)
        nbytes.set_function(lambda: cache.nbytes)
        entries = Gauge("sam_cache_entries", "Embeddings cached.", registry=self._registry)
        entries.set_function(lambda: len(cache))
        evictions = Gauge(
            "sam_cache_evictions", "Embeddings dropped to make room, since start.", registry=self._registry
        )
        evictions.set_function(lambda: cache.evictions)

    def observe(self, timings: Timings) -> None:
        """Take the record of one answered request."""
        self._stage_s.labels("queue").observe(timings.queue_s)
        if timings.cache is CacheLevel.MISS:
            self._misses.inc()
            self._stage_s.labels("encode").observe(timings.encode_s)
        else:
            self._hits.labels(timings.cache.value).inc()
        if timings.prompts:
            self._prompts.inc(timings.prompts)
            self._stage_s.labels("decode").observe(timings.decode_s)
            self._stage_s.labels("masks").observe(timings.masks_s)

    def request(self, transport: str, route: str, outcome: str, seconds: float) -> None:
        """Count one call: `outcome` is `OK` or an error's reason."""
        self._requests.labels(transport, route, outcome).inc()
        self._request_s.labels(transport, route).observe(seconds)
