"""How all workers' canaries fare: memory that all workers map, so that each hears of a dead model from the first.

A model runs one batch after the other, and one that died takes a second to fail each (Triton's doing). Where every
worker waits for its own canary, the last of them knows that second later. And a canary costs what an image costs, or a
click, which is enough for one worker to spend.
"""

from contextlib import AbstractContextManager
from time import monotonic

from service.shared_numbers import mapped_numbers, shared_numbers
from service.tensors import DECODER_MODEL, ENCODER_MODEL, REFINER_MODEL

MODELS = (ENCODER_MODEL, DECODER_MODEL, REFINER_MODEL)
NUMBERS = 2 * len(MODELS)  # when each model last failed a canary, and when each was last asked


def shared_canaries() -> AbstractContextManager[int]:
    """Yield a file descriptor of memory for `Canaries`, for the workers to inherit."""
    return shared_numbers("sam-canaries", NUMBERS)


class Canaries:
    """What is known of all workers' canaries; `fd` is from `shared_canaries`, None for a worker that has no others.

    Times are on the clock that all processes share (`time.monotonic`).
    """

    def __init__(self, fd: int | None = None) -> None:
        numbers = mapped_numbers(fd, NUMBERS)
        self._failed_s, self._asked_s = numbers[: len(MODELS)], numbers[len(MODELS) :]

    def note_failure(self, model: str) -> None:
        """Note that a canary failed just now: its own failure, not one that was heard of here."""
        self._failed_s[MODELS.index(model)] = monotonic()

    def failed_since(self, model: str, sent_s: float) -> bool:
        """Whether anybody's canary failed after `sent_s`."""
        return self._failed_s[MODELS.index(model)] > sent_s

    def note_asked(self, model: str) -> None:
        """Note that the model was asked just now, by whomever."""
        self._asked_s[MODELS.index(model)] = monotonic()

    def idle_s(self, model: str) -> float:
        """Return how long nobody has asked the model."""
        return monotonic() - self._asked_s[MODELS.index(model)]
