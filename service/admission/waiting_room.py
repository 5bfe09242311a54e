"""One lane: who is at work in it, who waits, whose turn is next, and how long a newcomer would wait.

Fair between tenants: a free permit goes to the tenant with the fewest at work. Under contention all therefore hold
equally many, however many requests each sends and however long each takes: equal shares of permit-seconds, which is
what a deficit round robin reaches with a cost per request that nobody knows beforehand.

A tenant presses when it has much more under way than others could have, with all workers together, or is refused; until
it has not for a while. Who does not press goes to work as if what others have beyond their share were not there. Who
presses has its share, and more only as long as there is room for it: what is beyond its share others' prompts overtake
in the model server, too. Its encoder serves who comes first, in batches, and others would have to sit it out, so that
there is only room for what leaves them their places in the next batch.
"""

import asyncio
import math
from collections import defaultdict, deque
from dataclasses import dataclass, field

from service.admission.adaptive_limit import AdaptiveLimit
from service.admission.elsewhere import CALM_S, Elsewhere, Lately

LEAST_SHARE = 2  # two requests at once are no greed, however many tenants there are
MANY, LEAST_MANY = 24, 6  # under way are pressing: so many, shared by all tenants, but no fewer than this
# Where nobody is overtaken. A batch of the encoder's holds four: whoever comes shall find room in the next one. These
# are by what they cost others, and who presses: see benchmarks/fairness.py.
NOT_OVERTAKEN = 6  # shared by all tenants, is what each of them that presses may have at work: one at least
FEW = 2  # at work keep the encoder busy: what it computes, and the next
SMOOTHING_UP, SMOOTHING_DOWN = 1 / 4, 1 / 16  # slower work must be noticed before the room is full of it


@dataclass(slots=True)
class _Tenant:
    held: int = 0
    waiting: deque["asyncio.Future[Permit]"] = field(default_factory=deque)


@dataclass(slots=True)
class _Held:
    """Permits that are held, and how long they are."""

    count: int = 0
    began_s: float = 0.0  # sum of the times at which they were given
    smoothed_s: float = 0.0  # how long those that were given back had been held

    def give(self, now_s: float) -> None:
        """Note one more."""
        self.count += 1
        self.began_s += now_s

    def take_back(self, began_s: float, now_s: float) -> None:
        """Note that one has ended that began then."""
        self.count -= 1
        self.began_s -= began_s
        took_s = now_s - began_s
        smoothing = SMOOTHING_UP if took_s > self.smoothed_s else SMOOTHING_DOWN
        self.smoothed_s += (took_s - self.smoothed_s) * smoothing if self.smoothed_s else took_s

    def ends_per_s(self, now_s: float) -> float:
        """Return how often one ends: by Little's law, as many as are held, in the time for which one is.

        When the model hangs, none ends, and it shows in the age of those that are held.
        """
        if not self.count:
            return 0.0
        hold_s = max(self.smoothed_s, now_s - self.began_s / self.count)
        return self.count / hold_s if hold_s else math.inf


@dataclass(frozen=True, slots=True)
class Permit:
    """When it was given, and whether others go first where the request waits next: its tenant had its share."""

    began_s: float
    others_go_first: bool


class WaitingRoom:
    """The requests of one lane: at most `most` at work, `places` waiting. It only keeps books; for one event loop.

    `overtaken` says that in the model server, too, others go before what is beyond its tenant's share. What is at work
    `elsewhere`, with other workers, is part of it.
    """

    def __init__(self, most: int, places: int, *, overtaken: bool, elsewhere: Elsewhere | None = None) -> None:
        self.limit = AdaptiveLimit(most)
        self._overtaken = overtaken
        self._elsewhere = elsewhere or Elsewhere()
        self._places = places
        self.tenants = 1  # that ask lately, to share between
        self.waiting = 0
        self.refused = False  # any, since the limit was last adapted
        # Those beyond their tenant's share are overtaken, and held for far longer.
        self._within, self._beyond = _Held(), _Held()
        self._tenants: dict[str, _Tenant] = {}  # in the order of their turns
        self._lately: defaultdict[str, Lately] = defaultdict(Lately)

    @property
    def held(self) -> int:
        """How many are at work."""
        return self._within.count + self._beyond.count

    def ask(self, tenant: str, now_s: float) -> None:
        """Note that `tenant` asks for one more."""
        self._lately[tenant].asked_s = now_s
        if self._under_way(tenant, now_s) >= max(LEAST_MANY, MANY // self._sharing(now_s)):
            self._lately[tenant].pressed_s = now_s
        self._tell(tenant)

    def refuse(self, tenant: str, now_s: float) -> None:
        """Note that one of `tenant` is refused: if it has others under way, it asks for too much."""
        self.refused = True
        if self._under_way(tenant, now_s) >= LEAST_SHARE:
            self._lately[tenant].pressed_s = now_s
            self._tell(tenant)

    def beat(self, now_s: float) -> None:
        """Tell other workers that this one is there."""
        self._elsewhere.beat(now_s)

    def fits(self, tenant: str, now_s: float, limit: int) -> bool:
        """Whether one more of `tenant` may go to work now."""
        if self.held >= self.limit.most:
            return False
        if self._is_within_share(tenant, now_s, limit):
            return self._within.count < limit
        room = limit if self._overtaken or not self._leaves_room(now_s) else min(FEW, limit)
        return self.at_work(now_s) < room

    def at_work(self, now_s: float) -> int:
        """Return how many are at work, with all workers."""
        return self.held + self._elsewhere.at_work(now_s)

    def take(self, tenant: str, now_s: float, limit: int) -> Permit:
        """Note that `tenant` has one more at work; among equals, its next turn comes last."""
        permit = Permit(now_s, others_go_first=not self._is_within_share(tenant, now_s, limit))
        (self._beyond if permit.others_go_first else self._within).give(now_s)
        books = self._tenants.pop(tenant, None) or _Tenant()
        self._tenants[tenant] = books
        books.held += 1
        self._lately[tenant].served_s = now_s
        self._tell(tenant)
        return permit

    def give_back(self, tenant: str, permit: Permit, now_s: float) -> None:
        """Note that the work of `tenant` that had `permit` has ended."""
        books = self._tenants[tenant]
        books.held -= 1
        (self._beyond if permit.others_go_first else self._within).take_back(permit.began_s, now_s)
        self._tell(tenant)
        self._forget_if_gone(tenant, books)

    def line_up(self, tenant: str) -> "asyncio.Future[Permit]":
        """Let `tenant` wait; the future is resolved by whoever gives it its turn."""
        books = self._tenants.setdefault(tenant, _Tenant())
        place: asyncio.Future[Permit] = asyncio.get_running_loop().create_future()
        books.waiting.append(place)
        self.waiting += 1
        self._tell(tenant)
        return place

    def step_out(self, tenant: str, place: "asyncio.Future[Permit]") -> None:
        """Let one who waits go; `next_turn` may have passed it over already."""
        books = self._tenants.get(tenant)
        if books is not None and place in books.waiting:
            books.waiting.remove(place)
            self.waiting -= 1
            self._tell(tenant)
            self._forget_if_gone(tenant, books)

    def next_turn(self, now_s: float, limit: int) -> "tuple[str, asyncio.Future[Permit]] | None":
        """Call up whose turn it is, if there is room for any who waits and was not cancelled in this very moment."""
        while self.waiting:
            waiting = [tenant for tenant, books in self._tenants.items() if books.waiting]
            in_turn = sorted(waiting, key=lambda tenant: self._tenants[tenant].held)
            tenant = next((tenant for tenant in in_turn if self.fits(tenant, now_s, limit)), None)
            if tenant is None:
                return None
            books = self._tenants[tenant]
            place = books.waiting.popleft()
            self.waiting -= 1
            if not place.done():
                return tenant, place
            self._tell(tenant)
            self._forget_if_gone(tenant, books)
        return None

    def wait_s(self, tenant: str, now_s: float, limit: int) -> float:
        """Return how long one more request of `tenant` would wait that does not fit, by how often permits get free.

        Before a tenant gets its n-th permit, every other one that waits gets as many, if it wants them. Who is within
        its share waits only for permits of its like, unless there are as many of all kinds as there may be.

        Where nobody is overtaken this is too little for who is beyond its share, who may have to wait until one of its
        own ends. But enough for that would have tenants refused whose few requests come together.
        """
        mine = self._tenants.get(tenant) or _Tenant()
        ahead, level = len(mine.waiting), mine.held + len(mine.waiting) + 1
        for other in self._tenants.values():
            if other is not mine:
                ahead += min(len(other.waiting), max(0, level - other.held))
        within, everything = [self._within], [self._within, self._beyond]
        if not self._is_within_share(tenant, now_s, limit):
            in_the_way, room = everything, limit
        elif self.held < self.limit.most:
            in_the_way, room = within, limit
        else:
            in_the_way, room = everything, self.limit.most
        ahead += max(0, sum(held.count for held in in_the_way) - room)
        ends_per_s = sum(held.ends_per_s(now_s) for held in in_the_way)
        if ends_per_s:
            return (ahead + 1) / ends_per_s
        return (ahead + 1) * max(self._within.smoothed_s, self._beyond.smoothed_s)  # all that is at work is elsewhere

    def is_full_for(self, tenant: str) -> bool:
        """Whether as many of `tenant` wait as may, the places being shared by all tenants there.

        Until it is known how long a permit is held, no more may wait than may work. While nothing is at work here, few:
        what ends elsewhere, and makes room for them, is not known.
        """
        mine = self._tenants.get(tenant)
        if mine is None:
            return False
        if not self.held:
            return len(mine.waiting) >= LEAST_MANY
        places = self._places if self._within.smoothed_s else min(self._places, self.limit.value)
        return len(mine.waiting) * len(self._tenants) >= places

    def _is_within_share(self, tenant: str, now_s: float, limit: int) -> bool:
        """Whether one more of `tenant` is no more than its share, or at least not the most that anybody has.

        If it presses, while others ask, too, its share is of all workers, and it must be the turn of this one. Who does
        not press may have a few more than its share; and where nobody is overtaken, as many as it likes.
        """
        share = max(LEAST_SHARE, math.ceil(limit / self._sharing(now_s)))
        if self._leaves_room(now_s):
            if self._presses(tenant, now_s):
                fair = self._at_work_of(tenant, now_s) < self._share_of_who_presses(now_s, limit)
                return fair and self._elsewhere.turn_s(tenant, now_s) >= self._lately[tenant].served_s
            if not self._overtaken:
                return True
            share = max(share, LEAST_MANY)
        mine = self._tenants[tenant].held + 1 if tenant in self._tenants else 1
        return mine <= share or mine < max(books.held for books in self._tenants.values())

    def _presses(self, tenant: str, now_s: float) -> bool:
        return now_s <= max(self._lately[tenant].pressed_s, self._elsewhere.pressed_s(tenant)) + CALM_S

    def _sharing(self, now_s: float) -> int:
        """Return how many tenants share the permits: those that ask for anything, or if it is known, in this lane."""
        return self._elsewhere.asking(now_s) or self.tenants

    def _leaves_room(self, now_s: float) -> bool:
        """Whether who presses leaves others room: there are others; and if nobody is overtaken, such that do not."""
        return self._sharing(now_s) > 1 and (self._overtaken or not self._elsewhere.all_press(now_s))

    def _share_of_who_presses(self, now_s: float, limit: int) -> int:
        return max(1, (limit if self._overtaken else NOT_OVERTAKEN) // self._sharing(now_s))

    def _at_work_of(self, tenant: str, now_s: float) -> int:
        """Return how many of `tenant` are at work, with any worker."""
        books = self._tenants.get(tenant)
        return (books.held if books else 0) + self._elsewhere.at_work_of(tenant, now_s)

    def _under_way(self, tenant: str, now_s: float) -> int:
        """Return how many of `tenant` are at work, with any worker, or wait here."""
        books = self._tenants.get(tenant)
        return self._at_work_of(tenant, now_s) + (len(books.waiting) if books else 0)

    def _tell(self, tenant: str) -> None:
        books = self._tenants.get(tenant) or _Tenant()
        self._elsewhere.tell(tenant, at_work=books.held, waiting=len(books.waiting), lately=self._lately[tenant])

    def _forget_if_gone(self, tenant: str, books: _Tenant) -> None:
        if not books.held and not books.waiting:
            del self._tenants[tenant]
