"""Who is let in: not while draining, not more often than a tenant may, with a permit, and under a deadline."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.admission.contract import Lane
from service.admission.permits import Permits
from service.admission.rates import Rates
from service.call import current_age_s, let_others_go_first
from service.errors import DeadlineExceededError, DrainingError
from service.stopwatch import Stopwatch

LEAST_S = 0.001


class Gate:
    """What every request passes before any work.

    Args:
        permits: How many may be at work.
        rates: How often each tenant may ask; None: as often as it likes.
        max_deadline_s: Deadline of requests that bring none, and the cap of those that do.

    `retiring` says that the service is not ready, though it serves on; `draining`, that it takes no new work, and
    `turned_away` how many it did not take.
    """

    def __init__(self, permits: Permits, rates: Rates | None, max_deadline_s: float) -> None:
        self.permits = permits
        self.retiring = False
        self.draining = False
        self.turned_away = 0
        self._rates = rates
        self.max_deadline_s = max_deadline_s

    @property
    def is_open(self) -> bool:
        """Whether new requests are welcome."""
        return not self.retiring and not self.draining

    def check_open(self) -> None:
        """Raise DrainingError where no new work is taken: for requests, best before their body is read."""
        if self.draining:
            self.turned_away += 1
            raise DrainingError("the server is shutting down; send the request again, elsewhere or in a moment")

    def count(self, tenant: str) -> None:
        """Take a request off what the tenant may ask; raises RateLimitedError when that is nothing."""
        if self._rates is not None:
            self._rates.take(tenant)

    def check_room(self, lane: Lane | None, tenant: str) -> None:
        """Refuse now what would be refused anyway: for requests whose body has not been read yet.

        Where only the body tells the lane, there is none yet, and only what the tenant may ask is looked at.

        Raises:
            RateLimitedError, OverloadedError: as `passed`.
        """
        if self._rates is not None:
            self._rates.check(tenant)
        if lane is not None:
            self.permits.check_room(lane, tenant)

    @asynccontextmanager
    async def passed(self, lane: Lane, tenant: str, deadline_s: float | None) -> AsyncIterator[Stopwatch]:
        """Hold a permit for the block, which ends at the deadline.

        Raises:
            DrainingError, RateLimitedError, OverloadedError: before any work.
            DeadlineExceededError: the block, or the wait for the permit, took too long.
        """
        self.check_open()
        self.count(tenant)
        async with self.within(deadline_s) as allowed_s:
            watch = Stopwatch(allowed_s)
            async with self.permits.hold(lane, tenant, allowed_s) as permit:
                watch.lap("queue")
                if permit.others_go_first:
                    let_others_go_first()
                yield watch

    @asynccontextmanager
    async def within(self, deadline_s: float | None) -> AsyncIterator[float]:
        """Yield the seconds that the block is allowed: what the current call's age leaves of its deadline.

        That is `deadline_s`, from the call's beginning, but no more than the server's own.

        Raises:
            DeadlineExceededError: it took longer.
        """
        allowed_s = self.max_deadline_s if deadline_s is None else min(deadline_s, self.max_deadline_s)
        left_s = max(allowed_s - current_age_s(), LEAST_S)
        try:
            async with asyncio.timeout(left_s):
                yield left_s
        except TimeoutError as error:
            raise DeadlineExceededError(f"no answer within the deadline of {allowed_s:.3g} s") from error
