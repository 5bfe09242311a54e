"""Admission: how many requests are worked on at once, how many may wait, and the refusal of the rest."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.errors import OverloadedError


class Permits:
    """`limit` requests at work and as many again waiting; one more is refused before any work. For one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free = asyncio.Semaphore(limit)
        self._held = 0

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Hold a permit for the block.

        Raises:
            OverloadedError: at once, when the waiting room is full.
        """
        if self._held >= 2 * self._limit:
            raise OverloadedError(f"{self._held} requests are under way or waiting; come back in a moment")
        self._held += 1
        try:
            async with self._free:
                yield
        finally:
            self._held -= 1
