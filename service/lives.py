"""How long to wait before a process that died is started again."""

from dataclasses import dataclass

SETTLED_S = 10.0  # what served for so long died of something new
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 10.0


@dataclass(slots=True)
class Lives:
    """The lives of one process that is replaced whenever it dies; `short` counts the last ones that were short."""

    short: int = 0

    def ended(self, lived_s: float, *, was_ready: bool) -> None:
        """Note the end of a life."""
        self.short = 0 if was_ready and lived_s >= SETTLED_S else self.short + 1

    def delay_s(self) -> float:
        """Return how long to wait before the next start: longer the more often it died young."""
        if not self.short:
            return 0.0
        # Long before 32 the bound is reached; a float's exponent would end at 1,024, after hours of failed starts.
        return min(FIRST_BACKOFF_S * 2.0 ** min(self.short - 1, 32), MAX_BACKOFF_S)
