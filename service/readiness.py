"""Which model is served, and whether it answers: known by canaries that go all the way through it."""

from typing import TYPE_CHECKING

import numpy as np

from service.answers import Model
from service.backend import Backend
from service.cache.embeddings import EmbeddingCache
from service.errors import ModelUnavailableError, SegmentError
from service.image import EncoderInput
from service.prompt import Point, Prompt, batches_from_prompts

if TYPE_CHECKING:
    from service.cache.arena import Region

CANARY = Prompt((Point(1, 1),))


class Readiness:
    """What the last canary found. It opens `cache` for the model that `backend` serves."""

    def __init__(self, backend: Backend, cache: EmbeddingCache) -> None:
        self.is_answering = False
        self._backend = backend
        self._cache = cache
        self._model: Model | None = None
        self._region: Region | None = None

    @property
    def model(self) -> Model:
        """The model being served.

        Raises:
            ModelUnavailableError: none has answered yet.
        """
        if self._model is None:
            raise ModelUnavailableError("the model is not loaded yet; come back in a moment")
        return self._model

    def check(self) -> None:
        """Raise `ModelUnavailableError` unless the last canary came through."""
        if not self.is_answering:
            raise ModelUnavailableError("the model does not answer at present; come back in a moment")

    async def probe(self, timeout_s: float) -> None:
        """Run a canary through the decoder, after a failure or a change of model through the encoder too.

        Raises:
            ModelUnavailableError, OverloadedError, DeadlineExceededError: the model does not answer.
            StartError: there is no room for the cache.
        """
        try:
            await self._send_canary(timeout_s)
        except SegmentError:
            self.is_answering = False
            raise
        self.is_answering = True

    async def _send_canary(self, timeout_s: float) -> None:
        model = await self._backend.describe(timeout_s)
        if model != self._model:
            self._model = None  # nothing is answered by halves of two models
        region, answers = await self._cache.open(model.identity, model.tensors)
        if not self.is_answering or self._model is None or region != self._region:
            self.is_answering, self._region = False, region
            await self._backend.attach(region, answers, timeout_s)
            side = model.geometry.input_size
            blank = EncoderInput(np.zeros((side, side, 3), np.uint8), (side, side))
            await self._backend.encode(blank, self._cache.canary(), timeout_s)
        (batch,) = batches_from_prompts([CANARY], (1.0, 1.0))
        output = await self._backend.decode(self._cache.canary(), batch, timeout_s)
        if not np.isfinite(output.iou_scores).all():
            raise ModelUnavailableError("the model answers a canary with values that are not finite")
        self._model = model
