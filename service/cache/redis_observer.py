"""What a second level reports, and to whom."""

from enum import StrEnum
from typing import Protocol

from service.breaker import BreakerState
from service.cache.redis_connections import Fault


class Operation(StrEnum):
    """What was asked of Redis."""

    GET = "get"
    PUT = "put"
    DELETE = "delete"
    PING = "ping"


class Outcome(StrEnum):
    """How an operation ended, where it was no `Fault`."""

    DONE = "done"  # put, delete, ping
    HIT = "hit"
    MISS = "miss"
    REJECTED = "rejected"  # damaged, or another key's: treated as a miss, and deleted
    SKIPPED = "skipped"  # the breaker is open
    BUSY = "busy"  # other look-ups of this process used up the budget
    DROPPED = "dropped"  # the queue of writes is full, or was closed


class RedisObserver(Protocol):
    """Where a `RedisLevel` reports to."""

    def operation(self, operation: Operation, outcome: Outcome | Fault, seconds: float) -> None:
        """Take the record of one operation."""

    def breaker(self, state: BreakerState) -> None:
        """Take the breaker's new state."""
