"""What a worker tells the supervisor once a second: its index, whether it is ready, and if the model answers it."""

from collections.abc import Iterator
from dataclasses import dataclass

ANSWERS, READY = 0x80, 0x40  # the other bits are the index: there are at most 64 workers


@dataclass(frozen=True, slots=True)
class Report:
    """The event loop of worker `index` turns; it is ready, from its first canary on, and the model `answers` it."""

    index: int
    ready: bool
    answers: bool


def report_of(index: int, *, ready: bool, answers: bool) -> bytes:
    """Return the report of worker `index`."""
    return bytes([index | (READY if ready else 0) | (ANSWERS if answers else 0)])


def reports_from(data: bytes) -> Iterator[Report]:
    """Yield the reports in what was read."""
    for byte in data:
        yield Report(byte & ~(READY | ANSWERS), bool(byte & READY), bool(byte & ANSWERS))
