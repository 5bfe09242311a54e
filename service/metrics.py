"""Prometheus series. The core hands over one `Timings` a request, each transport one line a call; all else is here."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from service.admission.contract import Lane, Refusal
from service.answers import Timings
from service.breaker import BreakerState
from service.cache.contract import CacheLevel
from service.cache.index import EvictionReason
from service.cache.redis_connections import Fault
from service.cache.redis_observer import Operation, Outcome

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
AGE_BUCKETS_S = (1, 5, 15, 60, 300, 900, 3600, 14400, 86400)
OK = "ok"
CANCELLED = "cancelled"  # the client went away


class Metrics:
    """The gateway's series, registered with `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._make_request_series(registry)
        self._make_cache_series(registry)
        self._make_admission_series(registry)
        self._make_redis_series(registry)
        self._make_model_series(registry)

    def _make_request_series(self, registry: CollectorRegistry) -> None:
        """Requests and their stages."""
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

    def _make_cache_series(self, registry: CollectorRegistry) -> None:
        """The first level, and decoding."""
        self._hits = Counter("sam_cache_hits", "Requests that found their embedding.", ["level"], registry=registry)
        self._misses = Counter("sam_cache_misses", "Requests that needed the encoder.", registry=registry)
        self._joins = Counter(
            "sam_cache_joins", "Requests that waited for another one's encode of the same image.", registry=registry
        )
        self._not_kept = Counter(
            "sam_cache_not_kept", "Embeddings not kept because every slot was in use.", registry=registry
        )
        self._evictions = Counter(
            "sam_cache_evictions", "Embeddings dropped, by reason: lru, ttl, quota.", ["reason"], registry=registry
        )
        self._evicted_age_s = Histogram(
            "sam_cache_evicted_age_seconds",
            "How long ago an embedding was used last when it was dropped; small values ask for a larger cache.",
            buckets=AGE_BUCKETS_S,
            registry=registry,
        )
        self._decode_lost = Counter(
            "sam_decode_processes_lost",
            "Decode processes that died over an image and were replaced, by reason: crashed, too_slow, abandoned.",
            ["reason"],
            registry=registry,
        )

    def _make_admission_series(self, registry: CollectorRegistry) -> None:
        """Who is let in, and who is not."""
        self._held, self._waiting, self._limit = (
            Gauge(name, f"{what}, by lane: prompt, encode.", ["lane"], registry=registry, multiprocess_mode="livesum")
            for name, what in (
                ("sam_requests_in_flight", "Requests being worked on"),
                ("sam_requests_waiting", "Requests admitted that wait for their turn"),
                ("sam_requests_in_flight_limit", "Requests that may be worked on at once at present"),
            )
        )
        self._body_bytes = Gauge(
            "sam_body_bytes",
            "Bytes of request bodies being held.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._refusals = Counter(
            "sam_refusals",
            "Requests refused before any work: wait (it would have been too long), bytes (of uploads), rate.",
            ["why"],
            registry=registry,
        )
        for why in Refusal:  # there from the start, so that a first refusal is an increase
            self._refusals.labels(why.value)

    def _make_redis_series(self, registry: CollectorRegistry) -> None:
        """The second level."""
        self._redis_operations = Counter(
            "sam_redis_operations", "Operations of the second level.", ["operation", "outcome"], registry=registry
        )
        self._redis_operation_s = Histogram(
            "sam_redis_operation_seconds",
            "Time of the second level's operations.",
            ["operation"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._redis_breaker_open = Gauge(
            "sam_redis_breaker_open",
            "1 while any worker leaves the second level alone.",
            registry=registry,
            multiprocess_mode="livemax",
        )

    def _make_model_series(self, registry: CollectorRegistry) -> None:
        """The model, and the event loops."""
        self._model_ready = Gauge(
            "sam_model_ready",
            "1 while the model answers canaries; of several workers, for the one for which it is worst.",
            registry=registry,
            multiprocess_mode="livemin",
        )
        self._model_info = Gauge(
            "sam_model_info",
            "1 for the model being served, name@digest.",
            ["model"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._model_identity: str | None = None
        self._model_breaker_open = Gauge(
            "sam_model_breaker_open",
            "1 while any worker refuses requests to a model that did not answer.",
            ["model"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._model_retries = Counter(
            "sam_model_retries",
            "Calls to a model that were made again on another connection.",
            ["model"],
            registry=registry,
        )
        self._tasks = Gauge(
            "sam_tasks",
            "Tasks of all workers' event loops; more and more of them are a leak.",
            registry=registry,
            multiprocess_mode="livesum",
        )

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

    def admission(self, lane: Lane, *, held: int, waiting: int, limit: int) -> None:
        """Take the state of a lane."""
        self._held.labels(lane.value).set(held)
        self._waiting.labels(lane.value).set(waiting)
        self._limit.labels(lane.value).set(limit)

    def bodies(self, nbytes: int) -> None:
        """Take how many bytes of request bodies are held."""
        self._body_bytes.set(nbytes)

    def refused(self, why: Refusal) -> None:
        """Count a refusal."""
        self._refusals.labels(why.value).inc()

    def evicted(self, reason: EvictionReason, age_s: float) -> None:
        """Count an eviction."""
        self._evictions.labels(reason.value).inc()
        self._evicted_age_s.observe(age_s)

    def joined(self) -> None:
        """Count a request that shares another one's encode."""
        self._joins.inc()

    def not_kept(self) -> None:
        """Count an embedding that found no slot."""
        self._not_kept.inc()

    def operation(self, operation: Operation, outcome: Outcome | Fault, seconds: float) -> None:
        """Count one operation of the second level."""
        self._redis_operations.labels(operation.value, outcome.value).inc()
        self._redis_operation_s.labels(operation.value).observe(seconds)

    def decode_process_lost(self, reason: str) -> None:
        """Count a decode process that died over an image."""
        self._decode_lost.labels(reason).inc()

    def breaker(self, state: BreakerState) -> None:
        """Take the state of the second level's breaker."""
        self._redis_breaker_open.set(state is not BreakerState.CLOSED)

    def model_breaker(self, model: str, state: BreakerState) -> None:
        """Take the state of a model's breaker."""
        self._model_breaker_open.labels(model).set(state is not BreakerState.CLOSED)

    def model_retried(self, model: str) -> None:
        """Count a call that is made again."""
        self._model_retries.labels(model).inc()

    def model(self, identity: str | None) -> None:
        """Take which model answers, or that none does."""
        self._model_ready.set(identity is not None)
        if identity is None or identity == self._model_identity:
            return
        if self._model_identity is not None:
            self._model_info.labels(self._model_identity).set(0)
        self._model_info.labels(identity).set(1)
        self._model_identity = identity

    def tasks(self, count: int) -> None:
        """Take the number of tasks of this worker's event loop."""
        self._tasks.set(count)

    def request(self, transport: str, route: str, outcome: str, seconds: float) -> None:
        """Count one call: `outcome` is `OK`, `CANCELLED` or an error's reason."""
        self._requests.labels(transport, route, outcome).inc()
        self._request_s.labels(transport, route).observe(seconds)
