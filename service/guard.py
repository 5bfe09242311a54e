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
from service.pulse import Pulse

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
        _check(self._health.encoder.breaker)

    async def encode(self, image: EncoderInput, destination: Embedding, timeout_s: float) -> None:
        """As `Backend.encode`."""
        await self._call(
            self._health.encoder, lambda left_s: self._backend.encode(image, destination, left_s), timeout_s
        )

    async def decode(self, embedding: Embedding, batch: PromptBatch, timeout_s: float) -> DecoderOutput:
        """As `Backend.decode`."""
        pulse = self._health.decoder if batch.masks is None else self._health.refiner
        return await self._call(pulse, lambda left_s: self._backend.decode(embedding, batch, left_s), timeout_s)

    async def _call(self, pulse: Pulse, call: Callable[[float], Awaitable[Answer]], timeout_s: float) -> Answer:
        _check(pulse.breaker)
        try:
            answer = await self._at_most_twice(pulse, call, timeout_s)
        except (asyncio.CancelledError, DeadlineExceededError):
            pulse.owes_an_answer()
            raise
        pulse.answered()
        return answer

    async def _at_most_twice(
        self, pulse: Pulse, call: Callable[[float], Awaitable[Answer]], timeout_s: float
    ) -> Answer:
        until_s = monotonic() + timeout_s
        self._retries.earn()
        try:
            return await _once(pulse.breaker, call, timeout_s)
        except ModelUnavailableError as error:
            left_s = until_s - monotonic()
            if not error.connection_broke or not pulse.breaker.is_closed or left_s <= 0 or not self._retries.spend():
                raise
        self._observer.model_retried(pulse.name)
        return await _once(pulse.breaker, call, left_s)


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
