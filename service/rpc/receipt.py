"""A message's receipt: C-core takes all of it once it is asked, and tells nothing before, so it is asked with care."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager

import grpc

from service.errors import DeadlineExceededError

AT_ONCE_S = 0.25  # no longer than it takes to send what memory easily holds


class Receipt:
    """Receives the messages of calls. Until it asks for one, flow control holds the client at 64 KiB of it.

    Args:
        body: `Permits.body`, of those who share the memory.
        max_message_bytes: What C-core takes at most.
        max_s: How long a message may take.
    """

    def __init__(
        self,
        body: Callable[[], AbstractContextManager[Callable[[int, str], None]]],
        max_message_bytes: int,
        max_s: float,
    ) -> None:
        self._body = body
        self._max_message_bytes = max_message_bytes
        self._max_s = max_s

    async def message(self, context: grpc.aio.ServicerContext, tenant: str = "") -> bytes | None:
        """Return the next message of a tenant's call, None where there is none.

        One that is not there at once counts as the largest.

        When this raises, the call has to be ended: the read is under way until then.

        Raises:
            OverloadedError: it is not there at once, and there is no room for so many bytes.
            DeadlineExceededError: it took too long.
        """
        reading = asyncio.ensure_future(context.read())  # never cancelled: C-core would write to memory that is freed
        reading.add_done_callback(_note_failure)
        if not await _ends(reading, AT_ONCE_S):
            with self._body() as grow_body_to:
                grow_body_to(self._max_message_bytes, tenant)
                if not await _ends(reading, self._max_s - AT_ONCE_S):
                    raise DeadlineExceededError(f"the message did not come within the deadline of {self._max_s:g} s")
        data: bytes | object = reading.result()
        return data if isinstance(data, bytes) else None


async def _ends(reading: "asyncio.Future[object]", timeout_s: float) -> bool:
    await asyncio.wait((reading,), timeout=timeout_s)
    if not reading.done():
        await asyncio.sleep(0)  # a loop that turned late finds the time up and the message there in one turn
    return reading.done()


def _note_failure(reading: "asyncio.Future[object]") -> None:
    """Take note of how it ended, which a call that was refused does not: else asyncio complains."""
    if not reading.cancelled():
        reading.exception()
