"""Permits: who may work, who waits, who is refused, by concurrency and by bytes, before any work is done."""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from time import monotonic

from service.admission.contract import Lane, Observer, Refusal, Spent, Unobserved
from service.admission.elsewhere import Elsewhere
from service.admission.waiting_room import Permit, WaitingRoom
from service.errors import OverloadedError

ENCODE_PART = 4  # one permit in so many is for encodes
MIN_RETRY_S = 0.05
# A sixteenth of the bytes is for small bodies alone: uploads, also those that do not come, never stop most prompts.
SMALL_BODY_BYTES, LARGE_BODIES_PART = 64 * 1024, 15 / 16
PATIENCE = 2.0  # who has waited so many times as long as anybody should is sent away: what was expected was wrong


class Permits:
    """The permits of one worker; for one event loop.

    Encodes have a quarter of the permits, prompts the others: neither waits for the other's. While prompts wait,
    encodes work one at a time, since they share the GPU: prompts first, but no image waits for ever.

    Args:
        max_concurrency: Requests at work at once, at most; as many again may wait, in each lane.
        max_wait_s: The longest that a request may have to expect to wait.
        max_bytes: Bytes of request bodies held at once.
        active_tenants: How many share the permits at present, at least 1.
        elsewhere: What other workers have at work in each lane; None: there are none.
        observer: Counts.
        clock: Seconds that only grow.
    """

    def __init__(  # noqa: PLR0913 - what bounds it, by name
        self,
        max_concurrency: int,
        *,
        max_wait_s: float = 1.0,
        max_bytes: float = math.inf,
        active_tenants: Callable[[], int] = lambda: 1,
        elsewhere: Mapping[Lane, Elsewhere] | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        encodes = max(1, max_concurrency // ENCODE_PART)
        most = {Lane.PROMPT: max(1, max_concurrency - encodes), Lane.ENCODE: encodes}
        self._rooms = {
            lane: WaitingRoom(
                most[lane],
                max_concurrency,
                overtaken=lane is Lane.PROMPT,
                elsewhere=elsewhere[lane] if elsewhere else None,
            )
            for lane in most
        }
        self._max_wait_s = max_wait_s
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._bytes_of: Counter[str] = Counter()  # of each tenant
        self._untaken_of: Counter[str] = Counter()  # of each tenant's answers
        self._active_tenants = active_tenants
        self._observer = observer or Unobserved()
        self._clock = clock

    @asynccontextmanager
    async def hold(self, lane: Lane, tenant: str, left_s: float = math.inf) -> AsyncIterator[Permit]:
        """Hold a permit for the block, after a wait if need be; `left_s` is until the request's deadline.

        Raises:
            OverloadedError: at once, when the wait would be too long or end after the deadline; or later, when it was
                not expected to be so long.
        """
        permit = await self._enter(lane, tenant, left_s)
        try:
            yield permit
        finally:
            self._rooms[lane].give_back(tenant, permit, self._clock())
            self._call_up()

    def check_room(self, lane: Lane, tenant: str, left_s: float = math.inf) -> None:
        """Refuse now what would be refused anyway: for requests whose body has not been read yet.

        Raises:
            OverloadedError: as `hold`.
        """
        if self._untaken_of[tenant] > self._max_bytes / self._active_tenants():
            self._observer.refused(Refusal.BYTES)
            raise OverloadedError("too many of your answers wait to be read; read them, and send the request again")
        room = self._rooms[lane]
        room.tenants = self._active_tenants()
        now_s, limit = self._clock(), self._limit(lane)
        room.ask(tenant, now_s)
        if room.fits(tenant, now_s, limit):
            return
        wait_s = room.wait_s(tenant, now_s, limit)
        if room.is_full_for(tenant) or wait_s > min(self._max_wait_s, left_s):
            room.refuse(tenant, now_s)
            self._observer.refused(Refusal.WAIT)
            raise OverloadedError(
                f"{room.at_work(now_s)} requests of this kind are at work, {room.waiting} wait; come back in a moment",
                retry_after_s=max(wait_s, MIN_RETRY_S),
            )

    @contextmanager
    def body(self) -> Iterator[Callable[[int, str], None]]:
        """Yield a function to be told how many bytes of its body a tenant's request holds, as they become more.

        Large bodies of one tenant have no more than its share of the room, as long as others ask, too.

        It raises:
            OverloadedError: there is no room for so many at present. A lone request always has room.
        """
        held, whose = 0, ""

        def grow_to(nbytes: int, tenant: str) -> None:
            nonlocal held, whose
            more = nbytes - held
            if more <= 0:
                return
            room = share = self._max_bytes
            if nbytes > SMALL_BODY_BYTES:
                room *= LARGE_BODIES_PART
                share = room / self._active_tenants()
            of_tenant = self._bytes_of[tenant]
            if (self._held_bytes > held and self._held_bytes + more > room) or (
                of_tenant > held and of_tenant + more > share
            ):
                self._observer.refused(Refusal.BYTES)
                raise OverloadedError("too many uploads are under way; come back in a moment")
            held, whose = nbytes, tenant
            self._held_bytes += more
            self._bytes_of[tenant] += more

        try:
            yield grow_to
        finally:
            self._held_bytes -= held
            self._bytes_of[whose] -= held
            if not self._bytes_of[whose]:
                del self._bytes_of[whose]

    def answer(self, nbytes: int, tenant: str) -> Callable[[], None]:
        """Count an answer to `tenant` until its client has taken it: until what is returned is called, once.

        It is made already, and not refused. Further requests of the tenant are, while it leaves more than its share of
        the bytes that may be held untaken.
        """
        self._untaken_of[tenant] += nbytes

        def taken() -> None:
            self._untaken_of[tenant] -= nbytes
            if not self._untaken_of[tenant]:
                del self._untaken_of[tenant]

        return taken

    def adapt(self, spent: Mapping[Lane, Spent]) -> None:
        """Take what the model server says of its queues, to let in more or fewer at once."""
        for lane, totals in spent.items():
            room = self._rooms[lane]
            # When permits are held so long that all are refused, nobody waits, and yet more could be at work.
            room.limit.adapt(totals, self._clock(), wanting=room.waiting > 0 or room.refused)
            room.refused = False
        self._call_up()

    def tell(self) -> None:
        """Tell the observer and other workers how things are; to be called every now and then.

        Who waits may go to work by now without anything having ended here: with another worker something did.
        """
        self._call_up()
        for lane, room in self._rooms.items():
            room.beat(self._clock())
            self._observer.admission(lane, held=room.held, waiting=room.waiting, limit=self._limit(lane))
        self._observer.bodies(self._held_bytes)

    async def _enter(self, lane: Lane, tenant: str, left_s: float) -> Permit:
        """Wait for a permit and return it."""
        self.check_room(lane, tenant, left_s)
        room = self._rooms[lane]
        place = room.line_up(tenant)
        self._call_up()
        if place.done():
            return place.result()
        patience = asyncio.get_running_loop().call_later(PATIENCE * self._max_wait_s, self._send_away, room, place)
        try:
            return await place
        except (asyncio.CancelledError, OverloadedError):
            if place.cancelled() or place.exception() is not None:
                room.step_out(tenant, place)
            else:  # it had its turn in the moment in which it was cancelled
                room.give_back(tenant, place.result(), self._clock())
            self._call_up()
            raise
        finally:
            patience.cancel()

    def _send_away(self, room: WaitingRoom, place: "asyncio.Future[Permit]") -> None:
        if not place.done():
            room.refused = True
            self._observer.refused(Refusal.WAIT)
            place.set_exception(OverloadedError("others take longer than expected; come back in a moment"))

    def _call_up(self) -> None:
        """Give free permits to those who wait, prompts first."""
        for lane, room in self._rooms.items():
            while turn := room.next_turn(self._clock(), self._limit(lane)):
                tenant, place = turn
                place.set_result(room.take(tenant, self._clock(), self._limit(lane)))

    def _limit(self, lane: Lane) -> int:
        if lane is Lane.ENCODE and self._rooms[Lane.PROMPT].waiting:
            return 1
        return self._rooms[lane].limit.value
