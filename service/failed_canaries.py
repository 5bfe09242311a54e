"""When a canary last failed, by model: memory that all workers map, so that each hears of a dead model from the first.

A model runs one batch after the other, and one that died takes a second to fail each (Triton's doing). Where every
worker waits for its own canary, the last of them knows that second later.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from service.tensors import DECODER_MODEL, ENCODER_MODEL

MODELS = (ENCODER_MODEL, DECODER_MODEL)
NUMBER_BYTES = 8


@contextmanager
def shared_failures() -> Iterator[int]:
    """Yield a file descriptor of memory for `FailedCanaries`, for the workers to inherit."""
    fd = os.memfd_create("sam-canaries")
    try:
        os.ftruncate(fd, NUMBER_BYTES * len(MODELS))
        yield fd
    finally:
        os.close(fd)


class FailedCanaries:
    """What is known of all workers' canaries; `fd` is from `shared_failures`, None for a worker that has no others."""

    def __init__(self, fd: int | None = None) -> None:
        self._failed_s = memoryview(mmap.mmap(-1 if fd is None else fd, NUMBER_BYTES * len(MODELS))).cast("d")

    def note(self, model: str) -> None:
        """Note that a canary failed just now: its own failure, not one that was heard of here."""
        self._failed_s[MODELS.index(model)] = monotonic()

    def since(self, model: str, sent_s: float) -> bool:
        """Whether anybody's canary failed after `sent_s`, on the clock that all processes share (`time.monotonic`)."""
        return self._failed_s[MODELS.index(model)] > sent_s
