"""Open-loop load: requests come when they come, however slow the answers are: `python -m benchmarks.load --help`.

Arrivals are a Poisson process, drawn before the first request is sent. Each latency counts from the moment at which the
request was due, so a stalled server (or a stalled generator) cannot hide what it did to those who came meanwhile
(coordinated omission). Each load is a process of its own: what one generator does, another one does not feel.

The program's load are people: each comes for one photograph (popular ones more often, by Zipf's law), clicks on it a
few times, and thinks before each further click. Who finds the photograph no longer cached uploads it first, and that
click's latency has the upload in it. Without `--address` it starts a service of its own, and tells what CPU time the
gateway and Triton spent.
"""

import argparse
import asyncio
import multiprocessing
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from benchmarks.callers import NOT_CACHED, OK, TRANSPORTS, Answer, Caller, Target, calling, have_cached
from benchmarks.figures import Sheet, arguments, quantile
from benchmarks.machine import cpu_s_of
from benchmarks.photographs import Popularity, photograph
from benchmarks.services import real_service

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

PHOTO = Path(__file__).parent.parent / "service" / "rest" / "static" / "samples" / "cat.jpg"
START_S = 120.0  # in which all processes must be ready to send
LEAD_S = 0.2  # from then until the first request may be due
QUANTILES = {"p50 ms": 0.5, "p95 ms": 0.95, "p99 ms": 0.99, "p99.9 ms": 0.999}


@dataclass(frozen=True)
class Load:
    """What to send: `rate` requests per second on average, for `seconds`, each with `deadline_s`.

    `kind` "prompt": on the cached image `image_id`; "encode": uploads, each under an id of its own; "session": people
    who come for one of `photographs`, click `clicks` times, and think for `think_s` on average in between. They come
    during `seconds`; the last of them leave later.
    """

    transport: str  # "HTTP" or "gRPC"
    address: str  # host:port
    rate: float
    seconds: float
    kind: str = "prompt"
    image_id: str = "load"
    key: str = ""
    deadline_s: float = 10.0
    seed: int = 0
    photographs: int = 200
    clicks: int = 8
    think_s: float = 1.0

    @property
    def target(self) -> Target:
        """Whom to send it to."""
        return Target(self.transport, self.address, self.key, self.deadline_s)

    @property
    def longest_s(self) -> float:
        """When the last answer is there at the latest; nobody thinks ten times as long as people do on average."""
        session_s = self.clicks * (10 * self.think_s + self.deadline_s) if self.kind == "session" else self.deadline_s
        return self.seconds + session_s


@dataclass(frozen=True)
class Sample:
    """One request: when it was due, the time from then to its answer, the outcome, and when to come back if told.

    `cached` is False if it needed an upload first.
    """

    due_s: float
    took_s: float
    outcome: str
    retry_after_s: float | None
    cached: bool = True


@dataclass
class Samples:
    """What became of a load."""

    load: Load
    all: list[Sample] = field(default_factory=list)

    def of(self, *outcomes: str) -> list[Sample]:
        """Return those with one of these outcomes."""
        return [sample for sample in self.all if sample.outcome in outcomes]

    def goodput(self, warm_up_s: float = 0.0) -> float:
        """Return good answers per second, counted where they arrive, between `warm_up_s` and the last arrival."""
        arrived_s = (sample.due_s + sample.took_s for sample in self.of(OK))
        return sum(warm_up_s <= at_s < self.load.seconds for at_s in arrived_s) / (self.load.seconds - warm_up_s)

    def quantile_s(self, part: float, *outcomes: str) -> float:
        """Return the latency that `part` of those with these outcomes did not exceed."""
        return quantile(sorted(sample.took_s for sample in self.of(*outcomes)), part)

    def figures(self) -> dict[str, float]:
        """Return the figures of a table's line."""
        good, count = self.of(OK), max(len(self.all), 1)
        misses_s = [sample.took_s for sample in good if not sample.cached]
        return {
            "requests": len(self.all),
            "good/s": self.goodput(min(self.load.seconds / 2, self.load.clicks * self.load.think_s)),
            "hits %": 100 * (1 - len(misses_s) / max(len(good), 1)),
            **{name: 1000 * self.quantile_s(part, OK) for name, part in QUANTILES.items()},
            "p50 of misses ms": 1000 * statistics.median(misses_s) if misses_s else 0.0,
            "not answered %": 100 * (1 - len(good) / count),
        }


def run_loads(*loads: Load) -> list[Samples]:
    """Run loads side by side, each in a process of its own, and return what became of each."""
    spawn = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    queue: Queue[tuple[int, list[Sample]]] = spawn.Queue()
    start = spawn.Barrier(len(loads))
    processes = [
        spawn.Process(target=_run, args=(index, load, start, queue), daemon=True) for index, load in enumerate(loads)
    ]
    for process in processes:
        process.start()
    longest_s = max(load.longest_s for load in loads)
    results = dict(queue.get(timeout=START_S + longest_s) for _ in processes)
    for process in processes:
        process.join()
    return [Samples(load, results[index]) for index, load in enumerate(loads)]


def arrivals_s(load: Load) -> Iterator[float]:
    """Yield the times of a Poisson process: of requests, or of people who bring `clicks` of them each."""
    chance = random.Random(load.seed)  # noqa: S311 - chance, not secrets
    rate = load.rate / load.clicks if load.kind == "session" else load.rate
    at_s = chance.expovariate(rate)
    while at_s < load.seconds:
        yield at_s
        at_s += chance.expovariate(rate)


def _run(index: int, load: Load, start: Barrier, queue: "Queue[tuple[int, list[Sample]]]") -> None:
    queue.put((index, asyncio.run(_send_all(load, start))))


async def _send_all(load: Load, start: Barrier) -> list[Sample]:
    if load.kind == "session":
        for number in range(load.photographs):
            photograph(number)  # drawn now, not while others are due
    async with calling(load.target) as caller, asyncio.TaskGroup() as group:
        start.wait(START_S)
        begin_s = monotonic() + LEAD_S
        sending = Sending(load, caller, begin_s)
        for number, due_s in enumerate(arrivals_s(load)):
            await asyncio.sleep(begin_s + due_s - monotonic())
            group.create_task(sending.arrival(number, due_s))
    return sending.samples


class Sending:
    """Sends what arrivals bring, and keeps a sample of each request."""

    def __init__(self, load: Load, caller: Caller, begin_s: float) -> None:
        self.samples: list[Sample] = []
        self._load = load
        self._caller = caller
        self._begin_s = begin_s
        self._photo = PHOTO.read_bytes()
        self._popularity = Popularity(load.photographs)

    async def arrival(self, number: int, due_s: float) -> None:
        """Send a request, or a session's."""
        load = self._load
        if load.kind != "session":
            await self._click(number, due_s, load.image_id)
            return
        chance = random.Random(f"{load.seed}/{number}")  # noqa: S311
        chosen = self._popularity.one(chance)
        for _ in range(load.clicks):
            await asyncio.sleep(self._begin_s + due_s - monotonic())
            await self._click(number, due_s, f"{load.image_id}-{chosen}", chosen)
            due_s = monotonic() - self._begin_s + chance.expovariate(1 / load.think_s)

    async def _click(self, number: int, due_s: float, image_id: str, chosen: int | None = None) -> None:
        try:
            answer, cached = await asyncio.wait_for(self._answer(number, image_id, chosen), self._load.deadline_s + 1)
        except (OSError, EOFError) as error:
            answer, cached = Answer(type(error).__name__), True
        took_s = monotonic() - self._begin_s - due_s
        self.samples.append(Sample(due_s, took_s, answer.outcome, answer.retry_after_s, cached))

    async def _answer(self, number: int, image_id: str, chosen: int | None) -> tuple[Answer, bool]:
        """Return the answer, and whether the image was cached."""
        if self._load.kind == "encode":
            return await self._caller.upload(f"{image_id}-{self._load.seed}-{number}", self._photo), True
        answer = await self._caller.prompt(image_id)
        if answer.outcome != NOT_CACHED or chosen is None:
            return answer, True
        answer = await self._caller.upload(image_id, photograph(chosen))
        return (await self._caller.prompt(image_id) if answer.outcome == OK else answer), False


async def warmed(load: Load, photographs: int) -> None:
    """Upload the most popular ones, so that the load meets a cache as it is after a while."""
    async with calling(load.target) as caller:
        for number in range(photographs):
            await have_cached(caller, f"{load.image_id}-{number}", photograph(number))


def main(argv: Sequence[str] | None = None) -> None:
    """Send sessions over each transport in turn, and tell what became of them."""
    options = parser().parse_args(argv)
    if options.quick:
        options.rounds, options.seconds, options.think_s = 1, 12.0, 0.25
    sheet = Sheet("load")
    with nullcontext() if options.address else real_service() as service:
        addresses = service.addresses if service else {options.transport: options.address}
        watched = service.processes if service else {}
        for turn in range(options.rounds):
            for transport, address in addresses.items():
                load = load_from(options, transport, address, options.seed + turn)
                asyncio.run(warmed(load, options.warm))
                before = cpu_s_of(watched)
                (samples,) = run_loads(load)
                spent = {name: seconds - before[name] for name, seconds in cpu_s_of(watched).items()}
                add(sheet, samples, spent)
                print(dict(Counter(sample.outcome for sample in samples.all)))
    sheet.publish(options.csv)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = arguments("load", __doc__)
    made.add_argument("--transport", choices=TRANSPORTS, default="gRPC", help="of --address (default: %(default)s)")
    made.add_argument("--address", help="host:port of a running service, instead of one of its own")
    made.add_argument("--rate", type=float, default=50.0, help="clicks per second (default: %(default)s)")
    made.add_argument("--seconds", type=float, default=20.0, help="for how long (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=3, help="of each transport (default: %(default)s)")
    made.add_argument("--photographs", type=int, default=200, help="that people come for (default: %(default)s)")
    made.add_argument("--warm", type=int, default=50, help="of them cached at the start (default: %(default)s)")
    made.add_argument("--clicks", type=int, default=8, help="of each session (default: %(default)s)")
    made.add_argument("--think-s", type=float, default=1.0, help="between two clicks (default: %(default)s)")
    made.add_argument("--key", default="", help="API key")
    made.add_argument("--deadline-s", type=float, default=10.0, help="of each request (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="another seed, other arrivals")
    return made


def load_from(options: argparse.Namespace, transport: str, address: str, seed: int) -> Load:
    """Return the load that the command line asks for."""
    return Load(
        transport,
        address,
        options.rate,
        options.seconds,
        "session",
        image_id=f"{transport}-{seed}",  # no load finds what another one had encoded
        key=options.key,
        deadline_s=options.deadline_s,
        seed=seed,
        photographs=options.photographs,
        clicks=options.clicks,
        think_s=options.think_s,
    )


def add(sheet: Sheet, samples: Samples, spent_s: dict[str, float]) -> None:
    """Note one round."""
    load = samples.load
    title = f"Sessions of {load.clicks} clicks, {load.rate:g} clicks/s, on {load.photographs} photographs (Zipf)"
    per_request = {f"{name} CPU ms": 1000 * spent / max(len(samples.all), 1) for name, spent in spent_s.items()}
    sheet.add(title, load.transport, samples.figures() | per_request)


if __name__ == "__main__":
    main()
