"""The workload: callers in processes of their own, each with one session after the other."""

import io
import multiprocessing
import random
import time
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from skimage import data

from benchmarks.peers.callers import CALLERS

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

PATIENCE_S = 120.0
SCENES = (data.coffee, data.astronaut, data.chelsea)


class Work(NamedTuple):
    """The workload of one measurement."""

    callers: int
    seconds: float
    photographs: int
    clicks: int
    seed: int


class Figures(NamedTuple):
    """What came of it; times in milliseconds."""

    prompts_per_s: float
    p50: float
    p99: float


@cache
def photograph(number: int) -> bytes:
    """Return the bytes of one of many photographs of 480 x 640: pieces of a few real ones."""
    rng = np.random.default_rng(number)
    whole = Image.fromarray(SCENES[number % len(SCENES)]())
    width = int(rng.integers(200, min(whole.size)))
    left, top = (int(rng.integers(0, side - width + 1)) for side in whole.size)
    buffer = io.BytesIO()
    whole.crop((left, top, left + width, top + width * 3 // 4)).resize((640, 480)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def call_for_a_while(peer: str, target: str, work: Work, index: int, times: "Queue[list[float]]") -> None:
    """Be one caller: sessions of clicks, one after the other, until the time is over."""
    call = CALLERS[peer](target)
    chance = random.Random(work.seed * 1000 + index)  # noqa: S311
    weights = [1 / (rank + 1) for rank in range(work.photographs)]
    taken: list[float] = []
    end_s = time.monotonic() + work.seconds
    while time.monotonic() < end_s:
        (number,) = chance.choices(range(work.photographs), weights)
        for _ in range(work.clicks):
            click = (chance.uniform(20, 620), chance.uniform(20, 460))
            began_s = time.monotonic()
            call(f"peer-{number}", photograph(number), click)
            taken.append(time.monotonic() - began_s)
    times.put(taken)


def measured(peer: str, target: str, work: Work) -> Figures:
    """Run the callers, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    times: Queue[list[float]] = spawn.Queue()
    arguments = [(peer, target, work, index, times) for index in range(work.callers)]
    processes = [spawn.Process(target=call_for_a_while, args=each) for each in arguments]
    for process in processes:
        process.start()
    taken = sorted(took for _ in processes for took in times.get(timeout=work.seconds + PATIENCE_S))
    for process in processes:
        process.join()
    p50, p99 = (1e3 * taken[int(part * (len(taken) - 1))] for part in (0.5, 0.99))
    return Figures(len(taken) / work.seconds, p50, p99)
