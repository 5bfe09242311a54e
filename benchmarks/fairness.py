"""What a tenant that uploads twenty times its share costs the others: `python -m benchmarks.fairness --help`.

The gateway's own admission, of several workers, before an encoder as Triton has it: who comes first is served first, in
batches. Time is virtual, so an hour takes seconds, and nothing else of a machine is in the figures. The encoder's
capacity at full batches is 7 a second; all tenants together ask for 4.2, each for as much as the others, by chance.
Who is refused, or has not been answered after ten seconds, counts as having waited for these.
"""

import asyncio
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.figures import Sheet, arguments, quantile
from service.admission.contract import Lane, Spent
from service.admission.elsewhere import Elsewhere, shared_rows
from service.admission.permits import Permits
from service.errors import OverloadedError
from service.upkeep import ADAPT_EVERY_S

CONCURRENCY, MAX_WAIT_S = 64, 1.0  # the settings' defaults
BATCH, BATCH_S, IMAGE_S = 4, 0.4, 0.043  # what a batch takes, and each of its images more: tests/faults' slow encoder
RATE, EXCESS = 4.2, 20
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


class Encoder:
    """Serves who comes first, in batches; to be run as a task."""

    def __init__(self) -> None:
        self.images, self._queue_s, self._compute_s = 0, 0.0, 0.0
        self._queue: deque[tuple[float, asyncio.Future[None]]] = deque()
        self._come = asyncio.Event()

    @property
    def spent(self) -> Spent:
        """What Triton's statistics would say."""
        return Spent(self.images, self._queue_s, self._compute_s)

    async def encode(self) -> None:
        """Have an image encoded."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((asyncio.get_running_loop().time(), ended))
        self._come.set()
        await ended

    async def run(self) -> None:
        """Serve for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._come.wait()
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            if not self._queue:
                self._come.clear()
            batch = [each for each in batch if not each[1].done()]  # not of those who left
            if not batch:
                continue
            began_s, took_s = loop.time(), BATCH_S + IMAGE_S * len(batch)
            await asyncio.sleep(took_s)
            for came_s, ended in batch:
                self.images += 1
                self._queue_s += began_s - came_s
                self._compute_s += took_s
                if not ended.done():
                    ended.set_result(None)


@dataclass
class Became:
    """What became of uploads: how long each was waited for, and how many were not answered."""

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
    """Workers' admission, in front of the encoder."""

    def __init__(self, tenants: list[str], workers: int, rows_fd: int) -> None:
        self.encoder = Encoder()
        self.workers = [
            Permits(
                CONCURRENCY,
                max_wait_s=MAX_WAIT_S,
                active_tenants=lambda: len(tenants),
                elsewhere={Lane.PROMPT: Elsewhere(), Lane.ENCODE: Elsewhere(tenants, worker, workers, rows_fd)},
                clock=asyncio.get_running_loop().time,
            )
            for worker in range(workers)
        ]

    async def adapt(self) -> None:
        """Do for ever what a worker does every now and then."""
        while True:
            for permits in self.workers:
                permits.adapt({Lane.ENCODE: self.encoder.spent})
                permits.tell()
            await asyncio.sleep(ADAPT_EVERY_S)

    async def upload(self, tenant: str, permits: Permits, became: Became) -> None:
        """Make one upload."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            async with asyncio.timeout(DEADLINE_S), permits.hold(Lane.ENCODE, tenant, DEADLINE_S):
                await self.encoder.encode()
        except (OverloadedError, TimeoutError):
            became.lost += 1
            became.times_s.append(DEADLINE_S)
        else:
            became.times_s.append(loop.time() - began_s)

    async def load(self, tenant: str, rate: float, until_s: float, seed: int) -> Became:
        """Upload at random times, each by any of the workers."""
        loop, chance, became = asyncio.get_running_loop(), random.Random(f"{seed}/{tenant}"), Became()  # noqa: S311
        async with asyncio.TaskGroup() as uploads:
            while loop.time() < until_s:
                await asyncio.sleep(chance.expovariate(rate))
                uploads.create_task(self.upload(tenant, chance.choice(self.workers), became))
        return became


async def became(rates: Mapping[str, float], workers: int, seconds: float, seed: int) -> dict[str, Became]:
    """Return what becomes of each tenant's uploads, so many a second."""
    with shared_rows(len(rates), workers) as rows_fd:
        gateway = Gateway(list(rates), workers, rows_fd)
        upkeep = [asyncio.create_task(each) for each in (gateway.encoder.run(), gateway.adapt())]
        until_s = asyncio.get_running_loop().time() + seconds
        loads = await asyncio.gather(*(gateway.load(name, rate, until_s, seed) for name, rate in rates.items()))
        for task in upkeep:
            task.cancel()
        await asyncio.gather(*upkeep, return_exceptions=True)
    return dict(zip(rates, loads, strict=True))


def beside(tenants: int, workers: int, excess: float, seconds: float, seed: int) -> tuple[Became, Became]:
    """Return what becomes of a tenant's uploads with `excess` times its share, and of all others'."""
    rates = {GREEDY: excess * RATE / tenants, **{f"other {number}": RATE / tenants for number in range(1, tenants)}}
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        greedy, *others = runner.run(became(rates, workers, seconds, seed)).values()
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
    for seed in range(options.rounds):
        for tenants in options.tenants:
            for workers in options.workers:
                _, fair = beside(tenants, workers, 1, options.seconds, seed)
                greedy, unfair = beside(tenants, workers, EXCESS, options.seconds, seed)
                figures = {
                    "p99 of others s": fair.p99_s,
                    "beside a greedy one s": unfair.p99_s,
                    "moved %": 100 * (unfair.p99_s / fair.p99_s - 1),
                    "of them not answered %": 100 * unfair.lost / len(unfair.times_s),
                    "its share /s": RATE / tenants,
                    "it gets /s": greedy.answered / options.seconds,
                }
                sheet.add("Uploads beside a greedy tenant by workers", f"{tenants} tenants", figures, at=workers)
    sheet.publish(options.csv)


if __name__ == "__main__":
    main()
