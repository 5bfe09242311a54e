"""Claims that a worker gave up: the index is told, later if it could not be, and what may yet be written rests."""

from dataclasses import replace
from time import monotonic

from service.cache.database import IndexUnavailableError
from service.cache.index import Claim, Index

MAX_UNTOLD = 1000  # more than that run out by themselves


class GivenUp:
    """What one worker gave up of `index`. For one event loop."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._untold: list[tuple[Claim, float]] = []  # and when each one's slot may be used again
        self._resting: list[Claim] = []

    def add(self, claim: Claim, *, written: bool) -> None:
        """Give a claim up; when Triton may still write (`written`), the slot rests until it no longer can."""
        reusable_s = 0.0
        if written:
            reusable_s = min(claim.until_s, monotonic() + self._index.limits.late_write_s)
            self._resting.append(replace(claim, until_s=reusable_s))
        self._untold.append((claim, reusable_s))
        del self._untold[:-MAX_UNTOLD]
        self._tell()

    def renew(self, *, model_is_silent: bool) -> None:
        """Tell what could not be told, and while the model is silent let rest what rests.

        A model that was stopped goes on one day with what it had begun, calls that were given up included.
        """
        self._tell()
        now_s = monotonic()
        self._resting = [claim for claim in self._resting if claim.until_s > now_s]
        if model_is_silent and self._resting:
            try:
                self._resting = self._index.renew(self._resting, now_s + self._index.limits.late_write_s)
            except IndexUnavailableError:
                return  # in a moment again

    def _tell(self) -> None:
        while self._untold:
            try:
                self._index.abandon(*self._untold[0])
            except IndexUnavailableError:
                return  # it is told with the next one, or when claims are renewed
            del self._untold[0]
