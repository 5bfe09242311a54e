"""Whether the models answer: found by canaries, never by the model server's word, and told to a breaker per model.

Triton calls itself ready while its models are dead, and a frozen one says nothing at all. What counts here is an answer
to a canary. The decoder gets one with every look. The encoder and the refiner, the decoder that takes masks, get theirs
seldom, or at once when something speaks against them, and nobody waits long for those.
"""

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from service.answers import Model
from service.backend import Backend
from service.breaker import BreakerState
from service.cache.embeddings import EmbeddingCache
from service.canaries import Canaries
from service.errors import ModelUnavailableError, SegmentError
from service.image import EncoderInput
from service.prompt import Point, Prompt, batches_from_prompts, mask_input_nbytes
from service.pulse import TELL_S, Pulse, again_if_broken, told
from service.tensors import DECODER_MODEL, ENCODER_MODEL, REFINER_MODEL

if TYPE_CHECKING:
    from service.cache.arena import Region

CANARY = Prompt((Point(1, 1),))
# For the canaries of encoder and refiner, before the decoder gets another: an image may take many seconds.
SELDOM_ASKED_WAIT_S = 1.0


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
    """What is known of the models behind `backend`, by their last canaries. `cache` holds the canaries' embedding.

    What other workers' canaries met is learnt from `canaries`, and told there.
    """

    def __init__(
        self, backend: Backend, cache: EmbeddingCache, observer: Observer, canaries: Canaries | None = None
    ) -> None:
        self._backend = backend
        self._cache = cache
        self._model: Model | None = None
        self._region: Region | None = None
        canaries = canaries or Canaries()
        self.pulses = self.encoder, self.decoder, self.refiner = [
            Pulse(name, backend, canaries, partial(observer.model_breaker, name))
            for name in (ENCODER_MODEL, DECODER_MODEL, REFINER_MODEL)
        ]

    @property
    def ready(self) -> bool:
        """Whether all models answered the last canaries, and nothing else spoke against it since."""
        return self._model is not None and all(pulse.breaker.is_closed for pulse in self.pulses)

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
        """Run a canary through the decoder; through another model too if it failed, was changed or has long been idle.

        Each model gets its own verdict, and the service is ready when all are good: while only the encoder is dead,
        cached images can still be prompted, and while only the refiner is, by all but masks. A canary that one of the
        two takes long for is waited for by further probes.

        Args:
            timeout_s: How long a model may take to answer anybody.

        Raises:
            ModelUnavailableError, OverloadedError, DeadlineExceededError: a model does not answer; not ready.
            StartError: there is no room for the cache.
        """
        try:
            model = await again_if_broken(lambda: self._prepare(timeout_s))
        except SegmentError:
            self._open_all()
            raise
        refining = replace(CANARY, mask_input=bytes(mask_input_nbytes(model.geometry.mask_size)))
        self.encoder.begin(lambda: self._encode(model, timeout_s), timeout_s)
        self.refiner.begin(lambda: self._decode(refining, timeout_s), timeout_s)
        failure = await self.decoder.ask(lambda: self._decode(CANARY, timeout_s), timeout_s)
        under_way = [pulse.canary for pulse in self.pulses if pulse.canary is not None]
        if under_way:
            await asyncio.wait(under_way, timeout=SELDOM_ASKED_WAIT_S)
        for pulse in self.pulses:
            failure = pulse.verdict() or failure
        if self.decoder.breaker.is_closed:
            self._model = model
        if failure is not None:
            raise failure

    async def _prepare(self, timeout_s: float) -> Model:
        """Learn which model is served, and have the server map the memory in which its embeddings lie."""
        model = await told(lambda: self._backend.describe(TELL_S))
        if model != self._model:
            self._model = None  # nothing is answered by halves of two models
        region, answers = await self._cache.open(model.identity, model.tensors)
        if self._model is None or region != self._region:
            self._open_all()
        if not self.ready:
            await self._backend.attach(region, answers, timeout_s)
            self._region = region
        return model

    def _open_all(self) -> None:
        for pulse in self.pulses:
            pulse.open()

    async def _encode(self, model: Model, timeout_s: float) -> None:
        side = model.geometry.input_size
        blank = EncoderInput(np.zeros((side, side, 3), np.uint8), (side, side))
        await self._backend.encode(blank, self._cache.canary(), timeout_s)

    async def _decode(self, prompt: Prompt, timeout_s: float) -> None:
        (batch,) = batches_from_prompts([prompt], (1.0, 1.0))
        output = await self._backend.decode(self._cache.canary(), batch, timeout_s)
        if not np.isfinite(output.iou_scores).all():
            raise ModelUnavailableError("the model answers a canary with values that are not finite")
