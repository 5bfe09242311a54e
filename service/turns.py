"""Turns at things that are scarce: each tenant that waits gets one before any gets its next."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Free things, and those who wait for one. For one event loop."""

    def __init__(self) -> None:
        self._free: deque[T] = deque()
        self._waiting: dict[str, deque[asyncio.Future[T]]] = {}  # of each tenant, in the order of their turns

    async def take(self, tenant: str) -> T:
        """Return a free thing, when it is the tenant's turn."""
        if self._free:  # so nobody waits
            return self._free.popleft()
        place: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(place)
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # it had its turn in the moment in which it was cancelled
                self.give(place.result())
            raise

    def give(self, thing: T) -> None:
        """Give a thing to whoever is next, or leave it free."""
        while self._waiting:
            tenant = next(iter(self._waiting))
            places = self._waiting.pop(tenant)
            place = places.popleft()
            if places:
                self._waiting[tenant] = places  # and the others' turns come first
            if not place.done():
                place.set_result(thing)
                return
        self._free.append(thing)
