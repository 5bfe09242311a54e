"""How often each tenant may ask: one bucket a tenant, shared by all workers.

The generic cell rate algorithm (ITU-T I.371, annex A): all that is kept of a bucket is one number, the time at which it
will be full again. So the buckets of all tenants are a few bytes that all workers map, and a limit is the tenant's,
whichever worker its connections are with. No lock: two workers that read and write the same number at once let one
request too many through, once in a great many; a lock held by a worker that hangs would stop them all.
"""

import mmap
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from time import monotonic

from service.admission.contract import Observer, Refusal, Unobserved
from service.errors import RateLimitedError

NUMBER_BYTES = 8
ROUNDING_S = 1e-6  # a request that is early by less is in time


@contextmanager
def shared_buckets(tenants: int) -> Iterator[int]:
    """Yield a file descriptor of memory for the buckets of so many tenants, for the workers to inherit."""
    fd = os.memfd_create("sam-rates")
    try:
        os.ftruncate(fd, NUMBER_BYTES * tenants)
        yield fd
    finally:
        os.close(fd)


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
        nbytes = NUMBER_BYTES * len(self._bucket_of)
        self._full_s = memoryview(mmap.mmap(-1 if buckets_fd is None else buckets_fd, nbytes)).cast("d")

    def take(self, tenant: str) -> None:
        """Count one request of `tenant`.

        Raises:
            RateLimitedError: it makes too many; says when the next one would be taken.
        """
        if not self._interval_s:
            return
        bucket, now_s = self._bucket_of[tenant], self._clock()
        full_s = max(self._full_s[bucket], now_s)
        early_s = full_s - now_s - self._tolerance_s
        if early_s > ROUNDING_S:
            self._observer.refused(Refusal.RATE)
            raise RateLimitedError(
                f"more than {1 / self._interval_s:g} requests per second; the next one is taken in {early_s:.3f} s",
                retry_after_s=early_s,
            )
        self._full_s[bucket] = full_s + self._interval_s
