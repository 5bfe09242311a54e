"""The pulse of one model: whether it answers, as canaries find and its breaker is told, and when to ask it again.

A canary that waits in a queue is no failure while others are answered: slow is not dead.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from time import monotonic
from typing import TypeVar

from service.backend import Backend
from service.breaker import Breaker, BreakerState
from service.canaries import Canaries
from service.errors import DeadlineExceededError, ModelUnavailableError, OverloadedError, SegmentError

Answer = TypeVar("Answer")
Canary = Callable[[], Awaitable[None]]

LOOK_EVERY_S = 0.25
# How long a living server may take for what needs no model. In ticks of our own: when this process is kept waiting, by
# a busy machine or by itself, that is not the server's silence.
TELL_TICKS, TICK_S = 10, 0.1
TELL_S = 10.0  # whatever the ticks say
BUSY_S = 0.1
# A model that nobody asks gets a canary seldom: it costs what an image costs, or a click, which others would wait for.
LEAST_IDLE_S, IDLE_PER_CANARY = 1.0, 200


class Pulse:
    """What is known of one model.

    Args:
        name: Of the model.
        backend: Where it runs.
        canaries: What is known of other workers'.
        on_change: Told of every new state of the breaker.
    """

    def __init__(
        self, name: str, backend: Backend, canaries: Canaries, on_change: Callable[[BreakerState], None]
    ) -> None:
        self.name = name
        self.breaker = Breaker(on_change)
        self.canary: asyncio.Task[SegmentError | None] | None = None
        self._backend = backend
        self._canaries = canaries
        self._asked_s = 0.0
        self._is_owed = False
        self._canary_s = math.inf  # what one takes, at best

    @property
    def is_due(self) -> bool:
        """Whether something speaks against the model, here or in another worker, or nobody has asked it for long."""
        idle_s = max(LEAST_IDLE_S, 0.0 if self._is_owed else IDLE_PER_CANARY * self._canary_s)
        return (
            self.breaker.is_suspect
            or self._canaries.failed_since(self.name, self._asked_s)
            or self._canaries.idle_s(self.name) > idle_s
        )

    def answered(self) -> None:
        """Note that somebody was answered: no canary is needed for a while."""
        self._is_owed = False
        self._canaries.note_asked(self.name)

    def owes_an_answer(self) -> None:
        """Note that somebody who waited for the model left, or ran out of time: no failure, but worth a look."""
        self._is_owed = True

    def begin(self, canary: Canary, patience_s: float) -> None:
        """Have a canary under way, `self.canary`, if one is due; as in `ask`."""
        if self.canary is None and self.is_due:
            self.canary = asyncio.create_task(self.ask(canary, patience_s))

    def verdict(self) -> SegmentError | None:
        """Return why the canary that was under way failed; None if it came through, or is still under way."""
        if self.canary is None or not self.canary.done():
            return None
        canary, self.canary = self.canary, None
        return canary.result()

    def open(self) -> None:
        """Have no calls made until a canary comes through that is sent from now on."""
        if self.canary is not None:
            self.canary.cancel()
            self.canary = None
        self.breaker.open()

    async def ask(self, canary: Canary, patience_s: float) -> SegmentError | None:
        """Send a canary, have the breaker know how it ended, and return why it failed, if it did.

        Args:
            canary: Makes the call.
            patience_s: How long the model may take to answer anybody.
        """
        self.breaker.probe()
        asking = asyncio.create_task(_until_admitted(lambda: self._timed(canary)))
        try:
            await self._watch(asking, patience_s)
        except SegmentError as error:
            self.breaker.open()
            if asking.done() and not (isinstance(error, ModelUnavailableError) and error.connection_broke):
                self._canaries.note_failure(self.name)
            return error
        finally:
            asking.cancel()
        self.breaker.close()
        return None

    async def _timed(self, canary: Canary) -> None:
        self._is_owed = False
        self._canaries.note_asked(self.name)
        self._asked_s = began_s = monotonic()
        await canary()
        self._canary_s = min(self._canary_s, monotonic() - began_s)

    async def _watch(self, asking: asyncio.Task[None], patience_s: float) -> None:
        """Wait for a canary as long as the server tells of itself, and of answers to anybody within `patience_s`."""
        now_s = asyncio.get_running_loop().time
        completed, changed_s, sent_s = -1, now_s(), monotonic()
        while not (await asyncio.wait([asking], timeout=LOOK_EVERY_S))[0]:
            if self._canaries.failed_since(self.name, sent_s):
                raise ModelUnavailableError("the model failed another worker's canary; come back in a moment")
            count = await again_if_broken(lambda: told(lambda: self._backend.completed(self.name, TELL_S)))
            if count != completed:
                completed, changed_s = count, now_s()
            elif now_s() - changed_s > patience_s:
                raise ModelUnavailableError("the model has not answered anybody for a while; come back in a moment")
        asking.result()


async def _until_admitted(canary: Canary) -> None:
    """Send a canary again while the queue has no room for it, or none in time: whether that is for ever, others see."""
    while True:
        try:
            await again_if_broken(canary)
        except (OverloadedError, DeadlineExceededError):
            await asyncio.sleep(BUSY_S)
        else:
            return


async def told(call: Callable[[], Coroutine[None, None, Answer]]) -> Answer:
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


async def again_if_broken(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """Make a call, and once more if the connection broke: that says nothing of the model behind the next one."""
    try:
        return await call()
    except ModelUnavailableError as error:
        if not error.connection_broke:
            raise
    return await call()
