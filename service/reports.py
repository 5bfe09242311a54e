"""What a worker tells the supervisor through their pipe once a second: its index, and if the model answers it."""

from collections.abc import Iterator
from dataclasses import dataclass

ANSWERS = 0x80  # the other bits are the index: there are at most 64 workers


@dataclass(frozen=True, slots=True)
class Report:
    """Worker `index` is ready, its event loop turns, and the model `answers` it, or does not."""

    index: int
    answers: bool


def report_of(index: int, *, answers: bool) -> bytes:
    """Return the report of worker `index`."""
    return bytes([index | (ANSWERS if answers else 0)])


def reports_from(data: bytes) -> Iterator[Report]:
    """Yield the reports in what was read."""
    for byte in data:
        yield Report(byte & ~ANSWERS, bool(byte & ANSWERS))
