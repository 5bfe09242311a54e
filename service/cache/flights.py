"""Single-flight: work that any number of callers of one name share, and that ends when the last of them has left."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    waiters: int = 0


class Flights(Generic[T]):
    """Work under way, by name. For one event loop."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight[T]] = {}

    async def share(
        self, name: Hashable, work: Callable[[], Coroutine[None, None, T]], on_join: Callable[[], None]
    ) -> T:
        """Return the result of `work`, which the first caller of `name` starts and all of its callers share.

        `on_join` is called for every caller but the first.

        The work is a task of its own: a caller that leaves, the first included, does not fail the others. When all have
        left it is cancelled.
        """
        flight = self._flights.get(name)
        if flight is None:
            flight = self._flights[name] = _Flight(asyncio.create_task(work()))
            flight.task.add_done_callback(lambda task: self._land(name, task))
        else:
            on_join()
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not flight.task.done():
                self._forget(name, flight.task)
                flight.task.cancel()

    def _land(self, name: Hashable, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # told to all who wait; if nobody does, it is not news
        self._forget(name, task)

    def _forget(self, name: Hashable, task: asyncio.Task[T]) -> None:
        flight = self._flights.get(name)
        if flight is not None and flight.task is task:
            del self._flights[name]
