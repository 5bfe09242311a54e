"""Whether calls to something that fails are worth making, and how many of those that failed may be made again.

Pure state: a `Breaker` is told how calls ended, a `RetryBudget` how many there were. Nothing here waits or calls.
"""

from collections.abc import Callable
from enum import StrEnum

FAILURES_TO_OPEN = 3
RETRY_RATIO = 0.1
MAX_SAVED_RETRIES = 10.0


class BreakerState(StrEnum):
    """Closed: in use. Open: left alone. Half open: being probed."""

    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


class Breaker:
    """Open from the start and after `FAILURES_TO_OPEN` failures in a row; only a canary that comes through closes it.

    Timeouts of requests are no failures: deadlines are the callers' own, and a few callers in a hurry must not shut
    out the others. A model that answers nobody is found by the canary.

    Args:
        on_change: Told of every new state.
    """

    def __init__(self, on_change: Callable[[BreakerState], None] = lambda _: None) -> None:
        self.state = BreakerState.OPEN
        self._on_change = on_change
        self._failures = 0

    @property
    def is_closed(self) -> bool:
        """Whether calls may be made."""
        return self.state is BreakerState.CLOSED

    @property
    def is_suspect(self) -> bool:
        """Whether a canary is due: it is not closed, or the last call failed."""
        return not self.is_closed or self._failures > 0

    def succeeded(self) -> None:
        """Note a call that was answered. One that was made before the breaker opened does not close it."""
        self._failures = 0

    def failed(self) -> None:
        """Note a call that found nobody who could answer."""
        self._failures += 1
        if self._failures >= FAILURES_TO_OPEN:
            self.open()

    def open(self) -> None:
        """Have no more calls made: a canary failed, or it is known that they would."""
        self._turn(BreakerState.OPEN)

    def probe(self) -> None:
        """Note that a canary is on its way; a closed breaker stays closed meanwhile."""
        if self.state is BreakerState.OPEN:
            self._turn(BreakerState.HALF_OPEN)

    def close(self) -> None:
        """Note that a canary came through."""
        self._failures = 0
        self._turn(BreakerState.CLOSED)

    def _turn(self, state: BreakerState) -> None:
        if state is not self.state:
            self.state = state
            self._on_change(state)


class RetryBudget:
    """Lets a tenth as many calls be made again as are made, so that retries cannot become the load.

    What is not used is saved, up to `MAX_SAVED_RETRIES`.
    """

    def __init__(self) -> None:
        self._saved = 0.0

    def earn(self) -> None:
        """Note a call that is made for the first time."""
        self._saved = min(self._saved + RETRY_RATIO, MAX_SAVED_RETRIES)

    def spend(self) -> bool:
        """Take one retry; False if none is left."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
