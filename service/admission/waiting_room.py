"""One lane: who is at work in it, who waits, whose turn is next, and how long a newcomer would wait.

Fair between tenants: a free permit goes to the tenant with the fewest at work. Under contention all therefore hold
equally many, however many requests each sends and however long each takes: equal shares of permit-seconds, which is
what a deficit round robin reaches with a cost per request that nobody knows beforehand.

What a tenant has at work beyond its share, since nobody else wanted it, others do not wait for here: who is within its
share finds room as if it were not there. The model server then lets others' prompts go first; its encoder serves who
comes first.
"""

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field

from service.admission.adaptive_limit import AdaptiveLimit

LEAST_SHARE = 2  # two requests at once are no greed, however many tenants there are
SMOOTHING_UP, SMOOTHING_DOWN = 1 / 4, 1 / 16  # slower work must be noticed before the room is full of it


@dataclass(slots=True)
class _Tenant:
    held: int = 0
    waiting: deque["asyncio.Future[Permit]"] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class Permit:
    """When it was given, and whether others go first where the request waits next: its tenant had its share."""

    began_s: float
    others_go_first: bool


class WaitingRoom:
    """The requests of one lane: at most `most` at work, `places` waiting. It only keeps books; for one event loop."""

    def __init__(self, most: int, places: int) -> None:
        self.limit = AdaptiveLimit(most)
        self._places = places
        self.tenants = 1  # that ask lately, to share between
        self.held = 0
        self.waiting = 0
        self.refused = False  # any, since the limit was last adapted
        self._beyond = 0  # of those held, by tenants that had their share
        self._tenants: dict[str, _Tenant] = {}  # in the order of their turns
        self._hold_s = 0.0  # how long a permit is held, smoothed
        self._began_s = 0.0  # sum of the times at which the held permits were given

    def fits(self, tenant: str, limit: int) -> bool:
        """Whether one more of `tenant` may go to work now."""
        is_within = self._is_within_share(tenant, limit)
        return self.held < self.limit.most and self.held - (self._beyond if is_within else 0) < limit

    def take(self, tenant: str, now_s: float, limit: int) -> Permit:
        """Note that `tenant` has one more at work; among equals, its next turn comes last."""
        permit = Permit(now_s, others_go_first=not self._is_within_share(tenant, limit))
        self._beyond += permit.others_go_first
        books = self._tenants.pop(tenant, None) or _Tenant()
        self._tenants[tenant] = books
        books.held += 1
        self.held += 1
        self._began_s += now_s
        return permit

    def give_back(self, tenant: str, permit: Permit, now_s: float) -> None:
        """Note that the work of `tenant` that had `permit` has ended."""
        books = self._tenants[tenant]
        books.held -= 1
        self.held -= 1
        self._beyond -= permit.others_go_first
        self._began_s -= permit.began_s
        took_s = now_s - permit.began_s
        smoothing = SMOOTHING_UP if took_s > self._hold_s else SMOOTHING_DOWN
        self._hold_s += (took_s - self._hold_s) * smoothing if self._hold_s else took_s
        self._forget_if_gone(tenant, books)

    def line_up(self, tenant: str) -> "asyncio.Future[Permit]":
        """Let `tenant` wait; the future is resolved by whoever gives it its turn."""
        books = self._tenants.setdefault(tenant, _Tenant())
        place: asyncio.Future[Permit] = asyncio.get_running_loop().create_future()
        books.waiting.append(place)
        self.waiting += 1
        return place

    def step_out(self, tenant: str, place: "asyncio.Future[Permit]") -> None:
        """Let one who waits go; `next_turn` may have passed it over already."""
        books = self._tenants.get(tenant)
        if books is not None and place in books.waiting:
            books.waiting.remove(place)
            self.waiting -= 1
            self._forget_if_gone(tenant, books)

    def next_turn(self, limit: int) -> "tuple[str, asyncio.Future[Permit]] | None":
        """Call up whose turn it is, if there is room for any who waits and was not cancelled in this very moment."""
        while self.waiting:
            tenant, books = min(
                ((name, books) for name, books in self._tenants.items() if books.waiting), key=lambda each: each[1].held
            )
            if not self.fits(tenant, limit):
                return None
            place = books.waiting.popleft()
            self.waiting -= 1
            if not place.done():
                return tenant, place
            self._forget_if_gone(tenant, books)
        return None

    def wait_s(self, tenant: str, now_s: float, limit: int) -> float:
        """Return how long one more request of `tenant` would wait: its place in line, by how often permits get free.

        Before a tenant gets its n-th permit, every other one that waits gets as many, if it wants them. By Little's law
        `limit` permits held for h seconds each get free every h / limit; when the model hangs, no permit gets free, and
        it shows in the age of those that are held.
        """
        mean_age_s = now_s - self._began_s / self.held if self.held else 0.0
        mine = self._tenants.get(tenant) or _Tenant()
        ahead, level = len(mine.waiting), mine.held + len(mine.waiting) + 1
        for other in self._tenants.values():
            if other is not mine:
                ahead += min(len(other.waiting), max(0, level - other.held))
        return (ahead + 1) * max(self._hold_s, mean_age_s) / limit

    def is_full_for(self, tenant: str) -> bool:
        """Whether as many of `tenant` wait as may, the places being shared by all tenants there.

        Until it is known how long a permit is held, no more may wait than may work.
        """
        mine = self._tenants.get(tenant)
        places = self._places if self._hold_s else min(self._places, self.limit.value)
        return mine is not None and len(mine.waiting) * len(self._tenants) >= places

    def _is_within_share(self, tenant: str, limit: int) -> bool:
        """Whether one more of `tenant` is no more than each would have, or at least not the most that anybody has."""
        mine = self._tenants[tenant].held + 1 if tenant in self._tenants else 1
        share = max(LEAST_SHARE, math.ceil(limit / self.tenants))
        return mine <= share or mine < max(books.held for books in self._tenants.values())

    def _forget_if_gone(self, tenant: str, books: _Tenant) -> None:
        if not books.held and not books.waiting:
            del self._tenants[tenant]
