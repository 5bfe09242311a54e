"""Whether the model answers: found by canaries, never by the model server's word, and told to a breaker per model.

Triton calls itself ready while its models are dead, and a frozen one says nothing at all. What counts here is an answer
to a canary. A canary that waits in a queue is no failure while others are answered: slow is not dead.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from time import monotonic
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from service.answers import Model
from service.backend import Backend
from service.breaker import Breaker, BreakerState
from service.cache.embeddings import EmbeddingCache
from service.canaries import Canaries
from service.errors import DeadlineExceededError, ModelUnavailableError, OverloadedError, SegmentError
from service.image import EncoderInput
from service.prompt import Point, Prompt, batches_from_prompts
from service.tensors import DECODER_MODEL, ENCODER_MODEL

if TYPE_CHECKING:
    from service.cache.arena import Region

Answer = TypeVar("Answer")

CANARY = Prompt((Point(1, 1),))
LOOK_EVERY_S = 0.25
ENCODER_WAIT_S = 1.0  # for its canary, before the decoder gets another: an image may take many seconds
# How long a living server may take for what needs no model. In ticks of our own: when this process is kept waiting, by
# a busy machine or by itself, that is not the server's silence.
TELL_TICKS, TICK_S = 10, 0.1
TELL_S = 10.0  # whatever the ticks say
BUSY_S = 0.1
# An encoder that nobody asks gets a canary seldom: it costs what an image costs, which prompts would wait for.
LEAST_IDLE_S, IDLE_PER_CANARY = 1.0, 200


class Observer(Protocol):
    """Where the state of the models is reported to."""

    def model_breaker(self, model: str, state: BreakerState) -> None:
        """Take the new state of a model's breaker."""

    def model_retried(self, model: str) -> None:
        """Count a call that is made again."""


class Unobserved:
    """An `Observer` that nobody asks."""

    def model_breaker(self, model: str, state: BreakerState) -> None:
        """Take no note."""

    def model_retried(self, model: str) -> None:
        """Take no note."""


class ModelHealth:
    """What is known of the models behind `backend`, by its last canaries. `cache` holds the canaries' embedding.

    What other workers' canaries met is learnt from `canaries`, and told there.
    """

    def __init__(
        self, backend: Backend, cache: EmbeddingCache, observer: Observer, canaries: Canaries | None = None
    ) -> None:
        self._backend = backend
        self._canaries = canaries or Canaries()
        self._encoder_asked_s = 0.0
        self._is_owed = False
        self._encode_s = math.inf  # what a canary takes there, at best
        self._encoder_canary: asyncio.Task[SegmentError | None] | None = None
        self._cache = cache
        self._model: Model | None = None
        self._region: Region | None = None
        self.encoder = Breaker(lambda state: observer.model_breaker(ENCODER_MODEL, state))
        self.decoder = Breaker(lambda state: observer.model_breaker(DECODER_MODEL, state))

    @property
    def ready(self) -> bool:
        """Whether all models answered the last canaries, and nothing else spoke against it since."""
        return self._model is not None and self.encoder.is_closed and self.decoder.is_closed

    @property
    def model(self) -> Model:
        """The model being served.

        Raises:
            ModelUnavailableError: none has answered yet.
        """
        if self._model is None:
            raise ModelUnavailableError("the model is not loaded yet; come back in a moment")
        return self._model

    async def probe(self, timeout_s: float) -> None:
        """Run a canary through the decoder; through the encoder too if it failed, was changed or has long been idle.

        Each model gets its own verdict: while only the encoder is dead, cached images can still be prompted. A canary
        that the encoder takes long for is waited for by further probes.

        Args:
            timeout_s: How long a model may take to answer anybody.

        Raises:
            ModelUnavailableError, OverloadedError, DeadlineExceededError: a model does not answer; not ready.
            StartError: there is no room for the cache.
        """
        try:
            model = await _again_if_broken(lambda: self._prepare(timeout_s))
        except SegmentError:
            self._open_both()
            raise
        if self._encoder_canary is None and self._encoder_is_due():
            self._encoder_canary = asyncio.create_task(
                self._ask(self.encoder, ENCODER_MODEL, lambda: self._encode(model, timeout_s), timeout_s)
            )
        failure = await self._ask(self.decoder, DECODER_MODEL, lambda: self._decode(timeout_s), timeout_s)
        if self._encoder_canary is not None and (await asyncio.wait([self._encoder_canary], timeout=ENCODER_WAIT_S))[0]:
            canary, self._encoder_canary = self._encoder_canary, None
            failure = canary.result() or failure
        if self.decoder.is_closed:
            self._model = model
        if failure is not None:
            raise failure

    async def _prepare(self, timeout_s: float) -> Model:
        """Learn which model is served, and have the server map the memory in which its embeddings lie."""
        model = await _told(lambda: self._backend.describe(TELL_S))
        if model != self._model:
            self._model = None  # nothing is answered by halves of two models
        region, answers = await self._cache.open(model.identity, model.tensors)
        if self._model is None or region != self._region:
            self._open_both()
        if not self.ready:
            await self._backend.attach(region, answers, timeout_s)
            self._region = region
        return model

    def _open_both(self) -> None:
        if self._encoder_canary is not None:
            self._encoder_canary.cancel()
            self._encoder_canary = None
        self.encoder.open()
        self.decoder.open()

    async def _ask(
        self, breaker: Breaker, name: str, canary: Callable[[], Awaitable[None]], patience_s: float
    ) -> SegmentError | None:
        """Send a canary, and have the breaker know how it ended."""
        breaker.probe()
        asking = asyncio.create_task(_until_admitted(canary))
        try:
            await self._watch(asking, name, patience_s)
        except SegmentError as error:
            breaker.open()
            if asking.done() and not (isinstance(error, ModelUnavailableError) and error.connection_broke):
                self._canaries.note_failure(name)
            return error
        finally:
            asking.cancel()
        breaker.close()
        return None

    async def _watch(self, asking: asyncio.Task[None], name: str, patience_s: float) -> None:
        """Wait for a canary as long as the server tells of itself, and of answers to anybody within `patience_s`."""
        now_s = asyncio.get_running_loop().time
        completed, changed_s, sent_s = -1, now_s(), monotonic()
        while not (await asyncio.wait([asking], timeout=LOOK_EVERY_S))[0]:
            if self._canaries.failed_since(name, sent_s):
                raise ModelUnavailableError("the model failed another worker's canary; come back in a moment")
            count = await _again_if_broken(lambda: _told(lambda: self._backend.completed(name, TELL_S)))
            if count != completed:
                completed, changed_s = count, now_s()
            elif now_s() - changed_s > patience_s:
                raise ModelUnavailableError("the model has not answered anybody for a while; come back in a moment")
        asking.result()

    def encoder_answered(self) -> None:
        """Note that an image was encoded: no canary is needed for a while."""
        self._is_owed = False
        self._canaries.note_encode()

    def encoder_owes_an_answer(self) -> None:
        """Note that somebody who waited for the encoder left, or ran out of time: no failure, but worth a look."""
        self._is_owed = True

    def _encoder_is_due(self) -> bool:
        """Whether something speaks against the encoder, here or in another worker, or nobody has asked it for long."""
        idle_s = max(LEAST_IDLE_S, 0.0 if self._is_owed else IDLE_PER_CANARY * self._encode_s)
        return (
            self.encoder.is_suspect
            or self._canaries.failed_since(ENCODER_MODEL, self._encoder_asked_s)
            or self._canaries.encoder_was_idle_s() > idle_s
        )

    async def _encode(self, model: Model, timeout_s: float) -> None:
        self._canaries.note_encode()
        self._is_owed = False
        self._encoder_asked_s = began_s = monotonic()
        side = model.geometry.input_size
        blank = EncoderInput(np.zeros((side, side, 3), np.uint8), (side, side))
        await self._backend.encode(blank, self._cache.canary(), timeout_s)
        self._encode_s = min(self._encode_s, monotonic() - began_s)

    async def _decode(self, timeout_s: float) -> None:
        (batch,) = batches_from_prompts([CANARY], (1.0, 1.0))
        output = await self._backend.decode(self._cache.canary(), batch, timeout_s)
        if not np.isfinite(output.iou_scores).all():
            raise ModelUnavailableError("the model answers a canary with values that are not finite")


async def _until_admitted(canary: Callable[[], Awaitable[None]]) -> None:
    """Send a canary again while the queue has no room for it, or none in time: whether that is for ever, others see."""
    while True:
        try:
            await _again_if_broken(canary)
        except (OverloadedError, DeadlineExceededError):
            await asyncio.sleep(BUSY_S)
        else:
            return


async def _told(call: Callable[[], Coroutine[None, None, Answer]]) -> Answer:
    """Return what the server tells, if it does so in time.

    Raises:
        DeadlineExceededError: it does not.
    """
    asking = asyncio.create_task(call())
    try:
        for _ in range(TELL_TICKS):
            if (await asyncio.wait([asking], timeout=TICK_S))[0]:
                return asking.result()
    finally:
        asking.cancel()
    raise DeadlineExceededError("the model server does not answer at all")


async def _again_if_broken(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """Make a call, and once more if the connection broke: that says nothing of the model behind the next one."""
    try:
        return await call()
    except ModelUnavailableError as error:
        if not error.connection_broke:
            raise
    return await call()
