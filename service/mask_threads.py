"""Threads for what turns logits into masks, apart from all others: as many at once as there are of them, and no more.

It takes memory by the picture's pixels, and nothing can interrupt it: what has begun goes on when its caller has left,
and keeps its thread until it ends. What waits for a thread waits here, each tenant in its turn, and is gone with its
caller.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import ParamSpec, TypeVar

from service.call import tenant_or_nobody
from service.turns import Turns

P = ParamSpec("P")
Made = TypeVar("Made")


class MaskThreads:
    """So many threads (`count`). For one event loop."""

    def __init__(self, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, "masks")
        self._turns = Turns[None]()
        for _ in range(count):
            self._turns.give(None)

    async def run(self, work: Callable[P, Made], *args: P.args, **kwargs: P.kwargs) -> Made:
        """Return what `work` returns in a thread, when it is the tenant's turn."""
        await self._turns.take(tenant_or_nobody())
        loop = asyncio.get_running_loop()

        def give_back(_: Future[Made]) -> None:
            with suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(self._turns.give, None)

        try:
            begun = self._executor.submit(work, *args, **kwargs)
        except BaseException:  # no thread can be started
            self._turns.give(None)
            raise
        begun.add_done_callback(give_back)  # not when the caller leaves: it has its thread until it ends
        return await asyncio.wrap_future(begun)
