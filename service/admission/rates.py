"""How often each tenant may ask, and how many ask at all: one bucket a tenant, shared by all workers.

The generic cell rate algorithm (ITU-T I.371, annex A): all that is kept of a bucket is one number, the time at which it
will be full again. So the buckets of all tenants are a few bytes that all workers map, and a limit is the tenant's,
whichever worker its connections are with. Beside them stands when each tenant was last here.

No lock: two workers that read and write the same number at once let one request too many through, once in a great many;
a lock held by a worker that hangs would stop them all.
"""

import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from time import monotonic

from service.admission.contract import Observer, Refusal, Unobserved
from service.errors import RateLimitedError
from service.shared_numbers import mapped_numbers, shared_numbers

NUMBERS = 2  # of each tenant: when its bucket will be full, and when it was last here
LATELY_S = 10.0
COUNT_EVERY_S = 1.0
ROUNDING_S = 1e-6  # a request that is early by less is in time


def shared_buckets(tenants: int) -> AbstractContextManager[int]:
    """Yield a file descriptor of memory for the buckets of so many tenants, for the workers to inherit."""
    return shared_numbers("sam-rates", NUMBERS * tenants)


class Rates:
    """The rate limit of each tenant.

    Args:
        tenants: All there are; they must be the same, in the same order, in all workers.
        rate: Requests per second that each may make; 0: as many as it likes.
        burst: Requests it may make at once after a pause.
        buckets_fd: From `shared_buckets`; None: the limit is this process's own.
        observer: Counts.
        clock: Seconds since the same moment in all workers.
    """

    def __init__(
        self,
        tenants: Collection[str],
        *,
        rate: float,
        burst: int,
        buckets_fd: int | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._bucket_of = {tenant: index for index, tenant in enumerate(tenants)}
        self._interval_s = 1 / rate if rate else 0.0
        self._tolerance_s = self._interval_s * (burst - 1)
        self._observer = observer or Unobserved()
        self._clock = clock
        tenants_there = len(self._bucket_of)
        numbers = mapped_numbers(buckets_fd, NUMBERS * tenants_there)
        self._full_s, self._seen_s = numbers[:tenants_there], numbers[tenants_there:]
        self._active, self._counted_s = 1, -math.inf

    @property
    def active(self) -> int:
        """How many tenants have asked lately, of any worker; at least 1. Counted anew every second."""
        now_s = self._clock()
        if now_s - self._counted_s >= COUNT_EVERY_S:
            self._counted_s = now_s
            self._active = max(1, sum(seen_s > now_s - LATELY_S for seen_s in self._seen_s))
        return self._active

    def take(self, tenant: str) -> None:
        """Count one request of `tenant`.

        Raises:
            RateLimitedError: as `check`.
        """
        full_s = self.check(tenant)
        if self._interval_s:
            self._full_s[self._bucket_of[tenant]] = full_s + self._interval_s

    def check(self, tenant: str) -> float:
        """Return when the bucket of `tenant`, who is here, is full, if one more request would be taken now.

        Raises:
            RateLimitedError: it makes too many; says when the next one would be taken.
        """
        bucket, now_s = self._bucket_of[tenant], self._clock()
        self._seen_s[bucket] = now_s
        full_s = max(self._full_s[bucket], now_s)
        early_s = full_s - now_s - self._tolerance_s
        if early_s > ROUNDING_S:
            self._observer.refused(Refusal.RATE)
            raise RateLimitedError(
                f"more than {1 / self._interval_s:g} requests per second; the next one is taken in {early_s:.3f} s",
                retry_after_s=early_s,
            )
        return full_s
