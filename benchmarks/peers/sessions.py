"""The workload: callers in processes of their own, each with one session after the other."""

import multiprocessing
import random
import time
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.figures import quantile
from benchmarks.peers.callers import CALLERS
from benchmarks.photographs import Popularity, photograph

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

PATIENCE_S = 120.0


class Work(NamedTuple):
    """The workload of one measurement."""

    callers: int
    warm_up_s: float
    seconds: float
    photographs: int
    clicks: int
    seed: int


def call_for_a_while(peer: str, target: str, work: Work, index: int, times: "Queue[list[float]]") -> None:
    """Be one caller: sessions of clicks, one after the other, until the time is over.

    Each round has photographs of its own, so that no peer finds what it was sent before. Clicks during the warm-up do
    not count: then hardly a photograph has been seen, and all that is measured is the encoder.
    """
    call = CALLERS[peer](target)
    chance = random.Random(work.seed * 1000 + index)  # noqa: S311
    popularity = Popularity(work.photographs)
    taken: list[float] = []
    counting_s = time.monotonic() + work.warm_up_s
    end_s = counting_s + work.seconds
    while time.monotonic() < end_s:
        number = popularity.one(chance)
        image_id = f"{peer.replace(', ', '-')}-{work.seed}-{number}"
        image = photograph(number + work.photographs * work.seed)
        for _ in range(work.clicks):
            click = (chance.uniform(20, 620), chance.uniform(20, 460))
            began_s = time.monotonic()
            call(image_id, image, click)
            if began_s >= counting_s:
                taken.append(time.monotonic() - began_s)
    times.put(taken)


def measured(peer: str, target: str, work: Work) -> dict[str, float]:
    """Run the callers, each in a process of its own; return what came of it."""
    spawn = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    times: Queue[list[float]] = spawn.Queue()
    arguments = [(peer, target, work, index, times) for index in range(work.callers)]
    processes = [spawn.Process(target=call_for_a_while, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    taken = sorted(took for _ in processes for took in times.get(timeout=work.warm_up_s + work.seconds + PATIENCE_S))
    for process in processes:
        process.join()
    return {
        "prompts/s": len(taken) / work.seconds,
        "p50 ms": 1000 * quantile(taken, 0.5),
        "p99 ms": 1000 * quantile(taken, 0.99),
    }
