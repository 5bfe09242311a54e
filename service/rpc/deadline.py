"""How long a call may take, as its client says it."""

from grpc.aio import ServicerContext

from service.call import current_age_s


def deadline_of(context: ServicerContext) -> float | None:
    """Return the caller's deadline in seconds from the call's beginning, or None."""
    left_s: float | None = context.time_remaining()
    return None if left_s is None else left_s + current_age_s()
