"""What a worker does all the time, whether or not anybody asks: canaries, adapting to the model's queue, leases."""

import asyncio
import logging

from service.cache.embeddings import EmbeddingCache
from service.errors import SegmentError
from service.metrics import Metrics
from service.rpc.server import RpcServer
from service.segmenter import Segmenter

log = logging.getLogger(__name__)

RENEW_EVERY_S = 2.0
ADAPT_EVERY_S = 0.25
ADAPT_TIMEOUT_S = 1.0
PROBE_TIMEOUT_S = 10.0
PROBE_EVERY_S = 0.3  # a model that dies is found within 2 s, the second that Triton takes to give it up included
PROBE_EVERY_UNREADY_S = 0.2
TELL_EVERY_S = 0.1


class Telling:
    """Tells gRPC's health checks and the metrics how the service is, whenever that has changed."""

    def __init__(self, segmenter: Segmenter, rpc: RpcServer, metrics: Metrics) -> None:
        self._segmenter = segmenter
        self._rpc = rpc
        self._metrics = metrics
        self._was_ready = False

    def tell(self) -> None:
        """Look, and tell."""
        self._metrics.model(self._segmenter.model.identity if self._segmenter.model_answers else None)
        if self._segmenter.ready != self._was_ready:
            self._was_ready = self._segmenter.ready
            self._rpc.set_ready(ready=self._was_ready)


async def keep_probing(segmenter: Segmenter, telling: Telling, ready: asyncio.Event) -> None:
    """Send canaries for ever; tell of what they find, the log too, and `ready` the first time."""
    was_ready, told = False, ""
    log.info("model.awaited")
    while True:
        try:
            await segmenter.probe(PROBE_TIMEOUT_S)
        except SegmentError as error:
            if was_ready:
                log.warning("model.unready %s", error.message, extra={"fields": {"cause": str(error.__cause__)}})
            elif error.message != told:
                log.info("model.awaited %s", error.message)
            told = error.message
        telling.tell()
        was_ready = segmenter.ready
        if was_ready and not ready.is_set():
            ready.set()
            log.info("model.ready %s", segmenter.model.identity)
        await asyncio.sleep(PROBE_EVERY_S if was_ready else PROBE_EVERY_UNREADY_S)


async def keep_telling(telling: Telling) -> None:
    """Tell how the service is also while a canary is under way: requests that fail say so before it does."""
    while True:
        telling.tell()
        await asyncio.sleep(TELL_EVERY_S)


async def keep_adapting(segmenter: Segmenter) -> None:
    """Follow the model's queue, and tell how full the service is."""
    while True:
        await asyncio.sleep(ADAPT_EVERY_S)
        await segmenter.adapt(ADAPT_TIMEOUT_S)


async def keep_renewing(cache: EmbeddingCache, segmenter: Segmenter, metrics: Metrics) -> None:
    """Hold on to the worker's slots for answers, also while the model does not answer; count the loop's tasks."""
    while True:
        await asyncio.sleep(RENEW_EVERY_S)
        cache.renew(model_is_silent=not segmenter.model_answers)
        metrics.tasks(len(asyncio.all_tasks()))
