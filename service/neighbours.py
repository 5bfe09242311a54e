"""What the workers share: memory that their supervisor makes and all of them map."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields

from service.admission.elsewhere import shared_rows
from service.admission.rates import shared_buckets
from service.canaries import shared_canaries


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Which of the workers this one is, and the file descriptors of what they share; alone it shares nothing."""

    worker: int = 0
    rates_fd: int | None = None  # the tenants' rate limits
    canaries_fd: int | None = None  # how canaries fare
    prompts_fd: int | None = None  # what the tenants have at work, of prompts
    encodes_fd: int | None = None  # and of encodes


SHARED = tuple(each.name for each in fields(Neighbours) if each.name != "worker")


@contextmanager
def shared_memory(tenants: int, workers: int) -> Iterator[tuple[int, ...]]:
    """Yield the file descriptors that so many workers inherit, in the order of `SHARED`."""
    with ExitStack() as stack:
        yield (
            stack.enter_context(shared_buckets(tenants)),
            stack.enter_context(shared_canaries()),
            stack.enter_context(shared_rows(tenants, workers)),
            stack.enter_context(shared_rows(tenants, workers)),
        )
