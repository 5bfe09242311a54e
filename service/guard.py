"""The way to the model for requests: refused while a breaker is open, and tried once more when a connection breaks."""

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import TypeVar

from service.backend import Backend, DecoderOutput
from service.breaker import Breaker, RetryBudget
from service.cache.contract import Embedding
from service.errors import DeadlineExceededError, ModelUnavailableError
from service.image import EncoderInput
from service.model_health import ModelHealth, Observer
from service.prompt import PromptBatch
from service.tensors import DECODER_MODEL, ENCODER_MODEL

Answer = TypeVar("Answer")


class Guard:
    """Makes the calls of requests to `backend`, as long as `health` says that they are worth making.

    Running a model twice on the same input changes nothing, so a call whose connection broke may be made again: once,
    in what is left of its time, and as part of a budget that all calls of this worker share. A call that was refused or
    came too late is never made again: that would be more of what there is too much of.
    """

    def __init__(self, backend: Backend, health: ModelHealth, observer: Observer) -> None:
        self._backend = backend
        self._health = health
        self._observer = observer
        self._retries = RetryBudget()

    def check_encoder(self) -> None:
        """Raise ModelUnavailableError if an encode would be refused."""
        _check(self._health.encoder)

    async def encode(self, image: EncoderInput, destination: Embedding, timeout_s: float) -> None:
        """As `Backend.encode`."""
        try:
            await self._call(
                ENCODER_MODEL,
                self._health.encoder,
                lambda left_s: self._backend.encode(image, destination, left_s),
                timeout_s,
            )
        except (asyncio.CancelledError, DeadlineExceededError):
            self._health.encoder_owes_an_answer()
            raise
        self._health.encoder_answered()

    async def decode(self, embedding: Embedding, batch: PromptBatch, timeout_s: float) -> DecoderOutput:
        """As `Backend.decode`."""
        return await self._call(
            DECODER_MODEL,
            self._health.decoder,
            lambda left_s: self._backend.decode(embedding, batch, left_s),
            timeout_s,
        )

    async def _call(
        self, model: str, breaker: Breaker, call: Callable[[float], Awaitable[Answer]], timeout_s: float
    ) -> Answer:
        _check(breaker)
        until_s = monotonic() + timeout_s
        self._retries.earn()
        try:
            return await _once(breaker, call, timeout_s)
        except ModelUnavailableError as error:
            left_s = until_s - monotonic()
            if not error.connection_broke or not breaker.is_closed or left_s <= 0 or not self._retries.spend():
                raise
        self._observer.model_retried(model)
        return await _once(breaker, call, left_s)


async def _once(breaker: Breaker, call: Callable[[float], Awaitable[Answer]], timeout_s: float) -> Answer:
    try:
        answer = await call(timeout_s)
    except ModelUnavailableError as error:
        if not error.connection_broke:  # one that broke ends many calls at once, and says nothing of the next one
            breaker.failed()
        raise
    breaker.succeeded()
    return answer


def _check(breaker: Breaker) -> None:
    if not breaker.is_closed:
        raise ModelUnavailableError("the model does not answer at present; come back in a moment")
