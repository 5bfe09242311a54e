"""What other workers have at work in a lane, and whose it is: memory that all map, a row for each of them.

So a tenant's share is one, whichever workers its connections are with. Each worker writes its own row alone, and needs
no lock; the row of one that died, or hangs, no longer counts after a while.
"""

import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from service.shared_numbers import mapped_numbers, shared_numbers

AT_WORK, BEAT_S, HEAD = 0, 1, 2  # of a row: how many are at work, when its worker last told, and its tenants from here
ASKED_S, PRESSED_S, TURN_S, NUMBERS = 1, 2, 3, 4  # of each tenant, after how many it has at work
SILENT_S = 3.0  # a worker tells of itself several times as often
LATELY_S = 10.0
CALM_S = 2.0  # so long after it last pressed a tenant presses no more
COUNT_EVERY_S = 0.25


@dataclass(slots=True)
class Lately:
    """When a tenant last asked a worker for a permit, last asked it for too much, and was last given one."""

    asked_s: float = -math.inf
    pressed_s: float = -math.inf
    served_s: float = -math.inf


def _numbers(tenants: int) -> int:
    return HEAD + NUMBERS * tenants


def shared_rows(tenants: int, workers: int) -> AbstractContextManager[int]:
    """Yield a file descriptor of memory for the rows of so many workers, for them to inherit."""
    return shared_numbers("sam-at-work", _numbers(tenants) * workers)


class Elsewhere:
    """What the workers but this one have at work, and this one's word to them.

    Args:
        tenants: All there are; they must be the same, in the same order, in all workers.
        worker: Which one this is, from 0.
        workers: How many there are.
        rows_fd: From `shared_rows`; None: nothing is known of others, and nothing told.
    """

    def __init__(
        self, tenants: Collection[str] = (), worker: int = 0, workers: int = 1, rows_fd: int | None = None
    ) -> None:
        self._place_of: dict[str, int] = {}
        self._rows: list[memoryview[float]] = []
        self._others: list[memoryview[float]] = []
        self._asking, self._pressing, self._counted_s = 0, 0, -math.inf
        if rows_fd is None:
            return
        self._place_of = {tenant: HEAD + NUMBERS * index for index, tenant in enumerate(tenants)}
        numbers = _numbers(len(self._place_of))
        memory = mapped_numbers(rows_fd, numbers * workers)
        self._rows = [memory[index * numbers : (index + 1) * numbers] for index in range(workers)]
        self._table = np.asarray(memory).reshape(workers, numbers)[:, HEAD:]
        self._own = self._rows[worker]
        self._others = [row for row in self._rows if row is not self._own]
        self._own[AT_WORK] = 0
        for place in self._place_of.values():  # what the worker before this one, which died, had there
            self._write(place, (0, -math.inf, -math.inf, math.inf))

    def tell(self, tenant: str, *, at_work: int, waiting: int, lately: Lately) -> None:
        """Tell the others what `tenant` has at work and waiting here."""
        if self._rows:
            place = self._place_of[tenant]
            self._own[AT_WORK] += at_work - self._own[place]
            turn_s = lately.served_s if waiting else math.inf
            self._write(place, (at_work, lately.asked_s, lately.pressed_s, turn_s))

    def beat(self, now_s: float) -> None:
        """Tell the others that this worker is there."""
        if self._rows:
            self._own[BEAT_S] = now_s

    def at_work(self, now_s: float) -> int:
        """Return how many requests are at work, of all tenants."""
        return int(sum(row[AT_WORK] for row in self._living(now_s)))

    def at_work_of(self, tenant: str, now_s: float) -> int:
        """Return how many requests of `tenant` are at work."""
        return int(sum(row[self._place_of[tenant]] for row in self._living(now_s)))

    def pressed_s(self, tenant: str) -> float:
        """Return when `tenant` last asked for too much."""
        return max((row[self._place_of[tenant] + PRESSED_S] for row in self._others), default=-math.inf)

    def turn_s(self, tenant: str, now_s: float) -> float:
        """Return when the worker that waits for longest last gave `tenant` a permit, infinity where none waits."""
        return min((row[self._place_of[tenant] + TURN_S] for row in self._living(now_s)), default=math.inf)

    def asking(self, now_s: float) -> int:
        """Return how many tenants have asked lately, of this worker too; 0 if that is not known."""
        self._count(now_s)
        return self._asking

    def all_press(self, now_s: float) -> bool:
        """Whether all that ask press."""
        self._count(now_s)
        return 0 < self._asking == self._pressing

    def _count(self, now_s: float) -> None:
        """Count again, if it is time: there may be many tenants."""
        if now_s - self._counted_s < COUNT_EVERY_S:
            return
        self._counted_s = now_s
        if self._rows:
            asked, pressed = (self._table[:, number::NUMBERS].max(axis=0) for number in (ASKED_S, PRESSED_S))
            asks = asked > now_s - LATELY_S
            self._asking, self._pressing = int(asks.sum()), int((asks & (pressed > now_s - CALM_S)).sum())

    def _living(self, now_s: float) -> "list[memoryview[float]]":
        return [row for row in self._others if row[BEAT_S] > now_s - SILENT_S]

    def _write(self, place: int, numbers: Sequence[float]) -> None:
        for offset, number in enumerate(numbers):
            self._own[place + offset] = number
