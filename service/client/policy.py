"""When a call that failed is made again, and how long to wait before. Pure."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from service.errors import SegmentError

MAX_ATTEMPTS = 10  # with their pauses they outlast a restart: some ten seconds
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0


@dataclass(frozen=True, slots=True)
class Policy:
    """How long an operation may take, retries and pauses included, and how often a call of it is tried.

    Only what the service refused before any work, or what never reached it, is tried again: errors that say when to
    come back (`retry_after_s`). A deadline that passed, or input that is wrong, is never.
    """

    timeout_s: float
    max_attempts: int
    chance: Callable[[], float] = random.random  # of [0, 1)

    def with_timeout(self, timeout_s: float | None) -> "Policy":
        """Return this policy, for an operation that may take `timeout_s`; None: as long as others."""
        return self if timeout_s is None else replace(self, timeout_s=timeout_s)

    def wait_s(self, failure: SegmentError, attempts: int, left_s: float) -> float | None:
        """Return how long to wait after so many `attempts`, of which the last met `failure`; None: give up.

        Never shorter than the service asked. The rest is random between 0 and a bound that doubles ("full jitter"), so
        that clients that failed together do not come back together.
        """
        if failure.retry_after_s is None or attempts >= self.max_attempts:
            return None
        doublings = min(attempts - 1, 32)  # enough to reach the bound; 1,024 of them are more than a float can hold
        bound_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0**doublings)
        wait_s = failure.retry_after_s + bound_s * self.chance()
        return wait_s if wait_s < left_s else None
