"""What a tenant that asks for twenty times its share costs the others: `python -m benchmarks.fairness --help`.

The gateway's own admission, of several workers, before models as Triton has them: an encoder that serves who comes
first, in batches, and decoders that take first who is within its share. Time is virtual, so an hour takes seconds, and
nothing else of a machine is in the figures. All tenants together ask for six tenths of what full batches can, each for
as much as the others, by chance. Who is refused, or has no answer in ten seconds, counts as having waited so long.
"""

import asyncio
import heapq
import itertools
import random
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from benchmarks.figures import Sheet, arguments, quantile
from export.repository_from_spec import PROMPT_INSTANCES
from service.admission.contract import Lane, Spent
from service.admission.elsewhere import Elsewhere, shared_rows
from service.admission.permits import Permits
from service.admission.waiting_room import Permit
from service.errors import OverloadedError
from service.tensors import PRIORITY_FIRST, PRIORITY_LAST
from service.triton import YIELD_PART
from service.upkeep import ADAPT_EVERY_S

CONCURRENCY, MAX_WAIT_S = 64, 1.0  # the settings' defaults
LOAD, EXCESS = 0.6, 20
DEADLINE_S = 10.0
GREEDY = "greedy"


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop whose clock goes on to what is due next, at once, when there is nothing else to do."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self) -> None:
        super().__init__()
        self._now_s = 1000.0

    def time(self) -> float:
        """Return the virtual time."""
        return self._now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._now_s = max(self._now_s, self._scheduled[0].when())
        super()._run_once()  # type: ignore[misc]


@dataclass(frozen=True)
class Lot:
    """What is asked of a model, and what it can: a batch, of at most so many, takes `batch_s` and `each_s` for each."""

    lane: Lane
    instances: int
    batch: int
    batch_s: float
    each_s: float

    @property
    def full_rate(self) -> float:
        """How many full batches get done in a second."""
        return self.instances * self.batch / (self.batch_s + self.batch * self.each_s)


# As the slowed models of tests/faults/test_fairness.py.
UPLOADS = Lot(Lane.ENCODE, 1, 4, 0.4, 0.043)
PROMPTS = Lot(Lane.PROMPT, PROMPT_INSTANCES, 2, 0.4, 0.01)


class Model:
    """Serves in batches: by priority, and who comes first."""

    def __init__(self, lot: Lot) -> None:
        self.lot = lot
        self._done, self._queue_s, self._compute_s = 0, 0.0, 0.0
        self._queue: list[tuple[int, int, float, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._come = asyncio.Event()

    @property
    def spent(self) -> Spent:
        """What Triton's statistics would say."""
        return Spent(self._done, self._queue_s, self._compute_s)

    async def answer(self, priority: int) -> None:
        """Have one answered."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (priority, next(self._numbers), asyncio.get_running_loop().time(), ended))
        self._come.set()
        await ended

    async def run(self) -> None:
        """Serve for ever, as one instance."""
        loop = asyncio.get_running_loop()
        while True:
            batch: list[tuple[float, asyncio.Future[None]]] = []
            while self._queue and len(batch) < self.lot.batch:
                _, _, came_s, ended = heapq.heappop(self._queue)
                if not ended.done():  # else who asked has left
                    batch.append((came_s, ended))
            if not batch:
                self._come.clear()
                await self._come.wait()
                continue
            began_s, took_s = loop.time(), self.lot.batch_s + self.lot.each_s * len(batch)
            await asyncio.sleep(took_s)
            for came_s, ended in batch:
                self._done += 1
                self._queue_s += began_s - came_s
                self._compute_s += took_s
                if not ended.done():
                    ended.set_result(None)


@dataclass
class Became:
    """What became of requests: how long each was waited for, and how many were not answered."""

    times_s: list[float] = field(default_factory=list)
    lost: int = 0

    @property
    def p99_s(self) -> float:
        """The 99th percentile."""
        return quantile(sorted(self.times_s), 0.99)

    @property
    def answered(self) -> int:
        """How many were."""
        return len(self.times_s) - self.lost


class Gateway:
    """Workers' admission, in front of the model."""

    def __init__(self, lot: Lot, tenants: list[str], workers: int, rows_fd: int) -> None:
        self.model = Model(lot)
        clock = asyncio.get_running_loop().time
        self.workers = [
            Permits(
                CONCURRENCY,
                max_wait_s=MAX_WAIT_S,
                active_tenants=lambda: len(tenants),
                elsewhere={lane: Elsewhere() for lane in Lane}
                | {lot.lane: Elsewhere(tenants, worker, workers, rows_fd)},
                clock=clock,
            )
            for worker in range(workers)
        ]

    async def adapt(self) -> None:
        """Do for ever what a worker does every now and then."""
        while True:
            for permits in self.workers:
                permits.adapt({self.model.lot.lane: self.model.spent})
                permits.tell()
            await asyncio.sleep(ADAPT_EVERY_S)

    async def request(self, tenant: str, permits: Permits, became: Became) -> None:
        """Make one request."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            async with asyncio.timeout(DEADLINE_S), permits.hold(self.model.lot.lane, tenant, DEADLINE_S) as permit:
                await self._answer(permit, began_s + DEADLINE_S - loop.time())
        except (OverloadedError, TimeoutError):
            became.lost += 1
            became.times_s.append(DEADLINE_S)
        else:
            became.times_s.append(loop.time() - began_s)

    async def _answer(self, permit: Permit, left_s: float) -> None:
        """As `service.triton` does it: of prompts, who lets others go first asks again after half of its time."""
        if self.model.lot.lane is Lane.PROMPT and permit.others_go_first:
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s * YIELD_PART):
                    return await self.model.answer(PRIORITY_LAST)
        return await self.model.answer(PRIORITY_FIRST)

    async def load(self, tenant: str, rate: float, until_s: float, seed: int) -> Became:
        """Ask at random times, each time any of the workers."""
        loop, chance, became = asyncio.get_running_loop(), random.Random(f"{seed}/{tenant}"), Became()  # noqa: S311
        async with asyncio.TaskGroup() as requests:
            while loop.time() < until_s:
                await asyncio.sleep(chance.expovariate(rate))
                requests.create_task(self.request(tenant, chance.choice(self.workers), became))
        return became


async def became(lot: Lot, rates: Mapping[str, float], workers: int, seconds: float, seed: int) -> dict[str, Became]:
    """Return what becomes of each tenant's requests, so many a second."""
    with shared_rows(len(rates), workers) as rows_fd:
        gateway = Gateway(lot, list(rates), workers, rows_fd)
        upkeep = [
            asyncio.create_task(each)
            for each in (gateway.adapt(), *(gateway.model.run() for _ in range(lot.instances)))
        ]
        until_s = asyncio.get_running_loop().time() + seconds
        loads = await asyncio.gather(*(gateway.load(name, rate, until_s, seed) for name, rate in rates.items()))
        for task in upkeep:
            task.cancel()
        await asyncio.gather(*upkeep, return_exceptions=True)
    return dict(zip(rates, loads, strict=True))


def beside(lot: Lot, tenants: int, workers: int, excess: float, seconds: float, seed: int) -> tuple[Became, Became]:
    """Return what becomes of a tenant's requests with `excess` times its share, and of all others'."""
    share = LOAD * lot.full_rate / tenants
    rates = {GREEDY: excess * share, **{f"other {number}": share for number in range(1, tenants)}}
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        greedy, *others = runner.run(became(lot, rates, workers, seconds, seed)).values()
    return greedy, Became([time_s for each in others for time_s in each.times_s], sum(each.lost for each in others))


def main() -> None:
    """Measure."""
    parser = arguments("fairness", __doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="virtual ones (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tenants", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 8])
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 600.0, 1
    sheet = Sheet("fairness")
    lots = {"Uploads": UPLOADS, "Prompts": PROMPTS}
    chosen = itertools.product(range(options.rounds), lots, options.tenants, options.workers)
    for seed, name, tenants, workers in chosen:
        _, fair = beside(lots[name], tenants, workers, 1, options.seconds, seed)
        greedy, unfair = beside(lots[name], tenants, workers, EXCESS, options.seconds, seed)
        figures = {
            "p99 of others s": fair.p99_s,
            "beside a greedy one s": unfair.p99_s,
            "moved %": 100 * (unfair.p99_s / fair.p99_s - 1),
            "of them not answered %": 100 * unfair.lost / len(unfair.times_s),
            "its share /s": LOAD * lots[name].full_rate / tenants,
            "it gets /s": greedy.answered / options.seconds,
        }
        sheet.add(f"{name} beside a greedy tenant by workers", f"{tenants} tenants", figures, at=workers)
    sheet.publish(options.csv)


if __name__ == "__main__":
    main()
